"""No quantization: the weight as it is, behind the same frozen linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

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

    def dequantize_into(self, payload: Sequence[Tensor], out: Tensor, lora: Optional[tuple[Tensor, Tensor]]) -> None:
        raise NotImplementedError  # can_fold says no

    def can_fold(self, payload: Sequence[Tensor], shape: tuple[int, int]) -> bool:
        """In 16 bit, W + B A would round a small adapter away."""
        return False
