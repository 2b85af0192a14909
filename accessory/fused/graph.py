"""Forward and backward of a micro-batch as one CUDA graph.

A step on a GPU is some thousand kernels, many of them shorter than the time Python takes to launch one. A graph
launches all of them at once. It needs shapes that do not change, and tensors that stay where they are. So there is
a graph for each shape of a batch, its input is copied in, and gradients are added to buffers that live as long as this
object. They lie side by side, so that ranks add theirs up in one go.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accessory.capture import capturing
from accessory.errors import first_line

log = logging.getLogger(__name__)
MOST = 48  # graphs; each is some MB on the GPU, outside of what torch counts
ALIGNMENT = 128  # numbers, between the beginnings of two gradients; as far apart as tensors of their own would be

Batch = dict[str, Any]
Key = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    loss: Tensor


class GraphedLoss:
    """loss(batch) -> fp32 [], without a graph of autograd: the gradients are in the trainables' .grad already.

    trainables: of one dtype, on one device."""

    def __init__(self, loss: Callable[[Batch], Tensor], trainables: list[nn.Parameter]):
        self._loss, self._trainables = loss, trainables
        self._all_gradients, self._gradients = _side_by_side(trainables)
        self._seen: set[Key] = set()
        self._captured: dict[Key, _Captured] = {}
        self._device = trainables[0].device
        self.works = True
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch) -> Tensor:
        """Gradients are added to those that are there; `attach` them first, and zero them once a step."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        key = tuple(sorted((name, tuple(value.shape)) for name, value in tensors.items()))
        if key not in self._captured and (key not in self._seen or len(self._captured) >= MOST or not self.works):
            self._seen.add(key)  # the first time as ever: kernels are compiled and chosen, which a capture must not do
            return self._run_without(batch)
        if key not in self._captured:
            try:
                self._captured[key] = self._capture(batch, tensors)
            except RuntimeError as error:
                self._give_up(f"a step could not be captured ({first_line(error)})")
                return self._run(batch)
        captured = self._captured[key]
        for name, value in captured.inputs.items():
            value.copy_(tensors[name], non_blocking=True)
        captured.graph.replay()
        return captured.loss.clone()

    def attach(self) -> None:
        """Let each trainable's .grad be its buffer."""
        for parameter, gradient in zip(self._trainables, self._gradients, strict=True):
            parameter.grad = gradient

    def zero(self) -> None:
        self._all_gradients.zero_()

    def sum_over_ranks(self) -> None:
        """Once a step, behind its last micro-batch."""
        dist.all_reduce(self._all_gradients)

    def _run_without(self, batch: Batch) -> Tensor:
        """Graphs keep the memory of a step for themselves: where there is none left for one beside them, they go."""
        try:
            return self._run(batch)
        except torch.OutOfMemoryError:
            if not self._captured:
                raise
        self._give_up("their memory is needed for a step of another shape; recomputing more blocks makes room for both")
        return self._run(batch)  # gradients are added at the end alone, so nothing was counted yet

    def _give_up(self, reason: str) -> None:
        self.works = False
        self._captured.clear()
        gc.collect()
        torch.cuda.empty_cache()
        log.warning("fast.graphs: not used any more, as %s", reason)

    def _run(self, batch: Batch) -> Tensor:
        loss = self._loss(batch)
        found = torch.autograd.grad(loss, self._trainables, allow_unused=True)
        pairs = [(to, new) for to, new in zip(self._gradients, found, strict=True) if new is not None]
        torch._foreach_add_([to for to, _ in pairs], [new for _, new in pairs])
        return loss.detach()

    def _capture(self, batch: Batch, tensors: dict[str, Tensor]) -> _Captured:
        inputs = {name: value.to(self._device, copy=True) for name, value in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self._device, self._pool):
            loss = self._run(batch | inputs)
        return _Captured(graph, inputs, loss)


def _side_by_side(parameters: list[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
    """Zeros in one tensor, and a view of it for each parameter, of its shape."""
    begins, size = [], 0
    for parameter in parameters:
        begins.append(size)
        size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    whole = torch.zeros(size, dtype=parameters[0].dtype, device=parameters[0].device)
    return whole, [whole[at : at + p.numel()].view(p.shape) for at, p in zip(begins, parameters, strict=True)]
