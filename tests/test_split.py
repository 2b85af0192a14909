"""Checkpoints of several ranks, and going on with another number of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_finetune import assert_same_bits, checkpoints, short_data, tiny_config, trainables

import accessory.finetune as finetune_module
from accessory.callbacks import read_series
from accessory.config import Config
from accessory.errors import UserError
from accessory.finetune import finetune
from accessory.module import FinetuneModule
from accessory.optim import lr_at

# 30 items, 4 a step: 8 steps an epoch on two ranks, 15 alone.
RUN = {
    "recipe.lora": True,
    "recipe.rank": 4,
    "recipe.dropout": 0.3,
    "train.epochs": 3,
    "train.batch_size": 2,
    "data.val_fraction": 0.25,
    "optim.lr": 1e-2,
    "optim.warmup_epochs": 0.5,
    "save.step_interval": 3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return short_data(tmp_path_factory.mktemp("data"))


class _Stop(Exception):
    """The power goes."""


def run_until(config: Config, step: int) -> None:
    """Train up to the first micro-batch after `step` optimizer steps; to the end for -1."""

    def training_step(module, batch, batch_idx):
        if module.global_step == step:
            raise _Stop
        return original(module, batch, batch_idx)

    original = FinetuneModule.training_step
    FinetuneModule.training_step = training_step
    try:
        finetune(config)
        assert step == -1
    except _Stop:
        pass
    finally:
        FinetuneModule.training_step = original


def run_two(config: Config, step: int = -1) -> None:
    assert run_ranks(run_until, config, step) == [None, None]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, meta_folder, data) -> Path:
    """A run of two ranks, to its end."""
    out = tmp_path_factory.mktemp("two") / "out"
    run_two(tiny_config(meta_folder, data, out, **RUN, **{"save.epoch_interval": 2, "save.keep": 4}))
    return out


def test_checkpoints_of_two_ranks_come_at_steps_and_epochs_and_the_last_are_kept(two_ranks):
    """Every 3 of 24 steps, and at the end of the second and the last of three epochs."""
    assert checkpoints(two_ranks) == [f"step-{step:08d}" for step in (16, 18, 21, 24)]
    states = torch.load(two_ranks / "checkpoints" / "step-00000024" / "rng.pt", weights_only=False)
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])


def test_two_ranks_broken_off_go_on_to_the_same_bits(two_ranks, tmp_path, meta_folder, data):
    config = tiny_config(meta_folder, data, tmp_path / "out", **RUN)
    run_two(config, 8)
    run_two(config)
    assert_same_bits(trainables(tmp_path / "out"), trainables(two_ranks))


def alone(meta_folder, data, out, **changes) -> Config:
    return tiny_config(meta_folder, data, out, **RUN | {"resume.allow_world_size": True} | changes)


@pytest.fixture(params=[(7, 6, 2), (8, 8, 0)], ids=["within an epoch", "after an epoch"])
def broken_off(request, tmp_path, meta_folder, data) -> tuple[Path, int, int]:
    """The folder of a run of two ranks in its first epoch, the step of its last checkpoint, and those lost by it."""
    stopped, newest, skipped = request.param
    run_two(tiny_config(meta_folder, data, tmp_path / "out", **RUN), stopped)
    assert checkpoints(tmp_path / "out")[-1] == f"step-{newest:08d}"
    return tmp_path / "out", newest, skipped


def test_another_number_of_ranks_is_refused_naming_both(broken_off, meta_folder, data):
    config = alone(meta_folder, data, broken_off[0], **{"resume.allow_world_size": False})
    with pytest.raises(UserError, match=r"world_size=2, this one has 1; .*resume\.allow_world_size=true to go on"):
        finetune(config)


def test_run_goes_on_with_one_rank_at_the_next_epoch(broken_off, meta_folder, data, capsys, monkeypatch):
    out, step, skipped = broken_off
    moments, original = {}, FinetuneModule.on_train_start

    def on_train_start(module):
        moments.update(copy.deepcopy(module.trainer.optimizers[0].state_dict()["state"]))
        original(module)

    monkeypatch.setattr(FinetuneModule, "on_train_start", on_train_start, raising=False)
    state = torch.load(out / "checkpoints" / f"step-{step:08d}" / "state.ckpt", weights_only=False)
    config = alone(meta_folder, data, out)
    finetune(config)
    told = "world_size was 2 and is 1: going on with the start of epoch 1 (the first is 0); steps skipped of the one"
    assert f"{told} before: {skipped}\n" in capsys.readouterr().out
    saved = state["optimizer_states"][0]["state"]
    assert all(torch.equal(moments[i]["exp_avg"], saved[i]["exp_avg"]) for i in saved)
    steps, rates = read_series(out, "lr")
    assert steps[-30:] == list(range(step, step + 30))  # epochs 1 and 2, of 15 steps each
    assert rates[-30:] == pytest.approx([lr_at(1 + (i + 1) / 15, config.optim, 3) for i in range(30)], rel=1e-5)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["steps"] == step + 30


def test_run_that_went_on_with_one_rank_continues_to_the_same_bits(tmp_path, meta_folder, data):
    """Broken off before its first own checkpoint, and after it."""
    first = tmp_path / "first"
    run_two(tiny_config(meta_folder, data, first, **RUN), 7)
    results = []
    for name, stops in (("whole", []), ("stopped", [8, 20])):
        config = alone(meta_folder, data, tmp_path / name, **{"resume.path": str(first)})
        for step in [*stops, -1]:
            run_until(config, step)
            if (tmp_path / name / "checkpoints").exists():
                config.resume.path = None
        results.append(trainables(tmp_path / name))
    assert_same_bits(*results)


def test_number_of_ranks_is_that_of_the_checkpoint_taken_not_of_the_last_start(tmp_path, meta_folder, data):
    config = alone(meta_folder, data, tmp_path / "out")
    run_two(config, 7)
    run_until(config, 7)  # alone, until before a checkpoint of its own
    assert json.loads((tmp_path / "out" / "run.json").read_text())["world_size"] == 1
    config.resume.allow_world_size = False
    with pytest.raises(UserError, match=r"world_size=2, this one has 1;"):
        finetune(config)


def test_steps_of_another_size_and_max_steps_are_refused_together(tmp_path, meta_folder, data, monkeypatch):
    run_two(tiny_config(meta_folder, data, tmp_path / "out", **RUN, **{"train.max_steps": 20}), 4)
    config = alone(meta_folder, data, tmp_path / "out", **{"train.max_steps": 20})
    with pytest.raises(UserError, match=r"max_steps=20 counts steps of 4 rows, and now they would have 2; choose"):
        finetune(config)
    config.train.accum_iter = 2
    monkeypatch.setattr(finetune_module, "_fit", lambda *_: (_ for _ in ()).throw(_Stop))
    with pytest.raises(_Stop):
        finetune(config)


def test_the_last_epoch_is_not_left_out(tmp_path, meta_folder, data):
    run_two(tiny_config(meta_folder, data, tmp_path / "out", **RUN | {"train.epochs": 1}), 7)
    with pytest.raises(UserError, match=r"step-00000006 is in the last epoch, of which 2 steps .* on 2 rank"):
        finetune(alone(meta_folder, data, tmp_path / "out", **{"train.epochs": 1}))
    assert not (tmp_path / "out" / "trainable.safetensors").exists()
