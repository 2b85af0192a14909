"""The loaders of a run: what the plan (plan.py) puts together, as tensors."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Thread
from typing import Any, Optional

import datasets
import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from accessory.config import BadImages, DataConfig, ImageTransform
from accessory.data.dataset import Report, open_dataset
from accessory.data.images import ImageInput, ImageProblem, deterministic, load_pixels
from accessory.data.packing import IGNORE, IMAGE_SLOT, collate, row_width, share_rows
from accessory.data.plan import BatchPlan, MicroBatch
from accessory.data.sources import read_data_config
from accessory.errors import OwnError, UserError
from accessory.models.tokenizer import Tokenizer


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

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def state_dict(self) -> dict[str, int]:
        epoch, done = self.position
        return {"epoch": epoch, "done": done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        epoch, done = state["epoch"], state["done"]
        if done >= len(self.sampler):
            epoch, done = epoch + 1, 0
        self.sampler.epoch, self.sampler.start = epoch, done


@dataclass(frozen=True)
class PixelSource:
    """An item's image -> pixels: a function of seed, epoch and item, so any batch and any worker sees the same ones."""

    image: ImageInput
    transform: ImageTransform
    bad_images: BadImages
    seed: int = 0

    def load(self, path: str, epoch: int, item: int) -> Tensor | str:
        """float32 [3, size, size]; or what is wrong, where it can no longer be read and such items are skipped."""
        try:
            rng = np.random.default_rng((self.seed, epoch, item))
            return load_pixels(path, self.transform, self.image.size, rng)
        except ImageProblem as problem:
            if self.bad_images is BadImages.skip:
                return f"image {path}: {problem}"
            raise OwnError(
                f"image {path}: {problem}, and it could be read when the data was checked; mend it, or go on without "
                "with data.bad_images=skip"
            ) from None


