"""AutoRound (arXiv:2309.05516) through the auto-round package, a block at a time.

Per group of weights it tunes where to round, and the range, by signed gradient descent on the error of the block's
output. auto-round's entry for single blocks is used, so that blocks stream and an interrupted job goes on where it was.
Import this in a process of its own: auto-round patches transformers, torch's print options and the random state.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from accessory.errors import UserError
from accessory.quantization.methods import Calibration, Chain
from accessory.quantization.packed import Packed, Scheme
from accessory.quantize_options import QuantizeConfig, ScaleDtype, Tuning

# nsamples, iters, lr, seqlen of auto-round's recipes; None: as unset
RECIPES = {
    Tuning.best: (512, 1000, None, None),
    Tuning.default: (128, 200, None, None),
    Tuning.light: (128, 50, 5e-3, 512),
}
SCALE_DTYPES = {ScaleDtype.fp16: torch.float16, ScaleDtype.bf16: torch.bfloat16, ScaleDtype.fp32: torch.float32}


def require_auto_round() -> None:
    """Refuse early where the package is missing."""
    from importlib.util import find_spec

    if find_spec("auto_round") is None:
        raise UserError("method=autoround needs auto-round: pip install 'auto-round>=0.16,<0.17'")


class _Blocks(nn.Module):
    """Blocks as one, called as transformers' are: what auto-round tunes together."""

    def __init__(self, blocks: Chain, calibration: Calibration):
        super().__init__()
        self.blocks = blocks
        self._call = calibration.call

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = self._call(block, hidden_states)
        return hidden_states


class _Model(nn.Module):
    """The model that auto-round wants around a block."""

    name_or_path = ""

    def __init__(self, blocks: _Blocks, dtype: torch.dtype):
        super().__init__()
        from transformers import PretrainedConfig

        self.layers = nn.ModuleList([blocks])
        self.config, self.dtype = PretrainedConfig(), dtype

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.layers[0](*args, **kwargs)


def tune(
    blocks: Chain, schemes: dict[str, Scheme], calibration: Calibration, config: QuantizeConfig
) -> dict[str, Packed]:
    """Tune the rounding of the blocks' linears and return them in whole numbers; `blocks` change in place."""
    wrapped = _Blocks(blocks, calibration)
    with _quiet(), torch.enable_grad():
        tuner = _tuner(_Model(wrapped, calibration.inputs[0].dtype), schemes, calibration, config)
        tuner.post_init()
        rows = sum(len(batch) for batch in calibration.inputs), calibration.inputs[0].shape[1]
        steps = config.autoround.gradient_accumulate_steps
        refuse_other_options(tuner, config, rows, _batch_size(rows[0], config), steps)
        dtype = tuner.model_context.amp_dtype
        wrapped.to(dtype)
        samples = [[row.to(dtype).unsqueeze(0) for batch in data for row in batch]
                   for data in (calibration.reference, calibration.inputs)]  # fmt: skip
        reference, inputs = samples
        quantized_input = inputs if config.autoround.enable_quanted_input else None
        tuner.quantize_block(
            wrapped,
            [(((row,), {}),) for row in reference],
            q_input=quantized_input,
            device=str(calibration.device),
            auto_offload=False,
        )
    return {name: packed_linear(blocks.get_submodule(name), scheme) for name, scheme in schemes.items()}


