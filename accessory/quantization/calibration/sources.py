"""What `calib.dataset` names, and what lies there: files and folders -> items, none of them looked at yet.

a.txt:num=64,"b, c.json":concat=false     two entries: a path, quoted where it holds a comma or colon, and options
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from tqdm import tqdm

from accessory.config import PromptType
from accessory.data.sources import Entry, check_roots, image_folders, read_data_config, read_items
from accessory.errors import UserError, first_line, suggest
from accessory.json_text import parse_json
from accessory.quantize_options import CalibrationConfig

SAMPLES_FILE = "samples.json"  # llmc's
ENDINGS = (".txt", ".json", ".jsonl", ".csv")
OPTIONS = ("num", "concat", "whole", "apply_chat_template")
ENTRY = re.compile(r'\s*(?:"(?P<quoted>[^"]*)"|(?P<plain>[^:"]*))\s*(?::(?P<options>[^"]*))?')
IMAGE_KEYS = ("image", "images")


@dataclass(frozen=True)
class Request:
    """An entry of calib.dataset. num: rows wanted of it; unset: it shares what the others leave."""

    path: Path
    num: Optional[int]
    concat: bool
    whole: bool
    chat: bool


def parse_dataset(config: CalibrationConfig) -> list[Request]:
    """calib.dataset -> its entries, each a file or folder that exists."""
    text = config.dataset
    if text is None or not text.strip():
        raise UserError(
            "calib.dataset is not set: calibration needs data; name files or folders (--dataset), best of the kind "
            "that the model will work on"
        )
    if os.path.exists(text):  # its commas and colons are part of its name
        return [_request(text, [], config)]
    requests = []
    for piece in re.findall(r'(?:"[^"]*"|[^,"]|")+?(?=,|$)', text):
        found = ENTRY.fullmatch(piece)
        if found is None:
            raise UserError(f'calib.dataset: {piece}: expected path:option=value, or "path" where it holds , or :')
        options = [] if found["options"] is None else found["options"].split(":")
        requests.append(_request((found["quoted"] or found["plain"] or "").strip(), options, config))
    return requests


def _request(name: str, options: list[str], config: CalibrationConfig) -> Request:
    path = Path(name).expanduser()
    if not name or not path.exists():
        raise UserError(
            f"calib.dataset: {name!r}: no such file or folder; nothing is downloaded, so name a file "
            f"({', '.join(ENDINGS)}), a folder with {SAMPLES_FILE} or such files, or a data YAML"
        )
    values: dict[str, Any] = {}
    for option in options:
        key, has_value, value = (part.strip() for part in option.partition("="))
        if key not in OPTIONS:
            raise UserError(
                f"calib.dataset: {name}: unknown option {option!r}{suggest(key, OPTIONS)}; known are num=ROWS, concat, "
                "whole, apply_chat_template (a file has no splits)"
            )
        values[key] = _rows(name, value) if key == "num" else _switch(name, option, value if has_value else "true")
    return Request(
        path=path,
        num=values.get("num"),
        concat=values.get("concat", config.concat),
        whole=values.get("whole", config.whole_file and (path.is_dir() or path.suffix.lower() == ".txt")),
        chat=values.get("apply_chat_template", config.apply_chat_template),
    )


def _rows(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"calib.dataset: {name}: num={value}: must be a number of rows, at least 1")
    return int(value)


def _switch(name: str, option: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise UserError(f"calib.dataset: {name}: {option}: must be true or false")
    return value.lower() == "true"


# --- files -----------------------------------------------------------------------------------------------------------


class Lines(Sequence):
    """(where, line) of a text file, which stays on the disk: only the lines' places are in memory."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            lengths = np.fromiter((len(line) for line in file), dtype=np.int64)
        self._starts = np.concatenate(([0], np.cumsum(lengths)))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> tuple[str, str]:
        start, end = int(self._starts[index]), int(self._starts[index + 1])
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.read(end - start)
        where = f"{self.path}:{index + 1}"
        return where, _decode(line, where).strip()


