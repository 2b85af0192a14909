"""From folders to a model: the one place where the build order stands."""

from __future__ import annotations

from dataclasses import replace
from typing import Optional, Union

import torch

from accessory.config import ModelConfig, QuantizationConfig, RecipeConfig
from accessory.models import build_model
from accessory.models.llama import Llama
from accessory.quantization import quantize
from accessory.quantization.setting import as_stored, as_trained, stored_backends, warn_of_other_quantization
from accessory.sharding import ShardedPayload
from accessory.sources import Sources, open_sources
from accessory.tuning.recipe import add_trainables, mark_trainable, recipe_of
from accessory.weights import load_weights


def assemble(
    config: Union[ModelConfig, Sources],
    quantization: QuantizationConfig,
    recipe: Optional[RecipeConfig],
    device: torch.device,
    dtype: torch.dtype,
    share: Optional[tuple[int, int]] = None,
) -> Llama:
    """A model with weights on `device`, ready to train (recipe given) or to ask (recipe None: as the folders say).

    dtype: compute type. share: (rank, ranks) with fsdp, to keep that rank's share of the payload; it computes once
    `model.sharded` is connected. The order below is the only right one: quantizing after adding biases would quantize
    around them, marking after loading would find trainables in 16 bit, loading before quantizing would need the 16-bit
    model.
    """
    sources = config if isinstance(config, Sources) else open_sources(config)
    applied = recipe
    if recipe is None:
        quantization = as_trained(quantization, sources.folders)
        applied = _for_answers(recipe_of(sources.folders))
    quantization = as_stored(quantization, sources.folders)
    model = build_model(sources.architecture, sources.vision)
    quantize(
        model,
        quantization,
        dtype,
        projector_trains=applied is not None and applied.projector,
        stored=stored_backends(sources.folders),
    )
    add_trainables(model, applied)
    mark_trainable(model, applied)
    model.sharded = None if share is None else ShardedPayload(model, *share)
    loaded = None if model.sharded is None else model.sharded.loaded
    load_weights(model, sources.folders, device, dtype, fresh_trainables=recipe is not None, loaded=loaded)

    model.tokenizer, model.base, model.quantization = sources.tokenizer, sources.base, quantization
    model.image_transform = sources.image_transform
    warn_of_other_quantization(sources.folders, quantization)
    return model


def _for_answers(recipe: Optional[RecipeConfig]) -> Optional[RecipeConfig]:
    """What the folders hold, less what only training needs: a vision model that was trained in fp32 answers as any."""
    return None if recipe is None else replace(recipe, vision=False)
