"""Where the time of one step goes, by kind of kernel, as torch.profiler saw it on the GPU.

Kernels say what they do by their names alone, and every library has its own. `KINDS` is read from top to bottom, the
first match counts; what matches nothing is pointwise work, norms and sums.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

KINDS = {
    "attention": r"flash|fmha|sdpa|attention|attend",
    "16-bit weights": r"dequant|nf4_weight|int4_weight",
    "4-bit products": r"_words_kernel|_columns_kernel|gemv_4bit|gemm_4bit",
    "matrix products": r"nvjet|gemm|gemv|cutlass|splitk|cublas",
    "optimizer, clipping, 16-bit copies": r"multi_tensor_apply|adam|foreach",
    "copies": r"memcpy|memset|copy_kernel",
}
REST = "norms, SwiGLU, rotary, loss, sums"
SHOWN = 12


def kind_of(kernel: str) -> str:
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), REST)


def profile_step(step: Callable[[], Any]) -> dict[str, Any]:
    """{"busy_ms", "kernels", "by_kind": {kind: ms}, "longest": [[name, count, ms], …]} of one step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    events = (event for event in profiler.events() if event.device_type == on_gpu)
    return add_up((event.name, event.time_range.start, event.time_range.end) for event in events)


def add_up(kernels: Iterable[tuple[str, float, float]]) -> dict[str, Any]:
    """kernels: (name, begin, end) of each launch, in microseconds. Those on different streams can overlap."""
    found: dict[str, list[float]] = {}
    busy = reached = 0.0
    for name, begin, end in sorted(kernels, key=lambda kernel: kernel[1]):
        found.setdefault(name, []).append((end - begin) / 1000)
        busy += max(0.0, end - max(begin, reached)) / 1000
        reached = max(reached, end)
    by_kind = dict.fromkeys((*KINDS, REST), 0.0)
    for name, milliseconds in found.items():
        by_kind[kind_of(name)] += sum(milliseconds)
    longest = sorted(found.items(), key=lambda item: -sum(item[1]))[:SHOWN]
    return {
        "busy_ms": busy,
        "kernels": sum(map(len, found.values())),
        "by_kind": by_kind,
        "longest": [[name[:120], len(milliseconds), sum(milliseconds)] for name, milliseconds in longest],
    }
