"""PEFT's LoRA on QuantLinear: the layer class that PEFT lacks, registered through its custom-module mapping."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from accessory.checks import unknown_targets
from accessory.config import RecipeConfig
from accessory.errors import UserError
from accessory.quantization import QuantLinear, block_linears


class LoraQuantLinear(nn.Module, LoraLayer):
    """y = base(x) + scaling * B(A(dropout(x))); A, B are fp32 masters, used in x's dtype.

    Computing the adapter in fp32 instead would keep fp32 copies of x and triple the activations.
    """

    def __init__(self, base_layer: QuantLinear, adapter_name: str, **kwargs: Any):
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def forward(self, x: Tensor) -> Tensor:
        share = None
        for name in () if self.disable_adapters else self.active_adapters:
            a, b = self.lora_A[name].weight.to(x.dtype), self.lora_B[name].weight.to(x.dtype)
            found = F.linear(F.linear(self.lora_dropout[name](x), a), b) * self.scaling[name]
            share = found if share is None else share + found
        return self.base_layer(x, share)


def lora_config(recipe: RecipeConfig, target_modules: list[str]) -> LoraConfig:
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.rank if recipe.alpha is None else recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=target_modules,
        bias="none",
    )
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config


def add_lora(model: nn.Module, recipe: RecipeConfig) -> None:
    """Put LoRA on the recipe's targets among the decoder blocks' linears, in place."""
    for message in unknown_targets(recipe):
        raise UserError(message)
    chosen = [path for path in block_linears(model) if path.rsplit(".", 1)[-1] in recipe.targets]
    inject_adapter_in_model(lora_config(recipe, chosen), model)
