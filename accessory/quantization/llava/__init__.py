"""Multimodal models of others (LLaVA and its kind): a Hugging Face folder -> an int4 one, tuned by auto-round's own
multimodal mode.

What can be wrong is looked at here; then a process of its own (worker.py) loads the model, has auto-round tune
it, writes the folder, and reads it back. auto-round's exporter is not used: of transformers' LLaVA it writes a folder
that loads with random weights (0.16.1: its block_name_to_quantize names no module), and it turns the rest into bf16.

Images can be calibrated on where each takes the same number of positions, as in LLaVA 1.5; else text has to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

import accessory
from accessory.bases import CONFIG_FILE, safetensors_files
from accessory.child import child_environment
from accessory.errors import UserError, first_line
from accessory.export import check_target
from accessory.files import atomic_folder
from accessory.models import find_device, read_json
from accessory.quantization.job.plan import fill_defaults
from accessory.quantization.job.result import MANIFEST_FILE
from accessory.quantization.job.schemes import assign_schemes, default_scheme, output_formats
from accessory.quantization.llava.rows import calibration_rows, image_id_of
from accessory.quantization.llava.tuning import Job
from accessory.quantization.methods.autoround import require_auto_round
from accessory.quantization.packed import Scheme
from accessory.quantize_options import Format, Method, QuantizeConfig

METHODS = (Method.autoround, Method.rtn, Method.int8)
FORMATS = (Format.auto_round, Format.auto_gptq)
NOT_DECODERS = ("blip", "blip-2", "instructblip", "instructblipvideo")  # and BLIP-2 is ours
VISION_KEYS, AUDIO_KEYS = ("vision", "visual", "image", "img"), ("audio", "speech", "wav")  # auto-round's
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "AR_LOG_LEVEL": "WARNING"}


def is_llava_type(folder: Path) -> bool:
    """Whether it holds a multimodal language model that transformers knows and we do not train."""
    if not (folder / CONFIG_FILE).is_file():
        return False
    content = read_json(folder / CONFIG_FILE)
    kind = content.get("model_type")
    if isinstance(kind, str) and kind.startswith("llava"):
        return True
    if "vision_config" not in content or kind in NOT_DECODERS:
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def quantize_llava(config: QuantizeConfig) -> Path:
    """Quantize the folder as `config` says and return the new one, which transformers' AutoModelForImageTextToText and
    AutoProcessor load. Raises UserError for anything the user can mend, before weights are read."""
    target = Path(config.output_dir).expanduser()
    check_target(target)
    _check_config(config)
    source = _source(config)
    model = _skeleton(source)
    blocks, schemes, unquantized = _schemes(model, config)
    rows, images, fingerprint = calibration_rows(model, source, config)
    kinds, device = output_formats(config), find_device(config.device)
    began = time.monotonic()
    with atomic_folder(target) as partial:
        folders = {kind: partial if len(kinds) == 1 else partial / kind.value for kind in kinds}
        usual = max(schemes.values(), key=list(schemes.values()).count)
        image_id = image_id_of(model)
        job = Job(config, source, folders, blocks, schemes, usual, unquantized, rows, images, image_id, device)
        print(_described(job), flush=True)
        report = _run(job)
        content = _manifest(job, fingerprint, report, time.monotonic() - began)
        for folder in folders.values():
            (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {target} ({content['seconds']:.0f} s, peak {content['peak_memory_gib']:.2f} GiB)", flush=True)
    return target


# --- what can be wrong -----------------------------------------------------------------------------------------------


def _check_config(config: QuantizeConfig) -> None:
    if config.method not in METHODS:
        raise UserError(
            f"--method {config.method.value}: multimodal models besides ours are quantized by autoround, rtn and int8"
        )
    require_auto_round()  # to read the result back, whatever the method
    for kind in output_formats(config):
        if kind not in FORMATS:
            raise UserError(f"--format {kind.value}: of multimodal models auto_round and auto_gptq are written")
        if kind is Format.auto_gptq and not default_scheme(config).sym:
            raise UserError(
                "--format auto_gptq: auto-round reads symmetric weights only in it; use auto_round, or --sym"
            )
    stated = {"model.llama_config": config.model.llama_config, "model.tokenizer_path": config.model.tokenizer_path}
    stated |= {"model.vision_path": config.model.vision_path, "save_trans": config.save_trans}
    stated |= {"eval.text": config.eval.text}
    for key, value in stated.items():
        if value:
            raise UserError(f"{key}={value}: means nothing for a model of this kind; leave it out")
    fill_defaults(config)


def _source(config: QuantizeConfig) -> Path:
    if len(config.model.pretrained_path) > 1:
        raise UserError("--pretrained_path: a multimodal model of this kind is one folder; name it alone")
    source = Path(config.model.pretrained_path[0]).expanduser().absolute()
    content = read_json(source / CONFIG_FILE)
    if content.get("quantization_config") is not None:
        raise UserError(f"{source}: is quantized already; name the 16-bit model that it was made from")
    safetensors_files(source)
    return source


def _skeleton(source: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # the library raises whatever its parsers raise
        kind = read_json(source / CONFIG_FILE).get("model_type")
        raise UserError(
            f"{source}: transformers does not read model_type={kind} ({first_line(error)}); of LLaVA take a converted "
            "folder, like llava-hf/llava-1.5-7b-hf"
        ) from None


def _schemes(model: nn.Module, config: QuantizeConfig) -> tuple[list[str], dict[str, Scheme], list[str]]:
    """Paths of the lists of blocks, and of their linears those that are quantized, and the others."""
    lists: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{known}.") for known in lists):
            lists.append(path)
    left_out = AUDIO_KEYS if config.vision else AUDIO_KEYS + VISION_KEYS
    lists = [path for path in lists if not any(key in path.lower() for key in left_out)]
    shapes = {
        name: (linear.out_features, linear.in_features)
        for name, linear in model.named_modules()
        if isinstance(linear, nn.Linear) and any(name.startswith(f"{path}.") for path in lists)
    }
    if config.quant_lm_head:
        shapes |= _lm_head(model)
    schemes = assign_schemes(shapes, config)
    if len({scheme.sym for scheme in schemes.values()}) > 1:
        raise UserError("layer_config: symmetric and asymmetric weights in one folder cannot be read back; choose one")
    used = [path for path in lists if any(name.startswith(f"{path}.") for name in schemes)]
    return used, schemes, sorted(name for name in shapes.keys() - schemes.keys() if name != "lm_head")


def _lm_head(model: nn.Module) -> dict[str, tuple[int, int]]:
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear) or head.weight is model.get_input_embeddings().weight:
        raise UserError("quant_lm_head=true: this model's output layer is its embedding (tied)")
    return {"lm_head": (head.out_features, head.in_features)}


# --- the work --------------------------------------------------------------------------------------------------------


def _run(job: Job) -> dict[str, Any]:
    """The worker's report. Its progress bar and what it prints come through."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.pt"
        torch.save(job, file)
        root = str(Path(accessory.__file__).parents[1])
        path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        env = child_environment() | QUIET | {"AR_WORK_SPACE": folder, "PYTHONPATH": path}
        program = "from accessory.quantization.llava.worker import main; main()"
        done = subprocess.run([sys.executable, "-c", program, str(file)], env=env)
        if done.returncode:
            raise RuntimeError(f"quantizing {job.source} failed (exit code {done.returncode}); its own report is above")
        report = read_json(file.with_suffix(".json"))
    if "error" in report:
        raise UserError(report["error"])
    return report


