"""NF4's dequantization on a GPU: one Triton kernel that reads the payload once and writes the weight once.

bitsandbytes takes three kernels (scales of the scales, their mean, the weight). This one can besides add LoRA's product
on the way: the weight that it writes is W + B A, summed in fp32 and rounded once, so that one matmul computes the
linear and its adapter. The product costs nothing: a kernel that waits for memory has the arithmetic free.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Optional

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import get_4bit_type
from torch import Tensor

TILE, TILE_WITH_LORA = (16, 256), (16, 256)  # rows and columns that a program writes
WARPS, WARPS_WITH_LORA = 4, 4
MAX_RANK = 64  # of LoRA that is added; a larger one's tiles would not fit into every GPU's shared memory
HALF = torch.float16  # known to every GPU


@triton.jit
def _nf4_weight(
    packed, absmax, codebook, scales, mean, levels, lora_b, lora_a, out, rows, in_features, out_stride,
    blocksize: tl.constexpr, double_quant: tl.constexpr, rank: tl.constexpr, padded_rank: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    first = tl.program_id(1) * tile_columns
    exists = row[:, None] < rows

    word = first // 8 + tl.arange(0, tile_columns // 8)
    inside = exists & (word[None, :] < in_features // 8)
    # A scale for each word of eight codes, though a block has one: of fewer than one load a thread, Triton 3.7 makes
    # one for every element.
    place = row[:, None] * (in_features // blocksize) + (word * 8 // blocksize)[None, :]
    if double_quant:
        code = tl.load(absmax + place, mask=inside, other=0).to(tl.int32)
        scale = tl.load(codebook + code) * tl.load(scales + place // 256, mask=inside, other=0.0) + tl.load(mean)
    else:
        scale = tl.load(absmax + place, mask=inside, other=0.0)

    eight = tl.load(packed + row[:, None] * (in_features // 8) + word[None, :], mask=inside, other=0)
    nibble = tl.arange(0, 8)
    shift = (nibble // 2) * 8 + (1 - nibble % 2) * 4  # the first of two is the high one
    code = (eight[:, :, None] >> shift[None, None, :]) & 15
    weight = tl.reshape(tl.load(levels + code) * scale[:, :, None], (tile_rows, tile_columns))

    column = first + tl.arange(0, tile_columns)
    if rank > 0:
        k = tl.arange(0, padded_rank)
        b = tl.load(lora_b + row[:, None] * rank + k[None, :], mask=exists & (k[None, :] < rank), other=0.0)
        fits = (k[:, None] < rank) & (column[None, :] < in_features)
        a = tl.load(lora_a + k[:, None] * in_features + column[None, :], mask=fits, other=0.0)
        weight += tl.dot(b, a, out_dtype=tl.float32)
    whole = exists & (column[None, :] < in_features)
    tl.store(out + row[:, None] * out_stride + column[None, :], weight.to(out.dtype.element_ty), mask=whole)


@functools.cache
def _levels(device: torch.device) -> Tensor:
    """The 16 values of a code, fp32."""
    return get_4bit_type("nf4", device=device)


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
            words, absmax, codebook, scales, mean, _levels(packed.device), b, a, out, rows, in_features,
            out.stride(0), blocksize, bool(second), rank, max(16, triton.next_power_of_2(rank)),
            tile_rows, tile_columns, num_warps=WARPS_WITH_LORA if lora else WARPS,
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
