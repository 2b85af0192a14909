"""The data YAML, and the files that it names: what is read from where."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import yaml

from accessory.config import PromptType
from accessory.errors import UserError, suggest
from accessory.json_text import parse_json

csv.field_size_limit(2**31 - 1)  # of a text field; 131,072 characters unless told otherwise
# "type" groups entries, any word will do; "root" is the folder of an entry's images. Neither matters to text.
ENTRY_KEYS = ("path", "type", "preprocess", "prompt_type", "root")
PREPROCESS = ("single_turn_llava", "multi_turn_llava", "caption")


@dataclass(frozen=True)
class Entry:
    """One line of META: a data file and how to read it."""

    path: Path
    prompt_type: PromptType
    preprocess: Optional[str] = None
    root: Optional[Path] = None


def read_data_config(path: str, default: Optional[PromptType], flag: str = "--data_config") -> list[Entry]:
    """A data YAML -> entries; relative paths are looked up from here, then from the YAML's folder. flag: what named
    it."""
    file = Path(path).expanduser()
    try:
        content = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file") from None
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read ({error.strerror})") from None
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{flag} {path}:{error.problem_mark.line + 1}: not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: not valid YAML ({str(error).splitlines()[0]})") from None
    metas = content.get("META") if isinstance(content, dict) else None
    if not isinstance(metas, list) or not metas:
        raise UserError(f"{flag} {path}: needs a list META of {{path, type, preprocess, prompt_type}}")
    return [_entry(meta, file, default) for meta in metas]


def _entry(meta: Any, file: Path, default: Optional[PromptType]) -> Entry:
    if isinstance(meta, list):  # the older form, [path, type]
        meta = dict(zip(("path", "type"), meta, strict=False))
    if not isinstance(meta, dict) or "path" not in meta:
        raise UserError(f"{file}: an entry of META has no path: {str(meta)[:80]}")
    for key in meta:
        if key not in ENTRY_KEYS:
            raise UserError(f"{file}: unknown key {key!r} in META{suggest(key, ENTRY_KEYS)}")
    data = Path(str(meta["path"])).expanduser()
    if not data.is_file() and (file.parent / data).is_file():
        data = file.parent / data
    if not data.is_file():
        found = "is a folder; name a file in it" if data.is_dir() else "no such data file"
        raise UserError(f"{file}: {meta['path']}: {found}")
    _check_ending(data)
    preprocess = meta.get("preprocess")
    if preprocess not in (None, *PREPROCESS):
        raise UserError(f"{file}: preprocess {preprocess!r}: known are {', '.join(PREPROCESS)}")
    usual = PromptType.caption if preprocess == "caption" else PromptType.alpaca
    stated = meta.get("prompt_type", (default or usual).value)
    try:
        prompt_type = PromptType("None" if stated is None else stated)
    except ValueError:
        known = ", ".join(kind.value for kind in PromptType)
        raise UserError(f"{file}: prompt_type {stated!r}: known are {known}") from None
    return Entry(data, prompt_type, preprocess, _root(meta, file))


def _root(meta: dict[str, Any], file: Path) -> Optional[Path]:
    if not meta.get("root"):
        return None
    root = Path(str(meta["root"])).expanduser()
    return file.parent / root if not root.is_dir() and (file.parent / root).is_dir() else root


def image_folders(entry: Entry, image_root: Optional[str]) -> tuple[Path, ...]:
    """Where the relative paths of an entry's images are looked up, in order; absolute."""
    if entry.root is None and image_root is None:
        return Path.cwd(), entry.path.parent.absolute()
    return (Path(entry.root or image_root).expanduser().absolute(),)


def check_roots(entries: list[Entry], image_root: Optional[str]) -> None:
    """Refuse an image folder that is none."""
    for entry in entries:
        if entry.root is not None and not entry.root.is_dir():
            raise UserError(f"root {entry.root} of {entry.path}: no such folder; mend it in the data YAML")
    if image_root is not None and not Path(image_root).expanduser().is_dir():
        raise UserError(f"--image_root {image_root}: no such folder")


def _check_ending(path: Path) -> None:
    if path.suffix.lower() not in (".json", ".jsonl", ".csv"):
        raise UserError(f"{path}: unknown ending {path.suffix!r}; .json, .jsonl and .csv are read")


def read_items(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, item) of a .json list, a .jsonl file or a .csv table with a header (tab or comma)."""
    _check_ending(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            yield from _read_json(path)
        elif suffix == ".jsonl":
            with path.open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", _parse_line(line, path, number)
        else:
            yield from _read_csv(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Strict: a reader that guesses would give a part of an answer, or make one of many rows."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        reader = csv.DictReader(file, delimiter="\t" if "\t" in header else ",", strict=True)
        begin = 1
        try:
            while reader.fieldnames:  # reads the header
                begin = reader.line_num + 1
                row = next(reader)
                if None in row:
                    raise UserError(
                        f"{path}:{begin}: {len(row[None])} more fields than the header has; put quotes around a text "
                        "that holds the separator"
                    )
                yield f"{path}:{reader.line_num}", row
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}:{begin}: not a row of a table ({error}); put quotes around a text that begins with one, and "
                "double its own"
            ) from None


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "; if each line is an item, name it .jsonl" * error.msg.startswith("Extra data")
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno}){hint}") from None
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of items, found a {type(content).__name__}")
    for number, item in enumerate(content):
        yield f"{path}: item {number}", item


def _parse_line(line: str, path: Path, number: int) -> Any:
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not valid JSON ({error.msg}, column {error.colno})") from None
