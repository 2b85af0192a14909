"""The unfinished result of a quantization, block by block on the disk, so that a killed job goes on where it was."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
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

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second job from the same output."""
        lock = FileLock(self.folder.with_suffix(".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"--output_dir: another job is at work in {self.folder}; wait for it or stop it") from None
        except OSError as error:
            raise UserError(f"--output_dir: {self.folder.parent} cannot be written ({error.strerror})") from None
        try:
            yield
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    def open(self, config: dict[str, Any]) -> None:
        """Begin, or go on; refuse what other settings began. config: config.json's content."""
        file = self.folder / SETTINGS_FILE
        if file.is_file():
            self._compare(read_json(file))
            for block in self.files():
                if not _is_whole(block):  # it is done again
                    block.unlink()
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            try:
                self.folder.mkdir(parents=True)
            except OSError as error:
                raise UserError(f"--output_dir: {self.folder} cannot be written ({error.strerror})") from None
            with atomic_file(self.folder / CONFIG_FILE) as partial:
                partial.write_text(json.dumps(config, indent=2))
            with atomic_file(file) as partial:
                partial.write_text(json.dumps(self.settings, indent=2))

    def _compare(self, before: dict[str, Any]) -> None:
        for key, now in self.settings.items():
            was = before.get(key)
            if isinstance(now, dict) and isinstance(was, dict):
                inner = next((k for k in now if was.get(k) != now[k]), None)
                if inner is not None:
                    key, was, now = f"{key}.{inner}", was.get(inner), now[inner]
            if was != now:
                raise UserError(
                    f"{self.folder}: an interrupted quantization with {key}={was}, now {key}={now}; use its "
                    "settings to continue it, or remove that folder to start over"
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


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt") as handle:
            return bool(handle.keys())
    except (SafetensorError, OSError):
        return False
