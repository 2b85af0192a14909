"""Weights in, trainables out: streaming a base into a model, and saving what trained, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional, Union

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
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
from accessory.files import atomic_file, atomic_folder, link, sha256
from accessory.models import describe_vision
from accessory.models.llama import Llama, RMSNorm
from accessory.models.qformer import QFormerLlama
from accessory.models.tokenizer import Tokenizer
from accessory.quantization import QuantLinear
from accessory.quantization.packed import Packed
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
    if (later := next((folder.path for folder in folders[1:] if folder.packed), None)) is not None:
        raise UserError(f"--pretrained_path: {later} is a base in whole numbers; it can only come first")
    return folders


def check_pairing(folders: list[Folder], takes_images: bool) -> dict[str, Optional[str]]:
    """Trainables belong to the base they were trained on. Returns what identifies the base: fingerprint, and of a
    multimodal model image_part (None: the base has none)."""
    found: dict[str, Optional[str]] = {"fingerprint": fingerprint(folders[0])}
    if takes_images:
        found["image_part"] = image_fingerprint(folders[0])
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


def _check_base(folder: Folder, base: Folder, found: dict[str, Optional[str]]) -> None:
    trained_on = folder.meta.get("base", {})
    for key, now in found.items():
        before = trained_on.get(key)
        says_nothing = not trained_on or (key == "image_part" and key not in trained_on)  # trained without images
        if before != now and not says_nothing:
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
    places = dict(weight_places(model, device, dtype))
    sources = layered(folders)
    _refuse_unfit(sources, places, tied=model.config.tie_word_embeddings)
    optional = {name for name, (_, _, is_fresh) in places.items() if is_fresh and fresh_trainables}
    fresh_projector = fresh_trainables and _starts_projector(model, sources)
    if fresh_projector:
        optional |= {name for name in places if is_image_part(name) and weight_kind(name) != "vision"}
    _refuse_missing(sorted(places.keys() - sources.keys() - optional), sources, folders)
    # The image part first: small, and where folders disagree that is told before LLaMA is read.
    ordered = sorted((name for name in places if name in sources), key=lambda name: not is_image_part(name))
    for name in tqdm(ordered, desc="loading", unit="tensor", disable=not sys.stderr.isatty(), leave=False):
        shape, store, _ = places[name]
        store(read_tensor(name, sources[name], shape))
    if fresh_projector:
        model.initialize_projector()
    for module in model.modules():  # fresh biases and LoRA, and the rotary frequencies, were made on the CPU
        if not any(t.is_meta for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module._apply(lambda t: t.to(device), recurse=False)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def refuse_unfit_weights(model: Llama, folders: list[Folder]) -> None:
    """Refuse folders that lack a weight of `model`, on the meta device, or hold one that has no place in it."""
    places = dict(weight_places(model, torch.device("meta"), torch.float32))
    sources = layered(folders)
    _refuse_unfit(sources, places, tied=model.config.tie_word_embeddings)
    _refuse_missing(sorted(places.keys() - sources.keys()), sources, folders)


def _starts_projector(model: Llama, sources: dict[str, list[Folder]]) -> bool:
    """Whether the recipe trains a projector of which no folder holds a part."""
    return (
        isinstance(model, QFormerLlama)
        and model.start_img.requires_grad
        and not any(is_image_part(name) and weight_kind(name) != "vision" for name in sources)
    )


def _refuse_missing(missing: list[str], sources: dict[str, list[Folder]], folders: list[Folder]) -> None:
    if not missing:
        return
    where = ", ".join(str(folder.path) for folder in folders)
    lacks_tower, has_tower = (any(name.startswith("qformer.") for name in names) for names in (missing, sources))
    hint = ""
    if lacks_tower and has_tower:
        hint = "; does vision_config.json (BLIP-2 opt-2.7b's sizes where there is none) describe this model?"
    elif lacks_tower:
        hint = "; a BLIP-2 folder that holds the vision part can be named with model.vision_path"
    raise UserError(f"{where}: {len(missing)} weights are missing, the first is {missing[0]}{hint}")


Place = tuple[tuple[int, ...], Callable[[Union[Tensor, Packed]], None], bool]


def weight_places(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Place]]:
    """name on disk -> (shape, how to store a tensor there, whether training may start without it).

    What is marked as trainable, and every norm of LLaMA, is fp32; the rest is stored in `dtype`.
    """

    def setter(module: nn.Module, leaf: str, as_dtype: torch.dtype) -> Callable[[Tensor], None]:
        trains = getattr(module, leaf).requires_grad
        as_dtype = torch.float32 if trains else as_dtype

        def store(tensor: Union[Tensor, Packed]) -> None:
            tensor = tensor.dequantize(as_dtype) if isinstance(tensor, Packed) else tensor
            value = tensor.to(device=device, dtype=as_dtype, copy=True)
            setattr(module, leaf, nn.Parameter(value, requires_grad=trains))

        return store

    tied = OUTPUT if model.config.tie_word_embeddings else None
    for path, module in model.named_modules():
        prefix = canonical_name(path + ".").removesuffix(".")
        if isinstance(module, QuantLinear):
            # Quantized on the device that will use it, from the values as stored, so the result does not depend on
            # the compute type.
            def load(weight: Union[Tensor, Packed], layer: QuantLinear = module) -> None:
                (layer.load_packed if isinstance(weight, Packed) else layer.load_weight)(weight.to(device))

            yield f"{prefix}.weight", (module.shape, load, False)
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


def layered(folders: list[Folder]) -> dict[str, list[Folder]]:
    """For each name the folders whose values add up to it: the last plain one, then the diffs after it."""
    found: dict[str, list[Folder]] = {}
    for folder in folders:
        for name in folder.names:
            adds = folder.kind == "accessory_diff" and name in found
            found[name] = [*found[name], folder] if adds else [folder]
    return found


def _refuse_unfit(found: dict[str, list[Folder]], places: dict[str, Place], tied: bool) -> None:
    for name in sorted(found.keys() - places.keys()):
        if not (tied and name == OUTPUT):
            raise UserError(f"{found[name][-1].path}: {name} fits nowhere in this model{_why_unfit(name)}")


def _why_unfit(name: str) -> str:
    if ".lora_" in name:
        return "; it holds LoRA: choose recipe=norm_bias_lora, bias_lora or lora"
    if name.endswith(".bias"):
        return "; it holds biases: choose recipe=norm_bias, norm_bias_lora or bias_lora"
    return " (another architecture or size?)"


def read_tensor(name: str, folders: list[Folder], shape: Optional[tuple[int, ...]] = None) -> Union[Tensor, Packed]:
    """The tensor of one folder, or the sum of a base's and its diffs', in fp32. shape: what the model wants."""
    tensors = []
    for folder in folders:
        tensor = folder.tensor(name)
        if shape is not None and tuple(tensor.shape) != shape:
            found = list(tensor.shape)
            raise UserError(f"{folder.path}: {name} has shape {found}, the model wants {list(shape)}: another model's?")
        if isinstance(tensor, Packed) and len(folders) > 1:
            raise UserError(
                f"{folders[-1].path}: {name} would be added to a weight that {folder.path} holds in whole numbers; "
                "give the 16-bit base of both"
            )
        tensors.append(tensor)
    return tensors[0] if len(tensors) == 1 else torch.stack([t.float() for t in tensors]).sum(0)


# --- writing ---------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in VERSIONED:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"torch": torch.__version__}  # with its CUDA build, which the metadata leaves out


def save_frozen(folders: list[Folder], trains: set[str], file: Path) -> Optional[str]:
    """Write what neither the base (the first folder) holds nor the recipe trains, so that the base and the run's folder
    make the whole model: a vision model from model.vision_path, a projector trained by an earlier run. As stored there.

    trains: names of the trainables. Returns the file's checksum, or None where there is nothing to keep. In memory for
    that moment: BLIP-2's vision model takes 2.2 GB in 16 bit.
    """
    kept = {
        name: parts
        for name, parts in layered(folders).items()
        if is_image_part(name) and name not in trains and parts != [folders[0]]
    }
    file.unlink(missing_ok=True)
    if not kept:
        return None
    if (earlier := _whole_frozen_file(kept)) is not None:
        link(earlier.path / FROZEN_FILE, file)
        return earlier.meta["frozen_sha256"]
    with atomic_file(file) as partial:
        tensors = {name: read_tensor(name, parts).contiguous() for name, parts in kept.items()}
        save_file(tensors, partial, metadata={"format": "pt"})
        os.chmod(partial, 0o644)
    return sha256(file)


def _whole_frozen_file(kept: dict[str, list[Folder]]) -> Optional[Folder]:
    """The earlier run whose frozen file holds exactly `kept`, if there is one."""
    owners = {id(folder): folder for parts in kept.values() for folder in parts}
    (folder, *others) = owners.values()
    if others or "frozen_sha256" not in folder.meta:
        return None
    with safe_open(folder.path / FROZEN_FILE, framework="pt") as handle:
        return folder if set(handle.keys()) == kept.keys() else None


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
    frozen: the file of `save_frozen`, linked into `folder` where it does not lie there already.
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
            (partial / VISION_CONFIG_FILE).write_text(describe_vision(model.vision_config))
        if frozen is not None and frozen.parent != folder:
            link(frozen, partial / FROZEN_FILE)
    # The trainables move last: where they stand, all that describes them stands too.
    for path in sorted((folder / "result").iterdir(), key=lambda p: p.name == TRAINABLE_FILE):
        os.replace(path, folder / path.name)
    (folder / "result").rmdir()
