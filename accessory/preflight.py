"""What refuses a run before anything is read or computed, beyond what single settings must fulfil (checks.py)."""

from __future__ import annotations

from pathlib import Path

from accessory.config import Config
from accessory.data.datamodule import DataModule
from accessory.errors import UserError
from accessory.sources import Sources
from accessory.strategies import World, is_sharded

MERGED = "model"  # in the output folder, without --only_save_trainable


def refuse_sharded_export(config: Config, world: World) -> None:
    if is_sharded(config.strategy, world) and not config.only_save_trainable:
        raise UserError(
            "--data_parallel fsdp: no rank holds the whole base, so none can write a merged model; add "
            "--only_save_trainable, and merge afterwards with scripts/export.py"
        )


def refuse_overwriting(config: Config, output_dir: Path, sources: Sources) -> None:
    """What the run writes must not take the place of what it reads, nor of another's model."""
    if output_dir.resolve() in [folder.path.resolve() for folder in sources.folders]:
        raise UserError(f"--output_dir {output_dir}: is a folder of --pretrained_path; choose another")
    merged = output_dir / MERGED
    if config.only_save_trainable or not (merged.is_dir() and any(merged.iterdir())):
        return
    vision = [] if config.model.vision_path is None else [Path(config.model.vision_path).expanduser()]
    read = [path.resolve() for path in (*(folder.path for folder in sources.folders), *vision)]
    is_new = not (output_dir / "checkpoints").exists()  # else it may be this run's, which was killed right behind it
    if is_new or any(path.is_relative_to(merged.resolve()) for path in read):
        raise UserError(
            f"--output_dir {output_dir}: the merged model is to be written to {merged}, which holds something; choose "
            "another, or add --only_save_trainable"
        )


def refuse_without_images(config: Config, data: DataModule) -> None:
    """An image part learns from images."""
    recipe, report = config.recipe, data.train_report
    if (recipe.projector or recipe.vision) and report.images == report.unreadable:
        what = "projector" if recipe.projector else "vision"
        raise UserError(f"recipe.{what}=true, but no item of --data_config {config.data.data_config} has an image")
