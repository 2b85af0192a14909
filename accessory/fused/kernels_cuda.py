"""Triton kernels for what torch.compile's kernels, or cuBLAS, do measurably slower or with more memory.

`scripts/benchmark_kernels.py` times each call beside torch.compile's. For 8,192 tokens of LLaMA2-7B's sizes on an H200
(torch 2.11, one run), us here and there, sums over the tokens included: SwiGLU's gradient 254 and 706, the norm's 112
and 185, rotary embedding 77 and 139, its gradient 131 and 334.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # tokens, at least, that a program of SwiGLU sums up; what all found is summed up behind it


@triton.jit
def _rotate(x, cos, sin, token_stride, tokens, half, block: tl.constexpr, tile: tl.constexpr):
    token = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)[:, None]
    column = tl.arange(0, block)[None, :]
    exists = (token < tokens) & (column < half)
    place = token * token_stride + tl.program_id(1) * 2 * half + column
    first = tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(x + place + half, mask=exists, other=0.0).to(tl.float32)
    c = tl.load(cos + token * 2 * half + column, mask=exists, other=0.0).to(tl.float32)
    s = tl.load(sin + token * 2 * half + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(x + place, (first * c - second * s).to(x.dtype.element_ty), mask=exists)
    tl.store(x + place + half, (second * c + first * s).to(x.dtype.element_ty), mask=exists)


def rotate_(qkv: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    """qkv: [m, n, e]; cos, sin: [m, e], whose halves are equal. Turns the first `rotated` heads in place."""
    tokens, _, size = qkv.shape
    tile = 16
    with torch.cuda.device_of(qkv):
        _rotate[(triton.cdiv(tokens, tile), rotated)](
            qkv, cos, sin, qkv.stride(0), tokens, size // 2, triton.next_power_of_2(size // 2), tile
        )
    return qkv


@triton.jit
def _rotate_back(
    d, cos, sin, out, sums, token_stride, head_stride, out_stride, tokens, length, batch_stride, half, per_program,
    rotated: tl.constexpr, summed: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, block)[None, :]
    head = tl.program_id(1)
    first_sum = tl.zeros((tile, block), tl.float32)
    second_sum = tl.zeros((tile, block), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * per_program
    for start in range(begin, min(begin + per_program, tokens), tile):
        token = start + tl.arange(0, tile)[:, None]
        exists = (token < tokens) & (column < half)
        place = (token // length) * batch_stride + (token % length) * token_stride + head * head_stride + column
        first = tl.load(d + place, mask=exists, other=0.0).to(tl.float32)
        second = tl.load(d + place + half, mask=exists, other=0.0).to(tl.float32)
        to = out + token * out_stride + head * 2 * half + column
        if rotated:
            c = tl.load(cos + token * 2 * half + column, mask=exists, other=0.0).to(tl.float32)
            s = tl.load(sin + token * 2 * half + column, mask=exists, other=0.0).to(tl.float32)
            a, b = first, second
            first, second = a * c + b * s, b * c - a * s
        tl.store(to, first.to(out.dtype.element_ty), mask=exists)
        tl.store(to + half, second.to(out.dtype.element_ty), mask=exists)
        if summed:
            first_sum += first
            second_sum += second
    if summed:
        part = sums + tl.program_id(0).to(tl.int64) * out_stride + head * 2 * half + column
        tl.store(part, tl.sum(first_sum, 0, keep_dims=True), mask=column < half)
        tl.store(part + half, tl.sum(second_sum, 0, keep_dims=True), mask=column < half)


def rotate_back_(
    qkv: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, summed: bool = False
) -> tuple[Tensor, Optional[Tensor]]:
    """As pointwise.rotate_back_. dq, dk, dv: [b, heads, s, e] with any strides; qkv: contiguous."""
    b, _, s, size = dq.shape
    heads, first = [d.shape[1] for d in (dq, dk, dv)], 0
    tile, warps = (8, 1) if summed else (32, 4)
    per_program = tile * triton.cdiv(b * s, 64 * tile) if summed else tile
    programs = triton.cdiv(b * s, per_program)
    sums = dq.new_empty(programs, *qkv.shape[1:], dtype=torch.float32) if summed else qkv
    with torch.cuda.device_of(dq):
        for d, count in zip((dq, dk, dv), heads, strict=True):
            d = d if d.stride(3) == 1 else d.contiguous()
            _rotate_back[(programs, count)](
                d, cos, sin, qkv[:, first:], sums[:, first:], d.stride(2), d.stride(1), qkv.stride(0), b * s, s,
                d.stride(0), size // 2, per_program, first < sum(heads[:2]), summed,
                triton.next_power_of_2(size // 2), tile, num_warps=warps,
            )  # fmt: skip
            first += count
    return qkv, sums.flatten(1).sum(0) if summed else None


@triton.jit
def _swiglu_backward(
    gate_up, dh, sums, rows, width, tiles, per_program, summed: tl.constexpr, height: tl.constexpr, tile: tl.constexpr
):  # fmt: skip
    program = (tl.program_id(0) // tiles).to(tl.int64)  # of those that share columns; neighbours share rows
    column = (tl.program_id(0) % tiles) * tile + tl.arange(0, tile)[None, :]
    sum_of_gate = tl.zeros((height, tile), tl.float32)
    sum_of_up = tl.zeros((height, tile), tl.float32)
    first = program * per_program
    for start in range(first, min(first + per_program, rows), height):
        row = start + tl.arange(0, height)[:, None]
        exists = (row < rows) & (column < width)
        place = gate_up + row * 2 * width + column
        gate = tl.load(place, mask=exists, other=0.0).to(tl.float32)
        up = tl.load(place + width, mask=exists, other=0.0).to(tl.float32)
        d = tl.load(dh + row * width + column, mask=exists, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        silu = gate * share
        d_gate, d_up = d * up * (share + silu * (1 - share)), d * silu
        tl.store(place, d_gate.to(gate_up.dtype.element_ty), mask=exists)
        tl.store(place + width, d_up.to(gate_up.dtype.element_ty), mask=exists)
        if summed:
            sum_of_gate += d_gate
            sum_of_up += d_up
    if summed:
        part = sums + program * 2 * width + column
        tl.store(part, tl.sum(sum_of_gate, 0, keep_dims=True), mask=column < width)
        tl.store(part + width, tl.sum(sum_of_up, 0, keep_dims=True), mask=column < width)


def swiglu_backward_(gate_up: Tensor, dh: Tensor, summed: bool = False) -> tuple[Tensor, Optional[Tensor]]:
    """As pointwise.swiglu_backward_; gate_up: [m, 2f], dh: [m, f], contiguous."""
    rows, width = dh.shape
    height, tile = (4, 512) if summed else (32, 128)
    per_program = min(max(height * triton.cdiv(rows, 16 * height), ROWS), 4 * ROWS) if summed else height
    programs, tiles = triton.cdiv(rows, per_program), triton.cdiv(width, tile)
    sums = dh.new_empty(programs, 2 * width, dtype=torch.float32) if summed else dh
    with torch.cuda.device_of(dh):
        _swiglu_backward[(programs * tiles,)](gate_up, dh, sums, rows, width, tiles, per_program, summed, height, tile)
    return gate_up, sums.sum(0) if summed else None


@triton.jit
def _norm_backward(
    dy, x, rstd, weight, residual, dx, d_weight, sums, rows, size, per_program, summed: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, block)
    exists = column < size
    w = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    total = tl.zeros((block,), tl.float32)
    sum_of_dx = tl.zeros((block,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * per_program
    for row in range(first, min(first + per_program, rows)):
        place = row * size + column
        d = tl.load(dy + place, mask=exists, other=0.0).to(tl.float32)
        normed = tl.load(x + place, mask=exists, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        normed *= scale
        total += d * normed
        d *= w
        mean = tl.sum(d * normed) / size
        d = scale * (d - normed * mean) + tl.load(residual + place, mask=exists, other=0.0).to(tl.float32)
        tl.store(dx + place, d.to(dx.dtype.element_ty), mask=exists)
        if summed:
            sum_of_dx += d
    tl.store(d_weight + tl.program_id(0) * size + column, total, mask=exists)
    if summed:
        tl.store(sums + tl.program_id(0) * size + column, sum_of_dx, mask=exists)


def norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor, summed: bool = False
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """As pointwise.norm_backward, of contiguous tensors. Each program sums over rows of its own, here as above: what is
    summed in which order does not change from run to run."""
    rows, size = x.shape
    programs = min(rows, 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8)
    per_program = triton.cdiv(rows, programs)
    dx = torch.empty_like(x)
    sums = torch.empty(2 if summed else 1, programs, size, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):
        _norm_backward[(programs,)](
            dy, x, rstd, weight, residual, dx, sums[0], sums[-1], rows, size, per_program, summed, block,
            num_warps=16 if block > 4096 else 8,
        )  # fmt: skip
    d_weight, *sum_of_dx = sums.sum(1)
    return dx, d_weight, sum_of_dx[0] if summed else None


@triton.jit
def _adapter(
    t, b, bias, out, tokens, rows, rank, t_stride, out_stride, ranks: tl.constexpr, height: tl.constexpr,
    width: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)[:, None]
    row = tl.program_id(1).to(tl.int64) * width + tl.arange(0, width)[None, :]
    k = tl.arange(0, ranks)
    left = tl.load(t + token * t_stride + k[None, :], mask=(token < tokens) & (k[None, :] < rank), other=0.0)
    right = tl.load(b + row * rank + k[:, None], mask=(row < rows) & (k[:, None] < rank), other=0.0)
    total = tl.dot(left, right, out_dtype=tl.float32) + tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + row, total.to(out.dtype.element_ty), mask=(token < tokens) & (row < rows))


def adapter_(t: Tensor, b: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """As linears.adapter_, in 16 bit; b: contiguous, of 64 ranks at most. PyTorch writes the bias to a slice first, and
    reads it again to add to it."""
    (tokens, rows), rank = out.shape, b.shape[1]
    height, width = 64, 128
    with torch.cuda.device_of(t):
        _adapter[(triton.cdiv(tokens, height), triton.cdiv(rows, width))](
            t, b, bias, out, tokens, rows, rank, t.stride(0), out.stride(0), max(16, triton.next_power_of_2(rank)),
            height, width,
        )  # fmt: skip
    return out


def try_out() -> None:
    """Each kernel once, on the smallest input (accessory.kernels)."""
    x = torch.zeros(1, 16, dtype=torch.bfloat16, device="cuda")
    one = torch.ones(1, 1, device="cuda")
    rotate_(x.view(1, 1, 16).clone(), x, x, 1)
    adapter_(x, x.repeat(16, 1), x[0], x.clone())
    for summed in (False, True):
        norm_backward(x, x, one, torch.ones(16, device="cuda"), x, summed)
        swiglu_backward_(x.repeat(1, 2), x, summed)
        rotate_back_(x.new_empty(1, 3, 16), *(x.view(1, 1, 1, 16) for _ in range(3)), x, x, summed)
