"""A fused block computes what the plain one does, and keeps less of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.config import QuantizationConfig, QuantMethod, RecipeConfig
from accessory.fused.block import FusedBlock
from accessory.fused.model import fuse_blocks, keep_attention, keep_on_host, why_not_fused
from accessory.models import build_model, config_from_params
from accessory.models.llama import Llama, Segments
from accessory.quantization import QuantLinear, quantize
from accessory.tuning.recipe import add_trainables, mark_trainable
from accessory.weights import weight_places

PARAMS = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 100, "multiple_of": 32}
IDS = torch.randint(100, (2, 12), generator=torch.Generator().manual_seed(1))
PACKED = Segments(torch.tensor([0, 5, 12, 12, 20, 24, 24], dtype=torch.int32), 12)
NORM_BIAS, WITH_LORA = RecipeConfig(), RecipeConfig(lora=True, rank=4, alpha=8)


def tiny_model(method: str, dtype: torch.dtype, recipe: RecipeConfig, **params: int) -> Llama:
    """Random weights, trainables among them."""
    model = build_model(config_from_params(PARAMS | params, 100, "test"))
    quantize(model, QuantizationConfig(method=QuantMethod(method)), dtype)
    add_trainables(model, recipe)
    generator = torch.Generator().manual_seed(0)
    for name, (shape, store, _) in weight_places(model, torch.device("cpu"), dtype):
        store(0.1 * torch.randn(shape, generator=generator) + ("norm" in name))
    mark_trainable(model, recipe)
    return model


def run(model: Llama, mask=None) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and the gradient of each trainable."""
    model.zero_grad()
    hidden = model.hidden_states(IDS, torch.arange(12).expand(2, 12), mask)
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=torch.float64).view_as(hidden)
    (hidden.double() * weights).sum().backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    return hidden.detach().double(), gradients


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("mask", [None, PACKED], ids=["rows", "packed"])
@pytest.mark.parametrize("recipe", [NORM_BIAS, WITH_LORA], ids=["norm_bias", "lora"])
@pytest.mark.parametrize("method", ["none", "rtn", "nf4"])
def test_hidden_states_and_gradients_are_autograds_through_the_plain_blocks(method, recipe, mask):
    hidden, gradients = run(tiny_model(method, torch.float32, recipe), mask)
    model = tiny_model(method, torch.float32, recipe)
    fuse_blocks(model)
    for recomputed, keeps_attention in ((0, False), (2, False), (3, False), (0, True), (2, True)):
        model.model.recomputed = recomputed
        if keeps_attention:
            keep_attention(model)
        found_hidden, found = run(model, mask)
        assert distance(found_hidden, hidden) < 1e-6
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert distance(found[name], gradient) < 1e-5, name


@pytest.mark.parametrize("recipe", [NORM_BIAS, WITH_LORA, RecipeConfig(bias=False)], ids=["norm_bias", "lora", "norm"])
def test_weights_too_large_to_stack_are_multiplied_one_after_the_other(recipe, monkeypatch):
    hidden, gradients = run(tiny_model("nf4", torch.float32, recipe))
    monkeypatch.setattr("accessory.fused.linears.STACKED", 10_000)  # gate and up have 24,576, q, k and v 8,192
    model = tiny_model("nf4", torch.float32, recipe)
    fuse_blocks(model)
    block = model.model.layers[0].forward
    assert [len(group.stacks) for group in block.groups] == [1, 1, 2, 1]
    found_hidden, found = run(model)
    assert distance(found_hidden, hidden) < 1e-6
    assert all(distance(found[name], gradient) < 1e-5 for name, gradient in gradients.items())


@pytest.mark.parametrize("recipe", [NORM_BIAS, WITH_LORA], ids=["norm_bias", "lora"])
def test_in_bf16_it_is_as_near_to_fp64_as_the_plain_blocks_are(recipe):
    exact_hidden, exact = run(tiny_model("none", torch.float64, recipe))
    plain_hidden, plain = run(tiny_model("none", torch.bfloat16, recipe))
    model = tiny_model("none", torch.bfloat16, recipe)
    fuse_blocks(model)
    hidden, fused = run(model)
    assert distance(hidden, exact_hidden) < 1.2 * distance(plain_hidden, exact_hidden)
    scale = torch.stack([gradient.norm() for gradient in exact.values()]).norm()
    for name, reference in exact.items():
        # A key's bias hardly moves the softmax, its gradient is mostly rounding: errors are weighed against all.
        assert (fused[name] - reference).norm() < 1.5 * (plain[name] - reference).norm() + 1e-3 * scale, name


