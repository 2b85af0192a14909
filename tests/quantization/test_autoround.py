"""What auto-round is told, and that it took it: what it does not know it ignores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from accessory.quantization.methods import Calibration, Chain, autoround
from accessory.quantization.packed import Scheme
from accessory.quantize_options import AutoRoundConfig, CalibrationConfig, Method, QuantizeConfig, ScaleDtype

ROWS, SEQLEN = 8, 16


def tuned(**options):
    """A linear of 32 x 32 in groups of 32."""
    blocks = Chain([nn.Sequential(nn.Linear(32, 32))])
    batches = list(torch.randn(ROWS, SEQLEN, 32).split(4))
    calibration = Calibration(batches, batches, lambda block, x: block(x), torch.device("cpu"))
    config = QuantizeConfig(
        method=Method.autoround, calib=CalibrationConfig(batch_size=4), autoround=AutoRoundConfig(iters=2, **options)
    )
    with torch.no_grad():
        return autoround.tune(blocks, {"0.0": Scheme(4, 32, True)}, calibration, config)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.01, "minmax_lr": 0.02, "enable_quanted_input": False, "enable_minmax_tuning": False},
        {"gradient_accumulate_steps": 2, "adam": True, "scale_dtype": ScaleDtype.fp32, "amp": False},
    ],
    ids=["defaults", "rates and switches", "steps and types"],
)
def test_auto_round_takes_what_it_is_told(options):
    assert tuned(**options)["0.0"].codes.shape == (32, 32)


OPTIONS = [
    ({"iters": 3}, "iters=3, not 2"),
    ({"lr": 0.02}, "lr=0.02, not 0.01"),
    ({"minmax_lr": 0.02}, "minmax_lr=0.02, not 0.01"),
    ({"enable_quanted_input": False}, "enable_quanted_input=False, not True"),
    ({"enable_minmax_tuning": False}, "enable_minmax_tuning=False, not True"),
    ({"gradient_accumulate_steps": 2}, "gradient_accumulate_steps=2, not 1"),
    ({"adam": True}, "adam=True, not False"),
    ({"scale_dtype": ScaleDtype.fp32}, "scale_dtype=torch.float32, not torch.float16"),
]
OTHERS = [
    ({"seed": 1}, "seed=1, not 42"),
    ({"calib": CalibrationConfig(batch_size=2)}, "batch_size=2, not 4"),
]


@pytest.mark.parametrize(
    ("change", "told"),
    [({"autoround": AutoRoundConfig(**{"iters": 2, "lr": 0.01} | options)}, told) for options, told in OPTIONS]
    + OTHERS,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_that_auto_round_does_not_take_stops_before_anything_is_tuned(change, told, monkeypatch):
    real = autoround._tuner

    def other(model, schemes, calibration, config):
        tuner = real(model, schemes, calibration, replace(config, **change))
        monkeypatch.setattr(tuner, "quantize_block", lambda *_, **__: pytest.fail("tuned"), raising=False)
        return tuner

    monkeypatch.setattr(autoround, "_tuner", other)
    with pytest.raises(RuntimeError, match=f"auto-round took {told}"):
        tuned(lr=0.01)


@pytest.mark.parametrize(("name", "found"), [("nsamples", ROWS), ("seqlen", SEQLEN)])
def test_rows_that_auto_round_does_not_take_stop_too(name, found, monkeypatch):
    real = autoround._tuner

    def other(*args):
        tuner = real(*args)
        tuner.post_init()
        setattr(tuner.calibration_context, name, 3)
        return tuner

    monkeypatch.setattr(autoround, "_tuner", other)
    with pytest.raises(RuntimeError, match=f"auto-round took {name}=3, not {found}"):
        tuned()
