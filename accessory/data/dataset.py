"""Data files -> tokenized items on disk, memory-mapped.

Each data YAML is read, checked and tokenized once; the result is kept as an Arrow table under a key of everything that
decides it (file contents, tokenizer, prompt type, max_words), so a second run starts at once and all ranks of a machine
share the same pages. Images stay where they are: the table holds their paths, and beside it stands what their files
looked like when they were checked, so that a change of one is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import datasets
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from tqdm import tqdm

from accessory.config import BadImages, DataConfig
from accessory.data.images import ImageCheck, ImageInput, check_images, stamp_of
from accessory.data.items import to_example
from accessory.data.packing import IGNORE, IMAGE_SLOT, insert_image
from accessory.data.prompts import Example, encode
from accessory.data.sources import Entry, check_roots, image_folders, read_data_config, read_items
from accessory.errors import UserError
from accessory.files import atomic_folder
from accessory.models.tokenizer import Tokenizer

ITEMS_FILE, REPORT_FILE, IMAGES_FILE = "items.arrow", "report.json", "images.json"
FORMAT = 3  # part of the cache key: raise it when tokenized items change their meaning or layout
EXAMPLES = 3  # named of the items left out for a reason
FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "answer_tokens": datasets.Value("int32"),
        "image": datasets.Value("string"),
    }
)


@dataclass
class Report:
    """What became of the items: nothing is dropped without standing here."""

    items: int = 0
    truncated: int = 0
    without_answer: int = 0
    examples: list[str] = field(default_factory=list)
    images: int = 0
    unreadable: int = 0
    unreadable_examples: list[str] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return self.items - self.without_answer - self.unreadable

    def line(self) -> str:
        text = f"{self.items:,} items"
        if self.images:
            text += f" ({self.images:,} with an image)"
        if self.truncated:
            text += f", {self.truncated:,} cut to max_words"
        if self.without_answer:
            text += f", {self.without_answer:,} left out: cut before their answer ({', '.join(self.examples)})"
        if self.unreadable:
            more = ", …" if self.unreadable > len(self.unreadable_examples) else ""
            text += f", {self.unreadable:,} left out: image unreadable ({', '.join(self.unreadable_examples)}{more})"
        return text


def cache_key(entries: list[Entry], config: DataConfig, tokenizer: Tokenizer) -> str:
    """Of the tokenized text: of the data files' contents, not of where they lie."""
    digest = hashlib.sha256(f"{FORMAT},{tokenizer.fingerprint()},{config.max_words},{config.dialog}".encode())
    for entry in entries:
        digest.update(f"{entry.prompt_type.value},{entry.preprocess}".encode())
        try:
            with entry.path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{entry.path}: cannot be read ({error.strerror or error})") from None
    return digest.hexdigest()[:24]


def open_dataset(
    path: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    images: Optional[ImageInput] = None,
    flag: str = "--data_config",
) -> tuple[datasets.Dataset, Report, str]:
    """The tokenized items of a data YAML, their report, and the key that identifies them. flag: what named it.

    images: how the model takes images; None: it takes none, and items that have one are refused.
    Columns: input_ids (IMAGE_SLOT: see packing.py), labels (-100: not learnt), length, answer_tokens, image (path, or
    ""). The key depends on the images' contents and not on where they lie. The first process builds; others wait.
    """
    entries = read_data_config(path, config.prompt_type, flag)
    if images is not None:
        check_roots(entries, config.image_root)
    key = cache_key(entries, config, tokenizer)
    folder = _cache_root(config) / (key if images is None else _folder_key(key, entries, config, images))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder) + ".lock"):
            if (opened := _open_cache(folder)) is None:
                _build(folder, entries, config, tokenizer, images)
                opened = _open_cache(folder)
    except OSError as error:  # reading a data file raises UserError
        raise UserError(f"data cache {folder}: {error.strerror or error}; choose another with data.cache_dir") from None
    if opened is None:
        raise UserError(f"data cache {folder}: written, but cannot be read; choose another with data.cache_dir")
    items, report, digest = opened
    _check_report(report, path, entries, config, images, flag)
    if report.images:
        key = hashlib.sha256(f"{key},{images.words},{digest}".encode()).hexdigest()[:24]
    return items, report, key


def _cache_root(config: DataConfig) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")).expanduser() / "accessory"


def _folder_key(key: str, entries: list[Entry], config: DataConfig, images: ImageInput) -> str:
    """Unlike the key of the data, this one depends on where images are looked up: the table holds their paths."""
    folders = [[str(folder) for folder in image_folders(entry, config.image_root)] for entry in entries]
    parts = json.dumps([key, images.words, config.bad_images.value, folders])
    return hashlib.sha256(parts.encode()).hexdigest()[:24]


def _check_report(
    report: Report, path: str, entries: list[Entry], config: DataConfig, images: Optional[ImageInput], flag: str
) -> None:
    if report.items == 0:
        raise UserError(f"{flag} {path}: no items in {', '.join(str(e.path) for e in entries)}")
    if report.kept == 0 and report.unreadable:
        raise UserError(f"{flag} {path}: no item is left to learn from: {report.line()}")
    if report.kept == 0:
        share = f" (an image takes {images.words} of them)" if report.images else ""
        raise UserError(
            f"--max_words {config.max_words}: shorter than every prompt of {path}{share}, no answer is left to learn "
            "(in an evaluation --seqlen sets it)"
        )


