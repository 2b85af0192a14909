"""Packing changes the shape of a batch and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from accessory.assemble import assemble
from accessory.config import ModelConfig, QuantizationConfig, QuantMethod, RecipeConfig
from accessory.data.packing import IGNORE, IMAGE_SLOT, WINDOW, collate, insert_image, pack, row_width, share_rows
from accessory.fused.graph import MOST
from accessory.models.llama import Segments
from accessory.module import batch_loss

LENGTHS = {
    "mixed": np.random.default_rng(0).integers(1, 65, size=500),
    "all short": np.full(100, 3),
    "all full": np.full(20, 64),
    "more than a window": np.random.default_rng(1).integers(1, 65, size=WINDOW + 300),
    "one item": np.array([64]),
}


@pytest.fixture(params=LENGTHS)
def lengths(request) -> np.ndarray:
    return LENGTHS[request.param]


def rows_of(lengths: np.ndarray) -> list[list[int]]:
    return pack(lengths, np.random.default_rng(2).permutation(len(lengths)), capacity=64)


def test_no_row_exceeds_the_capacity(lengths):
    assert max(lengths[row].sum() for row in rows_of(lengths)) <= 64


def test_every_item_is_in_exactly_one_row(lengths):
    assert sorted(item for row in rows_of(lengths) for item in row) == list(range(len(lengths)))


def test_rows_of_short_items_are_nearly_full():
    """One item a row would fill a quarter of the space."""
    lengths = np.random.default_rng(4).integers(1, 33, size=500)
    assert lengths.sum() / (64 * len(lengths)) < 0.3
    assert lengths.sum() / (64 * len(rows_of(lengths))) > 0.98


def test_order_decides_which_items_meet():
    lengths = np.random.default_rng(3).integers(1, 65, size=3 * WINDOW)
    one, other = (pack(lengths, np.random.default_rng(seed).permutation(len(lengths)), 64) for seed in (0, 1))
    assert {frozenset(row) for row in one} != {frozenset(row) for row in other}


# --- collate ---------------------------------------------------------------------------------------------------------

A = ([1, 10, 11, 12], [-100, -100, 11, 12])
B = ([1, 20, 21], [-100, 20, 21])
C = ([1, 30], [-100, 30])


def test_batch_has_each_items_ids_positions_and_next_labels():
    batch = collate([[A, B], [C]], width=8, pad_id=2)
    assert batch["input_ids"].tolist() == [[1, 10, 11, 12, 1, 20, 21, 2], [1, 30, 2, 2, 2, 2, 2, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 0, 0, 0, 0, 0]]
    assert batch["bounds"].tolist() == [0, 4, 7, 8, 10] + [16] * 11  # items, and the padding behind them
    assert batch["targets"].tolist() == [
        [-100, 11, 12, -100, 20, 21, -100, -100],
        [30, -100, -100, -100, -100, -100, -100, -100],
    ]


def test_first_token_of_an_item_is_never_a_target_of_the_item_before():
    learnt_from_the_start = ([40, 41], [40, 41])
    batch = collate([[A, learnt_from_the_start]], width=6, pad_id=2)
    assert batch["targets"].tolist() == [[-100, 11, 12, -100, 41, -100]]


def test_mask_lets_a_token_see_itself_and_what_stands_before_it_in_its_item():
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1], [0, 1, 1, 1, 2, 2, 3, 3]])
    bounds = torch.tensor([0, 3, 5, 6, 8, 9, 12, 14, 16, 16, 16], dtype=torch.int32)
    mask = Segments(bounds, 8).matrix(2, 8)
    assert mask.shape == (2, 1, 8, 8)
    for row in range(2):
        for query in range(8):
            for key in range(8):
                expected = key <= query and bool(segments[row, query] == segments[row, key])
                assert mask[row, 0, query, key] == expected


def test_items_of_a_micro_batch_share_as_few_rows_as_they_fit_into():
    lengths = {7: 5, 3: 9, 4: 2, 9: 4, 1: 1}
    rows = share_rows([7, 3, 4, 9, 1], lengths, capacity=10)
    assert sorted(item for row in rows for item in row) == [1, 3, 4, 7, 9]
    assert all(sum(lengths[item] for item in row) <= 10 for row in rows)
    assert len(rows) == 3  # 21 tokens


@pytest.mark.parametrize("longest", [64, 512, 2048])
def test_a_single_rows_width_is_little_more_than_its_tokens_and_one_of_few(longest):
    capacity = 16 * longest
    widths = {tokens: row_width(tokens, capacity, longest) for tokens in range(1, capacity + 1)}
    assert all(0 <= width - tokens < max(128, tokens / 8) for tokens, width in widths.items())
    assert all(width - tokens <= longest and width <= capacity for tokens, width in widths.items())
    assert len(set(widths.values())) <= MOST


def test_image_stands_behind_the_first_token():
    assert insert_image([1, 10, 11], 3, IMAGE_SLOT) == [1, -1, -1, -1, 10, 11]
    assert insert_image([1], 2, IGNORE) == [1, -100, -100]


def test_slots_stay_with_their_item_and_are_never_learnt():
    """The first text token is predicted at the last slot, the image's end."""
    caption = ([1, 50, 51], [-100, 50, 51])  # learnt from its first token on
    items = [A, *((insert_image(ids, 4, IMAGE_SLOT), insert_image(labels, 4, IGNORE)) for ids, labels in (caption, B))]
    batch = collate([items], width=20, pad_id=2)
    assert batch["input_ids"].tolist() == [[1, 10, 11, 12, 1, -1, -1, -1, -1, 50, 51, 1, -1, -1, -1, -1, 20, 21, 2, 2]]
    assert batch["bounds"].tolist() == [0, 4, 11, 18] + [20] * 12
    assert batch["position_ids"].tolist() == [[*range(4), *range(7), *range(7), 0, 0]]
    learnt = {i: target for i, target in enumerate(batch["targets"][0].tolist()) if target != IGNORE}
    assert learnt == {1: 11, 2: 12, 8: 50, 9: 51, 15: 20, 16: 21}


