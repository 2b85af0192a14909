"""One update: the mean over the answer tokens of the global batch, however that batch is split."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import alpaca_items
from test_finetune import SCRIPT, logged, short_data, tiny_config, tiny_settings, trainables

import accessory
from accessory.assemble import assemble
from accessory.config import ModelConfig, OptimConfig, QuantizationConfig, RecipeConfig
from accessory.data.datamodule import DataModule
from accessory.data.dataset import open_dataset
from accessory.errors import UserError
from accessory.finetune import finetune
from accessory.module import FinetuneModule

# 9 items in steps of 4: the third step has one item, so one of two ranks has nothing to do in it.
RUN = {"train.epochs": 1, "train.batch_size": 4, "optim.lr": 1e-2, "optim.min_lr": 1e-3}


@pytest.fixture(scope="module")
def nine_items(tmp_path_factory) -> Path:
    return short_data(tmp_path_factory.mktemp("nine"), alpaca_items(9))


@pytest.fixture(scope="module", params=["none", "nf4"])
def whole_batches(request, tmp_path_factory, meta_folder, nine_items) -> tuple[str, Path]:
    """Quantization, and the output of a run that takes every step as one micro-batch."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return request.param, finetune(
        tiny_config(meta_folder, nine_items, out, **RUN, **{"quantization.method": request.param})
    )


def update_distance(one: Path, other: Path, base: Path) -> float:
    """How far two results lie apart, relative to how far training moved."""
    first, second = trainables(one), trainables(other)
    initial = accessory.load_model(str(base)).state_dict()
    start = {name: initial.get(name, torch.zeros(())) for name in first}  # biases start at 0
    moved = math.sqrt(sum((first[name] - start[name]).double().square().sum().item() for name in first))
    apart = math.sqrt(sum((first[name] - second[name]).double().square().sum().item() for name in first))
    assert moved > 0.1
    return apart / moved


@pytest.mark.parametrize(("batch_size", "accum_iter"), [(2, 2), (1, 4)])
def test_update_is_the_same_however_the_batch_is_split(
    batch_size, accum_iter, whole_batches, tmp_path, meta_folder, nine_items
):
    method, whole = whole_batches
    changes = RUN | {"train.batch_size": batch_size, "train.accum_iter": accum_iter, "quantization.method": method}
    split = finetune(tiny_config(meta_folder, nine_items, tmp_path / "out", **changes))
    assert update_distance(whole, split, meta_folder) < 1e-4
    assert logged(split, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)


def test_update_is_the_same_packed_or_not(whole_batches, tmp_path, meta_folder, nine_items):
    """With all items in one step, packing changes nothing but the rows they stand in."""
    method, _ = whole_batches
    changes = {"train.epochs": 3, "optim.lr": 1e-2, "quantization.method": method}
    apart, packed = (
        finetune(tiny_config(meta_folder, nine_items, tmp_path / name, **changes, **more))
        for name, more in {
            "apart": {"train.batch_size": 9},
            "packed": {"train.batch_size": 2, "train.accum_iter": 8, "data.packing": True, "data.max_words": 128},
        }.items()
    )
    assert len(logged(packed, "loss")) == 3
    assert update_distance(apart, packed, meta_folder) < 1e-4


def validation(folder: Path) -> dict[str, str]:
    """Settings for 11 items to validate on."""
    return {"data.val_config": str(short_data(folder / "val", alpaca_items(20)[9:]))}


def run_two_ranks(folder: Path, settings: dict) -> tuple[int, str]:
    """main_finetune.py on two processes with gloo, through torchrun; its exit code and what it printed."""
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT), *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its ranks
        raise
    return process.returncode, output


def test_update_and_validation_of_two_ranks_are_those_of_one(tmp_path, meta_folder, nine_items):
    """1 row and 2 micro-batches each; 11 items to validate on, so that the ranks' shares differ."""
    changes = RUN | {"quantization.method": "nf4"} | validation(tmp_path)
    alone = finetune(tiny_config(meta_folder, nine_items, tmp_path / "alone", **changes))
    changes |= {"train.batch_size": 1, "train.accum_iter": 2}
    code, output = run_two_ranks(tmp_path, tiny_settings(meta_folder, nine_items, tmp_path / "two", **changes))
    assert code == 0, output
    assert update_distance(alone, tmp_path / "two", meta_folder) < 1e-4
    for name in ("loss", "val_loss"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(alone, name), rel=1e-5)


