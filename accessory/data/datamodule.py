"""Which items meet in which batch, on which rank, in which order: a pure function of seed and epoch.

The plan is made in *global batches*, the items of one optimizer step over all ranks and micro-batches, and only then
dealt out. So the same global batches come out for every split into batch_size x accum_iter x ranks, and a resumed run
needs to know nothing but how many micro-batches were done.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

import datasets
import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from accessory.config import DataConfig
from accessory.data.dataset import Report, open_dataset
from accessory.data.packing import collate, pack
from accessory.models.tokenizer import Tokenizer

LENGTH_POOL = 32  # global batches among which items of like length are grouped


@dataclass(frozen=True)
class MicroBatch:
    """rows: item indices per row. answer_tokens: those of the whole global batch. filler: a row that counts nothing,
    so that every rank takes part in every step."""

    rows: list[list[int]]
    answer_tokens: int
    filler: bool = False


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
                yield MicroBatch(mine or [rows[0]], answer_tokens, filler=not mine)


class _PlanSampler(Sampler):
    def __init__(self, plan: BatchPlan, rank: int):
        self.plan, self.rank, self.epoch, self.start = plan, rank, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch; a resumed one keeps its start."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return self.plan.micro_batches

    def __iter__(self) -> Iterator[MicroBatch]:
        start, self.start = self.start, 0
        for i, micro in enumerate(self.plan.epoch(self.epoch, self.rank)):
            if i >= start:
                yield micro


class PlannedLoader(DataLoader):
    """A DataLoader that Lightning can resume in the middle of an epoch: its state is (epoch, micro-batches done)."""

    position: tuple[int, int] = (0, 0)

    def state_dict(self) -> dict[str, int]:
        epoch, done = self.position
        return {"epoch": epoch, "done": done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        epoch, done = state["epoch"], state["done"]
        if done >= len(self.sampler):
            epoch, done = epoch + 1, 0
        self.sampler.epoch, self.sampler.start = epoch, done


class TokenDataset(Dataset):
    """MicroBatch -> tensors. width: fixed (packing), or None for the longest row, rounded up to a multiple of 8."""

    def __init__(self, items: datasets.Dataset, width: Optional[int], pad_id: int):
        self.items, self.width, self.pad_id = items.with_format("numpy"), width, pad_id

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, micro: MicroBatch) -> dict[str, Any]:
        rows = []
        for row in micro.rows:
            items = [self.items[i] for i in row]
            rows.append([(item["input_ids"], item["labels"]) for item in items])
        longest = max(sum(len(ids) for ids, _ in row) for row in rows)
        batch: dict[str, Any] = collate(rows, self.width or -(-longest // 8) * 8, self.pad_id)
        if micro.filler:
            batch["targets"].fill_(-100)
        packed = any(len(row) > 1 for row in rows)
        if not packed:
            del batch["segment_ids"]  # right padding needs no mask: causal attention never looks there
        tokens = 0 if micro.filler else sum(len(ids) for row in rows for ids, _ in row)
        drawn = [i for row in micro.rows for i in row]
        return batch | {"answer_tokens": micro.answer_tokens, "tokens": tokens, "items": drawn}


class DataModule(LightningDataModule):
    """Train and validation loaders over the tokenized files of a run."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        batch_size: int,
        accum_iter: int,
        world_size: int,
        rank: int,
        seed: int,
    ):
        super().__init__()
        self.config, self.rank, self.pad_id = config, rank, tokenizer.eos_id
        items, self.train_report, self.key = open_dataset(config.data_config, config, tokenizer)
        self.val_report: Optional[Report] = None
        self.val_key: Optional[str] = None
        self.train_items, self.val_items = items, None
        if config.val_config is not None:
            self.val_items, self.val_report, self.val_key = open_dataset(config.val_config, config, tokenizer)
        elif held_out := int(len(items) * config.val_fraction):
            order = np.random.default_rng(seed).permutation(len(items))
            self.val_items = items.select(np.sort(order[:held_out]))
            self.train_items = items.select(np.sort(order[held_out:]))
        shared = {"batch_size": batch_size, "world_size": world_size, "max_words": config.max_words, "seed": seed}
        self.train_plan = self._plan(self.train_items, accum_iter=accum_iter, shuffle=True, **shared)
        self.val_plan = self._plan(self.val_items, accum_iter=1, shuffle=False, **shared) if self.val_items else None

    def _plan(self, items: datasets.Dataset, **settings: Any) -> BatchPlan:
        return BatchPlan(*_sizes(items), packing=self.config.packing, **settings)

    def train_dataloader(self) -> PlannedLoader:
        return self._loader(self.train_items, self.train_plan)

    def val_dataloader(self) -> Optional[PlannedLoader]:
        return self._loader(self.val_items, self.val_plan) if self.val_plan else []

    def _loader(self, items: datasets.Dataset, plan: BatchPlan) -> PlannedLoader:
        width = self.config.max_words if self.config.packing else None
        workers = min(self.config.num_workers, os.cpu_count() or 1)  # more only take turns
        return PlannedLoader(
            TokenDataset(items, width, self.pad_id),
            sampler=_PlanSampler(plan, self.rank),
            batch_size=None,
            num_workers=workers,
            pin_memory=self.config.pin_mem and torch.cuda.is_available(),
            persistent_workers=workers > 0,
            # A loader draws a seed for its workers whenever it is iterated, from the global state by default;
            # and a resumed run iterates at other moments than the first one did.
            generator=torch.Generator(),
        )


def _sizes(items: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    columns = items.with_format("numpy")
    return np.asarray(columns["length"][:]), np.asarray(columns["answer_tokens"][:])


def answer_loader(config: DataConfig, tokenizer: Tokenizer, batch_size: int) -> PlannedLoader:
    """All items of config.data_config once, in order of length, for measuring."""
    items, _, _ = open_dataset(config.data_config, config, tokenizer)
    plan = BatchPlan(
        *_sizes(items),
        batch_size,
        accum_iter=1,
        world_size=1,
        max_words=config.max_words,
        packing=False,
        seed=0,
        shuffle=False,
    )
    return PlannedLoader(
        TokenDataset(items, None, tokenizer.eos_id),
        sampler=_PlanSampler(plan, 0),
        batch_size=None,
        num_workers=config.num_workers,
    )
