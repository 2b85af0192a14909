"""The folders of a model: which order and which pairs are refused in one line, and whose tokenizer is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, VOCAB, meta_weights
from test_bases import refused
from test_result import logits_of, saved, trained

import accessory
from accessory.errors import UserError
from accessory.sources import open_folders

# --- what is opened --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [str, Path, lambda path: [str(path)], lambda path: [path]])
def test_pretrained_path_is_a_string_or_a_path_or_a_list_of_either(meta_folder, form):
    assert accessory.load_model(form(meta_folder)).base["path"] == str(meta_folder)


def test_the_tokenizer_is_that_of_the_last_folder_that_has_one(meta_folder, tmp_path):
    folder = saved(trained(meta_folder), tmp_path / "run")
    assert accessory.load_model([meta_folder, folder]).tokenizer.path == folder / "tokenizer.model"
    (folder / "tokenizer.model").unlink()
    assert accessory.load_model([meta_folder, folder]).tokenizer.path == meta_folder / "tokenizer.model"


def test_without_a_tokenizer_token_ids_still_work(tmp_path):
    torch.save(meta_weights(), tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    model = accessory.load_model([tmp_path])
    assert model.tokenizer is None and logits_of(model).shape == (2, 12, VOCAB)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer_file):
    weights = meta_weights()
    for name in ("tok_embeddings.weight", "output.weight"):
        weights[name] = weights[name][:300]
    torch.save(weights, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    message = refused(accessory.load_model, [tmp_path], tokenizer_path=tokenizer_file)
    assert str(tokenizer_file) in message and "384" in message and "300" in message
    assert "--tokenizer_path" in message


def test_an_empty_list_of_folders_is_refused():
    assert "--pretrained_path is empty" in refused(open_folders, [])


def test_trainables_before_their_base_are_refused_with_the_right_order(meta_folder, tmp_path):
    folder = saved(trained(meta_folder), tmp_path / "run")
    message = refused(accessory.load_model, [folder, meta_folder])
    assert f"{folder} holds trainables only, it cannot come first" in message
    assert message.endswith(f"--pretrained_path {meta_folder} {folder}")


def test_trainables_without_a_base_are_refused_with_the_base_they_name(meta_folder, tmp_path):
    folder = saved(trained(meta_folder), tmp_path / "run")
    message = refused(accessory.load_model, [folder])
    assert message.endswith(f"--pretrained_path {meta_folder} {folder}")


def test_trainables_that_name_a_base_without_its_fingerprint_are_refused(meta_folder, tmp_path):
    folder = saved(trained(meta_folder), tmp_path / "run")
    meta = json.loads((folder / "meta.json").read_text())
    del meta["base"]["fingerprint"]
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"was trained on .*\(fingerprint None\)"):
        accessory.load_model([meta_folder, folder])


def test_trainables_of_another_base_are_refused_with_both_fingerprints(meta_folder, hf_folder, tmp_path):
    model = trained(meta_folder)
    folder = saved(model, tmp_path / "run")
    message = refused(accessory.load_model, [hf_folder, folder])
    other = accessory.load_model([hf_folder]).base["fingerprint"]
    assert str(folder) in message and str(meta_folder) in message and str(hf_folder) in message
    assert model.base["fingerprint"] in message and other in message and model.base["fingerprint"] != other


@pytest.mark.parametrize("position", [-1, 5000])
def test_damaged_trainables_are_refused_by_their_checksum(meta_folder, tmp_path, position):
    file = saved(trained(meta_folder), tmp_path / "run") / "trainable.safetensors"
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    message = refused(accessory.load_model, [meta_folder, file.parent])
    assert str(file) in message and "checksum" in message and "damaged" in message


def test_truncated_trainables_are_refused(meta_folder, tmp_path):
    file = saved(trained(meta_folder), tmp_path / "run") / "trainable.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    message = refused(accessory.load_model, [meta_folder, file.parent])
    assert str(file) in message and "not a whole safetensors file" in message


def test_a_damaged_meta_json_is_named(meta_folder, tmp_path):
    folder = saved(trained(meta_folder), tmp_path / "run")
    (folder / "meta.json").write_text('{"base": {')
    message = refused(accessory.load_model, [meta_folder, folder])
    assert str(folder / "meta.json") in message and "not valid JSON" in message
