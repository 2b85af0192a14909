"""Inputs of recomputed blocks in host memory, so that the GPU holds two of them rather than all.

Blocks give their input away in forward and want it back in backward in the opposite order: a stack. Copies run beside
the computation, on a stream of their own, one block ahead: 67 MB for 8,192 tokens of a 7B model, 1.3 ms of a block's 6.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


class HostStack:
    """push what forward is done with, pop it in backward. Captured by a CUDA graph like any other work."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}  # in host memory, pinned; kept for good
        self._held: list[Tensor] = []
        self._leaving: Optional[Tensor] = None  # on the device, while its copy is under way
        self._arriving: Optional[Tensor] = None  # the topmost of the stack, on its way back
        self._copies = False  # under way, or done and not waited for

    def push(self, x: Tensor) -> int:
        """Returns the place that `pop` wants to know."""
        self._wait()  # the one before has left: its memory is free again
        key = len(self._held), x.shape, x.dtype
        if key not in self._buffers:
            self._buffers[key] = torch.empty(x.shape, dtype=x.dtype, pin_memory=self._stream is not None)
        self._held.append(self._buffers[key])
        self._leaving = x.detach()
        self._copy(self._held[-1], self._leaving)
        return len(self._held) - 1

    def pop(self, place: int) -> Tensor:
        assert place == len(self._held) - 1, "what was pushed last comes back first: one backward for each forward"
        if self._arriving is None:
            self._fetch()
        self._wait()
        x, self._arriving = self._arriving, None
        self._held.pop()
        if self._held:
            self._fetch()
        return x

    def _fetch(self) -> None:
        top = self._held[-1]
        self._arriving = torch.empty(top.shape, dtype=top.dtype, device=self._device)
        self._copy(self._arriving, top)

    def _copy(self, to: Tensor, source: Tensor) -> None:
        if self._stream is None:
            to.copy_(source)
            return
        self._copies = True
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)

    def _wait(self) -> None:
        """Let what is computed next come after the copies so far. Only if there are any: a capture must not wait for
        what came before it."""
        if self._copies:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._copies = False
        self._leaving = None
