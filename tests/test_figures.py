"""Figures that are read a step late, and gradients that ranks sum by themselves, as with CUDA graphs: what is logged,
saved and refused is the same. Here the graph is one in name, so that a CPU can run it; everything around it is what a
GPU runs, and two GPUs run the real one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import alpaca_items
from ranks import run_ranks
from test_finetune import (
    RESUMED,
    assert_same_bits,
    interrupt,
    log_rows,
    logged,
    short_data,
    tiny_config,
    trainables,
)
from test_module import update_distance

from accessory import fast as fast_parts
from accessory.errors import Interrupted, UserError
from accessory.figures import StepFigures, StepLog
from accessory.finetune import finetune
from accessory.fused.graph import GraphedLoss


@pytest.fixture
def late(monkeypatch):
    pretend_graphs(monkeypatch)


def pretend_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs are taken for possible, and a step of one runs as ever."""

    def choose(config, world):
        fast = original(config, world)
        fast.active.add("graphs")
        return fast

    original = fast_parts.choose
    monkeypatch.setattr("accessory.fast.choose", choose)
    monkeypatch.setattr("accessory.fast._spare_graphs", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(GraphedLoss, "__call__", GraphedLoss._run)


SETTINGS = RESUMED | {"recipe.dropout": 0.0}


def run(base, data, out, **changes):
    return finetune(tiny_config(base, data, out, **SETTINGS | changes))


@pytest.mark.parametrize("every", [1, 3])
def test_each_step_is_logged_with_its_own_figures(every, late, meta_folder, tmp_path, monkeypatch):
    data, interval = short_data(tmp_path / "data"), {"logger.log_every_n_steps": every}
    found = run(meta_folder, data, tmp_path / "late", **interval)
    monkeypatch.undo()
    plain = run(meta_folder, data, tmp_path / "plain", **interval)
    assert [(row["step"], row["epoch"], row["lr"]) for row in log_rows(found)] == [
        (row["step"], row["epoch"], row["lr"]) for row in log_rows(plain)
    ]
    for name in ("loss", "grad_norm", "val_loss"):
        values = logged(plain, name)
        assert len(values) > 2 and logged(found, name) == pytest.approx(values, rel=1e-5)
    tuned = trainables(plain)
    for name, tensor in trainables(found).items():
        # Of an update, up to 0.01, half a percent: Adam divides by a gradient's size also where that is all rounding.
        torch.testing.assert_close(tensor, tuned[name], rtol=1e-4, atol=5e-5)


def test_a_run_that_was_interrupted_continues_to_the_same_bits(late, meta_folder, tmp_path, monkeypatch):
    data = short_data(tmp_path / "data")
    whole = run(meta_folder, data, tmp_path / "whole")
    config = tiny_config(meta_folder, data, tmp_path / "broken", **SETTINGS)
    with monkeypatch.context() as broken:
        interrupt(broken, config, 9)
    assert_same_bits(trainables(finetune(config)), trainables(whole))


@pytest.mark.parametrize("begun_late", [False, True])
def test_a_run_begun_without_graphs_goes_on_with_them_and_the_other_way_round(
    begun_late, late, meta_folder, tmp_path, monkeypatch
):
    data = short_data(tmp_path / "data")
    whole = run(meta_folder, data, tmp_path / "whole")
    config = tiny_config(meta_folder, data, tmp_path / "broken", **SETTINGS)
    for with_graphs in (begun_late, not begun_late):
        with monkeypatch.context() as part:
            if not with_graphs:
                part.setattr("accessory.fast.choose", lambda *_: fast_parts.Fast())
            if with_graphs == begun_late:
                interrupt(part, config, 9)
            else:
                finetune(config)
    tuned = trainables(whole)
    for name, tensor in trainables(tmp_path / "broken").items():
        torch.testing.assert_close(tensor, tuned[name], rtol=1e-3, atol=1e-5)


def run_on_this_rank(base: Path, data: Path, out: Path, graphs: bool, stop: int = 0) -> list[bool] | str:
    """Micro-batches of one item, two to a step on each of two ranks; of the last step's, one rank has none. stop: the
    micro-batch in which rank 1 is told to stop. Returns for each micro-batch whether its graph was there already; or
    what a run that was stopped says."""
    changes = {"train.batch_size": 1, "train.accum_iter": 2, "train.max_steps": 4}
    changes |= {"fast.graphs": graphs, "fast.padding_free": True}  # as a GPU has it: all micro-batches have one shape
    called = []
    with pytest.MonkeyPatch.context() as patch:
        if graphs and not torch.cuda.is_available():
            pretend_graphs(patch)
        original = GraphedLoss.__call__

        def loss(self, batch):
            called.append(bool(self._captured))
            if len(called) == stop and torch.distributed.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, batch)

        patch.setattr(GraphedLoss, "__call__", loss)
        try:
            run(base, data, out, **changes)
        except Interrupted as told:
            return told.message
    return called


def test_ranks_with_graphs_sum_their_gradients_as_those_without_do(meta_folder, tmp_path):
    data = short_data(tmp_path / "data", alpaca_items(9))
    for name, graphs in (("graphs", True), ("plain", False)):
        for called in run_ranks(run_on_this_rank, meta_folder, data, tmp_path / name, graphs):
            assert not isinstance(called, BaseException), called
            assert len(called) == (8 if graphs else 0) and any(called) == (graphs and torch.cuda.is_available())
    for figure in ("loss", "grad_norm", "val_loss"):
        expected = logged(tmp_path / "plain", figure)
        assert expected and logged(tmp_path / "graphs", figure) == pytest.approx(expected, rel=1e-5)
    assert update_distance(tmp_path / "plain", tmp_path / "graphs", meta_folder) < 1e-4


