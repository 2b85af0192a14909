"""The multimodal quick start's data: what it says of digits is true, and what it tests on was never shown."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from quickstart_mm import reads
from quickstart_mm_data import WORDS, build_digits, last_word, properties, text_items

from accessory.data.sources import read_data_config


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return build_digits(tmp_path_factory.mktemp("digits"))


def items_of(file: Path) -> list[dict[str, str]]:
    return json.loads(file.with_suffix(".json").read_text())


def test_no_digit_of_the_test_is_seen_in_training_or_validation(files):
    def originals(*names: str) -> set[str]:
        return {item["image"][:4] for name in names for item in items_of(files[name]) if "image" in item}

    training = originals("captions", "questions")
    validation, test = originals("captions_val", "questions_val"), originals("test")
    assert not test & training and not test & validation and not training & validation
    assert len(training | validation | test) == 1797


def test_every_picture_named_is_there_and_is_one(files):
    for name in ("captions", "captions_val", "questions", "questions_val"):
        (entry,) = read_data_config(str(files[name]), None)
        for image in {item["image"] for item in items_of(entry.path) if "image" in item}:
            assert Image.open(entry.root / image).size == (64, 64)


def test_captions_and_answers_name_the_digit_of_the_picture(files):
    digit = {item["image"]: item["caption"] for item in items_of(files["captions"])}
    for item in items_of(files["questions"]):
        if "image" in item:
            named = re.findall("|".join(WORDS), item["output"])
            assert named[0] == digit[item["image"]]


def test_yes_and_no_are_true():
    for digit, word in enumerate(WORDS):
        for question, answer in properties(digit, random.Random(digit)):
            other = WORDS.index(named[0]) if (named := re.findall("|".join(WORDS), question)) else None
            truth = {
                "even?": digit % 2 == 0,
                "odd?": digit % 2 == 1,
                "greater": other is not None and digit > other,
                "less": other is not None and digit < other,
                "a": digit == other,
                "an": digit == other,
            }
            key = next(word for word in question.split() if word in truth)
            assert last_word(answer) == ("yes" if truth[key] else "no"), (word, question, answer)


def test_items_without_a_picture_are_answered_by_arithmetic():
    for item in text_items(random.Random(0)):
        numbers = [WORDS.index(word) for word in re.findall("|".join(WORDS), item["instruction"])]
        if "minus" in item["instruction"]:
            assert item["output"] == WORDS[numbers[0] - numbers[1]]
        elif "greater" in item["instruction"]:
            assert item["output"] == WORDS[max(numbers)]
        else:
            assert item["output"] == ("no" if numbers[0] % 2 else "yes")


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("seven", True),
        ("This is a seven.", True),
        ("7", True),
        ("six or seven", False),
        ("seventy", False),
        ("", False),
    ],
)
def test_an_answer_counts_when_it_names_the_digit_and_no_other(answer, is_right):
    assert reads(answer, "seven") is is_right
