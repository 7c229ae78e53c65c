"""Keys for kept results, so that a result is never used after something that it depends on has changed."""

import hashlib
from pathlib import Path


def fingerprint(*things: object) -> str:
    """Returns a hash of all that a result depends on. A `Path` counts by the contents of its file or weights."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Path):
            files = sorted(thing.glob("*.safetensors")) if thing.is_dir() else [thing]
            thing = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        digest.update(repr(thing).encode() + b"\0")
    return digest.hexdigest()[:16]
