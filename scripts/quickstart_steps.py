"""What the quick starts share: headings, the training command as a user would type it, sizes."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "quickstart"


def step(number: str, text: str) -> None:
    """number: "2/5"."""
    print(f"\n[{number}] {text}", flush=True)


def shown(path: Path) -> str:
    """A path as short as it can be typed in the repository's root."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def train(*arguments: str | Path) -> float:
    """Run the training command, and show it; returns its seconds."""
    words = [shown(word) if isinstance(word, Path) else word for word in arguments]
    print(shlex.join(["python", "main_finetune.py", *words]), flush=True)
    started = time.monotonic()
    subprocess.run([sys.executable, "main_finetune.py", *words], cwd=ROOT, check=True)
    return time.monotonic() - started


def megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.1f} MiB"
