"""Whole-number weights in memory: codes of 2, 3, 4 or 8 bits, with a scale and a zero point a group.

Codes lie along the inputs as one stream of bits, lowest first: two 4-bit codes a byte, four 2-bit ones, eight 3-bit
codes in three bytes. What a weight is worth says `Packed`; the values here are the same bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Optional

import torch
from torch import Tensor

from accessory.kernels import working
from accessory.quantization.packed import Packed, Scheme


@dataclass(frozen=True)
class Int4:
    """Payload: codes uint8 [out, in * bits / 8], scales float16 [out, groups], zeros uint8 [out, groups], and, if
    reordered, g_idx int32 [in], the group of each column."""

    bits: int = 4
    group_size: int = 64
    sym: bool = False
    reordered: bool = False

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def payload_names(self) -> tuple[str, ...]:
        return ("codes", "scales", "zeros", *(("g_idx",) if self.reordered else ()))

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.bits, self.group_size, self.sym)

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """weight: float [out, in] -> payload, rounded to nearest."""
        from accessory.quantization import rtn

        return self.pack(rtn.quantize(weight, self.scheme))

    def pack(self, packed: Packed) -> tuple[Tensor, ...]:
        """A weight of this scheme -> payload."""
        assert packed.bits == self.bits and (packed.g_idx is None or self.reordered)
        payload = (pack_codes(packed.codes, self.bits), packed.scales.contiguous(), packed.zeros.contiguous())
        if not self.reordered:
            return payload
        columns = torch.arange(packed.shape[1], dtype=torch.int32, device=packed.codes.device)
        return *payload, columns // packed.group_size if packed.g_idx is None else packed.g_idx.to(torch.int32)

    def unpack(self, payload: Sequence[Tensor]) -> Packed:
        """payload -> the weight in whole numbers, which `pack` made it of."""
        codes, scales, zeros, *g_idx = payload
        return Packed(unpack_codes(codes, self.bits), scales, zeros, self.bits, g_idx[0] if g_idx else None)

    def dequantize(self, payload: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        if self.can_fold(payload, shape):
            return _kernels(payload[0].device).dequantize(payload, self.bits, shape, dtype)
        codes, scales, zeros, *g_idx = payload
        signed = torch.int16 if self.bits == 8 else torch.int8  # holds code - zero
        whole = unpack_codes(codes, self.bits).to(signed)
        zeros = zeros.to(signed)
        if g_idx:
            group = g_idx[0]
            return whole.sub_(zeros.index_select(1, group)).mul(scales.index_select(1, group)).to(dtype)
        grouped = whole.view(*scales.shape, -1).sub_(zeros.unsqueeze(-1))
        return grouped.to(torch.float16).mul_(scales.unsqueeze(-1)).view(shape).to(dtype)

    def dequantize_into(self, payload: Sequence[Tensor], out: Tensor, lora: Optional[tuple[Tensor, Tensor]]) -> None:
        _kernels(payload[0].device).dequantize(payload, self.bits, tuple(out.shape), out.dtype, out, lora)

    def can_fold(self, payload: Sequence[Tensor], shape: tuple[int, int]) -> bool:
        return payload[0].is_cuda and _kernels(payload[0].device) is not None


def _kernels(device: torch.device) -> Optional[ModuleType]:
    return working(
        "accessory.quantization.int4_cuda",
        "int4 weights are dequantized by plain PyTorch, several times slower",
        device,
    )


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """codes: uint8 [n, in], below 2^bits -> their bits in a stream, uint8 [n, in * bits / 8]."""
    if bits == 8:
        return codes.contiguous()
    per_unit, unit_bytes = _unit(bits)
    units = codes.unflatten(-1, (-1, per_unit))
    stream = codes.new_zeros(*units.shape[:-1], unit_bytes)
    for k in range(per_unit):
        byte, shift = divmod(k * bits, 8)
        stream[..., byte] |= units[..., k] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= units[..., k] >> (8 - shift)
    return stream.flatten(-2)


def unpack_codes(stream: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 [n, in * bits / 8] -> uint8 [n, in], always new memory."""
    if bits == 8:
        return stream.clone()
    per_unit, unit_bytes = _unit(bits)
    units = stream.unflatten(-1, (-1, unit_bytes))
    codes = stream.new_empty(*units.shape[:-1], per_unit)
    for k in range(per_unit):
        byte, shift = divmod(k * bits, 8)
        code = units[..., byte] >> shift
        if shift + bits > 8:
            code |= units[..., byte + 1] << (8 - shift)
        torch.bitwise_and(code, 2**bits - 1, out=codes[..., k])
    return codes.flatten(-2)


def _unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes, and those bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common
