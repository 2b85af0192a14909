"""Rows of a batch: one item each, or several packed behind each other.

Packing fills rows of `max_words` tokens with whole items (first-fit-decreasing, within shuffled windows). Position ids
restart with each item and attention stays inside it (a block-diagonal mask from segment ids), so a packed row gives the
losses and gradients of its items run apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
IMAGE_SLOT = -1  # in input_ids where the model puts a vector of an image (query or tag); no tokenizer has this id
WINDOW = 2048  # items packed together: large enough to fill rows, small enough to keep the order random


def insert_image(ids: list[int], words: int, fill: int) -> list[int]:
    """`words` positions of `fill` behind the first token, BOS: IMAGE_SLOT in input_ids, IGNORE in labels."""
    return ids[:1] + [fill] * words + ids[1:]


def pack(lengths: np.ndarray, order: np.ndarray, capacity: int) -> list[list[int]]:
    """Item indices -> rows whose lengths sum to at most `capacity`.

    lengths: int [items]; order: a permutation of the items. No item is longer than capacity.
    """
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        rows += _first_fit(window[np.argsort(-lengths[window], kind="stable")], lengths, capacity)
    return rows


def _first_fit(items: np.ndarray, lengths: np.ndarray, capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free = np.empty(len(items), dtype=np.int64)
    for item in items:
        fits = np.flatnonzero(free[: len(rows)] >= lengths[item])
        if len(fits):
            row = int(fits[0])
        else:
            row = len(rows)
            rows.append([])
            free[row] = capacity
        rows[row].append(int(item))
        free[row] -= lengths[item]
    return rows


def collate(
    rows: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], width: int, pad_id: int
) -> dict[str, Tensor]:
    """Rows of (input_ids, labels) items -> tensors, int64 [rows, width].

    targets: the label of the *next* token within the same item, -100 where nothing is learnt;
    position_ids: restart with each item; segment_ids: which item of its row a token belongs to, -1 for padding.
    """
    shape = len(rows), width
    input_ids = torch.full(shape, pad_id)
    targets = torch.full(shape, IGNORE)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    segment_ids = torch.full(shape, -1)
    for r, row in enumerate(rows):
        start = 0
        for segment, (ids, labels) in enumerate(row):
            end = start + len(ids)
            input_ids[r, start:end] = torch.as_tensor(np.asarray(ids, dtype=np.int64))
            targets[r, start : end - 1] = torch.as_tensor(np.asarray(labels, dtype=np.int64)[1:])
            position_ids[r, start:end] = torch.arange(end - start)
            segment_ids[r, start:end] = segment
            start = end
    return {"input_ids": input_ids, "targets": targets, "position_ids": position_ids, "segment_ids": segment_ids}


def block_diagonal_mask(segment_ids: Tensor) -> Tensor:
    """segment_ids: int64 [b, s] -> bool [b, 1, s, s]: causal, and only within a segment."""
    s = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return (same & torch.ones(s, s, dtype=torch.bool, device=segment_ids.device).tril()).unsqueeze(1)
