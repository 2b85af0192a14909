"""A multimodal model through auto-round, whole: its multimodal mode, held to what was asked of it."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accessory.quantization.methods.autoround import packed_linear, refuse_other_options
from accessory.quantization.packed import Packed, Scheme
from accessory.quantize_options import Format, Precision, QuantizeConfig

ROUNDING = 2**-7  # bf16's, with room: between a tuned weight and its whole numbers times the scale, or their outputs


@dataclass(frozen=True)
class Job:
    """blocks: paths of the lists of blocks that hold the linears of `schemes`; unquantized: their other linears; rows:
    int64 [n, s], IMAGE_SLOT where an image stands; images: the files of each row; image_id: the slots' token."""

    config: QuantizeConfig
    source: Path
    folders: dict[Format, Path]
    blocks: list[str]
    schemes: dict[str, Scheme]
    usual: Scheme
    unquantized: list[str]
    rows: Tensor
    images: list[list[str]]
    image_id: int
    device: torch.device

    @property
    def has_images(self) -> bool:
        return any(self.images)

    @property
    def batch_size(self) -> int:
        """Images make the inputs of a row's vision blocks, and rows have different numbers of them."""
        return 1 if self.has_images else min(self.config.calib.batch_size, len(self.rows))


def tune(
    model: nn.Module, processor: Any, batches: list[dict[str, Tensor]], job: Job, dtype: torch.dtype
) -> dict[str, Packed]:
    """Tune, and return the linears' weights in whole numbers. RuntimeError where auto-round does not do as it is told:
    what it does not know it ignores, and a calibration pass that fails it skips."""
    model.name_or_path = model.config._name_or_path = ""  # else it would read and copy files of the source
    warned = _Warnings()
    tuner = _tuner(model, processor, batches, job)
    tuner.quantize()
    more = {"nblocks": (job.config.autoround.nblocks, tuner.nblocks), "dtype": (dtype, tuner.model_context.amp_dtype)}
    refuse_other_options(tuner, job.config, tuple(job.rows.shape), job.batch_size, _accumulated(job), **more)
    if warned.of_calibration:
        raise RuntimeError(f"auto-round: {warned.of_calibration[0]}")
    scaled = {name for name, module in model.named_modules() if hasattr(module, "scale") and hasattr(module, "zp")}
    if scaled != set(job.schemes):
        raise RuntimeError(f"auto-round quantized other linears than asked: {sorted(scaled ^ set(job.schemes))[:4]}")
    packed = {}
    for name, scheme in job.schemes.items():
        linear = model.get_submodule(name)
        if (linear.bits, linear.group_size, linear.sym) != (scheme.bits, scheme.group_size, scheme.sym):
            raise RuntimeError(
                f"auto-round gave {name} {linear.bits} bits, groups of {linear.group_size}: not {scheme}"
            )
        packed[name] = packed_linear(linear, scheme)
        apart = (packed[name].dequantize(torch.float32) - linear.weight).abs().max() / linear.weight.abs().max()
        if not apart <= ROUNDING:
            raise RuntimeError(f"{name}: its whole numbers are {apart:.3g} from the weight that was tuned")
    return packed


def _tuner(model: nn.Module, processor: Any, batches: list[dict[str, Tensor]], job: Job) -> Any:
    from auto_round import AutoRound
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

    config, options, usual = job.config, job.config.autoround, job.usual
    scheme = {"bits": usual.bits, "group_size": usual.group_size, "sym": usual.sym}
    per_layer = {n: {"bits": s.bits, "group_size": s.group_size, "sym": s.sym} for n, s in job.schemes.items()}
    algorithm = SignRoundConfig(
        **scheme,
        iters=options.iters,
        lr=options.lr,
        minmax_lr=options.minmax_lr,
        enable_quanted_input=options.enable_quanted_input,
        enable_minmax_tuning=options.enable_minmax_tuning,
        gradient_accumulate_steps=_accumulated(job),
        enable_adam=options.adam,
    )
    tuner = AutoRound(
        model,
        tokenizer=processor.tokenizer,
        processor=processor,
        image_processor=getattr(processor, "image_processor", None),
        alg_configs=algorithm,
        layer_config=per_layer | {name: {"bits": 16} for name in job.unquantized},
        dataset=batches,
        nsamples=len(job.rows),
        seqlen=job.rows.shape[1],
        batch_size=job.batch_size,
        low_gpu_mem_usage=config.low_gpu_mem_usage,
        device_map=str(job.device),
        enable_torch_compile=job.device.type == "cuda",
        seed=config.seed,
        amp=options.amp and config.precision is not Precision.tf32,
        scale_dtype=options.scale_dtype.value,
        quant_lm_head=config.quant_lm_head,
        quant_nontext_module=config.vision,
        low_cpu_mem_usage=False,
    )
    tuner.nblocks = options.nblocks  # that of SignRoundConfig goes nowhere
    return tuner


def _accumulated(job: Job) -> int:
    """Batches a step, so that a step sees as many rows as with text."""
    return job.config.autoround.gradient_accumulate_steps * (job.config.calib.batch_size if job.has_images else 1)


class _Warnings(logging.Handler):
    """auto-round's warnings instead of its log."""

    def __init__(self) -> None:
        import auto_round  # noqa: F401, which makes the logger

        super().__init__(logging.WARNING)
        self.of_calibration: list[str] = []
        logger = logging.getLogger("autoround")
        logger.handlers = [self]
        logger.setLevel(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "forward pass failed" in message or "Insufficient number of samples" in message:
            self.of_calibration.append(message)
        if record.levelno >= logging.ERROR:
            print(f"auto-round: {message}", file=sys.stderr)
