"""QuantLinear against bitsandbytes' functional API, numpy's half precision, and autograd on the dequantized weight."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import VOCAB
from torch import Tensor, nn

import accessory
from accessory.assemble import assemble
from accessory.config import ModelConfig, QuantizationConfig, QuantMethod, RecipeConfig
from accessory.errors import UserError
from accessory.models.llama import Llama
from accessory.module import batch_loss
from accessory.quantization import QuantLinear, block_linears, rtn
from accessory.quantization.dense import Dense
from accessory.quantization.int4 import Int4
from accessory.quantization.nf4 import NF4

IN, OUT = 192, 128  # 384 blocks of 64: two second-level blocks of 256 scales
BACKENDS = {
    "dense-fp32": Dense(torch.float32),
    "dense-bf16": Dense(torch.bfloat16),
    "nf4-double_quant": NF4(double_quant=True),
    "nf4-single_quant": NF4(double_quant=False),
    "int4": Int4(4, 64),
    "int4-sym": Int4(4, 32, sym=True),
    "int4-per_channel": Int4(4, -1),
    "int4-reordered": Int4(4, 64, reordered=True),
    "int2": Int4(2, 64),
    "int3": Int4(3, 64),
    "int8": Int4(8, -1, sym=True),
}
NF4_BASE = QuantizationConfig(method=QuantMethod.nf4)
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def random_weight(seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(OUT, IN, generator=g) * torch.rand(OUT, 1, generator=g)  # scales differ from block to block


def layer_with(backend, bias: bool = True) -> QuantLinear:
    layer = QuantLinear(IN, OUT, backend)
    layer.load_weight(random_weight())
    if bias:
        layer.load_bias(torch.randn(OUT, generator=torch.Generator().manual_seed(1)))
        layer.bias.requires_grad_(True)
    return layer


def reference_weight(backend, dtype: torch.dtype) -> Tensor:
    """The weight that the layer stands for: rounded for Dense, through bitsandbytes' own state for NF4, by numpy's half
    precision for Int4."""
    if isinstance(backend, Dense):
        return random_weight().to(backend.dtype).to(dtype)
    if isinstance(backend, Int4):
        packed = rtn.quantize(random_weight(), backend.scheme)
        per_column = IN // packed.scales.shape[1]
        scales, zeros = (t.numpy().repeat(per_column, axis=1) for t in (packed.scales, packed.zeros))
        whole = packed.codes.numpy().astype(np.int16) - zeros.astype(np.int16)
        return torch.from_numpy(whole.astype(np.float16) * scales).to(dtype)
    packed, state = bnb.quantize_4bit(
        random_weight(), blocksize=64, compress_statistics=backend.double_quant, quant_type="nf4"
    )
    state.dtype = dtype
    return bnb.dequantize_4bit(packed, state)


def tokens(dtype: torch.dtype, *leading: int) -> Tensor:
    x = torch.randn(*(leading or (3, 5)), IN, generator=torch.Generator().manual_seed(2))
    return x.to(dtype).requires_grad_()


def upstream(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(3)).to(like.dtype)


def nf4_model(folder: Path, recipe: RecipeConfig, dtype: torch.dtype = torch.float32) -> Llama:
    return assemble(ModelConfig(pretrained_path=[str(folder)]), NF4_BASE, recipe, torch.device("cpu"), dtype)


def training_batch() -> dict[str, Tensor]:
    ids = torch.arange(24).reshape(2, 12) * 7 % VOCAB
    return {"input_ids": ids, "position_ids": torch.arange(12).expand(2, 12), "targets": ids.roll(-1, 1)}


# --- numbers ---------------------------------------------------------------------------------------------------------


@every_backend
@both_dtypes
@pytest.mark.parametrize("bias", [True, False])
def test_forward_equals_f_linear_with_the_dequantized_weight_bit_for_bit(backend, dtype, bias):
    layer, x = layer_with(backend, bias), tokens(dtype)
    expected = F.linear(x, reference_weight(backend, dtype), layer.bias.to(dtype) if bias else None)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), expected)


@every_backend
@both_dtypes
def test_dequantize_gives_the_reference_weight_bit_for_bit(backend, dtype):
    assert torch.equal(layer_with(backend).dequantize(dtype), reference_weight(backend, dtype))


@every_backend
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)], ids=["fp32", "bf16"])
def test_gradients_are_those_of_autograd_on_the_dequantized_weight_in_fp64(backend, dtype, tolerance):
    layer, x = layer_with(backend), tokens(dtype)
    y = layer(x)
    y.backward(upstream(y))

    wide = x.detach().double().requires_grad_()
    bias = layer.bias.detach().double().requires_grad_()
    F.linear(wide, reference_weight(backend, dtype).double(), bias).backward(upstream(y).double())
    assert x.grad.dtype == dtype and layer.bias.grad.dtype == torch.float32
    assert (x.grad.double() - wide.grad).norm() < tolerance * wide.grad.norm()
    assert (layer.bias.grad.double() - bias.grad).norm() < 1e-6 * bias.grad.norm()


@pytest.mark.parametrize("leading", [(), (7,), (3, 5), (2, 3, 4)])
def test_any_number_of_leading_dimensions_gives_the_gradients_of_f_linear(leading):
    layer = layer_with(Dense(torch.float32))
    x = torch.randn(*leading, IN, requires_grad=True)
    y = layer(x)
    y.backward(upstream(y))

    same, bias = x.detach().requires_grad_(), layer.bias.detach().requires_grad_()
    F.linear(same, random_weight(), bias).backward(upstream(y))
    torch.testing.assert_close(x.grad, same.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)


@every_backend
def test_a_frozen_bias_gets_no_gradient(backend):
    layer, x = layer_with(backend), tokens(torch.float32)
    layer.bias.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.bias.grad is None and x.grad.abs().sum() > 0


@every_backend
def test_the_bias_trains_where_the_input_needs_no_gradient(backend):
    """The first block's linears under a recipe without norms."""
    layer = layer_with(backend)
    layer(tokens(torch.float32).detach()).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((OUT,), 15.0))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_the_nf4_payload_is_bitsandbytes_own(double_quant, dtype):
    weight = random_weight().to(dtype)
    layer = QuantLinear(IN, OUT, NF4(double_quant=double_quant))
    layer.load_weight(weight)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    assert torch.equal(layer.packed, packed)
    if double_quant:
        assert torch.equal(layer.absmax_codes, state.absmax)
        assert torch.equal(layer.absmax_scales, state.state2.absmax)
        assert torch.equal(layer.absmax_mean, state.offset)
    else:
        assert torch.equal(layer.absmax, state.absmax)


