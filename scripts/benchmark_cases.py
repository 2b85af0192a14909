"""What is measured. A group is one model with one recipe on one kind of base, held by one process a system; a case is
what varies within it: rows, length, checkpointing, task.

    group  {"model": "7b", "recipe": "norm_bias", "base": "nf4", "images": None, "compile": True}
    case   the group's fields, and {"task": "train", "batch": 4, "length": 512, "checkpointing": False,
            "offload": False, "keep_attention": True, "steps": 20, "round": 5, "warmup": 5, "settle": 1,
            "systems": ["ours", "plain"]}

offload: ours keeps inputs and residuals of blocks in host memory (fast.offload); by default with checkpointing.
keep_attention: ours keeps attention's output for backward (fast.keep_attention); by default without checkpointing.

Tasks: `train`, a step on rows of equal length in which every token is learnt; `lengths`, a step on rows of the lengths
of real data, in which the answers are learnt; `generate`, an answer of `new_tokens` to a prompt of `length` tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import _checkout  # noqa: F401

from accessory.sizes import SHAPES

Group = dict[str, Any]
Case = dict[str, Any]

SYSTEMS = ("ours", "plain", "litgpt", "unsloth")
BASES = ("nf4", "rtn")
NEW_TOKENS = 64
RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama_config(name: str):
    from transformers import LlamaConfig

    hidden, width, blocks, heads, kv_heads, vocab = SHAPES[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )


def linear_shapes(name: str) -> dict[str, tuple[int, int]]:
    """(out, in) of the seven linears of a block."""
    hidden, width, _, heads, kv_heads, _ = SHAPES[name]
    narrow = hidden // heads * kv_heads
    rows = (hidden, narrow, narrow, hidden, width, width, hidden)
    columns = (hidden, hidden, hidden, hidden, hidden, hidden, width)
    return dict(zip(TARGETS, zip(rows, columns, strict=True), strict=True))


def flops_per_token(case: Case) -> float:
    """Of the matrix products alone, frozen weights: forward and the gradient of the input, 2 each a weight, and the
    forward again with checkpointing (not that of the output layer). Attention and LoRA not counted."""
    _, _, blocks, _, _, vocab = SHAPES[case["model"]]
    weights = blocks * sum(rows * columns for rows, columns in linear_shapes(case["model"]).values())
    return (6 if case["checkpointing"] else 4) * weights + 4 * vocab * SHAPES[case["model"]][0]


def can_do(system: str, case: Case) -> bool:
    """What a peer does not offer is no failure of it: litgpt and unsloth train LoRA alone, and none of them images."""
    if system == "ours":
        return True
    if not case["checkpointing"] and (case.get("offload") or not case.get("keep_attention", True)):
        return False
    if case["base"] != "nf4" or case["images"] is not None:
        return False
    return system == "plain" or (case["task"] != "generate" and "lora" in case["recipe"])


def group_of(case: Case) -> Group:
    return {key: case[key] for key in ("model", "recipe", "base", "images", "compile")}


def grouped(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases that share their models, in the order of their first."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(str(group_of(case)), []).append(case)
    return list(groups.values())


# What docs/performance.md shows. A row: model, recipe, bases, then batch, length, checkpointing and task of each case,
# or one of these ways to train, which no peer has.
WAYS: dict[str, dict[str, bool]] = {
    "offload": {"offload": True},
    "least": {"offload": True, "keep_attention": False},
}
ISSUE = (
    ("7b", "norm_bias_lora", ("nf4", "rtn"), ((4, 512, False, "train"), (1, 512, False, "train"),
                                              (16, 512, True, "train"))),
    ("7b", "norm_bias_lora", ("nf4",), ((4, 512, False, "lengths"), (8, 512, False, "lengths"),
                                         (16, 512, True, "lengths"))),
    ("7b", "norm_bias", ("nf4", "rtn"), ((16, 512, False, "train"), (16, 512, False, "offload"))),
    ("7b", "norm_bias", ("nf4",), ((1, 32, False, "generate"),)),
    ("70b", "norm_bias", ("nf4", "rtn"), ((1, 512, False, "train"), (1, 512, False, "least"),
                                          (1, 512, True, "train"))),
    ("70b", "norm_bias", ("nf4",), ((1, 32, False, "generate"),)),
)  # fmt: skip


def issue_preset(systems: list[str], compiled: bool) -> list[Case]:
    return [
        complete(
            {"task": "train" if task in WAYS else task, "model": model, "recipe": recipe, "base": base,
             "images": None, "batch": batch, "length": length, "checkpointing": checkpointing, "compile": compiled,
             **WAYS.get(task, {}),
             **({"new_tokens": 32, "steps": 4} if task == "generate" and model == "70b" else {})},
            systems,
        )
        for base in BASES for model, recipe, bases, shapes in ISSUE if base in bases
        for batch, length, checkpointing, task in shapes
    ]  # fmt: skip


def complete(case: Case, systems: list[str], steps: int = 20, warmup: int = 5) -> Case:
    """Fill in how often and in which turns. An answer is `new_tokens` steps of the model in itself."""
    if case["task"] == "generate":
        answers = min(steps, 8)
        turns = {"steps": answers, "round": min(2, answers), "warmup": min(warmup, 1), "settle": 0,
                 "new_tokens": NEW_TOKENS}  # fmt: skip
    else:
        turns = {"steps": steps, "round": min(5, steps), "warmup": warmup, "settle": min(warmup, 1)}
    kept = {"offload": case["checkpointing"], "keep_attention": not case["checkpointing"]}
    return {"systems": [system for system in systems if can_do(system, case)], **kept, **turns, **case}
