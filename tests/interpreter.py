"""Triton's kernels without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_interpreted(file: Path) -> None:
    """The tests of `file` in a process in which Triton interprets: it reads TRITON_INTERPRET where it is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=file.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