@pytest.mark.parametrize(
    ("backend", "bits"),
    [(Int4(4, 64), 4.375), (Int4(3, 64), 3.375), (Int4(2, 64), 2.375), (Int4(8, -1, True), 8 + 24 / 2048)],
    ids=["4", "3", "2", "8"],
)
def test_whole_numbers_take_their_bits_and_a_scale_and_zero_point_of_24_a_group(backend, bits):
    layer = QuantLinear(2048, 2048, backend)
    layer.load_weight(torch.randn(2048, 2048))
    assert 8 * sum(tensor.nbytes for tensor in layer.payload) / 2048**2 == bits


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4.127), (False, 4.5)])
def test_a_weight_takes_as_many_bits_as_qlora_says(double_quant, bits):
    layer = QuantLinear(2048, 2048, NF4(double_quant=double_quant))
    layer.load_weight(torch.randn(2048, 2048))
    codebook = 256 * 4 if double_quant else 0  # one for all blocks, not counted by the paper
    found = 8 * (sum(tensor.nbytes for tensor in layer.payload) - codebook) / 2048**2
    assert found == pytest.approx(bits, abs=1e-3)


# --- memory ----------------------------------------------------------------------------------------------------------


@every_backend
@both_dtypes
def test_backward_keeps_nothing_but_the_layers_own_payload(backend, dtype):
    layer, x = layer_with(backend), tokens(dtype)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {buffer.untyped_storage().data_ptr() for buffer in layer.buffers()}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} == own


