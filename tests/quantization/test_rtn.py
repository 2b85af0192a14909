"""Rounding to nearest against its equations, written out in fp64, weight by weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from accessory.quantization import rtn
from accessory.quantization.packed import Packed, Scheme

OUT, IN = 12, 128
SCHEMES = [Scheme(bits, size, sym) for bits in (2, 3, 4, 8) for size in (32, -1) for sym in (False, True)]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def random_weight(seed: int = 0, out: int = OUT, in_features: int = IN) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(out, in_features, generator=g) * torch.rand(out, 1, generator=g) * 0.1


def reference_group(w: np.ndarray, bits: int, sym: bool) -> tuple[float, int]:
    """Scale and zero of one group of fp64 weights, by the equations in rtn's docstring."""
    if sym:
        return float(np.float16(max(abs(w).max(), 1e-5) / (2 ** (bits - 1) - 1))), 2 ** (bits - 1)
    low, high = min(w.min(), 0.0), max(w.max(), 0.0)
    scale = float(np.float16(max(high - low, 1e-5) / (2**bits - 1)))
    return scale, int(np.clip(-np.round(low / scale), 0, 2**bits - 1))


def reference(weight: Tensor, scheme: Scheme) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """codes [out, in], scales and zeros [out, groups], and the rounded weight [out, in] in fp64."""
    w = weight.double().numpy()
    size = w.shape[1] if scheme.group_size == -1 else scheme.group_size
    codes, rounded = np.empty(w.shape, dtype=int), np.empty(w.shape)
    scales, zeros = np.empty((len(w), w.shape[1] // size)), np.empty((len(w), w.shape[1] // size), dtype=int)
    for row in range(len(w)):
        for group in range(w.shape[1] // size):
            part = row, slice(group * size, (group + 1) * size)
            scale, zero = reference_group(w[part], scheme.bits, scheme.sym)
            codes[part] = np.clip(np.round(w[part] / scale) + zero, 0, 2**scheme.bits - 1)
            rounded[part] = (codes[part] - zero) * scale
            scales[row, group], zeros[row, group] = scale, zero
    return codes, scales, zeros, rounded


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_scales_and_zeros_are_those_of_the_equations(scheme, dtype):
    weight = random_weight().to(dtype)
    packed = rtn.quantize(weight, scheme)
    codes, scales, zeros, _ = reference(weight, scheme)
    assert (packed.scales.dtype, packed.zeros.dtype, packed.codes.dtype) == (torch.float16, torch.uint8, torch.uint8)
    assert np.array_equal(packed.scales.double().numpy(), scales)
    assert np.array_equal(packed.zeros.numpy(), zeros)
    assert np.array_equal(packed.codes.numpy(), codes)


@every_scheme
def test_no_weight_is_further_than_half_a_step_from_its_code(scheme):
    weight = random_weight(1)
    packed = rtn.quantize(weight, scheme)
    step = packed.scales.float().repeat_interleave(packed.group_size, dim=1)
    # The ends of a range may lie up to a rounded zero point and a rounded scale (2^-11 of 2^b steps) outside.
    slack = (0.5 if not scheme.sym else 0.0) + 2 ** (scheme.bits - 11)
    end = (packed.codes == 0) | (packed.codes == 2**scheme.bits - 1)
    steps_off = (packed.dequantize(torch.float32) - weight).abs() / step
    assert steps_off[~end].max() <= 0.5 + 2 ** (scheme.bits - 11)
    assert steps_off.max() <= 0.5 + slack


@every_scheme
def test_fake_is_the_stored_weight_before_its_products_are_rounded_to_fp16(scheme):
    weight = random_weight(2)
    faked = rtn.fake(weight.bfloat16(), scheme)
    assert faked.dtype == torch.float32
    torch.testing.assert_close(faked.double().numpy(), reference(weight.bfloat16(), scheme)[3], rtol=1e-6, atol=0)
    stored = rtn.quantize(weight.bfloat16(), scheme).dequantize(torch.float32)
    torch.testing.assert_close(stored, faked, rtol=2**-11, atol=2**-25)


@every_scheme
def test_groups_of_zeros_stay_zeros(scheme):
    weight = random_weight(3)
    weight[0], weight[1, :32], weight[2] = 0, 0, -0.0
    rounded = rtn.quantize(weight, scheme).dequantize(torch.float32)
    assert (rounded[0] == 0).all() and (rounded[1, :32] == 0).all() and (rounded[2] == 0).all()


@every_scheme
def test_constant_groups_of_any_size_become_finite_weights(scheme):
    values = torch.tensor([1e-30, 1e-7, 0.5, -0.5, 1.0, 6e4, -6e4, 1e6, 3e38, -3e38])
    weight = values[:, None].expand(-1, IN)
    packed = rtn.quantize(weight, scheme)
    rounded = packed.dequantize(torch.float32)
    assert (packed.scales > 0).all() and rounded.isfinite().all()
    assert torch.equal(rounded, rtn.fake(weight, scheme).half().float())
    torch.testing.assert_close(rounded[2:5], weight[2:5], rtol=2**-10, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_of_one_sign_far_from_zero_keeps_its_weights(bits, sign):
    weight = sign * (1 + 0.1 * torch.rand(4, 64, generator=torch.Generator().manual_seed(0)))
    packed = rtn.quantize(weight, Scheme(bits, -1))
    step = packed.scales.float().max()
    assert (packed.dequantize(torch.float32) - weight).abs().max() <= 0.5 * step + 2**-10  # fp16 products of about 1


@every_scheme
def test_encoding_in_many_parts_changes_nothing(scheme, monkeypatch):
    weight = random_weight(4)
    whole = rtn.quantize(weight, scheme)
    monkeypatch.setattr(rtn, "CHUNK", 5 * IN)
    assert torch.equal(rtn.quantize(weight, scheme).codes, whole.codes)


@every_scheme
def test_columns_out_of_order_are_rounded_to_the_grid_of_their_own_group(scheme):
    weight = random_weight(5)
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(0))
    packed = rtn.quantize(weight, scheme)
    g_idx = (torch.arange(IN) // packed.group_size)[order].int()
    codes = rtn.encode(weight[:, order], packed.scales, packed.zeros, scheme.bits, g_idx)
    assert torch.equal(codes, packed.codes[:, order])
    shuffled = Packed(codes, packed.scales, packed.zeros, scheme.bits, g_idx)
    assert torch.equal(shuffled.dequantize(torch.float32), packed.dequantize(torch.float32)[:, order])


def test_a_transposed_weight_is_rounded_like_its_copy():
    weight = random_weight(6).T
    scheme = Scheme(4, -1)
    assert torch.equal(rtn.quantize(weight, scheme).codes, rtn.quantize(weight.contiguous(), scheme).codes)
    assert torch.equal(rtn.fake(weight, scheme), rtn.fake(weight.contiguous(), scheme))
