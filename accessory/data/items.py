"""One item of a data file -> the text of an example, and the image that goes with it."""

from __future__ import annotations

import itertools
from typing import Any

from accessory.config import PromptType
from accessory.data.prompts import Example, dialog, read_conversation, single_turn
from accessory.data.sources import Entry
from accessory.errors import UserError
from accessory.models.tokenizer import Tokenizer

LONGEST_PATH = 4096
PLACEHOLDER = "<image>"  # LLaVA's mark in a question; the position in the row is fixed, so it is taken out


def to_example(
    item: Any, number: int, where: str, entry: Entry, is_dialog: bool, tokenizer: Tokenizer, takes_images: bool
) -> tuple[Example, str]:
    """An item -> text and learnt spans, and its image's path as the file has it ("": none); UserError names the item.

    number: which item of its file it is. takes_images: whether the model does.
    """
    try:
        example, image = _read(item, number, entry, is_dialog, tokenizer, takes_images)
        _check_characters(example.text + image)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return example, image


def _read(
    item: Any, number: int, entry: Entry, is_dialog: bool, tokenizer: Tokenizer, takes_images: bool
) -> tuple[Example, str]:
    if not isinstance(item, dict):
        raise ValueError(f"expected an object, found {str(item)[:60]!r}")
    is_caption = entry.preprocess == "caption"
    if not takes_images and (item.get("image") or item.get("images") or is_caption):
        raise ValueError("has an image, but the model is language-only (llama_qformerv2_peft takes images)")
    image = _image(item, is_caption) if takes_images else ""
    if is_caption:
        item = {"output": _caption(item, number)}
    elif is_dialog or entry.preprocess == "multi_turn_llava":
        messages = read_conversation(item)
        if takes_images:
            _take_placeholders([m for m in messages if m["role"] == "user"], ("content",), image)
        return dialog(messages, entry.prompt_type, tokenizer), image
    elif entry.preprocess == "single_turn_llava":
        item = _single_turn_llava(item)
    _check_single_turn(item)
    if "instruction" not in item and not is_caption and entry.prompt_type is not PromptType.caption:
        keys, kind = ", ".join(map(str, item)), entry.prompt_type.value
        raise ValueError(f"no 'instruction', the question that prompt_type {kind} asks; its keys are {keys}")
    if takes_images:
        item = dict(item)
        _take_placeholders([item], ("instruction", "input"), image)
    return single_turn(item, entry.prompt_type, tokenizer), image


def _image(item: dict[str, Any], is_caption: bool) -> str:
    image = item.get("image") or item.get("images")  # both names are in use
    if is_caption and not image:
        image = item.get("url")
    if isinstance(image, list) and len(image) > 1:
        raise ValueError(f"has {len(image)} images; an item takes one")
    if isinstance(image, list):
        image = image[0] if image else ""
    if image is None or image == "":
        if is_caption:
            raise ValueError("no 'image' or 'url' (preprocess caption needs one in each item)")
        return ""
    if not isinstance(image, str):
        raise ValueError(f"'image' must be a path, found {type(image).__name__} {str(image)[:60]}")
    if len(image) > LONGEST_PATH:
        raise ValueError(f"'image' must be a path, found {len(image):,} characters; write images to files")
    if image.startswith(("http://", "https://")):
        raise ValueError(f"image {image[:80]}: images are read from disk; download it first")
    return image


def _caption(item: dict[str, Any], number: int) -> Any:
    """Of several captions one by the item's number, the same in each run."""
    captions = item.get("caption")
    if captions is None:
        raise ValueError(f"no 'caption' (preprocess: caption needs one); its keys are {', '.join(map(str, item))}")
    caption = captions[number % len(captions)] if isinstance(captions, list) and captions else captions
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"'caption' must be text or a list of texts, found {str(captions)[:60]!r}")
    return caption


def _single_turn_llava(item: dict[str, Any]) -> dict[str, Any]:
    """The first question of a conversation and its answer."""
    turns = read_conversation(item)
    for question, answer in itertools.pairwise(turns):
        if (question["role"], answer["role"]) == ("user", "assistant"):
            return {"instruction": question["content"], "output": answer["content"]}
    raise ValueError("preprocess single_turn_llava needs a turn of 'human' with one of 'gpt' after it")


def _check_single_turn(item: dict[str, Any]) -> None:
    for key in ("instruction", "input", "output"):
        value = item.get(key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{key!r} must be text, found {type(value).__name__} {str(value)[:60]}")
    if not item.get("output"):
        hint = ""
        if "conversations" in item:
            hint = "; it looks like a conversation: add --dialog, or preprocess: multi_turn_llava to its entry"
        elif "caption" in item:
            hint = "; it looks like a caption: add preprocess: caption to its entry"
        if "output" in item and not hint:
            raise ValueError("'output' is empty: there is nothing to learn from it")
        raise ValueError(f"no 'output' (an Alpaca item has instruction, input, output){hint}")


def _take_placeholders(texts: list[dict[str, Any]], keys: tuple[str, ...], image: str) -> None:
    """Take the placeholders out of the human's texts, in place; more of them than images are refused."""
    count = 0
    for text in texts:
        for key in keys:
            text[key], taken = _without_placeholders(text.get(key) or "")
            count += taken
    if count > bool(image):
        what = "give it one image with one placeholder" if image else "name the image under 'image', or take it out"
        raise ValueError(f"placeholders {PLACEHOLDER}: {count}, images: {int(bool(image))}; {what}")


def _without_placeholders(text: str) -> tuple[str, int]:
    """The text without its placeholders, and how many they were. They count at the start and end only: elsewhere
    `<image>` is text, of a question on SVG for example."""
    count = 0
    while True:
        if text.lstrip().startswith(PLACEHOLDER):
            text = text.lstrip().removeprefix(PLACEHOLDER).lstrip()
        elif text.rstrip().endswith(PLACEHOLDER):
            text = text.rstrip().removesuffix(PLACEHOLDER).rstrip()
        else:
            return text, count
        count += 1


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(f"holds {half}, half of a surrogate pair; write the character itself") from None
