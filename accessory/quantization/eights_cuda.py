"""Eight codes at a time on a GPU: the weights of a word in a thread's registers, and NF4's values without a load each.

A table in memory costs an address (64 bits of arithmetic) and a load a weight, more than all else that is done to it.
Instead every thread of a warp holds one of the 16 values, and a code asks the thread of its number for it: a shift and
a shuffle. That is PTX, which Triton passes on as it is; where that does not compute what the table does (`shuffles`:
another vendor's GPU, the interpreter), the table is read.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from bitsandbytes.functional import get_4bit_type
from torch import Tensor

# What holds eight codes of so many bits: one of these, of 3 bits three.
UNITS = {2: torch.int16, 3: torch.uint8, 4: torch.int32, 8: torch.int64}

_LANES = "{ .reg .b32 lane, value, code; .reg .b64 place;"
_HOLD = "mov.u32 lane, %laneid; and.b32 lane, lane, 15; mad.wide.u32 place, lane, 4, $9;"
_READ = "ld.global.nc.b32 value, [place];"
# Of the lower four bits of `code` alone: a warp's halves are segments of 16 (0x101f), each with the whole table.
_ASK = "shr.u32 code, $8, {shift}; shfl.sync.idx.b32 ${weight}, value, code, 0x101f, 0xffffffff;"
# The first weight of a byte is in its upper half.
_EIGHT = " ".join(_ASK.format(shift=4 * (weight ^ 1), weight=weight) for weight in range(8))
PTX = tl.constexpr(f"{_LANES} {_HOLD} {_READ} {_EIGHT} }}")
CONSTRAINTS = tl.constexpr("=f,=f,=f,=f,=f,=f,=f,=f,r,l")


@triton.jit
def eight_values(word, values, shuffle: tl.constexpr):
    """word: int32 [...], eight codes in bitsandbytes' order; values: of the 16 codes, fp32 in memory -> eight tensors
    fp32 [...], in the order of the weights. No branch that only some of a warp's threads take may stand around it."""
    if shuffle:
        place = values.to(tl.int64)
        return tl.inline_asm_elementwise(PTX, CONSTRAINTS, [word, place], (tl.float32,) * 8, is_pure=True, pack=1)
    found = ()
    for i in tl.static_range(8):
        code = (word.to(tl.uint32, bitcast=True) >> (i ^ 1) * 4) & 15
        found = found + (tl.load(values + code),)  # noqa: RUF005
    return found


@triton.jit
def eights_of_tile(rows: tl.constexpr, columns: tl.constexpr):
    """Row of each of a tile's eights, and its number in that row: int32 [rows * columns / 8] each.

    In one dimension, and for all the compiler knows no two of them are neighbours: it would let a thread load four
    words at once, and then pass the weights through shared memory to get them to where a warp writes side by side."""
    here = tl.max_contiguous(tl.arange(0, rows * columns // 8), 1)
    return here // (columns // 8), here % (columns // 8)


@triton.jit
def joined(w0, w1, w2, w3, w4, w5, w6, w7, rows: tl.constexpr, columns: tl.constexpr):
    """Eight tensors [rows * columns / 8], of a tile's eights -> [rows, columns], in which they take turns: a thread's
    eight lie together."""
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.reshape(tl.join(even, odd), (rows, columns))


@triton.jit
def _both_ways(words, values, out, count: tl.constexpr):
    place = tl.arange(0, count)
    word = tl.load(words + place)
    shuffled, read = eight_values(word, values, True), eight_values(word, values, False)
    for i in tl.static_range(8):
        tl.store(out + i * count + place, shuffled[i])
        tl.store(out + (8 + i) * count + place, read[i])


@functools.cache
def shuffles() -> bool:
    """Whether the PTX computes here what the table does; tried once, so not first while a CUDA graph is captured."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    count = 1024
    words = (torch.arange(count, device="cuda") * 0x9E3779B1).to(torch.int32)  # no draw of a run's generator
    out = torch.zeros(2, 8, count, device="cuda")
    try:
        _both_ways[(1,)](words, values_of_codes(words.device), out, count)
    except Exception:  # of Triton or ptxas
        return False
    return torch.equal(*out)


@functools.cache
def values_of_codes(device: torch.device) -> Tensor:
    """What the 16 codes stand for: fp32 [16]."""
    return get_4bit_type("nf4", device=device)
