"""fsdp: the payload in shares, gathered block by block, with the results of the whole."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import alpaca_items, write_qformer_base
from int4_folders import write_base, write_int4
from ranks import run_ranks
from test_finetune import assert_same_bits, logged, short_data, tiny_config, trainables
from test_module import RUN, update_distance
from test_multimodal import picture_items, write_data
from torch import Tensor
from transformers import LlamaConfig

import accessory.finetune as finetune_module
import accessory.sharding as sharding
from accessory.config import QuantizationConfig, QuantMethod, RecipeConfig
from accessory.errors import Interrupted, UserError
from accessory.finetune import finetune
from accessory.fused.model import fuse_blocks
from accessory.models.llama import Llama
from accessory.module import FinetuneModule, batch_loss
from accessory.quantization import QuantLinear, block_linears, quantize
from accessory.resume import Checkpoints
from accessory.sharding import ShardedPayload
from accessory.strategies import find_world, join_ranks
from accessory.tuning.recipe import add_trainables, canonical_name, mark_trainable

BLOCKS = 5
RECIPE = RecipeConfig(name="norm_bias_lora", lora=True, rank=2)


# --- whole runs: two ranks against one process ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nine_items(tmp_path_factory) -> Path:
    return short_data(tmp_path_factory.mktemp("nine"), alpaca_items(9))


@pytest.fixture(scope="module")
def nine_pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nine_pictures")
    items = picture_items(folder / "images", 9)
    return write_data(folder, items, prompt_type="None", root=str(folder / "images"))


def watched_run(base: Path, data: Path, out: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """A run on this rank, and what its payload was before the split, after the first step and after the last save."""
    seen: dict[str, Any] = {}
    original_assemble, original_clip = finetune_module.assemble, FinetuneModule.configure_gradient_clipping
    original_save = Checkpoints.save

    def assemble(*arguments):
        model = seen["model"] = original_assemble(*arguments)
        if model.sharded is not None:
            seen["share"] = model.sharded.share_bytes, model.sharded.whole_bytes
            seen["before"] = model.sharded.digests
        return model

    def clip(module, *arguments, **named):
        original_clip(module, *arguments, **named)
        if "first step" not in seen and seen["model"].sharded is not None:
            seen["first step"] = seen["model"].sharded.gathered_digests()

    def save(checkpoints, trainer):
        original_save(checkpoints, trainer)
        if seen["model"].sharded is not None:
            seen["save"] = seen["model"].sharded.gathered_digests()

    finetune_module.assemble, FinetuneModule.configure_gradient_clipping = assemble, clip
    Checkpoints.save = save
    finetune(tiny_config(base, data, out, **changes))
    return {key: value for key, value in seen.items() if key != "model"}


CASES = {
    "nf4-language": {"recipe.lora": True, "recipe.rank": 2},
    "rtn-language": {},
    "folder-language": {"train.checkpointing": True},
    "nf4-images": {"recipe.lora": True, "recipe.rank": 2, "train.checkpointing": True},
    "rtn-images": {"recipe.lora": True, "recipe.rank": 2},
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, tokenizer_file, deep_folder, nine_items, nine_pictures):
    """base, data, settings of a run, and its output on one process: 9 items in steps of 4, the last of one item."""
    method, _, kind = request.param.partition("-")
    folder = tmp_path_factory.mktemp("alone")
    base, data = deep_folder, nine_items
    if kind == "images":
        (folder / "base").mkdir()
        base, data = write_qformer_base(folder / "base", tokenizer_file, layers=4), nine_pictures
    if method == "folder":  # in whole numbers, as quantize.py writes it
        base = folder / "int4"
        write_int4(write_base(folder / "base", tokenizer_file, layers=4), base)
    changes = RUN | CASES[request.param] | {"save.step_interval": 2, "data.val_config": str(data)}
    if method != "folder":
        changes |= {"quantization.method": method} | ({"quantization.group_size": 32} if method == "rtn" else {})
    finetune(tiny_config(base, data, folder / "out", **changes))
    return base, data, changes, folder / "out"


@pytest.mark.parametrize("strategy", ["sdp", "fsdp"])
def test_two_ranks_give_the_losses_and_trainables_of_one_process(strategy, case, tmp_path):
    base, data, changes, alone = case
    fast = changes.get("quantization.method") == "nf4"  # fused blocks and shared rows on the ranks, neither alone
    changes = changes | {"train.batch_size": 1, "train.accum_iter": 2, "strategy.data_parallel": strategy}
    changes |= {"fast.enabled": fast}
    seen = run_ranks(watched_run, base, data, tmp_path / "two", changes)
    for rank in seen:
        assert not isinstance(rank, BaseException), rank
    for name in ("loss", "val_loss"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(alone, name), rel=1e-5)
    assert update_distance(alone, tmp_path / "two", base) < 1e-4
    if strategy == "fsdp":
        for rank in seen:
            share, whole = rank["share"]
            assert share * 2 == whole
            assert len(rank["before"]) >= 4 * 7 * 3  # blocks x linears x tensors of each
            assert rank["before"] == rank["first step"] == rank["save"]


def stopped_while_validating(base: Path, data: Path, out: Path, changes: dict[str, Any], stops: bool) -> int:
    """Rank 1 alone is told to stop, in its first batch of validation. The code that the rank ends with."""
    original = FinetuneModule.validation_step

    def validation_step(module, batch, batch_idx):
        if stops and find_world().rank == 1 and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        original(module, batch, batch_idx)

    FinetuneModule.validation_step = validation_step
    try:
        finetune(tiny_config(base, data, out, **changes))
    except Interrupted as stop:
        return stop.code
    return 0


def test_fsdp_that_is_stopped_while_validating_saves_and_goes_on_to_the_same_bits(tmp_path, deep_folder, nine_items):
    changes = RUN | {
        "quantization.method": "nf4",
        "train.batch_size": 1,
        "train.val_interval": 0.5,
        "data.val_config": str(nine_items),
        "strategy.data_parallel": "fsdp",
        "save.step_interval": 100,
    }
    codes = []
    for out, stops in (("whole", False), ("stopped", True), ("stopped", False)):
        codes.append(run_ranks(stopped_while_validating, deep_folder, nine_items, tmp_path / out, changes, stops))
        if stops:
            assert [path.name for path in (tmp_path / out / "checkpoints").iterdir()] == ["step-00000002"]
    assert codes == [[0, 0], [143, 143], [0, 0]]
    assert_same_bits(trainables(tmp_path / "stopped"), trainables(tmp_path / "whole"))


def test_the_end_of_training_leaves_the_weights_where_they_are(tmp_path, meta_folder, nine_items, monkeypatch):
    """Lightning would move the model to the CPU: a whole base a rank, and with fsdp out of its buffers."""
    moved, train, apply = [], FinetuneModule.training_step, QuantLinear._apply

    def training_step(module, batch, batch_idx):
        moved.clear()
        return train(module, batch, batch_idx)

    monkeypatch.setattr(FinetuneModule, "training_step", training_step)
    monkeypatch.setattr(QuantLinear, "_apply", lambda layer, *_, **__: moved.append(layer) or apply(layer, *_, **__))
    finetune(tiny_config(meta_folder, nine_items, tmp_path / "out", **{"quantization.method": "nf4"}))
    assert moved == []


def test_fsdp_without_only_save_trainable_is_refused(tmp_path, meta_folder, nine_items, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    changes = {"strategy.data_parallel": "fsdp", "only_save_trainable": False}
    with pytest.raises(UserError, match=r"--data_parallel fsdp: .*--only_save_trainable.*scripts/export.py"):
        finetune(tiny_config(meta_folder, nine_items, tmp_path / "out", **changes))


def test_fsdp_on_one_process_shards_nothing(tmp_path, meta_folder, nine_items):
    out = finetune(tiny_config(meta_folder, nine_items, tmp_path / "out", **{"strategy.data_parallel": "fsdp"}))
    assert (out / "trainable.safetensors").is_file()


# --- blocks that take turns -------------------------------------------------------------------------------------------


def five_blocks(method: str, checkpointing: bool = False) -> Llama:
    """A quantized model ready to train, the same on every rank; dropout-free."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = Llama(config)
    weights = {
        name: torch.randn(layer.weight.shape) / 8
        for name, layer in model.named_modules()
        if hasattr(layer, "in_features")
    }
    quantize(model, QuantizationConfig(method=QuantMethod(method), group_size=32), torch.float32)
    add_trainables(model, RECIPE)
    mark_trainable(model, RECIPE)
    for name, layer in block_linears(model).items():
        layer.load_weight(weights[canonical_name(name + ".").rstrip(".")])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.model.recomputed = len(model.model.layers) if checkpointing else 0
    return model.train()


