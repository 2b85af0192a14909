"""What is written down of a run: what decides its numbers (run.json), and what its result is (meta.json)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accessory.config import Config
from accessory.data.datamodule import DataModule
from accessory.files import atomic_file
from accessory.quantization.job.cached import trained_with
from accessory.sources import Sources
from accessory.strategies import World


def run_settings(config: Config, sources: Sources, data: DataModule, world: World) -> dict[str, Any]:
    """What decides a run's numbers: a resumed run must agree on all of it."""
    settings = sources.identity | {
        "val_fraction": config.data.val_fraction,
        "val_items": config.data.val_items,
        "quantization": asdict(trained_with(config.quantization)),
        "recipe": asdict(config.recipe),
        "max_words": config.data.max_words,
        "packing": config.data.packing,
        "batch_size": config.train.batch_size,
        "accum_iter": config.train.accum_iter,
        "world_size": world.size,
        "epochs": config.train.epochs,
        "max_steps": config.train.max_steps,
        "precision": config.train.precision,
        "optim": asdict(config.optim),
        "seed": config.seed,
        "data": data.key,
        "val_data": data.val_key,
    }
    if sources.vision is not None:
        settings |= {"image_transform": config.data.image_transform}
    return json.loads(json.dumps(settings))  # as run.json will give it back


def order_of_collectives(config: Config, data: DataModule) -> dict[str, Any]:
    """What decides no numbers, but when ranks wait for each other."""
    return {
        "data_parallel": config.strategy.data_parallel.value,
        "save": asdict(config.save),
        "val_interval": config.train.val_interval,
        "validating on": len(data.val_items) if data.val_items is not None else 0,
    }


def write_settings(settings: dict[str, Any], file: Path) -> None:
    with atomic_file(file) as partial:
        partial.write_text(json.dumps(settings, indent=2))


def result_meta(config: Config, sources: Sources) -> dict[str, Any]:
    meta = {
        "format": 1,
        "llama_type": sources.llama_type.value,
        "base": sources.base,
        "quantization": json.loads(json.dumps(asdict(config.quantization))),
        "recipe": asdict(config.recipe),
        "tokenizer": sources.tokenizer.fingerprint(),
    }
    return meta if sources.vision is None else meta | {"image_transform": config.data.image_transform.value}
