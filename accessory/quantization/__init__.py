"""Which linears are stored how: the decoder blocks' linears become QuantLinear, before any weight is loaded."""

from __future__ import annotations

from typing import Optional

import torch
from torch import nn

from accessory.config import QuantizationConfig, QuantMethod
from accessory.errors import UserError
from accessory.models.llama import Block, Llama
from accessory.models.qformer import CastLinear, QFormerLlama
from accessory.quantization.dense import Dense
from accessory.quantization.int4 import Int4
from accessory.quantization.linear import Backend, QuantLinear, linear_weight
from accessory.quantization.nf4 import NF4

__all__ = ["QuantLinear", "block_linears", "linear_weight", "make_backend", "put_backends", "quantize"]

NF4_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes' kernels offer


def make_backend(config: QuantizationConfig, dtype: torch.dtype) -> Backend:
    """How weights that come in 16 bit are held. dtype: compute type, which is also the storage type without
    quantization."""
    if config.method is QuantMethod.nf4:
        if config.blocksize not in NF4_BLOCKSIZES:
            raise UserError(f"quantization.blocksize={config.blocksize}: NF4 has {', '.join(map(str, NF4_BLOCKSIZES))}")
        return NF4(config.blocksize, config.double_quant)
    if config.method is QuantMethod.rtn:
        size = 64 if config.group_size is None else config.group_size
        if size != -1 and (size < 8 or size % 8):
            raise UserError(f"quantization.group_size={size}: must be a multiple of 8, or -1 for one scale a row")
        return Int4(4, size, sym=False)
    return Int4(8, -1, sym=True) if config.method is QuantMethod.int8 else Dense(dtype)


def quantize(
    model: Llama,
    config: QuantizationConfig,
    dtype: torch.dtype,
    projector_trains: bool = False,
    stored: Optional[dict[str, Int4]] = None,
) -> None:
    """Replace every linear of the decoder blocks by an empty QuantLinear, in place; lm_head and the image part's too,
    if asked, but not a projector that trains.

    stored: of a base in whole numbers, how each packed weight is held, by name. Exactly those linears are quantized,
    wherever they are; the blocks' others stay in 16 bit.
    """
    tied = model.config.tie_word_embeddings
    blocks = [
        f"{path}.{name}"
        for path, block in model.named_modules()
        if isinstance(block, Block)
        for name in _linears(block)
    ]
    others = [] if tied else ["lm_head"]
    if isinstance(model, QFormerLlama):
        others += [f"qformer.{name}" for name in _linears(model.qformer)]
        others += [] if projector_trains else [f"qformer_proj.{name}" for name in _linears(model.qformer_proj)]
    if stored:
        packed = {name.removesuffix(".weight"): backend for name, backend in stored.items()}
        chosen = {name: packed.get(name, Dense(dtype)) for name in blocks}
        put_backends(model, chosen | {name: packed[name] for name in others if name in packed})
        return
    if config.lm_head and tied:
        raise UserError("quantization.lm_head=true: this model's output layer is its embedding (tied)")
    backend = make_backend(config, dtype)
    chosen = [*blocks, *(name for name in others if (config.lm_head if name == "lm_head" else config.vision))]
    for name in chosen:
        _check_group(config, name, model.get_submodule(name).in_features, backend)
    put_backends(model, dict.fromkeys(chosen, backend))


def _linears(parent: nn.Module) -> list[str]:
    return [name for name, module in parent.named_modules() if type(module) in (nn.Linear, CastLinear)]


def _check_group(config: QuantizationConfig, name: str, in_features: int, backend: Backend) -> None:
    if isinstance(backend, Int4) and backend.group_size != -1 and in_features % backend.group_size:
        fitting = next((size for size in (128, 64, 32, 16, 8) if in_features % size == 0), -1)
        raise UserError(
            f"quantization.group_size={backend.group_size} does not divide the {in_features} inputs of {name}; "
            f"quantization.group_size={fitting} does"
        )


def put_backends(model: nn.Module, backends: dict[str, Backend]) -> None:
    """Replace the linears that `backends` names by empty QuantLinears, in place."""
    for name, backend in backends.items():
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        replacement = QuantLinear(linear.in_features, linear.out_features, backend)
        if linear.bias is not None:
            replacement.bias = nn.Parameter(linear.bias.float(), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, replacement)


def block_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """Every QuantLinear of the decoder blocks by its path in `model`."""
    return {
        f"{path}.{name}": module
        for path, block in model.named_modules()
        if isinstance(block, Block)
        for name, module in block.named_modules()
        if isinstance(module, QuantLinear)
    }
