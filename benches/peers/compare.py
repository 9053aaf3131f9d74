#!/usr/bin/env python3
"""Ashlar beside llama.cpp and vLLM: same files, same machine, same threads, turn by turn.

    compare.py build            llama.cpp's tools, once, into the cache
    compare.py models           the files both engines read, once, into the cache
    compare.py engine           llama-bench and llama-batched-bench against `ashlar bench engine`
    compare.py serve            llama-server against `ashlar serve`, loaded by `ashlar bench serve`
    compare.py all              the four in order
    compare.py vllm             vLLM's CPU build against `ashlar bench engine`, in bf16 (6 GB, once)

What may not happen here: one engine measured with settings or files the other
did not have, a figure without its samples and what others used the machine for
meanwhile, a figure compared with one from another day.

A script and not an xtask: it only starts programs and reads their JSON, needs
nothing but Python's standard library (`wait4` for memory included), and builds
nothing of ours, so that it can measure any `ashlar` binary.
Rejected: the llama.cpp inside the Python package of the tests. It is built by
whatever compiler is there (gcc 12 miscompiles its AMX path), and without
llama-bench.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("ASHLAR_CACHE") or Path.home() / ".cache/ashlar")
PEER = CACHE / "peers/llama.cpp"
VLLM = CACHE / "peers/vllm"
TOOLS = ["llama-bench", "llama-batched-bench", "llama-quantize", "llama-server"]
MODELS = CACHE / "models"
STEM = "SmolLM2-135M-Instruct"
TYPES = ["F16", "Q4_0", "Q4_K_M", "Q5_0", "Q6_K", "Q8_0"]
# The other model, as its package has it.
GEMMA = "gemma-3-270m-q4_k_m"
# Instruction sets both engines can be held to: ours by ASHLAR_ISA, llama.cpp by a
# build of its own.
TIERS = {"native": None, "vnni": ["AVX", "AVX2", "FMA", "F16C", "BMI2", "AVX512", "AVX512_VNNI"],
         "avx2": ["AVX", "AVX2", "FMA", "F16C", "BMI2"]}
# Ends of text in this model: banned under load, so that every answer is as long as asked.
BANNED = [0, 2]
CLIENTS = 16


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def features():
    """The processor's flags, where the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.M)
    return set(found.group(1).split()) if found else set()


def processors():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


# --- llama.cpp ---------------------------------------------------------------


def pinned():
    """The source package and its digests, from the requirements of the tests."""
    text = (ROOT / "xtask/peers/requirements.txt").read_text()
    found = re.search(r"^(llama-cpp-python==\S+)((?:\s*\\\n\s+--hash=sha256:[0-9a-f]{64})+)", text, re.M)
    if not found:
        sys.exit("xtask/peers/requirements.txt pins no llama-cpp-python")
    return found.group(1), re.findall(r"--hash=\S+", found.group(2))


def folder(tier):
    """Where llama.cpp is built for a tier."""
    return PEER / ("build" if tier == "native" else f"build-{tier}")


def flags(tier):
    """CMake's settings: this machine's or the tier's instructions, the web interface
    left out."""
    names = ["amx_int8", "amx_tile", "amx_bf16"]
    # clang up to 15 has the intrinsics but not these macros, which ggml asks for.
    amx = " ".join(f"-D__{n.upper()}__=1" for n in names if n in features())
    wanted = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_C_COMPILER": "clang",
        "CMAKE_CXX_COMPILER": "clang++",
        "CMAKE_C_FLAGS": amx,
        "CMAKE_CXX_FLAGS": amx,
        "BUILD_SHARED_LIBS": "OFF",
        "GGML_NATIVE": "ON" if TIERS[tier] is None else "OFF",
        "GGML_CCACHE": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_UI": "OFF",
        "LLAMA_USE_PREBUILT_UI": "OFF",
        "LLAMA_CURL": "OFF",
        "LLAMA_OPENSSL": "OFF",
    }
    wanted |= {f"GGML_{name}": "ON" for name in TIERS[tier] or []}
    return [f"-D{k}={v}" for k, v in wanted.items()]


