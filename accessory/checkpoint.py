"""Weights in, trainables out: streaming a base into a model, and saving what trained, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from accessory.bases import (
    FROZEN_FILE,
    META_FILE,
    TRAINABLE_FILE,
    VISION_CONFIG_FILE,
    Folder,
    fingerprint,
    image_fingerprint,
    open_folder,
)
from accessory.errors import UserError
from accessory.files import atomic_folder, disk_error, fsync, sha256
from accessory.models import write_vision_config
from accessory.models.llama import Llama, RMSNorm
from accessory.models.qformer import QFormerLlama
from accessory.models.tokenizer import Tokenizer
from accessory.quantization import QuantLinear
from accessory.shards import OUTPUT, is_image_part
from accessory.tuning.recipe import canonical_name, trainable_state, weight_kind

CHECKSUMS = {"sha256": TRAINABLE_FILE, "frozen_sha256": FROZEN_FILE}  # by key of meta.json
VERSIONED = ("transformers", "pytorch-lightning", "bitsandbytes", "peft")


# --- reading ---------------------------------------------------------------------------------------------------------


def open_folders(paths: list[str]) -> list[Folder]:
    """Open every folder of --pretrained_path, base first; refuse an order or a pairing that cannot be meant."""
    if not paths:
        raise UserError("--pretrained_path is empty: name the base's folder, then the trainables'")
    folders = [open_folder(path) for path in paths]
    if not folders[0].is_base:
        later = next((folder.path for folder in folders[1:] if folder.is_base), None)
        recorded = folders[0].meta.get("base", {})
        hint = recorded.get("path", "its base") if isinstance(recorded, dict) else "its base"
        raise UserError(
            f"--pretrained_path: {folders[0].path} holds trainables only, it cannot come first; give the base first: "
            f"--pretrained_path {later or hint} {folders[0].path}"
        )
    return folders


def check_pairing(folders: list[Folder]) -> dict[str, str]:
    """Trainables belong to the base they were trained on. Returns what identifies the base: fingerprint, and image_part
    where it has one."""
    found = {"fingerprint": fingerprint(folders[0])}
    if (image_part := image_fingerprint(folders[0])) is not None:
        found["image_part"] = image_part
    for folder in folders[1:]:
        if folder.kind == "trainable":
            _check_base(folder, folders[0], found)
            for key, file in CHECKSUMS.items():
                stated = folder.meta.get(key)
                if stated and (not (folder.path / file).is_file() or stated != sha256(folder.path / file)):
                    raise UserError(
                        f"{folder.path / file}: its checksum is not the one in {META_FILE}; it is damaged or missing"
                    )
    return found


def _check_base(folder: Folder, base: Folder, found: dict[str, str]) -> None:
    trained_on = folder.meta.get("base", {})
    for key, now in found.items():
        before = trained_on.get(key)
        if trained_on and before != now and not (key == "image_part" and before is None):
            raise UserError(
                f"{folder.path} was trained on {trained_on.get('path')} ({key} {before}), not on {base.path} "
                f"({key} {now}); give that base"
            )


def load_weights(
    model: Llama, folders: list[Folder], device: torch.device, dtype: torch.dtype, fresh_trainables: bool
) -> None:
    """Stream all folders into `model`, weight by weight; quantized layers quantize each as it arrives, on `device`.

    Later folders win; a diff folder adds to what came before. fresh_trainables: biases, LoRA and a projector that no
    folder holds start with initial values (training), instead of being an error.
    """
    places = dict(slots(model, device, dtype))
    sources = _sources(folders, places, tied=model.config.tie_word_embeddings)
    optional = {name for name, (_, _, is_fresh) in places.items() if is_fresh and fresh_trainables}
    fresh_projector = fresh_trainables and _starts_projector(model, sources)
    if fresh_projector:
        optional |= {name for name in places if is_image_part(name) and weight_kind(name) != "vision"}
    _refuse_missing(sorted(places.keys() - sources.keys() - optional), folders)
    bar = tqdm(sources, desc="loading", unit="tensor", disable=not sys.stderr.isatty(), leave=False)
    for name in bar:
        shape, store, _ = places[name]
        store(read_sum(name, sources[name], shape))
    if fresh_projector:
        model.initialize_projector()
    for module in model.modules():  # fresh biases and LoRA, and the rotary frequencies, were made on the CPU
        if not any(t.is_meta for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module._apply(lambda t: t.to(device), recurse=False)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def _starts_projector(model: Llama, sources: dict[str, list[Folder]]) -> bool:
    """Whether the recipe trains a projector of which no folder holds a part."""
    return (
        isinstance(model, QFormerLlama)
        and model.start_img.requires_grad
        and not any(is_image_part(name) and weight_kind(name) != "vision" for name in sources)
    )


def _refuse_missing(missing: list[str], folders: list[Folder]) -> None:
    if not missing:
        return
    where = ", ".join(str(folder.path) for folder in folders)
    hint = ""
    if any(name.startswith("qformer.") for name in missing):
        hint = "; a BLIP-2 folder that holds the vision part can be named with model.vision_path"
    elif all(map(is_image_part, missing)):
        hint = "; a projector that starts from nothing has to train: recipe.projector=true"
    raise UserError(f"{where}: {len(missing)} weights are missing, the first is {missing[0]}{hint}")


Slot = tuple[tuple[int, ...], Callable[[Tensor], None], bool]


def slots(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Slot]]:
    """name on disk -> (shape, how to store a tensor there, whether training may start without it).

    What is marked as trainable, and every norm of LLaMA, is fp32; the rest is stored in `dtype`.
    """

    def setter(module: nn.Module, leaf: str, as_dtype: torch.dtype) -> Callable[[Tensor], None]:
        trains = getattr(module, leaf).requires_grad
        as_dtype = torch.float32 if trains else as_dtype

        def store(tensor: Tensor) -> None:
            value = tensor.to(device=device, dtype=as_dtype, copy=True)
            setattr(module, leaf, nn.Parameter(value, requires_grad=trains))

        return store

    tied = OUTPUT if model.config.tie_word_embeddings else None
    for path, module in model.named_modules():
        prefix = canonical_name(path + ".").removesuffix(".")
        if isinstance(module, QuantLinear):
            # Quantized on the device that will use it, from the values as stored, so the result does not depend on
            # the compute type.
            yield f"{prefix}.weight", (module.shape, lambda t, m=module: m.load_weight(t.to(device)), False)
            if module.bias is not None:
                store = lambda t, m=module: m.load_bias(t.to(device))
                yield f"{prefix}.bias", ((module.out_features,), store, not module.bias.is_meta)
        elif isinstance(module, LoraLayer):
            for matrix in ("lora_A", "lora_B"):
                inner = getattr(module, matrix)["default"]
                shape = tuple(inner.weight.shape)
                yield f"{prefix}.{matrix}.weight", (shape, setter(inner, "weight", torch.float32), True)
        else:
            kept = torch.float32 if isinstance(module, RMSNorm) else dtype
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{prefix}.{leaf}" if prefix else leaf
                if parameter.is_meta and name != tied:
                    yield name, (tuple(parameter.shape), setter(module, leaf, kept), False)


def _sources(folders: list[Folder], places: dict[str, Slot], tied: bool) -> dict[str, list[Folder]]:
    """For each name the folders whose values add up to it: the last plain one, then the diffs after it."""
    sources: dict[str, list[Folder]] = {}
    for folder in folders:
        for name in folder.names:
            if name not in places:
                if (tied and name == OUTPUT) or folder.kind == "blip2":  # BLIP-2 may hold more, for other uses
                    continue
                raise UserError(f"{folder.path}: {name} fits nowhere in this model{_why_unfit(name)}")
            is_diff = folder.kind == "accessory_diff" and name in sources
            sources[name] = [*sources[name], folder] if is_diff else [folder]
    order = {name: i for i, name in enumerate(places)}
    return dict(sorted(sources.items(), key=lambda item: order[item[0]]))


def _why_unfit(name: str) -> str:
    if ".lora_" in name:
        return "; it holds LoRA: choose recipe=norm_bias_lora, bias_lora or lora"
    if name.endswith(".bias"):
        return "; it holds biases: choose recipe=norm_bias, norm_bias_lora or bias_lora"
    return " (another architecture or size?)"


def read_sum(name: str, sources: list[Folder], shape: tuple[int, ...]) -> Tensor:
    """The value of a weight: the tensor of the one folder, or the sum of a base's and its diffs'."""
    tensors = []
    for folder in sources:
        tensor = folder.tensor(name)
        if tuple(tensor.shape) != shape:
            found = list(tensor.shape)
            raise UserError(f"{folder.path}: {name} has shape {found}, the model wants {list(shape)}: another model's?")
        tensors.append(tensor)
    return tensors[0] if len(tensors) == 1 else torch.stack([t.float() for t in tensors]).sum(0)


# --- writing ---------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in VERSIONED:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"torch": torch.__version__}  # with its CUDA build, which the metadata leaves out


def save_frozen(folders: list[Folder], trains: set[str], file: Path) -> Optional[Path]:
    """Write what neither the base (the first folder) holds nor the recipe trains, so that the base and the run's folder
    make the whole model: a vision model from model.vision_path, a projector trained by an earlier run. As stored there.

    trains: names of the trainables. Returns `file`, or None where there is nothing to keep.
    """
    kept: dict[str, Tensor] = {}
    for folder in folders[1:]:
        kept |= {name: folder.tensor(name) for name in folder.names if is_image_part(name) and name not in trains}
    file.unlink(missing_ok=True)
    if not kept:
        return None
    partial = file.with_name(f".{file.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, partial, metadata={"format": "pt"})
        os.chmod(partial, 0o644)
        fsync(partial)
        os.replace(partial, file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise disk_error(error, file) from error
    return file


def save_trainable(
    model: Llama,
    folder: Path,
    meta: dict[str, Any],
    config_yaml: str,
    tokenizer: Optional[Tokenizer],
    frozen: Optional[Path] = None,
) -> None:
    """Write trainable.safetensors (fp32), meta.json, config.yaml and the tokenizer into `folder`, atomically.

    Other files of `folder` (logs, curves, checkpoints) stay. meta: what meta.json says besides versions and checksum;
    frozen: the file of `save_frozen`, linked into `folder` where it does not lie there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder / "result") as partial:
        save_file(trainable_state(model), partial / TRAINABLE_FILE, metadata={"format": "pt"})
        os.chmod(partial / TRAINABLE_FILE, 0o644)  # safetensors makes it private to its owner
        content = meta | {"versions": versions(), "sha256": sha256(partial / TRAINABLE_FILE)}
        (partial / META_FILE).write_text(json.dumps(content, indent=2) + "\n")
        (partial / "config.yaml").write_text(config_yaml)
        if tokenizer is not None:
            tokenizer.save(partial)
        if isinstance(model, QFormerLlama):
            write_vision_config(model.vision_config, partial / VISION_CONFIG_FILE)
        if frozen is not None and frozen.parent != folder:
            _link(frozen, partial / FROZEN_FILE)
    # The trainables move last: where they stand, all that describes them stands too.
    for path in sorted((folder / "result").iterdir(), key=lambda p: p.name == TRAINABLE_FILE):
        os.replace(path, folder / path.name)
    (folder / "result").rmdir()


def _link(source: Path, target: Path) -> None:
    """One file under two names: every checkpoint holds the vision model, the disk holds it once."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
