"""AdamW and the schedule, against both written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from accessory.assemble import assemble
from accessory.config import ModelConfig, OptimConfig, QuantizationConfig, RecipeConfig
from accessory.optim import lr_at, make_optimizer, make_scheduler

CONFIG = OptimConfig(lr=1.0, min_lr=0.1, warmup_epochs=1.0, weight_decay=0.02)


@pytest.fixture
def model(meta_folder) -> nn.Module:
    return assemble(
        ModelConfig(pretrained_path=[str(meta_folder)]),
        QuantizationConfig(),
        RecipeConfig(lora=True, rank=4),
        torch.device("cpu"),
        torch.float32,
    )


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0.0, 0.0),
        (0.25, 0.25),
        (0.5, 0.5),
        (1.0, 1.0),
        (2.0, 0.1 + 0.9 * (2 + math.sqrt(2)) / 4),  # cos(pi / 4)
        (3.0, 0.55),  # half way
        (4.0, 0.1 + 0.9 * (2 - math.sqrt(2)) / 4),
        (5.0, 0.1),
        (6.0, 0.1),
    ],
)
def test_rate_rises_linearly_then_falls_on_a_cosine_to_min_lr(epoch, rate):
    assert lr_at(epoch, CONFIG, epochs=5.0) == pytest.approx(rate, abs=1e-12)


def test_without_warmup_the_cosine_starts_at_once():
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_epochs=0.0)
    assert [lr_at(epoch, config, epochs=2.0) for epoch in (0.0, 1.0, 2.0)] == pytest.approx([1.0, 0.5, 0.0])


def rates(config: OptimConfig, steps_per_epoch: int, epochs: float, steps: int) -> list[float]:
    """The rate that each optimizer step is taken with."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=config.lr)
    scheduler = make_scheduler(optimizer, config, steps_per_epoch, epochs)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_steps_of_a_run_follow_the_curve_by_fractional_epoch():
    """4 steps an epoch, 2 epochs, 1 of warmup: the last warmup step has lr, the last step min_lr."""
    quarter = 0.1 + 0.9 * (2 + math.sqrt(2)) / 4
    three_quarters = 0.1 + 0.9 * (2 - math.sqrt(2)) / 4
    expected = [0.25, 0.5, 0.75, 1.0, quarter, 0.55, three_quarters, 0.1]
    assert rates(CONFIG, steps_per_epoch=4, epochs=2.0, steps=8) == pytest.approx(expected)


def test_run_cut_short_by_max_steps_ends_at_min_lr():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_epochs=0.0)
    assert rates(config, steps_per_epoch=100, epochs=0.1, steps=10)[-1] == pytest.approx(0.1)


def test_only_lora_matrices_decay(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in make_optimizer(model, CONFIG).param_groups
        for parameter in group["params"]
    }
    assert decay.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, value in decay.items() if value == 0.02} == {name for name in decay if "lora_" in name}
    assert set(decay.values()) == {0.0, 0.02}


def test_update_is_adamw_with_betas_0_9_and_0_95(model):
    """Three steps of every trainable against AdamW (arXiv:1711.05101, algorithm 2) in fp64."""
    config = OptimConfig(lr=1e-2, weight_decay=0.5)
    optimizer = make_optimizer(model, config)
    trainables = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: parameter.detach().double() for name, parameter in trainables.items()}
    m = {name: torch.zeros_like(value) for name, value in expected.items()}
    v = {name: torch.zeros_like(value) for name, value in expected.items()}
    g = torch.Generator().manual_seed(0)
    for t in (1, 2, 3):
        for name, parameter in trainables.items():
            parameter.grad = torch.randn(parameter.shape, generator=g)
            gradient = parameter.grad.double()
            m[name] = 0.9 * m[name] + 0.1 * gradient
            v[name] = 0.95 * v[name] + 0.05 * gradient**2
            step = m[name] / (1 - 0.9**t) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            decay = 0.5 if "lora_" in name else 0.0
            expected[name] = expected[name] - 1e-2 * (step + decay * expected[name])
        optimizer.step()
    for name, parameter in trainables.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)
