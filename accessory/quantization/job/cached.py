"""quantization=autoround (awq, gptq) on a 16-bit base: quantized before training, once for all runs that say so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from filelock import FileLock
from omegaconf import OmegaConf

from accessory.child import child_environment
from accessory.config import Config, QuantizationConfig, QuantMethod
from accessory.errors import UserError
from accessory.quantization.job.plan import make_plan
from accessory.quantization.job.result import damage
from accessory.quantization.setting import CALIBRATED
from accessory.quantize_options import AutoRoundConfig, CalibrationConfig, Method, QuantizeConfig


def calibrate_base(config: Config) -> Config:
    """The same run on a calibrated int4 base, made now unless it is in the cache; `config` itself for other methods.

    Every rank may call it: the first one works, the others wait for it.
    """
    if config.quantization.method not in CALIBRATED:
        return config
    job = _job(config)
    key = make_plan(job).digest
    name = Path(config.model.pretrained_path[0]).resolve().name
    folder = _cache(config.quantization) / f"{name}-{job.method.value}-{key}"
    with FileLock(f"{folder}.lock"):
        if folder.exists() and (wrong := damage(folder)) is not None:
            print(f"quantized base {folder} is damaged ({wrong}); it is made again", flush=True)
            shutil.rmtree(folder)
        if not folder.exists():
            _quantize(replace(job, output_dir=str(folder)))
    print(f"quantized base: {folder}", flush=True)
    return replace(
        config,
        model=replace(config.model, pretrained_path=[str(folder)], llama_config=[], vision_path=None),
        quantization=trained_with(config.quantization),
    )


def trained_with(quantization: QuantizationConfig) -> QuantizationConfig:
    """What training sees of a setting: a calibrated base is an int4 one."""
    return QuantizationConfig(method=QuantMethod.int4) if quantization.method in CALIBRATED else quantization


def _job(config: Config) -> QuantizeConfig:
    wanted, data = config.quantization, config.data
    nsamples = 128 if wanted.nsamples is None else wanted.nsamples
    calibration = CalibrationConfig(
        dataset=wanted.dataset or f'"{data.data_config}"',
        nsamples=nsamples,
        batch_size=max(1, min(8, nsamples)),
        seqlen=data.max_words if wanted.seqlen is None else wanted.seqlen,
        image_root=data.image_root,
        bad_images=data.bad_images,
        prompt_type=data.prompt_type,
        allow_fewer=True,
    )
    return QuantizeConfig(
        model=replace(config.model, pretrained_path=list(config.model.pretrained_path)),
        method=Method(wanted.method.value),
        bits=wanted.bits,
        group_size=wanted.group_size,
        sym=wanted.sym,
        quant_lm_head=wanted.lm_head,
        vision=wanted.vision,
        calib=calibration,
        autoround=AutoRoundConfig(iters=wanted.iters),
        seed=config.seed,
        output_dir="",
    )


def _cache(config: QuantizationConfig) -> Path:
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "accessory" / "quantized"
    folder = Path(config.cache_dir).expanduser() if config.cache_dir is not None else usual
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"quantization.cache_dir={folder}: cannot be written ({error.strerror})") from None
    return folder


def _quantize(job: QuantizeConfig) -> None:
    """In a process of its own: auto-round patches transformers and reseeds, and its memory is given back whole."""
    settings = Path(f"{job.output_dir}.yaml")
    settings.write_text(OmegaConf.to_yaml(OmegaConf.structured(job)))
    try:
        command = [sys.executable, "-m", "accessory.quantization", str(settings)]
        result = subprocess.run(command, env=child_environment())
    finally:
        settings.unlink()
    if result.returncode == 2:
        raise UserError(f"quantization={job.method.value}: the base could not be quantized; the line above says why")
    if result.returncode:
        raise RuntimeError(f"quantizing into {job.output_dir} ended with code {result.returncode}")
