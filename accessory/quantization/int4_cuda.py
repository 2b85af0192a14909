"""Int4's dequantization on a GPU: one Triton kernel that reads the payload once and writes the weight once.

In plain PyTorch every step writes a tensor of the weight's size. Reading 11008 x 4096 weights in 4 bits and writing
them in bf16, an H200 (torch 2.11, Triton 3.6) moves 3.2 TB/s here, where a copy moves 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.quantization.eights_cuda import joined

TILE, TILE_WITH_LORA = (16, 256), (64, 64)  # rows and columns that a program writes
WARPS, WARPS_WITH_LORA = 2, 4
MAX_RANK = 64  # of LoRA that is added; a larger one's tiles would not fit into every GPU's shared memory


@triton.jit
def _int4_weight(
    codes, scales, zeros, g_idx, lora_b, lora_a, out, rows, in_features, row_bytes, groups, out_stride,
    group_size: tl.constexpr, bits: tl.constexpr, reordered: tl.constexpr, regular: tl.constexpr,
    rank: tl.constexpr, padded_rank: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)[:, None]
    first = tl.program_id(1) * tile_columns
    column = first + tl.arange(0, tile_columns)[None, :]
    inside = (row < rows) & (column < in_features)
    if regular:  # whole groups (or a part of one) in a tile, codes that lie side by side: nothing is loaded twice
        if bits == 4:
            byte = first // 2 + tl.arange(0, tile_columns // 2)[None, :]
            held = (row < rows) & (byte < row_bytes)
            pair = tl.load(codes + row * row_bytes + byte, mask=held, other=0).to(tl.int32)
            code = tl.interleave(pair & 15, pair >> 4)
        elif bits == 3:  # eight in three bytes
            three = 3 * (first // 8 + tl.arange(0, tile_columns // 8)[None, :])
            held = (row < rows) & (three < row_bytes)
            place = codes + row * row_bytes + three
            word = tl.load(place, mask=held, other=0).to(tl.int32)
            word |= tl.load(place + 1, mask=held, other=0).to(tl.int32) << 8
            word |= tl.load(place + 2, mask=held, other=0).to(tl.int32) << 16
            code = joined(
                word & 7, word >> 3 & 7, word >> 6 & 7, word >> 9 & 7, word >> 12 & 7, word >> 15 & 7, word >> 18 & 7,
                word >> 21, tile_rows, tile_columns,
            )  # fmt: skip
        else:
            code = tl.load(codes + row * row_bytes + column, mask=inside, other=0).to(tl.int32)
        parts: tl.constexpr = tile_columns // group_size if group_size < tile_columns else 1
        group = first // group_size + tl.arange(0, parts)[None, :]
        exists = (row < rows) & (group < groups)
        scale = tl.load(scales + row * groups + group, mask=exists, other=0.0)
        zero = tl.load(zeros + row * groups + group, mask=exists, other=0).to(tl.int32)
        code = tl.reshape(code, (tile_rows, parts, tile_columns // parts))
        value = (code - zero[:, :, None]).to(tl.float16) * scale[:, :, None]
        value = tl.reshape(value, (tile_rows, tile_columns))
    else:
        byte = column * bits // 8
        shift = column * bits % 8
        word = tl.load(codes + row * row_bytes + byte, mask=inside, other=0).to(tl.int32)
        if bits == 3:  # may reach into the next byte
            next_byte = inside & (byte + 1 < row_bytes)
            word |= tl.load(codes + row * row_bytes + byte + 1, mask=next_byte, other=0).to(tl.int32) << 8
        code = (word >> shift) & ((1 << bits) - 1)
        group = tl.load(g_idx + column, mask=column < in_features, other=0) if reordered else column // group_size
        scale = tl.load(scales + row * groups + group, mask=inside, other=0.0)
        zero = tl.load(zeros + row * groups + group, mask=inside, other=0).to(tl.int32)
        value = (code - zero).to(tl.float16) * scale  # rounded to float16, as the files' own kernels do
    if rank > 0:
        k = tl.arange(0, padded_rank)
        b = tl.load(lora_b + row * rank + k[None, :], mask=(row < rows) & (k[None, :] < rank), other=0.0)
        fits = (k[:, None] < rank) & (column < in_features)
        a = tl.load(lora_a + k[:, None] * in_features + column, mask=fits, other=0.0)
        total = value.to(tl.float32) + tl.dot(b, a, out_dtype=tl.float32)
        tl.store(out + row * out_stride + column, total.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


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
    whole_groups = tile_columns % group_size == 0 or group_size % tile_columns == 0
    regular = bits in (3, 4, 8) and not g_idx and whole_groups
    grid = (triton.cdiv(rows, tile_rows), triton.cdiv(in_features, tile_columns))
    with torch.cuda.device_of(codes):
        _int4_weight[grid](
            codes, scales, zeros, g_idx[0] if g_idx else codes, b, a, out, rows, in_features, codes.shape[1], groups,
            out.stride(0), group_size, bits, bool(g_idx), regular, rank, max(16, triton.next_power_of_2(rank)),
            tile_rows, tile_columns, num_warps=WARPS_WITH_LORA if lora else WARPS,
        )  # fmt: skip
    return out


def try_out() -> None:
    """Each form once, on the smallest input (accessory.kernels)."""
    half, byte = ({"dtype": dtype, "device": "cuda"} for dtype in (torch.float16, torch.uint8))
    lora = torch.zeros(1, MAX_RANK, **half), torch.zeros(MAX_RANK, 64, **half)
    for bits in (3, 4, 8):
        payload = (torch.zeros(1, 8 * bits, **byte), torch.zeros(1, 1, **half), torch.zeros(1, 1, **byte))
        for added in (None, lora):
            dequantize(payload, bits, (1, 64), torch.float16, lora=added)
