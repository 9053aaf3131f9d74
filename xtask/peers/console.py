"""The console in headless Chromium: its DOM is checked, screenshots are taken.

usage: console.py URL OUT.png [--seeded | --key=SECRET]

URL is the server's root, or deep-links a response: http://HOST/?response=ID.
Without one, the newest response is taken. Each view is visited light and dark,
wide and narrow; the picture of one goes to OUT-VIEW-SCHEME-WIDTH.png. With
--seeded, each view must show what the gateway's tests seed, hostile names
included, and is walked with the keyboard. With --key, only signing in with it and
out again is tried. Prints one JSON line. Exits 1 when
something is wrong, 3 when there is no Chromium.

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
from urllib.parse import quote

SCREENS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]

# What holds in every view of any server.
ALWAYS = {
    "a heading": "document.querySelector('main h1')?.textContent.length > 0",
    "a title": "document.title.endsWith('– Ashlar')",
    "one current entry": "document.querySelectorAll('#nav [aria-current=page]').length === 1",
    "no trouble": "document.querySelector('#trouble').hidden",
    "no foreign markup": "document.querySelectorAll('main script, main img, main iframe, main object').length === 0",
    "nothing ran": "window.pwned === undefined",
    "no sideways scroll": "document.documentElement.scrollWidth <= window.innerWidth",
    "every control has a name": """[...document.querySelectorAll('main button, main a, main input, main select, main textarea')].every((n) =>
        n.textContent.trim() || n.getAttribute('aria-label') || n.labels?.length || document.querySelector(`label[for="${n.id}"]`))""",
    "every table has column names": "[...document.querySelectorAll('main table')].every((t) => t.tHead?.rows[0].cells.length === (t.tBodies[0]?.rows[0]?.cells.length ?? t.tHead.rows[0].cells.length))",
    "every chart has a name": "[...document.querySelectorAll('.plot')].every((p) => p.getAttribute('aria-label') && document.getElementById(p.getAttribute('aria-describedby'))?.textContent)",
}

TEXT = "document.querySelector('main').textContent"
HOSTILE = "<script>window.pwned=1</script>"

# What the seeded views show besides.
SEEDED = {
    "overview": {
        "requests drawn": "document.querySelectorAll('.plot svg path.line').length >= 3",
        "figures": "document.querySelectorAll('.figure').length === 6",
        "backends": f"{TEXT}.includes('gpu-a') && {TEXT}.includes('gpu-b')",
        "an error budget": f"/\\d %/.test({TEXT}) && {TEXT}.includes('Error budget left')",
    },
    "latency": {
        "all phases": "document.querySelectorAll('.parts-key li').length === 5",
        "histograms": "document.querySelectorAll('.histogram rect.bar').length > 5",
        "percentiles": f"{TEXT}.includes('p99')",
    },
    "routing": {
        "circuits": f"{TEXT}.includes('closed')",
        "policies": f"{TEXT}.includes('latency')",
        "an explanation": f"{TEXT}.includes('Score, lower is better') && {TEXT}.includes('quicker of two drawn')",
        "an attempt": "document.querySelector('.gantt rect') !== null",
    },
    "cost": {
        "exact costs": f"/exactly \\d+\\.\\d{{2,}}/.test({TEXT})",
        "keys": f"{TEXT}.includes('notebook')",
        "a hostile name as text": f"{TEXT}.includes({HOSTILE!r})",
        "token classes": f"{TEXT}.includes('Input, from cache')",
        "unknown costs": f"{TEXT}.includes('Unknown cost')",
    },
    "cache": {"a hit rate": f"/Hit rate\\d+(\\.\\d+)? %/.test({TEXT})", "money saved": f"{TEXT}.includes('Money saved, USD')", "rows": "document.querySelectorAll('main tbody tr').length >= 3"},
    "requests": {
        "fifty rows": "document.querySelectorAll('main tbody tr').length === 50",
        "an older page": "[...document.querySelectorAll('.pager a')].some((a) => a.textContent === 'Older')",
        "a hostile name as text": f"{TEXT}.includes({HOSTILE!r}.slice(0, 20))",
    },
    "request": {
        "a timeline": "document.querySelector('svg.parts rect') !== null",
        "token classes": "document.querySelectorAll('main table').length >= 3",
        "the decision": f"{TEXT}.includes('quicker of two drawn')",
        "the key": f"{TEXT}.includes('notebook')",
        "the guard's verdict": f"{TEXT}.includes('secrets-out')",
        "the hostile prompt's echo as text": "document.querySelector('blockquote').textContent.length > 3",
    },
    "safety": {"refusals": f"{TEXT}.includes('Refusals by model')", "verdicts": f"{TEXT}.includes('secrets-out')", "a queue": f"{TEXT}.includes('filtered')"},
    "abuse": {"a hashed user": "document.querySelector('main td .id') !== null", "no name": f"!{TEXT}.includes('mallory')"},
    "releases": {
        "the release": "/rel-[0-9a-f]+/.test(document.querySelector('main code').textContent)",
        "gate checks": "document.querySelectorAll('.checks li').length === 4",
        "a loss curve": "document.querySelector('.plot path.line') !== null",
        "a canary": f"{TEXT}.includes('Canary of books') && {TEXT}.includes('Evidence against it')",
    },
    "lineage": {
        "a graph": "document.querySelector('#graph svg.lineage .card.release') !== null",
        "documents": "document.querySelectorAll('#documents li').length === 15",
        "a hostile title as text": f"{TEXT}.includes('<script>')",
    },
    "ask": {"models": "document.querySelectorAll('#model option').length >= 3"},
}

# What a server of a released model has shown always.
USUAL = {
    "releases": {"the release": "/rel-[0-9a-f]+/.test(document.querySelector('main code')?.textContent)", "gate checks": "document.querySelectorAll('.checks li').length > 0"},
    "lineage": {"a graph": "document.querySelector('#graph svg.lineage .card.release') !== null", "documents": "document.querySelectorAll('#documents li').length > 0"},
    "requests": {"rows": "document.querySelectorAll('main tbody tr').length > 0"},
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
        self.buffer, self.last, self.session, self.events = b"", 0, None, []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ["Page", "Runtime", "Log", "Network"]:
            self.call(domain + ".enable")

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
            if "method" in reply:
                self.events.append(reply)

    def value(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screen(self, width, scheme):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def until(self, tests, seconds=40):
        """What of `tests` does not come true in time."""
        deadline = time.monotonic() + seconds
        while True:
            missing = [name for name, test in tests.items() if not self.value(test)]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.05)

    def open(self, url):
        # A change of the part behind # alone would not load the page anew.
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)

    def key(self, key, code=None, text=None):
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36}
        params = {"key": key, "code": code or key, "windowsVirtualKeyCode": codes.get(key, ord(key[0]))}
        text = text or ("\r" if key == "Enter" else None)
        self.call("Input.dispatchKeyEvent", type="keyDown", **params, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **params)

    def picture(self, width, out):
        height = self.value("document.documentElement.scrollHeight")
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True,
                         clip={"x": 0, "y": 0, "width": width, "height": height, "scale": 1})
        with open(out, "wb") as file:
            file.write(base64.b64decode(shot["data"]))

    def said(self, root):
        """Errors the page told of, and requests that went elsewhere, so far."""
        wrong = []
        for event in self.events:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                wrong.append(details.get("exception", {}).get("description") or details["text"])
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                wrong.append("console: " + " ".join(str(a.get("value")) for a in params["args"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                entry = params["entry"]
                # A server without sign-in answers 404, which the page expects.
                if "/ashlar/session" not in entry.get("url", ""):
                    wrong.append(f"log: {entry['text']} {entry.get('url', '')}")
            elif event["method"] == "Network.requestWillBeSent":
                to = params["request"]["url"]
                if not to.startswith((root, "data:", "about:")):
                    wrong.append("request to " + to)
        self.events.clear()
        return wrong


def keyboard(browser, root, request):
    """What cannot be done without a mouse."""
    wrong = []

    def want(name, test, seconds=10):
        wrong.extend("keyboard: " + m for m in browser.until({name: test}, seconds))

    ready = "document.querySelector('.view')?.dataset.ready === '1'"
    browser.screen(1280, "light")
    browser.open(f"{root}/#/overview")
    want("overview loads", ready)
    browser.key("Tab")
    want("the first stop skips to the content", "document.activeElement.id === 'skip'")
    browser.key("Enter")
    want("which is then focused", "document.activeElement.id === 'main'")
    browser.value("document.querySelector('.plot').focus()")
    browser.key("ArrowLeft")
    browser.key("ArrowLeft")
    want("arrows read a chart", "document.querySelector('.plot .cursor') && document.querySelector('figure [aria-live]').textContent.includes('arrived')")
    browser.value("document.querySelector('.data summary').focus()")
    browser.key("Enter")
    want("a chart has a table", "document.querySelectorAll('.data[open] tbody tr').length > 10")
    browser.value("document.querySelector('#nav a[href=\"#/requests\"]').focus()")
    browser.key("Enter")
    want("the side bar leads on", "location.hash === '#/requests' && document.querySelectorAll('main tbody tr').length === 50")
    want("the heading is focused", "document.activeElement.tagName === 'H1'")
    browser.key("/", "Slash", "/")
    want("/ goes to the search", "document.activeElement.name === 'q' && document.activeElement.value === ''")
    browser.call("Input.insertText", text="tile 9999")
    browser.key("Enter")
    want("the search finds one of ten thousand", "document.querySelectorAll('main tbody tr').length === 1")
    browser.value("document.querySelector('main td a').focus()")
    browser.key("Enter")
    want("it leads to a request", "location.hash.startsWith('#/request/') && document.querySelector('svg.parts') !== null")
    browser.open(f"{root}/#/cost")
    want("cost loads", ready)
    browser.value("[...document.querySelectorAll('main td a')].find((a) => a.textContent === 'notebook').focus()")
    browser.key("Enter")
    want("a key leads to its teams", "location.hash.includes('api_key=') && location.hash.includes('by=team') && document.querySelector('.chip').textContent.includes('notebook')")
    browser.open(f"{root}/#/releases")
    want("releases load", ready)
    browser.value("document.querySelector('main button.danger').focus()")
    browser.key("Enter")
    want("taking back asks first", "document.querySelector('dialog[open]') && document.activeElement.textContent === 'Cancel'")
    browser.key("Escape")
    want("and may be left", "!document.querySelector('dialog') && document.querySelector('main button.danger') !== null")
    browser.value("document.querySelector('main button.danger').focus()")
    browser.key("Enter")
    browser.key("Tab")
    browser.key("Enter")
    want("or confirmed", f"{TEXT}.includes('taken back by hand') && !document.querySelector('main button.danger')")
    browser.open(f"{root}/#/ask")
    want("ask loads", ready)
    browser.value("document.querySelector('#model').value = 'fake-1'; document.querySelector('#question').focus()")
    browser.call("Input.insertText", text="Is the kiln warm? <img src=x onerror=window.pwned=1>")
    browser.key("Enter")
    want("a question is answered as text", "document.querySelector('#answer').textContent.includes('You said: Is the kiln warm? <img') && window.pwned === undefined")
    return wrong


def signing_in(browser, root, key, out):
    """What goes wrong between a closed door, a wrong key, a good one, and leaving."""
    wrong = []

    def want(name, test):
        wrong.extend(browser.until({name: test}, 10))

    browser.screen(1280, "light")
    browser.open(f"{root}/#/requests")
    want("a form in place of the view", "document.activeElement.id === 'key' && document.querySelectorAll('main table').length === 0")
    browser.picture(1280, out)
    browser.value("document.querySelector('#nav a[href=\"#/latency\"]').click()")
    want("the form again, wherever one goes", "document.activeElement.id === 'key' && location.hash === '#/latency' && !document.querySelector('.view')")
    browser.open(f"{root}/#/requests")
    want("and back", "document.activeElement.id === 'key'")
    browser.call("Input.insertText", text="ashlar-wrong")
    browser.key("Enter")
    want("a wrong key is told of", "document.querySelector('.sign-in [role=alert]').textContent.length > 5")
    browser.value("document.querySelector('#key').value = ''; document.querySelector('#key').focus()")
    browser.call("Input.insertText", text=key)
    browser.key("Enter")
    want("a good one shows the view", "document.querySelector('#view-requests')?.dataset.ready === '1' && document.querySelector('#trouble').hidden")
    want("and whose it is", "document.querySelector('#who').textContent.includes('Signed in as operator')")
    want("no script can read the cookie", "document.cookie === ''")
    browser.value("document.querySelector('#who button').focus()")
    browser.key("Enter")
    want("signing out closes it", "document.querySelector('.sign-in') !== null && !document.querySelector('#view-requests')")
    return wrong + [w for w in browser.said(root) if not w.startswith("log: Failed to load resource")]


def steady(browser, root):
    """How far things move once a view is there and goes on being refreshed."""
    browser.screen(1280, "light")
    browser.open(f"{root}/#/overview")
    browser.until({"ready": "document.querySelector('.view')?.dataset.ready === '1'"})
    browser.value("window.moved = 0; new PerformanceObserver((l) => l.getEntries().forEach((e) => { window.moved += e.value; })).observe({ type: 'layout-shift' })")
    time.sleep(5)
    moved = browser.value("window.moved")
    return [] if moved < 0.02 else [f"the overview moves by {moved} while it is refreshed"]


def main():
    seeded = "--seeded" in sys.argv
    key = next((a.removeprefix("--key=") for a in sys.argv if a.startswith("--key=")), None)
    url, out = [a for a in sys.argv[1:] if not a.startswith("--")]
    program = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    if not program:
        print("no Chromium found; on Debian: apt-get install -y --no-install-recommends chromium", file=sys.stderr)
        return 3
    root, _, asked = url.partition("/?response=")
    root = root.rstrip("/")
    if not asked and not key:
        with urllib.request.urlopen(f"{root}/ashlar/responses?limit=1") as reply:
            rows = json.load(reply)["responses"]
        if not rows:
            print("no response is recorded yet: ask something first", file=sys.stderr)
            return 1
        asked = rows[0]["id"]
    asked = quote(asked, safe="")
    views = {name: f"{root}/#/{name}" for name in SEEDED}
    views["request"] = f"{root}/#/request/{asked}"
    views["routing"] = f"{root}/#/routing/{asked}"
    released = asked
    if seeded:
        # The one asked for may have come from a backend that is no release.
        with urllib.request.urlopen(f"{root}/ashlar/responses?limit=1&model=fake-1&finish=stop") as reply:
            released = json.load(reply)["responses"][0]["id"]
    views["lineage"] = f"{root}/?response={released}"
    wanted = SEEDED if seeded else USUAL
    stem = out.removesuffix(".png")
    only = os.environ.get("ASHLAR_CONSOLE_VIEWS", "").split()
    missing = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, profile)
        try:
            if key:
                views = {}
                missing = {"sign-in": wrong} if (wrong := signing_in(browser, root, key, out)) else {}
            for name, place in views.items():
                if only and name not in only:
                    continue
                for width, scheme in SCREENS:
                    browser.screen(width, scheme)
                    browser.open(place)
                    wrong = browser.until({"ready": "document.querySelector('.view')?.dataset.ready === '1'", **ALWAYS, **wanted.get(name, {})}, 20)
                    browser.picture(width, f"{stem}-{name}-{scheme}-{width}.png")
                    wrong += browser.said(root)
                    if wrong:
                        missing[f"{name} {scheme} {width}"] = wrong
            if seeded and not only:
                wrong = steady(browser, root) + keyboard(browser, root, asked) + browser.said(root)
                if wrong:
                    missing["keyboard"] = wrong
        finally:
            browser.process.kill()
            browser.process.wait()
    print(json.dumps({"passed": not missing, "missing": missing}))
    return bool(missing)


sys.exit(main())
