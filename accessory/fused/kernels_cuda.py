"""Triton kernels for the pointwise functions where torch.compile's were measurably slower or took more memory.

In a profiled step of 8,192 tokens through LLaMA2-7B's 32 blocks on an H200 (torch 2.11), ms here and by torch.compile:
SwiGLU's gradient 7.0 and 12.3, the norms' 5.7 and 8.8, rotary embedding 2.3 and 3.8, its gradient 3.5 and 6.8.
`scripts/benchmark_kernels.py` times each call beside the library's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
    d, cos, sin, out, token_stride, head_stride, out_stride, tokens, length, batch_stride, half,
    rotated: tl.constexpr, block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)[:, None]
    column = tl.arange(0, block)[None, :]
    exists = (token < tokens) & (column < half)
    head = tl.program_id(1)
    place = (token // length) * batch_stride + (token % length) * token_stride + head * head_stride + column
    first = tl.load(d + place, mask=exists, other=0.0)
    second = tl.load(d + place + half, mask=exists, other=0.0)
    to = out + token * out_stride + head * 2 * half + column
    if rotated:
        c = tl.load(cos + token * 2 * half + column, mask=exists, other=0.0).to(tl.float32)
        s = tl.load(sin + token * 2 * half + column, mask=exists, other=0.0).to(tl.float32)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first = (a * c + b * s).to(out.dtype.element_ty)
        second = (b * c - a * s).to(out.dtype.element_ty)
    tl.store(to, first, mask=exists)
    tl.store(to + half, second, mask=exists)


def rotate_back_(qkv: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As pointwise.rotate_back_. dq, dk, dv: [b, heads, s, e] with any strides; qkv: contiguous."""
    b, _, s, size = dq.shape
    heads, out = [d.shape[1] for d in (dq, dk, dv)], qkv
    tile, first = 16, 0
    with torch.cuda.device_of(dq):
        for d, count in zip((dq, dk, dv), heads, strict=True):
            d = d if d.stride(3) == 1 else d.contiguous()
            _rotate_back[(triton.cdiv(b * s, tile), count)](
                d, cos, sin, out[:, first:], d.stride(2), d.stride(1), out.stride(0), b * s, s, d.stride(0),
                size // 2, first < sum(heads[:2]), triton.next_power_of_2(size // 2), tile,
            )  # fmt: skip
            first += count
    return out


@triton.jit
def _swiglu_backward(gate_up, dh, width, tile: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    exists = column < width
    place = gate_up + row * 2 * width + column
    gate = tl.load(place, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=exists, other=0.0).to(tl.float32)
    d = tl.load(dh + row * width + column, mask=exists, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    tl.store(place, (d * up * (share + silu * (1 - share))).to(gate_up.dtype.element_ty), mask=exists)
    tl.store(place + width, (d * silu).to(gate_up.dtype.element_ty), mask=exists)


def swiglu_backward_(gate_up: Tensor, dh: Tensor) -> Tensor:
    """gate_up: [m, 2f], dh: [m, f], contiguous. Writes the gradient of gate_up over it."""
    rows, width = dh.shape
    tile = 1024
    with torch.cuda.device_of(dh):
        _swiglu_backward[(rows, triton.cdiv(width, tile))](gate_up, dh, width, tile)
    return gate_up


@triton.jit
def _norm_backward(
    dy, x, rstd, weight, residual, dx, d_weight, rows, size, per_program, block: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, block)
    exists = column < size
    w = tl.load(weight + column, mask=exists, other=0.0).to(tl.float32)
    total = tl.zeros((block,), tl.float32)
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
    tl.store(d_weight + tl.program_id(0) * size + column, total, mask=exists)


def norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """As pointwise.norm_backward, of contiguous tensors. Each program sums the weight's gradient over rows of its own:
    what is summed in which order does not change from run to run."""
    rows, size = x.shape
    programs = min(rows, 4 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8)
    per_program = triton.cdiv(rows, programs)
    dx = torch.empty_like(x)
    sums = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):
        _norm_backward[(programs,)](
            dy, x, rstd, weight, residual, dx, sums, rows, size, per_program, block, num_warps=16 if block > 4096 else 8
        )
    return dx, sums.sum(0)


def try_out() -> None:
    """Each kernel once, on the smallest input (accessory.kernels)."""
    x = torch.zeros(1, 16, dtype=torch.bfloat16, device="cuda")
    one = torch.ones(1, 1, device="cuda")
    norm_backward(x, x, one, torch.ones(16, device="cuda"), x)
    swiglu_backward_(x.repeat(1, 2), x)
    rotate_(x.view(1, 1, 16).clone(), x, x, 1)
    rotate_back_(x.new_empty(1, 3, 16), *(x.view(1, 1, 1, 16) for _ in range(3)), x, x)
