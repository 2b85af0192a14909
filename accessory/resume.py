"""Never losing work: checkpoints that are whole or absent, and a run that goes on from one as if nothing had been.

A checkpoint is a folder `checkpoints/step-N` with the trainables (it can be asked and exported like a result),
Lightning's training state (moments, scheduler, loop and data position) and every rank's random state.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from pytorch_lightning import Callback, Trainer

from accessory.bases import FROZEN_FILE, META_FILE
from accessory.config import SaveConfig
from accessory.files import atomic_folder, sha256
from accessory.models import read_json
from accessory.module import FinetuneModule
from accessory.split import Split, count_epoch
from accessory.strategies import gather

log = logging.getLogger(__name__)

RUN_FILE, STATE_FILE, RNG_FILE, SUMS_FILE = "run.json", "state.ckpt", "rng.pt", "checksums.json"
SPLIT_FILE = "split.json"  # of each checkpoint its own: those of a folder can come from different numbers of ranks


class Checkpoints(Callback):
    """Saves every `epoch_interval` epochs and `step_interval` steps, and where a run is stopped; keeps the last `keep`.

    A checkpoint is written right after an optimizer step. Whether a validation was to follow is part of it, and a
    continued run starts with that: Lightning by itself would take it for done.

    write_result: writes the trainables and their metadata into a folder.
    """

    def __init__(self, folder: Path, config: SaveConfig, split: Split, write_result: Callable[[Path], None]):
        self.folder, self.config, self.split, self.write_result = folder, config, split, write_result
        self.newest: Optional[Path] = None  # that this process saved or continued from
        self._saved_at = -1
        self._validation_due = False
        self._rng: Optional[dict[str, Any]] = None

    def on_train_batch_end(self, trainer: Trainer, module: FinetuneModule, outputs: Any, batch: Any, idx: int) -> None:
        trainer.train_dataloader.position = (trainer.current_epoch, idx + 1)
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        if trainer.global_step % self.config.step_interval == 0 or self._ends_epochs(trainer) or module.stop_agreed:
            self.save(trainer)

    def _ends_epochs(self, trainer: Trainer) -> bool:
        """After the last step of `epoch_interval` epochs, or of the run."""
        epoch = trainer.current_epoch + 1
        is_asked_for = epoch % self.config.epoch_interval == 0 or epoch == trainer.max_epochs
        return (_ends_epoch(trainer) and is_asked_for) or trainer.global_step == trainer.max_steps

    def save(self, trainer: Trainer) -> None:
        """On all ranks, after an optimizer step; once where it is asked for twice."""
        if trainer.global_step == self._saved_at:
            return
        trainer.lightning_module.settle()
        trainer.lightning_module.log_of_steps.save(trainer.loggers)
        rng = gather(random_state())
        trainer.lightning_module.share_unreadable()
        target = self.folder / f"step-{trainer.global_step:08d}"
        if trainer.is_global_zero:
            with atomic_folder(target) as partial:
                trainer.save_checkpoint(partial / STATE_FILE)
                torch.save(rng, partial / RNG_FILE)
                (partial / SPLIT_FILE).write_text(json.dumps(asdict(self.split)))
                self.write_result(partial)
                known = self._frozen_sum(partial)
                sums = known | {p.name: sha256(p) for p in sorted(partial.iterdir()) if p.name not in known}
                (partial / SUMS_FILE).write_text(json.dumps(sums, indent=2))
            for old in checkpoint_folders(self.folder)[: -self.config.keep]:
                _remove(old)
        else:
            trainer.save_checkpoint(target)  # takes part in the barriers; only rank 0 writes
        trainer.strategy.barrier()  # a rank that ended before would have torchrun end the one that writes
        self._saved_at, self.newest = trainer.global_step, target

    def on_save_checkpoint(self, trainer: Trainer, module: FinetuneModule, checkpoint: dict[str, Any]) -> None:
        loop = trainer.fit_loop.epoch_loop
        due = module.validated_at != trainer.global_step and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        checkpoint["validation_due"] = due
        if _ends_epoch(trainer) or trainer.global_step == trainer.max_steps:
            count_epoch(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(self, trainer: Trainer, module: FinetuneModule, checkpoint: dict[str, Any]) -> None:
        self._saved_at, self._validation_due = checkpoint["global_step"], checkpoint["validation_due"]

    @staticmethod
    def _frozen_sum(folder: Path) -> dict[str, str]:
        """The checksum of the frozen file, which is the same in each checkpoint and may have gigabytes."""
        return {FROZEN_FILE: read_json(folder / META_FILE)["frozen_sha256"]} if (folder / FROZEN_FILE).exists() else {}

    def continue_from(self, folder: Path, rank: Optional[int]) -> None:
        """Remember the random state of `folder` for the moment training starts, after all that draws numbers.

        rank: None where the ranks are others than those that saved theirs.
        """
        self.newest = folder
        if rank is not None:
            self._rng = torch.load(folder / RNG_FILE, weights_only=False)[rank]

    def on_train_start(self, trainer: Trainer, module: FinetuneModule) -> None:
        if self._rng is not None:
            set_random_state(self._rng)
        if trainer.fit_loop.is_resuming:
            self._resume(trainer)

    def _resume(self, trainer: Trainer) -> None:
        """What Lightning leaves out: the validation that was due, and the order of the data in a new epoch."""
        fit_loop, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        is_between_epochs = fit_loop.epoch_progress.current.ready == fit_loop.epoch_progress.current.processed
        if self._validation_due and trainer.enable_validation:
            loop._batches_that_stepped -= is_between_epochs  # logged like one before the epoch's end
            loop.val_loop.restarting = False  # else it goes on behind the last batch of the one before
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True
            loop._batches_that_stepped += is_between_epochs
        if is_between_epochs:
            loop.restarting = False  # with max_steps it would go on behind the old epoch's last batch
            trainer.train_dataloader.sampler.set_epoch(trainer.current_epoch)
            iter(fit_loop._data_fetcher)  # its workers have begun with the first epoch


def _ends_epoch(trainer: Trainer) -> bool:
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def checkpoint_folders(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _remove(checkpoint: Path) -> None:
    """One that is no longer needed: that it cannot be removed (another process has it open on NFS) stops no run."""
    shutil.rmtree(checkpoint, ignore_errors=True)
    if checkpoint.exists():
        log.warning("%s is no longer needed and cannot be removed", checkpoint)
