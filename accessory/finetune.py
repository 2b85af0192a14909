"""A fine-tuning run, as a table of contents."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger, Logger

from accessory.assemble import assemble
from accessory.bases import open_folder
from accessory.callbacks import Curves, ProgressBar, Throughput
from accessory.checkpoint import save_trainable
from accessory.config import Config, LoggerConfig, LoggerName, Precision
from accessory.data.datamodule import DataModule
from accessory.errors import UserError
from accessory.models.llama import Llama
from accessory.module import FinetuneModule
from accessory.resume import RUN_FILE, Checkpoints, find_checkpoint
from accessory.strategies import DTYPES, Float16, World, find_world, make_strategy
from accessory.summary import describe_run


def finetune(config: Config) -> Path:
    """Train, and return the folder with trainable.safetensors, meta.json, config.yaml, tokenizer and curves.png.

    Raises UserError for anything the user can mend, before weights are read where that is possible.
    """
    _quiet()
    world = find_world()
    output_dir = _prepare_output(config)
    seed_everything(config.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high" if config.train.precision is Precision.tf32 else "highest")

    model = assemble(config.model, config.quantization, config.recipe, world.device, DTYPES[config.train.precision])
    if model.tokenizer is None:
        raise UserError("no tokenizer in the folders of --pretrained_path; name it with --tokenizer_path")
    data = DataModule(
        config.data,
        model.tokenizer,
        config.train.batch_size,
        config.train.accum_iter,
        world.size,
        world.rank,
        config.seed,
    )
    settings = _settings(config, model, data, world)
    checkpoint = find_checkpoint(output_dir, config.resume, settings)
    model.model.checkpointing = config.train.checkpointing
    _compile(model, config, world)

    module = FinetuneModule(model, config.optim, data.train_plan.steps, _epochs(config, data))
    meta = _meta(config, model)

    def write_result(folder: Path) -> None:
        save_trainable(model, folder, meta, OmegaConf.to_yaml(OmegaConf.structured(config)), model.tokenizer)

    checkpoints = Checkpoints(output_dir / "checkpoints", config.save, write_result)
    if checkpoint is not None:
        checkpoints.restore_random_state(checkpoint, world.rank)
    trainer = _trainer(config, world, output_dir, data, checkpoints)

    if world.rank == 0:
        print(describe_run(config, model, data, world, checkpoint), flush=True)
        (output_dir / RUN_FILE).write_text(json.dumps(settings, indent=2))
    trainer.fit(module, data, ckpt_path=None if checkpoint is None else checkpoint / "state.ckpt", weights_only=False)

    if world.rank == 0:
        meta |= {key: float(trainer.callback_metrics[key]) for key in ("val_loss",) if key in trainer.callback_metrics}
        meta["steps"] = trainer.global_step
        write_result(output_dir)
        if not config.only_save_trainable:
            from accessory.export import export_hf

            export_hf(model, output_dir / "model")
        print(f"saved {output_dir / 'trainable.safetensors'}", flush=True)
    return output_dir


def _quiet() -> None:
    """Lightning's own remarks on devices, workers and resumable loaders; what a user needs is in the summary."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _prepare_output(config: Config) -> Path:
    output_dir = Path(config.output_dir).expanduser()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ".writable").touch()
        (output_dir / ".writable").unlink()
    except OSError as error:
        raise UserError(f"--output_dir {config.output_dir}: cannot be written ({error.strerror})") from None
    if config.resume is None and (output_dir / "trainable.safetensors").is_file():
        raise UserError(f"--output_dir {output_dir}: holds a finished run; choose another, or remove it")
    for path in config.model.pretrained_path:
        open_folder(path)  # a wrong path fails here, before anything is read
    return output_dir


def _settings(config: Config, model: Llama, data: DataModule, world: World) -> dict[str, Any]:
    """What decides a run's numbers: a resumed run must agree on all of it."""
    settings = {
        "base": model.base["fingerprint"],
        "tokenizer": model.tokenizer.fingerprint(),
        "val_fraction": config.data.val_fraction,
        "quantization": asdict(config.quantization),
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
    }
    return json.loads(json.dumps(settings))  # as run.json will give it back


def _meta(config: Config, model: Llama) -> dict[str, Any]:
    return {
        "format": 1,
        "llama_type": config.model.llama_type.value,
        "base": model.base,
        "quantization": json.loads(json.dumps(asdict(config.quantization))),
        "recipe": asdict(config.recipe),
        "tokenizer": model.tokenizer.fingerprint(),
    }


def _epochs(config: Config, data: DataModule) -> float:
    """Length of the schedule in epochs: shorter than train.epochs where max_steps ends the run."""
    steps = data.train_plan.steps * config.train.epochs
    return min(steps, config.train.max_steps if config.train.max_steps > 0 else steps) / data.train_plan.steps


def _micro_batches(config: Config, data: DataModule) -> int:
    """Micro-batches of an epoch; of the whole run where max_steps ends it within the first, so that the progress bar
    knows and the run ends with a validation."""
    micro = data.train_plan.micro_batches
    return min(micro, config.train.max_steps * config.train.accum_iter) if config.train.max_steps > 0 else micro


def _compile(model: Llama, config: Config, world: World) -> None:
    wanted = config.train.compile if config.train.compile is not None else world.device.type == "cuda"
    if wanted:
        for block in model.model.layers:
            block.compile()


def _wandb(config: LoggerConfig, output_dir: Path) -> Logger:
    from pytorch_lightning.loggers import WandbLogger

    try:
        logger = WandbLogger(project=config.project, name=output_dir.name, save_dir=output_dir, offline=config.offline)
        logger.experiment  # noqa: B018  connects: a missing login shows before training
    except Exception as error:  # wandb's errors share no base that it exports
        reason = str(error).splitlines()[0]
        raise UserError(
            f"logger=wandb: {reason}; run `wandb login`, or log without network: logger.offline=true"
        ) from None
    return logger


def _loggers(config: LoggerConfig, output_dir: Path) -> list[Logger]:
    loggers: list[Logger] = [CSVLogger(output_dir, name="logs", flush_logs_every_n_steps=10)]
    if config.name is LoggerName.wandb:
        loggers.append(_wandb(config, output_dir))
    elif config.name is LoggerName.tensorboard:
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(output_dir, name="tensorboard"))
    return loggers


def _trainer(config: Config, world: World, output_dir: Path, data: DataModule, checkpoints: Checkpoints) -> Trainer:
    return Trainer(
        accelerator="gpu" if world.device.type == "cuda" else "cpu",
        devices=world.local_size if world.size > 1 else [world.local_rank] if world.device.type == "cuda" else 1,
        num_nodes=world.nodes,
        strategy=make_strategy(config.strategy, world),
        plugins=[Float16(world.device)] if config.train.precision is Precision.fp16 else None,
        max_epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        accumulate_grad_batches=config.train.accum_iter,
        val_check_interval=min(1.0, config.train.val_interval),
        check_val_every_n_epoch=max(1, round(config.train.val_interval)),
        limit_train_batches=_micro_batches(config, data),
        limit_val_batches=1.0 if data.val_plan else 0,
        num_sanity_val_steps=0,
        logger=_loggers(config.logger, output_dir),
        log_every_n_steps=config.logger.log_every_n_steps,
        callbacks=[Throughput(), ProgressBar(), checkpoints, Curves(output_dir)],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=None,
    )
