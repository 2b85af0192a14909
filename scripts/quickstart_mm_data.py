"""The multimodal quick start's data: real handwritten digits, with questions and answers about them in words.

scikit-learn brings 1,797 digits of 8 x 8 pixels (the test half of UCI's "Optical Recognition of Handwritten Digits").
The split is by position: the file seems to go from writer to writer, so its end is written by other hands.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from quickstart_data import write_whole
from sklearn.datasets import load_digits

Item = dict[str, str]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Where another writer seems to begin: with 0 to 9 three times before the order gets mixed.
VALIDATION_START, TEST_START = 1287, 1415
SIDE = 64  # pixels of the pictures written
QUESTION = "Which digit is this?"
SENTENCE = ("Which digit is this?", "What is on the image?", "Read the digit.", "Which number was written here?")
ONE_WORD = ("Which digit is this? Answer in one word.", "Name the digit in one word.")
WARPS = 3  # distorted copies of each training picture
TEXT_ITEMS = 600


def build_digits(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Write pictures, captions (for alignment) and questions into `folder`; returns the files by name.

    captions, captions_val, questions and questions_val are data YAMLs; test is the file of `held_out_items`.
    """
    folder, rng = Path(folder).absolute(), random.Random(seed)
    digits = write_pictures(folder / "images", rng)
    content = {
        "captions": captions(digits["train"]),
        "captions_val": captions(digits["val"]),
        "questions": image_items(digits["train"], rng) + text_items(rng),
        "questions_val": image_items(digits["val"], rng),
        "test": held_out_items(digits["test"], rng),
    }
    files = {}
    for name, items in content.items():
        files[name] = folder / f"{name}.json"
        write_whole(files[name], json.dumps(items, indent=1) + "\n")
        print(f"{name}: {len(items):,} items in {files[name]}")
        if name != "test":
            files[name] = write_config(files[name], are_captions=name.startswith("captions"))
    return files


def write_pictures(folder: Path, rng: random.Random) -> dict[str, list[tuple[str, int]]]:
    """All digits as PNG files, those of training with distorted copies; returns (file name, digit) by split."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    splits: dict[str, list[tuple[str, int]]] = {"train": [], "val": [], "test": []}
    for number, (levels, digit) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        split = "train" if number < VALIDATION_START else "val" if number < TEST_START else "test"
        pictures = {f"{number:04d}.png": upscale(levels)}
        for copy in range(WARPS if split == "train" else 0):
            pictures[f"{number:04d}-{copy + 1}.png"] = warp(upscale(levels), rng)
        for name, picture in pictures.items():
            save(picture, folder / name)
            splits[split].append((name, digit))
    return splits


def upscale(levels: np.ndarray) -> Image.Image:
    """levels: [8, 8], 0 (paper) to 16 (ink) -> a gray picture, dark on white, with a margin."""
    return Image.fromarray(np.uint8(255 - np.pad(levels, 1) * 255 / 16)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def warp(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The same digit in another hand: turned, slanted, resized and shifted a little."""
    angle, slant, size = math.radians(rng.uniform(-12, 12)), rng.uniform(-0.15, 0.15), rng.uniform(0.9, 1.1)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = turn @ np.array([[1, slant], [0, 1]]) / size
    centre = np.array([SIDE / 2, SIDE / 2])
    shift = centre - matrix @ (centre + [rng.uniform(-0.06, 0.06) * SIDE for _ in range(2)])
    rows = np.column_stack((matrix, shift)).flatten().tolist()
    return picture.transform(picture.size, Image.Transform.AFFINE, rows, Image.Resampling.BICUBIC, fillcolor=255)


def save(picture: Image.Image, file: Path) -> None:
    partial = file.with_suffix(".partial")
    picture.save(partial, format="png")
    partial.replace(file)


def captions(digits: list[tuple[str, int]]) -> list[Item]:
    return [{"image": name, "caption": WORDS[digit]} for name, digit in digits]


def image_items(digits: list[tuple[str, int]], rng: random.Random) -> list[Item]:
    """A question about each picture: which digit it is, or whether something is true of it."""
    items = []
    for name, digit in digits:
        asked = [which(digit, rng)] if rng.random() < 0.4 else list(properties(digit, rng))
        question, answer = rng.choice(asked)
        items.append({"image": name, "instruction": question, "output": answer})
    return items


def held_out_items(digits: list[tuple[str, int]], rng: random.Random) -> list[Item]:
    """A picture, the digit's word, and one question with the yes or no that answers it."""
    items = []
    for name, digit in digits:
        question, answer = rng.choice(list(properties(digit, rng)))
        items.append({"image": name, "digit": WORDS[digit], "question": question, "verdict": last_word(answer)})
    return items


def last_word(answer: str) -> str:
    return answer.rstrip(".").rpartition(" ")[2].lower()


def which(digit: int, rng: random.Random) -> tuple[str, str]:
    word = WORDS[digit]
    question = rng.choice(SENTENCE + ONE_WORD)
    return question, word if question in ONE_WORD else f"This is {article(word)} {word}."


def properties(digit: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Questions with yes or no. The digit comes first in the answer: what was read, then what follows from it."""
    other = rng.choice([d for d in range(10) if d != digit])
    guess = rng.choice((digit, other))
    questions = {
        "Is this digit even?": digit % 2 == 0,
        "Is this digit odd?": digit % 2 == 1,
        f"Is it greater than {WORDS[other]}?": digit > other,
        f"Is it less than {WORDS[other]}?": digit < other,
        f"Is this {article(WORDS[guess])} {WORDS[guess]}?": guess == digit,
    }
    for question, holds in questions.items():
        yield question, f"This is {article(WORDS[digit])} {WORDS[digit]}, so {yes(holds)}."


def text_items(rng: random.Random) -> list[Item]:
    """Questions without a picture, to be mixed with the others in one batch."""
    items = []
    for _ in range(TEXT_ITEMS):
        a, b = sorted(rng.sample(range(10), 2))
        question, answer = rng.choice(
            (
                (f"What is {WORDS[b]} minus {WORDS[a]}?", WORDS[b - a]),
                (f"Which number is greater, {WORDS[a]} or {WORDS[b]}?", WORDS[b]),
                (f"Is {WORDS[a]} even?", yes(a % 2 == 0)),
            )
        )
        items.append({"instruction": question, "output": answer})
    return items


def yes(holds: bool) -> str:
    return "yes" if holds else "no"


def article(word: str) -> str:
    return "an" if word == "eight" else "a"


def write_config(file: Path, are_captions: bool) -> Path:
    """Write the YAML that names a data file and the folder of its pictures; returns it."""
    how = "preprocess: 'caption'" if are_captions else "prompt_type: 'alpaca'"
    quoted, root = (json.dumps(str(path), ensure_ascii=False) for path in (file, file.parent / "images"))
    config = file.with_suffix(".yaml")
    write_whole(config, f"META:\n  - path: {quoted}\n    root: {root}\n    type: 'image_text'\n    {how}\n")
    return config
