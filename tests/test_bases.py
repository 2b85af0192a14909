"""Folders of every kind give the same tensors under one set of names; a damaged one is named in a line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, VOCAB, meta_weights, split_over_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import accessory
from accessory.bases import attach, fingerprint, model_config, open_folder
from accessory.errors import UserError
from accessory.models import hidden_size_of_mlp

IDS = torch.arange(24).reshape(2, 12) * 7 % VOCAB
LINEARS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def write_meta(folder: Path, shards: list[dict[str, Tensor]], **params) -> Path:
    folder.mkdir(exist_ok=True)
    for rank, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    return folder


def write_accessory(folder: Path, shards: list[dict[str, Tensor]], **params) -> Path:
    folder.mkdir(exist_ok=True)
    for rank, shard in enumerate(shards):
        content = {"model": {f"llma.{name}": tensor for name, tensor in shard.items()}}
        torch.save(content, folder / f"consolidated.{rank:02d}-of-{len(shards):02d}.model.pth")
    (folder / "config.json").write_text(json.dumps(PARAMS | params))
    return folder


def rows_in_halves(tensor: Tensor, heads: int) -> Tensor:
    """Meta's rotary rows 0, 1, 2, 3, … of each head in Hugging Face's order 0, 2, …, 1, 3, …, by an index list."""
    size = len(tensor) // heads
    order = [*range(0, size, 2), *range(1, size, 2)]
    return tensor[[head * size + row for head in range(heads) for row in order]]


def transformers_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in weights.items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            module = rest.removesuffix(".weight")
            if module in ("attention.wq", "attention.wk"):
                tensor = rows_in_halves(tensor, PARAMS["n_heads" if module.endswith("q") else "n_kv_heads"])
            name = f"model.layers.{layer}.{LINEARS[module]}.weight"
        else:
            top = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
            name = f"{top[name.removesuffix('.weight')]}.weight"
        state[name] = tensor
    return state


def transformers_twin(weights: dict[str, Tensor], hidden: int = 192, theta: float = 10000.0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False,
    )
    twin = LlamaForCausalLM(config).eval()
    twin.load_state_dict(transformers_names(weights))
    return twin


@torch.no_grad()
def logits_of(model, **options) -> Tensor:
    found = model(IDS, **options)
    return found if isinstance(found, Tensor) else found.logits


def tensors_of(path: Path) -> dict[str, Tensor]:
    folder = open_folder(path)
    attach(folder, model_config([folder], []))
    return {name: folder.tensor(name) for name in folder.names}


def refused(action, *args, **options) -> str:
    """The one line that the user sees."""
    with pytest.raises(UserError) as caught:
        action(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- what the tensors are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_meta_base_in_any_number_of_shards_gives_transformers_logits(tmp_path, shards):
    weights = meta_weights()
    folder = write_meta(tmp_path / "base", split_over_shards(weights, shards))
    ours, theirs = logits_of(accessory.load_model([folder])), logits_of(transformers_twin(weights))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("write", [write_meta, write_accessory])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_every_tensor_is_the_independently_renamed_and_permuted_one(tmp_path, write, shards):
    weights = meta_weights()
    found = tensors_of(write(tmp_path / "base", split_over_shards(weights, shards)))
    expected = transformers_names(weights)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_an_embedding_split_over_the_vocabulary_is_joined_as_well_as_one_split_over_the_hidden_size(tmp_path):
    weights = meta_weights()
    shards = split_over_shards(weights, 2)
    for shard, part in zip(shards, weights["tok_embeddings.weight"].chunk(2, 0), strict=True):
        shard["tok_embeddings.weight"] = part.clone()
    found = tensors_of(write_meta(tmp_path / "base", shards))
    assert torch.equal(found["model.embed_tokens.weight"], weights["tok_embeddings.weight"])


def test_biases_and_lora_of_a_sharded_accessory_folder_are_joined_along_the_split_dimension(tmp_path):
    """Column-parallel: bias and lora_b are split over rows, lora_a is whole. Row-parallel: lora_a is split over
    columns, bias and lora_b are whole."""
    g = torch.Generator().manual_seed(1)
    at = "layers.0.attention"
    whole = {f"{at}.wk.bias": (32,), f"{at}.wk.lora_a.weight": (4, 64), f"{at}.wk.lora_b.weight": (32, 4)}
    whole |= {f"{at}.wo.bias": (64,), f"{at}.wo.lora_a.weight": (4, 64), f"{at}.wo.lora_b.weight": (64, 4)}
    tensors = {name: torch.randn(*shape, generator=g) for name, shape in whole.items()}
    split = {f"{at}.wk.bias": 0, f"{at}.wk.lora_b.weight": 0, f"{at}.wo.lora_a.weight": 1}
    shards = split_over_shards(meta_weights(), 2)
    for rank, shard in enumerate(shards):
        shard |= {n: (t.chunk(2, split[n])[rank] if n in split else t).clone() for n, t in tensors.items()}
    found = tensors_of(write_accessory(tmp_path / "base", shards))
    prefix = "model.layers.0.self_attn"
    assert torch.equal(found[f"{prefix}.k_proj.bias"], rows_in_halves(tensors[f"{at}.wk.bias"], 2))
    assert torch.equal(found[f"{prefix}.k_proj.lora_A.weight"], tensors[f"{at}.wk.lora_a.weight"])
    assert torch.equal(found[f"{prefix}.k_proj.lora_B.weight"], rows_in_halves(tensors[f"{at}.wk.lora_b.weight"], 2))
    assert torch.equal(found[f"{prefix}.o_proj.bias"], tensors[f"{at}.wo.bias"])
    assert torch.equal(found[f"{prefix}.o_proj.lora_A.weight"], tensors[f"{at}.wo.lora_a.weight"])
    assert torch.equal(found[f"{prefix}.o_proj.lora_B.weight"], tensors[f"{at}.wo.lora_b.weight"])


def test_the_stored_rope_frequencies_of_a_meta_base_are_ignored(tmp_path):
    weights = meta_weights()
    folder = write_meta(tmp_path / "base", [weights | {"rope.freqs": torch.full((8,), 3.0)}])
    torch.testing.assert_close(
        logits_of(accessory.load_model([folder])), logits_of(transformers_twin(weights)), rtol=0, atol=1e-5
    )


def test_a_pth_file_in_the_format_before_torch_1_6_is_read_too(tmp_path):
    weights = meta_weights()
    folder = write_meta(tmp_path / "base", [weights])
    torch.save(weights, folder / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(tensors_of(folder)["lm_head.weight"], weights["output.weight"])


# --- what params.json says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "published"),
    [(4096, 256, None, 11008), (5120, 256, None, 13824), (8192, 4096, 1.3, 28672), (4096, 1024, 1.3, 14336)],
)
def test_the_feed_forward_width_is_that_of_the_published_models(dim, multiple_of, multiplier, published):
    assert hidden_size_of_mlp(dim, multiple_of, multiplier) == published


def test_ffn_dim_multiplier_widens_the_feed_forward_layer(tmp_path):
    weights = meta_weights()
    for layer in range(2):
        for name, shape in (("w1", (224, 64)), ("w2", (64, 224)), ("w3", (224, 64))):
            weights[f"layers.{layer}.feed_forward.{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
    folder = write_meta(tmp_path / "base", [weights], ffn_dim_multiplier=1.3)  # 1.3 * 170 = 221 -> 7 * 32
    torch.testing.assert_close(
        logits_of(accessory.load_model([folder])), logits_of(transformers_twin(weights, hidden=224)), rtol=0, atol=1e-5
    )


def test_rope_scaling_multiplies_the_positions(tmp_path):
    weights = meta_weights()
    scaled = logits_of(accessory.load_model([write_meta(tmp_path / "base", [weights], rope_scaling=0.25)]))
    positions = (torch.arange(12) * 0.25).expand(2, 12)
    twin = transformers_twin(weights)
    torch.testing.assert_close(scaled, logits_of(twin, position_ids=positions), rtol=0, atol=1e-5)
    assert not torch.allclose(scaled, logits_of(twin), atol=1e-2)


def test_rope_theta_sets_the_base_of_the_rotary_frequencies(tmp_path):
    weights = meta_weights()
    folder = write_meta(tmp_path / "base", [weights], rope_theta=500000)
    theirs = logits_of(transformers_twin(weights, theta=500000.0))
    torch.testing.assert_close(logits_of(accessory.load_model([folder])), theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(theirs, logits_of(transformers_twin(weights)), atol=1e-2)


def test_a_base_without_params_json_is_described_by_llama_config(tmp_path):
    weights = meta_weights()
    folder = write_meta(tmp_path / "base", [weights])
    elsewhere = (folder / "params.json").rename(tmp_path / "7B_params.json")
    message = refused(accessory.load_model, [folder])
    assert str(folder) in message and "--llama_config" in message
    torch.testing.assert_close(
        logits_of(accessory.load_model([folder], llama_config=str(elsewhere))),
        logits_of(transformers_twin(weights)),
        rtol=0,
        atol=1e-5,
    )


def test_a_meta_base_may_have_some_rows_more_than_its_tokenizer_has_tokens(tmp_path, tokenizer_file):
    weights = meta_weights()
    for name in ("tok_embeddings.weight", "output.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros(8, 64)])
    folder = write_meta(tmp_path / "base", [weights])
    model = accessory.load_model([folder], tokenizer_path=tokenizer_file)
    assert model(IDS).shape == (2, 12, VOCAB + 8)


def test_an_unknown_key_of_params_json_is_named_with_the_nearest_known_one(tmp_path):
    folder = write_meta(tmp_path / "base", [meta_weights()], rope_tetha=1e6)
    message = refused(accessory.load_model, [folder])
    assert str(folder) in message and "'rope_tetha'" in message and "did you mean rope_theta?" in message


def test_a_dim_that_the_heads_do_not_divide_is_refused(tmp_path):
    folder = write_meta(tmp_path / "base", [meta_weights()], n_heads=5)
    assert "dim=64 is not a multiple of n_heads=5" in refused(accessory.load_model, [folder])


@pytest.mark.parametrize(
    ("key", "value", "supported"), [("model_type", "qwen2", "'llama'"), ("hidden_act", "gelu", "'silu'")]
)
def test_another_architecture_in_config_json_is_refused(tmp_path, hf_folder, key, value, supported):
    content = json.loads((hf_folder / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file({"model.embed_tokens.weight": torch.zeros(VOCAB, 64)}, tmp_path / "model.safetensors")
    message = refused(accessory.load_model, [tmp_path])
    assert str(tmp_path / "config.json") in message and repr(value) in message and supported in message


# --- fingerprints ----------------------------------------------------------------------------------------------------


def fingerprint_of(path: Path) -> str:
    folder = open_folder(path)
    attach(folder, model_config([folder], []))
    return fingerprint(folder)


def test_one_model_has_the_same_fingerprint_in_every_format(tmp_path):
    weights = meta_weights()
    transformers_twin(weights).save_pretrained(tmp_path / "hf")
    found = {
        fingerprint_of(tmp_path / "hf"),
        fingerprint_of(write_meta(tmp_path / "one", [weights])),
        fingerprint_of(write_meta(tmp_path / "two", split_over_shards(weights, 2))),
        fingerprint_of(write_accessory(tmp_path / "accessory", split_over_shards(weights, 4))),
    }
    assert len(found) == 1


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.attention.wv.weight"])
def test_models_that_differ_have_different_fingerprints(tmp_path, name):
    weights = meta_weights()
    changed = weights | {name: weights[name] * 1.01}
    assert fingerprint_of(write_meta(tmp_path / "a", [weights])) != fingerprint_of(
        write_meta(tmp_path / "b", [changed])
    )


# --- folders that cannot be read -------------------------------------------------------------------------------------


def test_a_missing_folder_is_an_error_that_names_its_neighbours(tmp_path):
    for name in ("llama2-7b", "llama2-13b"):
        (tmp_path / name).mkdir()
    message = refused(open_folder, tmp_path / "llama2-7B")
    assert f"{tmp_path}/llama2-7B: no such folder (did you mean {tmp_path}/llama2-7b or" in message
    message = refused(open_folder, tmp_path / "mistral")
    assert f"{tmp_path}/mistral: no such folder; {tmp_path} holds llama2-13b, llama2-7b" in message


def test_a_folder_without_a_checkpoint_is_an_error_that_lists_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").touch()
    message = refused(open_folder, tmp_path)
    assert str(tmp_path) in message and "notes.txt" in message and "consolidated.*.pth" in message


def test_a_run_that_has_not_finished_is_told_from_a_folder_without_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"a run that has not finished; .* name a folder in its checkpoints"):
        open_folder(tmp_path)


def test_a_config_without_weights_is_an_error_that_lists_what_is_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    message = refused(open_folder, tmp_path)
    assert str(tmp_path) in message and "*.safetensors" in message and "pytorch_model.bin" in message


def test_two_formats_in_one_folder_are_refused(tmp_path):
    folder = write_meta(tmp_path / "base", [meta_weights()])
    write_accessory(folder, [meta_weights()])
    message = refused(open_folder, folder)
    assert str(folder) in message and "meta, accessory" in message and "keep one" in message


@pytest.mark.parametrize(("write", "lost"), [(write_meta, 1), (write_accessory, 1), (write_accessory, 3)])
def test_a_missing_shard_is_named(tmp_path, write, lost):
    folder = write(tmp_path / "base", split_over_shards(meta_weights(), 4))
    next(folder.glob(f"consolidated.{lost:02d}*")).unlink()
    message = refused(open_folder, folder)
    assert str(folder) in message and f"shard {lost:02d} of 4 is missing" in message
    assert "consolidated.00" in message


def test_a_shard_that_index_json_names_and_that_is_not_there_is_named(tmp_path):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    message = refused(open_folder, tmp_path)
    assert str(tmp_path) in message and "model-00001-of-00002.safetensors" in message


@pytest.mark.parametrize("shard", [0, 1])
def test_a_key_that_fits_nowhere_is_named_whichever_shard_holds_it(tmp_path, shard):
    shards = split_over_shards(meta_weights(), 2)
    shards[shard]["layers.0.attention.wz.weight"] = torch.zeros(1)
    message = refused(accessory.load_model, [write_meta(tmp_path / "base", shards)])
    assert str(tmp_path / "base") in message and "layers.0.attention.wz.weight" in message


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_key_that_only_some_shards_hold_is_named(tmp_path, lacking):
    shards = split_over_shards(meta_weights(), 2)
    del shards[lacking]["layers.1.feed_forward.w2.weight"]
    message = refused(accessory.load_model, [write_meta(tmp_path / "base", shards)])
    assert str(tmp_path / "base") in message
    assert "layers.1.feed_forward.w2.weight" in message or "layers.1.mlp.down_proj.weight" in message


@pytest.mark.parametrize("name", ["output.weight", "norm.weight", "layers.1.attention.wk.weight"])
def test_a_weight_that_a_meta_base_lacks_is_named(tmp_path, name):
    weights = meta_weights()
    del weights[name]
    message = refused(accessory.load_model, [write_meta(tmp_path / "base", [weights])])
    (renamed,) = transformers_names({name: torch.zeros(64, 64)})
    assert str(tmp_path / "base") in message and (name in message or renamed in message)


@pytest.mark.parametrize("name", ["attention.wq", "attention.wv"])
def test_a_weight_of_the_wrong_shape_is_named_with_both_shapes(tmp_path, name):
    weights = meta_weights() | {f"layers.0.{name}.weight": torch.zeros(60, 64)}
    message = refused(accessory.load_model, [write_meta(tmp_path / "base", [weights])])
    rows = 64 if name == "attention.wq" else 32
    assert str(tmp_path / "base") in message and LINEARS[name] in message
    assert "[60, 64]" in message and f"[{rows}, 64]" in message


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_pth_file_is_named(tmp_path, zipped, kept):
    folder = write_meta(tmp_path / "base", [meta_weights()])
    file = folder / "consolidated.00.pth"
    torch.save(meta_weights(), file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    message = refused(accessory.load_model, [folder])
    assert str(file) in message and "not a whole PyTorch checkpoint" in message


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_named(tmp_path, hf_folder, kept):
    (tmp_path / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    content = (hf_folder / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(content[: int(kept * len(content))])
    message = refused(accessory.load_model, [tmp_path])
    assert str(file) in message and "not a whole safetensors file" in message


class Touches:
    """Creates a file when it is unpickled by a reader that runs what a pickle says."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_hidden_in_a_pth_file_does_not_run(tmp_path):
    folder = write_meta(tmp_path / "base", [meta_weights()])
    torch.save(meta_weights() | {"norm.weight": Touches(tmp_path / "ran")}, folder / "consolidated.00.pth")
    assert str(folder / "consolidated.00.pth") in refused(accessory.load_model, [folder])
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Touches(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # the trap itself works


def test_a_pth_file_that_holds_something_else_than_tensors_is_named(tmp_path):
    folder = write_meta(tmp_path / "base", [{"epoch": 3}])
    message = refused(accessory.load_model, [folder])
    assert str(folder / "consolidated.00.pth") in message and "expected a dictionary of tensors" in message


@pytest.mark.parametrize(
    ("content", "complaint"), [("{\n  'dim': 64\n}", ":2: not valid JSON"), ("[64]", "expected a JSON object")]
)
def test_a_damaged_params_json_is_named_with_its_line(tmp_path, content, complaint):
    folder = write_meta(tmp_path / "base", [meta_weights()])
    (folder / "params.json").write_text(content)
    message = refused(accessory.load_model, [folder])
    assert str(folder / "params.json") in message and complaint in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_damaged_json_file_of_a_hugging_face_folder_is_named(tmp_path, hf_folder, name):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((hf_folder / file).read_bytes())
    (tmp_path / name).write_text('{"hidden_size": 64,')
    message = refused(accessory.load_model, [tmp_path])
    assert str(tmp_path / name) in message and "not valid JSON" in message


# --- llama_config next to a Hugging Face base, and params.json's values ----------------------------------------------


def described(tmp_path: Path, base: Path, content) -> accessory.models.LlamaConfig:
    (tmp_path / "given.json").write_text(json.dumps(content))
    return model_config([open_folder(base)], [str(tmp_path / "given.json")])


@pytest.mark.parametrize(
    "content",
    [
        {"lora_rank": 4, "bias_tuning": False, "norm_tuning": True, "max_seq_len": 512, "max_batch_size": 1},
        PARAMS,
        PARAMS | {"vocab_size": VOCAB},
        {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": VOCAB},
    ],
)
def test_llama_config_that_agrees_with_a_hugging_face_base_changes_nothing(tmp_path, hf_folder, content):
    alone = model_config([open_folder(hf_folder)], [])
    assert described(tmp_path, hf_folder, content).to_dict() == alone.to_dict()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (PARAMS | {"dim": 128}, ["dim=128", "hidden_size=64"]),
        (PARAMS | {"n_layers": 3}, ["n_layers=3", "num_hidden_layers=2"]),
        (PARAMS | {"n_heads": 8}, ["n_heads=8", "num_attention_heads=4"]),
        ({"model_type": "llama", "vocab_size": 32000}, ["vocab_size=32000", f"vocab_size={VOCAB}"]),
        ({"model_type": "qwen2"}, ["'qwen2'", "'llama'"]),
        ({"lora_rnk": 4}, ["'lora_rnk'", "did you mean lora_rank?"]),
    ],
)
def test_llama_config_that_contradicts_a_hugging_face_base_is_refused_with_both_values(
    tmp_path, hf_folder, content, named
):
    message = refused(described, tmp_path, hf_folder, content)
    assert all(part in message for part in [*named, str(tmp_path / "given.json")])


def test_llama_config_is_read_for_every_kind_of_base(tmp_path, hf_folder, meta_folder):
    for base in (hf_folder, meta_folder):
        message = refused(accessory.load_model, [base], llama_config=str(tmp_path / "nonexistent.json"))
        assert "nonexistent.json: no such file" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", None),
        ("vocab_size", 0),
        ("rope_theta", None),
        ("rope_theta", float("nan")),
        ("rope_scaling", 0),
        ("ffn_dim_multiplier", "1.3"),
        ("norm_eps", "x"),
        ("n_heads", 4.0),
        ("n_layers", True),
        ("n_kv_heads", 0),
        ("n_kv_heads", 3),
        ("max_seq_len", None),
        ("bias_tuning", "yes"),
    ],
)
def test_a_value_of_params_json_that_cannot_be_is_named(tmp_path, meta_folder, key, value):
    message = refused(described, tmp_path, meta_folder, PARAMS | {key: value})
    assert f"{key}={value!r}" in message and "given.json" in message
