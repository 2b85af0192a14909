"""The chunked loss of a frozen output layer against the plain formula in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accessory.models import loss
from accessory.models.loss import summed_cross_entropy

WORDS, SIZE = 50, 16


def example(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, SIZE, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(WORDS, SIZE, generator=g).to(dtype)
    targets = torch.randint(0, WORDS, (3, 11), generator=g)
    targets[torch.rand(3, 11, generator=g) < 0.4] = -100
    targets[0, 0] = 0  # token 0 counts like any other
    return hidden, weight, targets


def plain_formula(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of hidden in fp64, from torch's own cross_entropy and autograd."""
    wide = hidden.detach().double().requires_grad_()
    value = F.cross_entropy((wide @ weight.double().T).flatten(0, 1), targets.flatten(), reduction="sum")
    value.backward()
    return value.detach(), wide.grad


@pytest.mark.parametrize("fixed_shape", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_loss_and_gradient_are_those_of_the_plain_formula(monkeypatch, chunk, fixed_shape):
    monkeypatch.setattr(loss, "CPU_CHUNK", chunk)
    hidden, weight, targets = example()
    expected, gradient = plain_formula(hidden, weight, targets)
    found = summed_cross_entropy(hidden, weight, targets, fixed_shape)
    found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad.double(), gradient, rtol=1e-5, atol=1e-6)


def test_in_bf16_the_gradient_is_right_to_the_roundings_of_bf16():
    hidden, weight, targets = example(torch.bfloat16)
    _, gradient = plain_formula(hidden, weight, targets)
    summed_cross_entropy(hidden, weight, targets).backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert (hidden.grad.double() - gradient).norm() < 2**-7 * gradient.norm()


def test_a_factor_on_the_loss_scales_the_gradient():
    hidden, weight, targets = example()
    _, gradient = plain_formula(hidden, weight, targets)
    (0.125 * summed_cross_entropy(hidden, weight, targets)).backward()
    torch.testing.assert_close(hidden.grad.double(), gradient / 8, rtol=1e-5, atol=1e-6)


def test_ignored_tokens_get_no_gradient_and_do_not_count():
    hidden, weight, targets = example()
    summed_cross_entropy(hidden, weight, targets).backward()
    ignored = targets == -100
    assert 0 < ignored.sum() < ignored.numel()
    assert hidden.grad[ignored].abs().max() == 0
    assert hidden.grad[~ignored].abs().amax(-1).min() > 0


def test_with_nothing_but_ignored_tokens_loss_and_gradient_are_zero():
    hidden, weight, targets = example()
    value = summed_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    value.backward()
    assert value.item() == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_large_logits_do_not_overflow():
    hidden, weight, targets = example()
    hidden = (hidden.detach() * 1000).requires_grad_()
    expected, gradient = plain_formula(hidden, weight, targets)
    value = summed_cross_entropy(hidden, weight, targets)
    value.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden.grad.double(), gradient, rtol=1e-3, atol=1e-3)


def test_without_gradients_the_loss_is_the_same():
    hidden, weight, targets = example()
    with torch.no_grad():
        value = summed_cross_entropy(hidden, weight, targets)
    assert not value.requires_grad
    torch.testing.assert_close(value.double(), plain_formula(hidden, weight, targets)[0], rtol=1e-6, atol=0)


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest result of any operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_the_logits_of_all_tokens_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(loss, "CPU_CHUNK", 4)
    hidden = torch.randn(2, 16, SIZE, requires_grad=True)
    weight, targets = torch.randn(500, SIZE), torch.randint(0, 500, (2, 16))
    with LargestTensor() as seen:
        summed_cross_entropy(hidden, weight, targets).backward()
    assert 4 * 500 <= seen.elements <= 500 * SIZE  # a chunk's logits, or the weight's transpose; not 32 * 500


def test_backward_keeps_one_tensor_of_the_size_of_the_counted_hidden_states():
    hidden, weight, targets = example()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        summed_cross_entropy(hidden, weight, targets)
    counted = int((targets != -100).sum())
    assert [tuple(t.shape) for t in kept if t.is_floating_point()] == [(counted, SIZE)]