# --- the same loss and gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["none", "nf4"])
def test_packed_row_gives_the_loss_and_gradients_of_its_items_one_by_one(method, meta_folder):
    model = assemble(
        ModelConfig(pretrained_path=[str(meta_folder)]),
        QuantizationConfig(method=QuantMethod(method)),
        RecipeConfig(lora=True, rank=4),
        torch.device("cpu"),
        torch.float32,
    )
    trainables = {name: p for name, p in model.named_parameters() if p.requires_grad}
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in trainables.items():
            if "lora_B" in name:  # zero at first, which would leave lora_A without a gradient
                parameter.normal_(std=0.1, generator=g)
    items = []
    for length, prompt in ((9, 4), (5, 1), (14, 10), (2, 1)):
        ids = torch.randint(3, 384, (length,), generator=g).tolist()
        items.append((ids, [-100] * prompt + ids[prompt:]))

    one_by_one = torch.zeros(())
    for ids, labels in items:  # through the public logits and torch's own loss
        logits = model(torch.tensor([ids]))[0]
        one_by_one = one_by_one + F.cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="sum")
    expected = torch.autograd.grad(one_by_one, list(trainables.values()))

    packed = batch_loss(model, collate([items[:3], items[3:]], width=32, pad_id=2))
    gradients = torch.autograd.grad(packed, list(trainables.values()))

    assert packed.item() == pytest.approx(one_by_one.item(), rel=1e-5)
    for name, gradient, reference in zip(trainables, gradients, expected, strict=True):
        scale = reference.abs().max().item()
        assert scale > 0, name
        assert (gradient - reference).abs().max().item() < 1e-5 * scale, name
