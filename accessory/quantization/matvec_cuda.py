"""y = x @ dq(W)^T for a few rows of x on a GPU, from the packed weight, read once: what decoding a token costs.

A token's forward pass is bound by the bytes of the weights. To dequantize and multiply moves 4.5 bytes a weight (read
0.5, write 2, read 2); the kernels here move the 0.5, and unpack in registers:

    y[m, o] = sum over words w of   scale[o, w] * (sum over the weights i of w of   value(code[o, i]) * x[m, i])

A word holds 8 codes, which share a scale: 4 bytes at 4 bits. A thread takes one or two words at a time, so a warp reads
128 or 256 neighbouring bytes of a row, and the same thread reads the numbers of x that go with them. Nothing passes
through shared memory before the last sum; some rows of W share x's loads, and all their words are asked for before the
first is used. No row needs to be split among programs: even 1024 x 8192 fills the GPU, row by row.

What bounds it is not memory but the instructions that unpack: with 10 a weight, the products of a 70B model's token in
NF4 read 1.1 TB/s on an H200. Hence the shuffles of eights_cuda and the mantissas of `_coded`: it takes 5 and 6 with
them, and NF4's products read 1.9 TB/s.

The order of additions depends on the shapes alone, so results do not change from run to run. Sums are fp32; NF4's
values are fp32 too (the dequantized weight is rounded to x's dtype), int4's are not rounded to float16 before the
product. Written for Triton, and for its interpreter, which runs them on a CPU (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.quantization.eights_cuda import UNITS, eight_values, shuffles, values_of_codes
from accessory.quantization.int4 import Int4
from accessory.quantization.nf4 import NF4

# Unpacking a weight takes about 4 instructions, a row of x one more and its share of the loads of x: 8 rows take some
# three or four times as long as one, where dequantizing moves nine times the bytes. For 16 the sums would fill the
# registers, at the cost of loads in flight.
MAX_ROWS = 8
WARPS = 4
BLOCK = 32 * WARPS  # a load a thread
PROGRAMS = 1024  # wanted at least, for 132 multiprocessors of 8 programs each
TILES = {1: (4, 2), 2: (4, 1), 4: (4, 1), 8: (4, 1)}  # rows of x -> rows of W in a program, loads of each in flight
# bits, rows of x -> eights of weights in a load (two are as long as one of twice the bits): two share the way to a
# scale, but their numbers of x take registers.
EIGHTS = {(bits, m): 2 if bits < 8 and m <= 4 else 1 for bits in (2, 4, 8) for m in TILES}


@triton.jit
def _numbers(x):
    """x: [n, 8] -> its columns in fp32, [n] each, which stay in the thread that loaded the row."""
    n: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (n, 4, 2)))
    even_04, even_26 = tl.split(tl.reshape(even, (n, 2, 2)))
    odd_15, odd_37 = tl.split(tl.reshape(odd, (n, 2, 2)))
    x0, x4 = tl.split(even_04)
    x2, x6 = tl.split(even_26)
    x1, x5 = tl.split(odd_15)
    x3, x7 = tl.split(odd_37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _totals(sums, count_log2: tl.constexpr):
    """A tuple of 1, 2, 4, .. tensors [n] -> their sums [count], all in one reduction."""
    n: tl.constexpr = sums[0].shape[0]
    if count_log2 == 0:
        return tl.sum(sums[0], 0, keep_dims=True)
    for level in tl.static_range(count_log2):
        joined = ()
        for i in tl.static_range(1 << (count_log2 - 1 - level)):  # with its partner half the tuple away: see below
            joined = joined + (tl.join(sums[i], sums[i + (1 << (count_log2 - 1 - level))]),)  # noqa: RUF005
        sums = joined
    return tl.sum(tl.reshape(sums[0], (n, 1 << count_log2)), 0)  # each at its number in the tuple


@triton.jit
def _store(
    y, total, bias, share, first_row, rows, out_features, has_bias: tl.constexpr, adds: tl.constexpr,
    block_m: tl.constexpr,
):  # fmt: skip
    """total: fp32 [rows of W * block_m]; the bias is rounded to y's dtype first, as it is in training."""
    dtype = y.dtype.element_ty
    place = tl.arange(0, total.shape[0])
    row, m = first_row + place // block_m, place % block_m
    exists = (row < out_features) & (m < rows)
    if has_bias:
        total += tl.load(bias + row, mask=row < out_features, other=0.0).to(dtype).to(tl.float32)
    if adds:
        total += tl.load(share + m * out_features + row, mask=exists, other=0.0).to(tl.float32)
    tl.store(y + m * out_features + row, total.to(dtype), mask=exists)