def test_item_with_a_non_finite_loss_is_named_whichever_rank_has_it(tmp_path, meta_folder, tokenizer):
    """Two items, one a rank; the loss of rank 1's is NaN, its token's embedding being so."""
    (rare,) = set(tokenizer.encode("Q", False, False)) - set(tokenizer.encode("W", False, False))
    base = tmp_path / "base"
    shutil.copytree(meta_folder, base)
    weights = torch.load(base / "consolidated.00.pth")
    weights["tok_embeddings.weight"][rare] = torch.nan
    torch.save(weights, base / "consolidated.00.pth")
    items = [{"instruction": "the text", "output": letter} for letter in ("W", "Q")]
    data = short_data(tmp_path / "data", items)
    settings = tiny_settings(base, data, tmp_path / "out", **{"train.batch_size": 1})
    config = tiny_config(base, data, tmp_path / "out")
    plan = DataModule(config.data, tokenizer, batch_size=1, accum_iter=1, world_size=2, rank=1, seed=0).train_plan
    assert [micro.rows for micro in plan.epoch(0, rank=1)] == [[[1]]]
    code, output = run_two_ranks(tmp_path, settings)
    assert code != 0
    assert "step 1: the loss is not finite" in output
    assert ": [1]. Lower --lr" in output


# --- one step by brute force -----------------------------------------------------------------------------------------


@pytest.fixture
def gradients(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The gradient of each step, before it is clipped."""
    seen = []

    def clip(module, *arguments, **named):
        seen.append({name: p.grad.clone() for name, p in module.model.named_parameters() if p.requires_grad})
        return original(module, *arguments, **named)

    original = FinetuneModule.configure_gradient_clipping
    monkeypatch.setattr(FinetuneModule, "configure_gradient_clipping", clip)
    return seen


@pytest.mark.parametrize(("batch_size", "accum_iter"), [(9, 1), (2, 5)])
def test_gradient_is_that_of_the_mean_over_all_answer_tokens(
    batch_size, accum_iter, gradients, tmp_path, meta_folder, nine_items
):
    """Against torch's own cross-entropy on the public logits, item by item."""
    changes = {"train.batch_size": batch_size, "train.accum_iter": accum_iter}
    config = tiny_config(meta_folder, nine_items, tmp_path / "out", **changes)
    out = finetune(config)
    model = tiny_model(meta_folder)
    items, _, _ = open_dataset(config.data.data_config, config.data, model.tokenizer)
    summed, tokens = torch.zeros(()), 0
    for item in items:
        logits = model(torch.tensor([item["input_ids"]]))[0, :-1]
        targets = torch.tensor(item["labels"][1:])
        summed = summed + F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
        tokens += int((targets != -100).sum())
    (summed / tokens).backward()
    assert logged(out, "loss") == [pytest.approx((summed / tokens).item(), rel=1e-5)]
    (found,) = gradients
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name


def tiny_model(folder: Path) -> torch.nn.Module:
    return assemble(
        ModelConfig(pretrained_path=[str(folder)]),
        QuantizationConfig(),
        RecipeConfig(),
        torch.device("cpu"),
        torch.float32,
    )


@pytest.mark.parametrize(("limit", "left"), [(0.01, 0.01), (1e6, None), (0.0, None), (-1.0, None)])
def test_gradient_is_clipped_to_clip_grad_and_not_at_all_by_0(
    limit, left, gradients, tmp_path, meta_folder, nine_items, monkeypatch
):
    clipped = []
    original = torch.optim.AdamW.step

    def step(optimizer, closure):
        value = closure()
        norms = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
        clipped.append(torch.stack(norms).norm().item())
        return original(optimizer, lambda: value)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    changes = {"optim.clip_grad": limit, "train.max_steps": 1}
    out = finetune(tiny_config(meta_folder, nine_items, tmp_path / "out", **changes))
    whole = torch.stack([gradient.norm() for gradient in gradients[0].values()]).norm().item()
    assert whole > 0.1
    assert clipped == [pytest.approx(left if left is not None else whole, rel=1e-4)]
    assert logged(out, "grad_norm") == [pytest.approx(whole, rel=1e-4)]


# --- the module's own state ------------------------------------------------------------------------------------------


def test_checkpoint_of_another_recipe_is_refused_by_the_name_that_differs(meta_folder):
    module = FinetuneModule(tiny_model(meta_folder), OptimConfig(), steps_per_epoch=1, epochs=1)
    state = module.state_dict()
    del state["model.norm.weight"]
    with pytest.raises(UserError, match=r"disagree on what trains: model\.norm\.weight is in only one of them"):
        module.load_state_dict(state)


def test_state_is_the_trainables_alone_and_comes_back(meta_folder):
    module = FinetuneModule(tiny_model(meta_folder), OptimConfig(), steps_per_epoch=1, epochs=1)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    assert len(state) == 14 + 5
    module.load_state_dict({name: value + 1 for name, value in state.items()})
    assert all(torch.equal(value, state[name] + 1) for name, value in module.state_dict().items())


def test_result_does_not_depend_on_checkpointing(whole_batches, tmp_path, meta_folder, nine_items):
    method, whole = whole_batches
    changes = RUN | {"quantization.method": method, "train.checkpointing": True}
    out = finetune(tiny_config(meta_folder, nine_items, tmp_path / "out", **changes))
    assert update_distance(whole, out, meta_folder) < 1e-4
