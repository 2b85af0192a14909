"""Run by test_kernels.py, in a process of its own, where Triton's interpreter takes the place of its compiler.

fp16, not bf16: the interpreter cuts fp32 numbers off where it should round them, and multiplies bf16 matrices as if
they were whole numbers.
"""

from __future__ import annotations

import pytest
import torch

from accessory.fused import kernels_cuda, pointwise
from accessory.quantization import int4_cuda, nf4_cuda
from accessory.quantization.int4 import Int4
from accessory.quantization.nf4 import NF4

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float16: {"rtol": 2e-3, "atol": 1e-2}}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)
BACKENDS = {
    "nf4": NF4(),
    "nf4-single_quant": NF4(double_quant=False),
    "nf4-blocks_of_128": NF4(128),
    "int4": Int4(4, 64),
    "int4-groups_of_40": Int4(4, 40),
    "int4-groups_of_20": Int4(4, 20),
    "int4-groups_of_512": Int4(4, 512),
    "int4-per_channel": Int4(4, -1, sym=True),
    "int8-per_channel": Int4(8, -1, sym=True),
    "int3": Int4(3, 32),
    "int2": Int4(2, 64),
    "int4-reordered": Int4(4, 64, reordered=True),
    "int3-reordered": Int4(3, 32, reordered=True),
}


def angles(tokens: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(tokens, size // 2)
    return angle.cos().repeat(1, 2).to(dtype), angle.sin().repeat(1, 2).to(dtype)


@every_dtype
@pytest.mark.parametrize("size", [16, 20])
def test_heads_turn_in_place_and_others_stay(size, dtype):
    qkv, (cos, sin) = torch.randn(21, 7, size, dtype=dtype), angles(21, size, dtype)
    expected = pointwise.rotate_(qkv.clone(), cos, sin, 5)
    found = kernels_cuda.rotate_(qkv.clone(), cos, sin, 5)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    assert torch.equal(found[:, 5:], qkv[:, 5:])


def assert_sums(found, expected, summed: bool) -> None:
    """In fp32 from what is not rounded yet, whatever the dtype."""
    assert (found is not None) == (expected is not None) == summed
    if summed:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@every_dtype
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("length", [7, 15, 181])
@pytest.mark.parametrize("size", [16, 20])
def test_gradients_turn_back_from_any_strides(size, length, summed, dtype):
    tokens = 3 * length
    heads = [torch.randn(3, length, h, size, dtype=dtype).transpose(1, 2) for h in (4, 2, 2)]
    cos, sin = angles(tokens, size, dtype)
    out = torch.full((tokens, 8, size), torch.nan, dtype=dtype)
    expected, sums = pointwise.rotate_back_(out.clone(), *heads, cos, sin, summed)
    found, found_sums = kernels_cuda.rotate_back_(out, *heads, cos, sin, summed)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    assert_sums(found_sums, sums, summed)


@every_dtype
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("rows", [9, 70, 530])
def test_swiglus_gradient_is_written_over_its_input(rows, summed, dtype):
    gate_up, dh = torch.randn(rows, 2 * 300, dtype=dtype), torch.randn(rows, 300, dtype=dtype)
    expected, sums = pointwise.swiglu_backward_(gate_up.clone(), dh, summed)
    found, found_sums = kernels_cuda.swiglu_backward_(gate_up, dh, summed)
    assert found is gate_up
    torch.testing.assert_close(gate_up, expected, **TOLERANCE[dtype])
    assert_sums(found_sums, sums, summed)


@every_dtype
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("rows", [1, 21])
def test_gradients_of_a_norm(rows, summed, dtype):
    x, dy, residual = (torch.randn(rows, 48, dtype=dtype) for _ in range(3))
    weight, rstd = torch.randn(48), torch.rand(rows, 1) + 0.5
    expected = pointwise.norm_backward(dy, x, rstd, weight, residual, summed)
    found = kernels_cuda.norm_backward(dy, x, rstd, weight, residual, summed)
    torch.testing.assert_close(found[0], expected[0], **TOLERANCE[dtype])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    assert_sums(found[2], expected[2], summed)


@pytest.mark.parametrize("tokens, rows, rank", [(5, 130, 3), (70, 40, 16), (33, 17, 50)])
def test_what_an_adapter_adds_is_written_beside_others(tokens, rows, rank):
    """No size is one of whole tiles; t and out are slices, as in q, k and v's."""
    dtype = torch.float16
    t, out = (
        torch.randn(tokens, 2 * rank, dtype=dtype)[:, rank:],
        torch.full((tokens, rows + 9), torch.nan, dtype=dtype),
    )
    b, bias = torch.randn(rows, rank, dtype=dtype), torch.randn(rows, dtype=dtype)
    kernels_cuda.adapter_(t, b, bias, out[:, 4:-5])
    expected = torch.addmm(bias, t, b.T)
    torch.testing.assert_close(out[:, 4:-5], expected, **TOLERANCE[dtype])
    assert out[:, :4].isnan().all() and out[:, -5:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
@pytest.mark.parametrize("rows", [5, 33])
def test_weights_are_those_of_plain_pytorch_bit_for_bit_and_lora_is_added(rows, backend):
    shape = (rows, 1024 if getattr(backend, "group_size", 0) == 512 else 640)
    payload = backend.quantize(torch.randn(shape))
    exact = backend.dequantize(payload, shape, torch.float32)
    if isinstance(backend, NF4):
        kernel, setting = nf4_cuda.dequantize, backend.blocksize
    else:
        kernel, setting = int4_cuda.dequantize, backend.bits
    assert torch.equal(kernel(payload, setting, shape, torch.float32), exact)
    assert torch.equal(kernel(payload, setting, shape, torch.float16), exact.to(torch.float16))
    wide = torch.full((rows, shape[1] + 8), torch.nan)
    b, a = torch.randn(rows, 5, dtype=torch.float16), torch.randn(5, shape[1], dtype=torch.float16)
    kernel(payload, setting, shape, torch.float32, out=wide[:, : shape[1]], lora=(b, a))
    torch.testing.assert_close(wide[:, : shape[1]], exact + b.float() @ a.float(), rtol=1e-4, atol=1e-4)
    assert wide[:, shape[1] :].isnan().all()
