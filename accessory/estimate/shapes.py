"""A decoder's sizes, as activations follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from accessory.fused.linears import STACKED
from accessory.models.llama import Llama
from accessory.quantization import QuantLinear, block_linears
from accessory.quantization.dense import Dense

# Linears that share their input, and so are dequantized and multiplied together on the fused path.
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "out": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. linears: (out, in, whether its weight has to be made in compute type) of the first block's by
    name; lora: rank by name of those that have LoRA."""

    d: int
    f: int
    q: int
    kv: int
    e: int
    heads: int
    blocks: int
    vocab: int
    itemsize: int
    linears: dict[str, tuple[int, int, bool]]
    lora: dict[str, int]
    drops: bool

    @classmethod
    def of(cls, model: Llama, dtype: torch.dtype) -> "Shape":
        c, first = model.config, model.model.layers[0]
        dtype = dtype if model.device.type == "meta" else model.dtype
        layers = {path.rsplit(".", 1)[-1]: layer for path, layer in block_linears(first).items()}
        wrapped = {path.rsplit(".", 1)[-1]: m for path, m in first.named_modules() if isinstance(m, LoraLayer)}
        layers |= {name: module.base_layer for name, module in wrapped.items()}
        layers.pop("base_layer", None)
        return cls(
            c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim,
            c.head_dim, c.num_attention_heads, c.num_hidden_layers, c.vocab_size, dtype.itemsize,
            {name: (*layer.shape, layer.backend != Dense(dtype)) for name, layer in layers.items()},
            {name: next(m.lora_A.parameters()).shape[0] for name, m in wrapped.items()},
            any(isinstance(m, nn.Dropout) and m.p > 0 for m in first.modules()),
        )  # fmt: skip

    def scratch(self, *names: str) -> int:
        """Bytes of the dequantized weights of these linears, as far as they are there at the same time."""
        numbers = [self.linears[n][0] * self.linears[n][1] for n in names if self.linears[n][2]]
        return self.itemsize * (sum(numbers) if sum(numbers) <= STACKED else max(numbers))


def head_scratch(model: Llama, s: Shape) -> int:
    return s.vocab * s.d * s.itemsize if isinstance(model.lm_head, QuantLinear) else 0
