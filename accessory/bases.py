"""Checkpoint folders of every kind, read lazily under one set of names.

A `Folder` lists its tensors by canonical name (Hugging Face's, `model.layers.0.self_attn.q_proj.weight`, plus
`….lora_A.weight` / `….lora_B.weight`) without reading them, and gives one tensor at a time: files are memory-mapped, so
loading needs no more host memory than the tensor in hand.

Meta's layout differs in three ways, all undone here: names; the rotary pairs of wq and wk lie next to each other, not
half a head apart (weight, bias and lora_b alike); and tensors are split over model-parallel shards.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaConfig

from accessory.errors import UserError
from accessory.models import check_params, config_from_hf, config_from_params, read_json

TRAINABLE_FILE, META_FILE, CONFIG_FILE = "trainable.safetensors", "meta.json", "config.json"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

_SHARDED = {
    "meta": re.compile(r"consolidated\.(\d{2})\.pth"),
    "accessory": re.compile(r"consolidated\.(\d{2})-of-(\d{2})\.model\.pth"),
    "accessory_diff": re.compile(r"consolidated\.(\d{2})-of-(\d{2})\.model-diff\.pth"),
}
_LINEARS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_TOP = {"tok_embeddings.weight": EMBEDDING, "norm.weight": "model.norm.weight", "output.weight": OUTPUT}
_ROW_PARALLEL = ("o_proj", "down_proj")
_SIZES = {  # params.json's names and config.json's
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
}


@dataclass
class Folder:
    """One checkpoint folder. kind: hf, meta, accessory, accessory_diff (values to add) or trainable (ours)."""

    path: Path
    kind: str
    _read: dict[str, Callable[[], Tensor]] = field(repr=False)
    _first_row: dict[str, Callable[[], Tensor]] = field(default_factory=dict, repr=False)
    params: dict[str, Any] = field(default_factory=dict, repr=False)
    meta: dict[str, Any] = field(default_factory=dict, repr=False)
    shards: list[dict[str, Tensor]] = field(default_factory=list, repr=False)

    @property
    def names(self) -> set[str]:
        return set(self._read)

    @property
    def is_base(self) -> bool:
        return EMBEDDING in self._read

    def tensor(self, name: str) -> Tensor:
        try:
            return self._read[name]()
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{self.path}: {name} cannot be read ({_first_line(error)}); is a file truncated?"
            ) from None

    def first_row(self, name: str) -> Tensor:
        """The first row of a matrix, without reading the rest: [1, in_features]."""
        return self._first_row[name]()


def open_folder(path: str | Path) -> Folder:
    """Recognise a folder by its files. Meta's and Accessory's tensors can be read after `attach`."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        near = f"; {folder.parent} holds {_listing(folder.parent)}" if folder.parent.is_dir() else ""
        raise UserError(f"--pretrained_path {path}: no such folder{near}")
    kinds = [kind for kind, pattern in _SHARDED.items() if any(pattern.fullmatch(f.name) for f in folder.iterdir())]
    if len(kinds) > 1:
        raise UserError(f"{folder}: holds checkpoints of several formats ({', '.join(kinds)}); keep one")
    if kinds:
        return _open_sharded(folder, kinds[0])
    if (folder / TRAINABLE_FILE).is_file():
        meta = read_json(folder / META_FILE) if (folder / META_FILE).is_file() else {}
        return Folder(folder, "trainable", _safetensors(folder / TRAINABLE_FILE)[0], meta=meta)
    if (folder / CONFIG_FILE).is_file():
        return _open_huggingface(folder)
    raise UserError(
        f"--pretrained_path {path}: no checkpoint in it (looked for config.json + *.safetensors, consolidated.*.pth, "
        f"{TRAINABLE_FILE}); it holds {_listing(folder)}"
    )


# --- Hugging Face and our own files ---------------------------------------------------------------------------------


Readers = dict[str, Callable[[], Tensor]]