def test_each_parameter_gets_a_gradient_only_if_it_trains():
    recipe = RecipeConfig(norm=False, bias=True, lora=True, rank=4, targets=["q_proj", "down_proj"])
    _, gradients = run(tiny_model("nf4", torch.float32, recipe))
    model = tiny_model("nf4", torch.float32, recipe)
    fuse_blocks(model)
    _, found = run(model)
    assert found.keys() == gradients.keys()
    assert all(distance(found[name], gradient) < 1e-5 for name, gradient in gradients.items())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("recipe", [NORM_BIAS, WITH_LORA], ids=["norm_bias", "lora"])
def test_a_block_keeps_its_input_qkv_residual_and_gate_up_and_a_recomputed_one_its_input(recipe):
    m, d, f, qkv, ranks = 24, 64, 192, 64 + 2 * 32, 7 * recipe.rank if recipe.lora else 0
    sizes = {False: m * (d + qkv + d + 2 * f + 2 + ranks), True: m * d}  # rstd of two norms; x A^T of seven linears
    model = tiny_model("nf4", torch.float32, recipe)
    fuse_blocks(model)
    for recomputed, expected in sizes.items():
        x = torch.randn(2, 12, 64, requires_grad=True)
        rope = [t.unsqueeze(1) for t in model.model.rotary_emb(x, torch.arange(12).expand(2, 12))]
        y = model.model.layers[0](x, rope, None, None, recomputed)
        ((node, _),) = y.grad_fn.next_functions  # behind the view that gives rows back
        kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in node.kept if t is not None}
        assert sum(kept.values()) == 4 * expected
        assert node.saved_tensors == ()


@pytest.mark.parametrize("recomputed", [0, 1, 3])
def test_attention_is_computed_once_where_its_output_is_kept_and_twice_elsewhere(recomputed, monkeypatch):
    seen = []
    attend = FusedBlock.attend
    monkeypatch.setattr(FusedBlock, "attend", lambda *args, **more: seen.append(1) or attend(*args, **more))
    model = tiny_model("nf4", torch.float32, NORM_BIAS)
    fuse_blocks(model)
    model.model.recomputed = recomputed
    run(model)
    assert len(seen) == 6
    keep_attention(model)
    run(model)
    assert len(seen) == 6 + 3 + recomputed
    with torch.no_grad():
        model.hidden_states(IDS)
    assert len(seen) == 6 + 3 + recomputed + 3


def test_inputs_that_lie_in_host_memory_come_back_to_their_blocks():
    hidden, gradients = run(tiny_model("nf4", torch.float32, WITH_LORA))
    model = tiny_model("nf4", torch.float32, WITH_LORA)
    fuse_blocks(model)
    keep_on_host(model, IDS.numel())
    for recomputed, keeps_attention in ((0, False), (2, False), (3, False), (0, True), (2, True)):
        model.model.recomputed = recomputed
        if keeps_attention:
            keep_attention(model)
        for _ in range(2):
            found_hidden, found = run(model)
            assert distance(found_hidden, hidden) < 1e-6
            assert all(distance(found[name], gradient) < 1e-5 for name, gradient in gradients.items())
    with torch.no_grad():
        model.hidden_states(IDS)
    assert model.model.layers[0].forward.host._held == []


def test_inputs_and_residuals_in_host_memory_are_not_kept_beside_it():
    model = tiny_model("nf4", torch.float32, NORM_BIAS)
    fuse_blocks(model)
    x = torch.randn(2, 12, 64, requires_grad=True)
    rope = [t.unsqueeze(1) for t in model.model.rotary_emb(x, torch.arange(12).expand(2, 12))]

    def kept(recomputed):
        y = model.model.layers[0](x, rope, None, None, recomputed)
        ((node, _),) = y.grad_fn.next_functions
        return sum(t.untyped_storage().nbytes() for t in node.kept if isinstance(t, torch.Tensor))

    on_device = {recomputed: kept(recomputed) for recomputed in (False, True)}
    keep_on_host(model, 24)
    assert kept(False) == on_device[False] - 2 * 4 * 24 * 64  # input and residual
    assert kept(True) == 0


