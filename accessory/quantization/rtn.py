"""Round to nearest: the grid that every method here rounds to, and the rounding itself.

A row's group of weights w has one scale s and one zero point z (arXiv:1712.05877 eq. 1; formulas as in llmc):

    asymmetric   s = (max w - min w) / (2^b - 1)      z = clamp(-round(min w / s), 0, 2^b - 1)
    symmetric    s = max|w| / (2^(b-1) - 1)           z = 2^(b-1)

    q = clamp(round(w / s) + z, 0, 2^b - 1)           w ~ (q - z) s

Symmetric codes are the signed ones, -2^(b-1) .. 2^(b-1) - 1, raised by z. Files hold s in fp16, so s is rounded first
and z and q follow from the rounded s: what is measured is what is stored. All else is fp32.

The asymmetric range always includes 0: else a group of one sign, far from 0, would lose z to the clamp and with it its
weights. For groups of both signs this changes nothing.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from accessory.quantization.packed import Packed, Scheme

SMALLEST_RANGE = 1e-5  # of a group: keeps scales of all-zero groups above fp16's smallest number
CHUNK = 1 << 24  # weights that are encoded at a time: bounds the fp32 temporaries


def grid(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """weight: float [out, in], in a multiple of the group size -> scales float16, zeros uint8, both [out, groups]."""
    out, in_features = weight.shape
    grouped = weight.reshape(out, scheme.groups(in_features), -1)
    low, high = (bound.float() for bound in torch.aminmax(grouped, dim=-1))
    if scheme.sym:
        scales = _half(torch.maximum(-low, high), 2 ** (scheme.bits - 1) - 1, scheme.bits)
        return scales, torch.full_like(scales, 2 ** (scheme.bits - 1), dtype=torch.uint8)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = _half(high - low, 2**scheme.bits - 1, scheme.bits)
    zeros = (-low / scales.float()).round_().clamp_(0, 2**scheme.bits - 1)
    return scales, zeros.to(torch.uint8)


def _half(size: Tensor, steps: int, bits: int) -> Tensor:
    """size / steps in fp16, small enough that no code times it overflows fp16 (the cap is exact in fp16)."""
    return (size.clamp(min=SMALLEST_RANGE) / steps).clamp_(max=torch.finfo(torch.float16).max / 2**bits).half()


def encode(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int, g_idx: Optional[Tensor] = None) -> Tensor:
    """The nearest codes: weight float [out, in]; scales, zeros [out, groups]; g_idx int [in], the group of each column
    (None: columns in order) -> uint8 [out, in]."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        own_scales, own_zeros = scales[part], zeros[part]
        if g_idx is not None:  # a scale for each column: groups of one
            own_scales, own_zeros = own_scales[:, g_idx.long()], own_zeros[:, g_idx.long()]
        codes[part] = _levels(weight[part], own_scales, own_zeros, bits).view_as(weight[part])
    return codes


def quantize(weight: Tensor, scheme: Scheme) -> Packed:
    """weight: float [out, in]."""
    scales, zeros = grid(weight, scheme)
    return Packed(encode(weight, scales, zeros, scheme.bits), scales, zeros, scheme.bits)


def fake(weight: Tensor, scheme: Scheme) -> Tensor:
    """quantize and dequantize: [out, in] -> float32 [out, in]. The products are not rounded to fp16, as those of
    Packed.dequantize are: a relative difference of at most 2^-11."""
    scales, zeros = grid(weight, scheme)
    levels = _levels(weight, scales, zeros, scheme.bits)
    return levels.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).view_as(weight)


def _levels(weight: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Codes as float32 [out, groups, group size]."""
    levels = weight.reshape(*scales.shape, -1) / scales.float().unsqueeze(-1)
    return levels.round_().add_(zeros.unsqueeze(-1)).clamp_(0, 2**bits - 1)
