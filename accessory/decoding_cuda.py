"""What stands between the linears when prompts are read, and then decoded token by token, on a GPU: five small Triton
kernels.

In plain PyTorch a block's norms, rotary embedding, cache and activation take about 40 kernels of a microsecond or two,
as long as reading its weights. Shapes: b batch, s tokens of each row, m = b * s, h heads, k key/value heads, e head
dimension, d hidden size, c the cache's capacity. Roundings are in the places of `models/llama.py`'s. Where a token
stands is read from the device, so that a captured graph can be replayed for the next one, and attention reads what is
filled, not the capacity.
"""

from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 64  # positions that a program of attention takes at once, in 16 bit
PROGRAMS = 256  # of attention, about: two for each of 132 multiprocessors


@triton.jit
def _add_norm_kernel(x, added, weight, total, normed, size, eps, adds: tl.constexpr, block: tl.constexpr):
    dtype = x.dtype.element_ty
    place = tl.arange(0, block)
    inside = place < size
    here = tl.program_id(0).to(tl.int64) * size + place  # long prompts have more than 2^31 numbers
    wide = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    if adds:
        wide += tl.load(added + here, mask=inside, other=0.0).to(tl.float32)
        wide = wide.to(dtype).to(tl.float32)
        tl.store(total + here, wide.to(dtype), mask=inside)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    weights = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + here, ((wide * scale).to(dtype).to(tl.float32) * weights).to(dtype), mask=inside)


