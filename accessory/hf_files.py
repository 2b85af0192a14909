"""Writing a Hugging Face folder's weights: safetensors files of bounded size, and their index."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from accessory.bases import INDEX_FILE

SHARD_BYTES = 4 * 2**30


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes it private to its owner


class ShardWriter:
    """Takes tensors one by one and writes them into `folder`: one file, or several and model.safetensors.index.json.
    Memory needs one shard."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """tensor: contiguous, on the CPU."""
        if self._pending and sum(t.nbytes for t in self._pending.values()) + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor

    def close(self) -> None:
        """Write the rest, and give the files their names."""
        self._flush()
        if len(self._shards) == 1:
            self._file(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._file(i).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        total = sum(path.stat().st_size for path in self.folder.glob("model-*.safetensors"))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2))

    def _file(self, index: int) -> Path:
        return self.folder / f"shard-{index}.safetensors"

    def _flush(self) -> None:
        save_tensors(self._pending, self._file(len(self._shards)))
        self._shards.append(list(self._pending))
        self._pending = {}
