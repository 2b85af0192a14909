"""The quantization setting of a model: what was asked for, against what its folders hold and were trained on."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Optional

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from accessory.bases import Folder
from accessory.config import CALIBRATED, QuantizationConfig, QuantMethod
from accessory.errors import UserError, first_line
from accessory.quantization.int4 import Int4
from accessory.shards import OUTPUT, is_image_part
from accessory.weights import layered

log = logging.getLogger(__name__)


def trained_on(folder: Folder) -> Optional[QuantizationConfig]:
    """The quantization that a folder of trainables names, None where it names none."""
    stated = folder.meta.get("quantization")
    if not stated:
        return None
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(QuantizationConfig), stated))
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(
            f"{folder.path}/meta.json: quantization: {first_line(error)}; written by another version?"
        ) from None


def as_trained(quantization: QuantizationConfig, folders: list[Folder]) -> QuantizationConfig:
    """A bare method, nf4 say, means it as the trainables were trained on it: blocksize, which parts, and all."""
    before = next((found for folder in reversed(folders) if (found := trained_on(folder)) is not None), None)
    is_bare = quantization == QuantizationConfig(method=quantization.method)
    return before if before is not None and is_bare and before.method == quantization.method else quantization


def as_stored(quantization: QuantizationConfig, folders: list[Folder]) -> QuantizationConfig:
    """What becomes of a setting on these folders: a base in whole numbers keeps them, under none and nf4 too."""
    base, packed = folders[0].path, folders[0].packed
    method = quantization.method
    if not packed:
        if method is QuantMethod.int4:
            raise UserError(
                f"quantization=int4: {base} holds no weights in whole numbers; scripts/quantize.py makes a folder that "
                "does, and quantization=nf4 (--quant), rtn or int8 quantize while loading"
            )
        if method in CALIBRATED:
            raise UserError(
                f"quantization={method.value}: needs calibration, which training does before it starts; here name the "
                "folder that it trained on (meta.json says it), or one of scripts/quantize.py"
            )
        return quantization
    if method in (QuantMethod.rtn, QuantMethod.int8, *CALIBRATED):
        scheme = next(iter(packed.values())).scheme
        raise UserError(f"quantization={method.value}: {base} is quantized already ({scheme}); leave it out")
    has_vision = any(map(is_image_part, packed))
    for wanted, holds, key in (
        (quantization.lm_head, OUTPUT in packed, "lm_head"),
        (quantization.vision, has_vision, "vision"),
    ):
        if wanted and not holds:
            raise UserError(
                f"quantization.{key}=true: {base} holds it in 16 bit and is quantized already; leave it out, or make "
                "that folder anew (scripts/quantize.py)"
            )
    return QuantizationConfig(method=QuantMethod.int4, lm_head=OUTPUT in packed, vision=has_vision)


def stored_backends(folders: list[Folder]) -> dict[str, Int4]:
    """How each weight is held that is packed in the base, and that no later folder replaces."""
    last = {name: parts[-1] for name, parts in layered(folders).items()}
    return {name: backend for name, backend in folders[0].packed.items() if last[name] is folders[0]}


def warn_of_other_quantization(folders: list[Folder], quantization: QuantizationConfig) -> None:
    now = asdict(quantization)
    for folder in folders:
        before = asdict(trained_on(folder) or quantization)
        if differing := [key for key in now if before[key] != now[key]]:
            was, is_now = (
                ", ".join(f"{key}={getattr(settings[key], 'value', settings[key])}" for key in differing)
                for settings in (before, now)
            )
            log.warning(
                "%s was trained on a base with quantization %s, and is used on one with %s: expect worse answers",
                folder.path.name,
                was,
                is_now,
            )
