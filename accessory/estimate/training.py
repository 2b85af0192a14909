"""A training step: what the blocks keep for backward, and what passes while they are computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Optional

import torch

from accessory.estimate.counting import copies_bytes, held_bytes
from accessory.estimate.images import image_part
from accessory.estimate.parts import CUBLAS_WORKSPACE, THREADS, Estimate
from accessory.estimate.shapes import GROUPS, Shape, head_scratch
from accessory.models.llama import Llama
from accessory.models.loss import GPU_CHUNK

STREAMS = {False: 1, True: 2}  # that multiply: the usual one; where a CUDA graph is captured, the capture's too
ROWS = 32  # tokens that a program of accessory.fused.kernels_cuda sums up
ON_DEVICE = 3  # of the tensors that lie in host memory: the one in use, one that leaves, one that arrives


@dataclass(frozen=True)
class Step:
    """What of a run decides about a training step's memory.

    rows, width: of a micro-batch, image positions included. images: in it; None: one a row, where the model takes any.
    shards: ranks over which fsdp spreads the payload (a model that is spread already knows them). dtype: compute type
    of a model on the meta device. fused: accessory.fused's blocks; otherwise what autograd keeps of models/llama.py
    without torch.compile, an upper figure. captured: the fused path as one CUDA graph. offloaded: what the fused blocks
    can send there lies in host memory, their inputs and, where they are not recomputed, their residuals.
    keeps_attention: fused blocks that are not recomputed keep attention's output.
    """

    rows: int
    width: int
    images: Optional[int] = None
    shards: int = 1
    dtype: torch.dtype = torch.bfloat16
    fused: bool = True
    captured: bool = True
    offloaded: bool = False
    keeps_attention: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.width


def estimate_training(model: Llama, step: Step, recomputed_blocks: int) -> Estimate:
    """Memory of a training step. model: quantized and marked as it will train, with weights or without (meta device);
    recomputed_blocks: so many blocks, the first ones, keep only their input."""
    shape = Shape.of(model, step.dtype)
    assert 0 <= recomputed_blocks <= shape.blocks
    fused = step.fused and not shape.drops  # accessory.fused.model.why_not_fused
    block = _fused(shape, step.tokens, step.keeps_attention) if fused else _plain(shape, step.tokens)
    base, trainables = held_bytes(model, step.dtype, step.shards)
    image_kept, image_passing = image_part(model, step.rows if step.images is None else step.images, shape.itemsize)
    rotary_table = shape.itemsize * step.tokens * 2 * shape.e
    hidden = shape.itemsize * step.tokens * shape.d
    kept_blocks, kept, inputs = shape.blocks - recomputed_blocks, block.kept, recomputed_blocks
    if fused and step.offloaded:
        kept, inputs = kept - 2 * hidden, min(2 * kept_blocks + recomputed_blocks, ON_DEVICE)
    activations = image_kept + rotary_table + inputs * hidden + kept_blocks * kept
    # The first blocks are recomputed, and their backward comes last, when what the others kept is free again. So making
    # a block's results again takes nothing that was not there, unless all blocks do it.
    last, first = (block.again if recomputed_blocks >= n else block.passing for n in (shape.blocks, 1))
    # A CUDA graph adds its gradients to the step's: in the end, with the first block's backward, both are there.
    end = first + trainables + (kept if recomputed_blocks == 0 else 0) if fused and step.captured else 0
    parts = {
        "base": base,
        "trainables": trainables + (copies_bytes(model, shape.itemsize) if fused else 0),
        "gradients": trainables,
        "optimizer": 2 * trainables,
        "workspace": STREAMS[step.captured] * THREADS * CUBLAS_WORKSPACE if fused else 0,
        "images": image_passing,
        "activations": activations,
        "loss": _loss(model, shape, step.tokens, fused and step.captured),
        "backward": max(last, end - activations),
    }
    return Estimate(parts, _peak(parts))


def recomputed_blocks_that_fit(model: Llama, step: Step, available_bytes: float) -> int:
    """Fewest blocks to recompute so that a step's peak is at most available_bytes (tensors alone: what the GPU has,
    less OVERHEAD and what others hold). All of them where nothing fits: compare estimate_training's peak then."""
    blocks = model.config.num_hidden_layers
    none, one = (estimate_training(model, step, n) for n in (0, min(1, blocks)))
    saved = none.parts["activations"] - one.parts["activations"]
    rest = none.peak - available_bytes
    if rest <= 0:
        return 0
    guess = max(0, min(blocks, -(-rest // max(saved, 1))) - 1)
    fitting = (n for n in range(guess, blocks) if estimate_training(model, step, n).peak <= available_bytes)
    return next(fitting, blocks)


def save_memory(
    model: Llama, step: Step, available_bytes: float, checkpointing: Optional[bool], offload: Optional[bool]
) -> tuple[int, bool]:
    """(blocks to recompute, whether to offload): what makes the step fit in the least time, where the arguments leave
    it open. Copies to host memory run beside the computation, so they come before recomputing, and after nothing; where
    all blocks are to be recomputed, memory is what counts, and they are made in any case."""
    blocks = model.config.num_hidden_layers
    recomputed = 0
    for offloaded in (False, True) if offload is None and step.fused else (bool(offload) and step.fused,):
        tried = replace(step, offloaded=offloaded)
        if checkpointing is None:
            recomputed = recomputed_blocks_that_fit(model, tried, available_bytes)
        else:
            recomputed = blocks if checkpointing else 0
        if recomputed == 0 and estimate_training(model, tried, 0).peak <= available_bytes:
            break
    return recomputed, offloaded


def host_bytes(model: Llama, step: Step, recomputed_blocks: int) -> int:
    """Host memory that offloading takes: pinned, which torch allocates in powers of two."""
    shape = Shape.of(model, step.dtype)
    sent = 2 * shape.blocks - recomputed_blocks
    return sent * 2 ** math.ceil(math.log2(shape.itemsize * step.tokens * shape.d))


def graphs_fit(model: Llama, step: Step, recomputed_blocks: int, available_bytes: float) -> bool:
    """Whether there is room for a captured step and one beside it: a graph keeps its step's memory to itself, and the
    first step of every other shape, and validation, do without that."""
    estimate = estimate_training(model, step, recomputed_blocks)
    beside = estimate.parts["activations"] + max(estimate.parts["loss"], estimate.parts["backward"])
    return estimate.peak + beside <= available_bytes


def attention_fits(model: Llama, step: Step, recomputed_blocks: int, available_bytes: float) -> bool:
    """Whether attention's output can be kept besides, and nothing else be given up for it."""
    if not step.fused or recomputed_blocks or Shape.of(model, step.dtype).itemsize > 2:
        return False  # without FlashAttention more would be kept than is counted here: masks, repeated heads
    kept = replace(step, keeps_attention=True)
    if step.captured:
        return graphs_fit(model, kept, 0, available_bytes)
    return estimate_training(model, kept, 0).peak <= available_bytes


def _peak(parts: dict[str, int]) -> int:
    held = sum(parts[name] for name in ("base", "trainables", "gradients", "optimizer", "workspace"))
    return held + max(parts["images"], parts["activations"] + max(parts["loss"], parts["backward"]))


@dataclass(frozen=True)
class Block:
    """Bytes: kept for backward; passing, needed by its backward besides (and by its forward at most); again, by the
    backward of a block that keeps its input alone."""

    kept: int
    passing: int
    again: int


def _fused(s: Shape, m: int, keeps_attention: bool = False) -> Block:
    """accessory.fused.block: what `_Function` saves, and the steps of `FusedBlock.backward`, which come one after the
    other. Counted in numbers of the compute type a token, fp32 ones as 4 / itemsize of them."""
    wide = 4 / s.itemsize
    qkv, gate_up = s.q + 2 * s.kv, 2 * s.f
    t = {group: sum(s.lora.get(name, 0) for name in names) for group, names in GROUPS.items()}
    kept = s.d + qkv + s.d + gate_up + 2 * wide + sum(t.values())
    kept += (s.q + s.heads * wide) if keeps_attention else 0  # and its logsumexp

    def steps(again: int) -> int:
        """again: 1 where the block's results are made anew, and go with their last use; 0 where they are kept, and are
        counted among the activations."""
        dy = d_middle = normed = s.d
        made = again * (qkv + s.d + s.q + gate_up)  # besides x: q, k, v; attention's output; its residual; gate, up
        attended = s.q + qkv if again else -gate_up + (0 if keeps_attention else s.q)  # what was kept, is free by then
        flash = s.q * wide + (2 * s.q if s.kv < s.q else 0)  # dq in fp32; grouped heads' dk and dv before their sum
        passing = (
            (made + dy + s.f, "down"),  # h (LoRA's), then dh, in whose place the gradient of gate and up is written
            (made + dy + s.f + gate_up * wide / ROWS, None),  # and its sums, for the biases
            (made + dy + normed, "gate_up"),
            (attended + dy + d_middle + s.q, "out"),
            (attended + dy + d_middle + s.q + qkv + flash, None),  # attention's backward
            (attended + dy + d_middle + qkv, None),  # that of the rotary embedding, written over q, k and v
            (attended - s.q + dy + d_middle + normed, "qkv"),
        )
        return max(
            int(m * s.itemsize * numbers) + (s.scratch(*GROUPS[group]) if group else 0) for numbers, group in passing
        )

    return Block(int(m * s.itemsize * kept), steps(0), steps(1))


def _plain(s: Shape, m: int) -> Block:
    """models/llama.py under autograd, operation by operation, without torch.compile (which keeps less)."""
    wide, ranks = 4 / s.itemsize, sum(s.lora.values())
    norm = s.d + wide  # x, 1 / rms
    attention = 4 * s.q + s.heads * wide  # q, k and v for every head, the output, and its logsumexp
    mlp = 3 * s.f  # gate, silu(gate), up
    inputs = {"qkv": s.d, "out": 0, "gate_up": s.d, "down": s.f}  # of LoRA; that of o_proj is kept already
    for group, names in GROUPS.items():
        if s.drops:  # each target has its own input, and the mask of it in bytes
            mlp += sum(s.linears[n][1] * (1 + 1 / s.itemsize) for n in names if n in s.lora)
        elif any(name in s.lora for name in names):
            mlp += inputs[group]
    in_16_bit = s.itemsize * sum(rank * sum(s.linears[name][:2]) for name, rank in s.lora.items())
    matrices = in_16_bit if s.itemsize < 4 else 0
    kept = int(m * s.itemsize * (2 * norm + attention + mlp + ranks)) + matrices
    passing = (  # besides what was kept, each with the gradient of the block's output or middle
        (s.d + 2 * s.f, ["down_proj"]),  # dh, LoRA's and the base's
        (s.d + 4 * s.f, []),  # dh, those of SwiGLU's factors, and of gate
        (4 * s.d, ["gate_proj", "up_proj"]),  # gradients of gate and up are there, silu(gate) and up are not any more
        (3 * s.d + 4 * s.d * wide, []),  # of a norm
        (2 * s.d + 2 * s.q, ["o_proj"]),
        (2 * s.d + 6 * s.q + s.q * wide, []),  # of attention and the rotary embedding, for every head
        (4 * s.d + s.q + 2 * s.kv, ["q_proj", "k_proj", "v_proj"]),
    )
    backward = max(int(m * s.itemsize * numbers) + max(map(s.scratch, names), default=0) for numbers, names in passing)
    return Block(kept, backward, backward + kept)


def _loss(model: Llama, s: Shape, m: int, fixed_shape: bool) -> int:
    """models/loss.py: the final norm's input, which it keeps; hidden states, without fixed_shape those that count once
    more, and their gradient; of a chunk the logits in fp32 and their logarithms; and those of the chunk before, which
    Python holds until then."""
    hidden = m * s.d * (3 if fixed_shape else 4) * s.itemsize
    first, later = min(GPU_CHUNK, m), min(GPU_CHUNK, max(m - GPU_CHUNK, 0))
    logits = 4 * s.vocab * max(2 * first, first + 2 * later)
    return hidden + logits + head_scratch(model, s)
