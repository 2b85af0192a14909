"""An estimate in words and tables."""

from __future__ import annotations

from typing import Optional

from accessory.estimate.cases import Estimator
from accessory.estimate.parts import GIB, OVERHEAD, Estimate
from accessory.tuning.recipe import count_trainables

GPU_SIZES = (8, 12, 16, 24, 40, 48, 80, 141)
LINES = (  # (what it is called, its name in a training step, in an answer)
    ("base", "base", "base"),
    ("trainables", "trainables", "trainables"),
    ("gradients", "gradients", None),
    ("optimizer", "optimizer", None),
    ("workspace", "workspace", "workspace"),
    ("key/value cache", None, "cache"),
    ("decoder", None, "decoder"),
    ("activations", "activations", "activations"),
    ("  + logits, loss", "loss", "logits"),
    ("  or + within a block", "backward", "prompt"),
    ("or instead images", "images", "images"),
)


def table(trainings: dict[str, Estimate], generation: Estimate) -> str:
    lines = [f"  {'GiB':<22}" + "".join(f"{name:>18}" for name in (*trainings, "answering"))]
    for label, train, answer in LINES:
        values = [each.parts.get(train) for each in trainings.values()] + [generation.parts.get(answer)]
        if any(values):
            lines.append(f"  {label:<22}" + "".join(f"{_gib(value):>18}" for value in values))
    peaks = [each.peak for each in (*trainings.values(), generation)]
    return "\n".join([*lines, f"  {'peak':<22}" + "".join(f"{_gib(peak):>18}" for peak in peaks)])


def _gib(size: Optional[int]) -> str:
    return "-" if size is None else f"{size / GIB:.2f}"


def title(estimator: Estimator) -> str:
    config, model = estimator.config, estimator.model(estimator.asked)
    counts = count_trainables(model)
    kinds = " + ".join(f"{count:,} {kind}" for kind, count in counts.items())
    method = "int4, as stored" if estimator.described.stored else config.quantization.method.value
    c, train, gpus = model.config, config.train, f"{config.ranks} GPU{'s' if config.ranks > 1 else ''}"
    count = estimator.step(estimator.asked).images
    images = f" with {count} image{'s' if count > 1 else ''} of {model.image_words} positions" if count else ""
    return "\n".join(
        (
            f"{estimator.described.name}: {c.num_hidden_layers} blocks of {c.hidden_size}, quantization {method}",
            f"  trains {config.recipe.name}: {kinds} = {sum(counts.values()):,}",
            f"  {train.batch_size} rows x {config.data.max_words} tokens a micro-batch{images}, "
            f"{train.precision.value}, {gpus}, {config.strategy.data_parallel.value}",
            f"  answers {config.prompts} x ({config.prompt} + {config.new_tokens}) tokens",
            f"  fast: {estimator.fast(estimator.asked).line()}",
        )
    )


def chosen(estimator: Estimator, memory: Optional[int]) -> str:
    """What the marked column is."""
    if (told := estimator.config.train.checkpointing) is not None:
        away = ", inputs of blocks in host memory" if estimator.asked.offloaded else ""
        return f"as asked: train.checkpointing={str(told).lower()}{away}"
    if memory is None:
        return (
            "on a GPU that has the memory; with less, attention's outputs are recomputed, then inputs of blocks go to "
            "host memory, then as few blocks are recomputed as fit (train.checkpointing unset)"
        )
    return f"the least recomputing that fits into {memory / GIB:.4g} GiB, if any does (train.checkpointing unset)"


def verdict(estimator: Estimator, memory: int) -> tuple[str, list[tuple[str, int]]]:
    """In words, and the suggestions where it does not fit."""
    available, peak = memory - OVERHEAD, estimator.train(estimator.asked).peak
    left = f"{memory / GIB:.4g} GiB, of which tensors can take {available / GIB:.2f}"
    if peak <= available:
        spare = f"; {(available - peak) / GIB:.2f} GiB to spare"
        host = f" ({estimator.on_host() / GIB:.1f} GiB of it)" if estimator.on_host() >= GIB / 20 else ""
        return f"{left}: training fits, with {estimator.saving(estimator.asked)}{host}{spare}", []
    found = list(estimator.suggestions(available))
    lines = [f"{left}: training does not fit ({peak / GIB:.2f} GiB). Instead:"]
    for what, would in found:
        lines.append(f"  {what:<52}{would / GIB:>9.2f} GiB  {'fits' if would <= available else 'does not fit'}")
    return "\n".join(lines), found


def sizes_table(estimator: Estimator, answering: int) -> str:
    lines = [f"  {'GPU memory':<22}{'training':>32}{'answering':>16}"]
    for size in GPU_SIZES:
        available = size * GIB - OVERHEAD
        answers = "fits" if answering <= available else "does not fit"
        lines.append(f"  {size:>3} GiB{'':<15}{_training(estimator, available):>32}{answers:>16}")
    return "\n".join(lines)


def _training(estimator: Estimator, available: int) -> str:
    case = estimator.fitting(estimator.asked, available, estimator.config.train.checkpointing)
    return estimator.saving(case) if estimator.train(case).peak <= available else "does not fit"
