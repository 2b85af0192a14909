"""The figures of a training step, from the GPU to the loggers.

Reading a number from a GPU waits until it is there, and then the GPU waits in its turn, while the host logs, updates
and fetches: at 7B and 512 tokens a step, a third of the time. Where a step is one launch (a CUDA graph), figures are
copied as they arise and read a step later, with the next one on its way.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Optional

import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor

SAVE_EVERY = 1.0  # seconds, at most, until a logger's file has what it was given


class Moment:
    """Now, for the host; for the GPU, when it has done all that it was given until now."""

    def __init__(self, on_gpu: bool):
        self._host = time.perf_counter()
        self._gpu = torch.cuda.Event(enable_timing=True) if on_gpu else None
        if self._gpu is not None:
            self._gpu.record()

    def wait(self) -> None:
        if self._gpu is not None:
            self._gpu.synchronize()

    def since(self, earlier: "Moment") -> float:
        """Seconds; the GPU's, where both are its, and it has got to both."""
        if self._gpu is None or earlier._gpu is None:
            return self._host - earlier._host
        return earlier._gpu.elapsed_time(self._gpu) / 1000


@dataclass
class StepFigures:
    """number: of the optimizer step, from 0. micro: (loss, items) of its micro-batches. host: figures that the host
    knows by itself. tokens: of all ranks."""

    number: int
    epoch: int
    micro: list[tuple[Tensor, list[int]]]
    host: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    sent: Optional[Moment] = None
    _copied: Optional[Tensor] = None

    def send(self, loss: Tensor, norm: Tensor) -> None:
        """fp32 [] each; does not wait."""
        both = torch.stack((loss, norm)).detach()
        if both.is_cuda:
            self._copied = torch.empty(2, dtype=both.dtype, pin_memory=True)
            self._copied.copy_(both, non_blocking=True)
            self.sent = Moment(on_gpu=True)
        else:
            self._copied = both

    def read(self) -> tuple[float, float]:
        """Loss and norm of the gradient; waits for them."""
        if self.sent is not None:
            self.sent.wait()
        loss, norm = self._copied.tolist()
        return loss, norm


class StepLog:
    """Hands figures to the loggers, and lets those that write files write now and then rather than at each step. A
    step lasts from the moment that the one before was known to the moment that it is: on the GPU, where it is computed
    there, as the host may be a step ahead, or behind with a graph to capture."""

    def __init__(self) -> None:
        self.newest: dict[str, float] = {}  # for the progress bar
        self._saved = 0.0
        self.restart()

    def restart(self) -> None:
        """What has passed since the last step belongs to no step."""
        self._since = Moment(on_gpu=torch.cuda.is_initialized())

    def write(self, loggers: list[Logger], step: StepFigures, interval: int) -> None:
        """interval: of the steps that are handed on."""
        loss, norm = step.read()
        known = step.sent or Moment(on_gpu=False)
        rate = step.tokens / max(known.since(self._since), 1e-9)
        self._since = known
        figures = {"loss": loss, "grad_norm": norm, **step.host, "tokens_per_s": rate}
        self.newest |= figures
        if (step.number + 1) % interval:
            return
        for logger in loggers:
            logger.log_metrics(figures | {"epoch": step.epoch}, step=step.number)
        if time.monotonic() - self._saved >= SAVE_EVERY:
            self.save(loggers)

    def save(self, loggers: list[Logger]) -> None:
        for logger in loggers:
            logger.save()
        self._saved = time.monotonic()
