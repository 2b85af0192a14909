"""Speed and memory on random weights of LLaMA2's shapes: our recipes beside the peers (transformers + PEFT +
bitsandbytes; litgpt and unsloth where they can be imported), each in its own process, same shapes, same tokens, in
turns of a few steps; medians and quartiles.

    python scripts/benchmark.py --preset issue --profile --output results.json         # what docs/performance.md shows
    python scripts/benchmark.py --models 7b --recipes norm_bias norm_bias_lora --batches 4 16 --length 512
    python scripts/benchmark.py --models 13b --images nf4 16bit --systems ours --checkpointing yes --task both
    python scripts/benchmark.py --models tiny --steps 5 --batches 2 --length 64        # anywhere, in a minute
    python scripts/benchmark.py --report docs/performance.md results.json              # the tables of these results

A training step is forward, backward, clipping and AdamW on one micro-batch in which every token of text is learnt
(--task lengths: rows of the lengths of real data, in which the answers are); generation answers prompts of `length`
tokens with 64 more. With --images every row has an image of BLIP-2's size, counted in the length; the flag's value is
how the vision model is stored. Peak memory is what a process has allocated on the GPU, its model included (on a CPU,
all that the process ever held).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import benchmark_report as report
from benchmark_cases import BASES, SHAPES, SYSTEMS, Case, complete, issue_preset
from benchmark_driver import measure_all
from benchmark_lengths import DEFAULT as LENGTHS
from benchmark_machine import describe

WHICH = {"no": [False], "yes": [True], "both": [False, True]}
TASKS = {"train": ["train"], "generate": ["generate"], "both": ["train", "generate"], "lengths": ["lengths"]}


def main() -> None:
    options = arguments()
    if options.report is not None:
        report.write(options.report, options.results)
        return
    begun = time.monotonic()
    cases = chosen(options)
    if not cases:
        raise SystemExit("no case is left: the preset has none with these --models, --recipes and --bases")
    logs = options.output.with_suffix(".logs") if options.output is not None else None
    print(report.HEAD, flush=True)
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": "python scripts/benchmark.py " + shlex.join(repeatable(sys.argv[1:])),
        "machine": describe(cases, options.commit),
        "results": [],
    }
    deadline = float("inf") if options.minutes is None else begun + 60 * options.minutes
    for rows in measure_all(cases, logs, deadline, options.profile):
        results["results"] += rows
        for row in rows:
            print(report.line(row), flush=True)
        if options.output is not None:  # after every case: a run that is cut short keeps what it has
            options.output.write_text(json.dumps(results, indent=1) + "\n")


def repeatable(words: list[str]) -> list[str]:
    """The command's words, less where its results went and which commit it said it was."""
    left, skipped = [], False
    for word in words:
        name, has_value, _ = word.partition("=")
        if not skipped and name not in ("--output", "--commit"):
            left.append(word)
        skipped = not skipped and name in ("--output", "--commit") and not has_value
    return left


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases that the flags ask for; with a preset, those of it that they leave."""
    import torch

    if options.profile and not torch.cuda.is_available():
        raise SystemExit("--profile shows a GPU's time, and torch sees none here")
    compiled = not options.no_compile and torch.cuda.is_available()
    if options.preset is not None:
        cases = issue_preset(options.systems, compiled)
        kept = {"model": options.models, "recipe": options.recipes, "base": options.bases}
        cases = [case for case in cases if all(named is None or case[key] in named for key, named in kept.items())]
    else:
        cases = [
            complete({"task": task, "model": model, "recipe": recipe, "base": base, "images": images, "batch": batch,
                      "length": options.length, "checkpointing": checkpointing, "compile": compiled,
                      "offload": checkpointing or (options.offload and compiled), "keep_attention": kept},
                     options.systems, options.steps, options.warmup)
            for model in options.models or ["tiny"] for recipe in options.recipes or ["norm_bias", "norm_bias_lora"]
            for base in options.bases or ["nf4"] for images in options.images for task in TASKS[options.task]
            for batch in options.batches
            for checkpointing in WHICH[options.checkpointing]
            for kept in ([False] if checkpointing else WHICH[options.keep_attention])
        ]  # fmt: skip
    for case in cases:
        case |= {"lengths": str(options.lengths.resolve())} if case["task"] == "lengths" else {}
    return [case for case in cases if case["systems"]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["issue"], default=None, help="the project's own list of cases")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=None)
    parser.add_argument("--recipes", nargs="+", choices=["norm_bias", "norm_bias_lora", "lora"], default=None)
    parser.add_argument("--bases", nargs="+", choices=BASES, default=None, help="nf4, or rtn: int4")
    parser.add_argument("--batches", nargs="+", type=int, default=[4])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--images", nargs="+", choices=["16bit", "nf4"], default=[None], help="an image in every row")
    parser.add_argument("--task", choices=TASKS, default="train")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lengths", type=Path, default=LENGTHS, help="for --task lengths: see benchmark_lengths.py")
    parser.add_argument("--checkpointing", choices=["no", "yes", "both"], default="no")
    parser.add_argument(
        "--keep_attention", choices=["no", "yes", "both"], default="yes",
        help="fast.keep_attention, without checkpointing (ours alone, if no)",
    )  # fmt: skip
    parser.add_argument("--offload", action="store_true", help="fast.offload, without checkpointing too (ours alone)")
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=None, help="begin no case after so many")
    parser.add_argument("--profile", action="store_true", help="a GPU's time by kind of kernel, of one step more")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures; logs go beside it")
    parser.add_argument("--commit", default=None, help="what was measured, where git cannot tell")
    parser.add_argument("--report", type=Path, default=None, help="write the tables of `results` into this document")
    parser.add_argument("results", nargs="*", type=Path, help="JSON files of --output, for --report")
    return parser.parse_args()


if __name__ == "__main__":
    main()
