"""The comparison as horizontal bars, best on top: perplexity, and beside it what it costs in memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accessory.files import atomic_file

REFERENCE = "16bit"
COLORS = {"16bit": "#5b6770", "int8": "#8fa3b0", "nf4": "#e0a030", "rtn": "#c8553d", "awq": "#3d8f7a",
          "gptq": "#3f6fb5", "autoround": "#7a4fa3"}  # fmt: skip
GREY = "#6b6b6b"
WIDE = 8  # with a worst perplexity of more than so many times the best, the axis is logarithmic
AGAINST, MEMORY, SECONDS = 1.1, 1.23, 1.36  # right ends of the columns beside the bars, in widths of the plot


def draw(rows: Sequence[Any], file: Path, title: str) -> None:
    """rows: of `compare`; those without figures are named below the bars."""
    from matplotlib.figure import Figure

    done = sorted((row for row in rows if row.ppl is not None), key=lambda row: row.ppl, reverse=True)
    failed = ", ".join(row.title for row in rows if row.ppl is None)
    figure = Figure(figsize=(10, 1.7 + 0.5 * len(done)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(done)), [row.ppl for row in done], height=0.62, color=[_color(row.name) for row in done])
    worst, best = done[0].ppl, done[-1].ppl
    if worst > WIDE * best:
        axes.set_xscale("log")
        axes.set_xlim(best / 2, worst * (2 * worst / best) ** 0.15)
    else:
        axes.set_xlim(0, worst * 1.12)
    for place, row in enumerate(done):
        shown = f"{row.ppl:.2f}" if row.ppl < 1000 else f"{row.ppl:,.0f}"
        axes.annotate(shown, (row.ppl, place), (6, 0), textcoords="offset points", va="center", fontweight="bold")
        _beside(axes, MEMORY, place, f"{_short(row.memory_bytes / 2**20)} MiB")
        _beside(axes, SECONDS, place, "-" if row.seconds is None else f"{_short(row.seconds)} s")
    reference = next((row.ppl for row in done if row.name == REFERENCE), None)
    if reference is not None:
        axes.axvline(reference, color="black", linestyle="--", linewidth=1, label=f"16 bit: {reference:.2f}")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, borderaxespad=0, fontsize=9)
        for place, row in enumerate(done):
            _beside(axes, AGAINST, place, f"{row.ppl / reference - 1:+.1%}")
    for end, heading in ((AGAINST, "vs 16 bit"), (MEMORY, "weights"), (SECONDS, "quantizing")):
        if end != AGAINST or reference is not None:
            _beside(axes, end, len(done) - 0.35, heading, fontsize=9)
    axes.set_yticks(range(len(done)), [row.title for row in done])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.set_xlabel("perplexity (lower is better)" + (f"\nfailed: {failed}" if failed else ""))
    figure.suptitle(title, fontweight="bold")
    with atomic_file(file) as partial:
        figure.savefig(partial, dpi=150, format="png", bbox_inches="tight", pad_inches=0.2)


def _color(name: str) -> str:
    return COLORS.get(name.split("-")[0], GREY)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def _beside(axes: Any, end: float, place: float, text: str, **style: Any) -> None:
    axes.text(end, place, text, transform=axes.get_yaxis_transform(), ha="right", va="center", color=GREY, **style)
