"""PyPI's model-signing against a signature of ours, and one of its for us.

usage: model_signing.py DIR SIGNATURE PUBLIC_KEY PRIVATE_KEY OUT
Verifies SIGNATURE over DIR with PUBLIC_KEY, checks that a flipped byte in a
copy of DIR fails, then signs DIR with PRIVATE_KEY into OUT.
stdout: one JSON line {"version", "verified", "flip_refused", "signed"};
exit status 1 when one of them is not so.
"""

import sys

# This file has the package's name: keep it from importing itself.
sys.path.pop(0)

import importlib.metadata
import json
import pathlib
import shutil
import tempfile

import model_signing


def verifies(folder, signature, public_key):
    """None, or why `folder` does not verify."""
    try:
        config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        config.verify(folder, signature)
    except Exception as error:  # the package raises several kinds
        return f"{type(error).__name__}: {error}"
    return None


def flipped(folder, signature, to):
    """A copy of `folder` with one bit of its largest file changed."""
    copy = to / folder.name
    shutil.copytree(folder, copy)
    files = [p for p in copy.rglob("*") if p.is_file() and p.name != signature.name]
    target = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    return copy


def main():
    folder, signature, public_key, private_key, out = map(pathlib.Path, sys.argv[1:6])
    refused = verifies(folder, signature, public_key)
    with tempfile.TemporaryDirectory() as scratch:
        flip = verifies(flipped(folder, signature, pathlib.Path(scratch)), signature, public_key)
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=[signature.name, out.name])
    model_signing.signing.Config().use_elliptic_key_signer(
        private_key=private_key
    ).set_hashing_config(hashing).sign(folder, out)
    answer = {
        "version": importlib.metadata.version("model-signing"),
        "verified": refused is None,
        "refused": refused,
        "flip_refused": flip is not None and "mismatch" in flip.lower(),
        "signed": out.is_file(),
    }
    print(json.dumps(answer))
    return not (answer["verified"] and answer["flip_refused"] and answer["signed"])


sys.exit(main())
