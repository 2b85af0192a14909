"""GPTQ against the OBQ formulation it speeds up: fp64, one column after the other, the inverse Hessian of the remaining
columns by Gaussian elimination (arXiv:2210.17323, eq. 2 and 3). Nothing is shared but the equations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_rtn import random_weight, reference_group
from torch import Tensor

from accessory.errors import UserError
from accessory.quantization import rtn
from accessory.quantization.methods import gptq
from accessory.quantization.packed import Packed, Scheme
from accessory.quantize_options import GptqConfig

OUT, IN, GROUP = 24, 64, 16
VARIANTS = {
    "columns in order": GptqConfig(actorder=False, static_groups=False),
    "static groups": GptqConfig(actorder=False, static_groups=True),
    "act-order": GptqConfig(actorder=True, static_groups=False),
    "act-order, static groups": GptqConfig(actorder=True, static_groups=True),
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
every_scheme = pytest.mark.parametrize(
    "scheme",
    [Scheme(bits, size, sym) for bits in (2, 3, 4, 8) for size in (GROUP, -1) for sym in (False, True)],
    ids=str,
)


def random_inputs(seed: int = 0, n: int = 300, in_features: int = IN) -> Tensor:
    """Correlated, of very different sizes: [n, in]."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(in_features, in_features, generator=g) / in_features**0.5 + torch.eye(in_features)
    return torch.randn(n, in_features, generator=g) @ mix * torch.rand(in_features, generator=g).mul(2).exp()


def hessian_of(x: Tensor) -> gptq.Hessian:
    hessian = gptq.Hessian(x.shape[-1])
    hessian.add(x)
    return hessian