def test_no_linear_of_a_whole_nf4_model_keeps_an_activation_under_norm_bias(hf_folder):
    model = nf4_model(hf_folder, RecipeConfig(), torch.bfloat16)
    kept: dict[str, list[Tensor]] = {}
    inside: list[str] = []

    def note(tensor: Tensor) -> Tensor:
        if inside:
            kept.setdefault(inside[-1], []).append(tensor)
        return tensor

    linears = block_linears(model)
    for path, layer in linears.items():
        layer.register_forward_pre_hook(lambda *_, path=path: inside.append(path))
        layer.register_forward_hook(lambda *_: inside.pop() and None)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        batch_loss(model, training_batch())
    assert len(linears) == 14 and kept.keys() == linears.keys()
    for path, tensors in kept.items():
        own = {buffer.untyped_storage().data_ptr() for buffer in linears[path].buffers()}
        assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == own, path


def compiled_bf16_model(folder: Path, method: str) -> Llama:
    """With the compiler's own choice of what backward keeps (the min-cut partitioner); code generation is left out."""
    config, quantization = ModelConfig(pretrained_path=[str(folder)]), QuantizationConfig(method=QuantMethod(method))
    model = assemble(config, quantization, RecipeConfig(), torch.device("cpu"), torch.bfloat16)
    for block in model.model.layers:
        block.compile(backend="aot_eager_decomp_partition")
    return model


@pytest.mark.parametrize("method", ["none", "nf4", "rtn", "int8"])
def test_compiled_blocks_keep_no_dequantized_weight(hf_folder, method):
    model = compiled_bf16_model(hf_folder, method)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        batch_loss(model, training_batch())
    own = {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    shapes = {tuple(t.shape) for t in kept if t.is_floating_point() and t.untyped_storage().data_ptr() not in own}
    weights = {layer.shape for layer in block_linears(model).values()}
    assert shapes and not shapes & (weights | {shape[::-1] for shape in weights})


@pytest.mark.parametrize("method", ["none", "nf4", "rtn", "int8"])
def test_compiled_blocks_have_the_gradients_of_plain_ones(hf_folder, method):
    gradients = []
    for stance in ("default", "force_eager"):
        model = compiled_bf16_model(hf_folder, method)
        with torch.compiler.set_stance(stance):
            batch_loss(model, training_batch()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, plain in gradients[1].items():
        assert plain.abs().sum() > 0
        assert (gradients[0][name] - plain).norm() < 0.05 * plain.norm(), name


# --- what must not change it -----------------------------------------------------------------------------------------


def cast_to_half(module: nn.Module) -> None:
    module.half()


def cast_to_bf16(module: nn.Module) -> None:
    module.to(torch.bfloat16)


def cast_to_double(module: nn.Module) -> None:
    module.double()


@every_backend
@pytest.mark.parametrize("cast", [cast_to_half, cast_to_bf16, cast_to_double])
def test_casting_the_module_leaves_payload_and_bias_as_they_are(backend, cast):
    layer = layer_with(backend)
    before = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    cast(layer)
    after = layer.state_dict()
    assert layer.bias.requires_grad
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))


@pytest.mark.parametrize("trains", [True, False])
def test_a_bias_loaded_over_another_trains_if_that_one_did(trains):
    layer = layer_with(NF4())
    layer.bias.requires_grad_(trains)
    layer.load_bias(torch.ones(OUT, dtype=torch.bfloat16))
    assert layer.bias.requires_grad is trains
    assert layer.bias.dtype == torch.float32 and layer.bias.sum() == OUT


def test_moving_the_module_moves_payload_and_bias():
    layer = layer_with(NF4()).to("meta")
    assert {tensor.device.type for tensor in (*layer.payload, layer.bias)} == {"meta"}


@every_backend
def test_an_eval_pass_without_gradients_changes_no_later_gradient(backend):
    """On CPUs with AVX512-BF16 bitsandbytes' own layer repacks its weight there, and gradients end behind it."""
    gradients = []
    for evaluated in (False, True):
        layer, x = layer_with(backend), tokens(torch.bfloat16)
        if evaluated:
            layer.eval()
            with torch.no_grad():
                layer(x)
            layer.train()
        y = layer(x)
        y.backward(upstream(y))
        gradients.append((x.grad, layer.bias.grad))
    assert gradients[0][0].abs().sum() > 0
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])