@triton.jit
def _words_kernel(
    words, scales, zeros, codebook, mean, values, x, bias, share, y, rows, out_features, row_loads, row_groups,
    group_loads: tl.constexpr, nf4: tl.constexpr, doubly: tl.constexpr, bits: tl.constexpr, has_bias: tl.constexpr,
    adds: tl.constexpr, block_m: tl.constexpr, block_out: tl.constexpr, count_log2: tl.constexpr,
    steps: tl.constexpr, block: tl.constexpr, eights: tl.constexpr, shuffle: tl.constexpr,
):  # fmt: skip
    """NF4, and whole numbers of 2, 4 or 8 bits in order. Doubly quantized, `zeros` are the second scales.

    Tensors are [block], a load a thread, so that all have one layout; what is more than one a thread is in tuples. A
    load is `eights` times eight codes, which share a scale.
    """
    first_row = tl.program_id(0).to(tl.int64) * block_out
    sums = ()
    for _ in tl.static_range(block_out * block_m):
        sums = sums + (tl.zeros((block,), tl.float32),)  # noqa: RUF005
    for start in range(0, row_loads, block * steps):
        # All loads of weights first: what is in flight is what hides the memory's latency.
        loaded = ()
        for i in tl.static_range(block_out * steps):
            place = start + (i % steps) * block + tl.arange(0, block)
            row = tl.minimum(first_row + i // steps, out_features - 1)
            word = tl.load(words + row * row_loads + place, place < row_loads, 0, eviction_policy="evict_first")
            loaded = loaded + (word,)  # noqa: RUF005
        for step in tl.static_range(steps):
            place = start + step * block + tl.arange(0, block)
            inside = place < row_loads
            inputs, input_sums = _inputs(x, rows, row_loads, place, inside, not nf4, block_m, eights)
            for r in tl.static_range(block_out):
                row = tl.minimum(first_row + r, out_features - 1).to(tl.int32)
                if nf4:  # blocks run over the ends of rows
                    group = (row * row_loads + place) // group_loads
                else:
                    group = row * row_groups + place // group_loads
                    # Beside the codes' own offset: see _coded.
                    zero = (tl.load(zeros + group, inside, 0).to(tl.int32) + (1 << bits)).to(tl.float32)
                scale = tl.load(scales + group, inside, 0)
                if doubly:
                    second = tl.load(zeros + group // 256, inside, 0.0)
                    scale = tl.load(codebook + scale.to(tl.int32)) * second + tl.load(mean)
                word = loaded[r * steps + step]
                dots = ()
                for _ in tl.static_range(block_m):
                    dots = dots + (tl.zeros((block,), tl.float32),)  # noqa: RUF005
                for part in tl.static_range(eights):
                    if nf4:
                        weights = eight_values((word >> 32 * part).to(tl.int32), values, shuffle)
                    else:
                        weights = _coded(word >> 8 * bits * part, bits)
                    for i in tl.static_range(8):
                        added = ()
                        for m in tl.static_range(block_m):
                            number = inputs[(m * eights + part) * 8 + i]
                            added = added + (dots[m] + weights[i] * number,)  # noqa: RUF005
                        dots = added
                if not nf4:
                    shifted = ()
                    for m in tl.static_range(block_m):
                        shifted = shifted + (dots[m] * (1 << bits) - zero * input_sums[m],)  # noqa: RUF005
                    dots = shifted
                updated = ()
                for i in tl.static_range(block_out * block_m):
                    if i // block_m == r:
                        updated = updated + (sums[i] + dots[i % block_m] * scale.to(tl.float32),)  # noqa: RUF005
                    else:
                        updated = updated + (sums[i],)  # noqa: RUF005
                sums = updated
    _store(y, _totals(sums, count_log2), bias, share, first_row, rows, out_features, has_bias, adds, block_m)


@triton.jit
def _inputs(x, rows, row_loads, place, inside, summed: tl.constexpr, block_m: tl.constexpr, eights: tl.constexpr):
    """The numbers of x that go with a load: `8 * eights` for each row; and, if asked for, their sum for each row."""
    inputs, sums = (), ()
    for m in tl.static_range(block_m):
        # A row of x that is not there repeats the last one.
        x_row = x + tl.minimum(m, rows - 1) * row_loads * 8 * eights
        total = tl.zeros(place.shape, tl.float32)
        for part in tl.static_range(eights):
            eight = (place * eights + part)[:, None] * 8 + tl.arange(0, 8)[None, :]
            numbers = _numbers(tl.load(x_row + eight, inside[:, None], 0.0))
            inputs = inputs + numbers
            if summed:
                for i in tl.static_range(8):
                    total += numbers[i]
        sums = sums + (total,)  # noqa: RUF005
    return inputs, sums


@triton.jit
def _coded(word, bits: tl.constexpr):
    """Eight codes c of a word, the lowest bits first -> 1 + c / 2^bits as fp32: a code becomes the upper bits of the
    mantissa, which takes a shift and a mask where a conversion takes an instruction of a quarter of their rate."""
    found = ()
    for i in tl.static_range(8):
        if bits == 8:
            coded = _mantissa((word >> 32 * (i // 4)).to(tl.int32), bits * (i % 4), bits)
        else:
            coded = _mantissa(word.to(tl.int32), bits * i, bits)
        found = found + (coded,)  # noqa: RUF005
    return found


@triton.jit
def _mantissa(part, first: tl.constexpr, bits: tl.constexpr):
    top: tl.constexpr = 23 - bits
    part = part << top - first if top >= first else part >> first - top
    return (part & ((1 << bits) - 1 << top) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _columns_kernel(
    codes, scales, zeros, g_idx, x, bias, share, y, rows, out_features, in_features, row_bytes, row_groups,
    group_size: tl.constexpr, bits: tl.constexpr, reordered: tl.constexpr, has_bias: tl.constexpr,
    adds: tl.constexpr, block_m: tl.constexpr, block_out: tl.constexpr, block_in: tl.constexpr,
):  # fmt: skip
    """Whole numbers of any width, in any order of columns: weight by weight, so with several times the loads."""
    outs = tl.program_id(0) * block_out + tl.arange(0, block_out)
    row = tl.minimum(outs, out_features - 1).to(tl.int64)[:, None]
    m = tl.arange(0, block_m)
    sums = tl.zeros((block_out, block_m, block_in), tl.float32)
    for start in range(0, in_features, block_in):
        column = start + tl.arange(0, block_in)
        inside = column < in_features
        byte = (column * bits // 8)[None, :]
        word = tl.load(codes + row * row_bytes + byte, mask=inside[None, :], other=0).to(tl.int32)
        if bits == 3:  # may reach into the next byte
            reaches = inside[None, :] & (byte + 1 < row_bytes)
            word |= tl.load(codes + row * row_bytes + byte + 1, mask=reaches, other=0).to(tl.int32) << 8
        code = (word >> (column * bits % 8)[None, :]) & ((1 << bits) - 1)
        group = tl.load(g_idx + column, mask=inside, other=0) if reordered else column // group_size
        place = row * row_groups + group[None, :]
        zero = tl.load(zeros + place, mask=inside[None, :], other=0).to(tl.int32)
        weight = (code - zero).to(tl.float32) * tl.load(scales + place, mask=inside[None, :], other=0.0).to(tl.float32)
        x_place = x + m[:, None] * in_features + column[None, :]
        inputs = tl.load(x_place, mask=(m < rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        sums += weight[:, None, :] * inputs[None, :, :]
    total = tl.reshape(tl.sum(sums, 2), (block_out * block_m,))
    _store(y, total, bias, share, tl.program_id(0) * block_out, rows, out_features, has_bias, adds, block_m)


def fits(x: Tensor, backend: Any) -> bool:
    """Whether `matvec` takes this x with a weight of this backend."""
    in_features = x.shape[-1]
    few = 0 < x.numel() <= MAX_ROWS * in_features
    return few and (isinstance(backend, Int4) or (isinstance(backend, NF4) and in_features % 8 == 0))


def matvec(
    x: Tensor, payload: Sequence[Tensor], backend: Any, shape: tuple[int, int], bias: Optional[Tensor] = None,
    added: Optional[Tensor] = None,
) -> Tensor:  # fmt: skip
    """x: bf16, fp16 or fp32 [..., in] of at most MAX_ROWS rows; shape: (out, in) of the weight; bias: fp32 [out];
    added: [..., out], before y is rounded -> y [..., out] in x's dtype. The weight's backend must fit."""
    out_features, in_features = shape
    flat = x.reshape(-1, in_features).contiguous()
    y = x.new_empty(len(flat), out_features)
    in_words = isinstance(backend, NF4) or (
        backend.bits != 3 and not backend.reordered and in_features // payload[1].shape[1] % 8 == 0
    )
    launch = _launch_words if in_words else _launch_columns
    with torch.cuda.device_of(x):
        launch(flat, payload, backend, y, bias, None if added is None else added.reshape(y.shape).contiguous())
    return y.view(*x.shape[:-1], out_features)


def _block_out(most: int, out_features: int) -> int:
    """Rows of W in a program: fewer where there would be too few programs for the GPU."""
    while most > 1 and out_features < PROGRAMS * most:
        most //= 2
    return most


def _launch_words(
    x: Tensor, payload: Sequence[Tensor], backend: Any, y: Tensor, bias: Optional[Tensor], added: Optional[Tensor]
) -> None:
    (rows, in_features), out_features = x.shape, y.shape[1]
    block_m = triton.next_power_of_2(rows)
    packed, scales, *rest = payload
    nf4 = isinstance(backend, NF4)
    bits, row_groups = (4, 1) if nf4 else (backend.bits, scales.shape[1])
    group_size = backend.blocksize if nf4 else in_features // row_groups
    eights = EIGHTS[bits, block_m] if in_features % 16 == 0 and group_size % 16 == 0 else 1
    most, steps = TILES[block_m]
    row_loads = in_features // (8 * eights)
    steps = min(steps, triton.next_power_of_2(triton.cdiv(row_loads, BLOCK)))
    block_out = _block_out(most, out_features)
    if nf4:
        doubly = backend.double_quant
        codebook, zeros, mean = rest if doubly else (packed, packed, packed)
        values = values_of_codes(x.device)
    else:
        doubly, zeros, codebook, mean, values = False, rest[0], packed, packed, packed
    _words_kernel[(triton.cdiv(out_features, block_out),)](
        packed.view(-1).view(UNITS[bits * eights]), scales, zeros, codebook, mean, values, x,
        packed if bias is None else bias, x if added is None else added, y, rows, out_features, row_loads, row_groups,
        group_size // (8 * eights), nf4, doubly, bits, bias is not None, added is not None, block_m, block_out,
        (block_out * block_m).bit_length() - 1, steps, BLOCK, eights, nf4 and shuffles(), num_warps=WARPS,
    )  # fmt: skip


def _launch_columns(
    x: Tensor, payload: Sequence[Tensor], backend: Int4, y: Tensor, bias: Optional[Tensor], added: Optional[Tensor]
) -> None:
    rows, in_features = x.shape
    codes, scales, zeros, *g_idx = payload
    block_m = triton.next_power_of_2(rows)
    block_out = _block_out(4, y.shape[1])
    _columns_kernel[(triton.cdiv(y.shape[1], block_out),)](
        codes, scales, zeros, g_idx[0] if g_idx else codes, x, codes if bias is None else bias,
        x if added is None else added, y, rows, y.shape[1], in_features, codes.shape[1], scales.shape[1],
        in_features // scales.shape[1], backend.bits, bool(g_idx), bias is not None, added is not None, block_m,
        block_out, min(1024 // block_m, triton.next_power_of_2(in_features)),
        num_warps=WARPS,
    )  # fmt: skip


def try_out() -> None:
    """Run the kernels once, on the smallest weights."""
    weight, x = torch.zeros(8, 64, device="cuda"), torch.zeros(1, 64, device="cuda", dtype=torch.bfloat16)
    for backend in (NF4(), Int4(4, 64), Int4(3, 64)):
        matvec(x, backend.quantize(weight), backend, (8, 64))
        matvec(x, backend.quantize(weight), backend, (8, 64), added=x[:, :8])