def _described(job: Job) -> str:
    config, lines = job.config, [f"model       {job.source}"]
    rest = f"; {len(job.unquantized)} stay in 16 bit" if job.unquantized else ""
    lines.append(f"method      {config.method.value}, {job.usual}, {len(job.schemes)} linears{rest}")
    if config.method is Method.autoround:
        rows, seqlen = job.rows.shape
        images = f" and {sum(map(len, job.images))} images" if job.has_images else ""
        lines.append(f"calibration {rows} rows of {seqlen} tokens{images} from {config.calib.dataset}")
    return "\n".join([*lines, f"device      {job.device}", f"output      {config.output_dir} ({config.format})"])


def _manifest(job: Job, fingerprint: str, report: dict[str, Any], seconds: float) -> dict[str, Any]:
    """quantization.json's content, as of our own models."""
    config, calibration = job.config, None
    if fingerprint:
        rows, seqlen = job.rows.shape
        calibration = {"dataset": config.calib.dataset, "nsamples": rows, "seqlen": seqlen, "seed": config.seed}
        calibration |= {"images": sum(map(len, job.images)), "fingerprint": fingerprint}
    packages = ("auto-round", "torch", "transformers")
    return {
        "format": 1,
        "method": config.method.value,
        "scheme": asdict(job.usual),
        "exceptions": {name: asdict(scheme) for name, scheme in job.schemes.items() if scheme != job.usual},
        "unquantized": job.unquantized,
        "options": asdict(config.autoround) if config.method is Method.autoround else {},
        "source": str(job.source),
        "source_fingerprint": _fingerprint(job.source),
        "calibration": calibration,
        "perplexity": {"calibration": report["perplexity"]},
        "seconds": round(seconds, 1),
        "peak_memory_gib": round(report["peak"], 3),
        "device": str(job.device),
        "versions": {"accessory": accessory.__version__} | {name: version(name) for name in packages},
    }


def _fingerprint(source: Path) -> str:
    """Digest of config.json, all names and all vectors (norms, biases): 16 hex digits that tell models apart."""
    digest = hashlib.sha256((source / CONFIG_FILE).read_bytes())
    for file in safetensors_files(source):
        if not (source / file).is_file():
            continue
        with safe_open(source / file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                digest.update(name.encode())
                if len(tensors.get_slice(name).get_shape()) == 1:
                    digest.update(tensors.get_tensor(name).float().numpy().tobytes())
    return digest.hexdigest()[:16]
