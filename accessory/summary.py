"""One screen before training: what is quantized, what trains, what a step is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Optional

from accessory.config import Config, Precision
from accessory.data.datamodule import DataModule
from accessory.estimate import estimate_training
from accessory.fast import Fast, planned_step
from accessory.models.llama import Llama
from accessory.models.qformer import QFormerLlama
from accessory.precision import default_precision, multiplies_bf16
from accessory.quantization import QuantLinear, block_linears
from accessory.strategies import World
from accessory.tuning.recipe import count_trainables


def frozen_bytes(model: Llama) -> tuple[int, int]:
    """(weights in the decoder blocks' linears, bytes they take)."""
    linears = block_linears(model).values()
    weights = sum(layer.in_features * layer.out_features for layer in linears)
    return weights, sum(tensor.nbytes for layer in linears for tensor in layer.payload)


def image_part_line(model: QFormerLlama) -> str:
    """Sizes of the image part, how it is stored and whether it trains."""
    vision, qformer = model.vision_config.vision_config, model.vision_config.qformer_config
    linears = [module for module in model.qformer.modules() if isinstance(module, QuantLinear)]
    stored = linears[0].backend.name if linears else str(model.qformer.query_tokens.dtype).removeprefix("torch.")
    trains = ", trains" if model.qformer.query_tokens.requires_grad else ", frozen"
    return (
        f"ViT {vision.num_hidden_layers} x {vision.hidden_size} on {vision.image_size} pixels, "
        f"Q-Former {qformer.num_hidden_layers} x {qformer.hidden_size}, {stored}{trains}; "
        f"an image takes {model.image_words} positions"
    )


def _compute_type(precision: Precision, world: World, checkpoint: Optional[Path]) -> str:
    """With the reason, where it is not what one expects."""
    name, device = precision.value, world.device.type.upper().replace("CUDA", "GPU")
    is_usual, has_bf16 = precision is default_precision(world.device), multiplies_bf16(world.device)
    if precision is Precision.bf16 and not has_bf16:
        return f"{name}, slowly: this {device} has no instructions for it"
    if is_usual and not has_bf16:
        return f"{name}: this {device} has no instructions for bf16"
    return name if is_usual or checkpoint is None else f"{name}, as the run was started"


def describe_run(
    config: Config, model: Llama, data: DataModule, world: World, fast: Fast, checkpoint: Optional[Path]
) -> str:
    weights, size = frozen_bytes(model)
    counts = count_trainables(model)
    trainable = sum(counts.values())
    linears = (module for module in model.modules() if isinstance(module, QuantLinear))
    total = sum(math.prod(linear.shape) for linear in linears) + sum(p.numel() for p in model.parameters())
    kinds = " + ".join(f"{count:,} {kind}" for kind, count in counts.items())
    recomputed = model.model.recomputed
    plan, train, optim = data.train_plan, config.train, config.optim
    steps = plan.steps * train.epochs
    steps = min(steps, train.max_steps) if train.max_steps > 0 else steps
    method, bits = config.quantization.method.value, 8 * size / weights
    validating = f"{len(data.val_items) if data.val_items is not None else 0:,}"
    if data.val_items is not None and len(data.val_items) < data.held_out:
        validating += f" of {data.held_out:,}"
    unit = "packed rows" if config.data.packing else "items"
    split = f"{train.batch_size} rows x {train.accum_iter} micro-batches x {world.size} device(s)"
    rows = [
        ("base", f"{model.base['path']} ({total - trainable:,} weights)"),
        ("frozen", f"{weights:,} weights of {len(block_linears(model))} linears in {method}, {size / 2**20:,.0f} MiB"),
        ("", f"({bits:.2f} bits a weight); compute in {_compute_type(train.precision, world, checkpoint)}"),
        ("trains", f"{config.recipe.name}: {kinds} = {trainable:,} ({100 * trainable / total:.2f} %), fp32"),
        ("data", data.train_report.line()),
        ("", f"training on {len(data.train_items):,}, validating on {validating}"),
        ("batch", f"{split} = {plan.rows_per_step} {unit}, about {plan.lengths.sum() / plan.steps:,.0f} tokens a step"),
        ("steps", f"{steps:,} ({plan.steps:,} an epoch, {train.epochs} epochs), lr {optim.lr:g} -> {optim.min_lr:g}"),
        ("device", f"{world.device} x {world.size}, {config.strategy.data_parallel.value}"),
        ("fast", fast.line()),
        ("output", config.output_dir + (f", continuing from {checkpoint.name}" if checkpoint else "")),
    ]
    if world.device.type == "cuda":
        estimated = estimate_training(model, planned_step(fast, config, model), recomputed)
        rows.insert(-1, ("memory", f"up to about {estimated.line()}"))
    if isinstance(model, QFormerLlama):
        rows.insert(3, ("images", image_part_line(model)))
    if model.sharded is not None:
        held, passing = model.sharded.share_bytes, model.sharded.buffer_bytes
        shares = f"each holds {held / 2**20:,.0f} MiB of the frozen, and two blocks in turn, {passing / 2**20:,.0f} MiB"
        rows.insert(-1, ("", shares))
    if recomputed:
        rows.insert(-1, ("", f"activations of {recomputed} of {len(model.model.layers)} blocks recomputed in backward"))
    if data.val_report is not None:
        after = next(i for i, (name, _) in enumerate(rows) if name == "data") + 2
        rows.insert(after, ("validation", data.val_report.line()))
    return "\n".join(f"  {name:<10} {text}" for name, text in rows)
