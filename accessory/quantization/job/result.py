"""The finished int4 folder: written from the blocks, read back and compared, measured, and described."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from accessory.bases import CONFIG_FILE, IMAGE_FILE, META_FILE, VISION_CONFIG_FILE, weights_digest
from accessory.config import LlamaType, ModelConfig
from accessory.errors import UserError
from accessory.export import end_tokens
from accessory.hf_files import ShardWriter, save_tensors
from accessory.models import build_model, describe_vision, read_json
from accessory.models.tokenizer_export import save_for_transformers
from accessory.quantization import formats
from accessory.quantization.job.flow import Flow, Hidden
from accessory.quantization.job.plan import Plan
from accessory.quantize_options import Format, Method, QuantizeConfig
from accessory.shards import is_image_part
from accessory.sources import open_sources
from accessory.weights import layered, read_tensor, weight_places

MANIFEST_FILE = "quantization.json"
LOGIT_BYTES = 256 << 20  # compared at a time: those of a whole batch may take more than all else


def model_config(plan: Plan, kind: Optional[Format]) -> dict[str, Any]:
    """config.json's content. kind: format of the weights, None: floating point."""
    config = LlamaConfig.from_dict(plan.sources.architecture.to_dict())
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = plan.stored
    tokenizer = plan.sources.tokenizer
    config.bos_token_id, config.eos_token_id = tokenizer.bos_id, end_tokens(config, tokenizer)
    content = json.loads(config.to_json_string())
    if kind is not None:
        content["quantization_config"] = formats.quantization_config(
            kind, plan.usual_scheme, plan.schemes, plan.unquantized, plan.is_reordered
        )
    return content


def write_folder(plan: Plan, blocks: list[Path], folder: Path, kind: Optional[Format]) -> None:
    """A Hugging Face folder from the blocks' files, and from the base what they do not hold."""
    writer, image_part = ShardWriter(folder), {}
    for name, tensor in _tensors(plan, blocks, kind):
        if is_image_part(name):
            image_part[name] = tensor
        else:
            writer.add(name, tensor)
    writer.close()
    (folder / CONFIG_FILE).write_text(json.dumps(model_config(plan, kind), indent=2) + "\n")
    save_for_transformers(plan.sources.tokenizer, folder)
    if plan.sources.vision is not None:
        save_tensors(image_part, folder / IMAGE_FILE)
        (folder / VISION_CONFIG_FILE).write_text(describe_vision(plan.sources.vision))
        meta = {"format": 1, "llama_type": LlamaType.llama_qformerv2_peft.value}
        meta |= {"image_transform": plan.sources.image_transform.value}
        (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")


def _tensors(plan: Plan, blocks: list[Path], kind: Optional[Format]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the result by its name on disk, one at a time."""
    first = plan.formats[0]
    written = set()
    for file in blocks:
        tensors = load_file(file)
        if kind not in (None, first):
            tensors = _converted(tensors, plan, first, kind)
        written |= {formats.weight_name(name) for name in tensors}
        yield from tensors.items()
    model = build_model(plan.sources.architecture, plan.sources.vision)
    sources = layered(plan.sources.folders)
    for name, (shape, _, _) in weight_places(model, torch.device("cpu"), plan.stored):
        if name not in written:
            yield name, read_tensor(name, sources[name], shape).to(plan.stored).contiguous()


def _converted(tensors: dict[str, Tensor], plan: Plan, first: Format, kind: Format) -> dict[str, Tensor]:
    """A block's tensors in another format."""
    is_symmetric = formats.all_symmetric(plan.schemes.values())
    layout, result, linears = formats.layout_of(first, is_symmetric), {}, {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf in formats.LEAVES:
            linears.setdefault(path, {})[leaf] = tensor
        else:
            result[name] = tensor
    for path, leaves in linears.items():
        scheme = plan.schemes[path]
        packed = formats.unpack(leaves, layout, scheme.bits, scheme.group_size)
        result |= formats.pack(path, packed, kind, is_symmetric)
    return result


@torch.no_grad()
def check_reloaded(folder: Path, hidden: Hidden, flow: Flow) -> None:
    """Read the folder as any base is read, and compare its logits with those of the model as it was quantized.

    Raises RuntimeError where they differ at all: then the folder is not what was measured, and is not kept.
    """
    sources = open_sources(ModelConfig(pretrained_path=[str(folder)]))
    reloaded = flow.streamed(sources)
    pairs = flow.replay(reloaded).flatten(0, 1), hidden.inputs[0].flatten(0, 1)
    positions = max(1, LOGIT_BYTES // (4 * sources.architecture.vocab_size))
    with reloaded.head() as head, flow.packed.head() as own_head:
        for states, own in zip(*(states.split(positions) for states in pairs), strict=True):
            found, expected = F.linear(*head(states)).float(), F.linear(*own_head(own)).float()
            if not torch.equal(expected, found):
                worst = (expected - found).abs().max().item()
                raise RuntimeError(
                    f"{folder}: logits of the reloaded model differ by up to {worst:.3g}; it is not kept"
                )


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file but the manifest, which names them."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST_FILE)
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def damage(folder: Path) -> Optional[str]:
    """What of a finished folder is not there as it was written, or None. Sizes are compared, contents not read."""
    try:
        stated = read_json(folder / MANIFEST_FILE).get("files", {})
    except UserError as error:
        return str(error)
    found = file_sizes(folder)
    wrong = [name for name, size in stated.items() if found.get(name) != size]
    if not stated:
        return f"{MANIFEST_FILE} names no files"
    return f"{', '.join(wrong)}: missing, or not of the size in {MANIFEST_FILE}" if wrong else None


def own_options(config: QuantizeConfig) -> dict[str, Any]:
    """Those of the method itself; rounding to nearest has none."""
    return {} if config.method in (Method.rtn, Method.int8) else asdict(getattr(config, config.method.value))


def manifest(plan: Plan, measured: dict[str, Any], seconds: float, peak_gib: float) -> dict[str, Any]:
    """quantization.json's content: where the folder comes from, and what it is worth."""
    config, calibration = plan.config, None
    if plan.is_calibrated:
        rows, seqlen = plan.rows.ids.shape
        calibration = {"dataset": config.calib.dataset, "nsamples": rows, "seqlen": seqlen, "seed": config.seed}
        calibration |= {"fingerprint": plan.rows.fingerprint}
    usual = plan.usual_scheme
    return {
        "format": 1,
        "method": config.method.value,
        "scheme": asdict(usual),
        "exceptions": {name: asdict(scheme) for name, scheme in plan.schemes.items() if scheme != usual},
        "unquantized": plan.unquantized,
        "options": own_options(config),
        "source": plan.sources.base["path"],
        "source_fingerprint": plan.sources.base["fingerprint"],
        "source_weights": weights_digest(plan.sources.folders[0]),
        "settings": plan.digest,
        "calibration": calibration,
        "perplexity": measured,
        "seconds": round(seconds, 3),
        "peak_memory_gib": round(peak_gib, 3),
        "device": str(plan.device),
        "precision": None if config.precision is None else config.precision.value,
        "versions": plan.versions,
    }
