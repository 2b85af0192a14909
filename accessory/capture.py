"""Capturing a CUDA graph so that a capture that fails leaves the process as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, Optional

import torch


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Optional[Any] = None) -> Iterator[None]:
    """What is launched inside becomes `graph`. pool: memory that it shares with other graphs.

    Where torch.cuda.graph fails, it stays on the stream of the capture, unsynchronized with the one before; the random
    generator and the allocator believe that they are being captured. Later results would be wrong without an error.
    """
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    stream, generator = torch.cuda.current_stream(device), torch.cuda.default_generators[device.index]
    numbers = generator.get_state()
    try:
        # thread_local: a loader's thread, which pins memory meanwhile, is none of the capture's business.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
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
