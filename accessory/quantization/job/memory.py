"""Peak memory of a long job: what the GPU allocated, or what this process holds besides mapped files."""

from __future__ import annotations

import contextlib
import resource
import threading
from pathlib import Path
from types import TracebackType

import torch

STATUS = Path("/proc/self/status")
INTERVAL = 0.05  # seconds


class PeakMemory:
    """A context that watches memory. On a CPU it samples anonymous memory: pages of mapped checkpoint files are the
    system's to take back, and would grow with the base however little is held of it."""

    def __init__(self, device: torch.device):
        self.device, self._peak = device, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def gib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        self._peak = max(self._peak, anonymous_bytes())
        return self._peak / 2**30

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._peak = max(self._peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Memory of this process that no file backs; where the system does not say, its largest resident size."""
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
