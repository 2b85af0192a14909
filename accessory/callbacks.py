"""What a run shows besides its weights: progress, throughput, memory, curves."""

from __future__ import annotations

import contextlib
import csv
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar


def peak_memory_gib() -> float:
    """Most memory held so far: of the GPU where there is one, else of this process (RSS)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Throughput(Callback):
    """Tokens/s (padding not counted; this rank's, times the ranks), peak memory and learning rate of every step; and
    the moments at which the newest step has to be known."""

    def __init__(self) -> None:
        self._tokens, self._lr = 0, 0.0

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._tokens = 0
        module.log_of_steps.restart()

    on_train_start = on_validation_end = on_train_epoch_start  # a resumed epoch has no start of its own

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self._lr = optimizer.param_groups[-1]["lr"]  # the step's own; afterwards the scheduler has moved on

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, idx: int) -> None:
        self._tokens += int(batch["tokens"])
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        tokens, self._tokens = self._tokens * trainer.world_size, 0
        module.note(tokens, lr=self._lr, peak_gib=peak_memory_gib())

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        module.settle()

    on_train_epoch_end = on_train_end = on_validation_start


class ProgressBar(TQDMProgressBar):
    """Loss, LR, tokens/s and peak memory in one line, with an ETA over the epoch."""

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, str]:
        shown, newest = {}, module.log_of_steps.newest
        for name, form in {
            "loss": "{:.3f}",
            "lr": "{:.1e}",
            "tokens_per_s": "{:,.0f} tok/s",
            "peak_gib": "{:.1f} GiB",
            "val_loss": "{:.3f}",
        }.items():
            if name in newest:
                shown[name] = form.format(newest[name])
        return shown

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_train_start(trainer, module)
        if done := trainer.fit_loop.epoch_loop.batch_progress.current.ready:  # within an epoch, which has no start then
            self.train_progress_bar.reset(self.total_train_batches)
            self.train_progress_bar.initial = done
            self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        for bar in (self._val_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()  # what is told next starts on a line of its own


class Curves(Callback):
    """Draws the curves of a run that stopped early too; one that ends has them drawn after its last validation."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(Exception):  # what stopped the run is to be told, not that its last step is unknown
            module.settle()
        with contextlib.suppress(Exception):  # nor that the disk is full
            save_curves(trainer, self.folder)


def save_curves(trainer: Trainer, folder: Path) -> None:
    """Flush the logs and draw them, on rank 0."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.save()
        draw_curves(folder)


def read_series(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one column of a run's CSV logs; a resumed run has several, and the later one counts. Rows
    that a full disk or a lost machine left half-written are passed over."""
    points: dict[int, float] = {}
    for file in sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime):
        with file.open(newline="", errors="replace") as handle:
            for row in csv.DictReader(line for line in handle if "\0" not in line):
                with contextlib.suppress(TypeError, ValueError):
                    if row.get(name):
                        points[int(row["step"])] = float(row[name])
    return sorted(points), [points[step] for step in sorted(points)]


def draw_curves(folder: Path) -> None:
    from matplotlib.figure import Figure

    steps, losses = read_series(folder, "loss")
    if not losses:
        return
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="train (step)")
    top.plot(steps, smooth(losses), color="tab:blue", label="train (smoothed)")
    val_steps, val_losses = read_series(folder, "val_loss")
    if val_losses:
        top.plot(val_steps, val_losses, "o-", color="tab:orange", label="validation")
    top.set_ylabel("loss per answer token (nats)")
    top.legend()
    top.grid(alpha=0.3)
    bottom.plot(*read_series(folder, "lr"), color="tab:green")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=120)


def smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential moving average, corrected for its start."""
    out, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm)
    return out