class JsonLines(Lines):
    """(where, item) of a .jsonl file, each parsed when it is asked for."""

    def __getitem__(self, index: int) -> tuple[str, Any]:
        where, line = super().__getitem__(index)
        try:
            return where, parse_json(line) if line else ""
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from None


class Saved(Sequence):
    """(where, item) of a data set that the `datasets` library saved, as llmc's download scripts do; memory-mapped."""

    def __init__(self, folder: Path):
        import datasets

        try:
            self._data = datasets.load_from_disk(str(folder))
        except Exception as error:  # the library raises whatever its readers raise
            raise UserError(f"{folder}: a saved data set that cannot be read ({first_line(error)})") from None
        if isinstance(self._data, datasets.DatasetDict):
            raise UserError(f"{folder}: holds the splits {', '.join(self._data)}; name one, as in {folder}/train")
        if any(key in self._data.column_names for key in IMAGE_KEYS):
            raise UserError(
                f"{folder}: a saved data set with images; write them to files, and {SAMPLES_FILE} beside them, a list "
                'of {"image", "question", "answer"}'
            )
        self._folder = folder

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        return f"{self._folder}: item {index}", self._data[index]


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from None


@dataclass(frozen=True)
class Part:
    """A file's items and how they are read. folders: of their images; none for files of texts."""

    entry: Entry
    items: Sequence
    folders: tuple[Path, ...] = ()

    def has_image(self, index: int) -> bool:
        item = self.items[index][1] if self.folders else None
        if not isinstance(item, dict):
            return False
        is_caption = self.entry.preprocess == "caption" or "caption" in item
        return any(item.get(key) for key in (*IMAGE_KEYS, *(["url"] if is_caption else [])))


def open_parts(request: Request, image_root: Optional[str], prompt_type: Optional[PromptType] = None) -> list[Part]:
    """The files of an entry, none of their samples looked at yet."""
    path = request.path
    if image_root is not None and not Path(image_root).expanduser().is_dir():
        raise UserError(f"calib.image_root={image_root}: no such folder")
    try:
        if path.is_dir():
            return _open_folder(path, request, image_root)
        if path.suffix.lower() in (".yaml", ".yml"):
            _refuse_whole(path, request)
            entries = read_data_config(str(path), prompt_type)
            check_roots(entries, None)
            return [Part(entry, _listed(entry.path), image_folders(entry, image_root)) for entry in entries]
        return [_open_file(path, request, image_root)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _open_folder(folder: Path, request: Request, image_root: Optional[str]) -> list[Part]:
    if (folder / SAMPLES_FILE).is_file():
        return [_open_file(folder / SAMPLES_FILE, request, image_root)]
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        _refuse_whole(folder, request)
        return [Part(Entry(folder, PromptType.alpaca), Saved(folder))]
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in ENDINGS)
    if not files:
        raise UserError(f"{folder}: holds neither {SAMPLES_FILE} nor {', '.join(ENDINGS)} files")
    return [_open_file(file, request, image_root) for file in files]


def _open_file(file: Path, request: Request, image_root: Optional[str]) -> Part:
    entry = Entry(file, PromptType.alpaca, root=None if image_root else file.parent)
    if file.suffix.lower() == ".txt":
        items = [(str(file), _decode(file.read_bytes(), str(file)))] if request.whole else Lines(file)
        return Part(entry, items)
    _refuse_whole(file, request)
    items = JsonLines(file) if file.suffix.lower() == ".jsonl" else _listed(file)
    return Part(entry, items, image_folders(entry, image_root))


def _refuse_whole(path: Path, request: Request) -> None:
    if request.whole:
        raise UserError(f"{path}: whole is for .txt files, each one document; leave it out (calib.whole_file=false)")


def _listed(path: Path) -> list[tuple[str, Any]]:
    return list(tqdm(read_items(path), desc=f"reading {path.name}", unit="item", disable=not sys.stderr.isatty()))