def obq(weight: Tensor, x: Tensor, scheme: Scheme, options: GptqConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """codes [out, in], rounded weight [out, in] and the group of each column [in], all in the columns' own order."""
    w, inputs = weight.double().numpy().copy(), x.double().numpy()
    out, in_features = w.shape
    size = in_features if scheme.group_size == -1 else scheme.group_size
    h = 2 * inputs.T @ inputs / len(inputs)
    order = np.argsort(-np.diag(h), kind="stable") if options.actorder else np.arange(in_features)
    inverse = np.linalg.inv(h + options.percdamp * np.diag(h).mean() * np.eye(in_features))
    static = options.static_groups or size == in_features
    members = np.arange(in_features).reshape(-1, size) if static else order.reshape(-1, size)
    group_of = np.empty(in_features, dtype=int)
    for g, columns in enumerate(members):
        group_of[columns] = g
    grid_of = lambda columns: [reference_group(row, scheme.bits, scheme.sym) for row in w[:, columns]]
    grids = [grid_of(columns) for columns in members]

    codes, rounded = np.empty(w.shape, dtype=int), np.empty(w.shape)
    for step, i in enumerate(order):
        if not static and step % size == 0:
            grids[group_of[i]] = grid_of(members[group_of[i]])
        for row in range(out):
            scale, zero = grids[group_of[i]][row]
            codes[row, i] = np.clip(np.round(w[row, i] / scale) + zero, 0, 2**scheme.bits - 1)
            rounded[row, i] = (codes[row, i] - zero) * scale
        w -= np.outer((w[:, i] - rounded[:, i]) / inverse[i, i], inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes, rounded, group_of


def output_error(packed: Packed, weight: Tensor, x: Tensor) -> float:
    return (x @ (packed.dequantize(torch.float32) - weight).T).square().mean().item()


@every_variant
@every_scheme
def test_codes_are_those_of_one_column_after_the_other(scheme, options):
    weight, x = random_weight(1, OUT, IN), random_inputs(1)
    packed = gptq.quantize(weight, hessian_of(x), scheme, options)
    codes, rounded, group_of = obq(weight, x, scheme, options)
    assert np.array_equal(packed.codes.numpy(), codes)
    torch.testing.assert_close(packed.dequantize(torch.float64).numpy(), rounded, rtol=2**-11, atol=1e-7)
    if packed.g_idx is not None:
        assert np.array_equal(packed.g_idx.numpy(), group_of)


@every_variant
@every_scheme
def test_the_result_does_not_depend_on_blocksize(scheme, options):
    weight, hessian = random_weight(2, OUT, IN), hessian_of(random_inputs(2))
    results = []
    for blocksize in (1, 24, 128):
        results.append(gptq.quantize(weight, hessian, scheme, replace(options, blocksize=blocksize)))
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes)
        assert torch.equal(other.scales, results[0].scales) and torch.equal(other.zeros, results[0].zeros)


@every_variant
@pytest.mark.parametrize("scheme", [Scheme(4, GROUP), Scheme(3, -1), Scheme(8, -1, sym=True)], ids=str)
def test_outputs_are_closer_than_after_rounding_to_nearest(scheme, options):
    weight, x = random_weight(3, OUT, IN), random_inputs(3)
    packed = gptq.quantize(weight, hessian_of(x), scheme, options)
    assert output_error(packed, weight, x) < 0.9 * output_error(rtn.quantize(weight, scheme), weight, x)


def test_g_idx_is_stored_only_for_act_order_without_static_groups():
    weight, hessian = random_weight(4, OUT, IN), hessian_of(random_inputs(4))
    stored = {
        name: gptq.quantize(weight, hessian, Scheme(4, GROUP), options).g_idx is not None
        for name, options in VARIANTS.items()
    }
    assert [name for name, has in stored.items() if has] == ["act-order"]
    assert gptq.quantize(weight, hessian, Scheme(4, -1), VARIANTS["act-order"]).g_idx is None


def test_g_idx_puts_the_largest_inputs_into_the_first_group():
    x = random_inputs(5)
    packed = gptq.quantize(random_weight(5, OUT, IN), hessian_of(x), Scheme(4, GROUP), VARIANTS["act-order"])
    largest = x.square().mean(0).argsort(descending=True)[:GROUP]
    assert packed.g_idx.dtype == torch.int32
    assert (packed.g_idx[largest] == 0).all() and (packed.g_idx == 0).sum() == GROUP


def test_static_groups_have_the_scales_of_rounding_to_nearest():
    weight, hessian = random_weight(6, OUT, IN), hessian_of(random_inputs(6))
    nearest = rtn.quantize(weight, Scheme(4, GROUP))
    packed = gptq.quantize(weight, hessian, Scheme(4, GROUP), VARIANTS["act-order, static groups"])
    assert torch.equal(packed.scales, nearest.scales) and torch.equal(packed.zeros, nearest.zeros)


def test_uncorrelated_inputs_leave_nothing_but_rounding_to_nearest():
    weight, x = random_weight(7, OUT, IN), torch.diag(torch.linspace(1, 3, IN))
    packed = gptq.quantize(weight, hessian_of(x), Scheme(4, GROUP), GptqConfig())
    assert torch.equal(packed.codes, rtn.quantize(weight, Scheme(4, GROUP)).codes)


@every_variant
def test_weights_of_inputs_that_are_always_zero_become_zero(options):
    weight, x = random_weight(8, OUT, IN), random_inputs(8)
    x[:, [3, 40]] = 0
    rounded = gptq.quantize(weight, hessian_of(x), Scheme(4, GROUP), options).dequantize(torch.float32)
    assert (rounded[:, [3, 40]] == 0).all()
    assert (rounded != 0).any(0).sum() == IN - 2
    rounded = gptq.quantize(weight, hessian_of(0 * x), Scheme(4, GROUP), options).dequantize(torch.float32)
    assert (rounded == 0).all()


def test_the_hessian_is_twice_the_mean_of_the_inputs_products():
    batches = [random_inputs(seed, n).bfloat16() for seed, n in enumerate((100, 1, 32))]
    hessian = gptq.Hessian(IN)
    for batch in batches:
        hessian.add(batch.view(1, *batch.shape))
    hessian.add(torch.empty(0, IN))
    x = torch.cat(batches).double()
    torch.testing.assert_close(hessian.matrix.double(), 2 * x.T @ x / len(x), rtol=1e-5, atol=1e-5)
    assert hessian.count == 133


@pytest.mark.parametrize("percdamp", [1e-12, 1e-5, 0.01])
def test_the_factor_is_that_of_the_damped_inverse(percdamp):
    matrix = hessian_of(random_inputs(9)).matrix
    factor = gptq._inverse_factor(matrix, percdamp).double()
    damped = matrix.double() + percdamp * matrix.double().diagonal().mean() * torch.eye(IN)
    assert torch.equal(factor, factor.triu())
    inverse = torch.linalg.inv(damped)
    assert (factor.T @ factor - inverse).norm() < 1e-3 * inverse.norm()


@pytest.mark.parametrize("percdamp", [1e-12, 1e-8, 0.01])
def test_fewer_inputs_than_channels_are_damped_until_they_can_be_factorized(percdamp):
    weight, x = random_weight(10, OUT, IN), random_inputs(10, n=8)
    packed = gptq.quantize(weight, hessian_of(x), Scheme(4, GROUP), GptqConfig(percdamp=percdamp))
    assert output_error(packed, weight, x) < output_error(rtn.quantize(weight, Scheme(4, GROUP)), weight, x)


def test_infinite_activations_are_an_error():
    x = random_inputs(11)
    x[0, 0] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        gptq.quantize(random_weight(11, OUT, IN), hessian_of(x), Scheme(4, GROUP), GptqConfig())


def test_a_bf16_weight_is_left_as_it_was():
    weight = random_weight(12, OUT, IN).bfloat16()
    before = weight.clone()
    hessian = hessian_of(random_inputs(12))
    packed = gptq.quantize(weight, hessian, Scheme(4, GROUP), GptqConfig())
    assert torch.equal(weight, before)
    assert torch.equal(packed.codes, gptq.quantize(weight.float(), hessian, Scheme(4, GROUP), GptqConfig()).codes)
