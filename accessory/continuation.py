"""Whether a run continues another, and from which checkpoint: what would mix two runs or overwrite one is refused."""

from __future__ import annotations

import os
from collections.abc import Collection
from itertools import count
from pathlib import Path
from typing import Any, Optional

import torch

from accessory.bases import META_FILE, TRAINABLE_FILE
from accessory.config import Precision, ResumeConfig
from accessory.errors import UserError
from accessory.files import sha256
from accessory.folders import listing
from accessory.models import read_json
from accessory.resume import RNG_FILE, RUN_FILE, SPLIT_FILE, STATE_FILE, SUMS_FILE, checkpoint_folders
from accessory.split import SPLIT_KEYS, Split


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
    named, run = Path(resume.path).expanduser(), _run_of(candidates[0])
    if candidates == [named] and (wrong := _no_checkpoint(named) or damage(named)) is not None:
        raise UserError(f"--resume {resume.path}: not a whole checkpoint ({wrong})")
    if run != output_dir.absolute() and checkpoint_folders(output_dir / "checkpoints"):
        raise UserError(f"--output_dir {output_dir}: holds another run than --resume {resume.path}; choose another")
    return _newest_whole(candidates, resume, settings, unknown)


def precision_before(output_dir: Path, resume: ResumeConfig) -> Optional[Precision]:
    """The compute type that the run to continue was started with; None: there is none, or it does not say, of which
    `find_checkpoint` tells."""
    candidates = _candidates(output_dir, resume)
    run_file = _run_of(candidates[0]) / RUN_FILE if candidates else None
    if run_file is None or not run_file.is_file():
        return None
    found = read_json(run_file).get("precision")
    return Precision(found) if found in list(Precision) else None


def is_finished(output_dir: Path) -> bool:
    return (output_dir / TRAINABLE_FILE).is_file()


def refuse_finished(output_dir: Path) -> None:
    if is_finished(output_dir):
        raise UserError(f"--output_dir {output_dir}: holds a finished run; choose another, or remove it")


def _candidates(output_dir: Path, resume: ResumeConfig) -> list[Path]:
    """The checkpoints that may be continued from, oldest first; what --resume names, as it is, if it has none in it."""
    if resume.path is None:
        return checkpoint_folders(output_dir / "checkpoints")
    named = Path(resume.path).expanduser()
    return checkpoint_folders(named / "checkpoints") or [named]


def _newest_whole(
    candidates: list[Path], resume: ResumeConfig, settings: dict[str, Any], unknown: Collection[str]
) -> Path:
    run = _run_of(candidates[0])
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


def compare_settings(checkpoint: Path, settings: dict[str, Any], unknown: Collection[str] = ()) -> None:
    """Refuse to continue the run of a checkpoint with other settings. unknown: those that are not compared."""
    _compare(_run_of(checkpoint), _started_with(checkpoint), settings, unknown)


def compare_finished(output_dir: Path, settings: dict[str, Any], unknown: Collection[str] = ()) -> None:
    """Refuse to take the finished run of `output_dir` for one of other settings."""
    _compare(output_dir, _settings_of(output_dir), settings, {*unknown, *SPLIT_KEYS})


def _compare(run: Path, started_with: dict[str, Any], settings: dict[str, Any], unknown: Collection[str]) -> None:
    for key in {**settings, **started_with}:  # in the order of settings: a plain cause before its digest
        before, now = started_with.get(key), settings.get(key)
        if before != now and key not in unknown:
            name, before, now = _where_they_differ(key, before, now)
            at_next_epoch = " resume.allow_world_size=true to go on at the next epoch," * (key == "world_size")
            raise UserError(
                f"{run}: its run was started with {name}={before!r}, this one has "
                f"{now!r}; give the same settings to continue it,{at_next_epoch} or choose another --output_dir"
            )


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


def _where_they_differ(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The first setting of a group that is not the same, rather than the whole of both groups."""
    while isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        name, before, now = f"{name}.{key}", before.get(key), now.get(key)
    return name, before, now


def _started_with(checkpoint: Path) -> dict[str, Any]:
    split_file = checkpoint / SPLIT_FILE
    return _settings_of(_run_of(checkpoint)) | (read_json(split_file) if split_file.is_file() else {})


def _settings_of(run: Path) -> dict[str, Any]:
    if not (run / RUN_FILE).is_file():
        raise UserError(f"{run}: holds a run, but no {RUN_FILE} to tell whose; choose another --output_dir")
    return read_json(run / RUN_FILE)


def _run_of(checkpoint: Path) -> Path:
    """The output folder of the run that saved it."""
    return checkpoint.absolute().parent.parent


def refuse_last_epoch(checkpoint: Path, before: Split, rows: int, epochs: int) -> None:
    """Refuse to go on at the next epoch where there is none, and steps of the last one are left."""
    state = torch.load(checkpoint / STATE_FILE, map_location="cpu", mmap=True, weights_only=False)
    fit_loop = state["loops"]["fit_loop"]
    if fit_loop["epoch_progress"]["current"]["ready"] >= epochs and (left := before.steps_left(fit_loop, rows)):
        raise UserError(
            f"resume.allow_world_size=true: {checkpoint} is in the last epoch, of which {left} steps would be left "
            f"out; continue it on {before.world_size} rank(s)"
        )


def set_later_aside(checkpoint: Path, folder: Path) -> None:
    """A run that goes on from an older checkpoint of `folder` writes those behind it anew; the old ones are kept, but
    are no longer continued from."""
    for later in checkpoint_folders(folder):
        if checkpoint.absolute().parent == folder.absolute() and later.name > checkpoint.name:
            names = (later.with_name(f"aside-{'' if n == 1 else f'{n}-'}{later.name}") for n in count(1))
            aside = next(path for path in names if not path.exists())
            later.rename(aside)
            print(f"{later} lies behind the checkpoint that is continued; it is now {aside.name}", flush=True)