def _tuner(model: _Model, schemes: dict[str, Scheme], calibration: Calibration, config: QuantizeConfig) -> Any:
    from auto_round import AutoRound
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

    options = config.autoround
    usual = next(iter(schemes.values()))
    nsamples = sum(len(batch) for batch in calibration.inputs)
    per_layer = {
        f"layers.0.blocks.{name}": {"bits": s.bits, "group_size": s.group_size, "sym": s.sym}
        for name, s in schemes.items()
    }
    untouched = {
        f"layers.0.blocks.{name}": {"bits": 16}
        for name, module in model.layers[0].blocks.named_modules()
        if isinstance(module, nn.Linear) and name not in schemes
    }
    algorithm = SignRoundConfig(
        bits=usual.bits,
        group_size=usual.group_size,
        sym=usual.sym,
        iters=options.iters,
        lr=options.lr,
        minmax_lr=options.minmax_lr,
        enable_quanted_input=options.enable_quanted_input,
        enable_minmax_tuning=options.enable_minmax_tuning,
        gradient_accumulate_steps=options.gradient_accumulate_steps,
        enable_adam=options.adam,
    )
    return AutoRound(
        model,
        tokenizer="",
        alg_configs=algorithm,
        layer_config=per_layer | untouched,
        nsamples=nsamples,
        seqlen=calibration.inputs[0].shape[1],
        batch_size=_batch_size(nsamples, config),
        low_gpu_mem_usage=config.low_gpu_mem_usage,
        device_map=str(calibration.device),
        enable_torch_compile=calibration.device.type == "cuda",
        seed=config.seed,
        amp=options.amp,
        scale_dtype=options.scale_dtype.value,
        low_cpu_mem_usage=False,
    )


def _batch_size(nsamples: int, config: QuantizeConfig) -> int:
    return min(config.calib.batch_size, nsamples)


def refuse_other_options(
    tuner: Any, config: QuantizeConfig, rows: tuple[int, int], batch_size: int, steps: int, **more: tuple[Any, Any]
) -> None:
    """RuntimeError where auto-round will not do, or did not do, as it was told: what it does not know it ignores.

    rows: number and length; steps: batches a tuning step; more: (asked, taken) of further options.
    """
    options, tuned, calibrated = config.autoround, tuner.alg_composer.block_quantizer, tuner.calibration_context
    wanted = {
        "iters": (options.iters, tuned.iters),
        "lr": (options.lr or tuned.lr, tuned.lr),  # unset: auto-round's own rule
        "minmax_lr": (options.minmax_lr or tuned.lr, tuned.minmax_lr),
        "enable_quanted_input": (options.enable_quanted_input, tuned.enable_quanted_input),
        "enable_minmax_tuning": (options.enable_minmax_tuning, tuned.enable_minmax_tuning),
        "gradient_accumulate_steps": (steps, tuned.gradient_accumulate_steps),
        "adam": (options.adam, "Adam" in type(tuned).__name__),
        "scale_dtype": (SCALE_DTYPES[options.scale_dtype], tuner.scale_dtype),
        "seed": (config.seed, tuner.seed),
        "batch_size": (batch_size, calibrated.batch_size),
        "nsamples": (rows[0], calibrated.nsamples),
        "seqlen": (rows[1], calibrated.seqlen),
    }
    for name, (asked, taken) in (wanted | more).items():
        if asked != taken:
            raise RuntimeError(f"auto-round took {name}={taken}, not {asked}")


def packed_linear(linear: nn.Linear, scheme: Scheme) -> Packed:
    """The whole numbers behind a tuned linear: auto-round leaves the rounded weight, scales and zero points."""
    out, in_features = linear.weight.shape
    groups = scheme.groups(in_features)
    scales = linear.scale.detach().float().reshape(out, groups)
    zeros = linear.zp
    if not torch.is_tensor(zeros):
        zeros = torch.full_like(scales, float(zeros))
    zeros = zeros.detach().to(scales).reshape(-1, groups).expand(out, groups)
    weight = linear.weight.detach().float().view(out, groups, -1)
    codes = (weight / scales.unsqueeze(-1) + zeros.unsqueeze(-1)).round_().clamp_(0, 2**scheme.bits - 1)
    return Packed(
        codes.view(out, in_features).to(torch.uint8),
        scales.half().contiguous(),
        zeros.to(torch.uint8).contiguous(),
        scheme.bits,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """auto-round reports each block on its own logger; here a progress bar does."""
    os.environ.setdefault("AR_LOG_LEVEL", "ERROR")
    logger = logging.getLogger("autoround")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
