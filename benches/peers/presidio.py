#!/usr/bin/env python3
"""Ashlar's scanner beside Presidio's pattern recognizers: same texts, same core, turn by turn.

    presidio.py             both, on texts that `detect_bench` plants

What may not happen here: a recognizer of Presidio left out that finds a kind
which is compared, a threshold chosen for it that is not its best on these very
texts, a figure without its samples.

Presidio runs without a language model, its recognizers called directly, as fast
as it can be had; then once more with its context enhancement, over the words of
a blank pipeline. Its recognizers of names, places and dates have no counterpart
here and do not run. Secrets and dates of birth it has no recognizer for: they
are reported for us alone.
"""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("ASHLAR_CACHE") or Path.home() / ".cache/ashlar")
VENV = CACHE / "peers/presidio"
PINNED = Path(__file__).with_name("presidio.txt")
# Their entities by our kinds.
KINDS = {
    "CREDIT_CARD": "card", "IBAN_CODE": "iban", "EMAIL_ADDRESS": "email", "PHONE_NUMBER": "phone",
    "IP_ADDRESS": "ip", "MAC_ADDRESS": "mac", "CRYPTO": "crypto", "US_SSN": "us_ssn",
    "US_ITIN": "us_itin", "UK_NHS": "uk_nhs", "UK_NINO": "uk_nino", "ES_NIF": "es_nif",
    "ES_NIE": "es_nif", "IT_FISCAL_CODE": "it_fiscal_code", "DE_TAX_ID": "de_tax_id",
    "PL_PESEL": "pl_pesel", "IN_AADHAAR": "in_aadhaar", "AU_TFN": "au_tfn", "AU_ABN": "au_abn",
    "SG_NRIC_FIN": "sg_nric", "US_PASSPORT": "passport", "DE_PASSPORT": "passport",
}
THRESHOLDS = [0.0, 0.1, 0.2, 0.3, 0.36, 0.41, 0.51, 0.61, 0.76, 0.9]


def install():
    stamp = VENV / "installed.txt"
    if not stamp.exists() or stamp.read_text() != PINNED.read_text():
        venv.create(VENV, with_pip=True, clear=True)
        pip = [VENV / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "-r", PINNED]
        subprocess.run(pip, check=True)
        stamp.write_text(PINNED.read_text())


def recognizers():
    import presidio_analyzer.predefined_recognizers as all_of_them
    from presidio_analyzer import EntityRecognizer

    found = {}
    for name, cls in inspect.getmembers(all_of_them, inspect.isclass):
        if not issubclass(cls, EntityRecognizer) or not name.endswith("Recognizer"):
            continue
        try:
            one = cls(supported_language="en")
        except Exception:  # a recognizer that wants a model or a service
            continue
        if set(one.supported_entities) & set(KINDS):
            found[name] = one
    missing = set(KINDS) - {e for r in found.values() for e in r.supported_entities}
    if missing:
        sys.exit(f"Presidio has no recognizer for {sorted(missing)}: correct KINDS")
    return list(found.values())


class Presidio:
    def __init__(self):
        import spacy
        from presidio_analyzer.context_aware_enhancers import LemmaContextAwareEnhancer
        from presidio_analyzer.nlp_engine import NlpArtifacts

        self.recognizers = recognizers()
        self.blank = spacy.blank("en")
        self.artifacts = NlpArtifacts
        self.enhancer = LemmaContextAwareEnhancer()

    def scan(self, text, context):
        from presidio_analyzer import EntityRecognizer

        artifacts = None
        if context:
            doc = self.blank(text)
            lemmas = [t.lower_ for t in doc]
            engine = type("Blank", (), {
                "is_stopword": lambda self, word, language: False,
                "is_punct": lambda self, word, language: not any(c.isalnum() for c in word),
            })()
            artifacts = self.artifacts([], doc, [t.idx for t in doc], lemmas, engine, "en")
        out = []
        for r in self.recognizers:
            out += r.analyze(text, r.supported_entities, artifacts) or []
        if context:
            out = self.enhancer.enhance_using_context(text, out, artifacts, self.recognizers)
        # As its engine does: of spans of one entity that lie in each other, the best.
        out = EntityRecognizer.remove_duplicates(out)
        return [(KINDS[f.entity_type], f.start, f.end, f.score) for f in out if f.entity_type in KINDS]


