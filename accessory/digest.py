"""A cheap digest of tensors of gigabytes, computed on the device where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**22  # words at a time: 32 MiB, and two temporary tensors of that size


def digest(tensor: Tensor) -> int:
    """64 bits of a tensor's bytes, computed where it lies: the sum, modulo 2^64, of its 8-byte words, each mixed with
    its position by a bijection. So a change of one word always shows; other changes escape with chance 2^-64."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.numel() % 8:
        raw = torch.cat([raw, raw.new_zeros(-raw.numel() % 8)])
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    for i, words in enumerate(raw.view(torch.int64).split(CHUNK)):
        positions = torch.arange(i * CHUNK, i * CHUNK + words.numel(), device=words.device)
        total += _mix(_mix(positions).bitwise_xor_(words)).sum()
    return total.item()


def _mix(words: Tensor) -> Tensor:
    """splitmix64's output function on int64, which wraps around, in place."""
    words.add_(-0x61C8864680B583EB)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        words.bitwise_xor_(_shifted(words, shift)).mul_(factor)
    return words.bitwise_xor_(_shifted(words, 31))


def _shifted(words: Tensor, bits: int) -> Tensor:
    """To the right, zeros following: torch's own shift draws copies of the sign, and mixing would forget that bit."""
    return (words >> bits).bitwise_and_((1 << 64 - bits) - 1)
