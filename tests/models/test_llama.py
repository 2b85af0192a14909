"""The forward pass against transformers' LLaMA, and against outputs of LLaMA2-Accessory itself where they are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import HIDDEN, ORACLE, VOCAB
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import accessory
from accessory.errors import UserError
from accessory.models.llama import RMSNorm, Segments

IDS = torch.arange(24).reshape(2, 12) * 7 % VOCAB
OTHER_THETA = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
oracle = pytest.mark.skipif(not ORACLE.is_dir(), reason=f"no outputs of LLaMA2-Accessory at {ORACLE}")


def tiny_config(**options) -> LlamaConfig:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**settings | options)


def random_transformers_model(**options) -> LlamaForCausalLM:
    """Every parameter random, biases and norms too (transformers starts them at 0 and 1)."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(**options)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logits_of(model, ids: Tensor = IDS) -> Tensor:
    found = model(ids)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 8},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"rms_norm_eps": 0.1},
        {"rope_parameters": OTHER_THETA},
        {"rope_parameters": LINEAR},
        {"rope_parameters": LLAMA3},
    ],
    ids=lambda options: "-".join(str(o.get("rope_type", k) if isinstance(o, dict) else k) for k, o in options.items()),
)
def test_a_hugging_face_folder_gives_transformers_logits(tmp_path, options):
    reference = random_transformers_model(**options)
    reference.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(accessory.load_model([tmp_path])), logits_of(reference), rtol=0, atol=1e-5)


def test_the_rope_parameters_of_these_tests_change_the_logits():
    plain = logits_of(random_transformers_model())
    for rope in (OTHER_THETA, LINEAR, LLAMA3):
        assert not torch.allclose(logits_of(random_transformers_model(rope_parameters=rope)), plain, atol=1e-2)


def test_config_json_as_transformers_4_wrote_it_is_understood(tmp_path):
    """rope_theta and rope_scaling of their own, instead of rope_parameters; torch_dtype instead of dtype."""
    reference = random_transformers_model(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0})
    reference.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["rope_parameters"], content["dtype"]
    content |= {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    torch.testing.assert_close(logits_of(accessory.load_model([tmp_path])), logits_of(reference), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_in_bf16_the_logits_equal_transformers_bit_for_bit(tmp_path, options):
    random_transformers_model(**options).to(torch.bfloat16).save_pretrained(tmp_path)  # norms here stay in fp32
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ours = logits_of(accessory.load_model([tmp_path], dtype=torch.bfloat16))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, logits_of(theirs).float())


def test_a_norms_weight_counts_in_fp32_where_everything_else_is_bf16():
    generator = torch.Generator().manual_seed(0)
    norm, x = RMSNorm(64, 1e-5), torch.randn(512, 64, generator=generator).to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_((0.5 + torch.rand(64, generator=generator)).to(torch.bfloat16))
        before = norm(x).double()
        norm.weight *= 1.001  # these numbers are 4 to 8 thousandths apart in bf16
        moved = norm(x).double() - before
    assert (moved * before).sum() / before.square().sum() == pytest.approx(1e-3, rel=0.2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 6e-3)])
