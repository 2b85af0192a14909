"""Meta's and LLaMA2-Accessory's `.pth` shards, one tensor at a time under Hugging Face's names.

Meta's layout differs in three ways, all undone here: names; the rotary pairs of wq and wk lie next to each other, not
half a head apart (weight, bias and lora_b alike); and tensors are split over model-parallel shards.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from accessory.errors import UserError, first_line

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
FILES = {
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
# The image part: named alike there and here, whole in every shard.
_IMAGE_PART = ("qformer.", "qformer_proj.", "start_img", "end_img")

Readers = dict[str, Callable[[], Tensor]]
Shards = list[dict[str, Tensor]]


def is_image_part(name: str) -> bool:
    """Whether a weight belongs to vision model, Q-Former, projector or image tags; the rest is LLaMA's."""
    return name.startswith(_IMAGE_PART)


def read_shards(folder: Path, kind: str) -> Shards:
    """The tensors of each model-parallel rank, memory-mapped."""
    pattern = FILES[kind]
    found = {int(m[1]): f for f in folder.iterdir() if (m := pattern.fullmatch(f.name))}
    stated = {int(m[2]) for f in found.values() if len((m := pattern.fullmatch(f.name)).groups()) > 1}
    count = max(stated | {max(found) + 1})
    if set(found) != set(range(count)):
        absent = sorted(set(range(count)) - set(found))
        present = ", ".join(sorted(path.name for path in found.values()))
        raise UserError(f"{folder}: shard {absent[0]:02d} of {count} is missing; it holds {present}")
    shards = [_load_pth(found[rank]) for rank in range(count)]
    for rank, shard in enumerate(shards):
        if odd := sorted(shard.keys() ^ shards[0].keys()):
            raise UserError(f"{folder}: {odd[0]} is in only one of {found[0].name} and {found[rank].name}")
    return shards


def _load_pth(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler raises whatever it meets in a damaged file
        raise UserError(f"{path}: not a whole PyTorch checkpoint ({first_line(error)})") from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path}: expected a dictionary of tensors")
    return {name: tensor for name, tensor in content.items() if not _ignored(name)}


def _ignored(name: str) -> bool:
    return name.removeprefix("llma.") == "rope.freqs"  # computed, and the same for every model


def canonical(name: str, folder: Path) -> str:
    """Meta's or LLaMA2-Accessory's name of a tensor -> ours."""
    short = name.removeprefix("llma.")
    if short in _TOP:
        return _TOP[short]
    if is_image_part(short):
        return short
    match = re.fullmatch(r"layers\.(\d+)\.(.+?)\.(weight|bias|lora_a\.weight|lora_b\.weight)", short)
    if match:
        layer, module, leaf = match.groups()
        inner = (_LINEARS | _NORMS).get(module)
        if inner:
            return f"model.layers.{layer}.{inner}.{leaf.replace('lora_a', 'lora_A').replace('lora_b', 'lora_B')}"
    raise UserError(f"{folder}: key {name!r} fits nowhere in a LLaMA model")


def readers(shards: Shards, config: LlamaConfig, folder: Path) -> Readers:
    """How to read each tensor: merged over the shards, and in the halves layout. The head counts of `config` decide how
    wq and wk are permuted."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def reader(source: str, name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            tensor = _merge(name, [shard[source] for shard in shards], config.hidden_size)
            layer = name.rsplit(".", 2 if "lora" in name else 1)[0].rsplit(".", 1)[-1]
            rows_are_rotary = layer in heads and not name.endswith("lora_A.weight")
            fits = rows_are_rotary and tensor.shape[0] % (2 * heads[layer]) == 0  # else its shape is reported later
            return halves_from_pairs(tensor, heads[layer]) if fits else tensor

        return read

    return {name: reader(source, name) for source in shards[0] for name in [canonical(source, folder)]}


def _merge(name: str, parts: list[Tensor], hidden_size: int) -> Tensor:
    """Undo model parallelism: column-parallel linears are split over rows, row-parallel ones over columns."""
    if len(parts) == 1:
        return parts[0]
    row_parallel = any(layer in name for layer in _ROW_PARALLEL)
    if "norm" in name or is_image_part(name):
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


def rows_of_embedding(shards: Shards) -> int:
    """Vocabulary size of a base: rows of the output layer, which is split over rows, or of an embedding split over
    columns."""
    whole = {name.removeprefix("llma."): tensor for name, tensor in shards[0].items()}
    if "output.weight" in whole:
        return whole["output.weight"].shape[0] * len(shards)
    return whole["tok_embeddings.weight"].shape[0]
