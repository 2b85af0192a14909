"""Data files -> tokenized items on disk, memory-mapped.

Each data YAML is read, checked and tokenized once; the result is kept as an Arrow table under a key of everything that
decides it (file contents, tokenizer, prompt type, max_words), so a second run starts at once and all ranks of a machine
share the same pages.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import datasets
import yaml
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from tqdm import tqdm

from accessory.checkpoint import atomic_folder
from accessory.config import DataConfig, PromptType
from accessory.data.prompts import Example, dialog, encode, read_conversation, single_turn
from accessory.errors import UserError, suggest
from accessory.models.tokenizer import Tokenizer

ITEMS_FILE, REPORT_FILE = "items.arrow", "report.json"
csv.field_size_limit(2**31 - 1)  # of a text field; 131,072 characters unless told otherwise
FORMAT = 2  # part of the cache key: raise it when tokenized items change their meaning or layout
# "type" groups entries, any word will do; "root" is the folder of an entry's images. Neither matters to text.
ENTRY_KEYS = ("path", "type", "preprocess", "prompt_type", "root")
PREPROCESS = ("single_turn_llava", "caption")
FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "answer_tokens": datasets.Value("int32"),
    }
)


@dataclass(frozen=True)
class Entry:
    """One line of META: a data file and how to read it."""

    path: Path
    prompt_type: PromptType
    preprocess: Optional[str] = None


@dataclass
class Report:
    """What became of the items: nothing is dropped without standing here."""

    items: int = 0
    truncated: int = 0
    without_answer: int = 0
    examples: list[str] = field(default_factory=list)

    def line(self) -> str:
        text = f"{self.items:,} items"
        if self.truncated:
            text += f", {self.truncated:,} cut to max_words"
        if self.without_answer:
            text += f", {self.without_answer:,} left out: cut before their answer ({', '.join(self.examples)})"
        return text


def read_data_config(path: str, default: Optional[PromptType]) -> list[Entry]:
    """A data YAML -> entries; relative paths are looked up from here, then from the YAML's folder."""
    file = Path(path).expanduser()
    try:
        content = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise UserError(f"--data_config {path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"--data_config {path}: not valid YAML ({str(error).splitlines()[0]})") from None
    metas = content.get("META") if isinstance(content, dict) else None
    if not isinstance(metas, list) or not metas:
        raise UserError(f"--data_config {path}: needs a list META of {{path, type, preprocess, prompt_type}}")
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
        raise UserError(f"{file}: {meta['path']}: no such data file")
    if meta.get("preprocess") not in (None, *PREPROCESS):
        raise UserError(f"{file}: preprocess {meta['preprocess']!r}: known are {', '.join(PREPROCESS)}")
    stated = meta.get("prompt_type", default.value if default else "alpaca")
    try:
        prompt_type = PromptType("None" if stated is None else stated)
    except ValueError:
        known = ", ".join(kind.value for kind in PromptType)
        raise UserError(f"{file}: prompt_type {stated!r}: known are {known}") from None
    return Entry(data, prompt_type, meta.get("preprocess"))


def read_items(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, item) of a .json list, a .jsonl file or a .csv table with a header (tab or comma)."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            yield from _read_json(path)
        elif suffix == ".jsonl":
            with path.open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", _parse_line(line, path, number)
        elif suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                header = file.readline()
                file.seek(0)
                for row in (reader := csv.DictReader(file, delimiter="\t" if "\t" in header else ",")):
                    yield f"{path}:{reader.line_num}", row
        else:
            raise UserError(f"{path}: unknown ending {suffix!r}; .json, .jsonl and .csv are read")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of items, found a {type(content).__name__}")
    for number, item in enumerate(content):
        yield f"{path}: item {number}", item


def _parse_line(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not valid JSON ({error.msg}, column {error.colno})") from None


def to_example(item: Any, where: str, entry: Entry, config: DataConfig, tokenizer: Tokenizer) -> Example:
    """One item -> text and learnt spans, or one line naming the item."""
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected an object, found {str(item)[:60]!r}")
    if item.get("image") or entry.preprocess == "caption":
        raise UserError(f"{where}: has an image, but the model is language-only (llama_qformerv2_peft takes images)")
    if config.dialog:
        try:
            return dialog(read_conversation(item), entry.prompt_type, tokenizer)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    if entry.preprocess == "single_turn_llava":
        item = _single_turn_llava(item, where)
    for key in ("instruction", "input", "output"):
        value = item.get(key)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {key!r} must be text, found {type(value).__name__} {str(value)[:60]}")
    if not item.get("output"):
        hint = "; it looks like a conversation: add --dialog" if "conversations" in item else ""
        raise UserError(f"{where}: no 'output' (an Alpaca item has instruction, input, output){hint}")
    try:
        return single_turn(item, entry.prompt_type, tokenizer)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise UserError(f"{where}: holds {half}, half of a surrogate pair; write the character itself") from None


def _single_turn_llava(item: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        question, answer = item["conversations"][:2]
        return {"instruction": question["value"], "output": answer["value"]}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where}: preprocess single_turn_llava needs 'conversations' with two turns") from None


def cache_key(entries: list[Entry], config: DataConfig, tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"{FORMAT},{tokenizer.fingerprint()},{config.max_words},{config.dialog}".encode())
    for entry in entries:
        digest.update(f"{entry.prompt_type.value},{entry.preprocess}".encode())
        try:
            with entry.path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{entry.path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()[:24]


def open_dataset(path: str, config: DataConfig, tokenizer: Tokenizer) -> tuple[datasets.Dataset, Report, str]:
    """The tokenized items of a data YAML, their report, and the key that identifies them.

    Columns: input_ids, labels (-100: not learnt), length, answer_tokens. The first process builds; others wait.
    """
    entries = read_data_config(path, config.prompt_type)
    key = cache_key(entries, config, tokenizer)
    root = Path(config.cache_dir or os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")).expanduser()
    folder = (root if config.cache_dir else root / "accessory") / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder) + ".lock"):
            if (opened := _open_cache(folder)) is None:
                _build(folder, entries, config, tokenizer)
                opened = _open_cache(folder)
    except OSError as error:  # reading a data file raises UserError
        raise UserError(f"data cache {folder}: {error.strerror or error}; choose another with data.cache_dir") from None
    if opened is None:
        raise UserError(f"data cache {folder}: written, but cannot be read; choose another with data.cache_dir")
    items, report = opened
    if report.items == 0:
        raise UserError(f"--data_config {path}: no items in {', '.join(str(e.path) for e in entries)}")
    if report.items == report.without_answer:
        raise UserError(
            f"--max_words {config.max_words}: shorter than every prompt of {path}, no answer is left to learn"
        )
    return items, report, key


def _open_cache(folder: Path) -> Optional[tuple[datasets.Dataset, Report]]:
    """What `_build` left, or None where it is not there or not whole."""
    try:
        report = Report(**json.loads((folder / REPORT_FILE).read_text()))
        items = datasets.Dataset.from_file(str(folder / ITEMS_FILE))
    except (OSError, ValueError, TypeError):  # pyarrow.ArrowInvalid is a ValueError
        return None
    return (items, report) if len(items) == report.items - report.without_answer else None


def _build(folder: Path, entries: list[Entry], config: DataConfig, tokenizer: Tokenizer) -> None:
    report = Report()
    with atomic_folder(folder) as partial:
        with ArrowWriter(features=FEATURES, path=str(partial / ITEMS_FILE)) as writer:
            for row in _tokenize(entries, config, tokenizer, report):
                writer.write(row)
            writer.finalize()
        (partial / REPORT_FILE).write_text(json.dumps(asdict(report)))


def _tokenize(
    entries: list[Entry], config: DataConfig, tokenizer: Tokenizer, report: Report
) -> Iterator[dict[str, Any]]:
    for entry in entries:
        bar = tqdm(
            read_items(entry.path), desc=f"tokenizing {entry.path.name}", unit="item", disable=not sys.stderr.isatty()
        )
        for where, item in bar:
            example = to_example(item, where, entry, config, tokenizer)
            _check_characters(example.text, where)
            ids, labels = encode(example, tokenizer)
            limit = config.max_words
            report.items += 1
            report.truncated += len(ids) > limit
            ids, labels = ids[:limit], labels[:limit]
            learnt = sum(label != -100 for label in labels[1:])
            if learnt == 0:
                report.without_answer += 1
                if len(report.examples) < 3:
                    report.examples.append(where)
                continue
            yield {"input_ids": ids, "labels": labels, "length": len(ids), "answer_tokens": learnt}
