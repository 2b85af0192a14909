"""Which items meet in which step: each once an epoch, the same for every split, the same after a restart."""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest

import numpy as np
import pytest
import torch
from conftest import alpaca_items, write_data

from accessory.config import DataConfig
from accessory.data.datamodule import BatchPlan, DataModule, PlannedLoader, TokenDataset, answer_loader
from accessory.data.dataset import open_dataset

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(3, 60, size=53)
ANSWERS = RNG.integers(1, 3, size=53)

SPLITS = [(1, 1, 1), (4, 1, 1), (3, 2, 1), (2, 3, 2), (5, 4, 3), (64, 1, 1), (8, 8, 2)]
EQUAL_SPLITS = [(8, 1, 1), (4, 2, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (2, 1, 4), (1, 1, 8)]


def plan(batch_size=4, accum_iter=1, world_size=1, packing=False, seed=0, shuffle=True) -> BatchPlan:
    return BatchPlan(LENGTHS, ANSWERS, batch_size, accum_iter, world_size, 64, packing, seed, shuffle)


def micro_batches(made: BatchPlan, epoch: int) -> list[list]:
    """Per position in the epoch, the micro-batch of every rank."""
    return list(zip_longest(*(list(made.epoch(epoch, rank)) for rank in range(made.world_size))))


def steps(made: BatchPlan, epoch: int) -> list[Counter]:
    """The items that each optimizer step really sees, over all ranks and micro-batches."""
    dealt = micro_batches(made, epoch)
    return [
        Counter(
            i for ranks in dealt[s : s + made.accum_iter] for m in ranks if not m.filler for row in m.rows for i in row
        )
        for s in range(0, len(dealt), made.accum_iter)
    ]


@pytest.mark.parametrize("packing", [False, True], ids=["rows of one", "packed"])
@pytest.mark.parametrize("split", SPLITS)
def test_every_item_comes_exactly_once_an_epoch(split, packing):
    assert sum(steps(plan(*split, packing=packing), epoch=3), Counter()) == Counter(range(53))


@pytest.mark.parametrize("split", SPLITS)
def test_validation_sees_every_item_exactly_once(split):
    assert sum(steps(plan(*split, shuffle=False), epoch=0), Counter()) == Counter(range(53))


@pytest.mark.parametrize("packing", [False, True], ids=["rows of one", "packed"])
@pytest.mark.parametrize("split", EQUAL_SPLITS)
def test_global_batches_are_the_same_for_every_split_of_their_size(split, packing):
    assert steps(plan(*split, packing=packing), epoch=1) == steps(plan(8, 1, 1, packing=packing), epoch=1)


@pytest.mark.parametrize("packing", [False, True], ids=["rows of one", "packed"])
def test_epoch_is_a_function_of_seed_and_number(packing):
    first = list(plan(packing=packing, seed=5).epoch(2, 0))
    assert list(plan(packing=packing, seed=5).epoch(2, 0)) == first
    assert list(plan(packing=packing, seed=5).epoch(3, 0)) != first
    assert list(plan(packing=packing, seed=6).epoch(2, 0)) != first


@pytest.mark.parametrize("packing", [False, True], ids=["rows of one", "packed"])
@pytest.mark.parametrize("split", SPLITS)
def test_stated_number_of_micro_batches_comes_on_every_rank(split, packing):
    made = plan(*split, packing=packing)
    rows_a_step = split[0] * split[1] * split[2]
    whole, rest = divmod(made.rows, rows_a_step)
    by_hand = whole * split[1] + -(-rest // (split[0] * split[2]))
    assert made.micro_batches == by_hand
    assert made.steps == whole + bool(rest)
    assert [len(list(made.epoch(0, rank))) for rank in range(split[2])] == [by_hand] * split[2]


@pytest.mark.parametrize("split", SPLITS)
def test_no_micro_batch_is_larger_than_batch_size(split):
    assert max(len(m.rows) for ranks in micro_batches(plan(*split), 0) for m in ranks) <= split[0]


@pytest.mark.parametrize("split", SPLITS)
def test_micro_batch_states_the_answer_tokens_of_its_whole_step(split):
    made = plan(*split)
    dealt = micro_batches(made, 0)
    for number, items in enumerate(steps(made, 0)):
        expected = sum(int(ANSWERS[i]) for i in items)
        own = dealt[number * split[1] : (number + 1) * split[1]]
        assert {m.answer_tokens for ranks in own for m in ranks} == {expected}


def test_rank_without_a_row_of_the_last_step_gets_a_filler():
    """53 rows over 4 ranks of 1: the last step has one row."""
    *_, last = micro_batches(plan(1, 1, 4), 0)
    assert [m.filler for m in last] == [False, True, True, True]


def test_items_of_like_length_meet():
    """What length grouping is for: far less padding than in batches drawn at random."""
    lengths = np.random.default_rng(1).integers(3, 500, size=2000)
    made = BatchPlan(lengths, np.ones_like(lengths), 8, 1, 1, 512, False, seed=0)
    padded = sum(len(rows) * max(lengths[row].sum() for row in rows) for rows in made.global_batches(0))
    drawn = np.random.default_rng(2).permutation(lengths).reshape(-1, 8)
    assert padded < 1.1 * lengths.sum()
    assert 8 * drawn.max(axis=1).sum() > 1.5 * lengths.sum()


# --- tensors ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(data_yaml) -> DataConfig:
    return DataConfig(data_config=str(data_yaml), max_words=256, num_workers=0, val_fraction=0.2)


def test_batch_holds_the_items_of_its_micro_batch(config, tokenizer):
    items, _, _ = open_dataset(config.data_config, config, tokenizer)
    made = BatchPlan(np.array(items["length"]), np.array(items["answer_tokens"]), 4, 1, 1, 256, False, seed=0)
    micro = next(made.epoch(0, 0))
    batch = TokenDataset(items, width=None, pad_id=2)[micro]
    assert batch["items"] == [row[0] for row in micro.rows]
    for row, (i,) in enumerate(micro.rows):
        length = items[i]["length"]
        assert batch["input_ids"][row].tolist() == items[i]["input_ids"] + [2] * (batch["input_ids"].shape[1] - length)
        assert batch["targets"][row, : length - 1].tolist() == items[i]["labels"][1:]
        assert batch["targets"][row, length - 1 :].eq(-100).all()
    assert batch["tokens"] == sum(items[i]["length"] for (i,) in micro.rows)
    assert batch["answer_tokens"] == batch["targets"].ne(-100).sum()


def test_filler_row_counts_nothing(config, tokenizer):
    items, _, _ = open_dataset(config.data_config, config, tokenizer)
    made = BatchPlan(np.array(items["length"]), np.array(items["answer_tokens"]), 1, 1, 7, 256, False, seed=0)
    filler = next(micro for micro in made.epoch(0, 6) if micro.filler)
    batch = TokenDataset(items, width=None, pad_id=2)[filler]
    assert batch["targets"].eq(-100).all()
    assert batch["tokens"] == 0
    assert batch["answer_tokens"] > 0


def test_packed_batches_all_have_the_width_max_words(config, tokenizer):
    config.packing = True
    module = DataModule(config, tokenizer, 2, 1, 1, 0, seed=0)
    assert {tuple(batch["input_ids"].shape) for batch in list(module.train_dataloader())[:-1]} == {(2, 256)}


# --- the data module -------------------------------------------------------------------------------------------------


def test_training_and_validation_share_out_all_items(config, tokenizer):
    module = DataModule(config, tokenizer, 4, 1, 1, 0, seed=0)
    items, _, _ = open_dataset(config.data_config, config, tokenizer)
    parts = [tuple(row["input_ids"]) for part in (module.train_items, module.val_items) for row in part]
    assert (len(module.train_items), len(module.val_items)) == (32, 8)
    assert Counter(parts) == Counter(tuple(row["input_ids"]) for row in items)


def test_validation_split_depends_on_the_seed_only(config, tokenizer):
    one, same, other = (
        DataModule(config, tokenizer, batch_size, 1, 1, 0, seed=seed).val_items.to_list()
        for batch_size, seed in ((4, 0), (2, 0), (4, 1))
    )
    assert one == same
    assert one != other


def test_val_config_leaves_all_items_to_training(config, tokenizer, tmp_path):
    config.val_config = str(write_data(tmp_path / "val", alpaca_items(5)))
    module = DataModule(config, tokenizer, 4, 1, 1, 0, seed=0)
    assert (len(module.train_items), len(module.val_items)) == (40, 5)
    assert module.val_report.line() == "5 items"


def test_val_fraction_0_means_no_validation(config, tokenizer):
    config.val_fraction = 0.0
    module = DataModule(config, tokenizer, 4, 1, 1, 0, seed=0)
    assert len(module.train_items) == 40
    assert len(module.val_dataloader()) == 0


def test_answer_loader_gives_every_item_once_by_length(config, tokenizer):
    drawn = [i for batch in answer_loader(config, tokenizer, batch_size=6) for i in batch["items"]]
    lengths = open_dataset(config.data_config, config, tokenizer)[0]["length"]
    assert sorted(drawn) == list(range(40))
    assert [lengths[i] for i in drawn] == sorted(lengths)


# --- resuming --------------------------------------------------------------------------------------------------------


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key] for key, value in one.items()
    )