class TokenDataset(Dataset):
    """MicroBatch -> tensors. width: fixed (packing), or None for the longest row, rounded up to a multiple of 8.
    padding_free: no row for each item; they share rows of `width` tokens, or one that is shorter. Rows of several items
    come with their `bounds`, and with `longest`: no item, and no padding, has more tokens (default: the width).

    pixels: for a model that takes images. A batch that has some then holds images, float32 [n, 3, size, size] in the
    order of their slots, and every batch `unreadable`: what is wrong with those that can no longer be read. They are
    gray and their items masked; the step's mean still counts their answers, with a loss of 0.
    """

    def __init__(
        self,
        items: datasets.Dataset,
        width: Optional[int],
        pad_id: int,
        pixels: Optional[PixelSource] = None,
        padding_free: bool = False,
        longest: Optional[int] = None,
    ):
        self.items, self.width, self.pad_id, self.pixels = items.with_format("numpy"), width, pad_id, pixels
        self.padding_free, self.longest = padding_free, longest or width

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, micro: MicroBatch) -> dict[str, Any] | UserError:
        """The problem itself where there is one, for PlannedLoader to raise: an exception that leaves a worker process
        arrives with a traceback for its message."""
        try:
            return self._batch(micro)
        except UserError as problem:
            return problem

    def _batch(self, micro: MicroBatch) -> dict[str, Any]:
        found = {i: self.items[i] for row in micro.rows for i in row}
        layout = micro.rows
        if self.padding_free:
            layout = share_rows(list(found), {i: len(item["input_ids"]) for i, item in found.items()}, self.width)
        drawn = [i for row in layout for i in row]
        seen = self._images(drawn, [found[i] for i in drawn], micro.epoch)
        rows = [[(found[i]["input_ids"], found[i]["labels"]) for i in row] for row in layout]
        batch: dict[str, Any] = collate(rows, self._width(rows), self.pad_id)
        if micro.filler:
            batch["targets"].fill_(IGNORE)
        if not self.padding_free and all(len(row) == 1 for row in rows):
            del batch["bounds"]  # right padding needs no mask: causal attention never looks there
        else:
            batch["longest"] = min(self.longest, batch["input_ids"].shape[1])
        slots = int((batch["input_ids"] == IMAGE_SLOT).sum())
        assert slots == (len(seen.get("images", ())) * self.pixels.image.words if self.pixels else 0)
        tokens = 0 if micro.filler else sum(len(ids) for row in rows for ids, _ in row)
        return batch | seen | {"answer_tokens": micro.answer_tokens, "tokens": tokens, "items": drawn}

    def _width(self, rows: list[list[tuple[np.ndarray, np.ndarray]]]) -> int:
        longest = max(sum(len(ids) for ids, _ in row) for row in rows)
        if self.padding_free and len(rows) == 1:
            return row_width(longest, self.width, self.longest)
        return self.width or -(-longest // 8) * 8

    def _images(self, drawn: list[int], items: list[dict[str, Any]], epoch: int) -> dict[str, Any]:
        """images and unreadable; masks the labels of items whose image cannot be read."""
        if self.pixels is None:
            return {}
        images, unreadable = [], []
        for index, item in zip(drawn, items, strict=True):
            if not item["image"]:
                continue
            pixels = self.pixels.load(str(item["image"]), epoch, index)
            if isinstance(pixels, str):
                unreadable.append(pixels)
                item["labels"] = np.full_like(item["labels"], IGNORE)
                pixels = torch.zeros(3, self.pixels.image.size, self.pixels.image.size)
            images.append(pixels)
        return {"unreadable": unreadable} | ({"images": torch.stack(images)} if images else {})


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
        images: Optional[ImageInput] = None,
        padding_free: bool = False,
        one_row: bool = False,
    ):
        """padding_free: the items of a micro-batch share rows of max_words tokens; one_row: all of them share one."""
        super().__init__()
        self.padding_free = padding_free and not config.packing
        self._width = config.max_words if config.packing or self.padding_free else None
        if one_row and self.padding_free:
            self._width = batch_size * config.max_words
        self.config, self.rank, self.pad_id, self.seed, self.images = config, rank, tokenizer.eos_id, seed, images
        if config.val_config is not None:  # a mistake in it is told before the training data is read
            read_data_config(config.val_config, config.prompt_type, "data.val_config")
        items, self.train_report, self.key = open_dataset(config.data_config, config, tokenizer, images)
        self.val_report: Optional[Report] = None
        self.val_key: Optional[str] = None
        self.train_items, self.val_items = items, None
        if config.val_config is not None:
            val = open_dataset(config.val_config, config, tokenizer, images, "data.val_config")
            self.val_items, self.val_report, self.val_key = val
        elif held_out := int(len(items) * config.val_fraction):
            order = np.random.default_rng(seed).permutation(len(items))
            self.val_items = items.select(np.sort(order[:held_out]))
            self.train_items = items.select(np.sort(order[held_out:]))
        self.held_out = len(self.val_items) if self.val_items else 0
        if config.val_items is not None and config.val_items < self.held_out:
            evenly = np.arange(config.val_items) * self.held_out // config.val_items
            self.val_items = self.val_items.select(evenly)
        shared = {"batch_size": batch_size, "world_size": world_size, "max_words": config.max_words, "seed": seed}
        self.train_plan = self._plan(self.train_items, accum_iter=accum_iter, shuffle=True, **shared)
        self.val_plan = self._plan(self.val_items, accum_iter=1, shuffle=False, **shared) if self.val_items else None

    def _plan(self, items: datasets.Dataset, **settings: Any) -> BatchPlan:
        return BatchPlan(*_sizes(items), packing=self.config.packing, **settings)

    def train_dataloader(self) -> PlannedLoader:
        return self._loader(self.train_items, self.train_plan, self.config.image_transform)

    def val_dataloader(self) -> Optional[PlannedLoader]:
        transform = deterministic(self.config.image_transform)
        return self._loader(self.val_items, self.val_plan, transform) if self.val_plan else []

    def _loader(self, items: datasets.Dataset, plan: BatchPlan, transform: ImageTransform) -> PlannedLoader:
        pixels = _pixels(self.images, transform, self.config, self.seed)
        workers = min(self.config.num_workers, os.cpu_count() or 1)  # more only take turns
        return PlannedLoader(
            TokenDataset(items, self._width, self.pad_id, pixels, self.padding_free, self.config.max_words),
            sampler=_PlanSampler(plan, self.rank),
            batch_size=None,
            num_workers=workers,
            pin_memory=self.config.pin_mem and torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=outlast_signals,
            # A loader draws a seed for its workers whenever it is iterated, from the global state by default;
            # and a resumed run iterates at other moments than the first one did.
            generator=torch.Generator(),
        )


def outlast_signals(worker: int) -> None:
    """For a process that prepares batches: the step that a signal lets come to its end needs its data. A Ctrl-C at the
    terminal, and torchrun's signals, go to the whole group; pkill, systemd and SLURM reach every process. It ends with
    the process that it works for."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    """By SIGTERM, which multiprocessing sends at the parent's end, and then waits."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _sizes(items: datasets.Dataset) -> tuple[np.ndarray, np.ndarray]:
    columns = items.with_format("numpy")
    return np.asarray(columns["length"][:]), np.asarray(columns["answer_tokens"][:])


def _pixels(
    images: Optional[ImageInput], transform: ImageTransform, config: DataConfig, seed: int
) -> Optional[PixelSource]:
    return None if images is None else PixelSource(images, transform, config.bad_images, seed)


def answer_loader(
    config: DataConfig, tokenizer: Tokenizer, batch_size: int, images: Optional[ImageInput] = None
) -> PlannedLoader:
    """All items of config.data_config once, in order of length, for measuring."""
    items, _, _ = open_dataset(config.data_config, config, tokenizer, images)
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
        TokenDataset(items, None, tokenizer.eos_id, _pixels(images, deterministic(config.image_transform), config, 0)),
        sampler=_PlanSampler(plan, 0),
        batch_size=None,
        num_workers=config.num_workers,
    )
