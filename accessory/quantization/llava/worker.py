"""The process in which a multimodal model of others is quantized (the package says what and why).

auto-round patches transformers, torch's print options and the random state, so it never runs beside anything else.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accessory.bases import CONFIG_FILE
from accessory.child import end_with_parent
from accessory.data.images import ImageProblem, read_image
from accessory.data.packing import IGNORE, IMAGE_SLOT
from accessory.errors import UserError
from accessory.hf_files import ShardWriter
from accessory.models import read_json
from accessory.precision import DTYPES
from accessory.quantization import formats, rtn
from accessory.quantization.job.memory import PeakMemory
from accessory.quantization.job.streaming import refuse_not_finite
from accessory.quantization.llava.tuning import ROUNDING, Job, tune
from accessory.quantization.packed import Packed, Scheme
from accessory.quantize_options import Format, Method, Precision, QuantizeConfig

MEASURED = 16  # rows that the perplexity is taken on
# Between logits in memory and reloaded, of their spread: 16-bit rounding of many layers, whose parts are compared at
# 2^-7 each. A layer that is read wrongly makes it 0.4 and more.
TOLERANCE = 0.1
COPIED = (".json", ".model", ".txt", ".jinja")  # tokenizer, processor, templates


def main() -> None:
    """argv[1]: a Job's file; beside it the report is written, or the line for the user."""
    end_with_parent()
    file = Path(sys.argv[1])
    try:
        report = quantize(torch.load(file, weights_only=False))
    except UserError as error:
        report = {"error": str(error)}
    file.with_suffix(".json").write_text(json.dumps(report))


def quantize(job: Job) -> dict[str, Any]:
    """Fill job.folders; returns what was measured."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # to name the backend, as meant
    options = {"local_files_only": True}
    processor = transformers.AutoProcessor.from_pretrained(job.source, **options)
    model = transformers.AutoModelForImageTextToText.from_pretrained(job.source, dtype="auto", **options).eval()
    for name, tensor in model.state_dict().items():
        refuse_not_finite(name, tensor, job.source)
    with PeakMemory(job.device) as memory:
        kept = _kept(model, job.schemes)
        dtype = _compute_dtype(job.config, model.dtype, job.device)
        batches = list(_batches(job, processor, dtype))
        measured = batches[: -(-MEASURED // job.batch_size)]
        is_tuned = job.config.method is Method.autoround
        packed = {}
        if not is_tuned:  # from the weights as they are stored
            packed = {name: rtn.quantize(model.get_submodule(name).weight, job.schemes[name]) for name in job.schemes}
        model.to(dtype)
        before = _run(model, measured, job)[1]
        if is_tuned:
            packed = tune(model, processor, batches, job, dtype)
        perplexity = {}
        for kind, folder in job.folders.items():
            exact = {name: formats.representable(weight, kind) for name, weight in packed.items()}
            _put(model, exact)
            _write(folder, kind, job, kept, exact)
            perplexity = {"pretrain": before, "fake_quant": _check(model, folder, measured, job, kept)}
    return {"perplexity": perplexity if is_tuned else {}, "peak": memory.gib}


def _kept(model: nn.Module, schemes: dict[str, Scheme]) -> dict[str, Tensor]:
    """Every tensor that is not quantized, as the source has it; of tied ones the first."""
    kept, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in schemes and (place := (tensor.data_ptr(), tensor.shape)) not in seen:
            seen.add(place)
            kept[name] = tensor
    return kept


def _compute_dtype(config: QuantizeConfig, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What auto-round tunes in: on CPUs bf16; fp32 without amp, and where it finds no instructions for bf16."""
    from auto_round.utils.device_manager import get_ar_device

    wanted = stored if config.precision is None else DTYPES[config.precision]
    if config.precision is Precision.tf32 or not config.autoround.amp:
        return torch.float32
    tuned = torch.bfloat16 if device.type == "cpu" or wanted is torch.float32 else wanted
    return torch.float32 if tuned is torch.bfloat16 and not get_ar_device(device).supports_bf16() else tuned