def compilers():
    if all(shutil.which(t) for t in ["clang", "clang++", "cmake", "ninja"]):
        return
    if not shutil.which("apt-get") or os.geteuid() != 0:
        sys.exit("building llama.cpp needs clang, cmake and ninja: install them (Debian: clang cmake ninja-build libomp-dev)")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    packages = ["clang", "cmake", "ninja-build", "libomp-dev"]
    subprocess.run(["apt-get", "update", "-qq"], check=True, env=quiet, stdout=sys.stderr)
    install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages]
    subprocess.run(install, check=True, env=quiet, stdout=sys.stderr)


def build(tier):
    """The folder of llama.cpp's programs for a tier, built if it is not there."""
    requirement, digests = pinned()
    made = folder(tier)
    stamp = made / "built.json"
    wanted = json.dumps({"source": requirement, "digests": digests, "flags": flags(tier)}, indent=1)
    if stamp.is_file() and stamp.read_text() == wanted and all((made / "bin" / t).is_file() for t in TOOLS):
        return made / "bin"
    compilers()
    version = requirement.split("==")[1]
    source = PEER / f"llama_cpp_python-{version}"
    if not (source / "vendor/llama.cpp/CMakeLists.txt").is_file():
        download = PEER / "download"
        download.mkdir(parents=True, exist_ok=True)
        pin = download / "pin.txt"
        pin.write_text(f"{requirement} {' '.join(digests)}\n")
        say(f"fetching {requirement}")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        pip += ["--no-binary", ":all:", "-r", str(pin), "-d", str(download)]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        with tarfile.open(download / f"{source.name}.tar.gz") as archive:
            archive.extractall(PEER, filter="data")
    say("compiling llama.cpp (some minutes, once)")
    configure = ["cmake", "-G", "Ninja", "-S", str(source / "vendor/llama.cpp"), "-B", str(made), *flags(tier)]
    make = ["cmake", "--build", str(made), "--target", *TOOLS]
    for command in [configure, make]:
        subprocess.run(["nice", "-n", "5", *command], check=True, stdout=sys.stderr)
    stamp.write_text(wanted)
    return made / "bin"


def models(programs):
    """Quantizes the tests' model; twice quantized is bad for its words, not for its speed."""
    base = MODELS / f"{STEM}.Q4_1.gguf"
    if not base.is_file():
        sys.exit(f"no model at {base}: `cargo xtask peers` fetches it")
    for kind in TYPES:
        path = MODELS / f"{STEM}.{kind}.gguf"
        if path.is_file():
            continue
        source = base if kind == "F16" else MODELS / f"{STEM}.F16.gguf"
        scratch = path.with_suffix(".part")
        say(f"writing {path.name}")
        command = [programs / "llama-quantize", "--allow-requantize", source, scratch, kind]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        scratch.rename(path)


# --- vLLM --------------------------------------------------------------------


