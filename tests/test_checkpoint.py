"""Weights in and trainables out: what pairs, what is refused in one line, and that a save is whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import resource
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, VOCAB, meta_weights
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import accessory
from accessory import checkpoint
from accessory.assemble import assemble
from accessory.bases import Folder
from accessory.checkpoint import open_folders, save_trainable
from accessory.config import ModelConfig, QuantizationConfig, QuantMethod, RecipeConfig
from accessory.errors import UserError
from accessory.files import atomic_folder
from accessory.models.llama import Llama
from accessory.tuning.recipe import trainable_state

IDS = torch.arange(24).reshape(2, 12) * 7 % VOCAB
NORM_BIAS = RecipeConfig()
NORM_BIAS_LORA = RecipeConfig(name="norm_bias_lora", lora=True, rank=4, alpha=8.0, targets=["q_proj", "down_proj"])


def trained(
    base: Path,
    recipe: RecipeConfig = NORM_BIAS,
    method: str = "none",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Llama:
    """A model as after training: every trainable moved at random."""
    quantization = QuantizationConfig(method=QuantMethod(method))
    model = assemble(ModelConfig(pretrained_path=[str(base)]), quantization, recipe, torch.device("cpu"), dtype)
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)
    return model


def saved(model: Llama, folder: Path, recipe: RecipeConfig = NORM_BIAS, method: str = "none") -> Path:
    """What a finished run leaves in its output folder."""
    meta = {
        "llama_type": "llama_peft",
        "base": model.base,
        "recipe": vars(recipe),
        "quantization": {"method": method},
    }
    save_trainable(model, folder, meta, "seed: 0\n", model.tokenizer)
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


@torch.no_grad()
def logits_of(model: Llama) -> Tensor:
    return model(IDS)


def refused(action, *args, **options) -> str:
    """The one line that the user sees."""
    with pytest.raises(UserError) as caught:
        action(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["none", "nf4"])
@pytest.mark.parametrize("recipe", [NORM_BIAS, NORM_BIAS_LORA], ids=lambda recipe: recipe.name)
def test_saved_trainables_loaded_on_their_base_give_the_same_bits(meta_folder, tmp_path, recipe, method, dtype):
    model = trained(meta_folder, recipe, method, dtype)
    folder = saved(model, tmp_path / "run", recipe, method)
    loaded = accessory.load_model([meta_folder, folder], quantization=method, dtype=dtype)
    before, after = trainable_state(model), trainable_state(loaded)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_trainables_on_disk_are_the_fp32_values_of_memory_under_the_bases_names(meta_folder, tmp_path):
    model = trained(meta_folder, NORM_BIAS_LORA, "nf4", torch.bfloat16)
    stored = load_file(saved(model, tmp_path / "run") / "trainable.safetensors")
    layer = model.model.layers[1]
    expected = {
        "model.norm.weight": model.model.norm.weight,
        "model.layers.1.self_attn.q_proj.bias": layer.self_attn.q_proj.base_layer.bias,
        "model.layers.1.mlp.up_proj.bias": layer.mlp.up_proj.bias,
        "model.layers.1.mlp.down_proj.lora_A.weight": layer.mlp.down_proj.lora_A["default"].weight,
        "model.layers.1.mlp.down_proj.lora_B.weight": layer.mlp.down_proj.lora_B["default"].weight,
    }
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert len(stored) == 5 + 14 + 2 * 4  # norms, biases, two matrices on two linears of two blocks
    for name, parameter in expected.items():
        assert torch.equal(stored[name], parameter)


def test_a_saved_folder_says_all_that_is_needed_to_use_it(meta_folder, tmp_path, tokenizer_file):
    folder = saved(trained(meta_folder), tmp_path / "run")
    assert set(content_of(folder)) == {"trainable.safetensors", "meta.json", "config.yaml", "tokenizer.model"}
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["sha256"] == hashlib.sha256((folder / "trainable.safetensors").read_bytes()).hexdigest()
    assert meta["base"]["path"] == str(meta_folder) and meta["versions"]["torch"] == torch.__version__
    assert (folder / "tokenizer.model").read_bytes() == tokenizer_file.read_bytes()
    assert (folder / "trainable.safetensors").stat().st_mode & 0o444 == 0o444  # readable by others


def test_saving_again_replaces_the_result_and_leaves_other_files_of_the_folder(meta_folder, tmp_path):
    folder = saved(trained(meta_folder, seed=0), tmp_path / "run")
    (folder / "curves.png").write_bytes(b"curves")
    second = trained(meta_folder, seed=1)
    saved(second, folder)
    assert torch.equal(logits_of(accessory.load_model([meta_folder, folder])), logits_of(second))
    assert (folder / "curves.png").read_bytes() == b"curves"


@pytest.mark.parametrize("form", [str, Path, lambda path: [str(path)], lambda path: [path]])
def test_pretrained_path_is_a_string_or_a_path_or_a_list_of_either(meta_folder, form):
    assert accessory.load_model(form(meta_folder)).base["path"] == str(meta_folder)


# --- what merges with what -------------------------------------------------------------------------------------------


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
    """LLaMA2-Accessory's output: no alpha anywhere, y = W x + B A x."""
    weights = meta_weights()
    torch.save(weights, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 64, generator=g), torch.randn(192, 4, generator=g)
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


