"""Trainables out: what a run leaves behind gives the same bits again, says all it needs, and is whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from conftest import VOCAB
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_bases import refused
from test_files import content_of
from torch import Tensor

import accessory
from accessory import result
from accessory.assemble import assemble
from accessory.config import ModelConfig, QuantizationConfig, QuantMethod, RecipeConfig
from accessory.models.llama import Llama
from accessory.result import save_trainable
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


@torch.no_grad()
def logits_of(model: Llama) -> Tensor:
    return model(IDS)


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

    monkeypatch.setattr(result, "save_file", fail)
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
