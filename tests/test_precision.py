"""The compute type of who asks for none: by the device, and a run keeps it."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_finetune import RESUMED, interrupt, short_data, tiny_config

import accessory
from accessory import demo
from accessory.config import ModelConfig, Precision, QuantizationConfig, QuantMethod
from accessory.demo_flags import add_generation_flags, add_model_flags, parse
from accessory.errors import UserError
from accessory.estimate.cases import Estimator
from accessory.estimate_cli import EstimateConfig
from accessory.finetune import finetune
from accessory.precision import default_precision, multiplies_bf16
from accessory.quantization.job import quantize_base
from accessory.quantize_options import Method, QuantizeConfig
from accessory.strategies import find_world
from accessory.tools import EvaluateConfig, evaluate

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ZEN3 = {"avx2": True, "avx512_bf16": False, "amx_bf16": False, "cpu_name": "AMD EPYC"}
WITH_BF16 = {
    "Zen 4": ZEN3 | {"avx512_f": True, "avx512_bf16": True},
    "Sapphire Rapids": ZEN3 | {"avx512_f": True, "avx512_bf16": True, "amx_bf16": True},
    "Graviton 3": {"neon": True, "bf16": True},
}
WITHOUT_BF16 = {"Zen 3": ZEN3, "Ice Lake": ZEN3 | {"avx512_f": True}, "Graviton 2": {"neon": True, "bf16": False}}


def on_cpu(monkeypatch, capabilities: dict) -> None:
    monkeypatch.setattr("accessory.precision._cpu_capabilities", lambda: capabilities)


@pytest.fixture(params=[(WITH_BF16["Zen 4"], "bf16"), (ZEN3, "tf32")], ids=["with bf16", "without"])
def usual(request, monkeypatch) -> str:
    """On a CPU of either kind, what is its compute type."""
    capabilities, precision = request.param
    on_cpu(monkeypatch, capabilities)
    return precision


@pytest.fixture
def data(tmp_path) -> Path:
    return short_data(tmp_path / "data")


def run_without_one(meta_folder: Path, data: Path, out: Path, **changes):
    return tiny_config(meta_folder, data, out, **{"train.precision": None, "train.max_steps": 1} | changes)


def started_with(out: Path) -> str:
    return json.loads((out / "run.json").read_text())["precision"]


@pytest.mark.parametrize("name", WITH_BF16)
def test_a_cpu_with_instructions_for_bf16_computes_in_it(name, monkeypatch):
    on_cpu(monkeypatch, WITH_BF16[name])
    assert default_precision(CPU) is Precision.bf16


@pytest.mark.parametrize("name", WITHOUT_BF16)
def test_a_cpu_without_them_computes_in_fp32(name, monkeypatch):
    on_cpu(monkeypatch, WITHOUT_BF16[name])
    assert default_precision(CPU) is Precision.tf32


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((7, 5), "fp16"), ((7, 0), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((9, 0), "bf16")],
)
def test_a_gpu_computes_in_bf16_from_ampere_on_and_in_fp16_before(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert default_precision(GPU).value == precision


@pytest.mark.skipif(platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="reads Linux's words")
def test_this_cpus_instructions_are_those_that_linux_names():
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    assert multiplies_bf16(CPU) == (not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags))


def test_a_run_computes_as_the_cpu_can_and_says_so(usual, meta_folder, data, tmp_path, capsys, caught_dtype):
    out = finetune(run_without_one(meta_folder, data, tmp_path / "out"))
    assert started_with(out) == usual
    assert caught_dtype == {"bf16": [torch.bfloat16], "tf32": [torch.float32]}[usual]
    assert f"precision: {usual}" in (out / "config.yaml").read_text()
    told = f"compute in {usual}" + ": this CPU has no instructions for bf16" * (usual == "tf32")
    assert f"; {told}\n" in capsys.readouterr().out


@pytest.fixture
def caught_dtype(monkeypatch) -> list[torch.dtype]:
    """Of the model that a run trains."""
    import accessory.finetune as module

    build, seen = module._build, []

    def caught(*args):
        model = build(*args)
        seen.append(model.dtype)
        return model

    monkeypatch.setattr(module, "_build", caught)
    return seen


def test_what_is_asked_for_is_taken_on_a_cpu_without_bf16_too(monkeypatch, meta_folder, data, tmp_path, capsys):
    on_cpu(monkeypatch, ZEN3)
    out = finetune(run_without_one(meta_folder, data, tmp_path / "out", **{"train.precision": "bf16"}))
    assert started_with(out) == "bf16"
    assert "compute in bf16, slowly: this CPU has no instructions for it\n" in capsys.readouterr().out


@pytest.mark.parametrize("named", [False, True], ids=["output_dir", "--resume"])
def test_a_run_that_is_continued_elsewhere_keeps_its_own(named, monkeypatch, meta_folder, data, tmp_path, caught_dtype):
    on_cpu(monkeypatch, WITH_BF16["Zen 4"])
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED | {"train.precision": None})
    interrupt(monkeypatch, config, 6)
    on_cpu(monkeypatch, ZEN3)
    if named:
        config = replace(
            config, output_dir=str(tmp_path / "moved"), resume=replace(config.resume, path=config.output_dir)
        )
    out = finetune(config)
    assert started_with(out) == "bf16" and caught_dtype == [torch.bfloat16, torch.bfloat16]


def test_a_kept_one_that_the_cpu_would_not_choose_is_explained(monkeypatch, meta_folder, data, tmp_path, capsys):
    on_cpu(monkeypatch, ZEN3)
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED | {"train.precision": None})
    interrupt(monkeypatch, config, 6)
    on_cpu(monkeypatch, WITH_BF16["Zen 4"])
    capsys.readouterr()
    finetune(config)
    assert "compute in tf32, as the run was started\n" in capsys.readouterr().out


def on_unlike_cpus(base: Path, data: Path, out: Path) -> str:
    """What a run tells of whose ranks the second alone has bf16."""
    import accessory.precision as module

    module._cpu_capabilities = lambda: WITH_BF16["Zen 4"] if find_world().rank == 1 else ZEN3
    with pytest.raises(UserError) as caught:
        finetune(run_without_one(base, data, out))
    return str(caught.value)


def test_ranks_on_unlike_cpus_are_told_to_agree(meta_folder, data, tmp_path):
    for told in run_ranks(on_unlike_cpus, meta_folder, data, tmp_path / "out"):
        assert told.startswith("rank 1 has precision='bf16', rank 0 has 'tf32'; give all the same --precision")


def test_another_one_by_name_is_refused_when_continuing(monkeypatch, meta_folder, data, tmp_path):
    on_cpu(monkeypatch, ZEN3)
    config = tiny_config(meta_folder, data, tmp_path / "out", **RESUMED | {"train.precision": None})
    interrupt(monkeypatch, config, 6)
    config.train.precision = Precision.bf16
    with pytest.raises(
        UserError, match="its run was started with precision='tf32', this one has 'bf16'; give the same"
    ):
        finetune(config)


def test_what_an_unfinished_start_left_behind_decides_nothing(monkeypatch, meta_folder, data, tmp_path):
    """run.json without a checkpoint: there is nothing to continue."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text('{"precision": "bf16"}')
    on_cpu(monkeypatch, ZEN3)
    assert started_with(finetune(run_without_one(meta_folder, data, tmp_path / "out"))) == "tf32"


