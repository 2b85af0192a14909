"""A step and its time, the same for every system.

A step is forward, backward, clipping and AdamW on one micro-batch; the batch is made before the clock starts, from a
seed that the case and the number of the step give, so every system sees the same tokens.
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Optional

import torch
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
Batch = dict[str, Tensor]
Step = Callable[[Batch], Tensor]


def eager_step(model: nn.Module, loss: Callable[[Batch], Tensor], case: dict[str, Any]) -> Step:
    """Forward, backward, clipping and AdamW, as PyTorch has them."""
    trainables = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainables, lr=1e-4, betas=(0.9, 0.95), fused=DEVICE.type == "cuda")

    def step(batch: Batch) -> Tensor:
        value = loss(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trainables, 2.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def plain_batch(input_ids: Tensor, case: dict[str, Any]) -> Batch:
    return {"input_ids": input_ids, "labels": input_ids}


@dataclass
class System:
    """A built model, and what a worker needs of it."""

    model: nn.Module
    loss: Callable[[Batch], Tensor]
    """Mean over the learnt tokens of a batch."""
    checkpoint: Callable[[bool], None]
    """Turn activation checkpointing on or off."""
    keep: Callable[[dict[str, Any]], None] = lambda case: None
    """Choose for a case what else is kept for backward, and where."""
    batch: Callable[[Tensor, dict[str, Any]], Batch] = plain_batch
    """input_ids int64 [b, s] -> what loss takes; every token is learnt."""
    rows: Optional[Callable[[dict[str, Any], int], tuple[Batch, int]]] = None
    """(case, number of the step) -> a batch of real lengths and its answer tokens; None: padded rows."""
    train_step: Callable[[nn.Module, Callable[[Batch], Tensor], dict[str, Any]], Step] = eager_step
    generate: Optional[Callable[[dict[str, Any]], None]] = None
    """Answer `batch` prompts of `length` tokens with `new_tokens` more."""
    estimate: Optional[Callable[[dict[str, Any]], Optional[float]]] = None
    """GiB that a case will take at most, as the system says by itself."""
    release: Callable[[], None] = lambda: None
    """Let go of what a case left in the model."""
    notes: list[str] = field(default_factory=list)
    """What differs from the other systems, for the report."""


def seeded(case: dict[str, Any], number: int) -> torch.Generator:
    """On the CPU: the same on every machine."""
    name = f"{case['model']} {case['task']} {case['batch']} {case['length']} {number}"
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def tokens(case: dict[str, Any], vocab: int, number: int) -> Tensor:
    """int64 [batch, length] of step `number`."""
    shape = case["batch"], case["length"]
    return torch.randint(vocab, shape, generator=seeded(case, number)).to(DEVICE)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(step: Callable[[], Any]) -> float:
    """Seconds from an idle device to an idle device."""
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def timed_in_a_row(steps: list[Callable[[], Any]]) -> list[float]:
    """Seconds of each of some steps that follow one another as in training: the host may be ahead of a GPU, and a
    step's time is that from the end of the one before to its own."""
    if DEVICE.type != "cuda":
        return [timed(step) for step in steps]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    synchronize()
    marks[0].record()
    for step, mark in zip(steps, marks[1:], strict=True):
        step()
        mark.record()
    synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(marks)]


def reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def time_steps(step: Callable[[], Any], warmup: int, steps: int) -> tuple[float, float]:
    """(median seconds of a step after the warm-up, peak GiB). The peak is one with the warm-up, in which a CUDA graph
    takes its memory."""
    from accessory.callbacks import peak_memory_gib

    reset_peak()
    for _ in range(warmup):
        step()
    return statistics.median(timed_in_a_row([step] * steps)), peak_memory_gib()
