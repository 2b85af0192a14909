"""The unfinished result of a quantization, block by block on the disk, so that a killed job goes on where it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from accessory.bases import CONFIG_FILE
from accessory.errors import UserError
from accessory.files import atomic_file
from accessory.models import read_json

SETTINGS_FILE = "settings.json"
TRANS = "trans"  # folder of the adjusted floating-point blocks


class Work:
    """A folder beside the result's: an int4 folder that grows by a file a block."""

    def __init__(self, target: Path, settings: dict[str, Any]):
        self.folder = target.absolute().with_name(f".{target.name}.work")
        self.settings = json.loads(json.dumps(settings))  # as the file will give it back

    def open(self, config: dict[str, Any]) -> int:
        """Begin, or go on; refuse what other settings began. config: config.json's content. Returns how many blocks
        are done."""
        file = self.folder / SETTINGS_FILE
        if file.is_file():
            self._compare(read_json(file))
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with atomic_file(self.folder / CONFIG_FILE) as partial:
                partial.write_text(json.dumps(config, indent=2))
            with atomic_file(file) as partial:
                partial.write_text(json.dumps(self.settings, indent=2))
        return len(list(self.folder.glob("block-*.safetensors")))

    def _compare(self, before: dict[str, Any]) -> None:
        for key, now in self.settings.items():
            if before.get(key) != now:
                raise UserError(
                    f"{self.folder}: an interrupted quantization with {key}={before.get(key)}, now {key}={now}; use "
                    "its settings to continue it, or remove that folder to start over"
                )

    def block_file(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"

    def is_done(self, index: int) -> bool:
        return self.block_file(index).is_file()

    def write(self, index: int, tensors: dict[str, Tensor], folder: str = ".") -> None:
        """One block's tensors, whole or not at all."""
        ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        (self.folder / folder).mkdir(exist_ok=True)
        with atomic_file(self.folder / folder / self.block_file(index).name) as partial:
            save_file(ready, partial, metadata={"format": "pt"})
            partial.chmod(0o644)

    def files(self, folder: str = ".") -> list[Path]:
        return sorted((self.folder / folder).glob("block-*.safetensors"))

    def remove(self) -> None:
        shutil.rmtree(self.folder)
