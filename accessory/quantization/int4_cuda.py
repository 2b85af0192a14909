"""Int4's dequantization on a GPU: one Triton kernel that reads the payload once and writes the weight once.

In plain PyTorch every step writes a tensor of the weight's size. Here a thread reads eight codes, and writes their
weights where its neighbours write theirs; scripts/benchmark_kernels.py shows how near to a copy that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.quantization.eights_cuda import UNITS, eights_of_tile, joined

TILE, TILE_WITH_LORA = (8, 512), (64, 64)  # rows and columns that a program writes
WARPS, WARPS_WITH_LORA = 4, 4
MAX_RANK = 64  # of LoRA that is added; a larger one's tiles would not fit into every GPU's shared memory


@triton.jit
def _int4_weight(
    codes, scales, zeros, g_idx, lora_b, lora_a, out, rows, in_features, row_units, groups, out_stride,
    group_size: tl.constexpr, bits: tl.constexpr, reordered: tl.constexpr, in_eights: tl.constexpr,
    rank: tl.constexpr, padded_rank: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr,
):  # fmt: skip
    """codes: in_eights, in units that hold eight; bytes otherwise. row_units: of them in a row."""
    first_row, first = tl.program_id(0) * tile_rows, tl.program_id(1) * tile_columns
    row, column = tl.arange(0, tile_rows)[:, None], first + tl.arange(0, tile_columns)[None, :]
    inside = (first_row + row < rows) & (column < in_features)
    codes += first_row.to(tl.int64) * row_units
    out += first_row.to(tl.int64) * out_stride
    if in_eights:
        own_row, eight = eights_of_tile(tile_rows, tile_columns)
        eight += first // 8
        exists = (first_row + own_row < rows) & (8 * eight < in_features)
        c0, c1, c2, c3, c4, c5, c6, c7 = _eight_codes(codes, own_row, eight, row_units, exists, bits)
        group = (first_row + own_row) * groups + 8 * eight // group_size
        scale = tl.load(scales + group, mask=exists, other=0.0)
        zero = tl.load(zeros + group, mask=exists, other=0).to(tl.int32)
        value = joined(
            _value(c0, zero, scale), _value(c1, zero, scale), _value(c2, zero, scale), _value(c3, zero, scale),
            _value(c4, zero, scale), _value(c5, zero, scale), _value(c6, zero, scale), _value(c7, zero, scale),
            tile_rows, tile_columns,
        )  # fmt: skip
    else:
        byte, shift = column * bits // 8, column * bits % 8
        word = tl.load(codes + (row * row_units + byte), mask=inside, other=0).to(tl.int32)
        if bits == 3:  # may reach into the next byte
            next_byte = inside & (byte + 1 < row_units)
            word |= tl.load(codes + (row * row_units + byte + 1), mask=next_byte, other=0).to(tl.int32) << 8
        group = tl.load(g_idx + column, mask=column < in_features, other=0) if reordered else column // group_size
        group += (first_row + row) * groups
        scale = tl.load(scales + group, mask=inside, other=0.0)
        zero = tl.load(zeros + group, mask=inside, other=0).to(tl.int32)
        value = _value((word >> shift) & ((1 << bits) - 1), zero, scale)
    if rank > 0:
        k = tl.arange(0, padded_rank)
        shown = (first_row + row < rows) & (k[None, :] < rank)
        b = tl.load(lora_b + (first_row + row) * rank + k[None, :], mask=shown, other=0.0)
        fits = (k[:, None] < rank) & (column < in_features)
        a = tl.load(lora_a + k[:, None] * in_features + column, mask=fits, other=0.0)
        total = value.to(tl.float32) + tl.dot(b, a, out_dtype=tl.float32)
        tl.store(out + (row * out_stride + column), total.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + (row * out_stride + column), value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _eight_codes(codes, row, eight, row_units, exists, bits: tl.constexpr):
    """Eight tensors int32, in the order of the weights."""
    if bits == 3:
        place = codes + (row * row_units + 3 * eight)
        word = tl.load(place, mask=exists, other=0).to(tl.int32)
        word |= tl.load(place + 1, mask=exists, other=0).to(tl.int32) << 8
        word |= tl.load(place + 2, mask=exists, other=0).to(tl.int32) << 16
    else:
        word = tl.load(codes + (row * row_units + eight), mask=exists, other=0)
    found = ()
    for i in tl.static_range(8):
        part = (word >> 32 * (bits * i // 32)).to(tl.int32) if bits == 8 else word.to(tl.int32)
        found = found + ((part >> bits * i % 32) & ((1 << bits) - 1),)  # noqa: RUF005
    return found


@triton.jit
def _value(code, zero, scale):
    """Rounded to float16, as the files' own kernels do."""
    return (code - zero).to(tl.float16) * scale


def dequantize(
    payload: Sequence[Tensor],
    bits: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    out: Optional[Tensor] = None,
    lora: Optional[tuple[Tensor, Tensor]] = None,
) -> Tensor:
    """Int4's payload -> the weight of `shape` in `dtype`, written to `out` (rows may be apart) where it is given.

    lora: (B [out, r], A [r, in]) in 16 bit, whose product is added in fp32 before the weight is rounded."""
    codes, scales, zeros, *g_idx = payload
    rows, in_features = shape
    groups = scales.shape[1]
    out = torch.empty(shape, dtype=dtype, device=codes.device) if out is None else out
    b, a = lora or (out, out)
    rank = b.shape[1] if lora else 0
    group_size = in_features // groups
    tile_rows, tile_columns = TILE_WITH_LORA if lora else TILE
    in_eights = not g_idx and group_size % 8 == 0
    units = codes.view(UNITS[bits]) if in_eights else codes
    grid = (triton.cdiv(rows, tile_rows), triton.cdiv(in_features, tile_columns))
    with torch.cuda.device_of(codes):
        _int4_weight[grid](
            units, scales, zeros, g_idx[0] if g_idx else codes, b, a, out, rows, in_features, units.shape[1], groups,
            out.stride(0), group_size, bits, bool(g_idx), in_eights, rank, max(16, triton.next_power_of_2(rank)),
            tile_rows, tile_columns, num_warps=WARPS_WITH_LORA if lora else WARPS,
        )  # fmt: skip
    return out


def try_out() -> None:
    """Each form once, on the smallest input (accessory.kernels)."""
    half, byte = ({"dtype": dtype, "device": "cuda"} for dtype in (torch.float16, torch.uint8))
    lora = torch.zeros(1, MAX_RANK, **half), torch.zeros(MAX_RANK, 64, **half)
    for bits in UNITS:
        payload = (torch.zeros(1, 8 * bits, **byte), torch.zeros(1, 1, **half), torch.zeros(1, 1, **byte))
        for added in (None, lora):
            dequantize(payload, bits, (1, 64), torch.float16, lora=added)
            dequantize(
                (*payload, torch.zeros(64, dtype=torch.int32, device="cuda")), bits, (1, 64), torch.float16, lora=added
            )