def loader_of(config, tokenizer) -> PlannedLoader:
    return DataModule(config, tokenizer, 4, 2, 1, 0, seed=0).train_dataloader()


@pytest.mark.parametrize(("done", "workers"), [(0, 0), (1, 0), (3, 0), (7, 0), (3, 1)])
def test_resumed_loader_gives_exactly_the_remaining_batches(done, workers, config, tokenizer):
    config.num_workers = workers
    whole = loader_of(config, tokenizer)
    whole.sampler.set_epoch(1)
    expected = list(whole)
    whole.position = (1, done)

    resumed = loader_of(config, tokenizer)
    resumed.load_state_dict(whole.state_dict())
    resumed.sampler.set_epoch(1)  # Lightning calls it before every epoch, also the one it resumes
    batches = list(resumed)
    assert len(expected) == 8
    assert len(batches) == 8 - done
    assert all(map(equal, batches, expected[done:]))

    resumed.sampler.set_epoch(2)
    whole.sampler.set_epoch(2)
    assert all(map(equal, list(resumed), list(whole)))


def test_loader_resumed_after_the_last_batch_starts_the_next_epoch(config, tokenizer):
    whole = loader_of(config, tokenizer)
    whole.sampler.set_epoch(1)
    expected = list(whole)
    resumed = loader_of(config, tokenizer)
    resumed.load_state_dict({"epoch": 0, "done": 8})
    resumed.sampler.set_epoch(1)
    batches = list(resumed)
    assert len(batches) == len(expected) == 8
    assert all(map(equal, batches, expected))