def _batches(job: Job, processor: Any, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """What the model is called with, batch by batch."""
    size = job.batch_size
    for start in range(0, len(job.rows), size):
        ids = job.rows[start : start + size]
        batch = {"input_ids": ids.masked_fill(ids == IMAGE_SLOT, job.image_id)}
        if paths := [path for row in job.images[start : start + size] for path in row]:
            try:
                pictures = [read_image(path) for path in paths]
            except ImageProblem as problem:
                raise UserError(f"images {', '.join(paths)}: {problem}, and they could be read before") from None
            batch["pixel_values"] = processor.image_processor(pictures, return_tensors="pt")["pixel_values"].to(dtype)
        yield batch


# --- the result ------------------------------------------------------------------------------------------------------


def _put(model: nn.Module, packed: dict[str, Packed]) -> None:
    for name, weight in packed.items():
        linear = model.get_submodule(name)
        linear.weight.data = weight.dequantize(linear.weight.dtype).to(linear.weight.device)


def _write(folder: Path, kind: Format, job: Job, kept: dict[str, Tensor], packed: dict[str, Packed]) -> None:
    """The source's files, but for the weights and what config.json says of them."""
    folder.mkdir(exist_ok=True)
    symmetric = formats.all_symmetric(job.schemes.values())
    writer = ShardWriter(folder)
    for name, tensor in kept.items():
        writer.add(name, tensor.to("cpu").contiguous())
    for name, weight in packed.items():
        for leaf, tensor in formats.pack(name, weight, kind, symmetric).items():
            writer.add(leaf, tensor)
    writer.close()
    for file in job.source.iterdir():
        if file.suffix in COPIED and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    content = read_json(job.source / CONFIG_FILE)
    content["quantization_config"] = formats.quantization_config(kind, job.usual, job.schemes, job.unquantized)
    content["quantization_config"]["block_name_to_quantize"] = ",".join(job.blocks)
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _check(
    model: nn.Module, folder: Path, batches: list[dict[str, Tensor]], job: Job, kept: dict[str, Tensor]
) -> float:
    """Read the folder as any user of transformers does, and compare its logits with those of the model in memory, in 16
    bit. Returns the reloaded model's perplexity; RuntimeError: it is not the model that was quantized."""
    from transformers import AutoModelForImageTextToText, AutoRoundConfig

    dtype = torch.float16 if model.dtype is torch.float16 else torch.bfloat16
    reloaded = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        device_map=str(job.device),
        quantization_config=AutoRoundConfig(backend="torch"),
    )
    _compare_parts(model.to(dtype).to(job.device), reloaded, job, kept)
    batches = [{k: t.to(dtype) if t.is_floating_point() else t for k, t in batch.items()} for batch in batches]
    expected, _ = _run(model, batches[:1], job)
    found, perplexity = _run(reloaded, batches, job)
    apart = ((found - expected).square().mean().sqrt() / expected.std()).item()
    if not apart <= TOLERANCE:
        raise RuntimeError(
            f"{folder}: logits of the reloaded model are {apart:.3g} of their spread off; it is not kept"
        )
    return perplexity


@torch.no_grad()
def _compare_parts(model: nn.Module, reloaded: nn.Module, job: Job, kept: dict[str, Tensor]) -> None:
    """Each quantized linear on random inputs, and every other tensor bit by bit."""
    stored = {name for name, module in reloaded.named_modules() if hasattr(module, "qweight")}
    if stored != set(job.schemes):
        raise RuntimeError(f"reloaded with other linears quantized: {sorted(stored ^ set(job.schemes))[:4]}")
    for name in job.schemes:
        own, read = model.get_submodule(name), reloaded.get_submodule(name)
        inputs = torch.randn(32, own.in_features, device=job.device).to(own.weight.dtype)
        expected, found = own(inputs).float(), read(inputs).float()
        if not (apart := (found - expected).norm() / expected.norm()) <= ROUNDING:
            raise RuntimeError(f"{name}: outputs reloaded are {apart:.3g} off")
    state = reloaded.state_dict()
    for name, tensor in kept.items():
        if not torch.equal(state[name].cpu(), tensor.to(state[name].dtype).cpu()):
            raise RuntimeError(f"{name}: reloaded with another value")


@torch.no_grad()
def _run(model: nn.Module, batches: list[dict[str, Tensor]], job: Job) -> tuple[Tensor, float]:
    """Logits of the first batch, float32 [b, s, v], and the perplexity of all; an image's positions do not count."""
    model.to(job.device)
    first, nll, tokens = None, 0.0, 0
    for batch in batches:
        logits = model(
            **{name: tensor.to(job.device) for name, tensor in batch.items()}, use_cache=False
        ).logits.float()
        first = logits.cpu() if first is None else first
        targets = batch["input_ids"][:, 1:].to(job.device)
        targets = targets.masked_fill(targets == job.image_id, IGNORE).flatten()
        nll += nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum"
        ).item()
        tokens += int((targets != IGNORE).sum())
    model.to("cpu")
    return first, float(torch.tensor(nll / tokens).exp())
