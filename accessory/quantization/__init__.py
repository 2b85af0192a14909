"""Which linears are stored how: the decoder blocks' linears become QuantLinear, before any weight is loaded."""

from __future__ import annotations

import torch
from torch import nn

from accessory.config import QuantizationConfig, QuantMethod
from accessory.errors import UserError
from accessory.models.llama import Block, Llama
from accessory.models.qformer import CastLinear, QFormerLlama
from accessory.quantization.dense import Dense
from accessory.quantization.linear import Backend, QuantLinear, linear_weight
from accessory.quantization.nf4 import NF4

__all__ = ["QuantLinear", "block_linears", "linear_weight", "make_backend", "quantize"]

NF4_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes' kernels offer


def make_backend(config: QuantizationConfig, dtype: torch.dtype) -> Backend:
    """dtype: compute type, which is also the storage type without quantization."""
    if config.method is QuantMethod.none:
        return Dense(dtype)
    if config.blocksize not in NF4_BLOCKSIZES:
        raise UserError(f"quantization.blocksize={config.blocksize}: NF4 has {', '.join(map(str, NF4_BLOCKSIZES))}")
    return NF4(config.blocksize, config.double_quant)


def quantize(model: Llama, config: QuantizationConfig, dtype: torch.dtype, projector_trains: bool = False) -> None:
    """Replace every linear of the decoder blocks by an empty QuantLinear, in place; lm_head and the image part's too,
    if asked, but not a projector that trains."""
    backend = make_backend(config, dtype)
    for block in model.modules():
        if isinstance(block, Block):
            for parent in block.modules():
                _replace_linears(parent, backend)
    if config.lm_head:
        if model.config.tie_word_embeddings:
            raise UserError("quantization.lm_head=true: this model's output layer is its embedding (tied)")
        model.lm_head = QuantLinear(model.config.hidden_size, model.config.vocab_size, backend)
    if config.vision and isinstance(model, QFormerLlama):
        for parent in model.qformer.modules():
            _replace_linears(parent, backend)
        if not projector_trains:
            _replace_linears(model.qformer_proj, backend)


def _replace_linears(parent: nn.Module, backend: Backend) -> None:
    for name, child in list(parent.named_children()):
        if type(child) in (nn.Linear, CastLinear):
            replacement = QuantLinear(child.in_features, child.out_features, backend)
            if child.bias is not None:
                replacement.bias = nn.Parameter(child.bias.float(), requires_grad=False)
            setattr(parent, name, replacement)


def block_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Every QuantLinear of the decoder blocks by its path in `model`."""
    return {
        f"{path}.{name}": module
        for path, block in model.named_modules()
        if isinstance(block, Block)
        for name, module in block.named_modules()
        if isinstance(module, QuantLinear)
    }
