"""From folders to a model: the one place where the build order stands."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass, replace
from typing import Any, Optional, Union

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import Blip2Config, LlamaConfig

from accessory.bases import Folder, attach, identity, model_config, vision_config
from accessory.blip2 import open_vision
from accessory.checkpoint import check_pairing, layered, load_weights, open_folders
from accessory.config import ImageTransform, LlamaType, ModelConfig, QuantizationConfig, QuantMethod, RecipeConfig
from accessory.data.images import deterministic
from accessory.errors import UserError, first_line
from accessory.models import build_model, describe_vision
from accessory.models.llama import Llama
from accessory.models.qformer import VisionQFormer
from accessory.models.tokenizer import Tokenizer, check_vocabulary, find_tokenizer
from accessory.quantization import quantize
from accessory.quantization.int4 import Int4
from accessory.shards import OUTPUT, is_image_part
from accessory.tuning.recipe import add_trainables, mark_trainable, recipe_of, weight_kind

log = logging.getLogger(__name__)
CALIBRATED = (QuantMethod.autoround, QuantMethod.awq, QuantMethod.gptq)


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
    def identity(self) -> dict[str, Any]:
        """What tells this model from every other."""
        found = {
            "base": self.base["fingerprint"],
            "starts_from": [identity(folder) for folder in self.folders[1:]],
            "architecture": hashlib.sha256(self.architecture.to_json_string().encode()).hexdigest()[:16],
            "tokenizer": self.tokenizer.fingerprint(),
        }
        if self.vision is not None:
            sizes = hashlib.sha256(describe_vision(self.vision).encode()).hexdigest()[:16]
            found |= {"image_part": self.base.get("image_part"), "image_sizes": sizes}
        return found

    @property
    def image_transform(self) -> ImageTransform:
        """How answers see an image: as the last folder that says so was trained."""
        stated = next((f.meta["image_transform"] for f in reversed(self.folders) if "image_transform" in f.meta), None)
        return deterministic(ImageTransform(stated or ImageTransform.random_resized_crop))

    @property
    def llama_type(self) -> LlamaType:
        return LlamaType.llama_peft if self.vision is None else LlamaType.llama_qformerv2_peft


def open_sources(config: ModelConfig) -> Sources:
    """Open and check everything about a model that is cheap to check."""
    folders = open_folders(config.pretrained_path)
    tokenizer = _tokenizer(config, folders)
    vision = None
    if _takes_images(config, folders):
        folders, vision = _with_vision(config, folders)
    else:
        folders = [folder.only(lambda name: not is_image_part(name)) for folder in folders]
    architecture = model_config(folders, config.llama_config)
    if tokenizer is not None:
        check_vocabulary(tokenizer, architecture.vocab_size)
    for folder in folders:
        attach(folder, architecture)
    base = {"path": str(folders[0].path.resolve()), **check_pairing(folders, vision is not None)}
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
    applied = recipe
    if recipe is None:
        quantization = _as_trained(quantization, sources.folders)
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
    load_weights(model, sources.folders, device, dtype, fresh_trainables=recipe is not None)

    model.tokenizer, model.base, model.quantization = sources.tokenizer, sources.base, quantization
    model.image_transform = sources.image_transform
    _warn_of_other_quantization(sources.folders, quantization)
    return model


def check_recipe(sources: Sources, recipe: RecipeConfig, quantization: QuantizationConfig) -> None:
    """Refuse what the folders and the recipe cannot do together, before data is read."""
    if sources.vision is None:
        for wanted, what in (
            (recipe.projector, "recipe.projector"),
            (recipe.vision, "recipe.vision"),
            (quantization.vision, "quantization.vision"),
        ):
            if wanted:
                raise UserError(
                    f"{what}=true: this model is language-only; --llama_type llama_qformerv2_peft and, where no folder "
                    "holds one, model.vision_path=<BLIP-2 folder> give it an image part"
                )
    else:
        _check_image_part(sources, recipe)
    _check_continuation(sources, recipe)


def _check_image_part(sources: Sources, recipe: RecipeConfig) -> None:
    kinds = {weight_kind(name) if weight_kind(name) == "vision" else "projector"
             for folder in sources.folders for name in folder.names if is_image_part(name)}  # fmt: skip
    where = ", ".join(str(folder.path) for folder in sources.folders)
    if "vision" not in kinds:
        raise UserError(
            f"{where}: no vision model and Q-Former in them; name a BLIP-2 folder with model.vision_path, or put the "
            "result of an alignment behind the base in --pretrained_path"
        )
    if "projector" not in kinds and not recipe.projector:
        raise UserError(
            f"{where}: no projector in them, and one that starts from nothing has to train: recipe.projector=true "
            "(recipe=projector trains it alone, the usual first stage, whose result then follows the base here)"
        )


def _check_continuation(sources: Sources, recipe: RecipeConfig) -> None:
    """Refuse to train from trainables whose values the result could not hold: of LLaMA it keeps what the recipe trains,
    and is used on the first folder alone. (An image part that the first folder lacks is kept whole.)"""
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
    is_language = config.llama_type is not None and config.llama_type != LlamaType.llama_qformerv2_peft
    if is_language or not config.visual:
        if config.vision_path is not None:
            flag = f"--llama_type {config.llama_type.value}" if is_language else "--no_visual"
            raise UserError(f"model.vision_path={config.vision_path} with {flag}: leave one of them out")
        return False
    if config.llama_type is not None:
        return True
    stated = next((f.meta["llama_type"] for f in reversed(folders) if "llama_type" in f.meta), None)
    return (
        stated == LlamaType.llama_qformerv2_peft or config.vision_path is not None or any(f.has_images for f in folders)
    )


def _with_vision(config: ModelConfig, folders: list[Folder]) -> tuple[list[Folder], Blip2Config]:
    """The folders with the one of model.vision_path, behind the base so that trainables win; and the sizes."""
    if config.vision_path is None:
        return folders, vision_config(folders, config.vision_config)
    if (own := next((folder.path for folder in folders if folder.has_images), None)) is not None:
        raise UserError(
            f"model.vision_path={config.vision_path}: {own} has an image part, which belongs to its own vision model; "
            "leave model.vision_path out"
        )
    opened = open_vision(config.vision_path)
    sizes = vision_config([folders[0], opened, *folders[1:]], config.vision_config)
    with torch.device("meta"):
        wanted = {f"qformer.{name}" for name in VisionQFormer(sizes).state_dict()}
    if beyond := sorted(name for name in opened.names - wanted if ".encoder." in name):
        raise UserError(
            f"model.vision_path={config.vision_path}: {beyond[0]} has no place in what its config.json says"
        )
    # Outside the encoders the file may hold more, for other uses of BLIP-2.
    return [folders[0], opened.only(wanted.__contains__), *folders[1:]], sizes


def trained_on(folder: Folder) -> Optional[QuantizationConfig]:
    """The quantization that a folder of trainables names, None where it names none."""
    stated = folder.meta.get("quantization")
    if not stated:
        return None
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(QuantizationConfig), stated))
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(
            f"{folder.path}/meta.json: quantization: {first_line(error)}; written by another version?"
        ) from None


def _as_trained(quantization: QuantizationConfig, folders: list[Folder]) -> QuantizationConfig:
    """A bare method, nf4 say, means it as the trainables were trained on it: blocksize, which parts, and all."""
    before = next((found for folder in reversed(folders) if (found := trained_on(folder)) is not None), None)
    is_bare = quantization == QuantizationConfig(method=quantization.method)
    return before if before is not None and is_bare and before.method == quantization.method else quantization


def as_stored(quantization: QuantizationConfig, folders: list[Folder]) -> QuantizationConfig:
    """What becomes of a setting on these folders: a base in whole numbers keeps them, under none and nf4 too."""
    base, packed = folders[0].path, folders[0].packed
    method = quantization.method
    if not packed:
        if method is QuantMethod.int4:
            raise UserError(
                f"quantization=int4: {base} holds no weights in whole numbers; scripts/quantize.py makes a folder that "
                "does, and quantization=nf4 (--quant), rtn or int8 quantize while loading"
            )
        if method in CALIBRATED:
            raise UserError(
                f"quantization={method.value}: needs calibration, which training does before it starts; here name the "
                "folder that it trained on (meta.json says it), or one of scripts/quantize.py"
            )
        return quantization
    if method in (QuantMethod.rtn, QuantMethod.int8, *CALIBRATED):
        scheme = next(iter(packed.values())).scheme
        raise UserError(f"quantization={method.value}: {base} is quantized already ({scheme}); leave it out")
    has_vision = any(map(is_image_part, packed))
    for wanted, holds, key in (
        (quantization.lm_head, OUTPUT in packed, "lm_head"),
        (quantization.vision, has_vision, "vision"),
    ):
        if wanted and not holds:
            raise UserError(
                f"quantization.{key}=true: {base} holds it in 16 bit and is quantized already; leave it out, or make "
                "that folder anew (scripts/quantize.py)"
            )
    return QuantizationConfig(method=QuantMethod.int4, lm_head=OUTPUT in packed, vision=has_vision)


def stored_backends(folders: list[Folder]) -> dict[str, Int4]:
    """How each weight is held that is packed in the base, and that no later folder replaces."""
    last = {name: parts[-1] for name, parts in layered(folders).items()}
    return {name: backend for name, backend in folders[0].packed.items() if last[name] is folders[0]}


def _for_answers(recipe: Optional[RecipeConfig]) -> Optional[RecipeConfig]:
    """What the folders hold, less what only training needs: a vision model that was trained in fp32 answers as any."""
    return None if recipe is None else replace(recipe, vision=False)


def _warn_of_other_quantization(folders: list[Folder], quantization: QuantizationConfig) -> None:
    now = asdict(quantization)
    for folder in folders:
        before = asdict(trained_on(folder) or quantization)
        if differing := [key for key in now if before[key] != now[key]]:
            was, is_now = (
                ", ".join(f"{key}={getattr(settings[key], 'value', settings[key])}" for key in differing)
                for settings in (before, now)
            )
            log.warning(
                "%s was trained on a base with quantization %s, and is used on one with %s: expect worse answers",
                folder.path.name,
                was,
                is_now,
            )
