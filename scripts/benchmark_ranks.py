"""Training speed and memory on several GPUs of one machine: sdp beside fsdp, random weights of LLaMA2's shapes in NF4.

    python scripts/benchmark_ranks.py --model 70b --ranks 2 --batch 1 --length 512
    python scripts/benchmark_ranks.py --model tiny --ranks 2 --length 64 --steps 5      # anywhere, in a minute

A row is one strategy with or without activation checkpointing: tokens/s of all ranks together (median step), the
largest peak of a GPU's allocations, and what a rank holds of the payload. Digests of all weights are compared over the
ranks before the first step, and with fsdp, after the last, with what the ranks hold together.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import _checkout  # noqa: F401
import benchmark_steps

import accessory  # noqa: F401

# isort: split
import torch  # after accessory, which sets what torch reads when it is loaded
import torch.distributed as dist
from benchmark_cases import SHAPES
from benchmark_ours import build_ours, make_batch, train_step
from benchmark_steps import eager_step, time_steps

HEAD = (
    f"{'strategy':<10}{'graphs':>8}{'checkpointing':>14}{'tokens/s':>10}{'ms/step':>9}{'peak GiB':>10}"
    f"{'payload GiB':>13}{'build s':>9}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--recipe", default="norm_bias")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategies", nargs="+", choices=["sdp", "fsdp"], default=["sdp", "fsdp"])
    parser.add_argument("--batch", type=int, default=1, help="rows a rank")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--no_graphs", action="store_true", help="launch each kernel by itself with sdp, too")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures")
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure_rank(options)
        return
    print(HEAD, flush=True)
    rows = []
    for strategy in options.strategies:
        words = [word for word in sys.argv[1:] if word != "--strategies" and word not in ("sdp", "fsdp")]
        run = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}",
             __file__, *words, "--strategies", strategy],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        for line in run.stdout:
            if line.startswith("RESULT "):
                rows.append(json.loads(line.removeprefix("RESULT ")))
                print(_row(rows[-1]), flush=True)
                if options.output is not None:
                    options.output.write_text(json.dumps(rows, indent=2) + "\n")
        if run.wait():
            raise SystemExit(f"{strategy} failed")


def measure_rank(options: argparse.Namespace) -> None:
    """Both kinds of steps on one model, in a process that torchrun started."""
    from accessory.agreement import refuse_other_weights
    from accessory.fused.model import fuse_blocks
    from accessory.strategies import find_world, join_ranks

    (strategy,) = options.strategies
    world = find_world()
    join_ranks(world)
    benchmark_steps.DEVICE = world.device
    case = {
        "task": "train", "model": options.model, "recipe": options.recipe, "base": "nf4", "images": None,
        "checkpointing": False, "compile": not options.no_compile and world.device.type == "cuda",
        "batch": options.batch, "length": options.length,
    }  # fmt: skip
    torch.manual_seed(0)
    start = time.perf_counter()
    model, loss = build_ours(case, (world.rank, world.size) if strategy == "fsdp" else None)
    built = time.perf_counter() - start
    payload = model.sharded
    refuse_other_weights(model)
    if payload is not None:
        payload.connect()
        if case["compile"]:
            fuse_blocks(model)
    held = payload.share_bytes if payload is not None else _payload_bytes(model)
    synchronized = _Synchronized(model, loss)
    graphs = case["compile"] and strategy == "sdp" and not options.no_graphs
    if not graphs:  # DistributedDataParallel and the shards' gathers
        synchronized = torch.nn.parallel.DistributedDataParallel(
            synchronized, broadcast_buffers=False, init_sync=False, gradient_as_bucket_view=True
        )
    for checkpointing in (True, False):
        model.model.recomputed = len(model.model.layers) if checkpointing else 0
        step = (train_step if graphs else eager_step)(model, synchronized, case)
        batch = make_batch(model, benchmark_steps.tokens(case, model.config.vocab_size, world.rank), case)
        seconds, peak = time_steps(partial(step, batch), options.warmup, options.steps)
        del step  # and with it its graph's memory
        torch.cuda.empty_cache()
        gathered: list = [None] * world.size
        dist.all_gather_object(gathered, (1000 * seconds, peak))
        slowest, largest = (max(values) for values in zip(*gathered, strict=True))
        if world.rank == 0:
            tokens = options.batch * options.length * world.size
            result = {
                "model": options.model, "recipe": options.recipe, "strategy": strategy, "ranks": world.size,
                "checkpointing": checkpointing, "graphs": graphs, "tokens_per_s": 1000 * tokens / slowest,
                "ms_per_step": slowest, "peak_gib": largest, "payload_gib": held / 2**30, "build_s": built,
                "device": _device(world.device), "torch": torch.__version__,
            }  # fmt: skip
            print("RESULT " + json.dumps(result), flush=True)
    if payload is not None and payload.gathered_digests() != payload.digests:
        raise SystemExit("the payload is not what it was")


class _Synchronized(torch.nn.Module):
    """The loss as a module, for DistributedDataParallel to find the trainables."""

    def __init__(self, model: torch.nn.Module, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.loss(batch)


def _payload_bytes(model: torch.nn.Module) -> int:
    from accessory.summary import frozen_bytes

    return frozen_bytes(model)[1]


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _row(row: dict) -> str:
    return (
        f"{row['strategy']:<10}{'yes' if row['graphs'] else 'no':>8}{'yes' if row['checkpointing'] else 'no':>14}"
        f"{row['tokens_per_s']:>10,.0f}"
        f"{row['ms_per_step']:>9.0f}{row['peak_gib']:>10.2f}{row['payload_gib']:>13.3f}{row['build_s']:>9.0f}"
    )


if __name__ == "__main__":
    main()
