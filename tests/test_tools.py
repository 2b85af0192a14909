"""What accessory-evaluate, accessory-export and the demo refuse, and when; and the demo's conversation."""

from __future__ import annotations

import argparse
import json
import socket
from types import SimpleNamespace

import pytest
import torch
from conftest import write_data

import accessory
import accessory.assemble
from accessory import demo, demo_flags
from accessory.config import ModelConfig
from accessory.data.prompts import SYSTEM
from accessory.errors import UserError
from accessory.flags import rewrite
from accessory.models import find_device
from accessory.tools import EVALUATE_FLAGS, EvaluateConfig, ExportConfig, evaluate, export

TURNS = [{"from": "human", "value": "Wrap the text"}, {"from": "gpt", "value": "short lines"}]


def evaluation(base, **more) -> EvaluateConfig:
    return EvaluateConfig(model=ModelConfig(pretrained_path=[str(base)]), device="cpu", **more)


@pytest.fixture
def no_model(monkeypatch):
    """Reading a model is a failure."""
    monkeypatch.setattr(accessory.assemble, "assemble", lambda *_: pytest.fail("the model was read"))


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", "meta"])
def test_unknown_device_is_refused(name, hf_folder):
    with pytest.raises(UserError, match=rf"--device {name}: unknown device"):
        accessory.load_model(str(hf_folder), device=name)


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no usable GPU"):
        find_device("cuda:0")
    assert find_device(None) == torch.device("cpu")


def test_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="--device cuda:2: no such GPU; this machine has 2"):
        find_device("cuda:2")


# --- evaluate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"output": "{folder}/nowhere/x.json"}, "--output .*: there is no folder .*nowhere"),
        ({"output": "{folder}"}, "--output .*: is a folder"),
        ({"text": None, "data_config": "{folder}/nowhere.yaml"}, "nowhere.yaml: no such file"),
    ],
)
def test_what_can_be_checked_is_checked_before_the_model_is_read(wrong, complaint, hf_folder, tmp_path, no_model):
    (tmp_path / "text.txt").write_text("text")
    settings = {"text": str(tmp_path / "text.txt")} | wrong
    settings = {key: value and value.format(folder=tmp_path) for key, value in settings.items()}
    with pytest.raises(UserError, match=complaint):
        evaluate(evaluation(hf_folder, **settings))


def test_conversations_are_measured_with_dialog(hf_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = str(write_data(tmp_path / "data", [{"conversations": TURNS}]))
    with pytest.raises(UserError, match="add --dialog"):
        evaluate(evaluation(hf_folder, data_config=data))
    assert rewrite(["--dialog"], EVALUATE_FLAGS) == ["dialog=true"]
    figures = evaluate(evaluation(hf_folder, data_config=data, dialog=True, output="~/x.json"))
    assert json.loads((tmp_path / "x.json").read_text()) == figures
    assert figures["tokens"] > 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"seqlen": 512}, "fewer than one window of seqlen=512"),
        ({"seqlen": 2, "output": "/proc/figures.json"}, "--output /proc/figures.json: cannot be written"),
    ],
)
def test_what_cannot_be_measured_or_kept_is_told_before_that_too(options, complaint, no_model, hf_folder, tmp_path):
    (tmp_path / "text.txt").write_text("short lines of text")
    with pytest.raises(UserError, match=complaint):
        evaluate(evaluation(hf_folder, text=str(tmp_path / "text.txt"), **options))


def test_options_of_the_other_kind_of_data_are_refused(hf_folder):
    with pytest.raises(UserError, match="--max_tokens 5: is for --text"):
        evaluation(hf_folder, data_config="data.yaml", max_tokens=5)
    with pytest.raises(UserError, match="--dialog: is for --data_config"):
        evaluation(hf_folder, text="text.txt", dialog=True)


# --- export ----------------------------------------------------------------------------------------------------------


def test_quantization_of_another_version_is_named(hf_folder, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "trained"
    folder.mkdir()
    save_file({"model.norm.weight": torch.ones(64)}, folder / "trainable.safetensors")
    (folder / "meta.json").write_text(json.dumps({"quantization": {"method": "nf4", "quant_type": "nf4"}}))
    config = ExportConfig(
        model=ModelConfig(pretrained_path=[str(hf_folder), str(folder)]), output_dir=str(tmp_path / "out")
    )
    with pytest.raises(UserError, match=r"meta\.json: quantization: .*quant_type.*; written by another version"):
        export(config)


# --- demo ------------------------------------------------------------------------------------------------------------


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo_flags.add_model_flags(parser)
    demo_flags.add_generation_flags(parser)
    return parser.parse_args(words)


def test_conversation_is_asked_in_the_format_of_dialog_and_stops_at_its_separator(monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "stream", lambda model, *values: asked.append(values) or iter(["answer"]))
    assert list(demo.answers(SimpleNamespace(tokenizer=None), "Wrap it.", "lines", "conversation", 8, 0, 1)) == [
        "answer"
    ]
    assert asked == [(f"{SYSTEM}\n\n### Human: Wrap it.\n\nlines\n### Assistant:", 8, 0.0, 1.0, "\n###", None)]
    assert arguments("--pretrained_path", "x", "--system_prompt", "conversation").system_prompt == "conversation"


def test_port_in_use_is_refused_in_a_line(hf_folder):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        args = arguments("--pretrained_path", str(hf_folder), "--port", str(taken.getsockname()[1]), "--device", "cpu")
        with pytest.raises(UserError, match=r"--port \d+: cannot be opened"):
            demo.serve_single_turn(demo.load(args), args)
