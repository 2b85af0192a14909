"""make quickstart-mm: a multimodal model from a language model and a vision part that has seen nothing, on a CPU.

Stage 1, alignment: vision model, Q-Former and projector learn on captions what the frozen NF4 language model can read.
Stage 2, QPEFT: norms, biases and LoRA learn to answer questions, the vision model frozen as well. Both are the command
that a user would type. Then held-out digits are asked, with controls that must fail.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from quickstart_steps import ROOT, WORK, megabytes, shown, step, train

sys.path.insert(0, str(ROOT))

import torch
from quickstart_mm_data import QUESTION, WORDS, build_digits, last_word
from quickstart_mm_sheet import draw_sheet
from quickstart_mm_vision import make_vision
from quickstart_model import prepare_model

import accessory
from accessory.assemble import assemble
from accessory.config import LlamaType, ModelConfig, PromptType, QuantizationConfig, QuantMethod, RecipeConfig
from accessory.data.prompts import format_prompt
from accessory.models.qformer import QFormerLlama
from accessory.precision import default_dtype

MODEL, VISION, DIGITS, RUNS = WORK / "model", WORK / "vision", WORK / "digits", WORK / "mm"
ALIGNED, TUNED, SHEET = RUNS / "aligned", RUNS / "tuned", RUNS / "answers.png"
SHARED = ["--quant", "--only_save_trainable", "--llama_type", "llama_qformerv2_peft"]
ALIGNMENT = [
    "recipe=projector", "recipe.vision=true", "--max_words", "32", "--batch_size", "32", "--lr", "1e-3",
    "--min_lr", "1e-4", "--warmup_epochs", "0.2", "--epochs", "3", "train.val_interval=0.5",
]  # fmt: skip
TUNING = [
    "recipe=norm_bias_lora", "--max_words", "96", "--batch_size", "24", "--lr", "1e-3",
    "--min_lr", "1e-4", "--warmup_epochs", "0.02", "train.max_steps=100",
]  # fmt: skip
CPU = torch.device("cpu")
BATCH = 64  # questions asked at once
REQUIRED, CHANCE = 0.90, 0.20  # of the digits read right: at least, and at most where a control leaves only chance


def main() -> None:
    parser = argparse.ArgumentParser(description="The multimodal quick start", allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="of the vision part's random weights and both stages")
    seed = parser.parse_args().seed
    started = time.monotonic()
    step("1/6", "language model: SmolLM2-135M-Instruct (Apache-2.0)")
    prepare_model(MODEL)
    print(f"{shown(MODEL)}: {megabytes(MODEL / 'model.safetensors')} in 16 bit, NF4 when loaded")
    step("2/6", "vision part: a small ViT and Q-Former in BLIP-2's format, random weights")
    shutil.rmtree(RUNS, ignore_errors=True)
    parameters = make_vision(VISION, seed)
    print(f"{shown(VISION)}: {parameters:,} parameters, {megabytes(VISION / 'model.safetensors')}")
    step("3/6", "data: scikit-learn's 1,797 handwritten digits; the file's end is held out")
    data = build_digits(DIGITS)
    step("4/6", "stage 1, alignment: captions; vision part and projector train, the NF4 language model is frozen")
    seconds = {"alignment": run_stage(ALIGNMENT, "captions", data, [MODEL], ALIGNED, seed)}
    step("5/6", "stage 2, QPEFT: questions with and without a picture; norms, biases and LoRA train")
    seconds["tuning"] = run_stage(TUNING, "questions", data, [MODEL, ALIGNED], TUNED, seed)
    step("6/6", "asking about the test digits")
    began = time.monotonic()
    problems = examine(json.loads(data["test"].read_text()), seed)
    seconds["asking"] = time.monotonic() - began
    tell(data, seconds, started)
    if problems:
        sys.exit("\n".join(problems))


def run_stage(
    settings: list[str], kind: str, data: dict[str, Path], folders: list[Path], output: Path, seed: int
) -> float:
    vision = [] if ALIGNED in folders else [f"model.vision_path={shown(VISION)}"]
    files = ["--data_config", data[kind], f"data.val_config={shown(data[f'{kind}_val'])}"]
    where = ["--pretrained_path", *folders, "--output_dir", output, "--seed", str(seed)]
    seconds = train(*SHARED, *settings, *vision, *files, *where)
    result = output / "trainable.safetensors"
    frozen = output / "frozen.safetensors"
    print(f"{shown(result)}: {megabytes(result)}", end="")
    print(f"; the frozen vision part beside it: {megabytes(frozen)}" if frozen.exists() else "", flush=True)
    return seconds


def examine(test: list[dict[str, str]], seed: int) -> list[str]:
    """Ask, print a table as it grows, draw the sheet; returns what is not as it has to be."""
    images = [DIGITS / "images" / item["image"] for item in test]
    digits = [item["digit"] for item in test]
    mixed = random.Random(seed).sample(images, len(images))
    problems = []

    def row(name: str, outcomes: Iterable[bool], lowest: float = 0.0, highest: float = 1.0) -> None:
        outcomes = list(outcomes)
        value = sum(outcomes) / len(outcomes)
        print(f"{name:<50}{value:>8.1%}", flush=True)
        if not lowest <= value <= highest:
            problems.append(f"{name}: {value:.1%} right, not {lowest:.0%} to {highest:.0%}")

    print(f"{f'{len(test)} held-out digits, one question each':<50}{'right':>8}")
    tuned = load(MODEL, TUNED)
    answers = ask(tuned, [QUESTION] * len(test), images)
    right = list(map(reads, answers, digits))
    row(QUESTION, right, lowest=REQUIRED)
    verdicts = ask(tuned, [item["question"] for item in test], images)
    row(
        "questions with yes or no",
        (last_word(said) == item["verdict"] for said, item in zip(verdicts, test, strict=True)),
    )
    row("images shuffled among the questions", read(tuned, mixed, digits), highest=CHANCE)
    give_image_part(tuned, untrained(seed))
    row("stage 1 undone: image part as it was before", read(tuned, images, digits), highest=CHANCE)
    row("both undone: base and untrained image part", read(untrained(seed), images, digits), highest=CHANCE)
    row("stage 2 undone: base and stage 1", read(load(MODEL, ALIGNED), images, digits))
    draw_sheet(images, answers, right, QUESTION, SHEET)
    return problems


def load(*folders: Path) -> QFormerLlama:
    return accessory.load_model([str(folder) for folder in folders], quantization="nf4", dtype=default_dtype(CPU))


def untrained(seed: int) -> QFormerLlama:
    """The model as stage 1 finds it: base, random vision part, fresh projector."""
    torch.manual_seed(seed)
    config = ModelConfig(LlamaType.llama_qformerv2_peft, pretrained_path=[str(MODEL)], vision_path=str(VISION))
    recipe = RecipeConfig("projector", norm=False, bias=False, projector=True, vision=True)
    quantization = QuantizationConfig(QuantMethod.nf4)
    return assemble(config, quantization, recipe, CPU, default_dtype(CPU))


def give_image_part(model: QFormerLlama, other: QFormerLlama) -> None:
    """Put `other`'s vision part, projector and image tags into `model`."""
    for name in ("qformer", "qformer_proj", "start_img", "end_img"):
        setattr(model, name, getattr(other, name))


