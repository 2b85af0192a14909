"""NF4's dequantization on a GPU: one Triton kernel that reads the payload once and writes the weight once.

bitsandbytes takes three kernels (scales of the scales, their mean, the weight). This one can besides add LoRA's product
on the way: the weight that it writes is W + B A, summed in fp32 and rounded once, so that one matmul computes the
linear and its adapter. That takes longer than the weight alone, as the sum passes through shared memory, but from some
thousand tokens on less than LoRA's own passes over x and y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.quantization.eights_cuda import eight_values, eights_of_tile, joined, shuffles, values_of_codes

TILE, TILE_WITH_LORA = (16, 256), (16, 256)  # rows and columns that a program writes
WARPS, WARPS_WITH_LORA = 4, 4
MAX_RANK = 64  # of LoRA that is added; a larger one's tiles would not fit into every GPU's shared memory
HALF = torch.float16  # known to every GPU


@triton.jit
def _nf4_weight(
    packed, absmax, codebook, scales, mean, levels, lora_b, lora_a, out, rows, in_features, out_stride,
    blocksize: tl.constexpr, double_quant: tl.constexpr, rank: tl.constexpr, padded_rank: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, shuffle: tl.constexpr,
):  # fmt: skip
    # 64 bits for where the tile begins, 32 within it: an address is most of what a weight costs.
    first_row, first = tl.program_id(0) * tile_rows, tl.program_id(1) * tile_columns
    row, word = eights_of_tile(tile_rows, tile_columns)
    inside = (first_row + row < rows) & (first + 8 * word < in_features)
    row_words = in_features // 8
    block = (first_row + row) * (in_features // blocksize) + (first + 8 * word) // blocksize
    if double_quant:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(codebook + code) * tl.load(scales + block // 256, mask=inside, other=0.0) + tl.load(mean)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)

    eight = tl.load(packed + first_row.to(tl.int64) * row_words + first // 8 + (row * row_words + word), inside, 0)
    w0, w1, w2, w3, w4, w5, w6, w7 = eight_values(eight, levels, shuffle)
    weight = joined(
        w0 * scale, w1 * scale, w2 * scale, w3 * scale, w4 * scale, w5 * scale, w6 * scale, w7 * scale,
        tile_rows, tile_columns,
    )  # fmt: skip

    row = tl.arange(0, tile_rows)[:, None]
    exists = first_row + row < rows
    column = tl.arange(0, tile_columns)[None, :]
    whole = exists & (first + column < in_features)
    if rank > 0:
        k = tl.arange(0, padded_rank)
        b = tl.load(lora_b + (first_row + row) * rank + k[None, :], mask=exists & (k[None, :] < rank), other=0.0)
        fits = (k[:, None] < rank) & (first + column < in_features)
        a = tl.load(lora_a + first + (k[:, None] * in_features + column), mask=fits, other=0.0)
        weight += tl.dot(b, a, out_dtype=tl.float32)
    out += first_row.to(tl.int64) * out_stride + first
    tl.store(out + (row * out_stride + column), weight.to(out.dtype.element_ty), mask=whole)


def dequantize(
    payload: Sequence[Tensor],
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    out: Optional[Tensor] = None,
    lora: Optional[tuple[Tensor, Tensor]] = None,
) -> Tensor:
    """NF4's payload -> the weight of `shape` in `dtype`, written to `out` (rows may be apart) where it is given.

    lora: (B [out, r], A [r, in]) in 16 bit, whose product is added."""
    packed, absmax, *second = payload
    codebook, scales, mean = second or (absmax, absmax, absmax)
    rows, in_features = shape
    out = torch.empty(shape, dtype=dtype, device=packed.device) if out is None else out
    b, a = lora or (out, out)
    rank = b.shape[1] if lora else 0
    words = packed.flatten().view(torch.int32)
    tile_rows, tile_columns = TILE_WITH_LORA if lora else TILE
    grid = (triton.cdiv(rows, tile_rows), triton.cdiv(in_features, tile_columns))
    with torch.cuda.device_of(packed):
        _nf4_weight[grid](
            words, absmax, codebook, scales, mean, values_of_codes(packed.device), b, a, out, rows, in_features,
            out.stride(0), blocksize, bool(second), rank, max(16, triton.next_power_of_2(rank)),
            tile_rows, tile_columns, shuffles(), num_warps=WARPS_WITH_LORA if lora else WARPS,
            enable_fp_fusion=False,  # scale * scale + mean in one rounding would not be bitsandbytes' weight
        )  # fmt: skip
    return out


def try_out() -> None:
    """Each form once, on the smallest input (accessory.kernels)."""
    packed, one = torch.zeros(32, 1, dtype=torch.uint8, device="cuda"), torch.ones(256, device="cuda")
    doubly = packed, torch.zeros(1, dtype=torch.uint8, device="cuda"), one, one, one[0]
    lora = (torch.zeros(1, MAX_RANK, dtype=HALF, device="cuda"), torch.zeros(MAX_RANK, 64, dtype=HALF, device="cuda"))
    for payload in ((packed, one), doubly):
        for added in (None, lora):
            dequantize(payload, 64, (1, 64), HALF, lora=added)
