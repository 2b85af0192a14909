"""Capturing a CUDA graph so that a capture that fails leaves the process as it was."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from functools import partial
from threading import Lock
from typing import Any, Optional

import torch

# A process can capture one graph at a time, and no other thread can draw from the random generators meanwhile: it would
# meet an internal error of torch. Answers may be asked for in several threads.
between_captures = Lock()


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Optional[Any] = None) -> Iterator[None]:
    """What is launched inside becomes `graph`. pool: memory that it shares with other graphs.

    Where torch.cuda.graph fails, it stays on the stream of the capture, unsynchronized with the one before; the random
    generator and the allocator believe that they are being captured. Later results would be wrong without an error.
    """
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    with between_captures, torch.cuda.device(device):
        stream, generator = torch.cuda.current_stream(device), torch.cuda.default_generators[device.index]
        numbers = generator.get_state()
        try:
            # thread_local: a loader's thread, which pins memory meanwhile, is none of the capture's business.
            with torch.cuda.graph(graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local"):
                yield
        except Exception as error:
            torch.cuda.set_stream(stream)
            end_of_pool = partial(torch._C._cuda_endAllocateToPool, device.index, pool)
            for mend in (partial(torch.cuda.synchronize, device), end_of_pool):
                with contextlib.suppress(RuntimeError):  # what the capture has not told yet, or has ended itself
                    mend()
            fresh = torch.Generator(device)
            fresh.set_state(numbers)
            generator.graphsafe_set_state(fresh.graphsafe_get_state())
            # The error of the capture's end hides the one that ended it.
            cause = error.__context__
            raise (cause if isinstance(cause, Exception) else error) from None


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """A GPU's stream for captures: torch.cuda.graph's own lies on the GPU of the first capture, whatever the others'
    is, and what a second GPU computes would not be captured at all."""
    return torch.cuda.Stream(device)
