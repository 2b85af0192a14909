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
from accessory.config import RecipeConfig
from accessory.errors import UserError
from accessory.models.llama import RMSNorm
from accessory.models.qformer import QFormerLlama
from accessory.quantization import block_linears
from accessory.shards import is_image_part
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
