"""Folders that a user names: looked for before torch is imported, so that a wrong letter is told at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from accessory.errors import UserError


def base_folder(path: str | Path) -> Path:
    """The folder that --pretrained_path names; UserError where there is none that can be read."""
    folder = Path(path).expanduser()
    if not str(path):
        raise UserError("--pretrained_path is empty: name the base's folder, then the trainables'")
    try:
        if folder.is_dir():
            next(folder.iterdir(), None)
            return folder
        if folder.exists():
            raise UserError(f"--pretrained_path {path}: is a file; name its folder, {folder.parent}")
    except OSError as error:
        raise UserError(f"--pretrained_path {path}: cannot be read ({error.strerror})") from None
    raise UserError(f"--pretrained_path {path}: no such folder{_no_download(str(path)) or _neighbours(folder)}")


def require_folders(paths: Iterable[str]) -> None:
    for path in paths:
        base_folder(path)


def _neighbours(folder: Path, few: int = 8) -> str:
    """Folders beside where it would be: those with a name like its, or all if they are few."""
    try:
        beside = sorted(e.name for e in folder.parent.iterdir() if e.is_dir() and not e.name.startswith("."))
    except OSError:
        return ""
    if close := difflib.get_close_matches(folder.name, beside, n=3, cutoff=0.6):
        return f" (did you mean {' or '.join(str(folder.parent / name) for name in close)}?)"
    return f"; {folder.parent} holds {', '.join(beside)}" if 0 < len(beside) <= few else ""


def _no_download(path: str) -> str:
    """For a name as the Hub's repositories have it."""
    is_name = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).parent.exists()
    return "; nothing is downloaded: download it, and name the folder that it is in" if is_name else ""


def listing(folder: Path, limit: int = 8) -> str:
    names = sorted(f.name for f in folder.iterdir())
    if not names:
        return "nothing"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
