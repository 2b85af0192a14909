"""Does the fast path learn what the plain one does? Trains with fast=off and fast=on, same data, same seed, and lays
the loss curves over each other.

    python scripts/overlay.py --pretrained_path quickstart/model --data_config quickstart/data/train.yaml --output out

Runs of the same settings on 16-bit hardware drift apart by rounding alone; how far is what a third run shows, plain
again with the items of a step split over micro-batches (another order of additions, nothing else). Writes
overlay.png and overlay.json. What follows `--` goes to main_finetune.py, for example `-- recipe=norm_bias_lora`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import _checkout  # noqa: F401

from accessory.callbacks import read_series, smooth

MAIN = Path(__file__).resolve().parent.parent / "main_finetune.py"


def train(args: argparse.Namespace, name: str, settings: list[str]) -> list[float]:
    """The losses of one run."""
    folder = args.output / name
    command = [
        sys.executable, MAIN, "--quant", "--only_save_trainable", "--pretrained_path", args.pretrained_path,
        "--data_config", args.data_config, "--output_dir", folder, f"train.max_steps={args.steps}",
        f"--epochs={args.epochs}", *settings, *args.rest,
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True)
    return read_series(folder, "loss")[1]


def furthest(curve: list[float], reference: list[float]) -> tuple[float, float]:
    """Largest and mean distance of two curves, smoothed."""
    apart = [abs(a - b) for a, b in zip(smooth(curve), smooth(reference), strict=True)]
    return max(apart), sum(apart) / len(apart)


def draw(curves: dict[str, list[float]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (name, losses), style in zip(curves.items(), ("-", "--", ":"), strict=False):
        axes.plot(range(1, len(losses) + 1), smooth(losses), style, label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per answer token (nats), smoothed")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_path", required=True)
    parser.add_argument("--data_config", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=10, help="as many as the steps need")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("rest", nargs="*", help="for main_finetune.py")
    args = parser.parse_args()
    whole, split = [f"--batch_size={args.batch_size}"], [f"--batch_size={args.batch_size // 2}", "--accum_iter=2"]
    curves = {
        "plain": train(args, "plain", ["fast=off", *whole]),
        "fast": train(args, "fast", ["fast=on", *whole]),
        "plain, two micro-batches": train(args, "split", ["fast=off", *split]),
    }
    draw(curves, args.output / "overlay.png")
    distances = {name: furthest(losses, curves["plain"]) for name, losses in curves.items() if name != "plain"}
    (args.output / "overlay.json").write_text(json.dumps({"losses": curves, "distances": distances}))
    for name, (largest, mean) in distances.items():
        print(f"{name}: at most {largest:.4f}, on average {mean:.4f} nats from plain, over {args.steps} steps")


if __name__ == "__main__":
    main()
