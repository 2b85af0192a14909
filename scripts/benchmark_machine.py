"""What the figures were measured on: the machine, its ceilings in the same run, and the versions of everything.

Two rates bound a training step: that of bf16 matrix products, and that at which memory is copied. A step cannot be
faster than its operations over the first, a decoded token not faster than the weights' bytes over the second (of which
a copy counts bytes read and bytes written). Both are measured, in a process of their own, before anything else; the
first on an idle GPU, whose clock falls as it grows warm, and after seconds of it, which is what a run of steps meets.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmark_cases import Case, linear_shapes

PACKAGES = ("torch", "triton", "bitsandbytes", "transformers", "peft", "litgpt", "lightning", "unsloth", "unsloth_zoo",
            "trl", "liger-kernel")  # fmt: skip


def describe(cases: list[Case], commit: str | None) -> dict[str, Any]:
    """name, driver, versions, our commit, and the ceilings at the shapes of these cases."""
    products = sorted(
        {(case["batch"] * case["length"], *shape)
         for case in cases if case["task"] == "train" for shape in linear_shapes(case["model"]).values()}
    )  # fmt: skip
    found = _output([sys.executable, __file__, json.dumps(products)])
    measured = json.loads(found.splitlines()[-1]) if found else {"error": "the ceilings could not be measured"}
    return {
        "driver": driver(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit or _commit(),
        **measured,
    }


def driver() -> str | None:
    """NVIDIA's driver, which nvidia-smi names once for each of the host's GPUs."""
    named = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return named.partition("\n")[0] or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).parent
    commit = _output(["git", "-C", str(here), "rev-parse", "--short", "HEAD"])
    changed = _output(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"])
    return (commit + (" with changes" if changed else "")) if commit else None


def _output(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def ceilings(products: list[tuple[int, int, int]]) -> dict[str, Any]:
    """TFLOP/s of y = x W^T in bf16, x [m, k], W [n, k], as "m n k": rate; GB/s of a copy, read and written."""
    import torch

    on_gpu = torch.cuda.is_available()
    side, copied = (8192, 2**32) if on_gpu else (512, 2**26)
    if not on_gpu:
        products = products[:1]  # a CPU's rates bound nothing of interest: enough to see that it works
    rates = {" ".join(map(str, shape)): _product_rate(*shape) for shape in [(side, side, side), *map(tuple, products)]}
    sustained = _sustained_rate(side, seconds=5.0 if on_gpu else 0.1)
    source = torch.empty(copied // 2, dtype=torch.bfloat16, device="cuda" if on_gpu else "cpu").normal_()
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source))
    name = torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.processor() or platform.machine()})"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else None
    return {"device": name, "memory_gib": memory, "matmul_tflops": rates, "square": side,
            "sustained_tflops": sustained, "copy_gb_s": 2 * copied / seconds / 1e9}  # fmt: skip


def _product(m: int, n: int, k: int) -> Callable[[], Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=device)
    return lambda: x @ weight.T


def _product_rate(m: int, n: int, k: int) -> float:
    return 2e-12 * m * n * k / _median_seconds(_product(m, n, k))


def _sustained_rate(side: int, seconds: float) -> float:
    """TFLOP/s of the square product in the second half of `seconds` of nothing else."""
    from benchmark_steps import timed

    product, rows, begun = _product(side, side, side), [], time.monotonic()
    while time.monotonic() - begun < seconds:
        rows.append(timed(lambda: [product() for _ in range(20)]) / 20)
    return 2e-12 * side**3 / statistics.median(rows[len(rows) // 2 :])


def _median_seconds(call, repeats: int = 10) -> float:
    """Of `repeats` calls in a row, so that launching does not count; the median of five such rows."""
    from benchmark_steps import timed

    def several() -> None:
        for _ in range(repeats):
            call()

    several()
    return statistics.median(timed(several) for _ in range(5)) / repeats


if __name__ == "__main__":
    print(json.dumps(ceilings(json.loads(sys.argv[1]))))
