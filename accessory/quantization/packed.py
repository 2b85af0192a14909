"""A weight in whole numbers: what every int4 method makes and every int4 file holds.

    w[i, j] = (codes[i, j] - zeros[i, g]) * scales[i, g],    g = the group of column j

Symmetric weights are the case zeros = 2^(bits-1). The product is rounded to the scales' type, as in the kernels that
the formats were made for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Scheme:
    """How a linear is stored. bits: 2, 3, 4 or 8; group_size: weights of a row that share a scale, -1: the whole row;
    sym: no zero point of its own."""

    bits: int = 4
    group_size: int = 64
    sym: bool = False

    def groups(self, in_features: int) -> int:
        return 1 if self.group_size == -1 else in_features // self.group_size

    def __str__(self) -> str:
        size = "per channel" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{self.bits} bit {'symmetric' if self.sym else 'asymmetric'}, {size}"


@dataclass
class Packed:
    """codes: uint8 [out, in], below 2^bits; scales: float16 [out, groups], of any sign; zeros: uint8 [out, groups];
    g_idx: int32 [in], the group of each column, None: columns in order (set by GPTQ's act-order without static
    groups)."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    g_idx: Optional[Tensor] = None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes.shape)

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def to(self, device: torch.device) -> "Packed":
        moved = (None if t is None else t.to(device) for t in (self.codes, self.scales, self.zeros, self.g_idx))
        codes, scales, zeros, g_idx = moved
        return Packed(codes, scales, zeros, self.bits, g_idx)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`."""
        if self.g_idx is not None:
            group = self.g_idx.long()
            whole = self.codes.to(torch.int16) - self.zeros[:, group].to(torch.int16)
            return (whole * self.scales[:, group]).to(dtype)
        out, groups = self.scales.shape
        whole = self.codes.view(out, groups, -1).to(torch.int16) - self.zeros.unsqueeze(-1).to(torch.int16)
        return (whole * self.scales.unsqueeze(-1)).view(out, -1).to(dtype)
