"""Capturing a CUDA graph so that a capture that fails leaves the process as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Optional

import torch


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Optional[Any] = None) -> Iterator[None]:
    """What is launched inside becomes `graph`. pool: memory that it shares with other graphs.

    Where torch.cuda.graph fails, it stays on the stream of the capture, unsynchronized with the one before, and the
    random generator believes that it is being captured: later results would be wrong without an error.
    """
    stream = torch.cuda.current_stream(device)
    try:
        # thread_local: a loader's thread, which pins memory meanwhile, is none of the capture's business.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    except Exception:
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # an error of the capture that was not told yet
            torch.cuda.synchronize(device)
        _renew_generator(device)
        raise


def _renew_generator(device: torch.device) -> None:
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    fresh = torch.Generator(device).manual_seed(generator.initial_seed())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())
