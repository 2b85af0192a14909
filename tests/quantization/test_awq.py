"""AWQ against a brute-force search in fp64, written from the equations in awq's docstring."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_rtn import reference
from torch import Tensor, nn
from transformers import Blip2VisionConfig, LlamaConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2EncoderLayer

from accessory.models.llama import Block
from accessory.quantization import rtn
from accessory.quantization.methods import awq
from accessory.quantization.packed import Scheme
from accessory.quantize_options import AwqConfig, TransVersion

D, HIDDEN, GROUP, SEQ = 64, 96, 16, 12
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
OUTPUT, GATE_UP, DOWN = "self_attn.o_proj", ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj"
SCHEME = Scheme(4, GROUP)
ALL = dict.fromkeys([*QKV, OUTPUT, *GATE_UP, DOWN], SCHEME)
SCALING = AwqConfig(trans=True, weight_clip=False)
CLIPPING = AwqConfig(trans=False, weight_clip=True)
BOTH = AwqConfig(trans=True, weight_clip=True)


def random_block(kv_heads: int = 4, dtype: torch.dtype = torch.float32, bias: bool = False) -> Block:
    config = LlamaConfig(
        hidden_size=D, intermediate_size=HIDDEN, num_attention_heads=4, num_key_value_heads=kv_heads,
        attention_bias=bias, mlp_bias=bias,
    )  # fmt: skip
    torch.manual_seed(0)
    block = Block(config, 0)
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        norm.weight.data = torch.rand(D).mul(3).exp()  # a few channels much larger than the rest, as in real models
    for name in ALL:
        block.get_submodule(name).weight.data.mul_(torch.rand(block.get_submodule(name).out_features, 1) + 0.5)
    return block.to(dtype)


def random_batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(b, SEQ, D, generator=g).to(dtype) for b in (3, 1, 2)]


def rope(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(SEQ), 100.0 ** -torch.linspace(0, 1, D // 8)).repeat(1, 2)
    return angles.cos()[None, None].to(dtype), angles.sin()[None, None].to(dtype)


def runner(block: nn.Module, batches: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for x in batches:
            block(x, rope(x.dtype)) if isinstance(block, Block) else block(x)

    return run


def adjusted(block: nn.Module, schemes: dict[str, Scheme], options: AwqConfig, batches=None) -> nn.Module:
    block = copy.deepcopy(block)
    dtype = next(block.parameters()).dtype
    awq.adjust(block, runner(block, batches or random_batches(dtype)), schemes, options)
    return block


def weight_of(block: nn.Module, name: str) -> Tensor:
    return block.get_submodule(name).weight.detach()


# --- the brute force ---


def rounded64(weight: Tensor, scheme: Scheme) -> Tensor:
    return torch.from_numpy(reference(weight, scheme)[3])


@torch.no_grad()
def inputs64(block: Block, x: Tensor) -> dict[str, Tensor]:
    """The input of every linear of an fp64 block: [b, s, in]."""
    a = block.input_layernorm(x)
    before_o = copy.deepcopy(block.self_attn)
    before_o.o_proj = nn.Identity()
    o = before_o(a, rope(torch.float64), None, None)
    m = block.post_attention_layernorm(x + block.self_attn.o_proj(o))
    down = F.silu(block.mlp.gate_proj(m)) * block.mlp.up_proj(m)
    return dict.fromkeys(QKV, a) | {OUTPUT: o} | dict.fromkeys(GATE_UP, m) | {DOWN: down}


@torch.no_grad()
def brute_force_scales(block: Block, names: list[str], inspected: str, x: Tensor, schemes, options) -> Tensor:
    """block: fp64; x: the inspected module's input [b, s, in], which the linears share."""
    size = x.abs().mean(dim=(0, 1))
    w = 0
    for name in names:
        if name in schemes:
            absolute = weight_of(block, name).abs()
            per_group = absolute.reshape(len(absolute), -1, schemes[name].group_size)
            w = w + (per_group / per_group.amax(-1, keepdim=True).clamp(min=1e-9)).view_as(absolute).sum(0)
    w = w / sum(len(weight_of(block, name)) for name in names if name in schemes)
    extra = (rope(torch.float64), None, None) if inspected == "self_attn" else ()
    expected = block.get_submodule(inspected)(x, *extra)
    best = (float("inf"), None)
    for k in range(options.n_grid):
        r = k / options.n_grid
        s = size**r / (w ** (1 - r) if options.trans_version is TransVersion.v1 else 1)
        s = s.clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        trial = copy.deepcopy(block)
        for name in names:
            scaled = weight_of(block, name) * s
            trial.get_submodule(name).weight.data = rounded64(scaled, schemes[name]) if name in schemes else scaled
        loss = (trial.get_submodule(inspected)(x / s, *extra) - expected).square().mean().item()
        best = min(best, (loss, s), key=lambda pair: pair[0])
    return best[1]


