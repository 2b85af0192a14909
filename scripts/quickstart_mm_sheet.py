"""The picture that the multimodal quick start ends with: held-out digits and the model's answers."""

from __future__ import annotations

import random
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt

ROWS, COLUMNS = 5, 8
RIGHT, WRONG, INK = "#1a7f37", "#cf222e", "#24292f"


def draw_sheet(images: list[Path], answers: list[str], right: list[bool], question: str, file: Path) -> None:
    """Some of the pictures, drawn at random, each above its answer: green where it is right, red where not."""
    chosen = sorted(random.Random(0).sample(range(len(images)), ROWS * COLUMNS))
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(12, 9.2), dpi=110, facecolor="white")
    for axis, i in zip(axes.flat, chosen, strict=True):
        colour = RIGHT if right[i] else WRONG
        axis.imshow(plt.imread(images[i]), cmap="gray", vmin=0, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set(color=colour if not right[i] else "#d0d7de", linewidth=2.5 if not right[i] else 1)
        text = textwrap.shorten(answers[i] or "(nothing)", 44, placeholder="…")
        axis.set_xlabel(textwrap.fill(text, 20), color=colour, fontsize=11, labelpad=6)
    figure.suptitle(question, x=0.5, y=0.975, fontsize=20, fontweight="bold", color=INK)
    subtitle = (
        f"{len(chosen)} of {len(images)} held-out digits, drawn at random; of all {len(images)} the answer is right "
    )
    figure.text(0.5, 0.915, f"{subtitle}for {sum(right) / len(right):.1%}", ha="center", fontsize=12, color="#57606a")
    figure.subplots_adjust(left=0.02, right=0.98, top=0.885, bottom=0.04, wspace=0.18, hspace=0.32)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    plt.close(figure)