def test_trainables_used_on_another_quantization_than_in_training_are_warned_of(meta_folder, tmp_path, caplog):
    folder = saved(trained(meta_folder, method="nf4"), tmp_path / "run", method="nf4")
    with caplog.at_level(logging.WARNING):
        accessory.load_model([meta_folder, folder], quantization="nf4")
        assert caplog.messages == []
        accessory.load_model([meta_folder, folder])
    (message,) = caplog.messages
    assert "run was trained on a base with quantization method=nf4, and is used on one with method=none" in message


# --- what is refused -------------------------------------------------------------------------------------------------


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


def test_loading_reads_each_weight_once(meta_folder, monkeypatch):
    """Besides the norms, which tell bases apart."""
    read = Counter()
    tensor = Folder.tensor
    monkeypatch.setattr(Folder, "tensor", lambda self, name: read.update([name]) or tensor(self, name))
    accessory.load_model(meta_folder)
    assert {count for name, count in read.items() if "norm" not in name} == {1}


def test_an_empty_list_of_folders_is_refused():
    assert "--pretrained_path is empty" in refused(open_folders, [])


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


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer_file):
    weights = meta_weights()
    for name in ("tok_embeddings.weight", "output.weight"):
        weights[name] = weights[name][:300]
    torch.save(weights, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    message = refused(accessory.load_model, [tmp_path], tokenizer_path=tokenizer_file)
    assert str(tokenizer_file) in message and "384" in message and "300" in message
    assert "--tokenizer_path" in message


# --- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["from-the-system", "from-safetensors"],
)
def test_a_full_disk_is_one_line_and_leaves_the_old_result(meta_folder, tmp_path, monkeypatch, failure):
    folder = saved(trained(meta_folder, seed=0), tmp_path / "run")
    before = content_of(folder)

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise failure

    monkeypatch.setattr(checkpoint, "save_file", fail)
    message = refused(saved, trained(meta_folder, seed=1), folder)
    assert "no space left" in message and str(folder) in message and "nothing was overwritten" in message
    assert content_of(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@contextlib.contextmanager
def small_files_only():
    """The system itself refuses to write more than 1,000 bytes to a file. Around the write alone: pytest's output may
    be such a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_the_system_refuses_leaves_the_old_result(meta_folder, tmp_path):
    folder = saved(trained(meta_folder, seed=0), tmp_path / "run")
    before = content_of(folder)
    changed = trained(meta_folder, seed=1)
    with pytest.raises(Exception, match="File too large"), small_files_only():
        saved(changed, folder)
    assert content_of(folder) == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_folder_whose_filling_is_broken_off_never_existed(tmp_path, failure):
    target = tmp_path / "model"
    with pytest.raises(failure), atomic_folder(target) as partial:
        (partial / "weights").write_bytes(b"half")
        raise failure
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_a_folder_is_replaced_by_a_whole_one_or_not_at_all(tmp_path, failure):
    target = tmp_path / "model"
    with atomic_folder(target) as partial:
        (partial / "weights").write_bytes(b"old")
        (partial / "only in the old").touch()
    with pytest.raises(failure), atomic_folder(target) as partial:
        (partial / "weights").write_bytes(b"half")
        raise failure
    assert content_of(target) == {"weights": b"old", "only in the old": b""}
    with atomic_folder(target) as partial:
        (partial / "weights").write_bytes(b"new")
    assert content_of(target) == {"weights": b"new"} and list(tmp_path.iterdir()) == [target]


def test_what_a_killed_save_left_behind_does_not_reach_the_next_one(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "left behind").touch()
    with atomic_folder(tmp_path / "model") as partial:
        (partial / "weights").write_bytes(b"new")
    assert content_of(tmp_path) == {"model/weights": b"new"}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught, atomic_folder(tmp_path / "file" / "model"):
        pass
    assert str(tmp_path / "file" / "model") in str(caught.value) and "cannot be written" in str(caught.value)
