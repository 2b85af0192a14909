"""Which parts of the fast path a run uses, and that a run with them is the run without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_finetune import RESUMED, assert_same_bits, interrupt, logged, short_data, tiny_config, trainables

import accessory
from accessory.config import Config, DataParallel, Precision
from accessory.estimate import estimate_training, host_bytes
from accessory.fast import Fast, choose, free_host_memory, install, largest_step, make_room, takes_one_row
from accessory.finetune import finetune
from accessory.fused.model import fuse_blocks
from accessory.strategies import World


def config(**parts) -> Config:
    from omegaconf import OmegaConf

    from accessory.schema import to_typed

    node = OmegaConf.structured(Config)
    settings = {"model.pretrained_path": ["base"], "data.data_config": "data.yaml", "only_save_trainable": True}
    for key, value in {**settings, **parts}.items():
        OmegaConf.update(node, key, value)
    return to_typed(node)


def world(device: str, size: int = 1) -> World:
    return World(rank=0, local_rank=0, size=size, local_size=size, device=torch.device(device))


def test_a_gpu_uses_all_parts_and_a_cpu_none_unless_told():
    assert choose(config(), world("cuda")).active == {"blocks", "graphs", "padding_free"}
    assert choose(config(), world("cpu")).active == set()
    assert choose(config(**{"fast.enabled": False}), world("cuda")).active == set()
    assert choose(config(**{"fast.enabled": True}), world("cpu")).active == {"blocks", "padding_free"}


def test_each_part_can_be_set_apart():
    without = {"fast.blocks": False, "fast.padding_free": False, "data.packing": True}
    assert choose(config(**without), world("cuda")).active == {"compile", "graphs"}
    assert choose(config(**{"fast.enabled": False, "fast.padding_free": True}), world("cuda")).active == {
        "padding_free"
    }


@pytest.mark.parametrize(
    ("settings", "ranks", "part", "reason"),
    [
        ({"fast.padding_free": False}, 1, "graphs", "many shapes"),
        ({"train.precision": Precision.fp16}, 1, "graphs", "fp16"),
        ({"strategy.data_parallel": DataParallel.fsdp}, 2, "graphs", "gather blocks"),
        ({"recipe.lora": True, "recipe.dropout": 0.1}, 1, "blocks", "recipe.dropout"),
    ],
)
def test_a_part_that_cannot_be_used_says_why(settings, ranks, part, reason, caplog):
    fast = choose(config(**settings), world("cuda", ranks))
    assert part not in fast.active
    assert reason in fast.why_not[part]
    fast.warn()
    assert [record.message for record in caplog.records if f"fast.{part}" in record.message]


def test_a_cpu_that_is_asked_for_graphs_warns_and_trains_without(caplog):
    fast = choose(config(**{"fast.graphs": True}), world("cpu"))
    fast.warn()
    assert fast.active == set()
    assert [record.message for record in caplog.records] == ["fast.graphs: not used, as it needs a CUDA GPU"]


def test_the_summary_names_the_parts():
    assert Fast({"graphs", "blocks"}).line() == "fused blocks, CUDA graphs"
    assert Fast().line() == "none of its parts"


@pytest.mark.parametrize(
    ("told", "fused", "active", "reason"),
    [
        (None, True, False, None),
        (True, True, True, None),
        (False, True, False, None),
        (True, False, False, "only fused blocks (fast.blocks) can"),
    ],
)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_on_a_cpu_inputs_go_to_host_memory_where_it_is_asked_for(
    told, fused, active, reason, checkpointing, meta_folder
):
    model = accessory.load_model([meta_folder], quantization="nf4")
    fast = Fast({"blocks"} if fused else set())
    if fused:
        fuse_blocks(model)
    make_room(fast, config(**{"fast.offload": told, "train.checkpointing": checkpointing}), model)
    assert ("offload" in fast.active) == active
    assert (fused and model.model.layers[0].forward.host is not None) == active
    assert fast.why_not.get("offload") == reason
    assert model.model.recomputed == checkpointing * len(model.model.layers)


@pytest.mark.parametrize(
    ("told", "fused", "checkpointing", "active", "reason"),
    [
        (None, True, False, False, None),
        (True, True, False, True, None),
        (True, False, False, False, "only fused ones (fast.blocks)"),
        (True, True, True, False, "all blocks are recomputed"),
    ],
)
def test_on_a_cpu_attentions_output_is_kept_where_it_is_asked_for(
    told, fused, checkpointing, active, reason, meta_folder
):
    model = accessory.load_model([meta_folder], quantization="nf4")
    fast = Fast({"blocks"} if fused else set())
    asked = config(**{"fast.keep_attention": told, "train.checkpointing": checkpointing})
    install(fast, asked, model, world("cpu"))
    assert ("keep_attention" in fast.active) == active
    assert (fused and model.model.layers[0].forward.keeps_attention) == active
    assert (reason or "") in fast.why_not.get("keep_attention", "")


@pytest.mark.parametrize("flash", [True, False])
def test_on_a_gpu_attentions_output_is_kept_where_all_else_leaves_room(flash, meta_folder, monkeypatch):
    model = accessory.load_model([meta_folder], quantization="nf4", dtype=torch.bfloat16)
    fuse_blocks(model)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr("accessory.fast.flash_takes", lambda *_: flash)
    asked = config()
    estimated = estimate_training(model, replace(largest_step(asked, model), keeps_attention=True), 0)
    beside = estimated.parts["activations"] + max(estimated.parts["loss"], estimated.parts["backward"])
    needed = estimated.peak + beside
    for available in (needed, needed - 1):
        monkeypatch.setattr("accessory.fast._available", lambda device, available=available: available)
        fast = Fast({"blocks", "graphs"})
        install_without_blocks(fast, asked, model)
        assert ("keep_attention" in fast.active) == (flash and available == needed)
        assert "graphs" in fast.active and "offload" not in fast.active and model.model.recomputed == 0


def install_without_blocks(fast: Fast, asked: Config, model) -> None:
    """`install` in a model whose blocks are fused already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accessory.fast._replace_blocks", lambda fast, model: None)
        install(fast, asked, model, world("cuda"))


