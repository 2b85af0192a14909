"""What trains, how many of it, and that LoRA computes what its paper says."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCAB
from omegaconf import OmegaConf
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import Blip2Config, LlamaConfig, LlamaForCausalLM

from accessory.assemble import assemble
from accessory.config import ModelConfig, QuantizationConfig, QuantMethod, RecipeConfig
from accessory.errors import UserError
from accessory.fused.linears import Group
from accessory.models import build_model, config_from_params
from accessory.models.llama import Llama
from accessory.module import batch_loss
from accessory.quantization import block_linears, quantize
from accessory.tuning.lora import LoraQuantLinear
from accessory.tuning.recipe import add_trainables, count_trainables, mark_trainable, trainable_state

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "recipe"
NAMES = ["norm_bias", "norm_bias_lora", "bias_lora", "lora"]
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
SEVEN_B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256}
THIRTEEN_B = {"dim": 5120, "n_layers": 40, "n_heads": 40, "multiple_of": 256}
SEVENTY_B = {
    "dim": 8192,
    "n_layers": 80,
    "n_heads": 64,
    "n_kv_heads": 8,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.3,
}


def recipe_named(name: str, **changes) -> RecipeConfig:
    """The shipped YAML, typed."""
    node = OmegaConf.merge(OmegaConf.structured(RecipeConfig), OmegaConf.load(RECIPES / f"{name}.yaml"), changes)
    return OmegaConf.to_object(node)


def tiny(
    folder: Path,
    recipe: Optional[RecipeConfig],
    method: str = "none",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Llama:
    torch.manual_seed(seed)
    quantization = QuantizationConfig(method=QuantMethod(method))
    return assemble(ModelConfig(pretrained_path=[str(folder)]), quantization, recipe, torch.device("cpu"), dtype)


def skeleton(params: dict, recipe: RecipeConfig, vision: Optional[Blip2Config] = None) -> Llama:
    """A model of real size without its weights; the LoRA matrices too stay on the meta device."""
    model = build_model(config_from_params(params, 32000, "test"), vision)
    quantize(model, QuantizationConfig(method=QuantMethod.nf4), torch.bfloat16)
    with torch.device("meta"):
        add_trainables(model, recipe)
    mark_trainable(model, recipe)
    return model


def randomize(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def training_batch() -> dict[str, Tensor]:
    ids = torch.arange(24).reshape(2, 12) * 7 % VOCAB
    return {"input_ids": ids, "position_ids": torch.arange(12).expand(2, 12), "targets": ids.roll(-1, 1)}


# --- counts and names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "name", "published"),
    [
        (SEVEN_B, "norm_bias", 1_626_112),
        (SEVEN_B, "norm_bias_lora", 41_603_072),
        (THIRTEEN_B, "norm_bias", 2_544_640),
        (SEVENTY_B, "norm_bias", 8_036_352),
    ],
    ids=["7B-norm_bias", "7B-norm_bias_lora", "13B-norm_bias", "70B-norm_bias"],
)
def test_as_many_parameters_train_as_the_sizes_of_the_model_say(params, name, published):
    dim, layers, heads = params["dim"], params["n_layers"], params["n_heads"]
    hidden = {4096: 11008, 5120: 13824, 8192: 28672}[dim]
    keys = dim * params.get("n_kv_heads", heads) // heads
    sizes = [(dim, dim), (dim, keys), (dim, keys), (dim, dim), (dim, hidden), (dim, hidden), (hidden, dim)]
    norms = layers * 2 * dim + dim
    biases = layers * sum(out for _, out in sizes)
    matrices = layers * 16 * sum(into + out for into, out in sizes) if "lora" in name else 0
    assert norms + biases + matrices == published

    counts = count_trainables(skeleton(params, recipe_named(name)))
    expected = {"norm": norms, "bias": biases} | ({"LoRA": matrices} if matrices else {})
    assert counts == expected


@pytest.mark.parametrize(("lora", "published"), [(False, 2_560_000), (True, 65_146_880)])
def test_with_a_qformer_the_projectors_norm_and_biases_train_as_well(lora, published):
    """BLIP-2's real sizes in front of LLaMA2-13B: 3 x 5,120 parameters more than of the language model."""
    model = skeleton(THIRTEEN_B, RecipeConfig(lora=lora), Blip2Config())
    counts = count_trainables(model)
    assert counts.total() == published
    image_part = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("model.")]
    assert image_part == ["qformer_proj.0.bias", "qformer_proj.1.weight", "qformer_proj.1.bias"]


