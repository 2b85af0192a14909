"""From folders to a model: the one place where the build order stands."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

import torch
from transformers import Blip2Config, LlamaConfig

from accessory.bases import Folder, attach, model_config, open_vision, vision_config
from accessory.checkpoint import check_pairing, load_weights, open_folders
from accessory.config import ImageTransform, LlamaType, ModelConfig, QuantizationConfig, QuantMethod, RecipeConfig
from accessory.data.images import deterministic
from accessory.errors import UserError
from accessory.models import build_model
from accessory.models.llama import Llama
from accessory.models.tokenizer import Tokenizer, check_vocabulary, find_tokenizer
from accessory.quantization import quantize
from accessory.shards import is_image_part
from accessory.tuning.recipe import add_trainables, mark_trainable, recipe_of, weight_kind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """The opened folders of a model and what they say; no weight has been read yet. vision: sizes of the image part,
    None for a language-only model."""

    folders: list[Folder]
    tokenizer: Optional[Tokenizer]
    architecture: LlamaConfig
    vision: Optional[Blip2Config]
    base: dict[str, str]

    @property
    def llama_type(self) -> LlamaType:
        return LlamaType.llama_peft if self.vision is None else LlamaType.llama_qformerv2_peft


def open_sources(config: ModelConfig) -> Sources:
    """Open and check everything about a model that is cheap to check."""
    folders = open_folders(config.pretrained_path)
    tokenizer = _tokenizer(config, folders)
    vision = None
    if _takes_images(config, folders):
        # Behind the base, so that trainables win.
        folders[1:1] = [] if config.vision_path is None else [open_vision(config.vision_path)]
        vision = vision_config(folders, config.vision_config)
    else:
        folders = [folder.language_part() for folder in folders]
    architecture = model_config(folders, config.llama_config)
    if tokenizer is not None:
        check_vocabulary(tokenizer, architecture.vocab_size)
    for folder in folders:
        attach(folder, architecture)
    base = {"path": str(folders[0].path.resolve()), **check_pairing(folders)}
    return Sources(folders, tokenizer, architecture, vision, base)


def assemble(
    config: Union[ModelConfig, Sources],
    quantization: QuantizationConfig,
    recipe: Optional[RecipeConfig],
    device: torch.device,
    dtype: torch.dtype,
) -> Llama:
    """A model with weights on `device`, ready to train (recipe given) or to ask (recipe None: as the folders say).

    dtype: compute type. The order below is the only right one: quantizing after adding biases would quantize around
    them, marking after loading would find trainables in 16 bit, loading before quantizing would need the 16-bit model.
    """
    sources = config if isinstance(config, Sources) else open_sources(config)
    applied = recipe if recipe is not None else recipe_of(sources.folders)
    model = build_model(sources.architecture, sources.vision)
    quantize(model, quantization, dtype, projector_trains=applied is not None and applied.projector)
    add_trainables(model, applied)
    mark_trainable(model, applied)
    load_weights(model, sources.folders, device, dtype, fresh_trainables=recipe is not None)

    model.tokenizer, model.base = sources.tokenizer, sources.base
    model.image_transform = _image_transform(sources.folders)
    _warn_of_other_quantization(sources.folders, quantization)
    return model


def check_continuation(sources: Sources, recipe: RecipeConfig) -> None:
    """Refuse to train from trainables whose values the result could not hold: of LLaMA it keeps what the recipe trains,
    and is used on the first folder alone. (An image part that the first folder lacks is kept whole.)"""
    if sources.vision is None and (recipe.projector or recipe.vision):
        what = "projector" if recipe.projector else "vision"
        raise UserError(
            f"recipe.{what}=true: this model is language-only; --llama_type llama_qformerv2_peft and, where no folder "
            "holds one, model.vision_path=<BLIP-2 folder> give it an image part"
        )
    for folder in sources.folders[1:]:
        for name in sorted(name for name in folder.names if not is_image_part(name)):
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


def _takes_images(config: ModelConfig, folders: list[Folder]) -> bool:
    """Whether the multimodal model is meant: as the user says, else as the folders do."""
    if not config.visual:
        return False
    if config.llama_type is not None:
        return config.llama_type == LlamaType.llama_qformerv2_peft
    stated = next((f.meta["llama_type"] for f in reversed(folders) if "llama_type" in f.meta), None)
    return (
        stated == LlamaType.llama_qformerv2_peft or config.vision_path is not None or any(f.has_images for f in folders)
    )


def _image_transform(folders: list[Folder]) -> ImageTransform:
    """How answers see an image: as the last folder that says so was trained."""
    stated = next((f.meta["image_transform"] for f in reversed(folders) if "image_transform" in f.meta), None)
    return deterministic(ImageTransform(stated or ImageTransform.random_resized_crop))


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
