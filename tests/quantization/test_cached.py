"""quantization=gptq on a 16-bit base: quantized before training, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_finetune import short_data, tiny_config

import accessory
from accessory.errors import UserError
from accessory.finetune import finetune
from accessory.quantization.job import cached

SMALL = {"quantization.group_size": 32, "quantization.nsamples": 8, "quantization.seqlen": 32}


def run(base: Path, data: Path, out: Path, **changes) -> Path:
    settings = {"quantization.method": "gptq", "only_save_trainable": True, "train.max_steps": 2}
    return finetune(tiny_config(base, data, out, **settings | SMALL | changes))


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


def test_data_that_cannot_calibrate_stops_before_anything_is_written(hf_folder, data, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        run(hf_folder, data, tmp_path / "out", **{"quantization.dataset": str(tmp_path / "nothing.txt")})
    assert not list((tmp_path / "out").iterdir())