def add_norm(x: Tensor, added: Optional[Tensor], weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, added: [m, d] -> x + added (x itself without), and its RMS norm."""
    total = x if added is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _add_norm_kernel[(len(x),)](
            x, x if added is None else added, weight, total, normed, x.shape[1], eps, added is not None,
            triton.next_power_of_2(x.shape[1]), num_warps=8,
        )  # fmt: skip
    return total, normed


@triton.jit(do_not_specialize=["tokens"])
def _rotate_kernel(
    q, k, v, cos, sin, position, rotated, keys, values, tokens, heads, kv_heads, capacity, size: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """A program for each head of q, then of k, then of v, of each token."""
    dtype = q.dtype.element_ty
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, block)
    inside = place < size
    prompt, slot = row // tokens, tl.load(position) + row % tokens
    if head >= heads + kv_heads:
        head -= heads + kv_heads
        value = tl.load(v + (row * kv_heads + head) * size + place, mask=inside)
        slot += (prompt * kv_heads + head) * capacity
        tl.store(values + slot * size + place, value, mask=inside)
    else:
        if head < heads:
            source, target = q + (row * heads + head) * size, rotated + (row * heads + head) * size
        else:
            head -= heads
            source = k + (row * kv_heads + head) * size
            slot += (prompt * kv_heads + head) * capacity
            target = keys + slot * size
        first = place < size // 2
        other = tl.load(source + tl.where(first, place + size // 2, place - size // 2), mask=inside, other=0.0)
        other = tl.where(first, -other.to(tl.float32), other.to(tl.float32))
        straight = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
        straight *= tl.load(cos + row * size + place, mask=inside, other=0.0).to(tl.float32)
        crossed = other * tl.load(sin + row * size + place, mask=inside, other=0.0).to(tl.float32)
        turned = straight.to(dtype).to(tl.float32) + crossed.to(dtype).to(tl.float32)
        tl.store(target + place, turned.to(dtype), mask=inside)


def rotate_into_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor
) -> Tensor:
    """q: [m, h * e], k and v: [m, k * e], cos and sin: [m, e] -> q rotated, [m, h, e]; k, rotated, and v are written to
    keys and values, [b, k, c, e], at position, int64 [1], and the s - 1 behind it."""
    b, kv_heads, capacity, size = keys.shape
    rotated = q.new_empty(len(q), q.shape[1] // size, size)
    with torch.cuda.device_of(q):
        _rotate_kernel[(len(q), rotated.shape[1] + 2 * kv_heads)](
            q, k, v, cos, sin, position, rotated, keys, values, len(q) // b, rotated.shape[1], kv_heads, capacity,
            size, triton.next_power_of_2(size), num_warps=1,
        )  # fmt: skip
    return rotated


@triton.jit
def _attend_kernel(
    q, keys, values, position, pad, parts, maxima, totals, capacity, kv_heads, scale, splits: tl.constexpr,
    groups: tl.constexpr, size: tl.constexpr, block_g: tl.constexpr, block_e: tl.constexpr, block_n: tl.constexpr,
):  # fmt: skip
    """One split of the positions, for the heads that share a key head: softmax(q k) v but for its denominator."""
    row, split = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(pad + row // kv_heads), tl.load(position) + 1
    share = tl.cdiv(end - begin, splits * block_n) * block_n
    start = begin + split * share
    stop = tl.minimum(start + share, end)
    g, f = tl.arange(0, block_g), tl.arange(0, block_e)
    shown = (g < groups)[:, None] & (f < size)[None, :]
    queries = tl.load(q + (row * groups + g)[:, None] * size + f[None, :], mask=shown, other=0.0)
    largest = tl.full((block_g,), float("-inf"), tl.float32)
    total = tl.zeros((block_g,), tl.float32)
    sums = tl.zeros((block_g, block_e), tl.float32)
    for first in range(start, stop, block_n):
        n = first + tl.arange(0, block_n)
        slots = (row.to(tl.int64) * capacity + n)[:, None] * size + f[None, :]
        filled = (n < stop)[:, None] & (f < size)[None, :]
        key = tl.load(keys + slots, mask=filled, other=0.0)
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where((n < stop)[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - larger[:, None])
        shrunk = tl.exp(largest - larger)
        value = tl.load(values + slots, mask=filled, other=0.0)
        sums = sums * shrunk[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * shrunk + tl.sum(weights, 1)
        largest = larger
    place = (row * splits + split) * groups + g
    tl.store(parts + place[:, None] * size + f[None, :], sums, mask=shown)
    tl.store(maxima + place, largest, mask=g < groups)
    tl.store(totals + place, total, mask=g < groups)


@triton.jit
def _merge_kernel(
    parts, maxima, totals, out, splits: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, block_e: tl.constexpr
):
    """A head's splits, weighed by their shares of the softmax's denominator."""
    head = tl.program_id(0)
    place = ((head // groups) * splits + tl.arange(0, splits)) * groups + head % groups
    f = tl.arange(0, block_e)
    largest = tl.load(maxima + place)
    weights = tl.exp(largest - tl.max(largest, 0))  # 0 for a split without positions
    total = tl.sum(weights * tl.load(totals + place), 0)
    part = tl.load(parts + place[:, None] * size + f[None, :], mask=(f < size)[None, :], other=0.0)
    merged = tl.sum(part * weights[:, None], 0) / total
    tl.store(out + head * size + f, merged.to(out.dtype.element_ty), mask=f < size)


def attend(q: Tensor, keys: Tensor, values: Tensor, position: Tensor, pad: Tensor) -> Tensor:
    """q: [b, h, e], keys and values: [b, k, c, e], filled from pad, int64 [b], up to position -> [b, h * e]."""
    b, heads, size = q.shape
    kv_heads, capacity = keys.shape[1:3]
    groups = heads // kv_heads
    splits = min(64, triton.next_power_of_2(triton.cdiv(PROGRAMS, b * kv_heads)))
    parts = q.new_empty(b * kv_heads, splits, groups, size, dtype=torch.float32)
    maxima, totals = torch.empty_like(parts[..., 0]), torch.empty_like(parts[..., 0])
    out = q.new_empty(b, heads * size)
    block_g, block_e = (max(16, triton.next_power_of_2(n)) for n in (groups, size))  # 16: the least of a tl.dot
    block_n = KEYS * 2 // q.element_size()
    with torch.cuda.device_of(q):
        _attend_kernel[(b * kv_heads, splits)](
            q, keys, values, position, pad, parts, maxima, totals, capacity, kv_heads, size**-0.5, splits, groups,
            size, block_g, block_e, block_n, num_warps=4, num_stages=2,
        )  # fmt: skip
        _merge_kernel[(b * heads,)](parts, maxima, totals, out, splits, groups, size, block_e, num_warps=4)
    return out


@triton.jit
def _swiglu_kernel(gate, up, out, count, block: tl.constexpr):
    dtype = gate.dtype.element_ty
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < count
    x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    activated = (x / (1 + tl.exp(-x))).to(dtype).to(tl.float32)
    tl.store(out + place, (activated * tl.load(up + place, mask=inside, other=0.0)).to(dtype), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    out = torch.empty_like(gate)
    with torch.cuda.device_of(gate):
        _swiglu_kernel[(triton.cdiv(gate.numel(), 1024),)](gate, up, out, gate.numel(), 1024, num_warps=4)
    return out


def try_out() -> None:
    """Run the kernels once, on the smallest input."""
    x = torch.zeros(1, 16, device="cuda", dtype=torch.bfloat16)
    cache, start = torch.zeros(1, 1, 64, 16, device="cuda", dtype=x.dtype), torch.zeros(1, device="cuda").long()
    for added in (None, x):
        add_norm(x, added, x[0].float(), 1e-5)
    attend(rotate_into_cache(x, x, x, x, x, cache, cache, start), cache, cache, start, start)
    swiglu(x, x)
