"""Keys for what is kept, so that nothing stale is taken for fresh."""

import hashlib
from pathlib import Path


def fingerprint(*things: object) -> str:
    """A hash of all that a result depends on. A `Path` is a file, or a folder of weights, and its contents count."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Path):
            files = sorted(thing.glob("*.safetensors")) if thing.is_dir() else [thing]
            thing = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        digest.update(repr(thing).encode() + b"\0")
    return digest.hexdigest()[:16]
