"""Folders that a user names: looked for before torch is imported, so that a wrong letter is told at once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from accessory.errors import UserError


def base_folder(path: str | Path) -> Path:
    """The folder that --pretrained_path names; UserError where there is none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        near = f"; {folder.parent} holds {listing(folder.parent)}" if folder.parent.is_dir() else ""
        raise UserError(f"--pretrained_path {path}: no such folder{near}")
    return folder


def require_folders(paths: Iterable[str]) -> None:
    for path in paths:
        base_folder(path)


def listing(folder: Path, limit: int = 8) -> str:
    names = sorted(f.name for f in folder.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
