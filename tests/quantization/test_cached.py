"""quantization=gptq on a 16-bit base: quantized before training, once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
from test_finetune import SCRIPT, assert_same_bits, short_data, tiny_config, tiny_settings, trainables

import accessory
from accessory.config import QuantizationConfig, QuantMethod
from accessory.errors import UserError
from accessory.finetune import finetune
from accessory.quantization.job import cached, quantize_base
from accessory.quantization.job.result import damage

CALIBRATED_RUN = asdict(QuantizationConfig(method=QuantMethod.int4))
SMALL = {"quantization.group_size": 32, "quantization.nsamples": 8, "quantization.seqlen": 32}


def run(base: Path, data: Path, out: Path, **changes) -> Path:
    settings = {"quantization.method": "gptq", "only_save_trainable": True, "train.max_steps": 2}
    return finetune(tiny_config(base, data, out, **settings | SMALL | changes))


@pytest.fixture
def in_this_process(monkeypatch):
    """Quantizing without a process of its own, which mostly imports."""
    monkeypatch.setattr(cached, "_quantize", quantize_base)


@pytest.fixture
def data(tmp_path) -> Path:
    return short_data(tmp_path / "data")


def test_the_base_is_calibrated_on_the_runs_own_data_and_the_result_belongs_to_it(hf_folder, data, tmp_path):
    out = run(hf_folder, data, tmp_path / "out")
    (folder,) = (tmp_path / "cache" / "accessory" / "quantized").glob("*-gptq-*[0-9a-f]")
    manifest = json.loads((folder / "quantization.json").read_text())
    assert manifest["method"] == "gptq" and manifest["source"] == str(hf_folder)
    assert str(data) in manifest["calibration"]["dataset"]
    meta = json.loads((out / "meta.json").read_text())
    assert meta["base"]["path"] == str(folder) and meta["quantization"]["method"] == "int4"
    model = accessory.load_model([str(folder), str(out)])
    assert sum(p.requires_grad for p in model.parameters()) == 5 + 14


def test_a_second_run_takes_the_base_from_the_cache(hf_folder, data, tmp_path, monkeypatch):
    run(hf_folder, data, tmp_path / "one")
    monkeypatch.setattr(cached, "_quantize", lambda job: pytest.fail("quantized again"))
    again = run(hf_folder, data, tmp_path / "two", **{"optim.lr": 1e-3})
    assert (again / "trainable.safetensors").is_file()


def test_other_settings_make_another_base(hf_folder, data, tmp_path):
    run(hf_folder, data, tmp_path / "one")
    run(hf_folder, data, tmp_path / "two", **{"quantization.bits": 8, "quantization.group_size": -1})
    assert len(list((tmp_path / "cache" / "accessory" / "quantized").glob("*-gptq-*[0-9a-f]"))) == 2


def test_asking_with_the_method_instead_of_the_folder_names_the_way(hf_folder):
    with pytest.raises(UserError, match="quantization=awq: needs calibration, which training does before it starts"):
        accessory.load_model(str(hf_folder), quantization="awq")


def test_data_that_cannot_be_learnt_from_is_told_before_the_base_is_quantized(hf_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "_quantize", lambda job: pytest.fail("quantized"))
    with pytest.raises(UserError, match="shorter than every prompt"):
        run(hf_folder, data, tmp_path / "out", **{"data.max_words": 8})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume.path": "nowhere"}, "--resume nowhere: not a whole checkpoint"),
        ({"data.max_words": 48}, "its run was started with max_words=64, this one has 48"),
        ({"quantization.method": "awq"}, "its run was started with quantization.method='nf4', this one has 'int4'"),
    ],
)
def test_what_cannot_be_continued_is_told_before_the_base_is_quantized(
    changes, message, hf_folder, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(cached, "_quantize", lambda job: pytest.fail("quantized"))
    earlier = {"train.max_steps": 1, "quantization.method": "nf4", "save.step_interval": 1}
    before = finetune(tiny_config(hf_folder, data, tmp_path / "before", **earlier))
    if "quantization.method" not in changes:  # as a run on a calibrated base says it
        run_file = before / "run.json"
        run_file.write_text(json.dumps(json.loads(run_file.read_text()) | {"quantization": CALIBRATED_RUN}))
    with pytest.raises(UserError, match=message):
        run(hf_folder, data, tmp_path / "out", **{"resume.path": str(before), "train.max_steps": 1} | changes)


def test_an_interrupted_run_on_a_calibrated_base_is_continued(hf_folder, data, tmp_path, in_this_process):
    more = {"train.max_steps": 2, "save.step_interval": 1, "optim.lr": 1e-2}
    whole = run(hf_folder, data, tmp_path / "one", **more)
    again = run(
        hf_folder, data, tmp_path / "two", **more, **{"resume.path": str(whole / "checkpoints" / "step-00000001")}
    )
    assert_same_bits(trainables(again), trainables(whole))


def test_a_logger_without_a_login_is_told_before_the_base_is_quantized(hf_folder, data, tmp_path, monkeypatch):
    def refuse(**_) -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr("pytorch_lightning.loggers.WandbLogger", refuse)
    monkeypatch.setattr(cached, "_quantize", lambda job: pytest.fail("quantized"))
    with pytest.raises(UserError, match=r"logger=wandb: api_key not configured .*; run `wandb login`"):
        run(hf_folder, data, tmp_path / "out", **{"logger.name": "wandb"})


@pytest.mark.parametrize("lacks", ["model.safetensors", "tokenizer.model", "quantization.json"])
def test_a_damaged_base_in_the_cache_is_made_again(lacks, hf_folder, data, tmp_path, capsys, in_this_process):
    run(hf_folder, data, tmp_path / "one")
    (folder,) = (tmp_path / "cache" / "accessory" / "quantized").glob("*-gptq-*[0-9a-f]")
    whole = (folder / lacks).read_bytes()
    if lacks == "tokenizer.model":
        (folder / lacks).unlink()
    else:
        (folder / lacks).write_bytes(whole[:-100])
    capsys.readouterr()
    run(hf_folder, data, tmp_path / "two")
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if "is damaged" in line and lacks in line]) == 1
    assert damage(folder) is None
    assert lacks == "quantization.json" or (folder / lacks).read_bytes() == whole


def test_the_process_that_quantizes_ends_with_a_training_that_is_killed(hf_folder, data, tmp_path):
    settings = tiny_settings(hf_folder, data, tmp_path / "out", **SMALL)
    settings |= {"quantization.method": "autoround", "quantization.iters": 10**6, "only_save_trainable": "true"}
    settings["model.pretrained_path"] = f"[{hf_folder}]"
    words = [sys.executable, str(SCRIPT), *(f"{key}={value}" for key, value in settings.items())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    training = subprocess.Popen(words, text=True, start_new_session=True, **pipes)
    try:
        said = []
        while not (said and said[-1].startswith("output ")):  # which the child says, and begins
            said.append(training.stdout.readline())
            assert said[-1], said
        training.kill()  # alone
        rest = ThreadPoolExecutor(1).submit(training.stdout.read)
        rest.result(timeout=10)  # ends with the last process that could write there
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(training.pid, signal.SIGKILL)
        training.wait()


def test_data_that_cannot_calibrate_stops_before_anything_is_written(hf_folder, data, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        run(hf_folder, data, tmp_path / "out", **{"quantization.dataset": str(tmp_path / "nothing.txt")})
    assert not list((tmp_path / "out").iterdir())