def vllm(args):
    """vLLM's Python and the model in the layout it reads, both made if they are
    not there; where it cannot run, the reason as text."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"its wheels are pinned for Linux on x86_64, not {platform.system()} on {platform.machine()}"
    if "avx2" not in features():
        return "its kernels need AVX2"
    home, pins = VLLM, ROOT / "benches/peers/vllm.txt"
    python, stamp = home / "bin/python", home / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != pins.read_text():
        say("installing vLLM's CPU build (6 GB, once)")
        subprocess.run([sys.executable, "-m", "venv", home], check=True, stdout=sys.stderr)
        pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "-r", pins]
        if subprocess.run(pip, stdout=sys.stderr).returncode:
            return "pip could not install what benches/peers/vllm.txt pins"
        stamp.write_text(pins.read_text())
    tried = subprocess.run([python, "-c", "from vllm import LLM; from vllm.platforms import current_platform as p; assert p.is_cpu(), p"], capture_output=True, text=True)
    if tried.returncode:
        return "it does not import: " + (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
    folder, source = MODELS / f"{STEM}-bf16", MODELS / f"{STEM}.F16.gguf"
    if not folder.is_dir():
        say(f"writing {folder.name}")
        with tempfile.TemporaryDirectory(dir=MODELS) as scratch:
            made = Path(scratch) / "model"
            convert = [python, ROOT / "benches/peers/vllm_bench.py", "convert", source, made]
            done = subprocess.run(convert, capture_output=True, text=True)
            if done.returncode:
                return "converting the model: " + (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            made.rename(folder)
    return python, folder


def vllm_turn(args, python, folder):
    """One round of vLLM: {test: value}."""
    # As its documentation asks: a core a thread, Intel's OpenMP, tcmalloc where there is one.
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: args.threads]))
    tcmalloc = next(iter(Path("/usr/lib/x86_64-linux-gnu").glob("libtcmalloc_minimal.so.4")), None)
    preload = [p for p in [python.parent.parent / "lib/libiomp5.so", tcmalloc] if p and p.exists()]
    settings = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": 1, "OMP_NUM_THREADS": args.threads,
                "VLLM_ENABLE_V1_MULTIPROCESSING": 0, "VLLM_NO_USAGE_STATS": 1, "VLLM_LOGGING_LEVEL": "ERROR",
                "HF_HUB_OFFLINE": 1, "LD_PRELOAD": ":".join(map(str, preload))}
    command = ["env", *[f"{k}={v}" for k, v in settings.items()], python, ROOT / "benches/peers/vllm_bench.py", "bench", folder]
    command += ["--prompt", args.prompts, "--batch", ",".join(map(str, args.batches)), "--depth", 128, "--generate", 64]
    lines, peak = run(args, command)
    return {**named(lines), "peak_rss": peak}


def named(lines):
    """Medians by the tests' names."""
    found = {}
    for line in lines:
        name = f"tg{line['n_gen']}x{line['n_batch_sequences']}" if line["n_gen"] else f"pp{line['n_prompt']}"
        found[name] = line["median_ts"]
    return found


def beside_vllm(args):
    """Rounds of vLLM in bf16, of ours on the F16 file and, for scale, on Q8_0."""
    peer = vllm(args)
    if isinstance(peer, str):
        print(f"\nvLLM skipped: {peer}")
        return {"skipped": peer}
    python, folder = peer
    rounds = {"F16": [], "Q8_0": [], "vllm": []}
    args.disturbed = 0.0
    for i in range(args.rounds):
        say(f"vllm {STEM}: round {i + 1} of {args.rounds}")
        for kind in ["F16", "Q8_0"]:
            path, found = MODELS / f"{STEM}.{kind}.gguf", {}
            found |= named(ours_engine(args, path, args.prompts, 0, 1, 3)[0])
            for n in args.batches:
                # The prompts' own lines are of another length than the prompt tests'.
                lines = ours_engine(args, path, 128, 64, n, 3)[0]
                found |= named(line for line in lines if line["n_gen"])
            rounds[kind].append(found)
        rounds["vllm"].append(vllm_turn(args, python, folder))
    medians = {engine: {t: statistics.median(r[t] for r in rs) for t in rs[0]} for engine, rs in rounds.items()}
    print(f"\n{STEM}: tokens a second")
    print(f"{'test':<12}{'ours F16':>10}{'ours Q8_0':>11}{'vLLM bf16':>11}{'F16/vLLM':>10}{'Q8_0/vLLM':>11}")
    for test, theirs in medians["vllm"].items():
        if test in medians["F16"]:
            f16, q8 = medians["F16"][test], medians["Q8_0"][test]
            print(f"{test:<12}{f16:>10.1f}{q8:>11.1f}{theirs:>11.1f}{f16 / theirs:>10.2f}{q8 / theirs:>11.2f}")
    print(f"vLLM's memory at its peak: {medians['vllm']['peak_rss'] / 2**20:.0f} MiB", flush=True)
    return {"others_cpu_share": args.disturbed, "medians": medians, "samples": rounds}


# --- running and measuring ---------------------------------------------------


