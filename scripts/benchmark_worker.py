"""One system in a process of its own: it builds its model once, then does turns of steps as it is told.

    python benchmark_worker.py '{"system": "plain", "model": "tiny", "recipe": "norm_bias", "base": "nf4", …}'

Requests come as JSON lines on stdin, each is answered by one JSON line; all else that is printed goes to stderr, the
driver's log of this process. Several such processes share a GPU, but one computes at a time: the driver asks one, and
waits for its answer, before it asks the next.

    (at the start)                                                      {"imported": true}
    {"do": "build"}                                                     {"build_s": …, "trainable": …, "held_gib": …}
    {"do": "turn", "case": …, "first": 5, "count": 5, "settle": 1}      {"seconds": […], "tokens": […], "peak_gib": …,
                                                                         "estimate_gib": …, "loss": …}
    {"do": "profile", "case": …, "first": 25}                           {"busy_ms": …, "kernels": …, "by_kind": …}
    {"do": "release"}                                                   {"held_gib": …}

A turn starts with the case's warm-up where the case is new, or was released, and with `settle` steps otherwise; then
`count` steps are timed. An answer {"error": …, "oom": …} is the request's failure, and the process goes on.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from typing import Any, Optional, TextIO

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

import _checkout  # noqa: F401

import accessory  # noqa: F401

Reply = dict[str, Any]
IMPORTS = {
    "ours": ("accessory.module", "accessory.generation", "bitsandbytes"),
    "plain": ("transformers.models.llama.modeling_llama", "bitsandbytes", "peft"),
    "litgpt": ("litgpt.lora", "lightning", "bitsandbytes"),
    "unsloth": (
        "unsloth",
        "unsloth.models.llama",
    ),  # before all else: it changes transformers and PEFT as they are loaded
}


class Worker:
    """Answers the requests of one process; `system` is there after build, `step` while a case is under way."""

    def __init__(self, spec: dict[str, Any]):
        self.spec, self.system, self.case, self.step = spec, None, None, None

    def load(self) -> None:
        """Everything slow that needs no GPU."""
        system = self.spec["system"]
        for module in IMPORTS[system]:
            importlib.import_module(module)
        self.builder = getattr(
            importlib.import_module("benchmark_ours" if system == "ours" else "benchmark_peers"), system
        )

    def build(self, request: dict[str, Any]) -> Reply:
        import torch

        torch.manual_seed(0)
        start = time.perf_counter()
        self.system = self.builder(self.spec)
        trainable = sum(p.numel() for p in self.system.model.parameters() if p.requires_grad)
        self._free()
        return {"build_s": time.perf_counter() - start, "trainable": trainable, "notes": self.system.notes,
                "held_gib": _held_gib()}  # fmt: skip

    def turn(self, request: dict[str, Any]) -> Reply:
        import torch
        from benchmark_steps import timed_in_a_row

        from accessory.callbacks import peak_memory_gib

        case, first = request["case"], request["first"]
        self._warm_up(case, first, request["settle"])
        batches = [self._batch(case, number) for number in range(first, first + request["count"])]
        values: list[Any] = []
        seconds = timed_in_a_row([lambda batch=batch: values.append(self.step(batch)) for batch, _ in batches])
        losses = [float(value) for value in values if value is not None]
        if not all(loss == loss and abs(loss) != float("inf") for loss in losses):
            raise ValueError(f"the loss is not finite: {losses}")
        estimate = self.system.estimate
        return {"seconds": seconds, "tokens": [count for _, count in batches], "peak_gib": peak_memory_gib(),
                "estimate_gib": estimate(case) if estimate and torch.cuda.is_available() else None,
                "loss": losses[-1] if losses else None}  # fmt: skip

    def profile(self, request: dict[str, Any]) -> Reply:
        from benchmark_profile import profile_step

        case, first = request["case"], request["first"]
        self._warm_up(case, first, settle=1)
        batch, _ = self._batch(case, first)
        return profile_step(lambda: self.step(batch))

    def _warm_up(self, case: dict[str, Any], first: int, settle: int) -> None:
        """The steps before `first`: settle of them, or all that a case needs which is new here."""
        from benchmark_steps import reset_peak

        if self.case != case:
            self.release({})
            reset_peak()  # before the warm-up: a CUDA graph takes its memory when it is captured
            self._prepare(case)
            settle = case["warmup"]
        for number in range(first - settle, first):
            self.step(self._batch(case, number)[0])

    def release(self, request: dict[str, Any]) -> Reply:
        """Let go of what a case holds besides the model: optimizer, captured graphs, cached blocks."""
        self.case = self.step = None
        if self.system is not None:
            for parameter in self.system.model.parameters():
                parameter.grad = None
            self.system.release()
        self._free()
        return {"held_gib": _held_gib()}

    def _prepare(self, case: dict[str, Any]) -> None:
        system = self.system
        if case["task"] == "generate":
            self.step = lambda _: system.generate(case)
        else:
            system.checkpoint(case["checkpointing"])
            system.keep(case)
            self.step = system.train_step(system.model, system.loss, case)
        self.case = case

    def _batch(self, case: dict[str, Any], number: int) -> tuple[Any, int]:
        """What a step takes, and the tokens that count."""
        from benchmark_cases import SHAPES
        from benchmark_lengths import padded_rows
        from benchmark_steps import tokens

        vocab = SHAPES[case["model"]][-1]
        if case["task"] == "generate":
            return None, case["batch"] * case["new_tokens"]
        if case["task"] == "lengths":
            rows = self.system.rows
            return padded_rows(case, vocab, number) if rows is None else rows(case, number)
        return self.system.batch(tokens(case, vocab, number), case), case["batch"] * case["length"]

    def _free(self) -> None:
        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def answer(self, request: dict[str, Any]) -> Reply:
        handlers = {"build": self.build, "turn": self.turn, "profile": self.profile, "release": self.release}
        try:
            return handlers[request["do"]](request)
        except Exception as error:
            failure = _failure(error)
        self.release(request)  # outside: the traceback holds the failed step's tensors
        return failure


def _failure(error: BaseException) -> Reply:
    traceback.print_exc()
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or "out of memory" in text.lower()
    return {"error": "out of memory" if out_of_memory else f"{type(error).__name__}: {first}"[:200],
            "oom": out_of_memory}  # fmt: skip


def _held_gib() -> Optional[float]:
    import torch

    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else None


def _take_stdout() -> TextIO:
    """The pipe to the driver; from now on what anything prints, C libraries too, goes to stderr."""
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return pipe


def main() -> None:
    pipe = _take_stdout()

    def send(reply: Reply) -> None:
        pipe.write(json.dumps(reply) + "\n")

    with tempfile.TemporaryDirectory(prefix="unsloth-") as folder:
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", folder)  # it would write into the current folder
        worker = Worker(json.loads(sys.argv[1]))
        try:
            worker.load()
        except BaseException as error:
            send(_failure(error))
            raise SystemExit(1) from None
        send({"imported": True})
        for line in sys.stdin:
            send(worker.answer(json.loads(line)))


if __name__ == "__main__":
    main()
