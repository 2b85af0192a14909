"""Answers on a GPU: a prompt's way through the blocks, and what `accessory.decoding` holds for the tokens behind it.

Without autograd a block keeps nothing, so the most that is there at once is a matter of one block: the hidden states at
three places (its input, what came in before the first block, the residual after attention), and what `_within_block`
says. Of weights, one is dequantized at a time. A token's step takes less than a prompt in every respect.
"""

from __future__ import annotations

import torch

from accessory.decoding import BUCKET
from accessory.estimate.counting import copies_bytes, held_bytes
from accessory.estimate.images import image_part
from accessory.estimate.parts import CUBLAS_WORKSPACE, STREAMS, Estimate
from accessory.estimate.shapes import Shape, head_scratch
from accessory.models.llama import Llama


def estimate_generation(
    model: Llama, batch: int, prompt_tokens: int, new_tokens: int, dtype: torch.dtype = torch.bfloat16, images: int = 0
) -> Estimate:
    """Memory of answering `batch` prompts of prompt_tokens each with up to new_tokens, with a captured decoder: the
    default on a GPU."""
    shape = Shape.of(model, dtype)
    base, trainables = held_bytes(model, dtype)
    a, tokens = shape.itemsize, batch * prompt_tokens
    capacity = -(-(prompt_tokens + new_tokens) // BUCKET) * BUCKET
    parts = {
        "base": base,
        "trainables": trainables,
        "workspace": STREAMS * CUBLAS_WORKSPACE,
        "cache": 2 * shape.blocks * shape.kv * batch * capacity * a,
        "decoder": copies_bytes(model, a, biases=False) + batch * shape.vocab * 4,  # of LoRA; and its logits
        "images": image_part(model, images, a)[1],
        "activations": (3 * shape.d + 2 * shape.e) * tokens * a,
        "prompt": _within_block(shape, tokens),
        "logits": batch * shape.vocab * (a + 2 * 4) + head_scratch(model, shape),
    }
    held = sum(parts[name] for name in ("base", "trainables", "workspace", "cache", "decoder"))
    return Estimate(parts, held + max(parts["images"], parts["activations"] + max(parts["prompt"], parts["logits"])))


def _within_block(s: Shape, m: int) -> int:
    """The most that models/llama.py's block makes besides, over its steps, in numbers of the compute type a token."""
    in_fp32 = 2 * 4 / s.itemsize if s.itemsize < 4 else 0  # a norm's x and its quotient
    steps = [
        (in_fp32 * s.d + 2 * s.d, 0),
        *_linear(s, 0, "q_proj", s.q),  # normed is where the residual will be
        *_linear(s, s.q, "k_proj", s.kv),
        *_linear(s, s.q + s.kv, "v_proj", s.kv),
        (4 * s.q + 2 * s.kv, 0),  # the rotary embedding of q, then of k
        (2 * s.q + 5 * s.kv, 0),
        *_linear(s, 2 * s.q, "o_proj", s.d),
        *_linear(s, s.d, "gate_proj", s.f),
        *_linear(s, s.d + s.f, "up_proj", s.f),
        (s.d + 3 * s.f, 0),  # silu(gate), up and their product
        *_linear(s, s.d + s.f, "down_proj", s.d),
    ]
    return max(int(numbers * m * s.itemsize) + scratch for numbers, scratch in steps)


def _linear(s: Shape, there: int, name: str, out: int) -> list[tuple[int, int]]:
    """Its output beside the dequantized weight; then, with LoRA, beside LoRA's share and their sum, and A and B."""
    matrices = s.itemsize * s.lora.get(name, 0) * sum(s.linears[name][:2])
    return [(there + out, s.scratch(name)), *([(there + 3 * out, matrices)] if name in s.lora else [])]