def busy_seconds():
    """Processor seconds used by anyone since boot, stolen ones included; None where unknown."""
    try:
        fields = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def process_seconds(pid):
    """Processor seconds of a running process; 0 where unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def once(command, server=None):
    """Runs to the end; its JSON lines, its peak memory, and the share of the
    processors that programs other than it and `server` used meanwhile."""
    command = [str(c) for c in command]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        before, served, start = busy_seconds(), process_seconds(server) if server else 0.0, time.monotonic()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds, after = time.monotonic() - start, busy_seconds()
        own = usage.ru_utime + usage.ru_stime + (process_seconds(server) - served if server else 0.0)
        out.seek(0)
        err.seek(0)
        if child.returncode:
            sys.exit(f"{' '.join(command)} ended with {child.returncode}:\n{err.read()[-2000:]}")
        lines = [json.loads(line) for line in out if line.startswith("{")]
    unit = 1 if platform.system() == "Darwin" else 1024
    others = 0.0 if before is None or after is None else max(0.0, after - before - own) / (seconds * (os.cpu_count() or 1))
    return lines, usage.ru_maxrss * unit, others


def quiet(args):
    """Waits until others leave the machine alone, `--wait` seconds at most."""
    end = time.monotonic() + args.wait
    while (before := busy_seconds()) is not None and time.monotonic() < end:
        time.sleep(1)
        if (busy_seconds() - before) / (os.cpu_count() or 1) <= args.others:
            return


def run(args, command, server=None):
    """`once`, taken anew while others disturbed it, the least disturbed kept."""
    best = None
    for i in range(args.tries):
        if server is None:
            quiet(args)
        taken = once(command, server)
        if best is None or taken[2] < best[2]:
            best = taken
        if best[2] <= args.others:
            break
    if best[2] > args.others:
        say(f"  others used {best[2]:.0%} of the processors during {Path(command[0]).name} {command[1]}")
    args.disturbed = max(args.disturbed, best[2])
    return best[:2]


def ours_engine(args, path, prompt, generate, batch, repeat):
    command = [*args.ashlar, "bench", "engine", "--json", "--no-bandwidth", "--model", path, "--threads", args.threads]
    command += ["--prompt", prompt, "--generate", generate, "--batch", batch, "--repeat", repeat]
    return run(args, command)


def ours(args, path):
    """One round of ours: {test: value}."""
    found = {}
    lines, _ = ours_engine(args, path, args.prompts, 64, 1, 3)
    for line in lines:
        name = f"tg{line['n_gen']}" if line["n_gen"] else f"pp{line['n_prompt']}"
        found[name] = line["median_ts"]
    for n in args.batches:
        lines, _ = ours_engine(args, path, 128, 64, n, 1)
        found[f"tg64x{n}"] = next(line["median_ts"] for line in lines if line["n_gen"])
    _, found["peak_rss"] = ours_engine(args, path, 512, 64, 1, 1)
    return found


def theirs(args, path):
    """One round of llama.cpp: {test: value}."""
    found = {}
    bench = [args.programs / "llama-bench", "-m", path, "-t", args.threads, "-fa", 1, "-o", "jsonl"]
    lines, _ = run(args, [*bench, "-p", args.prompts, "-n", 64, "-r", 3])
    for line in lines:
        name = f"tg{line['n_gen']}" if line["n_gen"] else f"pp{line['n_prompt']}"
        found[name] = statistics.median(line["samples_ts"])
    for n in args.batches:
        batched = [args.programs / "llama-batched-bench", "-m", path, "-t", args.threads, "-fa", "on", "--output-format", "jsonl"]
        lines, _ = run(args, [*batched, "-npp", 128, "-ntg", 64, "-npl", n, "-c", n * 192])
        found[f"tg64x{n}"] = lines[-1]["speed_tg"]
    _, found["peak_rss"] = run(args, [*bench, "-p", 512, "-n", 64, "-r", 1])
    return found


class Server:
    """A server process, killed at the end of the block."""

    def __init__(self, command, port, model):
        self.command, self.port, self.model = [str(c) for c in command], port, model
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self):
        self.started = time.monotonic()
        self.log = tempfile.TemporaryFile("w+")
        self.child = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        return self

    def first_token_ms(self):
        """Milliseconds from the process's start to the first token of an answer."""
        body = json.dumps({"model": self.model, "prompt": "Once upon a time", "max_tokens": 1, "temperature": 0}).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() - self.started < 60:
            if self.child.poll() is not None:
                self.log.seek(0)
                sys.exit(f"{self.command[0]} ended:\n{self.log.read()[-2000:]}")
            request = urllib.request.Request(f"{self.url}/v1/completions", body, {"content-type": "application/json"})
            try:
                opener.open(request, timeout=60).read()
                return (time.monotonic() - self.started) * 1e3
            except urllib.error.HTTPError as e:
                if e.code != 503:  # 503: loading.
                    sys.exit(f"{self.command[0]} answered {e.code}: {e.read()[:500]!r}")
            except OSError:
                pass
            time.sleep(0.002)
        sys.exit(f"{self.command[0]} did not answer within 60 s")

    def __exit__(self, *_):
        self.child.terminate()
        try:
            _, _, self.usage = os.wait4(self.child.pid, 0)
        except ChildProcessError:
            pass
        self.log.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def under_load(args, server):
    quiet(args)
    with server as running:
        found = {"first_token_ms": running.first_token_ms()}
        command = [*args.ashlar, "bench", "serve", "--json", "--url", running.url, "--model", running.model]
        command += ["--clients", CLIENTS, "--requests", args.requests, "--shared-prefix", 512]
        command += ["--prompt-tokens", "uniform:32..128", "--output-tokens", 64]
        command += ["--ban-tokens", ",".join(map(str, BANNED))]
        [report], _ = run(args, command, running.child.pid)
    if report["errors"] or report["completed"] != args.requests:
        sys.exit(f"{server.command[0]} failed requests: {report['errors']}")
    found["output_tokens_per_s"] = report["output_tokens_per_s"]
    found["requests_per_s"] = report["requests_per_s"]
    found["output_tokens"] = report["total_output_tokens"]
    for key in ["ttft_ms", "itl_ms", "tpot_ms", "e2e_latency_ms"]:
        for q in ["p50", "p95", "p99"]:
            found[f"{key[:-3]}_{q}_ms"] = report[key][q]
    return found


