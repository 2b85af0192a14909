"""What is there all the time: parameters and payload, counted on the model, and copies of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from accessory.models.llama import Llama, RMSNorm
from accessory.quantization import QuantLinear, block_linears
from accessory.quantization.int4 import Int4


def held_bytes(model: Llama, dtype: torch.dtype = torch.bfloat16, shards: int = 1) -> tuple[int, int]:
    """(frozen, trainable) bytes of parameters and payload. dtype and shards: as in Step."""
    blocks = block_linears(model)
    payload: dict[str, int] = {}
    outside = 0
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear) and path in blocks:
            block = path.split(".layers.")[1].split(".")[0]
            payload[block] = payload.get(block, 0) + payload_bytes(module)
        elif isinstance(module, QuantLinear):
            outside += payload_bytes(module)
        else:
            outside += sum(buffer.nbytes for buffer in module.buffers(recurse=False))
    frozen, trainable = 0, 0
    for parameter, kept_as in _parameters(model, dtype):
        size = parameter.numel() * kept_as.itemsize
        frozen, trainable = (frozen, trainable + size) if parameter.requires_grad else (frozen + size, trainable)
    shards = shards if model.sharded is None else model.sharded.ranks
    inside = sum(payload.values())
    if shards > 1:  # its share of every block, and two whole blocks in turn
        inside = sum(-(-size // shards) for size in payload.values()) + 2 * max(payload.values())
    return frozen + outside + inside, trainable


def _parameters(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[nn.Parameter, torch.dtype]]:
    """Every parameter once, and its type once it is loaded: accessory.weights says which (weight_places)."""
    seen: set[int] = set()
    for module in model.modules():
        in_fp32 = isinstance(module, (RMSNorm, QuantLinear))
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                wide = in_fp32 or parameter.requires_grad
                kept_as = torch.float32 if wide else dtype
                yield parameter, kept_as if parameter.is_meta else parameter.dtype


_PAYLOADS: dict[tuple[Any, tuple[int, int]], int] = {}


def payload_bytes(layer: QuantLinear) -> int:
    """Bytes of a linear's payload: as it is loaded, else as its backend makes it of a weight without values. With fsdp
    those of the whole, not of a rank's share."""
    if layer.is_loaded:
        return sum(tensor.nbytes for tensor in layer.payload)
    key = layer.backend, layer.shape
    if key not in _PAYLOADS:
        out, in_features = layer.shape
        if isinstance(layer.backend, Int4) and layer.backend.group_size != -1:
            size = layer.backend.group_size  # files may end a row within a group
            in_features = -(-in_features // size) * size
        # bitsandbytes makes the codebook of its double quantization once, on the first weight's device: were that the
        # meta device, no weight could be quantized any more.
        layer.backend.quantize(torch.zeros(1, in_features))
        packed = layer.backend.quantize(torch.empty(out, in_features, dtype=torch.bfloat16, device="meta"))
        _PAYLOADS[key] = sum(tensor.nbytes for tensor in packed)
    return _PAYLOADS[key]


def copies_bytes(model: Llama, itemsize: int, biases: bool = True) -> int:
    """16-bit copies of the blocks' LoRA matrices, and of their biases."""
    copied: list[Optional[Tensor]] = [layer.bias for layer in block_linears(model).values()] if biases else []
    for module in model.modules():
        if isinstance(module, LoraLayer):
            copied += [*module.lora_A.parameters(), *module.lora_B.parameters()]
    return itemsize * sum(tensor.numel() for tensor in copied if tensor is not None)
