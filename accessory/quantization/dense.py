"""No quantization: the weight as it is, behind the same frozen linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """Payload: the weight [out, in] in `dtype`."""

    dtype: torch.dtype = torch.bfloat16
    name: str = "none"
    payload_names: tuple[str, ...] = ("dense",)

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        return (weight.to(self.dtype).contiguous(),)

    def dequantize(self, payload: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return payload[0].to(dtype)
