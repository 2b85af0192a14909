"""Checkpoint folders of every kind, read lazily under one set of names.

A `Folder` lists its tensors by canonical name (Hugging Face's, `model.layers.0.self_attn.q_proj.weight`, plus
`….lora_A.weight` / `….lora_B.weight`, and LLaMA2-Accessory's for the image part, `qformer.…`, `qformer_proj.…`) without
reading them, and gives one tensor at a time: files are memory-mapped, so loading needs no more host memory than the
tensor in hand. The weight of a linear that is stored in whole numbers (int4 folders) is given as `Packed`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional, Union

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import Blip2Config, LlamaConfig

from accessory import shards as pth
from accessory.errors import UserError, first_line
from accessory.folders import base_folder, listing
from accessory.models import check_params, config_from_hf, config_from_params, read_json, vision_config_from
from accessory.quantization.int4 import Int4
from accessory.quantization.packed import Packed
from accessory.quantization.stored import merge_packed
from accessory.shards import EMBEDDING, OUTPUT, Readers, is_image_part
from accessory.shipped import find_file

TRAINABLE_FILE, META_FILE, CONFIG_FILE = "trainable.safetensors", "meta.json", "config.json"
INDEX_FILE = "model.safetensors.index.json"
FROZEN_FILE = "frozen.safetensors"  # what a run's base lacks and its recipe does not train
IMAGE_FILE = "image_part.safetensors"  # of an exported multimodal model, beside the language model's files
VISION_CONFIG_FILE = "vision_config.json"

_SIZES = {  # params.json's names and config.json's
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
}


@dataclass
class Folder:
    """One checkpoint folder. kind: hf, meta, accessory, accessory_diff (values to add), trainable (ours) or blip2 (a
    vision model and Q-Former). packed: how each weight that is stored in whole numbers is held, by name."""

    path: Path
    kind: str
    _read: Readers = field(repr=False)
    _slices: Readers = field(default_factory=dict, repr=False)
    packed: dict[str, Int4] = field(default_factory=dict, repr=False)
    params: dict[str, Any] = field(default_factory=dict, repr=False)
    meta: dict[str, Any] = field(default_factory=dict, repr=False)
    shards: pth.Shards = field(default_factory=list, repr=False)

    @property
    def names(self) -> set[str]:
        return set(self._read)

    @property
    def is_base(self) -> bool:
        return EMBEDDING in self._read

    @property
    def has_images(self) -> bool:
        return any(map(is_image_part, self._read))

    def tensor(self, name: str) -> Union[Tensor, Packed]:
        try:
            return self._read[name]()
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{self.path}: {name} cannot be read ({first_line(error)}); is a file truncated?") from None

    def first_row(self, name: str) -> Tensor:
        """The first row of a matrix, without reading the rest: [1, in_features]."""
        return self._slices[name]()[:1]

    def only(self, wanted: Callable[[str], bool]) -> "Folder":
        """The same folder without the tensors whose names are not wanted."""
        packed = {name: backend for name, backend in self.packed.items() if wanted(name)}
        return replace(self, _read={name: read for name, read in self._read.items() if wanted(name)}, packed=packed)


def open_folder(path: str | Path) -> Folder:
    """Recognise a folder by its files. Meta's and Accessory's tensors can be read after `attach`."""
    folder = base_folder(path)
    kinds = [kind for kind, pattern in pth.FILES.items() if any(pattern.fullmatch(f.name) for f in folder.iterdir())]
    if len(kinds) > 1:
        raise UserError(f"{folder}: holds checkpoints of several formats ({', '.join(kinds)}); keep one")
    if kinds:
        return _open_sharded(folder, kinds[0])
    if (folder / TRAINABLE_FILE).is_file():
        return Folder(folder, "trainable", *open_safetensors(folder, [TRAINABLE_FILE, FROZEN_FILE]), meta=_meta(folder))
    if (folder / CONFIG_FILE).is_file():
        return _open_huggingface(folder)
    if (folder / "checkpoints").is_dir():
        raise UserError(
            f"--pretrained_path {path}: a run that has not finished; start its command again, or name a folder in its "
            "checkpoints"
        )
    raise UserError(
        f"--pretrained_path {path}: no checkpoint in it (looked for config.json + *.safetensors, consolidated.*.pth, "
        f"{TRAINABLE_FILE}); it holds {listing(folder)}"
    )


# --- Hugging Face and our own files ---------------------------------------------------------------------------------


def _safetensors(path: Path) -> tuple[Readers, Readers]:
    """Per name: how to read the tensor, and how to get what reads a slice of it."""
    try:
        handle = safe_open(path, framework="pt")
        names = list(handle.keys())
        whole = {name: (lambda name=name: handle.get_tensor(name)) for name in names}
        return whole, {name: (lambda name=name: handle.get_slice(name)) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({first_line(error)})") from None


def open_safetensors(folder: Path, files: list[str]) -> tuple[Readers, Readers]:
    """Those of `files` that are there, together."""
    read: Readers = {}
    slices: Readers = {}
    for name in files:
        if (folder / name).is_file():
            readers = _safetensors(folder / name)
            read |= readers[0]
            slices |= readers[1]
    return read, slices


def safetensors_files(folder: Path) -> list[str]:
    index = folder / INDEX_FILE
    if not index.is_file():
        files = sorted(f.name for f in folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder}: config.json without *.safetensors; it holds {listing(folder)}")
        return files
    places = read_json(index).get("weight_map")
    files = sorted(set(places.values())) if isinstance(places, dict) else []
    missing = [name for name in files if not (folder / name).is_file()]
    if missing or not files:
        raise UserError(f"{folder}: {index.name} names {', '.join(missing) or 'no file'}, which is not there")
    return [*files, IMAGE_FILE]


def _open_huggingface(folder: Path) -> Folder:
    config = read_json(folder / CONFIG_FILE)
    if config.get("model_type") == "blip-2":
        raise UserError(f"--pretrained_path {folder}: is a BLIP-2 folder; name it with model.vision_path={folder}")
    read, slices = open_safetensors(folder, safetensors_files(folder))
    read = {name: reader for name, reader in read.items() if not name.endswith("rotary_emb.inv_freq")}
    packed: dict[str, Int4] = {}
    if config.get("quantization_config") is not None or any(name.endswith(".qweight") for name in read):
        read, slices, packed = merge_packed(folder, config, read, slices)
    return Folder(folder, "hf", read, slices, packed, meta=_meta(folder))


def _meta(folder: Path) -> dict[str, Any]:
    return read_json(folder / META_FILE) if (folder / META_FILE).is_file() else {}


def _open_sharded(folder: Path, kind: str) -> Folder:
    config_file = folder / ("params.json" if kind == "meta" else CONFIG_FILE)
    params = read_json(config_file) if config_file.is_file() else {}
    shards = pth.read_shards(folder, kind)
    names = {pth.canonical(source, folder): source for source in shards[0]}
    read: Readers = dict.fromkeys(names, _unattached)
    slices = {name: (lambda source=source: shards[0][source]) for name, source in names.items()}
    return Folder(folder, kind, read, slices, params=params, meta=_meta(folder), shards=shards)


def attach(opened: Folder, config: LlamaConfig) -> None:
    """Tell a folder the model it belongs to: the head counts decide how Meta's wq and wk are permuted, and they are
    known only once all folders of a run are open."""
    if opened.shards:
        whole = pth.readers(opened.shards, config, opened.path)
        opened._read = {name: whole[name] for name in opened._read}


def _unattached() -> Tensor:
    raise AssertionError("attach() comes first")


# --- what the folders say together ----------------------------------------------------------------------------------


def model_config(folders: list[Folder], llama_config: list[str]) -> LlamaConfig:
    """The architecture: `llama_config` files if given, else the last folder that describes one."""
    base = folders[0]
    given = {path: read_json(find_file(path)) for path in llama_config}
    if base.kind == "hf":
        config = config_from_hf(base.path / CONFIG_FILE)
        for path, content in given.items():
            _check_agreement(content, path, config, base.path)
        return config
    params: dict[str, Any] = {}
    source = ", ".join(llama_config)
    for content in given.values():
        params |= content
    if "dim" not in params:  # LoRA settings alone, or nothing: the folders say the rest
        described = [folder for folder in folders if "dim" in folder.params]
        if not described:
            raise UserError(f"{base.path}: no params.json or config.json in it; name the model's with --llama_config")
        params = described[-1].params | params
        source = str(described[-1].path)
    return config_from_params(params, pth.rows_of_embedding(base.shards), source)


def _check_agreement(content: dict[str, Any], path: str, config: LlamaConfig, base: Path) -> None:
    """Of a Hugging Face base its own config.json decides; a llama_config file may repeat it, but not contradict it."""
    if "model_type" not in content:
        check_params(content, path)
    elif content["model_type"] != config.model_type:
        raise UserError(f"{path}: model_type={content['model_type']!r}; the base {base} is {config.model_type!r}")
    for name, theirs in _SIZES.items():
        key = theirs if "model_type" in content else name
        stated, found = content.get(key), getattr(config, theirs)
        if stated not in (None, -1, found):
            raise UserError(f"{path}: {key}={stated!r}, but the base {base} has {theirs}={found}; leave this file out")


def vision_config(folders: list[Folder], given: Optional[str]) -> Blip2Config:
    """Sizes of the image part: `given` file, else the last folder's that says them, else BLIP-2 opt-2.7b's."""
    if given is not None:
        return vision_config_from(find_file(given))
    for folder in reversed(folders):
        if (folder.path / VISION_CONFIG_FILE).is_file():
            return vision_config_from(folder.path / VISION_CONFIG_FILE)
        if folder.kind == "blip2":
            return vision_config_from(folder.path / CONFIG_FILE)
    return Blip2Config()


def fingerprint(base: Folder) -> str:
    """Digest of a base's identity, the same for one model in Meta's, Accessory's and Hugging Face's format.

    Names, all norms, and the first row of each block's value projection (no rotary order, whole in the first shard), as
    fp32: 16 hex digits; and which weights are packed. It tells models apart without reading them; it is no checksum.
    The image part has its own.
    """
    digest = hashlib.sha256()
    language = (n for n in base.names if not is_image_part(n))
    for name in sorted(n for n in language if n.endswith("weight") and "lora" not in n and n != OUTPUT):
        digest.update(_marked(base, name).encode())
        if "norm" in name:
            digest.update(base.tensor(name).float().numpy().tobytes())
        elif name.endswith("v_proj.weight"):
            digest.update(base.first_row(name).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_digest(base: Folder) -> str:
    """Digest of the first row of every tensor as it is stored, 16 hex digits: a fingerprint that another fine-tuning of
    the same model does not share, but another format of it does not either."""
    digest = hashlib.sha256()
    for name in sorted(base.names):
        digest.update(name.encode() + base.first_row(name).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _marked(folder: Folder, name: str) -> str:
    return f"{name} packed" if name in folder.packed else name


def image_fingerprint(folder: Folder) -> Optional[str]:
    """The same of a folder's image part, from names, norms, biases, tags and query tokens; None where it has none."""
    names = sorted(filter(is_image_part, folder.names))
    if not names:
        return None
    digest = hashlib.sha256("\n".join(_marked(folder, name) for name in names).encode())
    for name in names:
        if "norm" in name.lower() or name.endswith((".bias", "_img", ".query_tokens")):
            digest.update(folder.tensor(name).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def identity(folder: Folder) -> str:
    """What tells a folder besides the base apart: 16 hex digits. Of our results their checksums, of a BLIP-2 folder its
    fingerprint, of others every value."""
    if folder.kind == "blip2":
        return image_fingerprint(folder)
    if folder.meta.get("sha256"):
        stated = folder.meta["sha256"] + folder.meta.get("frozen_sha256", "")
        return hashlib.sha256(stated.encode()).hexdigest()[:16]
    total = hashlib.sha256()
    for name in sorted(folder.names):
        total.update(name.encode() + folder.tensor(name).float().numpy().tobytes())
    return total.hexdigest()[:16]
