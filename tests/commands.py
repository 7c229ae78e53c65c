"""Commands as a user runs them."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_command(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """What a command prints, given more environment variables; with both streams in the error if it fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise AssertionError(
            f"`{' '.join(map(str, command))}` exits with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
    return done.stdout