def test_an_eval_pass_changes_no_later_gradient_of_a_whole_nf4_model(hf_folder):
    gradients = []
    for evaluated in (False, True):
        model = nf4_model(hf_folder, RecipeConfig(), torch.bfloat16)
        if evaluated:
            model.eval()
            with torch.no_grad():
                model(training_batch()["input_ids"])
            model.train()
        batch_loss(model, training_batch()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    before, after = gradients
    assert all(gradient is not None for gradient in after.values())
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@both_dtypes
def test_the_quantized_bytes_do_not_depend_on_the_compute_type(meta_folder, dtype):
    model = accessory.load_model([meta_folder], quantization="nf4", dtype=dtype)
    stored = torch.load(meta_folder / "consolidated.00.pth")["layers.1.feed_forward.w2.weight"]
    packed, _ = bnb.quantize_4bit(stored, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(model.model.layers[1].mlp.down_proj.packed, packed)


# --- which linears ---------------------------------------------------------------------------------------------------


def test_the_linears_of_the_decoder_blocks_are_quantized_and_nothing_else(meta_folder):
    model = accessory.load_model([meta_folder], quantization="nf4", dtype=torch.bfloat16)
    found = {path for path, module in model.named_modules() if isinstance(module, QuantLinear)}
    linears = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert found == {f"model.layers.{i}.{name}" for i in range(2) for name in linears}
    assert {tensor.dtype for layer in block_linears(model).values() for tensor in [layer.packed]} == {torch.uint8}
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight.dtype == torch.bfloat16
    assert type(model.model.embed_tokens) is nn.Embedding and model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_lm_head_is_quantized_when_asked(meta_folder):
    config = QuantizationConfig(method=QuantMethod.nf4, lm_head=True)
    model = accessory.load_model([meta_folder], quantization=config)
    stored = torch.load(meta_folder / "consolidated.00.pth")["output.weight"]
    packed, state = bnb.quantize_4bit(stored, blocksize=64, compress_statistics=True, quant_type="nf4")
    hidden = torch.randn(2, 64)
    assert torch.equal(model.lm_head(hidden), F.linear(hidden, bnb.dequantize_4bit(packed, state)))


def test_a_tied_lm_head_cannot_be_quantized(hf_folder):
    with pytest.raises(UserError, match=r"quantization\.lm_head=true.*tied"):
        accessory.load_model([hf_folder], quantization=QuantizationConfig(method=QuantMethod.nf4, lm_head=True))


@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_a_model_in_nf4_computes_with_bitsandbytes_weights(meta_folder, blocksize):
    """The reference: the same model in fp32, its weights taken through bitsandbytes' own functions."""
    config = QuantizationConfig(method=QuantMethod.nf4, blocksize=blocksize)
    quantized = accessory.load_model([meta_folder], quantization=config)
    reference = accessory.load_model([meta_folder])
    for layer in block_linears(reference).values():
        packed, state = bnb.quantize_4bit(layer.dense, blocksize=blocksize, compress_statistics=True, quant_type="nf4")
        layer.load_weight(bnb.dequantize_4bit(packed, state))
    ids = training_batch()["input_ids"]
    assert torch.equal(quantized(ids), reference(ids))


def test_a_blocksize_that_bitsandbytes_lacks_is_refused_with_those_it_has(meta_folder):
    with pytest.raises(UserError, match=r"quantization\.blocksize=48: NF4 has 32, 64, 128"):
        accessory.load_model([meta_folder], quantization=QuantizationConfig(method=QuantMethod.nf4, blocksize=48))


def test_an_unknown_quantization_is_refused_with_those_there_are(meta_folder):
    with pytest.raises(UserError, match="quantization='nf5': known are none, nf4, int4, int8, rtn"):
        accessory.load_model([meta_folder], quantization="nf5")
