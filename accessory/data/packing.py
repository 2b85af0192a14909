"""Rows of a batch: one item each, or several packed behind each other.

Packing fills rows of `max_words` tokens with whole items (first-fit-decreasing, within shuffled windows). Position ids
restart with each item and attention stays inside it (`bounds`), so a packed row gives the losses and gradients of its
items run apart. `share_rows` does the same with the items of one micro-batch, where the batch is to stay what it is;
a single row is then as wide as it needs to be (`row_width`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
IMAGE_SLOT = -1  # in input_ids where the model puts a vector of an image (query or tag); no tokenizer has this id
BOUNDS = 16  # their number is rounded up to a multiple, so that few shapes occur, as with
WIDTHS = 128  # a single row's width; with more tokens
EIGHTHS = 8  # of a power of two are enough
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


def share_rows(items: list[int], lengths: dict[int, int], capacity: int) -> list[list[int]]:
    """The items of a micro-batch -> as few rows of at most `capacity` tokens as first-fit-decreasing finds."""
    sizes = np.array([lengths[item] for item in items])
    rows = _first_fit(np.argsort(-sizes, kind="stable"), sizes, capacity)
    return [[items[i] for i in row] for row in rows]


def row_width(tokens: int, capacity: int, longest: int) -> int:
    """Width of a single row: tokens, rounded up so that few shapes occur; at most capacity. The padding is never longer
    than an item may be: attention takes it for one."""
    power_of_two = 2 ** (tokens.bit_length() - 1)
    step = min(max(WIDTHS, power_of_two // EIGHTHS), longest)
    return min(capacity, -(-tokens // step) * step)


def collate(
    rows: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], width: int, pad_id: int
) -> dict[str, Tensor]:
    """Rows of (input_ids, labels) items -> tensors, int64 [rows, width].

    targets: the label of the *next* token within the same item, -100 where nothing is learnt;
    position_ids: restart with each item; bounds: int32 [n + 1], where the items begin (and the padding behind them, as
    if it were one), counted over all rows; at the end, once or more, the number of all tokens.
    """
    shape = len(rows), width
    input_ids = torch.full(shape, pad_id)
    targets = torch.full(shape, IGNORE)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    starts = []
    for r, row in enumerate(rows):
        start = 0
        for ids, labels in row:
            end = start + len(ids)
            input_ids[r, start:end] = torch.as_tensor(np.asarray(ids, dtype=np.int64))
            targets[r, start : end - 1] = torch.as_tensor(np.asarray(labels, dtype=np.int64)[1:])
            position_ids[r, start:end] = torch.arange(end - start)
            starts.append(r * width + start)
            start = end
        if start < width:
            starts.append(r * width + start)
    bounds = torch.full((-(-(len(starts) + 1) // BOUNDS) * BOUNDS,), len(rows) * width, dtype=torch.int32)
    bounds[: len(starts)] = torch.tensor(starts, dtype=torch.int32)
    return {"input_ids": input_ids, "targets": targets, "position_ids": position_ids, "bounds": bounds}
