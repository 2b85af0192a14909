"""What trains: norms, biases and LoRA, chosen by a module's type and position, never by a part of its name.

Everything that trains is fp32 in memory, in the optimizer and on disk; the forward pass casts it to the activations'
dtype.
"""

from __future__ import annotations

from collections import Counter
from typing import Optional

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from accessory.bases import Folder
from accessory.config import QuantizationConfig, RecipeConfig
from accessory.errors import UserError
from accessory.models.llama import RMSNorm
from accessory.models.qformer import QFormerLlama
from accessory.quantization import block_linears
from accessory.shards import is_image_part
from accessory.sources import Sources
from accessory.tuning.lora import add_lora


def add_trainables(model: nn.Module, recipe: Optional[RecipeConfig]) -> None:
    """Add the biases (zeros) and LoRA matrices that the base has not, in place; their values may be loaded later."""
    if recipe is None:
        return
    if recipe.bias:
        for layer in block_linears(model).values():
            if layer.bias is None:
                layer.load_bias(torch.zeros(layer.out_features))
    if recipe.lora:
        add_lora(model, recipe)


def mark_trainable(model: nn.Module, recipe: Optional[RecipeConfig]) -> None:
    """Freeze all, then let exactly the recipe's parameters train. Weights that are loaded later keep the mark, and its
    fp32."""
    model.requires_grad_(False)
    if recipe is None:
        return
    for module in model.modules():
        if recipe.norm and isinstance(module, RMSNorm):
            module.weight.requires_grad_(True)
        if recipe.lora and isinstance(module, LoraLayer):
            module.lora_A.requires_grad_(True)
            module.lora_B.requires_grad_(True)
        if isinstance(module, QFormerLlama):
            _mark_image_part(module, recipe)
    if recipe.bias:
        for layer in block_linears(model).values():
            layer.bias.requires_grad_(True)


def _mark_image_part(model: QFormerLlama, recipe: RecipeConfig) -> None:
    linear, norm = model.qformer_proj
    if recipe.norm:
        norm.weight.requires_grad_(True)
    if recipe.bias:
        linear.bias.requires_grad_(True)
        norm.bias.requires_grad_(True)
    if recipe.projector:
        model.qformer_proj.requires_grad_(True)
        model.start_img.requires_grad_(True)
        model.end_img.requires_grad_(True)
    if recipe.vision:
        model.qformer.requires_grad_(True)


def weight_kind(name: str) -> Optional[str]:
    """Which field of a recipe decides whether the weight called `name` on disk trains; None for those that never do."""
    if name.startswith("qformer."):
        return "vision"
    if name in ("start_img", "end_img", "qformer_proj.0.weight"):
        return "projector"
    if ".lora_A." in name or ".lora_B." in name:
        return "lora"
    if name.endswith(".bias"):
        return "bias"
    return "norm" if name.endswith(("norm.weight", "_layernorm.weight", "qformer_proj.1.weight")) else None


KINDS = {"norm": "norm", "bias": "bias", "lora": "LoRA", "projector": "projector", "vision": "vision"}


def count_trainables(model: nn.Module) -> Counter[str]:
    """Trainable parameters by kind, in words."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[KINDS[weight_kind(canonical_name(name))]] += parameter.numel()
    return counts


def canonical_name(path: str) -> str:
    """A parameter's path in the model -> its name on disk, which knows nothing of PEFT's wrapping."""
    return path.replace(".base_layer.", ".").replace(".default.", ".")


def trainable_names(model: nn.Module) -> set[str]:
    """Names on disk of the trainable parameters."""
    return {canonical_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name on disk, fp32 on the CPU."""
    return {
        canonical_name(name): parameter.detach().float().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def recipe_of(folders: list[Folder]) -> Optional[RecipeConfig]:
    """The recipe whose result the folders hold; None for a bare base.

    A Hugging Face base may have biases of its own; they are part of the architecture, not of a recipe.
    """
    stated = next((f.meta["recipe"] for f in reversed(folders) if "recipe" in f.meta), None)
    if stated is not None:
        try:
            return RecipeConfig(**stated)
        except TypeError as error:
            raise UserError(f"{folders[-1].path}: meta.json was written by another version ({error})") from None
    names = set().union(*(folder.names for folder in folders if folder.kind != "hf"))
    kinds = {weight_kind(name) for name in names if not is_image_part(name)}
    if not kinds & {"lora", "bias"}:
        return None
    recipe = RecipeConfig(name="found", norm=True, bias="bias" in kinds, lora="lora" in kinds)
    if recipe.lora:
        lora = sorted(name for name in names if name.endswith(".lora_A.weight"))
        folder = next(f for f in folders if lora[0] in f.names)
        recipe.rank = folder.tensor(lora[0]).shape[0]
        recipe.targets = sorted({name.split(".")[-3] for name in lora})
    return recipe


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
        if folder.is_base:
            raise UserError(
                f"--pretrained_path: {folder.path} is a whole model, as {sources.folders[0].path} is; name the one to "
                "train on"
            )
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
