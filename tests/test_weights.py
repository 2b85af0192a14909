"""Weights in: which folder each comes from, and what is named when one is missing or fits nowhere."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, meta_weights
from safetensors.torch import load_file, save_file
from test_bases import refused
from test_result import NORM_BIAS, NORM_BIAS_LORA, logits_of, saved, trained
from torch import Tensor

import accessory
from accessory.assemble import assemble
from accessory.bases import Folder
from accessory.config import ModelConfig, QuantizationConfig, RecipeConfig
from accessory.tuning.recipe import trainable_state

# --- what merges with what -------------------------------------------------------------------------------------------


def test_loading_reads_each_weight_once(meta_folder, monkeypatch):
    """Besides the norms, which tell bases apart."""
    read = Counter()
    tensor = Folder.tensor
    monkeypatch.setattr(Folder, "tensor", lambda self, name: read.update([name]) or tensor(self, name))
    accessory.load_model(meta_folder)
    assert {count for name, count in read.items() if "norm" not in name} == {1}


def test_of_two_trainables_folders_the_later_wins(meta_folder, tmp_path):
    first, second = trained(meta_folder, seed=0), trained(meta_folder, seed=1)
    folders = [saved(first, tmp_path / "first"), saved(second, tmp_path / "second")]
    assert torch.equal(logits_of(accessory.load_model([meta_folder, *folders])), logits_of(second))
    assert torch.equal(logits_of(accessory.load_model([meta_folder, *reversed(folders)])), logits_of(first))


def test_training_goes_on_from_trainables_that_a_folder_holds_with_fresh_lora_beside_them(meta_folder, tmp_path):
    model = trained(meta_folder)
    folders = [str(meta_folder), str(saved(model, tmp_path / "run"))]
    grown = assemble(
        ModelConfig(pretrained_path=folders), QuantizationConfig(), NORM_BIAS_LORA, torch.device("cpu"), torch.float32
    )
    assert torch.equal(logits_of(grown), logits_of(model))
    fresh = {name for name in trainable_state(grown) if "lora" in name}
    assert len(fresh) == 8


def test_what_is_found_in_the_folders_is_marked_as_trainable_and_the_base_is_not(meta_folder, tmp_path):
    folder = saved(trained(meta_folder), tmp_path / "run")
    assert trainable_state(accessory.load_model([meta_folder])) == {}
    found = trainable_state(accessory.load_model([meta_folder, folder]))
    assert found.keys() == load_file(folder / "trainable.safetensors").keys()


def test_lora_of_a_folder_that_names_no_recipe_is_found_with_its_rank_and_a_scale_of_one(tmp_path):
    """LLaMA2-Accessory's output: no alpha anywhere, y = W x + B A x. B is stored by columns, but held by rows, as
    gradients are."""
    weights = meta_weights()
    torch.save(weights, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 64, generator=g), torch.randn(4, 192, generator=g).T
    (tmp_path / "lora").mkdir()
    name = "layers.0.feed_forward.w3"
    update = {f"llma.{name}.lora_a.weight": a, f"llma.{name}.lora_b.weight": b}
    missing = {
        f"llma.layers.1.feed_forward.w3.{leaf}.weight": torch.zeros(shape)
        for leaf, shape in (("lora_a", (4, 64)), ("lora_b", (192, 4)))
    }
    torch.save({"model": update | missing}, tmp_path / "lora" / "consolidated.00-of-01.model.pth")
    merged = tmp_path / "merged"
    merged.mkdir()
    torch.save(weights | {f"{name}.weight": weights[f"{name}.weight"] + b @ a}, merged / "consolidated.00.pth")
    (merged / "params.json").write_text(json.dumps(PARAMS))
    found = accessory.load_model([tmp_path, tmp_path / "lora"])
    torch.testing.assert_close(logits_of(found), logits_of(accessory.load_model([merged])), rtol=0, atol=1e-5)
    assert all(p.is_contiguous() for p in found.parameters())


# --- what is refused -------------------------------------------------------------------------------------------------


def rewritten(folder: Path, change) -> Path:
    """The same trainables with `change` applied to their tensors, and nothing in meta.json that could notice."""
    file = folder / "trainable.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}))
    return folder


def test_a_key_that_fits_nowhere_in_the_model_is_named(meta_folder, tmp_path):
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.7.mlp.up_proj.bias"] = torch.zeros(192)

    folder = rewritten(saved(trained(meta_folder), tmp_path / "run"), add)
    message = refused(accessory.load_model, [meta_folder, folder])
    assert str(folder) in message and "model.layers.7.mlp.up_proj.bias fits nowhere" in message


def test_a_trainable_of_the_wrong_shape_is_named_with_both_shapes(meta_folder, tmp_path):
    def shorten(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(60)

    folder = rewritten(saved(trained(meta_folder), tmp_path / "run"), shorten)
    message = refused(accessory.load_model, [meta_folder, folder])
    assert str(folder) in message and "model.norm.weight has shape [60], the model wants [64]" in message


def test_a_trainable_that_the_recipe_asks_for_and_no_folder_holds_is_named(meta_folder, tmp_path):
    def remove(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.self_attn.v_proj.bias"]

    folder = rewritten(saved(trained(meta_folder), tmp_path / "run"), remove)
    message = refused(accessory.load_model, [meta_folder, folder])
    assert str(folder) in message and "1 weights are missing" in message
    assert "model.layers.1.self_attn.v_proj.bias" in message


def test_a_weight_that_a_hugging_face_base_lacks_is_named(hf_folder, tmp_path):
    tensors = load_file(hf_folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    message = refused(accessory.load_model, [tmp_path])
    assert str(tmp_path) in message and "model.layers.1.mlp.gate_proj.weight" in message


@pytest.mark.parametrize(
    ("recipe", "hint"),
    [
        (RecipeConfig(name="lora", norm=False, bias=False, lora=True), "choose recipe=norm_bias,"),
        (RecipeConfig(), "choose recipe=norm_bias_lora,"),
    ],
    ids=["biases", "lora"],
)
def test_trainables_that_the_chosen_recipe_has_no_place_for_are_refused_with_recipes_that_have(
    meta_folder, tmp_path, recipe, hint
):
    start = NORM_BIAS if recipe.lora else NORM_BIAS_LORA
    folder = saved(trained(meta_folder, start), tmp_path / "run", start)
    config = ModelConfig(pretrained_path=[str(meta_folder), str(folder)])
    message = refused(assemble, config, QuantizationConfig(), recipe, torch.device("cpu"), torch.float32)
    assert str(folder) in message and hint in message
