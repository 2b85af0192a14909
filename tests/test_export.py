"""Exports as other programs read them: transformers' AutoModel and PEFT's PeftModel."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, VOCAB, meta_weights
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import accessory
from accessory import hf_files
from accessory.assemble import assemble
from accessory.config import ModelConfig, QuantizationConfig, QuantMethod, RecipeConfig
from accessory.errors import UserError
from accessory.export import check_target, export_hf, export_peft
from accessory.generation import stop_ids
from accessory.models.llama import Llama

IDS = torch.arange(24).reshape(2, 12) * 7 % VOCAB
NORM_BIAS = RecipeConfig()
NORM_BIAS_LORA = RecipeConfig(name="norm_bias_lora", lora=True, rank=4, alpha=8.0)
LORA = RecipeConfig(name="lora", norm=False, bias=False, lora=True, rank=4)
NF4 = QuantizationConfig(method=QuantMethod.nf4)


def trained(
    base: Path,
    recipe: RecipeConfig | None,
    quantization: QuantizationConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> Llama:
    """A model as after training: every trainable moved at random."""
    config = ModelConfig(pretrained_path=[str(base)])
    torch.manual_seed(0)  # LoRA's first values
    model = assemble(config, quantization or QuantizationConfig(), recipe, torch.device("cpu"), dtype)
    g = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=g)
    return model


def write_meta(folder: Path, **params) -> Path:
    torch.save(meta_weights(), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    return folder


@torch.no_grad()
def logits_of(model) -> Tensor:
    found = model(IDS)
    return found if isinstance(found, Tensor) else found.logits


def read_by_transformers(folder: Path) -> LlamaForCausalLM:
    """The model, after a check that nothing was missing, left over or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def refused(action, *args) -> str:
    with pytest.raises(UserError) as caught:
        action(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["meta_folder", "hf_folder"])
@pytest.mark.parametrize("quantization", [None, NF4], ids=["none", "nf4"])
@pytest.mark.parametrize("recipe", [None, NORM_BIAS, NORM_BIAS_LORA], ids=["base", "norm_bias", "norm_bias_lora"])
def test_transformers_computes_the_same_logits_from_an_export(request, tmp_path, base, quantization, recipe):
    model = trained(request.getfixturevalue(base), recipe, quantization)
    export_hf(model, tmp_path / "model", torch.float32)
    theirs = read_by_transformers(tmp_path / "model")
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(logits_of(theirs), logits_of(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("recipe", [LORA, replace(LORA, norm=True), replace(NORM_BIAS, norm=False)])
def test_an_export_needs_neither_biases_nor_norms_to_train(meta_folder, tmp_path, recipe):
    model = trained(meta_folder, recipe, NF4)
    export_hf(model, tmp_path / "model", torch.float32)
    torch.testing.assert_close(logits_of(read_by_transformers(tmp_path / "model")), logits_of(model), rtol=0, atol=2e-5)


def test_rope_scaling_and_theta_of_a_meta_base_are_exported(tmp_path):
    model = trained(write_meta(tmp_path, rope_scaling=0.25, rope_theta=500.0), NORM_BIAS)
    export_hf(model, tmp_path / "model", torch.float32)
    torch.testing.assert_close(logits_of(read_by_transformers(tmp_path / "model")), logits_of(model), rtol=0, atol=2e-5)


def test_a_quantized_lm_head_is_exported_dequantized(meta_folder, tmp_path):
    model = trained(meta_folder, NORM_BIAS, replace(NF4, lm_head=True))
    export_hf(model, tmp_path / "model", torch.float32)
    torch.testing.assert_close(logits_of(read_by_transformers(tmp_path / "model")), logits_of(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}], ids=["default", "fp16"])
def test_a_16_bit_export_holds_the_fp32_values_rounded_once(meta_folder, tmp_path, options):
    model = trained(meta_folder, NORM_BIAS_LORA, NF4, torch.bfloat16)
    dtype = options.get("dtype", torch.bfloat16)
    export_hf(model, tmp_path / "wide", torch.float32)
    export_hf(model, tmp_path / "narrow", **options)
    wide, narrow = stored_tensors(tmp_path / "wide"), stored_tensors(tmp_path / "narrow")
    assert read_by_transformers(tmp_path / "narrow").dtype == dtype
    assert wide.keys() == narrow.keys()
    assert [name for name in wide if not torch.equal(wide[name].to(dtype), narrow[name])] == []


def test_merging_in_a_bf16_model_is_done_in_fp32(meta_folder, tmp_path):
    model = trained(meta_folder, NORM_BIAS_LORA, NF4, torch.bfloat16)
    export_hf(model, tmp_path / "model", torch.float32)
    layer = model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    expected = layer.base_layer.dequantize(torch.float32).double() + 8 / 4 * (b @ a)
    found = stored_tensors(tmp_path / "model")["model.layers.0.self_attn.q_proj.weight"]
    assert (found.double() - expected).norm() < 1e-6 * expected.norm()


def test_an_export_in_several_files_is_the_export_in_one(meta_folder, tmp_path, monkeypatch):
    model = trained(meta_folder, NORM_BIAS_LORA)
    export_hf(model, tmp_path / "one", torch.float32)
    monkeypatch.setattr(hf_files, "SHARD_BYTES", 100_000)
    export_hf(model, tmp_path / "many", torch.float32)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 110_000 for file in files)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(name in load_file(tmp_path / "many" / file) for name, file in index.items())
    one, many = stored_tensors(tmp_path / "one"), stored_tensors(tmp_path / "many")
    assert one.keys() == many.keys() == index.keys()
    assert torch.equal(
        logits_of(read_by_transformers(tmp_path / "one")), logits_of(read_by_transformers(tmp_path / "many"))
    )