def brute_force_scaling(block: Block, schemes: dict[str, Scheme], options: AwqConfig) -> Block:
    block = copy.deepcopy(block).double()
    inputs = inputs64(block, torch.cat(random_batches()).double())
    subsets = [
        ("input_layernorm", QKV, "self_attn"),
        ("self_attn.v_proj", [OUTPUT], OUTPUT),
        ("post_attention_layernorm", GATE_UP, "mlp"),
        ("mlp.up_proj", [DOWN], DOWN),
    ]
    for previous, names, inspected in subsets:
        s = brute_force_scales(block, names, inspected, inputs[names[0]], schemes, options)
        for name in names:
            block.get_submodule(name).weight.data *= s
        module = block.get_submodule(previous)
        module.weight.data /= s[:, None] if module.weight.ndim == 2 else s
        if getattr(module, "bias", None) is not None:
            module.bias.data /= s
    return block


def brute_force_clip(weight: Tensor, x: Tensor, scheme: Scheme, options: AwqConfig) -> Tensor:
    """weight: fp64 [out, in]; x: fp64 [tokens, in]."""
    clipped = weight.clone()
    size = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], size):
            part = slice(start, start + size)
            w = weight[row, part]
            low, high = (-w.abs().max(), w.abs().max()) if options.clip_sym else (w.min(), w.max())
            best = (float("inf"), None)
            for i in range(options.n_grid // 2):
                cut = w.clamp(low * (1 - i / options.n_grid), high * (1 - i / options.n_grid))
                rounded = rounded64(cut[None], Scheme(scheme.bits, -1, scheme.sym))[0]
                best = min(best, ((x[:, part] @ (rounded - w)).square().mean().item(), cut), key=lambda p: p[0])
            clipped[row, part] = best[1]
    return clipped


# --- scaling ---


@pytest.mark.parametrize("version", TransVersion)
@pytest.mark.parametrize("scheme", [Scheme(4, GROUP), Scheme(3, GROUP, sym=True)], ids=str)
def test_scales_are_those_of_the_brute_force(version, scheme):
    block, schemes = random_block(bias=True), dict.fromkeys(ALL, scheme)
    options = replace(SCALING, trans_version=version)
    expected = brute_force_scaling(block, schemes, options)
    for name, parameter in adjusted(block, schemes, options).named_parameters():
        torch.testing.assert_close(parameter.double(), expected.get_parameter(name), rtol=1e-4, atol=1e-7, msg=name)


def test_scaling_changes_the_weights_but_not_the_function():
    block = random_block(bias=True)
    after = adjusted(block, ALL, SCALING)
    for name in ALL:
        assert not torch.allclose(weight_of(after, name), weight_of(block, name), rtol=0.05)
    for x in random_batches():
        torch.testing.assert_close(after(x, rope(x.dtype)), block(x, rope(x.dtype)), rtol=1e-4, atol=1e-4)


def test_a_bf16_block_keeps_its_function_up_to_rounding():
    block = random_block(dtype=torch.bfloat16)
    after = adjusted(block, ALL, SCALING)
    assert all(p.dtype == torch.bfloat16 for p in after.parameters())
    exact = copy.deepcopy(block).double()
    for x in random_batches(torch.bfloat16):
        expected = exact(x.double(), rope(torch.float64))
        error = (after(x, rope(x.dtype)).double() - expected).norm()
        own_error = (block(x, rope(x.dtype)).double() - expected).norm()
        assert error < 2 * own_error


@pytest.mark.parametrize("subset", range(4))
def test_rounding_after_scaling_is_nearer_to_the_inspected_output(subset):
    block, x = random_block(), torch.cat(random_batches())

    def error(of: Block) -> float:
        inspected, linears = awq.subsets_of(of)[subset].inspected, awq.subsets_of(of)[subset].linears
        seen: list[tuple] = []
        handle = inspected.register_forward_hook(lambda m, args, out: seen.append((args, out)))
        of(x, rope(x.dtype))
        handle.remove()
        ((args, expected),) = seen
        for linear in linears.values():
            linear.weight.data = rtn.fake(linear.weight, SCHEME)
        return (inspected(*args) - expected).square().mean().item()

    after = adjusted(block, ALL, SCALING)
    assert error(after) < 0.95 * error(block)


@pytest.mark.parametrize("version", TransVersion)
def test_a_linear_without_a_scheme_is_scaled_along_but_not_rounded_in_the_search(version):
    block = random_block()
    schemes = {name: scheme for name, scheme in ALL.items() if name not in ("mlp.up_proj", DOWN)}
    options = replace(SCALING, trans_version=version)
    after = adjusted(block, schemes, options)
    x = inputs64(copy.deepcopy(block).double(), torch.cat(random_batches()).double())["mlp.up_proj"]
    s = brute_force_scales(copy.deepcopy(block).double(), GATE_UP, "mlp", x, schemes, options)
    for name in GATE_UP:
        torch.testing.assert_close(weight_of(after, name).double(), weight_of(block, name) * s, rtol=1e-4, atol=1e-7)
    assert torch.equal(weight_of(after, DOWN), weight_of(block, DOWN))


def test_with_r_0_alone_the_block_stays_as_it_is():
    block = random_block()
    after = adjusted(block, ALL, replace(SCALING, n_grid=1))
    for name, parameter in after.named_parameters():
        assert torch.equal(parameter, block.get_parameter(name))


def test_the_split_into_batches_does_not_matter():
    block = random_block()
    whole = adjusted(block, ALL, BOTH, [torch.cat(random_batches())])
    for name, parameter in adjusted(block, ALL, BOTH).named_parameters():
        torch.testing.assert_close(parameter, whole.get_parameter(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("version", TransVersion)
def test_channels_that_are_always_zero_take_part_in_the_search(version):
    block, options = random_block(), replace(SCALING, trans_version=version)
    block.input_layernorm.weight.data[3] = 0
    block.mlp.up_proj.weight.data[5] = 0
    expected = brute_force_scaling(block, ALL, options)
    for name, parameter in adjusted(block, ALL, options).named_parameters():
        torch.testing.assert_close(parameter.double(), expected.get_parameter(name), rtol=1e-4, atol=1e-7, msg=name)
    assert all(parameter.isfinite().all() for parameter in adjusted(block, ALL, BOTH).parameters())


# --- clipping ---


@pytest.mark.parametrize("clip_sym", [True, False])
@pytest.mark.parametrize("scheme", [Scheme(4, GROUP), Scheme(2, GROUP, sym=True), Scheme(3, -1)], ids=str)
def test_clipped_weights_are_those_of_the_brute_force(scheme, clip_sym, monkeypatch):
    monkeypatch.setattr(awq, "ROWS", 40)
    block, options = random_block(), replace(CLIPPING, clip_sym=clip_sym)
    after = adjusted(block, dict.fromkeys(ALL, scheme), options)
    inputs = inputs64(copy.deepcopy(block).double(), torch.cat(random_batches()).double())
    for name in (QKV[2], OUTPUT, *GATE_UP, DOWN):
        expected = brute_force_clip(weight_of(block, name).double(), inputs[name].flatten(0, 1), scheme, options)
        assert not torch.equal(expected.float(), weight_of(block, name))
        torch.testing.assert_close(weight_of(after, name).double(), expected, rtol=1e-6, atol=0)


def test_queries_keys_and_linears_without_a_scheme_are_not_clipped():
    block = random_block()
    after = adjusted(block, {name: Scheme(2, GROUP) for name in (*QKV, DOWN)}, CLIPPING)
    changed = {name for name in ALL if not torch.equal(weight_of(after, name), weight_of(block, name))}
    assert changed == {"self_attn.v_proj", DOWN}


def test_clipping_comes_after_scaling():
    block = random_block()
    both = adjusted(block, ALL, BOTH)
    one_after_the_other = adjusted(adjusted(block, ALL, SCALING), ALL, CLIPPING)
    for name, parameter in both.named_parameters():
        assert torch.equal(parameter, one_after_the_other.get_parameter(name))


# --- subsets and hooks ---


def test_every_linear_of_a_block_is_in_one_subset():
    block = random_block()
    subsets = awq.subsets_of(block)
    assert [list(subset.linears) for subset in subsets] == [QKV, [OUTPUT], GATE_UP, [DOWN]]
    assert [subset.previous for subset in subsets] == [
        block.input_layernorm, block.self_attn.v_proj, block.post_attention_layernorm, block.mlp.up_proj,
    ]  # fmt: skip


def test_o_proj_is_clipped_but_not_scaled_where_heads_share_values():
    block = random_block(kv_heads=2)
    (subset,) = (subset for subset in awq.subsets_of(block) if OUTPUT in subset.linears)
    assert subset.previous is None
    scaled = adjusted(block, ALL, SCALING)
    assert torch.equal(weight_of(scaled, OUTPUT), weight_of(block, OUTPUT))
    assert not torch.equal(weight_of(adjusted(block, ALL, CLIPPING), OUTPUT), weight_of(block, OUTPUT))
    x = random_batches()[0]
    torch.testing.assert_close(scaled(x, rope(x.dtype)), block(x, rope(x.dtype)), rtol=1e-4, atol=1e-4)


def test_a_vision_layer_is_scaled_behind_its_norms_and_keeps_its_function():
    config = Blip2VisionConfig(hidden_size=D, intermediate_size=HIDDEN, num_attention_heads=4, hidden_act="gelu")
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    layer = Blip2EncoderLayer(config).eval()
    for norm in (layer.layer_norm1, layer.layer_norm2):
        norm.weight.data, norm.bias.data = torch.rand(D).mul(3).exp(), torch.randn(D)
    schemes = {name: SCHEME for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    after = adjusted(layer, schemes, SCALING)
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, layer.get_parameter(name))}
    norms = {f"{norm}.{part}" for norm in ("layer_norm1", "layer_norm2") for part in ("weight", "bias")}
    assert changed == norms | {"self_attn.qkv.weight", "mlp.fc1.weight"}
    for x in random_batches():
        torch.testing.assert_close(after(x), layer(x), rtol=1e-4, atol=1e-4)
    clipped = adjusted(layer, schemes, CLIPPING)
    changed = {name for name, p in clipped.named_parameters() if not torch.equal(p, layer.get_parameter(name))}
    assert changed == {"self_attn.projection.weight", "mlp.fc1.weight", "mlp.fc2.weight"}


def test_no_hook_stays_behind():
    after = adjusted(random_block(), ALL, BOTH)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in after.modules())