@pytest.mark.parametrize("method", ["none", "nf4"])
@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_recipes_parameters_train_and_all_others_are_frozen(meta_folder, name, method):
    expected = {f"model.layers.{i}.{n}_layernorm.weight" for i in range(2) for n in ("input", "post_attention")}
    expected |= {"model.norm.weight"}
    if "norm" not in name:
        expected.clear()
    for i in range(2):
        for linear in LINEARS:
            path = f"model.layers.{i}.{linear}"
            expected |= {f"{path}.bias"} if "bias" in name else set()
            expected |= {f"{path}.lora_A.weight", f"{path}.lora_B.weight"} if "lora" in name else set()
    model = tiny(meta_folder, recipe_named(name), method)
    assert set(trainable_state(model)) == expected
    frozen = {path for path, parameter in model.named_parameters() if not parameter.requires_grad}
    norms = {path for path, _ in model.named_parameters() if "norm" in path}
    assert frozen == {"model.embed_tokens.weight", "lm_head.weight"} | (norms if "norm" not in name else set())


@pytest.mark.parametrize("method", ["none", "nf4"])
@pytest.mark.parametrize("name", NAMES)
def test_what_trains_is_fp32_in_a_bf16_model_and_so_is_its_gradient(meta_folder, name, method):
    model = tiny(meta_folder, recipe_named(name), method, torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.bfloat16
    batch_loss(model, training_batch()).backward()
    trainables = [p for p in model.parameters() if p.requires_grad]
    assert {(p.dtype, p.grad.dtype) for p in trainables} == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("method", ["none", "nf4"])
@pytest.mark.parametrize("name", NAMES)
def test_fresh_trainables_leave_the_logits_of_the_base_as_they_are(meta_folder, name, method):
    ids = training_batch()["input_ids"]
    base = tiny(meta_folder, None, method)
    assert torch.equal(tiny(meta_folder, recipe_named(name), method)(ids), base(ids))


@pytest.fixture
def biased_base(tmp_path) -> tuple[Path, LlamaForCausalLM]:
    """A Hugging Face base whose attention has biases of its own, random ones."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
    )
    reference = LlamaForCausalLM(config)
    for layer in reference.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    reference.save_pretrained(tmp_path)
    return tmp_path, reference


def test_biases_of_the_base_itself_are_where_training_of_biases_starts(biased_base):
    folder, reference = biased_base
    model = tiny(folder, recipe_named("norm_bias"))
    for ours, theirs in zip(model.model.layers, reference.model.layers, strict=True):
        assert torch.equal(ours.self_attn.q_proj.bias, theirs.self_attn.q_proj.bias)
        assert ours.self_attn.q_proj.bias.requires_grad and ours.mlp.down_proj.bias.requires_grad


def test_biases_of_the_base_itself_stay_frozen_under_a_recipe_without_biases(biased_base):
    model = tiny(biased_base[0], recipe_named("lora"))
    biases = [layer.bias for layer in block_linears(model).values() if layer.bias is not None]
    assert len(biases) == 8 and not any(bias.requires_grad for bias in biases)


@pytest.mark.parametrize("name", ["norm_bias_lora", "lora"])
def test_lora_starts_beside_biases_of_the_base_itself(biased_base, name):
    folder, reference = biased_base
    model = tiny(folder, recipe_named(name))
    ids = training_batch()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, rtol=0, atol=1e-5)
    batch_loss(model, training_batch()).backward()
    assert all(layer.lora_B["default"].weight.grad.abs().sum() > 0 for layer in lora_layers(model).values())


def test_a_target_that_matches_nothing_is_an_error_with_a_suggestion(meta_folder):
    with pytest.raises(UserError) as caught:
        tiny(meta_folder, recipe_named("lora", targets=["q_proj", "v_porj"]))
    message = str(caught.value)
    assert "recipe.targets: 'v_porj' matches no linear" in message and "did you mean v_proj?" in message
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in message


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_target_outside_the_decoder_blocks_is_an_error(meta_folder, target):
    with pytest.raises(UserError, match=f"recipe.targets: '{target}' matches no linear"):
        tiny(meta_folder, recipe_named("lora", targets=[target]))


def test_lora_goes_on_the_named_targets_only(meta_folder):
    model = tiny(meta_folder, recipe_named("lora", targets=["q_proj", "down_proj"]))
    assert lora_layers(model).keys() == {
        f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.q_proj", "mlp.down_proj")
    }


# --- LoRA ------------------------------------------------------------------------------------------------------------


def lora_layer(method: str = "nf4", **changes) -> LoraQuantLinear:
    """The down projection of a tiny block, its matrices and bias random."""
    params = {"dim": 64, "n_layers": 1, "n_heads": 4, "multiple_of": 32}
    recipe = recipe_named("norm_bias_lora", **changes)
    model = build_model(config_from_params(params, VOCAB, "test"))
    quantize(model, QuantizationConfig(method=QuantMethod(method)), torch.float32)
    add_trainables(model, recipe)
    mark_trainable(model, recipe)
    layer = model.model.layers[0].mlp.down_proj
    g = torch.Generator().manual_seed(0)
    layer.base_layer.load_weight(torch.randn(layer.base_layer.shape, generator=g))
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g)
    return layer


def matrices(layer: LoraQuantLinear) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize("method", ["none", "nf4"])
@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (8.0, 2.0)])
def test_lora_adds_scale_times_b_a_x_to_the_base(method, alpha, scale):
    layer = lora_layer(method, rank=4, alpha=alpha)
    a, b = (matrix.detach().double().requires_grad_() for matrix in matrices(layer))
    x = torch.randn(3, 5, 192, requires_grad=True)
    layer(x).square().sum().backward()

    wide = x.detach().double().requires_grad_()
    weight, bias = layer.base_layer.dequantize(torch.float32).double(), layer.base_layer.bias.detach().double()
    expected = F.linear(wide, weight, bias) + scale * (wide @ a.T @ b.T)
    expected.square().sum().backward()
    assert a.shape == (4, 192) and b.shape == (64, 4)
    assert (layer(x).double() - expected).norm() < 1e-6 * expected.norm()
    for found, true in zip((x, *matrices(layer)), (wide, a, b), strict=True):
        assert (found.grad.double() - true.grad).norm() < 1e-5 * true.grad.norm()


def test_lora_in_bf16_computes_in_bf16_from_fp32_masters():
    layer = lora_layer()
    x = torch.randn(3, 5, 192).bfloat16()
    a, b = matrices(layer)
    y = layer(x)
    expected = layer.base_layer(x, F.linear(F.linear(x, a.bfloat16()), b.bfloat16()))
    assert a.dtype == b.dtype == torch.float32
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


@torch.no_grad()
@pytest.mark.parametrize("computed", ["plain", "fused"])
def test_what_lora_adds_counts_also_where_it_is_less_than_the_bases_rounding(computed):
    layer = lora_layer()
    a, b = matrices(layer)
    b *= 1e-4
    x = torch.randn(2048, 192, generator=torch.Generator().manual_seed(1)).bfloat16()

    def output() -> Tensor:
        if computed == "plain":
            return layer(x).double()
        group = Group([layer])
        for copy, master, factor in group.copies(torch.bfloat16):
            copy.copy_(master * factor)
        return group.forward(x)[0].double()

    share = x.double() @ a.double().T @ b.double().T
    y = output()
    b.zero_()
    assert share.abs().median() < 2**-9 * y.abs().median()  # half of the way to the next number in bf16
    assert ((y - output()) * share).sum() / share.square().sum() == pytest.approx(1, abs=0.1)


def test_lora_keeps_no_fp32_copy_of_its_input_for_backward():
    layer = lora_layer()
    x = torch.randn(3, 5, 192).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    wide = [tensor for tensor in kept if tensor.dtype == torch.float32 and tensor.numel() >= x.numel()]
    assert kept and wide == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["none", "nf4"])
def test_every_trainable_has_a_finite_gradient_before_and_after_an_eval_pass(meta_folder, method, dtype):
    model = tiny(meta_folder, recipe_named("norm_bias_lora"), method, dtype)
    randomize(model)
    gradients = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        batch_loss(model, training_batch()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        model.eval()
        with torch.no_grad():
            model(training_batch()["input_ids"])
        model.train()
    for before, after in zip(gradients[0].values(), gradients[1].values(), strict=True):
        assert before.isfinite().all() and before.abs().sum() > 0
        assert torch.equal(before, after)


def test_the_seed_decides_the_lora_matrices(meta_folder):
    first, same, other = (
        trainable_state(tiny(meta_folder, recipe_named("norm_bias_lora"), seed=seed)) for seed in (0, 0, 1)
    )
    name = "model.layers.0.mlp.up_proj.lora_A.weight"
    assert torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name])


def test_lora_dropout_acts_in_training_only():
    layer = lora_layer(dropout=0.5)
    x = torch.randn(3, 5, 192)
    a, b = matrices(layer)
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ a.T @ b.T, rtol=1e-4, atol=1e-3)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
