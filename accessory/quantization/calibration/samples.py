"""Items of calibration files -> samples: text, and an image's path, in the prompts that training uses.

A sample is a text ("…", {"text": …}, a line), an Alpaca item, a conversation, a caption, or one of llmc's
{"image", "question", "answer"}. A question without image and answer is a text too, as in llmc.
"""

from __future__ import annotations

import bisect
import itertools
import os
from dataclasses import dataclass, replace
from typing import Any, Optional

from accessory.config import PromptType
from accessory.data.items import to_example
from accessory.data.prompts import Example
from accessory.data.sources import Entry
from accessory.errors import UserError
from accessory.models.tokenizer import Tokenizer
from accessory.quantization.calibration.sources import IMAGE_KEYS, Part, Request, open_parts
from accessory.quantize_options import CalibrationConfig

TRAINING_KEYS = ("conversations", "messages", "instruction", "output")  # beside a text, they are what counts
STAND_IN = "."  # for an answer that is not wanted, as prompts are made with one; it is cut off again


@dataclass(frozen=True)
class Sample:
    """example: its text, of which nothing is learnt; image: path, or ""; where: for messages."""

    example: Example
    image: str
    where: str


class Samples:
    """The samples of an entry of calib.dataset by number, over all of its files; each is read when it is asked for."""

    def __init__(self, request: Request, config: CalibrationConfig, tokenizer: Tokenizer, takes_images: bool):
        self.name, self.request = str(request.path), request
        self._parts = open_parts(request, config.image_root, config.prompt_type)
        self._ends = list(itertools.accumulate(len(part.items) for part in self._parts))
        self._tokenizer, self._takes_images, self._add_answer = tokenizer, takes_images, config.add_answer

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[Part, int]:
        which = bisect.bisect_right(self._ends, index)
        return self._parts[which], index - (self._ends[which - 1] if which else 0)

    def has_image(self, index: int) -> bool:
        part, number = self._place(index)
        return part.has_image(number)

    def read(self, index: int) -> Optional[Sample]:
        """None for an empty text."""
        part, number = self._place(index)
        where, item = part.items[number]
        found = self._read(item, number, where, part.entry)
        if found is None:
            return None
        example, image = found
        candidates = [str(folder / image) for folder in part.folders] if image else [""]
        existing = (path for path in candidates if os.path.exists(path))
        return Sample(replace(example, spans=()), next(existing, candidates[-1]), where)

    def _read(self, item: Any, number: int, where: str, entry: Entry) -> Optional[tuple[Example, str]]:
        if self.request.chat:
            entry = replace(entry, prompt_type=PromptType.chat)
        if entry.preprocess is None:
            if (text := _text_of(item)) is not None:
                return self._text(text, number, where, entry)
            if _is_question(item):
                return self._question(item, number, where, entry)
            item, entry = _recognise(item, where, entry)
        return self._example(item, number, where, entry)

    def _example(self, item: Any, number: int, where: str, entry: Entry) -> tuple[Example, str]:
        is_dialog = entry.preprocess is None and isinstance(item, dict) and "conversations" in item
        return to_example(item, number, where, entry, is_dialog, self._tokenizer, self._takes_images)

    def _text(self, text: str, number: int, where: str, entry: Entry) -> Optional[tuple[Example, str]]:
        if not text.strip():
            return None
        if entry.prompt_type is PromptType.chat:
            return self._prompt({"instruction": text}, number, where, entry)
        example, _ = self._example({"output": text}, number, where, replace(entry, prompt_type=PromptType.caption))
        return replace(example, learn_eos=False), ""

    def _prompt(self, item: dict[str, Any], number: int, where: str, entry: Entry) -> tuple[Example, str]:
        """The item up to where its answer would begin."""
        example, image = self._example({**item, "output": STAND_IN}, number, where, entry)
        return Example(example.text[: example.spans[0][0]], (), learn_eos=False), image

    def _question(self, item: dict[str, Any], number: int, where: str, entry: Entry) -> Optional[tuple[Example, str]]:
        """llmc's sample: {"image", "question", "answer"}, all optional."""
        if item.get("audio"):
            raise UserError(f"{where}: has 'audio', but the model takes text and images; take it out")
        for key in ("question", "answer"):
            if not isinstance(item.get(key) or "", str):
                raise UserError(f"{where}: {key!r} must be text, found {str(item[key])[:60]!r}")
        question, answer = item.get("question") or "", item.get("answer") or ""
        answer = answer if self._add_answer else ""
        images = {key: item[key] for key in IMAGE_KEYS if item.get(key)}
        if not images and not (question and answer):
            return self._text(question or answer, number, where, entry)
        if not question:
            entry = replace(entry, prompt_type=PromptType.caption)
        asked = {"instruction": question, **images}
        if not answer:
            return self._prompt(asked, number, where, entry)
        return self._example({**asked, "output": answer}, number, where, entry)


def _text_of(item: Any) -> Optional[str]:
    """The text of an item that is nothing else."""
    if isinstance(item, str):
        return item
    if not isinstance(item, dict) or any(item.get(key) for key in (*IMAGE_KEYS, *TRAINING_KEYS, "audio")):
        return None
    if len(item) == 1 and isinstance(text := next(iter(item.values())), str):
        return text
    return item["text"] if isinstance(item.get("text"), str) else None


def _is_question(item: Any) -> bool:
    if not isinstance(item, dict):
        return False
    return any(key in item for key in ("question", "answer", "audio")) or (bool(item) and set(item) <= set(IMAGE_KEYS))


def _recognise(item: Any, where: str, entry: Entry) -> tuple[Any, Entry]:
    """An item of training data, with what its entry in a data YAML would say."""
    if not isinstance(item, dict) or any(key in item for key in TRAINING_KEYS if key != "messages"):
        return item, entry
    if isinstance(item.get("messages"), list):
        return {**item, "conversations": [_turn(message) for message in item["messages"]]}, entry
    if "caption" in item:
        return item, replace(entry, preprocess="caption", prompt_type=PromptType.caption)
    raise UserError(
        f"{where}: of no kind that is read: its keys are {', '.join(map(str, item)) or 'none'}; known are text, "
        "instruction and output, conversations, messages, image and caption, question and answer"
    )


def _turn(message: Any) -> Any:
    is_message = isinstance(message, dict) and "role" in message
    return {"from": message["role"], "value": message.get("content")} if is_message else message
