"""What a run leaves behind: the trainables, what the base lacks besides them, and all that describes both. Whole or not
at all."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from accessory.bases import FROZEN_FILE, META_FILE, TRAINABLE_FILE, VISION_CONFIG_FILE, Folder
from accessory.files import atomic_file, atomic_folder, link, sha256
from accessory.models import describe_vision
from accessory.models.llama import Llama
from accessory.models.qformer import QFormerLlama
from accessory.models.tokenizer import Tokenizer
from accessory.shards import is_image_part
from accessory.tuning.recipe import trainable_state
from accessory.weights import layered, read_tensor

VERSIONED = ("transformers", "pytorch-lightning", "bitsandbytes", "peft")
RESULT = ".result"  # for the moment between whole and in its place; what a user calls result is none of ours


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
    with atomic_folder(folder / RESULT) as partial:
        save_file(trainable_state(model), partial / TRAINABLE_FILE, metadata={"format": "pt"})
        os.chmod(partial / TRAINABLE_FILE, 0o644)  # safetensors makes it private to its owner
        content = meta | {"versions": _versions(), "sha256": sha256(partial / TRAINABLE_FILE)}
        (partial / META_FILE).write_text(json.dumps(content, indent=2) + "\n")
        (partial / "config.yaml").write_text(config_yaml)
        if tokenizer is not None:
            tokenizer.save(partial)
        if isinstance(model, QFormerLlama):
            (partial / VISION_CONFIG_FILE).write_text(describe_vision(model.vision_config))
        if frozen is not None and frozen.parent != folder:
            link(frozen, partial / FROZEN_FILE)
    # The trainables move last: where they stand, all that describes them stands too.
    for path in sorted((folder / RESULT).iterdir(), key=lambda p: p.name == TRAINABLE_FILE):
        os.replace(path, folder / path.name)
    (folder / RESULT).rmdir()


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


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in VERSIONED:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"torch": torch.__version__}  # with its CUDA build, which the metadata leaves out
