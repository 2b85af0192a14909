"""The type a model computes in; where none is asked for, the fastest that the device has instructions for."""

from __future__ import annotations

import torch

from accessory.config import Precision

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16, Precision.tf32: torch.float32}

_BF16_OF_CPUS = ("avx512_bf16", "amx_bf16", "bf16")  # of x86 twice, of ARM
_AMPERE = (8, 0)


def default_precision(device: torch.device) -> Precision:
    """bf16 where `device` has instructions for it. A CPU without them converts every operand, and a matrix product
    takes several times as long as in fp32; a GPU without them has those of fp16."""
    if multiplies_bf16(device):
        return Precision.bf16
    return Precision.fp16 if device.type == "cuda" else Precision.tf32


def default_dtype(device: torch.device) -> torch.dtype:
    return DTYPES[default_precision(device)]


def multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _AMPERE
    return any(_cpu_capabilities().get(name, False) for name in _BF16_OF_CPUS)


def _cpu_capabilities() -> dict[str, bool]:
    return dict(torch.cpu.get_capabilities())