def sharded(model: Llama) -> ShardedPayload:
    payload = ShardedPayload(model, dist.get_rank(), dist.get_world_size())
    for name in block_linears(model):
        payload.loaded(canonical_name(f"{name}.weight"))
    payload.connect()
    return payload


def step(model: Llama) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.arange(32, device=model.device).reshape(2, 16) * 7 % 96
    positions = torch.arange(16, device=model.device).expand(2, 16)
    model.zero_grad()
    loss = batch_loss(model, {"input_ids": ids, "position_ids": positions, "targets": ids.roll(-1, 1)})
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def whole_against_sharded(method: str, checkpointing: bool, kind: str) -> dict[str, Any]:
    """Two steps and a validation of both on this rank; the blocks gathered, in order, step by step."""
    world = find_world()
    join_ranks(world)
    whole, model = (five_blocks(method, checkpointing).to(world.device) for _ in range(2))
    payload = sharded(model)
    if kind == "compiled":
        for block in model.model.layers:
            block.forward = torch.compile(block.forward, backend="aot_eager")
    if kind == "fused":
        fuse_blocks(whole)
        fuse_blocks(model)
    fetched, original = [], sharding.all_gather

    def gather(output, share, **named):
        fetched[-1].append(next(i for i, unit in enumerate(payload._units) if unit.share is share))
        assert output.numel() == payload._units[0].size
        return original(output, share, **named)

    sharding.all_gather = gather
    same = []
    for _ in range(2):
        fetched.append([])
        (loss, gradients), (other, others) = step(whole), step(model)
        same.append(torch.equal(loss, other) and all(torch.equal(gradients[n], others[n]) for n in gradients))
    with torch.no_grad():
        fetched.append([])
        ids = torch.arange(8, device=world.device).unsqueeze(0)
        same.append(torch.equal(whole(ids), model(ids)))
    sharding.all_gather = original
    parts = sum(layer.payload[0].numel() for layer in block_linears(whole).values())
    return {
        "same": same,
        "fetched": fetched,
        "held": (payload.share_bytes, payload.whole_bytes, payload.buffer_bytes, parts),
        "nan patterns": torch.cat([unit.share for unit in payload._units]).view(torch.bfloat16).isnan().sum().item(),
        "unchanged": payload.gathered_digests() == payload.digests,
    }


@pytest.mark.parametrize(
    ("method", "checkpointing", "kind"),
    [("nf4", False, "plain"), ("rtn", True, "plain"), ("nf4", True, "compiled"), ("nf4", True, "fused")],
)
def test_blocks_in_shares_compute_what_whole_ones_do_and_each_is_gathered_once_a_pass(method, checkpointing, kind):
    for rank in run_ranks(whole_against_sharded, method, checkpointing, kind):
        assert not isinstance(rank, BaseException), rank
        assert rank["same"] == [True, True, True]
        first, second, validation = rank["fetched"]
        assert first == [0, 1, 2, 3, 4, 2, 1, 0]  # 4 and 3 are still there when backward begins
        assert second == [2, 3, 4, 2, 1, 0]  # as 0 and 1 are when the next forward does
        assert validation == [2, 3, 4]
        share, whole, buffers, codes = rank["held"]
        assert whole / 2 == share and codes <= whole <= 1.5 * codes
        assert buffers == 2 * whole / BLOCKS
        assert rank["unchanged"]
        assert rank["nan patterns"] > 0  # bytes that a cast to 16-bit floats and back need not keep