def test_gradients_of_a_norm_are_those_of_its_formula(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(64, 1e-5)
    norm.weight.data.copy_(0.5 + torch.rand(64, generator=generator))
    x, dy = (torch.randn(3, 7, 64, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    norm(x).backward(dy)
    exact_x, weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    (exact_x / (exact_x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight).backward(dy.double())
    assert x.grad.dtype == dtype and norm.weight.grad.dtype == torch.float32
    for ours, exact in ((x.grad, exact_x.grad), (norm.weight.grad, weight.grad)):
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


def test_weights_in_several_safetensors_files_are_all_read(tmp_path):
    reference = random_transformers_model()
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits_of(accessory.load_model([tmp_path])), logits_of(reference), rtol=0, atol=1e-5)


def test_padding_on_the_right_changes_no_logit_before_it(hf_folder):
    model = accessory.load_model([hf_folder])
    padded = torch.cat([IDS, torch.zeros(2, 5, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(logits_of(model, padded)[:, :12], logits_of(model), rtol=0, atol=1e-5)


@torch.no_grad()
def test_packed_items_give_the_hidden_states_of_each_item_alone(hf_folder):
    model = accessory.load_model([hf_folder])
    first, second = IDS[:1, :5], IDS[1:, :7]
    segments = Segments(torch.tensor([0, 5, 12], dtype=torch.int32), 12)
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = model.hidden_states(torch.cat([first, second], 1), positions, segments)
    alone = torch.cat([model.hidden_states(first), model.hidden_states(second)], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_recomputing_activations_changes_no_gradient(hf_folder):
    gradients = []
    for recomputed in (0, 1, 2):
        model = accessory.load_model([hf_folder])
        for layer in model.model.layers:
            layer.input_layernorm.weight.requires_grad_(True)
        model.model.recomputed = recomputed
        model(IDS).square().mean().backward()
        gradients.append(torch.stack([layer.input_layernorm.weight.grad for layer in model.model.layers]))
    assert gradients[0].abs().min() > 0
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_images_are_refused_by_a_language_model(hf_folder):
    model = accessory.load_model([hf_folder])
    with pytest.raises(UserError, match="language-only"):
        model(IDS, images=torch.zeros(2, 3, 224, 224))
    with pytest.raises(UserError, match="language-only"):
        model.generate(["text"], images=[object()])


def test_a_multimodal_llama_type_on_a_language_base_asks_for_a_vision_part(hf_folder):
    with pytest.raises(UserError, match=r"weights are missing.*model\.vision_path"):
        accessory.load_model([hf_folder], llama_type="llama_qformerv2_peft")


# --- LLaMA2-Accessory's own outputs -----------------------------------------------------------------------------------

OURS = {
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


def rows_in_halves(tensor: Tensor, heads: int) -> Tensor:
    size = len(tensor) // heads
    order = [*range(0, size, 2), *range(1, size, 2)]
    return tensor[[head * size + row for head in range(heads) for row in order]]


def renamed(state: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """LLaMA2-Accessory's names and rotary rows (as many key/value heads as heads) -> ours."""
    found = {}
    for name, tensor in state.items():
        name = name.removeprefix("llma.")
        if name.startswith("layers."):
            _, layer, group, rest = name.split(".", 3)
            module = group if group.endswith("norm") else f"{group}.{rest.split('.')[0]}"
            leaf = name.removeprefix(f"layers.{layer}.{module}.")
            if module in ("attention.wq", "attention.wk") and "lora_a" not in leaf:
                tensor = rows_in_halves(tensor, heads)
            leaf = leaf.replace("lora_a", "lora_A").replace("lora_b", "lora_B")
            name = f"model.layers.{layer}.{OURS[module]}.{leaf}"
        elif name != "rope.freqs":
            top, leaf = name.split(".")
            name = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}[top] + f".{leaf}"
        found[name] = tensor
    return found


def parameters_by_name_on_disk(model) -> dict[str, torch.nn.Parameter]:
    return {
        name.replace(".base_layer.", ".").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
    }


@pytest.fixture(scope="module")
def recorded() -> dict:
    return torch.load(ORACLE / "llama_peft_tiny.pt", weights_only=True)


@pytest.fixture(scope="module")
def recorded_folder(recorded, tmp_path_factory) -> Path:
    """The recorded model as a folder that LLaMA2-Accessory would have saved."""
    folder = tmp_path_factory.mktemp("recorded")
    torch.save({"model": recorded["model"]}, folder / "consolidated.00-of-01.model.pth")
    (folder / "config.json").write_text(json.dumps(recorded["args"]))
    return folder


@oracle
def test_the_logits_are_those_of_llama2_accessory(recorded, recorded_folder):
    ours = logits_of(accessory.load_model([recorded_folder]), recorded["tokens"])
    torch.testing.assert_close(ours, recorded["logits"], rtol=0, atol=1e-5)


@oracle
def test_the_gradients_of_all_47_trainables_are_those_of_llama2_accessory(recorded, recorded_folder):
    model = accessory.load_model([recorded_folder])
    logits = model(recorded["tokens"])
    # Its loss: mean over the next tokens that are not 0.
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), recorded["labels"][:, 1:].flatten(), ignore_index=0)
    loss.backward()
    torch.testing.assert_close(loss, recorded["loss"], rtol=1e-6, atol=0)
    expected = renamed(recorded["grads"], heads=4)
    found = {name: p.grad for name, p in parameters_by_name_on_disk(model).items() if p.requires_grad}
    assert len(expected) == 47 and found.keys() == expected.keys()
    errors = {name: ((found[name] - g).norm() / g.norm()).item() for name, g in expected.items()}
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)


def merged_reference(state: dict[str, Tensor]) -> LlamaForCausalLM:
    """transformers' LLaMA with biases of its own and the LoRA matrices multiplied out."""
    state = {name: tensor for name, tensor in state.items() if name != "rope.freqs"}
    for a in [name for name in state if name.endswith(".lora_A.weight")]:
        prefix = a.removesuffix(".lora_A.weight")
        update = state.pop(f"{prefix}.lora_B.weight") @ state.pop(a)
        state[f"{prefix}.weight"] = state[f"{prefix}.weight"] + update
    config = tiny_config(num_key_value_heads=4, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-5)
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


def stored(kind: str) -> dict[str, Tensor]:
    (file,) = (ORACLE / "ckpt" / kind).glob("*.pth")
    content = torch.load(file, weights_only=True)
    return renamed(content.get("model", content), heads=4)


@oracle
@pytest.mark.parametrize("kinds", [["accessory_full"], ["meta_mp1", "accessory_trainable"]])
def test_its_full_checkpoint_and_its_trainables_on_the_base_give_the_merged_logits(kinds):
    state = stored(kinds[0]) | (stored(kinds[1]) if len(kinds) > 1 else {})
    ours = logits_of(accessory.load_model([ORACLE / "ckpt" / kind for kind in kinds]))
    torch.testing.assert_close(ours, logits_of(merged_reference(state)), rtol=0, atol=1e-5)


@oracle
def test_its_full_checkpoint_equals_its_trainables_on_the_base_bit_for_bit():
    full, split = (
        logits_of(accessory.load_model([ORACLE / "ckpt" / kind for kind in kinds]))
        for kinds in (["accessory_full"], ["meta_mp1", "accessory_trainable"])
    )
    assert torch.equal(full, split)


@oracle
@pytest.mark.parametrize("kinds", [["meta_mp1"], ["meta_mp1", "accessory_trainable"]])
def test_a_diff_folder_adds_to_what_is_there_and_sets_what_is_not(kinds):
    state: dict[str, Tensor] = {}
    for kind in kinds:
        state |= stored(kind)
    for name, tensor in stored("accessory_diff").items():
        state[name] = state[name] + tensor if name in state else tensor
    ours = logits_of(accessory.load_model([ORACLE / "ckpt" / kind for kind in [*kinds, "accessory_diff"]]))
    torch.testing.assert_close(ours, logits_of(merged_reference(state)), rtol=0, atol=1e-5)