@pytest.mark.parametrize("quantization", [None, NF4], ids=["none", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_exporting_leaves_the_model_as_it_was(meta_folder, tmp_path, quantization, dtype):
    model = trained(meta_folder, NORM_BIAS_LORA, quantization, dtype)
    before = logits_of(model)
    export_hf(model, tmp_path / "model", dtype)
    assert torch.equal(logits_of(model), before)


def test_a_tied_output_layer_stays_tied_and_is_stored_once(hf_folder, tmp_path):
    export_hf(trained(hf_folder, NORM_BIAS), tmp_path / "model")
    assert "lm_head.weight" not in stored_tensors(tmp_path / "model")
    theirs = read_by_transformers(tmp_path / "model")
    assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()


def test_an_export_is_a_base_for_us_as_well_with_the_same_tokenizer(meta_folder, tmp_path):
    model = trained(meta_folder, NORM_BIAS_LORA, NF4)
    export_hf(model, tmp_path / "model", torch.float32)
    again = accessory.load_model([tmp_path / "model"])
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=0, atol=2e-5)
    text = "Wrap these lines of text."
    assert again.tokenizer.encode(text, bos=True, eos=True) == model.tokenizer.encode(text, bos=True, eos=True)


def test_an_export_ends_answers_where_its_base_does(hf_folder, tmp_path):
    model = trained(hf_folder, NORM_BIAS)
    model.config.eos_token_id = [model.tokenizer.eos_id, 5]
    export_hf(model, tmp_path / "model")
    assert stop_ids(accessory.load_model([tmp_path / "model"])) == stop_ids(model) == {model.tokenizer.eos_id, 5}


def test_an_export_without_any_trainables_of_a_meta_base_adds_no_biases(meta_folder, tmp_path):
    export_hf(trained(meta_folder, None), tmp_path / "model")
    assert not any(name.endswith("bias") for name in stored_tensors(tmp_path / "model"))


def test_an_export_that_breaks_off_leaves_nothing(meta_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("stopped")

    monkeypatch.setattr(hf_files.ShardWriter, "close", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        export_hf(trained(meta_folder, NORM_BIAS), tmp_path / "model")
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "model").exists()


@pytest.mark.parametrize(("name", "kind"), [("config.json", "model"), ("notes.txt", "something")])
def test_a_folder_that_holds_something_is_not_exported_into(tmp_path, name, kind):
    (tmp_path / name).touch()
    message = refused(check_target, tmp_path)
    assert str(tmp_path) in message and f"holds {kind} already" in message


@pytest.mark.parametrize("name", [".", "new"])
def test_an_empty_or_a_missing_folder_is_exported_into(meta_folder, tmp_path, name):
    check_target(tmp_path / name)
    export_hf(accessory.load_model(str(meta_folder)), tmp_path / name)
    assert (tmp_path / name / "model.safetensors").is_file()


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [LORA, replace(LORA, alpha=12.0), replace(LORA, targets=["q_proj", "down_proj"])],
    ids=["all-linears", "alpha", "two-targets"],
)
def test_peft_computes_the_same_logits_from_an_adapter_on_the_base(hf_folder, tmp_path, recipe):
    model = trained(hf_folder, recipe)
    export_peft(model, tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(hf_folder).eval()
    without = logits_of(base)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(theirs), logits_of(model), rtol=0, atol=2e-5)
    assert not torch.allclose(without, logits_of(model), atol=1e-2)


def test_norms_that_trained_beside_lora_reach_peft_as_well(hf_folder, tmp_path):
    model = trained(hf_folder, replace(LORA, norm=True))
    export_peft(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(hf_folder).eval(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(theirs), logits_of(model), rtol=0, atol=2e-5)


def test_an_adapter_names_the_base_it_belongs_to(hf_folder, tmp_path):
    export_peft(trained(hf_folder, LORA), tmp_path / "adapter")
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(hf_folder)


def test_trained_biases_cannot_become_an_adapter(hf_folder, tmp_path):
    message = refused(export_peft, trained(hf_folder, NORM_BIAS_LORA), tmp_path / "adapter")
    assert "a PEFT adapter cannot add biases" in message and "--format hf" in message and "recipe=lora" in message
    assert not (tmp_path / "adapter").exists()


def test_a_model_without_lora_cannot_become_an_adapter(hf_folder, tmp_path):
    message = refused(export_peft, trained(hf_folder, replace(NORM_BIAS, bias=False)), tmp_path / "adapter")
    assert "no LoRA in this model" in message and "--format hf" in message
