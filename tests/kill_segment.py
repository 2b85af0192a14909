"""One process of a run that is to be killed (test_kill.py): it trains, and tells what it is doing.

A fork server (ranks.py) has imported torch and Lightning, which would take longer than all that the process then does.
What is patched here is patched in that process alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Optional

import torch

import accessory.files
import accessory.finetune
import accessory.resume
from accessory.config import Config
from accessory.data.datamodule import PlannedLoader
from accessory.module import FinetuneModule


def run_segment(
    config: Config,
    environment: dict[str, str],
    log: Path,
    parent: Connection,
    hold: Optional[tuple[str, int]],
    forgets: str,
) -> None:
    """Start the run or continue it, and tell the parent (what is being done, optimizer step, items of a micro-batch).

    environment: what torchrun sets. hold: stand still when telling `what` for the n-th time. forgets: what is not
    restored: "random state", "sampler" or "" for nothing.
    """
    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1  # threads, and the locks they hold, do not survive a fork
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as in any process: a killed one leaves no named semaphores
    counts = Counter()

    def tell(what: str, step: int = 0, items: tuple[int, ...] = ()) -> None:
        parent.send((what, step, items))
        counts[what] += 1
        if (what, counts[what]) == hold:
            time.sleep(600)

    _report(tell)
    _forget(forgets)
    tell("start")
    accessory.finetune.finetune(config)


def _report(tell: Any) -> None:
    train, validate = FinetuneModule.training_step, FinetuneModule.validation_step
    atomic_folder, fsync, fit = accessory.resume.atomic_folder, accessory.files.fsync, accessory.finetune._fit
    saving = False

    def training_step(module: FinetuneModule, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        tell("train", module.global_step, tuple(batch["items"]))
        return train(module, batch, batch_idx)

    def validation_step(module: FinetuneModule, batch: dict[str, Any], batch_idx: int) -> None:
        tell("validate", module.global_step)
        validate(module, batch, batch_idx)

    @contextlib.contextmanager
    def checkpoint_folder(target: Path) -> Iterator[Path]:
        nonlocal saving
        saving = True
        tell("save")
        with atomic_folder(target) as partial:
            yield partial
        saving = False
        tell("saved")

    def fsync_and_tell(path: Path) -> None:
        if saving:
            tell("save")
        fsync(path)

    def fit_and_tell(*arguments: Any) -> None:
        fit(*arguments)
        tell("finish")

    FinetuneModule.training_step, FinetuneModule.validation_step = training_step, validation_step
    accessory.resume.atomic_folder, accessory.files.fsync = checkpoint_folder, fsync_and_tell
    accessory.finetune._fit = fit_and_tell


def _forget(what: str) -> None:
    if what == "random state":
        accessory.resume.set_random_state = lambda state: None
    if what == "sampler":
        PlannedLoader.load_state_dict = lambda loader, state: None
