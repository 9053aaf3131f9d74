"""The console in headless Chromium: its DOM is checked, screenshots are taken.

usage: console.py URL OUT.png

URL is the server's root, or deep-links a response: http://HOST/?response=ID.
Without one, the newest response is opened. OUT.png is 1280 px wide; the
390 px one goes to OUT-390.png. Prints one JSON line. Exits 1 when the page lacks
something, 3 when there is no Chromium.

Speaks the DevTools protocol over a pipe, so that it needs no package: Chromium's
own --screenshot cannot make a window narrower than 500 px.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

WANTED = {
    "release": "/^rel-[0-9a-f]+$/.test(document.querySelector('#release-body code')?.textContent)",
    "gate checks": "document.querySelectorAll('#checks li').length > 0",
    "response rows": "document.querySelectorAll('#recent-table tr[data-id]').length > 0",
    "lineage graph": "document.querySelector('#graph svg.lineage .card.release') !== null",
    "documents": "document.querySelectorAll('#documents li').length > 0",
    "latency histogram": "document.querySelector('#ttft svg .bar') !== null",
    "no trouble": "document.querySelector('#trouble').hidden",
    "no foreign markup": "document.querySelectorAll('main script, main img, main iframe').length === 0",
    "no sideways scroll": "document.documentElement.scrollWidth <= window.innerWidth",
}


class Browser:
    def __init__(self, program, profile):
        read_end, self.write = os.pipe()
        self.read, write_end = os.pipe()

        def wire():
            # Chromium reads commands from fd 3 and writes answers to fd 4;
            # the detour keeps one dup2 from closing the other's source.
            high = [os.dup(read_end), os.dup(write_end)]
            while min(high) < 5:
                high = [os.dup(fd) for fd in high]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                 "--no-first-run", f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen([program, *flags], preexec_fn=wire, close_fds=False,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(read_end)
        os.close(write_end)
        self.buffer, self.last, self.session = b"", 0, None
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]

    def call(self, method, **params):
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                chunk = os.read(self.read, 1 << 16)
                if not chunk:
                    raise RuntimeError("Chromium ended")
                self.buffer += chunk
            text, self.buffer = self.buffer.split(b"\0", 1)
            reply = json.loads(text)
            if reply.get("id") == self.last:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]

    def value(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def visit(self, url, width, scheme, out):
        """What of WANTED is missing; writes a screenshot of the whole page."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + 40
        while True:
            missing = [name for name, test in WANTED.items() if not self.value(test)]
            if not missing or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        height = self.value("document.documentElement.scrollHeight")
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True,
                         clip={"x": 0, "y": 0, "width": width, "height": height, "scale": 1})
        with open(out, "wb") as file:
            file.write(base64.b64decode(shot["data"]))
        return missing


def main():
    url, out = sys.argv[1], sys.argv[2]
    program = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    if not program:
        print("no Chromium found; on Debian: apt-get install -y --no-install-recommends chromium", file=sys.stderr)
        return 3
    if "response=" not in url:
        root = url.rstrip("/")
        with urllib.request.urlopen(f"{root}/ashlar/responses?limit=1") as reply:
            rows = json.load(reply)["responses"]
        if not rows:
            print("no response is recorded yet: ask something first", file=sys.stderr)
            return 1
        url = f"{root}/?response={rows[0]['id']}"
    stem = out.removesuffix(".png")
    missing = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, profile)
        try:
            for name, width, scheme in [(out, 1280, "light"), (f"{stem}-dark.png", 1280, "dark"), (f"{stem}-390.png", 390, "light")]:
                missing[name] = browser.visit(url, width, scheme, name)
        finally:
            browser.process.kill()
            browser.process.wait()
    passed = not any(missing.values())
    print(json.dumps({"passed": passed, "missing": missing}))
    return not passed


sys.exit(main())
