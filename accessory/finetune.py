"""A fine-tuning run, as a table of contents."""

from __future__ import annotations

import contextlib
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
from omegaconf import OmegaConf
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import Strategy

from accessory import fast as fast_parts
from accessory.agreement import refuse_other_runs, refuse_other_weights
from accessory.assemble import assemble
from accessory.bases import FROZEN_FILE, META_FILE
from accessory.callbacks import Curves, ProgressBar, Throughput, save_curves
from accessory.config import Config, Precision
from accessory.continuation import (
    compare_finished,
    compare_settings,
    find_checkpoint,
    is_finished,
    precision_before,
    refuse_finished,
    refuse_last_epoch,
    set_later_aside,
    split_of,
)
from accessory.data.datamodule import DataModule
from accessory.data.images import deterministic
from accessory.errors import UserError
from accessory.export import export_hf
from accessory.fast import Fast
from accessory.files import check_writable, disk_error, link, remove_partial, sole_user
from accessory.interruption import Interruption
from accessory.loggers import make_loggers, require_logger
from accessory.models import read_json
from accessory.models.llama import Llama
from accessory.models.qformer import image_input
from accessory.models.tokenizer import require_tokenizer
from accessory.module import FinetuneModule
from accessory.precision import DTYPES, default_precision
from accessory.preflight import (
    MERGED,
    refuse_overwriting,
    refuse_sharded_export,
    refuse_without_images,
)
from accessory.quantization.job.cached import calibrate_base
from accessory.quantization.setting import CALIBRATED, as_stored
from accessory.result import save_frozen, save_trainable
from accessory.resume import RUN_FILE, STATE_FILE, Checkpoints
from accessory.settings import order_of_collectives, result_meta, run_settings, write_settings
from accessory.sources import Sources, open_sources
from accessory.split import SPLIT_KEYS, NextEpoch, Split
from accessory.strategies import (
    Float16,
    PlainCheckpointIO,
    World,
    find_world,
    is_lost_connection,
    is_sharded,
    join_ranks,
    make_strategy,
)
from accessory.summary import describe_run
from accessory.tuning.recipe import check_recipe, trainable_names


def finetune(config: Config, repeated: bool = False) -> Path:
    """Train, and return the folder with trainable.safetensors, meta.json, config.yaml, tokenizer and curves.png.

    repeated: a run that has finished with the same settings is left as it is, where otherwise its folder is refused.

    Raises UserError for anything the user can mend, before weights are read where that is possible.
    """
    with contextlib.ExitStack() as held:
        return _finetune(config, repeated, held)