def test_ranks_with_graphs_stop_after_the_same_step_and_go_on_to_the_same_bits(meta_folder, tmp_path):
    """Told in the first micro-batch of the third step, the second one's question tells the other rank."""
    data = short_data(tmp_path / "data", alpaca_items(9))
    told = run_ranks(run_on_this_rank, meta_folder, data, tmp_path / "stopped", True, 5)
    saved = tmp_path / "stopped" / "checkpoints" / "step-00000003"
    assert told == [f"stopped by SIGTERM after step 3; saved {saved}; the same command continues"] * 2
    for name in ("stopped", "whole"):
        for called in run_ranks(run_on_this_rank, meta_folder, data, tmp_path / name, True):
            assert not isinstance(called, BaseException), called
    assert_same_bits(trainables(tmp_path / "stopped"), trainables(tmp_path / "whole"))


def test_graphs_are_used_on_all_ranks_or_on_none(monkeypatch):
    ranks = [True, False]
    monkeypatch.setattr("accessory.fast.gather", lambda _: ranks)
    fast = fast_parts.Fast({"blocks", "graphs"})
    fast_parts._agree_on_graphs(fast)
    assert fast.active == {"blocks"} and "another rank" in fast.why_not["graphs"]
    fast = fast_parts.Fast({"blocks"}, {"graphs": "there is no memory"})
    fast_parts._agree_on_graphs(fast)
    assert fast.active == {"blocks"} and fast.why_not == {"graphs": "there is no memory"}
    ranks[1], fast = True, fast_parts.Fast({"graphs"})
    fast_parts._agree_on_graphs(fast)
    assert fast.active == {"graphs"} and not fast.why_not


def test_a_loss_that_is_not_finite_is_told_with_its_step_and_items_and_changes_nothing(
    late,
    meta_folder,
    tmp_path,
    caught_model,
    tokenizer,
    monkeypatch,
):
    """The embedding of a token that only item 5 has becomes NaN; each step has one item."""
    items = alpaca_items(8)
    (rare,) = set(tokenizer.encode("Q", bos=False, eos=False)) - set(tokenizer.encode("W", bos=False, eos=False))
    items[5]["output"] += " Q"

    def spoil(model):
        with torch.no_grad():
            model.model.embed_tokens.weight[rare] = torch.nan

    caught_model["prepare"] = spoil
    data = short_data(tmp_path / "data", items)
    changes = {"train.batch_size": 1, "recipe.lora": True, "optim.lr": 1e-2, "seed": 6}
    told, weights = [], []
    for name in ("late", "plain"):
        if name == "plain":
            monkeypatch.setattr("accessory.fast.choose", lambda *_: fast_parts.Fast())
        with pytest.raises(UserError, match=r"the loss is not finite; stopped before the update\..*: \[5\]\.") as error:
            finetune(tiny_config(meta_folder, data, tmp_path / name, **changes))
        told.append(str(error.value))
        weights.append({key: p.detach() for key, p in caught_model["model"].named_parameters() if p.requires_grad})
    assert told[0] == told[1]
    step = int(told[0].split()[1].rstrip(":"))
    assert step > 2
    for name in ("late", "plain"):
        assert [int(row["step"]) for row in log_rows(tmp_path / name)] == list(range(step - 1))
    for key, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][key], rtol=0, atol=1e-4)  # an update has 1e-2


def test_a_run_that_diverges_is_stopped_before_its_weights_are_nan(
    late,
    meta_folder,
    tmp_path,
    caught_model,
):
    changes = {"optim.lr": 1e30, "optim.warmup_epochs": 0.0}
    with pytest.raises(UserError, match=r"step 2: the (loss|gradient .*) is not finite.*Lower --lr"):
        finetune(tiny_config(meta_folder, short_data(tmp_path / "data"), tmp_path / "out", **changes))
    assert all(p.isfinite().all() for p in caught_model["model"].parameters() if p.requires_grad)


def test_files_are_written_at_once_and_then_once_a_second(monkeypatch):
    class Logger:
        def __init__(self):
            self.rows, self.saved = [], 0

        def log_metrics(self, metrics, step):
            self.rows.append((step, metrics))

        def save(self):
            self.saved += 1

    now, logger, log = [100.0], Logger(), StepLog()
    monkeypatch.setattr("accessory.figures.time.monotonic", lambda: now[0])
    saved = []
    for number in range(6):
        log.write([logger], figures(number), 2)
        saved.append(logger.saved)
        now[0] += 0.4
    assert [(step, row["loss"], row["lr"], row["epoch"]) for step, row in logger.rows] == [
        (step, float(step), 0.1, 7) for step in (1, 3, 5)
    ]
    assert saved == [0, 1, 1, 1, 1, 2] and log.newest["loss"] == 5.0


def test_a_step_lasts_from_when_the_one_before_was_known_or_training_began_again(monkeypatch):
    now, log, rates = [100.0], StepLog(), []
    monkeypatch.setattr("accessory.figures.time.perf_counter", lambda: now[0])
    log.restart()
    for seconds, validates in ((2.0, False), (1.0, True), (4.0, False)):
        now[0] += seconds
        log.write([], figures(0), 1)
        rates.append(log.newest["tokens_per_s"])
        if validates:
            now[0] += 60
            log.restart()
    assert rates == [50, 100, 25]


def figures(number: int) -> StepFigures:
    step = StepFigures(number, 7, [], {"lr": 0.1}, 100)
    step.send(torch.tensor(float(number)), torch.tensor(0.5))
    return step
