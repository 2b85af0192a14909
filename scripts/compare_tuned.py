"""Which base to fine-tune on: the same data and steps on each, several recipes and seeds, perplexity on a test set.

    python scripts/compare_tuned.py --bases 16bit=model nf4=model rtn=int4/rtn autoround=int4/autoround \\
        --recipes lora norm_bias norm_bias_lora --seeds 0 1 2 --data_config train.yaml --test_config test.yaml \\
        --output compared-tuned --lr norm_bias=4e-3 --jobs 8 -- --max_words 256 --batch_size 24 train.max_steps=350

A base is NAME=FOLDER; the name 16bit trains recipe=lora alone (the usual way to fine-tune, and the mark to reach), nf4
quantizes its folder on load, all others keep what their folder holds. What follows -- goes to main_finetune.py as it
is. Every run is main_finetune.py and scripts/evaluate.py in processes of their own, `jobs` at a time, spread over the
GPUs there are; runs that are finished are not repeated. Writes tuned.json, tuned.txt and tuned.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "16bit"


@dataclass(frozen=True)
class Run:
    base: str
    folder: str
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.base}-{self.recipe}-{self.seed}"

    @property
    def quantization(self) -> list[str]:
        return ["--quant"] if self.base == "nf4" else []


def main() -> None:
    options = parse()
    runs = [
        Run(name, folder, recipe, seed)
        for name, _, folder in (base.partition("=") for base in options.bases)
        for recipe in options.recipes
        if (recipe == "lora") == (name == REFERENCE)
        for seed in options.seeds
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    found: dict[Run, float] = {}
    gpus: SimpleQueue[str | None] = SimpleQueue()  # a thread holds one for its run
    for job in range(options.jobs):
        gpus.put(str(job % torch.cuda.device_count()) if torch.cuda.is_available() else None)
    with ThreadPoolExecutor(options.jobs) as pool:
        pending = {pool.submit(perplexity_of, run, options, gpus): run for run in runs}
        for future in tqdm(as_completed(pending), total=len(runs), unit="run"):
            found[pending[future]] = future.result()
    report(found, options)


def parse() -> argparse.Namespace:
    words, more = sys.argv[1:], []
    if "--" in words:
        words, more = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--recipes", nargs="+", default=["lora", "norm_bias", "norm_bias_lora"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data_config", required=True, help="data YAML to train on")
    parser.add_argument("--test_config", required=True, help="data YAML whose answers are measured")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs and the tables")
    parser.add_argument("--lr", nargs="*", default=[], metavar="RECIPE=LR", help="learning rate of a recipe")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args(words)
    options.lr = dict(pair.split("=") for pair in options.lr)
    options.more = more
    for base in options.bases:
        if not Path(base.partition("=")[2]).is_dir():
            parser.error(f"--bases {base}: expected NAME=FOLDER, and the folder must be there")
    return options


def perplexity_of(run: Run, options: argparse.Namespace, gpus: SimpleQueue[str | None]) -> float:
    """Train and measure the answers of the test data, unless that is done."""
    figures = options.output / f"{run.name}.json"
    if not figures.exists():
        gpu = gpus.get()
        try:
            train_and_measure(run, options, gpu, figures)
        finally:
            gpus.put(gpu)
    return json.loads(figures.read_text())["ppl"]


def train_and_measure(run: Run, options: argparse.Namespace, gpu: str | None, figures: Path) -> None:
    out = options.output / run.name
    rate = ["--lr", options.lr[run.recipe]] if run.recipe in options.lr else []
    max_words = options.more[options.more.index("--max_words") + 1] if "--max_words" in options.more else "512"
    if not (out / "trainable.safetensors").exists():
        command(
            run, options, gpu, "main_finetune.py", "--pretrained_path", run.folder, "--only_save_trainable",
            *run.quantization, f"recipe={run.recipe}", "--data_config", options.data_config, "--seed", str(run.seed),
            "--output_dir", str(out), *rate, *options.more,
        )  # fmt: skip
    command(
        run, options, gpu, "scripts/evaluate.py", "--pretrained_path", run.folder, str(out), *run.quantization,
        "--data_config", options.test_config, "--seqlen", max_words, "--batch_size", "24", "--output", str(figures),
    )  # fmt: skip


def command(run: Run, options: argparse.Namespace, gpu: str | None, script: str, *words: str) -> None:
    """A script in a process of its own; its output goes to a file beside the run."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if gpu is not None:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = chosen.split(",")[int(gpu)] if chosen else gpu
    with (options.output / f"{run.name}.log").open("a") as log:
        result = subprocess.run(
            [sys.executable, str(ROOT / script), *words], stdout=log, stderr=subprocess.STDOUT, env=environment
        )
    if result.returncode:
        raise SystemExit(f"{run.name} failed; see {log.name}")


def report(found: dict[Run, float], options: argparse.Namespace) -> None:
    rows: dict[tuple[str, str], list[float]] = {}
    for run in sorted(found, key=lambda run: run.seed):
        rows.setdefault((run.base, run.recipe), []).append(found[run])
    mark = statistics.mean(rows[REFERENCE, "lora"]) if (REFERENCE, "lora") in rows else None
    table = [
        {
            "base": base,
            "recipe": recipe,
            "perplexities": values,
            "mean": statistics.mean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            "to_16bit_lora": statistics.mean(values) / mark - 1 if mark else None,
        }
        for (base, recipe), values in rows.items()
    ]
    lines = [f"{'base':<12} {'recipe':<16} {'perplexity':>18} {'to 16-bit LoRA':>15}"]
    for row in table:
        distance = "" if row["to_16bit_lora"] is None else f"{row['to_16bit_lora']:+.1%}"
        value = f"{row['mean']:.3f} ± {row['deviation']:.3f}"
        lines.append(f"{row['base']:<12} {row['recipe']:<16} {value:>18} {distance:>15}")
    print("\n".join(lines))
    (options.output / "tuned.txt").write_text("\n".join(lines) + "\n")
    (options.output / "tuned.json").write_text(json.dumps({"seeds": options.seeds, "rows": table}, indent=2) + "\n")
    draw(table, mark, options.output / "tuned.png")


def draw(table: list[dict], mark: float | None, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ordered = sorted(table, key=lambda row: -row["mean"])
    colours = {recipe: f"C{i}" for i, recipe in enumerate(sorted({row["recipe"] for row in table}))}
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(ordered) + 1.4), layout="constrained")
    axes.barh(
        [f"{row['base']}  {row['recipe']}" for row in ordered],
        [row["mean"] for row in ordered],
        xerr=[row["deviation"] for row in ordered],
        color=[colours[row["recipe"]] for row in ordered],
        ecolor="0.3",
    )
    low = min(row["mean"] for row in ordered)
    for i, row in enumerate(ordered):
        axes.text(row["mean"] + row["deviation"], i, f"  {row['mean']:.2f}", va="center", fontsize=9)
    if mark is not None:
        axes.axvline(mark, color="0.4", linestyle="--", linewidth=1)
    axes.set_xlim(0.9 * low, 1.04 * max(row["mean"] for row in ordered))
    axes.set_xlabel("perplexity of the test answers (axis does not start at 0)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