def ours_served(args, path):
    port = free_port()
    with tempfile.TemporaryDirectory() as home:
        command = [*args.ashlar, "--home", home, "serve", "--model", path, "--listen", f"127.0.0.1:{port}"]
        return under_load(args, Server(command, port, path.stem))


def theirs_served(args, path):
    port = free_port()
    # A slot a client, each as long as the longest request here; the rest as it comes.
    command = [args.programs / "llama-server", "-m", path, "--host", "127.0.0.1", "--port", port, "-t", args.threads]
    command += ["-fa", "on", "-np", CLIENTS, "-c", CLIENTS * 1024, "--no-webui", "--alias", path.stem]
    return under_load(args, Server(command, port, path.stem))


# --- comparing ---------------------------------------------------------------


def compare(args, name, a, b):
    """Rounds of ours and theirs by turns, a dictionary a file."""
    files = {}
    for path in args.files:
        kind = path.stem
        rounds = {"ashlar": [], "llama.cpp": []}
        args.disturbed = 0.0
        for i in range(args.rounds):
            say(f"{name} {kind}: round {i + 1} of {args.rounds}")
            rounds["ashlar"].append(a(args, path))
            rounds["llama.cpp"].append(b(args, path))
        tests = {}
        for test in rounds["ashlar"][0]:
            samples = {engine: [r[test] for r in rs] for engine, rs in rounds.items()}
            medians = {engine: statistics.median(s) for engine, s in samples.items()}
            tests[test] = {
                **{engine: medians[engine] for engine in medians},
                "ratio": medians["ashlar"] / medians["llama.cpp"],
                "samples": samples,
            }
        files[kind] = {"others_cpu_share": args.disturbed, "tests": tests}
        show(kind, tests)
    return files