def _open_cache(folder: Path) -> Optional[tuple[datasets.Dataset, Report, str]]:
    """What `_build` left (items, report, digest of the images); None where it is not there, not whole, or an image is
    no longer what was checked."""
    try:
        report = Report(**json.loads((folder / REPORT_FILE).read_text()))
        checked = json.loads((folder / IMAGES_FILE).read_text())
        items = datasets.Dataset.from_file(str(folder / ITEMS_FILE))
        is_whole = len(items) == report.kept
        is_fresh = all((stamp and tuple(stamp)) == stamp_of(path) for path, stamp in checked["stamps"].items())
        return (items, report, checked["digest"]) if is_whole and is_fresh else None
    except (OSError, ValueError, TypeError, KeyError):  # pyarrow.ArrowInvalid is a ValueError
        return None


def _build(
    folder: Path, entries: list[Entry], config: DataConfig, tokenizer: Tokenizer, images: Optional[ImageInput]
) -> None:
    report = Report()
    check, stamps = _check_images(entries, config, tokenizer, images)
    with atomic_folder(folder) as partial:
        with ArrowWriter(features=FEATURES, path=str(partial / ITEMS_FILE)) as writer:
            for row in _tokenize(entries, config, tokenizer, images, check.problems, report):
                writer.write(row)
            writer.finalize()
        (partial / REPORT_FILE).write_text(json.dumps(asdict(report)))
        (partial / IMAGES_FILE).write_text(json.dumps({"digest": check.digest, "stamps": stamps}))


def _check_images(
    entries: list[Entry], config: DataConfig, tokenizer: Tokenizer, images: Optional[ImageInput]
) -> tuple[ImageCheck, dict[str, Any]]:
    """What is wrong with which images, and the stamps by which a change will be noticed.

    It reads all items, so an item that is wrong stops before the images are decoded, which takes longer.
    """
    items = [] if images is None else _examples(entries, config, tokenizer, True, "reading")
    found = [(where, candidates) for where, _, candidates in items if candidates]
    check = check_images([_locate(candidates) for _, candidates in found])
    stamps = dict(check.stamps)
    for where, candidates in found:
        image = _locate(candidates)
        if image in check.problems:
            if config.bad_images is BadImages.stop:
                share = f"{len(check.problems):,} of {len(check.stamps):,}"
                remedy = "mend them, or leave their items out with data.bad_images=skip"
                if len(check.problems) == len(check.stamps):
                    remedy = "is their folder right (root of the YAML's entry, or --image_root)?"
                raise UserError(
                    f"{where}: image {image}: {check.problems[image]}; {share} images cannot be used: {remedy}"
                )
            stamps = {other: stamp_of(other) for other in candidates} | stamps  # where it may yet turn up
    return check, stamps


def _examples(
    entries: list[Entry], config: DataConfig, tokenizer: Tokenizer, takes_images: bool, doing: str
) -> Iterator[tuple[str, Example, list[str]]]:
    """(where, example, paths at which its image may be, none where it has none) of every item."""
    for entry in entries:
        folders = image_folders(entry, config.image_root)
        bar = tqdm(
            read_items(entry.path), desc=f"{doing} {entry.path.name}", unit="item", disable=not sys.stderr.isatty()
        )
        for number, (where, item) in enumerate(bar):
            example, image = to_example(item, number, where, entry, config.dialog, tokenizer, takes_images)
            yield where, example, [str(folder / image) for folder in folders] if image else []


def _locate(candidates: list[str]) -> str:
    """The first that exists; with none, the last."""
    return next((path for path in candidates if os.path.exists(path)), candidates[-1])


def _tokenize(
    entries: list[Entry],
    config: DataConfig,
    tokenizer: Tokenizer,
    images: Optional[ImageInput],
    problems: dict[str, str],
    report: Report,
) -> Iterator[dict[str, Any]]:
    limit = config.max_words
    for where, example, candidates in _examples(entries, config, tokenizer, images is not None, "tokenizing"):
        image = _locate(candidates) if candidates else ""
        report.items += 1
        report.images += bool(image)
        if image in problems:
            report.unreadable += 1
            if len(report.unreadable_examples) < EXAMPLES:
                report.unreadable_examples.append(f"{where}: {image}: {problems[image]}")
            continue
        ids, labels = encode(example, tokenizer)
        if image:
            ids, labels = insert_image(ids, images.words, IMAGE_SLOT), insert_image(labels, images.words, IGNORE)
        report.truncated += len(ids) > limit
        ids, labels = ids[:limit], labels[:limit]
        learnt = sum(label != IGNORE for label in labels[1:])
        if learnt == 0:
            report.without_answer += 1
            if len(report.examples) < EXAMPLES:
                report.examples.append(where)
            continue
        yield {"input_ids": ids, "labels": labels, "length": len(ids), "answer_tokens": learnt, "image": image}
