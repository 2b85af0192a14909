"""The vision model, query tokens and Q-Former of a BLIP-2 folder on disk, or of a repository on the Hub."""

from __future__ import annotations

from pathlib import Path

from accessory.bases import CONFIG_FILE, INDEX_FILE, Folder, open_safetensors, safetensors_files
from accessory.errors import UserError, first_line
from accessory.folders import listing
from accessory.models import read_json


def open_vision(path: str) -> Folder:
    """The vision model, query tokens and Q-Former of a BLIP-2 folder, or of the Hub's repository of that name."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _download(path)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"model.vision_path={path}: no config.json in it; it holds {listing(folder)}")
    read, _ = open_safetensors(folder, _vision_files(folder) or safetensors_files(folder))
    found = {name: reader for name, reader in read.items() if _is_vision(name)}
    if any(name.endswith(".qweight") for name in found):
        raise UserError(
            f"model.vision_path={path}: its vision part is quantized; such a folder can only be the base itself "
            "(--pretrained_path), or name one in 16 bit"
        )
    chosen = {name if _is_ours(name) else f"qformer.{name}": reader for name, reader in found.items()}
    if not chosen:
        raise UserError(f"model.vision_path={path}: holds no vision_model.* and qformer.*; is it a BLIP-2 folder?")
    return Folder(folder, "blip2", chosen)


def _is_vision(name: str) -> bool:
    return name.startswith(("vision_model.", "qformer.", "query_tokens"))


def _is_ours(name: str) -> bool:
    """Named as in our exports and LLaMA2-Accessory's checkpoints, where BLIP-2 as a whole is called qformer."""
    return name.startswith(("qformer.vision_model.", "qformer.qformer.", "qformer.query_tokens"))


def _vision_files(folder: Path) -> list[str]:
    """Of a sharded folder the files with the vision part; a language model's shards need not be there."""
    index = folder / INDEX_FILE
    names = read_json(index).get("weight_map", {}) if index.is_file() else {}
    return sorted({file for name, file in names.items() if _is_vision(name)})


def _download(name: str) -> Path:
    """What is needed of a repository that the user named, from the Hub or its cache."""
    owner, _, repository = name.partition("/")
    if not repository or "/" in repository or owner in ("", ".", "..", "~") or Path(owner).is_dir():
        raise UserError(f"model.vision_path={name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, INDEX_FILE]))
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, INDEX_FILE, *_needed(folder)]))
    except Exception as error:  # the library's errors for no network, no such repository, no permission, …
        raise UserError(
            f"model.vision_path={name}: no such folder, and not to be had from the Hub ({first_line(error)})"
        ) from None


def _needed(folder: Path) -> list[str]:
    return _vision_files(folder) or ["*.safetensors"]