def ask(model: QFormerLlama, questions: list[str], images: list[Path]) -> list[str]:
    prompts = [format_prompt({"instruction": question}, PromptType.alpaca) for question in questions]
    answers = []
    for i in range(0, len(prompts), BATCH):
        answers += model.generate(prompts[i : i + BATCH], images=images[i : i + BATCH], max_new_tokens=16)
    return [answer.strip() for answer in answers]


def read(model: QFormerLlama, images: list[Path], digits: list[str]) -> list[bool]:
    """Whether each image is read as its digit."""
    return [reads(*pair) for pair in zip(ask(model, [QUESTION] * len(images), images), digits, strict=True)]


def reads(answer: str, digit: str) -> bool:
    """Whether the answer names this digit, as word or figure, and no other."""
    named = {number for number, word in enumerate(WORDS) if re.search(rf"\b({word}|{number})\b", answer.lower())}
    return named == {WORDS.index(digit)}


def tell(data: dict[str, Path], seconds: dict[str, float], started: float) -> None:
    """Where things are, how long they took, how to ask."""
    item = json.loads(data["test"].read_text())[0]
    print(f"\nanswers: {shown(SHEET)}   loss curves: {shown(ALIGNED)}/curves.png, {shown(TUNED)}/curves.png")
    print(f"ask it (a picture of {item['digit']}):")
    print(f"  .venv/bin/python demos/single_turn_mm.py --pretrained_path {shown(MODEL)} {shown(TUNED)} --quant \\")
    print(f"    --image {shown(DIGITS)}/images/{item['image']} --prompt '{QUESTION}'")
    parts = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
    print(f"{(time.monotonic() - started) / 60:.1f} minutes ({parts})")


if __name__ == "__main__":
    main()
