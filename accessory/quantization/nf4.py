"""NF4 (QLoRA, arXiv:2305.14314) through bitsandbytes' operators.

Per block of `blocksize` weights: absmax s, and 4-bit codes of the nearest of 16 quantiles of a normal distribution, two
a byte. With double quantization the absmax themselves are stored in 8 bits, 256 to a second scale, around their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Optional

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from accessory.kernels import working


@dataclass(frozen=True)
class NF4:
    """Payload: packed uint8 [out*in/2, 1], and the scales, fp32 [blocks]; or, doubly quantized, their uint8 codes
    [blocks], codebook fp32 [256], second scales fp32 [ceil(blocks/256)] and mean fp32 []."""

    blocksize: int = 64
    double_quant: bool = True
    name: str = "nf4"

    @property
    def payload_names(self) -> tuple[str, ...]:
        scales = (
            ("absmax_codes", "absmax_codebook", "absmax_scales", "absmax_mean") if self.double_quant else ("absmax",)
        )
        return ("packed", *scales)

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        packed, state = bnb.quantize_4bit(
            weight.contiguous(), blocksize=self.blocksize, compress_statistics=self.double_quant, quant_type="nf4"
        )
        if not self.double_quant:
            return packed, state.absmax
        return packed, state.absmax, state.state2.code, state.state2.absmax, state.offset

    def dequantize(self, payload: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if self.can_fold(payload, shape):
            return _kernels(payload[0].device).dequantize(payload, self.blocksize, shape, dtype)
        packed, absmax, *second = payload
        if self.double_quant:
            codebook, scales, mean = second
            absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, scales, codebook, 256, torch.float32) + mean
        return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, self.blocksize, "nf4", shape, dtype)

    def dequantize_into(self, payload: Sequence[Tensor], out: Tensor, lora: Optional[tuple[Tensor, Tensor]]) -> None:
        _kernels(payload[0].device).dequantize(payload, self.blocksize, tuple(out.shape), out.dtype, out, lora)

    def can_fold(self, payload: Sequence[Tensor], shape: tuple[int, int]) -> bool:
        """The kernel's blocks must not reach from one row into the next."""
        aligned = shape[1] % self.blocksize == 0 and self.blocksize <= 256
        return payload[0].is_cuda and aligned and _kernels(payload[0].device) is not None


def _kernels(device: torch.device) -> Optional[ModuleType]:
    return working("accessory.quantization.nf4_cuda", "NF4 weights are dequantized by bitsandbytes, LoRA apart", device)
