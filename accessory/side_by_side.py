"""One protocol on three forms of a model: in 16 bit; fake-quantized, which is the quantized weights held in the compute
type; and packed, which is what is stored and trained on. The last two must agree, the first says what rounding costs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from accessory.assemble import assemble
from accessory.bases import Folder
from accessory.config import ModelConfig, QuantizationConfig, QuantMethod
from accessory.errors import UserError
from accessory.evaluation import Perplexity
from accessory.models import read_json
from accessory.models.llama import Llama
from accessory.models.tokenizer import require_tokenizer
from accessory.quantization import QuantLinear
from accessory.quantization.dense import Dense
from accessory.quantization.job.result import MANIFEST_FILE
from accessory.sources import Sources, open_sources


@dataclass(frozen=True)
class Row:
    """memory_bytes: all weights of the model as it was measured; disk_bytes: their files, None where nothing is
    stored in this form; seconds: the measurement alone."""

    model: str
    path: str
    ppl: float
    nll: float
    tokens: int
    memory_bytes: int
    disk_bytes: Optional[int]
    seconds: float


def quantized_linears(model: nn.Module) -> list[tuple[nn.Module, str, QuantLinear]]:
    """Every linear that does not hold its weight as it is: (its parent, its name there, itself)."""
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, QuantLinear) and not isinstance(child.backend, Dense)
    ]


@torch.no_grad()
def fake_quantized(model: Llama, dtype: torch.dtype) -> Llama:
    """The same model, in place, with every quantized weight dequantized once and held in `dtype`."""
    for parent, name, packed in quantized_linears(model):
        dense = QuantLinear(packed.in_features, packed.out_features, Dense(dtype))
        dense.load_weight(packed.dequantize(dtype))
        dense.bias = packed.bias
        setattr(parent, name, dense)
    return model


def open_reference(
    config: ModelConfig, quantization: QuantizationConfig, quantized: Sources, reference: Optional[str]
) -> Sources:
    """The 16-bit form of the model: on `reference` if given, else on the base that the quantized folder's manifest
    names; of a model that is quantized on load, its own folders."""
    base = quantized.folders[0]
    if not base.packed and quantization.method is QuantMethod.none:
        raise UserError(f"--side_by_side: {base.path} is not quantized; add --quant (or quantization=int8), or name a "
                        "folder of scripts/quantize.py")  # fmt: skip
    if reference is None and base.packed:
        reference = _source(base)
    folders = [reference or config.pretrained_path[0], *config.pretrained_path[1:]]
    try:
        opened = open_sources(replace(config, pretrained_path=folders))
    except UserError as error:
        hint = "; without the trainables the bases can be compared" if len(folders) > 1 else ""
        raise UserError(f"--side_by_side, the 16-bit form: {error}{hint}") from None
    if opened.folders[0].packed:
        raise UserError(f"--side_by_side: {folders[0]} is quantized itself; name a 16-bit base with --reference")
    _check_source(opened, base)
    if require_tokenizer(opened).fingerprint() != require_tokenizer(quantized).fingerprint():
        raise UserError(f"--side_by_side: {folders[0]} has another tokenizer than {base.path}: is it its base?")
    return opened


def _check_source(opened: Sources, base: Folder) -> None:
    """Refuse a reference that the quantized folder was not made from, where it says what it was made from."""
    manifest = base.path / MANIFEST_FILE
    wanted = read_json(manifest).get("source_fingerprint") if base.packed and manifest.is_file() else None
    found = opened.base["fingerprint"]
    if wanted is not None and wanted != found:
        raise UserError(
            f"--side_by_side: {base.path} was made from a base with fingerprint {wanted}, "
            f"{opened.folders[0].path} has {found}; name that base with --reference"
        )


def _source(base: Folder) -> str:
    manifest = base.path / MANIFEST_FILE
    source = read_json(manifest).get("source") if manifest.is_file() else None
    if source is None or not Path(source).is_dir():
        reason = "does not say what it was made from" if source is None else f"was made from {source}, which is gone"
        raise UserError(f"--side_by_side: {base.path} {reason}; name its 16-bit base with --reference")
    return source


def side_by_side(
    reference: Sources,
    quantized: Sources,
    quantization: QuantizationConfig,
    device: torch.device,
    dtype: torch.dtype,
    measure: Callable[[Llama], Perplexity],
) -> list[Row]:
    """The three rows, one model in memory at a time."""

    def row(name: str, model: Llama, folders: list[Folder], disk: Optional[int]) -> Row:
        start = time.perf_counter()
        found = measure(model)
        seconds = time.perf_counter() - start
        path = ", ".join(str(folder.path) for folder in folders)
        return Row(name, path, found.value, found.nll, found.tokens, memory_bytes(model), disk, seconds)

    model = assemble(reference, QuantizationConfig(), None, device, dtype)
    rows = [row("16 bit", model, reference.folders, disk_bytes(reference.folders))]
    del model
    free()
    model = assemble(quantized, quantization, None, device, dtype)
    disk = disk_bytes(quantized.folders) if quantized.folders[0].packed else None
    packed = row(f"packed ({model.quantization.method.value})", model, quantized.folders, disk)
    return [*rows, row("fake-quantized", fake_quantized(model, dtype), quantized.folders, None), packed]


def memory_bytes(model: nn.Module) -> int:
    """All weights as they are held; those of tied layers once."""
    return sum(t.numel() * t.element_size() for t in chain(model.parameters(), model.buffers()))


def disk_bytes(folders: list[Folder]) -> int:
    """The files of weights in `folders`."""
    files = (file for folder in folders for file in folder.path.iterdir() if file.suffix in (".safetensors", ".pth"))
    return sum(file.stat().st_size for file in files)


def free() -> None:
    """Give back what the last model held, before the next is read."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def rows_table(rows: list[Row]) -> str:
    lines = [f"{'model':<20}{'ppl':>12}{'against 16 bit':>16}{'memory MiB':>12}{'disk MiB':>10}{'seconds':>9}"]
    for row in rows:
        disk = "-" if row.disk_bytes is None else f"{row.disk_bytes / 2**20:.1f}"
        lines.append(
            f"{row.model:<20}{row.ppl:>12.4f}{row.ppl / rows[0].ppl - 1:>+16.2%}{row.memory_bytes / 2**20:>12.1f}"
            f"{disk:>10}{row.seconds:>9.1f}"
        )
    return "\n".join(lines)


def as_figures(rows: list[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