def test_a_second_forward_before_the_backward_of_the_first_is_an_error_not_a_wrong_gradient():
    model = tiny_model("nf4", torch.float32, NORM_BIAS)
    fuse_blocks(model)
    keep_on_host(model, IDS.numel())
    first, _ = (model.hidden_states(IDS).sum() for _ in range(2))
    with pytest.raises(RuntimeError, match="another forward came"):
        first.backward()


@pytest.mark.parametrize("recomputed", [0, 3])
def test_a_step_that_fails_leaves_no_input_behind_for_the_next(recomputed, monkeypatch):
    _, gradients = run(tiny_model("nf4", torch.float32, WITH_LORA))
    model = tiny_model("nf4", torch.float32, WITH_LORA)
    fuse_blocks(model)
    keep_on_host(model, IDS.numel())
    model.model.recomputed = recomputed
    with monkeypatch.context() as broken:
        broken.setattr(model.model.layers[2].forward.down, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model)
    for _ in range(2):
        _, found = run(model)
        assert all(distance(found[name], gradient) < 1e-5 for name, gradient in gradients.items())


def test_a_recomputed_block_does_not_repeat_its_last_matmul(monkeypatch):
    seen = []
    dequantize = QuantLinear.dequantize
    monkeypatch.setattr(QuantLinear, "dequantize", lambda layer, dtype: seen.append(layer) or dequantize(layer, dtype))
    model = tiny_model("nf4", torch.float32, NORM_BIAS)
    fuse_blocks(model)
    model.model.recomputed = 3
    run(model)
    mlp = model.model.layers[1].mlp
    assert [seen.count(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)] == [3, 3, 2]


def test_copies_follow_the_trainables_through_optimizer_steps():
    losses = []
    for fused in (False, True):
        model = tiny_model("nf4", torch.bfloat16, WITH_LORA)
        if fused:
            fuse_blocks(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(8):
            loss = model.hidden_states(IDS).float().square().mean() + model.hidden_states(IDS).float()[0, 0, 0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    plain, fused = (torch.tensor(values) for values in losses)
    assert plain[0] - plain[-1] > 0.5
    assert (plain - fused).abs().max() < 0.02 * (plain[0] - plain[-1])


@torch.no_grad()
def test_with_a_cache_blocks_compute_as_they_did():
    from accessory.generation import generate_ids

    model = tiny_model("nf4", torch.float32, WITH_LORA)
    before = [t.tolist() for t in generate_ids(model, [[1, 2, 3], [4]], 8, 0.0, 1.0, {-1})]
    fuse_blocks(model)
    assert [t.tolist() for t in generate_ids(model, [[1, 2, 3], [4]], 8, 0.0, 1.0, {-1})] == before


def test_dropout_is_a_reason_not_to_fuse():
    model = tiny_model("nf4", torch.float32, RecipeConfig(lora=True, rank=4, dropout=0.1))
    assert "recipe.dropout" in why_not_fused(model)
    assert why_not_fused(tiny_model("nf4", torch.float32, WITH_LORA)) is None


def test_a_frozen_bias_of_the_base_is_added_and_not_trained():
    recipe = RecipeConfig(norm=True, bias=False)
    hidden = []
    for fused in (False, True):
        model = tiny_model("nf4", torch.float32, NORM_BIAS)
        mark_trainable(model, recipe)
        if fused:
            fuse_blocks(model)
        found, gradients = run(model)
        assert not [name for name in gradients if name.endswith("bias")]
        hidden.append(found)
    assert distance(*hidden) < 1e-6


def test_groups_stack_their_linears():
    block = FusedBlock(tiny_model("nf4", torch.float32, WITH_LORA).model.layers[0])
    assert [group.rows for group in block.groups] == [64 + 2 * 32, 64, 2 * 192, 64]
    assert [group.ranks for group in block.groups] == [12, 4, 8, 4]
