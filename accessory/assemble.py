"""From folders to a model: the one place where the build order stands."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

import torch
from transformers import LlamaConfig

from accessory.bases import Folder, attach, model_config
from accessory.checkpoint import check_pairing, load_weights, open_folders
from accessory.config import LlamaType, ModelConfig, QuantizationConfig, QuantMethod, RecipeConfig
from accessory.errors import UserError
from accessory.models import build_model
from accessory.models.llama import Llama
from accessory.models.tokenizer import Tokenizer, check_vocabulary, find_tokenizer
from accessory.quantization import quantize
from accessory.tuning.recipe import add_trainables, mark_trainable, recipe_of, weight_kind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """The opened folders of a model and what they say; no weight has been read yet."""

    folders: list[Folder]
    tokenizer: Optional[Tokenizer]
    architecture: LlamaConfig
    base: dict[str, str]


def open_sources(config: ModelConfig) -> Sources:
    """Open and check everything about a model that is cheap to check."""
    folders = open_folders(config.pretrained_path)
    tokenizer = _tokenizer(config, folders)
    _check_type(config, folders)
    architecture = model_config(folders, config.llama_config)
    if tokenizer is not None:
        check_vocabulary(tokenizer, architecture.vocab_size)
    for folder in folders:
        attach(folder, architecture)
    base = {"path": str(folders[0].path.resolve()), "fingerprint": check_pairing(folders)}
    return Sources(folders, tokenizer, architecture, base)


def assemble(
    config: Union[ModelConfig, Sources],
    quantization: QuantizationConfig,
    recipe: Optional[RecipeConfig],
    device: torch.device,
    dtype: torch.dtype,
) -> Llama:
    """A model with weights on `device`, ready to train (recipe given) or to ask (recipe None: as the folders say).

    dtype: compute type. The order below is the only right one: quantizing after adding biases would quantize around
    them, loading before quantizing would need the 16-bit model, marking before loading would mark tensors about to be
    replaced.
    """
    sources = config if isinstance(config, Sources) else open_sources(config)
    applied = recipe if recipe is not None else recipe_of(sources.folders)
    model = build_model(sources.architecture)
    quantize(model, quantization, dtype)
    add_trainables(model, applied)
    load_weights(model, sources.folders, device, dtype, fresh_trainables=recipe is not None)
    mark_trainable(model, applied)

    model.tokenizer, model.base = sources.tokenizer, sources.base
    _warn_of_other_quantization(sources.folders, quantization)
    return model


def check_continuation(sources: Sources, recipe: RecipeConfig) -> None:
    """Refuse to train from trainables whose values the result could not hold: it keeps what the recipe trains, and is
    used on the first folder alone."""
    for folder in sources.folders[1:]:
        for name in sorted(folder.names):
            if not getattr(recipe, weight_kind(name) or "", False):
                raise UserError(
                    f"{folder.path}: {name} would be lost, as recipe {recipe.name} does not train it and a run saves "
                    "only what trains; choose a recipe that does, or merge into one base first (scripts/export.py)"
                )
    found = recipe_of(sources.folders)
    if found is not None and found.lora and recipe.lora:
        before, now = ((r.rank, r.alpha or r.rank) for r in (found, recipe))
        if before != now:
            raise UserError(
                f"{sources.folders[-1].path}: its LoRA has rank {before[0]} and alpha {before[1]:g}, the recipe says "
                f"{now[0]} and {now[1]:g}; set recipe.rank={before[0]} recipe.alpha={before[1]:g}"
            )


def _tokenizer(config: ModelConfig, folders: list[Folder]) -> Optional[Tokenizer]:
    if config.tokenizer_path is not None:
        return Tokenizer(config.tokenizer_path)
    for folder in reversed(folders):
        if (found := find_tokenizer(folder.path)) is not None:
            return Tokenizer(found)
    return None


def _check_type(config: ModelConfig, folders: list[Folder]) -> None:
    stated = next((f.meta["llama_type"] for f in reversed(folders) if "llama_type" in f.meta), None)
    if LlamaType.llama_qformerv2_peft in (config.llama_type, stated):
        raise UserError("llama_type llama_qformerv2_peft: the multimodal model is not part of this version")


def _warn_of_other_quantization(folders: list[Folder], quantization: QuantizationConfig) -> None:
    for folder in folders:
        trained_on: Optional[str] = folder.meta.get("quantization", {}).get("method")
        if trained_on is not None and QuantMethod(trained_on) is not quantization.method:
            log.warning(
                "%s was trained on a base with quantization %s, and is used on one with %s: expect worse answers",
                Path(folder.path).name,
                trained_on,
                quantization.method.value,
            )
