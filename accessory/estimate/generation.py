"""Answers on a GPU: a prompt's way through the blocks, and what `accessory.decoding` holds for the tokens behind it.

Without autograd a block keeps nothing, so the most that is there at once is a matter of one block: the hidden states at
three places (what came in before the first block, the residual, and what is to be added to it), and what
`_within_block` says. Of weights, one is dequantized at a time. A token's step takes less than a prompt in every way.
"""

from __future__ import annotations

import torch

from accessory.decoding import BUCKET
from accessory.estimate.counting import copies_bytes, held_bytes
from accessory.estimate.images import image_part
from accessory.estimate.parts import CUBLAS_WORKSPACE, Estimate
from accessory.estimate.shapes import Shape, head_scratch
from accessory.models.llama import Llama

STREAMS = 3  # that multiply: the usual one, that of the decoder's capture, and that of its warm-up


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
    """The most that is there besides in `Decoder.read`, over a block's steps: numbers of the compute type a token."""
    normed = s.d
    steps = [
        (s.d + normed, ()),
        (normed + s.q, ("q_proj",)),
        (normed + s.q + s.kv, ("k_proj",)),
        (normed + s.q + 2 * s.kv, ("v_proj",)),
        (normed + 2 * s.q + 2 * s.kv, ()),  # q, and q rotated
        (normed + 3 * s.q, ()),  # attention's output, and in the linears' order
        (normed + s.q + s.d, ("o_proj",)),
        (normed + s.d + normed, ()),
        (normed + s.f, ("gate_proj",)),
        (normed + 2 * s.f, ("up_proj",)),
        (normed + 3 * s.f, ()),
        (normed + s.f + s.d, ("down_proj",)),
    ]
    return max(int(numbers * m * s.itemsize) + sum(map(s.scratch, names)) for numbers, names in steps)
