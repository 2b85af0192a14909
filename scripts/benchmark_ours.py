"""This framework's side of the benchmark: how a model of it is made, and one step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import benchmark_steps as steps
import torch
from benchmark_cases import llama_config
from benchmark_lengths import packed_rows
from benchmark_steps import DTYPE, Batch, Step, System, eager_step

from accessory.fused.graph import GraphedLoss


def build_ours(case: dict[str, Any], share: Optional[tuple[int, int]] = None) -> tuple[Any, Callable]:
    """Our model, and its loss as a function of a batch; weights are made and quantized layer by layer. share: (rank,
    ranks) with fsdp."""
    from transformers import Blip2Config

    from accessory.config import QuantizationConfig, QuantMethod, RecipeConfig
    from accessory.fused.model import fuse_blocks
    from accessory.models import build_model
    from accessory.module import batch_loss
    from accessory.quantization import quantize
    from accessory.sharding import ShardedPayload
    from accessory.tuning.recipe import add_trainables, mark_trainable
    from accessory.weights import weight_places

    recipe, images = case["recipe"], case["images"]
    chosen = RecipeConfig(norm="norm" in recipe, bias="bias" in recipe, lora="lora" in recipe)
    model = build_model(llama_config(case["model"]), Blip2Config() if images else None)
    quantize(model, QuantizationConfig(method=QuantMethod(case["base"]), vision=images == "nf4"), DTYPE)
    add_trainables(model, chosen)
    mark_trainable(model, chosen)
    model.sharded = None if share is None else ShardedPayload(model, *share)
    for key, (shape, store, _) in weight_places(model, steps.DEVICE, DTYPE):
        store(torch.randn(shape, device=steps.DEVICE, dtype=DTYPE) * 0.02 + ("norm" in key))
        if model.sharded is not None:
            model.sharded.loaded(key)
    model.model.rotary_emb.to(steps.DEVICE)
    if case["compile"] and share is None:
        fuse_blocks(model)
    return model, lambda batch: batch_loss(model, batch, case["compile"]) / (batch["targets"] != -100).sum()


def train_step(model: Any, loss: Callable[[Batch], torch.Tensor], case: dict[str, Any]) -> Step:
    """One optimizer step as a function of a batch; made anew for every case, and let go of after it."""
    if not case["compile"]:
        return eager_step(model, loss, case)
    trainables = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainables, lr=1e-4, betas=(0.9, 0.95), fused=True)
    graphed, ranks = GraphedLoss(loss, trainables), torch.distributed.is_initialized()
    graphed.attach()

    def step(batch: Batch) -> torch.Tensor:
        graphed.zero()
        value = graphed(batch)
        if ranks:
            graphed.sum_over_ranks()
        torch.nn.utils.clip_grad_norm_(trainables, 2.0)
        optimizer.step()
        return value

    return step


def make_batch(model: Any, input_ids: torch.Tensor, case: dict[str, Any]) -> Batch:
    """What `batch_loss` takes, of input_ids int64 [b, s]; every token is learnt, but those of an image."""
    from accessory.data.packing import IMAGE_SLOT

    input_ids, targets = input_ids.clone(), input_ids.roll(-1, dims=1)
    targets[:, -1] = -100
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids).contiguous()
    batch = {"input_ids": input_ids, "targets": targets, "position_ids": positions}
    if case["images"]:
        slots = slice(1, 1 + model.image_words)
        input_ids[:, slots], targets[:, : model.image_words] = IMAGE_SLOT, -100
        batch["images"] = _pixels(model, len(input_ids))
    return batch


def generate_once(model: Any, case: dict[str, Any]) -> None:
    """An answer of `new_tokens` tokens to prompts of `length` tokens each."""
    from accessory.data.packing import IMAGE_SLOT, insert_image
    from accessory.generation import generate_ids

    pixels = _pixels(model, case["batch"]) if case["images"] else None
    prompt = [1] * (case["length"] - model.image_words)
    prompt = insert_image(prompt, model.image_words, IMAGE_SLOT) if case["images"] else prompt
    for _ in generate_ids(model, [prompt] * case["batch"], case["new_tokens"], 0.0, 1.0, {-1}, pixels):
        pass


def estimate(model: Any, case: dict[str, Any]) -> Optional[float]:
    """GiB, as accessory-estimate and the summary of a run have it; None where the number of rows differs."""
    from accessory import estimate as estimating

    if case["task"] == "lengths":
        return None
    batch, length = case["batch"], case["length"]
    images = batch if case["images"] else 0
    if case["task"] == "generate":
        found = estimating.estimate_generation(model, batch, length, case["new_tokens"], DTYPE, images)
        return found.peak / estimating.GIB
    fused = case["compile"]
    step = estimating.Step(
        batch, length, images, dtype=DTYPE, fused=fused, captured=fused,
        offloaded=fused and case["offload"], keeps_attention=fused and case["keep_attention"],
    )  # fmt: skip
    recomputed = len(model.model.layers) if case["checkpointing"] else 0
    return estimating.estimate_training(model, step, recomputed).peak / estimating.GIB


def ours(group: dict[str, Any]) -> System:
    from accessory import decoding
    from accessory.fused.model import keep_on_host

    model, loss = build_ours(group)
    vocab = model.config.vocab_size
    stack = keep_on_host(model, 1) if group["compile"] else None

    def checkpoint(on: bool) -> None:
        model.model.recomputed = len(model.model.layers) if on else 0

    def keep(case: dict[str, Any]) -> None:
        for block in model.model.layers if stack is not None else ():
            block.forward.host = stack if case["offload"] else None
            block.forward.keeps_attention = case["keep_attention"]

    return System(
        model, loss, checkpoint, keep,
        batch=partial(make_batch, model),
        rows=lambda case, number: packed_rows(case, vocab, number),
        train_step=train_step,
        generate=partial(generate_once, model),
        estimate=partial(estimate, model),
        release=partial(decoding.release, model),
    )  # fmt: skip


def _pixels(model: Any, count: int) -> torch.Tensor:
    return torch.randn(count, 3, model.image_size, model.image_size, device=steps.DEVICE)