def f1(found, planted, kind):
    """F1 of one kind; a span counts when it shares more than half with the planted one."""
    hits = total = wanted = 0
    for spans, plants in zip(found, planted):
        left = [s for s in plants if s[0] == kind]
        wanted += len(left)
        for _, start, end in sorted({s for s in spans if s[0] == kind}):
            total += 1
            for p in left:
                both = min(end, p[2]) - max(start, p[1])
                if 2 * both > max(end, p[2]) - min(start, p[1]):
                    hits += 1
                    left.remove(p)
                    break
    return 2 * hits / (total + wanted) if total + wanted else None


def ours(tool, file, seconds):
    out = subprocess.run([tool, "scan", file, str(seconds)], check=True, capture_output=True, text=True)
    lines = [json.loads(line) for line in out.stdout.splitlines()]
    return lines[0], [[tuple(s) for s in spans] for spans in lines[1:]]


def compare(tool, rounds, documents):
    presidio = Presidio()
    report = {"machine": os.uname().machine, "recognizers": len(presidio.recognizers)}
    for name, args in {"dense": [1, documents, 8, "dense"], "prose": [2, documents // 8, 60, "sparse"]}.items():
        file = CACHE / f"presidio-{name}.jsonl"
        with open(file, "w") as f:
            subprocess.run([tool, "corpus", *map(str, args)], check=True, stdout=f)
        lines = [json.loads(line) for line in open(file)]
        texts = [d["text"] for d in lines]
        planted = [[tuple(s) for s in d["spans"]] for d in lines]
        size = sum(len(t.encode()) for t in texts) / 1e6
        presidio.scan(texts[0], True)
        speeds = {"ours": [], "ours_core": [], "presidio": [], "presidio_context": []}
        for _ in range(rounds):
            speed, mine = ours(tool, file, 0.5)
            speeds["ours"].append(speed["all_mb_per_s"])
            speeds["ours_core"].append(speed["core_mb_per_s"])
            theirs = {}
            for key, context in ("presidio", False), ("presidio_context", True):
                begun = time.perf_counter()
                theirs[key] = [presidio.scan(t, context) for t in texts]
                speeds[key].append(size / (time.perf_counter() - begun))
        median = {k: statistics.median(v) for k, v in speeds.items()}
        rows = {}
        for kind in sorted({s[0] for p in planted for s in p}) if name == "dense" else []:
            rows[kind] = {"planted": sum(s[0] == kind for p in planted for s in p)}
            rows[kind]["ours"] = f1(mine, planted, kind)
            for key, found in theirs.items():
                if kind in KINDS.values():
                    scores = [
                        f1([[s[:3] for s in d if s[3] >= t] for d in found], planted, kind)
                        for t in THRESHOLDS
                    ]
                    rows[kind][key] = max(scores)
        report[name] = {
            "megabytes": size, "mb_per_s": speeds, "median_mb_per_s": median,
            "ratio": median["ours"] / median["presidio"],
            "ratio_with_context": median["ours"] / median["presidio_context"],
            "f1_at_best_threshold": rows,
        }
    print(json.dumps(report, indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    target = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    parser.add_argument("--tool", default=target / "release/examples/detect_bench")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=1000)
    args = parser.parse_args()
    if not Path(args.tool).exists():
        sys.exit("first: cargo build --release -p ashlar-text --example detect_bench")
    try:
        import presidio_analyzer  # noqa: F401
    except ImportError:
        install()
        os.execv(VENV / "bin/python", [VENV / "bin/python", __file__, *sys.argv[1:]])
    compare(args.tool, args.rounds, args.documents)


if __name__ == "__main__":
    main()
