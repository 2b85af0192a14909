"""Digests of weights: what changes them."""

from __future__ import annotations

import pytest
import torch

import accessory.digest as digest_module
from accessory.digest import digest


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.bfloat16, torch.int32])
def test_every_single_bit_counts(dtype, monkeypatch):
    monkeypatch.setattr(digest_module, "CHUNK", 3)
    raw = torch.randint(0, 256, (60,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = {digest(raw.view(dtype))}
    for position in range(60):
        for bit in range(8):
            changed = raw.clone()
            changed[position] ^= 1 << bit
            found.add(digest(changed.view(dtype)))
    assert len(found) == 1 + 60 * 8


def test_changes_of_two_words_do_not_cancel():
    """Two signs turned, which a weighted sum of the words would not see."""
    tensor = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {digest(tensor)}
    for i in range(64):
        for j in range(i):
            changed = tensor.clone()
            changed[[i, j]] *= -1
            found.add(digest(changed))
    assert len(found) == 1 + 64 * 63 // 2


def test_order_counts_and_chunks_do_not(monkeypatch):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = digest(tensor)
    assert digest(tensor.flip(0)) != whole
    assert digest(torch.cat([tensor[2:4], tensor[:2], tensor[4:]])) != whole
    monkeypatch.setattr(digest_module, "CHUNK", 7)
    assert digest(tensor) == whole
