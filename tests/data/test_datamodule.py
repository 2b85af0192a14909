"""Which items meet in which step: each once an epoch, the same for every split, the same after a restart."""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import alpaca_items, write_data
from pictures import save
from PIL import Image

from accessory.config import BadImages, DataConfig, ImageTransform
from accessory.data.datamodule import DataModule, PlannedLoader, TokenDataset, answer_loader
from accessory.data.dataset import open_dataset
from accessory.data.images import ImageInput, load_pixels, resized_center_crop, to_pixels
from accessory.data.packing import IMAGE_SLOT
from accessory.data.plan import BatchPlan
from accessory.errors import UserError

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
    def rows(seed: int, epoch: int) -> list:
        return [micro.rows for micro in plan(packing=packing, seed=seed).epoch(epoch, 0)]

    assert rows(5, 2) == rows(5, 2)
    assert rows(5, 3) != rows(5, 2)
    assert rows(6, 2) != rows(5, 2)


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


@pytest.mark.parametrize("one_row", [False, True])
def test_padding_free_batches_hold_their_items_in_few_rows_or_in_one(one_row, config, tokenizer):
    module = DataModule(config, tokenizer, 8, 1, 1, 0, seed=0, padding_free=True, one_row=one_row)
    drawn = []
    for batch in module.train_dataloader():
        rows, width = batch["input_ids"].shape
        assert (rows == 1) == one_row
        assert batch["tokens"] <= rows * width
        assert rows * width < batch["tokens"] + 256 if one_row else width <= 256
        sizes, longest = batch["bounds"].diff(), batch["longest"]
        assert sizes.sum() == rows * width and sizes.max() <= longest <= 256
        flat = batch["input_ids"].flatten().tolist()
        parts = Counter(tuple(flat[a:b]) for a, b in batch["bounds"].unfold(0, 2, 1).tolist() if b > a)
        padding = parts - Counter(tuple(module.train_items[i]["input_ids"]) for i in batch["items"])
        assert parts.total() - padding.total() == len(batch["items"])
        assert padding.total() <= rows and all(set(part) == {module.pad_id} for part in padding)
        drawn += batch["items"]
    assert sorted(drawn) == list(range(32))


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


def test_a_missing_val_config_is_not_taken_for_data_config(config, tokenizer):
    config.val_config = "nowhere.yaml"
    with pytest.raises(UserError, match=r"^data\.val_config nowhere\.yaml: no such file"):
        DataModule(config, tokenizer, 4, 1, 1, 0, seed=0)


def test_val_fraction_0_means_no_validation(config, tokenizer):
    config.val_fraction = 0.0
    module = DataModule(config, tokenizer, 4, 1, 1, 0, seed=0)
    assert len(module.train_items) == 40
    assert len(module.val_dataloader()) == 0


def test_a_limit_takes_validation_items_evenly_and_leaves_training_as_it_is(config, tokenizer, tmp_path):
    config.val_config = str(write_data(tmp_path / "val", alpaca_items(25)))
    whole = DataModule(config, tokenizer, 4, 1, 1, 0, seed=0)
    for limit, expected in ((4, [0, 6, 12, 18]), (25, range(25)), (99, range(25))):
        config.val_items = limit
        module = DataModule(config, tokenizer, 4, 1, 1, 0, seed=0)
        assert module.val_items["input_ids"][:] == [whole.val_items[i]["input_ids"] for i in expected]
        assert sorted(i for batch in module.val_dataloader() for i in batch["items"]) == list(range(len(expected)))
        assert len(module.train_items) == 40 and module.train_plan.rows == whole.train_plan.rows


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


# --- images ----------------------------------------------------------------------------------------------------------

IMAGES = ImageInput(size=16, words=6)


@pytest.fixture
def image_config(tmp_path) -> DataConfig:
    """30 items; every third has no image."""
    items = alpaca_items(30)
    for i, item in enumerate(items):
        if i % 3:
            item["image"] = save(tmp_path / "images" / f"{i}.png", 100, 96, seed=i)
    path = write_data(tmp_path / "data", items)
    return DataConfig(data_config=str(path), max_words=256, num_workers=0, val_fraction=0.2)