def _finetune(config: Config, repeated: bool, held: contextlib.ExitStack) -> Path:
    _quiet()
    world = find_world()
    refuse_sharded_export(config, world)
    require_logger(config.logger)
    output_dir = Path(config.output_dir).expanduser()
    if not repeated:
        refuse_finished(output_dir)
    config = _with_precision(config, world, output_dir)
    sources = open_sources(config.model)
    if config.quantization.method not in CALIBRATED or sources.folders[0].packed:
        config = replace(config, quantization=as_stored(config.quantization, sources.folders))
    check_recipe(sources, config.recipe, config.quantization)
    refuse_overwriting(config, output_dir, sources)
    check_writable(output_dir, f"--output_dir {output_dir}")
    tokenizer = require_tokenizer(sources)
    sizes = (config.train.batch_size, config.train.accum_iter, world.size, world.rank)
    fast = fast_parts.choose(config, world)
    data = DataModule(
        config.data, tokenizer, *sizes, config.seed, image_input(sources.vision), "padding_free" in fast.active,
        fast_parts.takes_one_row(config, world, sources.architecture.head_dim),
    )  # fmt: skip
    refuse_without_images(config, data)
    output_dir.mkdir(parents=True, exist_ok=True)
    if world.rank == 0:
        held.enter_context(sole_user(output_dir, "--output_dir"))
        remove_partial(output_dir / "checkpoints")
    settings = run_settings(config, sources, data, world)
    is_calibrated = config.quantization.method in CALIBRATED
    unknown = sources.identity if is_calibrated else ()
    if repeated and is_finished(output_dir):
        compare_finished(output_dir, settings, unknown)
        if world.rank == 0:
            print(f"{output_dir}: finished before", flush=True)
        return output_dir
    checkpoint = find_checkpoint(output_dir, config.resume, settings, unknown)
    split, before = Split.of(settings), None if checkpoint is None else split_of(checkpoint)
    loggers = make_loggers(config.logger, output_dir)
    if is_calibrated:  # minutes to hours: after all that can be wrong
        config = calibrate_base(config)
        sources = open_sources(config.model)
        settings = run_settings(config, sources, data, world)
        if checkpoint is not None:
            compare_settings(checkpoint, settings, SPLIT_KEYS)

    seed_everything(config.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high" if config.train.precision is Precision.tf32 else "highest")
    join_ranks(world)
    refuse_other_runs(settings | order_of_collectives(config, data), checkpoint)
    if before not in (None, split):
        refuse_last_epoch(checkpoint, before, data.train_plan.rows, config.train.epochs)
    if world.rank == 0 and checkpoint is not None:
        set_later_aside(checkpoint, output_dir / "checkpoints")
    model = _build(config, sources, world, fast)

    module = FinetuneModule(model, config.optim, data.train_plan.steps, _epochs(config, data))
    if "graphs" in fast.active:
        module.use_graphs()
    meta = result_meta(config, sources)
    frozen = _keep_frozen(sources, model, output_dir, checkpoint, meta) if world.rank == 0 else None

    def write_result(folder: Path) -> None:
        save_trainable(model, folder, meta, OmegaConf.to_yaml(OmegaConf.structured(config)), tokenizer, frozen)

    checkpoints = Checkpoints(output_dir / "checkpoints", config.save, split, write_result)
    if checkpoint is not None:
        checkpoints.continue_from(checkpoint, world.rank if before == split else None)
    interruption = Interruption(checkpoints, named=config.resume.path is not None)
    callbacks = [interruption, checkpoints, Curves(output_dir)]
    if before not in (None, split):
        callbacks.append(NextEpoch(before, data.train_plan.rows, config.seed, world.rank))
    strategy = make_strategy(world, own_sums=module.graphed is not None)
    trainer = _trainer(config, world, strategy, loggers, data, callbacks, output_dir)
    if world.rank == 0:
        print(describe_run(config, model, data, world, fast, checkpoint), flush=True)
        fast.warn()
        write_settings(settings, output_dir / RUN_FILE)
    with interruption:
        _fit(trainer, module, data, checkpoint, output_dir)

    if world.rank == 0:
        meta |= _outcome(trainer, module, data)
        if not config.only_save_trainable:
            is_fp16 = config.train.precision is Precision.fp16
            export_hf(model, output_dir / MERGED, torch.float16 if is_fp16 else torch.bfloat16)
        write_result(output_dir)  # last: where it stands, the run is finished
        print(f"saved {output_dir / 'trainable.safetensors'}", flush=True)
    return output_dir


def _with_precision(config: Config, world: World, output_dir: Path) -> Config:
    """As asked; otherwise as the run was started with that is continued, wherever that was, and what suits the device
    of a new one."""
    if config.train.precision is not None:
        return config
    precision = precision_before(output_dir, config.resume) or default_precision(world.device)
    return replace(config, train=replace(config.train, precision=precision))


def _build(config: Config, sources: Sources, world: World, fast: Fast) -> Llama:
    """The model of this rank, ready to train and known to be the other ranks' too."""
    share = (world.rank, world.size) if is_sharded(config.strategy, world) else None
    model = assemble(sources, config.quantization, config.recipe, world.device, DTYPES[config.train.precision], share)
    refuse_other_weights(model)
    if model.sharded is not None:
        model.sharded.connect()
        model.sharded.verify()
    torch.manual_seed(config.seed + world.rank)  # LoRA starts alike on all ranks, dropout draws for each its own
    model.image_transform = deterministic(config.data.image_transform)
    fast_parts.install(fast, config, model, world)
    return model


def _outcome(trainer: Trainer, module: FinetuneModule, data: DataModule) -> dict[str, Any]:
    """What meta.json says of how the run went."""
    found: dict[str, Any] = {"steps": trainer.global_step}
    if module.unreadable_images:
        found["unreadable_images"] = module.unreadable_images
        print(f"{len(module.unreadable_images)} images could not be read any more; meta.json names them")
    if data.val_plan:
        found["val_loss"] = float(trainer.callback_metrics["val_loss"])
    return found


def _keep_frozen(
    sources: Sources, model: Llama, output_dir: Path, checkpoint: Optional[Path], meta: dict[str, Any]
) -> Optional[Path]:
    """The file that result and checkpoints need besides the base and the trainables, once on the disk for all of them:
    the checkpoint's, of a run that is continued."""
    file = output_dir / FROZEN_FILE
    if checkpoint is not None and (checkpoint / FROZEN_FILE).is_file():
        file.unlink(missing_ok=True)
        link(checkpoint / FROZEN_FILE, file)
        checksum = read_json(checkpoint / META_FILE)["frozen_sha256"]
    else:
        checksum = save_frozen(sources.folders, trainable_names(model), file)
    if checksum is None:
        return None
    meta["frozen_sha256"] = checksum
    return file


def _fit(
    trainer: Trainer, module: FinetuneModule, data: DataModule, checkpoint: Optional[Path], output_dir: Path
) -> None:
    try:
        state = None if checkpoint is None else checkpoint / STATE_FILE
        trainer.fit(module, data, ckpt_path=state, weights_only=False)
        if data.val_plan is not None and module.validated_at != trainer.global_step:
            trainer.validate(module, dataloaders=data.val_dataloader(), verbose=False)
        save_curves(trainer, output_dir)
    except OSError as error:
        raise disk_error(error, output_dir) from error
    except RuntimeError as error:
        if is_lost_connection(error):
            raise UserError(
                "another rank has ended, see its message; the same command continues from the newest checkpoint"
            ) from error
        raise


def _quiet() -> None:
    """Lightning's own remarks on devices, workers and resumable loaders; what a user needs is in the summary."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    # Lightning makes DistributedDataParallel on a stream of its own; at worst the GPU waits once a step.
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")


def _epochs(config: Config, data: DataModule) -> float:
    """Length of the schedule in epochs: shorter than train.epochs where max_steps ends the run."""
    steps = data.train_plan.steps * config.train.epochs
    return min(steps, config.train.max_steps if config.train.max_steps > 0 else steps) / data.train_plan.steps


def _micro_batches(config: Config, data: DataModule) -> int:
    """Micro-batches of an epoch; of the whole run where max_steps ends it within the first, so that the progress bar
    knows and the run ends with a validation."""
    micro = data.train_plan.micro_batches
    return min(micro, config.train.max_steps * config.train.accum_iter) if config.train.max_steps > 0 else micro


def _val_interval(config: Config, data: DataModule) -> int:
    """Micro-batches between the validations of an epoch. They come after whole optimizer steps, where a checkpoint can
    be taken as well."""
    micro, accum_iter = _micro_batches(config, data), config.train.accum_iter
    steps = max(1, int(micro // accum_iter * min(1.0, config.train.val_interval)))
    return micro if config.train.val_interval >= 1 else min(micro, steps * accum_iter)


def _trainer(
    config: Config,
    world: World,
    strategy: Strategy,
    loggers: list[Logger],
    data: DataModule,
    callbacks: list[Callback],
    output_dir: Path,
) -> Trainer:
    plugins: list[Any] = [PlainCheckpointIO()]
    if config.train.precision is Precision.fp16:
        plugins.append(Float16(world.device))
    if world.size == 1:
        plugins.append(LightningEnvironment())  # nor does it take SLURM's signals and ranks from an sbatch's variables
    return Trainer(
        accelerator="gpu" if world.device.type == "cuda" else "cpu",
        devices=world.local_size if world.size > 1 else [world.local_rank] if world.device.type == "cuda" else 1,
        num_nodes=world.nodes,
        strategy=strategy,
        plugins=plugins,
        default_root_dir=output_dir,  # where Lightning looks for checkpoints of SLURM's, which it takes unasked
        max_epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        accumulate_grad_batches=config.train.accum_iter,
        val_check_interval=_val_interval(config, data),
        check_val_every_n_epoch=max(1, round(config.train.val_interval)),
        limit_train_batches=_micro_batches(config, data),
        limit_val_batches=1.0 if data.val_plan else 0,
        num_sanity_val_steps=0,
        logger=loggers,
        log_every_n_steps=config.logger.log_every_n_steps,
        callbacks=[Throughput(), ProgressBar(), *callbacks],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=None,
    )