def show(kind, tests):
    print(f"\n{kind}")
    print(f"{'test':<22}{'ashlar':>12}{'llama.cpp':>12}{'ratio':>8}  better when")
    for test, t in tests.items():
        lower = test.endswith("_ms") or test == "peak_rss"
        unit = 2**20 if test == "peak_rss" else 1
        label = "peak_rss MiB" if test == "peak_rss" else test
        print(f"{label:<22}{t['ashlar'] / unit:>12.1f}{t['llama.cpp'] / unit:>12.1f}{t['ratio']:>8.2f}  {'lower' if lower else 'higher'}")
    sys.stdout.flush()


def machine(args):
    text = ""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        pass
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    telling = ["avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16"]
    return {
        "cpu": name.group(1) if name else platform.processor(),
        "features": [f for f in telling if f in features()],
        "processors": processors(),
        "threads": args.threads,
        "tier": args.tier,
        "system": platform.platform(terse=True),
    }


def main():
    p = argparse.ArgumentParser(description="Ashlar beside llama.cpp, turn by turn.")
    p.add_argument("what", choices=["build", "models", "engine", "serve", "all", "vllm"])
    target = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    p.add_argument("--ashlar", type=Path, default=target / "release/ashlar", help="the binary to measure")
    p.add_argument("--types", default=",".join(TYPES), type=lambda s: [t for t in s.split(",") if t], help="files to measure")
    p.add_argument("--gemma", action="store_true", help=f"{GEMMA} too")
    p.add_argument("--tier", choices=TIERS, default="native", help="instructions both may use")
    p.add_argument("--rounds", type=int, default=3, help="turns of each engine")
    p.add_argument("--threads", type=int, default=processors())
    p.add_argument("--prompts", default="512,2048", help="prompt lengths of the engine comparison")
    p.add_argument("--long", action="store_true", help="a prompt of 8192 tokens too")
    p.add_argument("--batches", default=None, type=lambda s: [int(n) for n in s.split(",") if n])
    p.add_argument("--requests", type=int, default=64, help="of the serving comparison, each round")
    p.add_argument("--others", type=float, default=0.05, help="share of the processors that other programs may use during a run")
    p.add_argument("--wait", type=float, default=60, help="seconds to wait for others to leave the machine alone, each run")
    p.add_argument("--tries", type=int, default=5, help="times a disturbed run is taken anew")
    p.add_argument("--out", type=Path, default=target / "peers-bench.json", help="where the JSON goes")
    args = p.parse_args()
    if args.batches is None:
        args.batches = [1, 8, 16, 32] if args.what == "vllm" else [16, 32]
    if args.long:
        args.prompts += ",8192"
    if args.what == "serve" or args.what == "all":
        if args.threads != processors():
            sys.exit(f"`ashlar serve` takes all {processors()} processors: restrict both with taskset instead of --threads")
    # `env` rather than our own environment: llama.cpp is not to see it.
    args.ashlar = [args.ashlar] if TIERS[args.tier] is None else ["env", f"ASHLAR_ISA={args.tier}", args.ashlar]
    args.programs = build(args.tier)
    if args.what != "build":
        models(args.programs)
    args.files = [MODELS / f"{STEM}.{kind}.gguf" for kind in args.types]
    if args.gemma:
        args.files.append(MODELS / f"{GEMMA}.gguf")
    results = {"time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    results["machine"], results["peer"] = machine(args), pinned()[0]
    if args.what in ["engine", "all"]:
        results["engine"] = compare(args, "engine", ours, theirs)
    if args.what in ["serve", "all"]:
        results["serve"] = compare(args, "serve", ours_served, theirs_served)
    if args.what == "vllm":
        results["peer"] = (ROOT / "benches/peers/vllm.txt").read_text().split("vllm-cpu==")[1].split()[0]
        results["vllm"] = beside_vllm(args)
    if args.what in ["engine", "serve", "all", "vllm"]:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        say(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