def module_of(config, tokenizer, batch_size=4, accum_iter=1, world_size=1, rank=0, seed=0) -> DataModule:
    return DataModule(config, tokenizer, batch_size, accum_iter, world_size, rank, seed, IMAGES)


def pixels_by_item(loader: PlannedLoader, rows, epoch: int = 0) -> dict[int, torch.Tensor]:
    """item -> its pixels in an epoch, told by the order of items and slots alone."""
    loader.sampler.set_epoch(epoch)
    found = {}
    for batch in loader:
        have = [i for i in batch["items"] if rows[i]["image"]]
        assert len(have) == len(batch.get("images", ()))
        found |= dict(zip(have, batch.get("images", ()), strict=True))
    return found


@pytest.mark.parametrize("packing", [False, True], ids=["rows of one", "packed"])
def test_validation_images_stand_in_the_order_of_their_slots(packing, image_config, tokenizer):
    image_config.packing = packing
    image_config.val_config = image_config.data_config
    module = module_of(image_config, tokenizer)
    with_image = 0
    for batch in module.val_dataloader():
        runs = []  # (row, start) of each block of slots, row by row
        for row, ids in enumerate(batch["input_ids"].tolist()):
            runs += [(row, i) for i, token in enumerate(ids) if token == IMAGE_SLOT and ids[i - 1] != IMAGE_SLOT]
        assert (batch["input_ids"] == IMAGE_SLOT).sum() == 6 * len(runs)
        items = [module.val_items[i] for i in batch["items"] if module.val_items[i]["image"]]
        assert len(items) == len(runs) == len(batch.get("images", ()))
        for (row, start), item, pixels in zip(runs, items, batch.get("images", ()), strict=True):
            ids = batch["input_ids"][row, start - 1 : start - 1 + item["length"]].tolist()
            assert ids == item["input_ids"]
            assert pixels.equal(to_pixels(resized_center_crop(Image.open(item["image"]), 16)))
            with_image += 1
    assert with_image == 20


def test_batch_of_text_alone_has_no_images(image_config, tokenizer):
    batches = list(answer_loader(image_config, tokenizer, 1, IMAGES))
    assert Counter("images" in batch for batch in batches) == {True: 20, False: 10}
    assert all(batch["unreadable"] == [] for batch in batches)


def test_language_only_batch_knows_nothing_of_images(config, tokenizer):
    for batch in DataModule(config, tokenizer, 4, 1, 1, 0, seed=0).train_dataloader():
        assert not {"images", "unreadable"} & batch.keys()


@pytest.mark.parametrize(
    "split",
    [{"batch_size": 3}, {"world_size": 2}, {"accum_iter": 2}, {"num_workers": 1}, {"packing": True}],
    ids=str,
)
def test_random_crops_are_the_same_for_every_split(split, image_config, tokenizer):
    module = module_of(image_config, tokenizer)
    expected = pixels_by_item(module.train_dataloader(), module.train_items, epoch=2)
    assert len(expected) > 10
    image_config.num_workers = split.pop("num_workers", 0)
    image_config.packing = split.pop("packing", False)
    found = {}
    for rank in range(split.get("world_size", 1)):
        loader = module_of(image_config, tokenizer, rank=rank, **split).train_dataloader()
        found |= pixels_by_item(loader, module.train_items, epoch=2)
    assert found.keys() == expected.keys()
    assert all(found[i].equal(expected[i]) for i in expected)


def test_random_crops_change_with_epoch_and_seed(image_config, tokenizer):
    image_config.val_config = image_config.data_config  # so that the seed does not change the split
    module, other = (module_of(image_config, tokenizer, seed=seed) for seed in (0, 1))
    rows, loader = module.train_items, module.train_dataloader()
    one, next_epoch = (pixels_by_item(loader, rows, epoch) for epoch in (0, 1))
    other_seed = pixels_by_item(other.train_dataloader(), rows)
    assert not any(one[i].equal(next_epoch[i]) or one[i].equal(other_seed[i]) for i in one)


def test_two_items_with_one_picture_are_cropped_differently(tmp_path, tokenizer):
    picture = save(tmp_path / "x.png", 100, 96)
    path = write_data(tmp_path, [item | {"image": picture} for item in alpaca_items(2)])
    config = DataConfig(data_config=str(path), max_words=256, num_workers=0, val_fraction=0)
    one, other = next(iter(module_of(config, tokenizer).train_dataloader()))["images"]
    assert not one.equal(other)


