"""Never losing work: checkpoints that are whole or absent, and the decision whether and where a run continues.

A checkpoint is a folder `checkpoints/step-N` with the trainables (it can be asked and exported like a result),
Lightning's training state (moments, scheduler, loop and data position) and every rank's random state.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from pytorch_lightning import Callback, Trainer

from accessory.bases import FROZEN_FILE, META_FILE, TRAINABLE_FILE
from accessory.config import Precision, ResumeConfig, SaveConfig
from accessory.errors import UserError
from accessory.files import atomic_folder, sha256
from accessory.folders import listing
from accessory.models import read_json
from accessory.module import FinetuneModule
from accessory.split import SPLIT_KEYS, Split, count_epoch
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


def set_later_aside(checkpoint: Path, folder: Path) -> None:
    """A run that goes on from an older checkpoint of `folder` writes those behind it anew; the old ones are kept, but
    are no longer continued from."""
    for later in checkpoint_folders(folder):
        if checkpoint.absolute().parent == folder.absolute() and later.name > checkpoint.name:
            names = (later.with_name(f"aside-{'' if n == 1 else f'{n}-'}{later.name}") for n in count(1))
            aside = next(path for path in names if not path.exists())
            later.rename(aside)
            print(f"{later} lies behind the checkpoint that is continued; it is now {aside.name}", flush=True)


def refuse_last_epoch(checkpoint: Path, before: Split, rows: int, epochs: int) -> None:
    """Refuse to go on at the next epoch where there is none, and steps of the last one are left."""
    state = torch.load(checkpoint / STATE_FILE, map_location="cpu", mmap=True, weights_only=False)
    fit_loop = state["loops"]["fit_loop"]
    if fit_loop["epoch_progress"]["current"]["ready"] >= epochs and (left := before.steps_left(fit_loop, rows)):
        raise UserError(
            f"resume.allow_world_size=true: {checkpoint} is in the last epoch, of which {left} steps would be left "
            f"out; continue it on {before.world_size} rank(s)"
        )


def _no_checkpoint(named: Path) -> Optional[str]:
    """What --resume names instead of a checkpoint; None where it may be one."""
    if named.is_file():
        return "a file; name its folder"
    if not named.is_dir():
        return "no such folder"
    if not (named / SUMS_FILE).exists():
        return f"{SUMS_FILE} is not there; it holds {listing(named)}"
    return None


def damage(checkpoint: Path) -> Optional[str]:
    """What is wrong with a checkpoint folder, or None if it is whole."""
    try:
        sums = read_json(checkpoint / SUMS_FILE)
        if lacking := {STATE_FILE, RNG_FILE, TRAINABLE_FILE, META_FILE} - sums.keys():
            return f"{SUMS_FILE} does not name {', '.join(sorted(lacking))}"
        bad = [name for name, digest in sums.items() if sha256(checkpoint / name) != digest]
    except UserError as problem:
        return str(problem)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return f"{', '.join(bad)} differs from its checksum" if bad else None


def refuse_finished(output_dir: Path) -> None:
    if (output_dir / TRAINABLE_FILE).is_file():
        raise UserError(f"--output_dir {output_dir}: holds a finished run; choose another, or remove it")


def find_checkpoint(
    output_dir: Path, resume: ResumeConfig, settings: dict[str, Any], unknown: Collection[str] = ()
) -> Optional[Path]:
    """The checkpoint to continue from, or None to start; refuses what would overwrite or mix two runs.

    settings: everything that decides the run's numbers; run.json holds those that the folder was started with.
    unknown: those that are not known yet, and are left to `compare_settings`.
    """
    refuse_finished(output_dir)
    candidates = _candidates(output_dir, resume)
    if resume.path is None:
        return _newest_whole(candidates, resume, settings, unknown) if candidates else None
    named, run = Path(resume.path).expanduser(), candidates[0].absolute().parent.parent
    if candidates == [named] and (wrong := _no_checkpoint(named) or damage(named)) is not None:
        raise UserError(f"--resume {resume.path}: not a whole checkpoint ({wrong})")
    if run != output_dir.absolute() and checkpoint_folders(output_dir / "checkpoints"):
        raise UserError(f"--output_dir {output_dir}: holds another run than --resume {resume.path}; choose another")
    return _newest_whole(candidates, resume, settings, unknown)


def precision_before(output_dir: Path, resume: ResumeConfig) -> Optional[Precision]:
    """The compute type that the run to continue was started with; None: there is none, or it does not say, of which
    `find_checkpoint` tells."""
    candidates = _candidates(output_dir, resume)
    run_file = candidates[0].absolute().parent.parent / RUN_FILE if candidates else None
    if run_file is None or not run_file.is_file():
        return None
    found = read_json(run_file).get("precision")
    return Precision(found) if found in list(Precision) else None


def _candidates(output_dir: Path, resume: ResumeConfig) -> list[Path]:
    """The checkpoints that may be continued from, oldest first; what --resume names, as it is, if it has none in it."""
    if resume.path is None:
        return checkpoint_folders(output_dir / "checkpoints")
    named = Path(resume.path).expanduser()
    return checkpoint_folders(named / "checkpoints") or [named]


def _newest_whole(
    candidates: list[Path], resume: ResumeConfig, settings: dict[str, Any], unknown: Collection[str]
) -> Path:
    run = candidates[0].absolute().parent.parent
    compare_settings(candidates[0], settings, {*unknown, *SPLIT_KEYS})
    for checkpoint in reversed(candidates):
        wrong = damage(checkpoint)
        if wrong is None:
            _compare_split(checkpoint, resume, settings, unknown)
            return checkpoint
        if os.environ.get("RANK", "0") == "0":
            then = "" if checkpoint == candidates[0] else "; trying the one before"
            print(f"checkpoint {checkpoint} is damaged ({wrong}){then}", flush=True)
    if resume.path is not None:
        raise UserError(f"--resume {resume.path}: no checkpoint in it is whole; name another, or start without")
    raise UserError(f"--output_dir {run}: no checkpoint in it is whole; choose another folder, or remove it")


def _compare_split(checkpoint: Path, resume: ResumeConfig, settings: dict[str, Any], unknown: Collection[str]) -> None:
    before, now = split_of(checkpoint), Split.of(settings)
    if before.world_size == now.world_size or not resume.allow_world_size:
        compare_settings(checkpoint, settings, unknown)
    elif settings["max_steps"] > 0 and before.rows_per_step != now.rows_per_step:
        raise UserError(
            f"resume.allow_world_size=true: train.max_steps={settings['max_steps']} counts steps of "
            f"{before.rows_per_step} rows, and now they would have {now.rows_per_step}; choose --batch_size and "
            f"--accum_iter such that batch_size x accum_iter x {now.world_size} ranks is {before.rows_per_step}"
        )


def split_of(checkpoint: Path) -> Split:
    return Split.of(_started_with(checkpoint))


def compare_settings(checkpoint: Path, settings: dict[str, Any], unknown: Collection[str] = ()) -> None:
    """Refuse to continue the run of a checkpoint with other settings. unknown: those that are not compared."""
    started_with = _started_with(checkpoint)
    for key in {**settings, **started_with}:  # in the order of settings: a plain cause before its digest
        before, now = started_with.get(key), settings.get(key)
        if before != now and key not in unknown:
            name, before, now = _where_they_differ(key, before, now)
            at_next_epoch = " resume.allow_world_size=true to go on at the next epoch," * (key == "world_size")
            raise UserError(
                f"{checkpoint.absolute().parent.parent}: its run was started with {name}={before!r}, this one has "
                f"{now!r}; give the same settings to continue it,{at_next_epoch} or choose another --output_dir"
            )


def _where_they_differ(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The first setting of a group that is not the same, rather than the whole of both groups."""
    while isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        name, before, now = f"{name}.{key}", before.get(key), now.get(key)
    return name, before, now


def _started_with(checkpoint: Path) -> dict[str, Any]:
    run_file = checkpoint.absolute().parent.parent / RUN_FILE
    if not run_file.is_file():
        raise UserError(
            f"{run_file.parent}: has checkpoints but no {RUN_FILE} to tell whose; choose another --output_dir"
        )
    split_file = checkpoint / SPLIT_FILE
    return read_json(run_file) | (read_json(split_file) if split_file.is_file() else {})
