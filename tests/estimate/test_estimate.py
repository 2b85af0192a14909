"""accessory-estimate: what it is asked, what it says, and what it refuses."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import VISION
from estimates import BOTH, NORM_BIAS

import accessory
from accessory.config import (
    DataConfig,
    DataParallel,
    FastConfig,
    LlamaType,
    ModelConfig,
    QuantizationConfig,
    QuantMethod,
    RecipeConfig,
    StrategyConfig,
    TrainConfig,
)
from accessory.errors import UserError
from accessory.estimate import GIB, OVERHEAD, SHAPES, Step, estimate_training, held_bytes, recomputed_blocks_that_fit
from accessory.estimate.cases import Estimator
from accessory.estimate.command import estimate
from accessory.estimate.description import build, describe_model
from accessory.estimate_cli import EstimateConfig
from accessory.quantization import QuantLinear


def asked(**more) -> EstimateConfig:
    return EstimateConfig(**({"size": "tiny", "quantization": QuantizationConfig(QuantMethod.nf4)} | more))


def test_seven_b_trains_as_many_as_published():
    described = describe_model(asked(size="7b"))
    model = build(described, QuantizationConfig(QuantMethod.nf4), BOTH, torch.bfloat16)
    base, trainable = held_bytes(model)
    assert trainable / 4 == pytest.approx(41.6e6, rel=0.001)
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert base == pytest.approx(linears * 4.127 / 8 + 2 * 2 * 32000 * 4096, rel=0.001)


def test_weights_are_counted_as_the_same_without_them(hf_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    quantization = QuantizationConfig(QuantMethod.nf4)
    models = [
        build(describe_model(asked(size=None, model=ModelConfig(pretrained_path=[str(folder)]))), quantization, BOTH,
              torch.float32)
        for folder in (hf_folder, tmp_path)
    ]  # fmt: skip
    loaded = accessory.load_model([str(hf_folder)], quantization="nf4")
    assert held_bytes(models[0], torch.float32) == held_bytes(models[1], torch.float32)
    norms_and_biases = held_bytes(loaded)[0] + 4 * sum(
        m.out_features for m in loaded.modules() if isinstance(m, QuantLinear)
    )
    base, trainable = held_bytes(models[0], torch.float32)
    lora = 4 * sum(p.numel() for name, p in models[0].named_parameters() if "lora_" in name)
    assert base + trainable == norms_and_biases + lora


def test_calibrated_methods_are_counted_by_their_scheme():
    described = describe_model(asked())
    sizes = {}
    for bits in (3, 4, 8):
        quantization = QuantizationConfig(QuantMethod.autoround, bits=bits)
        sizes[bits] = held_bytes(build(described, quantization, NORM_BIAS, torch.bfloat16))[0]
    assert sizes[3] < sizes[4] < sizes[8]


def test_script_prints_a_table_and_writes_the_figures(tmp_path, monkeypatch, capsys):
    scripts = Path(accessory.__file__).resolve().parents[1] / "scripts"
    (tmp_path / "lora.json").write_text(json.dumps({"lora_rank": 16, "bias_tuning": True}))  # as good as recipe=
    words = "--model tiny --quant --llama_config lora.json --batch_size 16 --gpu_memory 0.8 --json out.json"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(scripts)
    monkeypatch.setattr(sys, "argv", ["estimate.py", *words.split()])
    runpy.run_path(str(scripts / "estimate.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "activations" in printed and "does not fit" in printed and "--batch_size" in printed
    figures = json.loads(Path("out.json").read_text())
    assert figures["fits"] is False and figures["gpu_memory"] == int(0.8 * GIB)
    described = describe_model(asked())
    model = build(described, QuantizationConfig(QuantMethod.nf4), BOTH, torch.bfloat16)
    assert figures["train"]["0"]["peak"] == estimate_training(model, Step(16, 512), 0).peak
    assert figures["train"]["4"]["peak"] < figures["train"]["0"]["peak"]


def test_suggestions_give_the_peak_that_they_would_have():
    config = asked(gpu_memory=0.9, recipe=BOTH, train=TrainConfig(batch_size=16, checkpointing=False))
    offered = estimate(config)["suggestions"]
    smaller = replace(config, train=TrainConfig(batch_size=8, accum_iter=2, checkpointing=False))
    assert offered["--batch_size 8 --accum_iter 2"] == estimate(smaller)["train"]["0"]["peak"]
    other = replace(config, recipe=NORM_BIAS)
    assert offered["recipe=norm_bias: no LoRA"] == estimate(other)["train"]["0"]["peak"]
    spread = replace(config, ranks=2, strategy=StrategyConfig(DataParallel.fsdp))
    assert offered["--data_parallel fsdp on 2 GPUs"] == estimate(spread)["train"]["0"]["peak"]
    left = estimate(replace(config, train=TrainConfig(batch_size=16)))
    (some,) = (peak for what, peak in offered.items() if what.startswith("train.checkpointing=null"))
    assert some == left["train"][str(left["recomputed_blocks"])]["peak"]


def test_checkpointing_is_as_told_and_unset_as_few_blocks_as_fit():
    def recomputed(checkpointing, gpu_memory):
        train = TrainConfig(batch_size=16, checkpointing=checkpointing)
        return estimate(asked(recipe=BOTH, train=train, gpu_memory=gpu_memory))["recomputed_blocks"]

    assert [recomputed(told, 0.95) for told in (False, True)] == [0, 4]
    model = build(describe_model(asked()), QuantizationConfig(QuantMethod.nf4), BOTH, torch.bfloat16)
    fewest = recomputed_blocks_that_fit(model, Step(16, 512), int(0.95 * GIB) - OVERHEAD)
    assert 0 < fewest < 4
    assert [recomputed(None, memory) for memory in (0.95, 80)] == [fewest, 0]


def test_without_a_known_gpu_no_block_is_recomputed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert estimate(asked())["recomputed_blocks"] == 0


@pytest.mark.parametrize(
    ("settings", "fused", "captured"),
    [
        ({}, True, True),
        ({"fast": FastConfig(enabled=False)}, False, False),
        ({"fast": FastConfig(blocks=False)}, False, True),
        ({"fast": FastConfig(graphs=False)}, True, False),
        ({"ranks": 2}, True, True),
        ({"ranks": 2, "strategy": StrategyConfig(DataParallel.fsdp)}, True, False),
        ({"recipe": replace(BOTH, dropout=0.1)}, False, False),
    ],
    ids=str,
)
def test_a_step_is_as_fast_as_a_gpu_would_make_it(settings, fused, captured):
    estimator = Estimator(asked(**settings), None)
    step = estimator.step(estimator.asked)
    assert (step.fused, step.captured) == (fused, captured)


def test_packed_rows_hold_as_many_images_as_there_is_room_for(tmp_path):
    (tmp_path / "vision.json").write_text(json.dumps(VISION))
    model = ModelConfig(LlamaType.llama_qformerv2_peft, pretrained_path=[], vision_config=str(tmp_path / "vision.json"))
    steps = []
    for packing in (False, True):
        data = DataConfig(data_config="", max_words=90, packing=packing)
        estimator = Estimator(asked(model=model, data=data), None)
        steps.append(estimator.step(estimator.asked))
    assert [(step.rows, step.width, step.images) for step in steps] == [(4, 90, 4), (4, 90, 4 * 10)]


def test_without_a_gpu_common_sizes_are_listed(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    estimate(asked())
    assert "80 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": None}, "which model"),
        ({"size": "7bb"}, "did you mean 7b"),
        ({"model": ModelConfig(pretrained_path=["base"])}, "leave one of them out"),
        ({"size": None, "model": ModelConfig(pretrained_path=["/nowhere/base"])}, "no such folder"),
        ({"gpu_memory": -1.0}, "--gpu_memory -1: must be above 0"),
        ({"ranks": 0}, "--ranks 0: must be at least 1"),
        ({"train": TrainConfig(batch_size=0)}, "--batch_size 0"),
        ({"quantization": QuantizationConfig(QuantMethod.int4)}, "a base that says how it is stored"),
        ({"recipe": RecipeConfig(projector=True)}, "for models that take images"),
        ({"json": "/nowhere/out.json"}, "--json /nowhere/out.json: name a file in a folder that exists"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(settings, message):
    with pytest.raises(UserError, match=message):
        estimate(asked(**settings))


def test_two_descriptions_of_a_model_are_refused(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps({"dim": 4096}))
    with pytest.raises(UserError, match=r"--model tiny and --llama_config .*params.json: name one"):
        estimate(asked(model=ModelConfig(pretrained_path=[], llama_config=[str(tmp_path / "params.json")])))


def test_a_folder_that_describes_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither weights nor config"):
        estimate(asked(size=None, model=ModelConfig(pretrained_path=[str(tmp_path)])))


def test_shapes_are_llama2s():
    assert SHAPES["70b"] == (8192, 28672, 80, 64, 8, 32000)