def test_validation_and_answers_see_the_same_pixels_in_each_epoch(image_config, tokenizer):
    module = module_of(image_config, tokenizer)
    loader = module.val_dataloader()
    one, later = (pixels_by_item(loader, module.val_items, epoch) for epoch in (0, 1))
    assert all(one[i].equal(later[i]) for i in one)
    items, _, _ = open_dataset(image_config.data_config, image_config, tokenizer, IMAGES)
    answers = pixels_by_item(answer_loader(image_config, tokenizer, 4, IMAGES), items)
    central = ImageTransform.resized_center_crop
    assert all(pixels.equal(load_pixels(items[i]["image"], central, 16)) for i, pixels in answers.items())


def test_chosen_transform_is_the_one_that_is_used(image_config, tokenizer):
    image_config.image_transform = ImageTransform.padded_resize
    module = module_of(image_config, tokenizer)
    for loader, rows in ((module.train_dataloader(), module.train_items), (module.val_dataloader(), module.val_items)):
        for i, pixels in pixels_by_item(loader, rows).items():
            assert pixels.equal(load_pixels(rows[i]["image"], ImageTransform.padded_resize, 16))


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_loader_sees_the_pixels_of_the_uninterrupted_one(workers, image_config, tokenizer):
    image_config.num_workers = workers
    whole = module_of(image_config, tokenizer).train_dataloader()
    whole.sampler.set_epoch(1)
    expected = list(whole)
    resumed = module_of(image_config, tokenizer).train_dataloader()
    resumed.load_state_dict({"epoch": 1, "done": 2})
    resumed.sampler.set_epoch(1)
    batches = list(resumed)
    assert len(batches) == len(expected) - 2
    assert all(map(equal, batches, expected[2:]))


def test_filler_row_keeps_its_image_and_counts_nothing(tmp_path, tokenizer):
    path = write_data(tmp_path, [item | {"image": save(tmp_path / "x.png")} for item in alpaca_items(3)])
    config = DataConfig(data_config=str(path), max_words=256, num_workers=0, val_fraction=0)
    *_, filler = module_of(config, tokenizer, batch_size=1, world_size=2, rank=1).train_dataloader()
    assert filler["tokens"] == 0
    assert filler["targets"].eq(-100).all()
    assert filler["images"].shape == (1, 3, 16, 16)


# --- images that fail after the check --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_image_lost_during_training_stops_with_one_line(workers, image_config, tokenizer):
    image_config.num_workers = workers
    module = module_of(image_config, tokenizer)
    lost = next(row["image"] for row in module.train_items if row["image"])
    Path(lost).unlink()
    with pytest.raises(UserError) as caught:
        list(module.train_dataloader())
    assert str(caught.value).startswith(f"image {lost}: no such file")
    assert str(caught.value).endswith("data.bad_images=skip")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("packing", [False, True], ids=["rows of one", "packed"])
def test_image_lost_during_training_is_gray_and_its_item_masked_where_asked(packing, workers, image_config, tokenizer):
    image_config.num_workers, image_config.packing, image_config.bad_images = workers, packing, BadImages.skip
    module = module_of(image_config, tokenizer, batch_size=8)
    before = list(module.train_dataloader())
    lost = next(i for i, row in enumerate(module.train_items) if row["image"])
    Path(module.train_items[lost]["image"]).unlink()
    after = list(module.train_dataloader())
    path = module.train_items[lost]["image"]
    assert [told for batch in after for told in batch["unreadable"]] == [f"image {path}: no such file"]
    for one, other in zip(before, after, strict=True):
        if not other["unreadable"]:
            assert equal(one, other)
            continue
        changed = (one["images"] != other["images"]).flatten(1).any(dim=1)
        assert changed.sum() == 1
        assert other["images"][changed].eq(0).all()
        masked = one["targets"] != other["targets"]
        assert other["targets"][masked].eq(-100).all()
        assert masked.sum() == module.train_items[lost]["answer_tokens"]
        labels = [label for label in module.train_items[lost]["labels"] if label != -100]
        assert one["targets"][masked].tolist() == labels
        assert other["input_ids"].equal(one["input_ids"])