def test_no_more_than_half_of_the_free_host_memory_is_taken_by_all_ranks_together(meta_folder, monkeypatch):
    model = accessory.load_model([meta_folder], quantization="nf4")
    fuse_blocks(model)
    asked = config(**{"fast.offload": True})
    needed = host_bytes(model, largest_step(asked, model), 0)
    for free, ranks, fits in ((2 * needed, 1, True), (2 * needed - 1, 1, False), (2 * needed, 2, False)):
        monkeypatch.setattr("accessory.fast.free_host_memory", lambda free=free: free)
        fast = Fast({"blocks"})
        make_room(fast, asked, model, ranks)
        assert ("offload" in fast.active) == fits
        assert ("GiB of host memory" in fast.why_not.get("offload", "")) == (not fits)


def test_in_a_container_its_limit_counts(tmp_path, monkeypatch):
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr("accessory.fast.CGROUPS", [(limit, used)])
    machine = free_host_memory()
    for text in ("max\n", "9223372036854771712\n"):
        limit.write_text(text)
        used.write_text("1000\n")
        assert free_host_memory() == pytest.approx(machine, rel=0.2)
    limit.write_text("5000\n")
    assert free_host_memory() == 4000


def test_where_the_kernels_do_not_run_blocks_stay_plain_and_the_reason_is_told(meta_folder, monkeypatch):
    """Compiled blocks are no way out: they need Triton as well."""
    model = accessory.load_model([meta_folder], quantization="nf4")
    monkeypatch.setattr("accessory.fast.why_not_fused", lambda _: "its kernels do not run here: no C compiler")
    fast = Fast({"blocks", "padding_free"})
    install(fast, config(**{"fast.compile": True}), model, world("cpu"))
    assert fast.active == {"padding_free"} and "no C compiler" in fast.why_not["blocks"]
    assert not model.model.fused and "forward" not in vars(model.model.layers[0])


@pytest.mark.parametrize(
    ("batch_size", "accum_iter", "offload", "one_row"), [(4, 1, False, False), (2, 2, True, False), (4, 2, False, True)]
)
def test_a_run_with_fused_blocks_and_shared_rows_has_the_losses_and_trainables_of_one_without(
    batch_size, accum_iter, offload, one_row, meta_folder, tmp_path, monkeypatch
):
    assert not takes_one_row(config(**{"train.precision": Precision.bf16}), world("cpu"), 64)
    monkeypatch.setattr("accessory.fast.takes_one_row", lambda *_: one_row)
    data = short_data(tmp_path / "data")
    sizes = {"train.batch_size": batch_size, "train.accum_iter": accum_iter}
    changes = {"quantization.method": "nf4", "recipe.lora": True, "data.val_fraction": 0.2, **sizes}
    plain = finetune(tiny_config(meta_folder, data, tmp_path / "plain", **changes))
    parts = {"fast.enabled": True, "fast.offload": offload}
    fast = finetune(tiny_config(meta_folder, data, tmp_path / "fast", **changes, **parts))
    for name in ("loss", "val_loss"):
        losses = logged(plain, name)
        assert len(losses) > 0
        assert logged(fast, name) == pytest.approx(losses, rel=1e-5)
    tuned = trainables(plain)
    for name, tensor in trainables(fast).items():
        torch.testing.assert_close(tensor, tuned[name], rtol=1e-3, atol=1e-5)


def test_a_fast_run_that_was_interrupted_continues_to_the_same_bits(meta_folder, tmp_path, monkeypatch):
    data = short_data(tmp_path / "data")
    settings = RESUMED | {"fast.enabled": True, "train.checkpointing": True, "fast.offload": True}
    settings["recipe.dropout"] = 0.0  # which fused blocks do not know
    whole = finetune(tiny_config(meta_folder, data, tmp_path / "whole", **settings))
    config = tiny_config(meta_folder, data, tmp_path / "broken", **settings)
    interrupt(monkeypatch, config, 9)
    assert_same_bits(trainables(finetune(config)), trainables(whole))