def _safetensors(path: Path) -> tuple[Readers, Readers]:
    """Per name: how to read the tensor, and how to read its first row."""
    try:
        handle = safe_open(path, framework="pt")
        names = list(handle.keys())
        whole = {name: (lambda name=name: handle.get_tensor(name)) for name in names}
        return whole, {name: (lambda name=name: handle.get_slice(name)[:1]) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({_first_line(error)})") from None


def _open_huggingface(folder: Path) -> Folder:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing or not files:
            raise UserError(f"{folder}: {index.name} names {', '.join(missing) or 'no file'}, which is not there")
    else:
        files = sorted(f.name for f in folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: config.json without *.safetensors; it holds {_listing(folder)}")
    read, first_row = {}, {}
    for name in files:
        readers = _safetensors(folder / name)
        read |= {k: v for k, v in readers[0].items() if not k.endswith("rotary_emb.inv_freq")}
        first_row |= readers[1]
    return Folder(folder, "hf", read, first_row)


# --- Meta's and LLaMA2-Accessory's .pth shards ----------------------------------------------------------------------


def _open_sharded(folder: Path, kind: str) -> Folder:
    pattern = _SHARDED[kind]
    found = {int(m[1]): f for f in folder.iterdir() if (m := pattern.fullmatch(f.name))}
    stated = {int(m[2]) for f in found.values() if len((m := pattern.fullmatch(f.name)).groups()) > 1}
    count = max(stated | {max(found) + 1})
    if set(found) != set(range(count)):
        absent = sorted(set(range(count)) - set(found))
        raise UserError(f"{folder}: shard {absent[0]:02d} of {count} is missing; it holds {_listing(folder)}")
    config_file = folder / ("params.json" if kind == "meta" else CONFIG_FILE)
    params = read_json(config_file) if config_file.is_file() else {}
    meta = read_json(folder / META_FILE) if (folder / META_FILE).is_file() else {}
    shards = [_load_pth(found[rank]) for rank in range(count)]
    for rank, shard in enumerate(shards):
        if odd := sorted(name for name in shard.keys() ^ shards[0].keys() if not _ignored(name)):
            raise UserError(f"{folder}: {odd[0]} is in only one of {found[0].name} and {found[rank].name}")
    read = {_canonical(name, folder): _unattached for name in shards[0] if not _ignored(name)}
    first_row = {
        _canonical(name, folder): (lambda name=name: shards[0][name][:1]) for name in shards[0] if not _ignored(name)
    }
    return Folder(folder, kind, read, first_row, params=params, meta=meta, shards=shards)


def attach(opened: Folder, config: LlamaConfig) -> None:
    """Tell a folder the model it belongs to: the head counts decide how Meta's wq and wk are permuted, and they are
    known only once all folders of a run are open."""
    shards = opened.shards
    if not shards:
        return
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def reader(source: str, name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            parts = [shard[source] for shard in shards]
            tensor = _merge(name, parts, config.hidden_size)
            layer = name.rsplit(".", 2 if "lora" in name else 1)[0].rsplit(".", 1)[-1]
            rows_are_rotary = layer in heads and not name.endswith("lora_A.weight")
            fits = rows_are_rotary and tensor.shape[0] % (2 * heads[layer]) == 0  # else its shape is reported later
            return halves_from_pairs(tensor, heads[layer]) if fits else tensor

        return read

    opened._read = {
        name: reader(source, name)
        for source in shards[0]
        if not _ignored(source)
        for name in [_canonical(source, opened.path)]
    }


def _unattached() -> Tensor:
    raise AssertionError("attach() comes first")


def _load_pth(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler raises whatever it meets in a damaged file
        raise UserError(f"{path}: not a whole PyTorch checkpoint ({_first_line(error)})") from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path}: expected a dictionary of tensors")
    return content


def _ignored(name: str) -> bool:
    return name.removeprefix("llma.") == "rope.freqs"  # computed, and the same for every model


def _canonical(name: str, folder: Path) -> str:
    short = name.removeprefix("llma.")
    if short in _TOP:
        return _TOP[short]
    match = re.fullmatch(r"layers\.(\d+)\.(.+?)\.(weight|bias|lora_a\.weight|lora_b\.weight)", short)
    if match:
        layer, module, leaf = match.groups()
        inner = (_LINEARS | _NORMS).get(module)
        if inner:
            return f"model.layers.{layer}.{inner}.{leaf.replace('lora_a', 'lora_A').replace('lora_b', 'lora_B')}"
    raise UserError(f"{folder}: key {name!r} fits nowhere in a LLaMA model")


def _merge(name: str, parts: list[Tensor], hidden_size: int) -> Tensor:
    """Undo model parallelism: column-parallel linears are split over rows, row-parallel ones over columns."""
    if len(parts) == 1:
        return parts[0]
    row_parallel = any(layer in name for layer in _ROW_PARALLEL)
    if "norm" in name:
        dim = None
    elif name == EMBEDDING:  # LLaMA 2 splits the hidden size, later models the vocabulary
        dim = 0 if parts[0].shape[1] == hidden_size else 1
    elif name.endswith("lora_A.weight"):
        dim = 1 if row_parallel else None
    elif name.endswith("lora_B.weight") or name.endswith("bias"):
        dim = None if row_parallel else 0
    else:
        dim = 1 if row_parallel else 0
    return parts[0] if dim is None else torch.cat(parts, dim=dim)


def halves_from_pairs(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a rotary projection, per head: (0, 1), (2, 3), … -> 0, 2, …, 1, 3, …

    rows: [heads * e, ...], a weight, a bias or lora_B.
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


# --- what the folders say together ----------------------------------------------------------------------------------


def model_config(folders: list[Folder], llama_config: list[str]) -> LlamaConfig:
    """The architecture: `llama_config` files if given, else the last folder that describes one."""
    base = folders[0]
    given = {path: read_json(Path(path).expanduser()) for path in llama_config}
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
    return config_from_params(params, rows_of_embedding(base), source)


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


def rows_of_embedding(base: Folder) -> int:
    """Vocabulary size of a Meta or Accessory base: rows of the output layer, which is split over rows, or of an
    embedding split over columns."""
    prefix = "" if base.kind == "meta" else "llma."
    output = base.shards[0].get(prefix + "output.weight")
    if output is None:
        return base.shards[0][prefix + "tok_embeddings.weight"].shape[0]
    return output.shape[0] * len(base.shards)


def fingerprint(base: Folder) -> str:
    """Digest of a base's identity, the same for one model in Meta's, Accessory's and Hugging Face's format.

    Names, all norms, and the first row of each block's value projection (no rotary order, whole in the first shard), as
    fp32: 16 hex digits. It tells models apart without reading them; it is no checksum.
    """
    digest = hashlib.sha256()
    for name in sorted(n for n in base.names if n.endswith("weight") and "lora" not in n and n != OUTPUT):
        digest.update(name.encode())
        if "norm" in name:
            digest.update(base.tensor(name).float().numpy().tobytes())
        elif name.endswith("v_proj.weight"):
            digest.update(base.first_row(name).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def digest(folder: Folder) -> str:
    """Digest of every value of a small folder, such as trainables: 16 hex digits."""
    total = hashlib.sha256()
    for name in sorted(folder.names):
        total.update(name.encode() + folder.tensor(name).float().numpy().tobytes())
    return total.hexdigest()[:16]


def _listing(folder: Path, limit: int = 8) -> str:
    names = sorted(f.name for f in folder.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