def test_an_evaluation_computes_as_the_cpu_can_and_says_so(usual, meta_folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Join the paths of two folders. " * 20)
    model = ModelConfig(pretrained_path=[str(meta_folder)])
    figures = evaluate(EvaluateConfig(model, device="cpu", text=str(text), seqlen=32))
    assert figures["precision"] == usual
    assert f"predictions, none, {usual})" in capsys.readouterr().out


def test_three_forms_side_by_side_stay_in_16_bit(usual, meta_folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Join the paths of two folders. " * 20)
    model, quantization = ModelConfig(pretrained_path=[str(meta_folder)]), QuantizationConfig(QuantMethod.rtn)
    figures = evaluate(EvaluateConfig(model, quantization, device="cpu", text=str(text), seqlen=32, side_by_side=True))
    whole = accessory.load_model([str(meta_folder)], dtype=torch.bfloat16)
    assert figures["precision"] == "bf16" and "predictions, bf16)" in capsys.readouterr().out
    assert figures["side_by_side"][0]["memory_bytes"] == sum(t.nbytes for t in (*whole.parameters(), *whole.buffers()))


@pytest.mark.parametrize(
    ("more", "of_tf32"),
    [(["--quant"], torch.float32), ([], torch.bfloat16), (["--quant", "--dtype", "fp16"], torch.float16)],
    ids=["quantized", "16 bit", "asked"],
)
def test_an_answer_of_a_quantized_base_is_computed_as_the_cpu_can(more, of_tf32, usual, meta_folder, monkeypatch):
    words = ["demo", "--pretrained_path", str(meta_folder), "--device", "cpu", "--prompt", "Why?", *more]
    monkeypatch.setattr("sys.argv", words)
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    add_generation_flags(parser)
    dtype = demo.load(parse(parser)).dtype
    assert dtype is (of_tf32 if usual == "tf32" or "--dtype" in more else torch.bfloat16)


def test_an_estimate_without_a_gpu_is_of_one_with_bf16(monkeypatch):
    on_cpu(monkeypatch, ZEN3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Estimator(EstimateConfig(size="tiny"), None).dtype is torch.bfloat16


def test_quantizing_keeps_the_bases_type_and_says_where_that_is_slow(usual, meta_folder, tmp_path, capsys):
    model = ModelConfig(pretrained_path=[str(bf16_base(meta_folder, tmp_path / "base"))])
    quantize_base(
        QuantizeConfig(model=model, output_dir=str(tmp_path / "out"), method=Method.rtn, group_size=32, device="cpu")
    )
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("device"))
    assert told.startswith("device      cpu, bfloat16")
    assert ("no instructions for bf16: scripts/quantize.py --precision tf32 is faster" in told) == (usual == "tf32")


def bf16_base(base: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix != ".pth":
            (folder / file.name).write_bytes(file.read_bytes())
            continue
        weights = torch.load(file)
        torch.save({name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}, folder / file.name)
    return folder
