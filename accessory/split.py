"""How a run's steps are dealt out to ranks and micro-batches, and going on with another number of ranks.

Positions and random states of ranks are worth nothing to another number of them. So such a run goes on where they play
no part: at the start of an epoch, with the trainables, their moments and the number of steps of the checkpoint.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, Trainer

from accessory.module import FinetuneModule


@dataclass(frozen=True)
class Split:
    batch_size: int
    accum_iter: int
    world_size: int

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Split":
        return cls(**{key: settings[key] for key in SPLIT_KEYS})

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accum_iter * self.world_size

    def steps_left(self, fit_loop: dict[str, Any], rows: int) -> int:
        """Optimizer steps to the end of the epoch that a checkpoint's Lightning loop is in; 0 between epochs.

        rows: those of an epoch."""
        epoch = fit_loop["epoch_progress"]["current"]
        if epoch["processed"] == epoch["ready"]:
            return 0
        done = fit_loop["state_dict"]["combined_loader"][0]["done"]
        return -(-rows // self.rows_per_step) - -(-done // self.accum_iter)


SPLIT_KEYS = tuple(Split.__dataclass_fields__)


class NextEpoch(Callback):
    """Lets a run that was split otherwise go on with the epoch after its checkpoint's.

    before: the checkpoint's. rows: those that an epoch has.
    """

    def __init__(self, before: Split, rows: int, seed: int, rank: int):
        self.before, self.rows, self.seed, self.rank = before, rows, seed, rank

    def on_load_checkpoint(self, trainer: Trainer, module: FinetuneModule, checkpoint: dict[str, Any]) -> None:
        fit_loop = checkpoint["loops"]["fit_loop"]
        epoch = fit_loop["epoch_progress"]["current"]
        skipped = self.before.steps_left(fit_loop, self.rows)
        if epoch["processed"] != epoch["ready"]:
            count_epoch(fit_loop)
        if trainer.is_global_zero:
            print(
                f"world_size was {self.before.world_size} and is {trainer.world_size}: going on with the start of "
                f"epoch {epoch['processed']} (the first is 0); steps skipped of the one before: {skipped}",
                flush=True,
            )

    def on_train_start(self, trainer: Trainer, module: FinetuneModule) -> None:
        state = np.random.SeedSequence((self.seed, trainer.current_epoch, self.rank)).generate_state(1)
        random.seed(int(state[0]))
        np.random.seed(state[0])
        torch.manual_seed(int(state[0]))
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        scheduler.last_epoch = trainer.current_epoch * module.steps_per_epoch - 1  # it counts steps
        scheduler.step()


def count_epoch(fit_loop: dict[str, Any]) -> None:
    """Lightning's counters after an optimizer step, as they stand between epochs: the one that it is in is over."""
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    batches["total"]["completed"] = batches["total"]["processed"]
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    for progress in (epochs["total"], epochs["current"]):
        progress["processed"] = progress["completed"] = progress["ready"]
