"""Which items meet in which batch, on which rank, in which order: a pure function of seed and epoch.

The plan is made in *global batches*, the items of one optimizer step over all ranks and micro-batches, and only then
dealt out. So the same global batches come out for every split into batch_size x accum_iter x ranks, and a resumed run
needs to know nothing but how many micro-batches were done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

import numpy as np

from accessory.data.packing import pack

LENGTH_POOL = 32  # global batches among which items of like length are grouped


@dataclass(frozen=True)
class MicroBatch:
    """rows: item indices per row. answer_tokens: those of the whole global batch. filler: a row that counts nothing,
    so that every rank takes part in every step."""

    rows: list[list[int]]
    answer_tokens: int
    filler: bool = False
    epoch: int = 0


class BatchPlan:
    """All micro-batches of any epoch. lengths, answer_tokens: int [items]."""

    def __init__(
        self,
        lengths: np.ndarray,
        answer_tokens: np.ndarray,
        batch_size: int,
        accum_iter: int,
        world_size: int,
        max_words: int,
        packing: bool,
        seed: int,
        shuffle: bool = True,
    ):
        self.lengths, self.answer_tokens, self.seed, self.shuffle = lengths, answer_tokens, seed, shuffle
        self.batch_size, self.accum_iter, self.world_size = batch_size, accum_iter, world_size
        self.packed_rows: Optional[list[list[int]]] = None
        if packing:  # once for all epochs, so that each epoch has the same number of steps
            order = np.random.default_rng(seed).permutation(len(lengths)) if shuffle else np.arange(len(lengths))
            self.packed_rows = pack(lengths, order, max_words)

    @property
    def rows(self) -> int:
        return len(self.packed_rows) if self.packed_rows is not None else len(self.lengths)

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accum_iter * self.world_size

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.rows // self.rows_per_step)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an epoch on each rank."""
        last = self.rows - (self.steps - 1) * self.rows_per_step
        return (self.steps - 1) * self.accum_iter + -(-last // (self.batch_size * self.world_size))

    def global_batches(self, epoch: int) -> list[list[list[int]]]:
        """The rows of each optimizer step of `epoch`, in order."""
        rng = np.random.default_rng((self.seed, epoch))
        size = self.rows_per_step
        if self.packed_rows is not None:
            order = rng.permutation(self.rows) if self.shuffle else range(self.rows)
            rows = [self.packed_rows[i] for i in order]
            return [rows[i : i + size] for i in range(0, len(rows), size)]
        if not self.shuffle:
            order = np.argsort(self.lengths, kind="stable")
            return [[[int(i)] for i in order[start : start + size]] for start in range(0, len(order), size)]
        order = rng.permutation(self.rows)
        whole = self.rows // size * size
        batches = []
        for start in range(0, whole, LENGTH_POOL * size):
            pool = order[start : min(start + LENGTH_POOL * size, whole)]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += [[[int(i)] for i in pool[j : j + size]] for j in range(0, len(pool), size)]
        # A smaller last step stays last: Lightning cuts an accumulation short only at the end of an epoch.
        rest = [[[int(i)] for i in order[whole:]]] if whole < self.rows else []
        return [batches[i] for i in rng.permutation(len(batches))] + rest

    def epoch(self, epoch: int, rank: int) -> Iterator[MicroBatch]:
        for rows in self.global_batches(epoch):
            answer_tokens = int(sum(self.answer_tokens[i] for row in rows for i in row))
            per_micro = self.batch_size * self.world_size
            for start in range(0, len(rows), per_micro):
                mine = rows[start : start + per_micro][rank :: self.world_size]
                yield MicroBatch(mine or [rows[0]], answer_tokens, filler=not mine, epoch=epoch)
