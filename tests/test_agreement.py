"""Ranks that do not agree are stopped before the first step, and told by name what differs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import alpaca_items
from ranks import run_ranks
from test_finetune import short_data, tiny_config

from accessory.errors import UserError
from accessory.finetune import finetune
from accessory.module import FinetuneModule
from accessory.strategies import find_world


@pytest.fixture(scope="module")
def nine_items(tmp_path_factory) -> Path:
    return short_data(tmp_path_factory.mktemp("nine"), alpaca_items(9))


def with_a_planted_difference(base: Path, data: Path, out: Path, strategy: str) -> str:
    """Rank 1 has another scale in one linear of the last block."""
    import accessory.quantization.linear as linear

    original = linear.QuantLinear.load_weight
    count = []

    def load_weight(layer, weight):
        original(layer, weight)
        count.append(layer)
        if len(count) == 13 and find_world().rank == 1:
            layer.scales[0, 0] *= 1.001

    linear.QuantLinear.load_weight = load_weight
    with pytest.raises(UserError) as caught:
        finetune(tiny_config(base, data, out, **{"quantization.method": "rtn", "strategy.data_parallel": strategy}))
    return str(caught.value)


@pytest.mark.parametrize("strategy", ["sdp", "fsdp"])
def test_a_rank_with_another_scale_stops_the_run_before_its_first_step(strategy, tmp_path, meta_folder, nine_items):
    told = run_ranks(with_a_planted_difference, meta_folder, nine_items, tmp_path / "out", strategy)
    for message in told:
        assert "rank 1 holds other weights than rank 0: model.layers.1." in message, message
        assert "scales" in message
    assert not (tmp_path / "out" / "checkpoints").exists()


def refused(base: Path, data: list[Path], outs: list[Path], batch_sizes: list[int]) -> str:
    """What a run tells whose ranks were each given their own."""
    rank = find_world().rank
    changes = {"train.batch_size": batch_sizes[rank], "save.step_interval": 2}
    with pytest.raises(UserError) as caught:
        finetune(tiny_config(base, data[rank], outs[rank], **changes))
    return str(caught.value)


def test_ranks_started_with_other_commands_are_stopped(tmp_path, meta_folder, nine_items):
    outs = [tmp_path / "out"] * 2
    for told in run_ranks(refused, meta_folder, [nine_items] * 2, outs, [1, 2]):
        assert "rank 1 has batch_size=2, rank 0 has 1" in told


def test_ranks_that_read_other_data_are_stopped(tmp_path, meta_folder, nine_items):
    other = short_data(tmp_path / "other", alpaca_items(10))
    for told in run_ranks(refused, meta_folder, [nine_items, other], [tmp_path / "out"] * 2, [1, 1], nodes=2):
        assert "rank 1 has data=" in told


def left_alone(base: Path, data: Path, out: Path) -> str:
    """What rank 0 tells when the other one is killed in the third step."""
    step = FinetuneModule.training_step

    def training_step(module, batch, index):
        if module.global_step == 2 and find_world().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(module, batch, index)

    FinetuneModule.training_step = training_step
    with pytest.raises(UserError) as caught:
        finetune(tiny_config(base, data, out, **{"train.batch_size": 1}))
    return str(caught.value)


def test_a_rank_whose_partner_is_killed_says_so_in_a_line(tmp_path, meta_folder, nine_items):
    told, lost = run_ranks(left_alone, meta_folder, nine_items, tmp_path / "out")
    assert told == "another rank has ended, see its message; the same command continues from the newest checkpoint"
    assert isinstance(lost, EOFError)


def interrupted(base: Path, data: Path, out: Path) -> None:
    step = FinetuneModule.training_step

    def training_step(module, batch, index):
        if module.global_step == 3:
            raise RuntimeError("the power goes")
        return step(module, batch, index)

    FinetuneModule.training_step = training_step
    finetune(tiny_config(base, data, out, **{"train.batch_size": 1, "save.step_interval": 2}))


def test_a_node_that_does_not_see_the_checkpoints_is_told(tmp_path, meta_folder, nine_items):
    """An --output_dir on each node's own disk: only the first has what was saved."""
    outs = [tmp_path / name / "out" for name in ("node0", "node1")]
    run_ranks(interrupted, meta_folder, nine_items, outs[0], nodes=2)
    assert (outs[0] / "checkpoints" / "step-00000002").is_dir()
    for told in run_ranks(refused, meta_folder, [nine_items] * 2, outs, [1, 1], nodes=2):
        assert "rank 1 has checkpoint=None, rank 0 has 'step-00000002 (" in told
        assert "--output_dir" in told
