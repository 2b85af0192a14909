"""A training step's memory against what autograd keeps of tiny models, and what is decided by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from estimates import BOTH, NORM_BIAS, RECIPES, Live, batch, tiny
from torch.utils._pytree import tree_leaves

from accessory.estimate import (
    Step,
    attention_fits,
    estimate_training,
    graphs_fit,
    host_bytes,
    recomputed_blocks_that_fit,
    save_memory,
    training,
)
from accessory.estimate.shapes import Shape
from accessory.fused.model import fuse_blocks, keep_attention
from accessory.models.loss import GPU_CHUNK
from accessory.module import batch_loss
from accessory.quantization import QuantLinear
from accessory.quantization.nf4 import NF4


@pytest.fixture(scope="module")
def model():
    """For all who leave its weights' places alone."""
    return tiny()


def kept_by_block(model, rows: int, width: int) -> int:
    """Bytes that autograd saves of the first block, the model's own tensors and the rotary tables aside."""
    x = torch.randn(rows, width, 256, dtype=model.dtype, requires_grad=True)
    cos, sin = model.model.rotary_emb(x, torch.arange(width).expand(rows, width))
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.model.layers[0](x, (cos.unsqueeze(1), sin.unsqueeze(1)))
    if model.model.fused:  # keeps by itself, behind the view that gives rows back
        ((node, _),) = y.grad_fn.next_functions
        saved |= {t.untyped_storage().data_ptr(): t for t in tree_leaves(node.kept) if t is not None}
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), cos, sin)}
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in known)


@pytest.mark.parametrize("keeps_attention", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_fused_block_keeps_what_is_said(recipe, dtype, keeps_attention):
    # As many heads of k and v as of q: a CPU repeats them where a GPU's kernel does not.
    model = tiny(recipe, dtype=dtype, num_hidden_layers=1, num_key_value_heads=4)
    expected = training._fused(Shape.of(model, dtype), 2 * 96, keeps_attention).kept
    fuse_blocks(model)
    if keeps_attention:
        keep_attention(model)
    assert kept_by_block(model, 2, 96) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_plain_block_keeps_what_is_said(recipe, dtype):
    model = tiny(recipe, dtype=dtype, num_hidden_layers=1)
    expected = training._plain(Shape.of(model, dtype), 2 * 96).kept
    assert kept_by_block(model, 2, 96) == expected


class Lean:
    """accessory.fused.pointwise in a forward pass, by what it makes alone."""

    @staticmethod
    def norm(x, weight, eps):
        return torch.zeros_like(x), torch.zeros(len(x), 1)

    @staticmethod
    def add_norm(x, y, weight, eps):
        return x + y, torch.zeros_like(x), torch.zeros(len(x), 1)

    @staticmethod
    def rotate_(qkv, cos, sin, rotated):
        return qkv

    @staticmethod
    def swiglu(gate_up):
        return gate_up.new_zeros(len(gate_up), gate_up.shape[1] // 2)


@pytest.mark.parametrize("tokens", [128, 512, 4000])
@pytest.mark.parametrize(("recomputed", "keeps_attention"), [(False, False), (False, True), (True, False)])
def test_a_fused_blocks_forward_takes_no_more_than_its_backward_is_said_to(
    recomputed, keeps_attention, tokens, monkeypatch
):
    # As a GPU's kernels do it: nothing but the weight is made.
    monkeypatch.setattr(QuantLinear, "dequantize_into", lambda layer, out, lora=None: out.fill_(0.01))
    monkeypatch.setattr(NF4, "dequantize", lambda self, payload, shape, dtype: torch.full(shape, 0.01, dtype=dtype))
    monkeypatch.setattr("accessory.fused.block.pointwise", Lean)
    model = tiny(NORM_BIAS, num_hidden_layers=1, num_key_value_heads=4)
    fuse_blocks(model)
    if keeps_attention:
        keep_attention(model)
    x = torch.zeros(1, tokens, 256, dtype=torch.bfloat16, requires_grad=True)
    rope = [t.unsqueeze(1) for t in model.model.rotary_emb(x, torch.arange(tokens)[None])]
    with Live([*model.parameters(), *model.buffers(), x, *rope]) as live:
        model.model.layers[0](x, rope, recompute=recomputed)
    said = training._fused(Shape.of(model, torch.bfloat16), tokens, keeps_attention)
    assert live.peak <= (said.again if recomputed else said.kept - x.nbytes + said.passing)


@pytest.mark.parametrize("recomputed", [0, 1, 3])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (4, 192)])
def test_peak_of_a_plain_step_is_just_below_the_estimate(recomputed, rows, width, model, monkeypatch):
    monkeypatch.setattr(model.model, "recomputed", recomputed)
    monkeypatch.setattr("accessory.models.loss.CPU_CHUNK", GPU_CHUNK)  # the estimate is a GPU's
    batch_loss(model, batch(rows, width)).backward()  # gradients are there from now on
    tensors = [*model.parameters(), *model.buffers()]
    there = [*tensors, *(p.grad for p in tensors if p.grad is not None)]
    with Live(there) as live:
        batch_loss(model, batch(rows, width)).backward()
    estimated = estimate_training(model, Step(rows, width, fused=False), recomputed)
    passing = estimated.peak - sum(estimated.parts[name] for name in ("base", "trainables", "gradients", "optimizer"))
    assert live.peak <= 1.005 * passing
    assert passing <= (1.05 if recomputed < 3 else 1.25) * live.peak


def test_line_for_the_summary_adds_up_to_the_peak():
    line = estimate_training(tiny(loaded=False), Step(64, 2048), 0).line()
    peak, parts = line.split(" GiB: ")
    assert sum(float(part.rsplit(" ", 1)[1]) for part in parts.split("; ")) == pytest.approx(float(peak), abs=0.2)


@pytest.mark.parametrize("name", ["norm_bias_lora", "norm_bias"])
def test_more_tokens_take_more_and_more_recomputed_blocks_less(name):
    model = tiny({"norm_bias": NORM_BIAS, "norm_bias_lora": BOTH}[name], loaded=False)
    peaks = [estimate_training(model, Step(8, 512), n).peak for n in range(4)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[2]
    sizes = [estimate_training(model, Step(rows, width), 0).peak for rows, width in ((1, 64), (2, 64), (2, 128))]
    assert sizes == sorted(set(sizes))


def test_fewest_blocks_are_recomputed_that_make_it_fit():
    model, step = tiny(loaded=False), Step(8, 512)
    peaks = [estimate_training(model, step, n).peak for n in range(4)]
    for available in (peaks[0], peaks[0] - 1, peaks[1], peaks[1] - 1, peaks[2], peaks[3]):
        fewest = next(n for n in range(4) if peaks[n] <= available)
        assert recomputed_blocks_that_fit(model, step, available) == fewest
    assert recomputed_blocks_that_fit(model, step, 0) == 3


def test_host_memory_comes_before_recomputing_and_after_nothing():
    model, step = tiny(loaded=False), Step(8, 512)
    sent = replace(step, offloaded=True)
    plain, offloaded = ([estimate_training(model, s, n).peak for n in range(4)] for s in (step, sent))
    assert offloaded[0] < plain[0] and offloaded[1] < plain[1]
    assert save_memory(model, step, plain[0], None, None) == (0, False)
    assert save_memory(model, step, plain[0] - 1, None, None) == (0, True)
    assert save_memory(model, step, offloaded[0] - 1, None, None) == (1, True)
    assert save_memory(model, step, 0, None, None) == (3, True)
    assert save_memory(model, step, plain[0] - 1, None, False) == (1, False)
    assert save_memory(model, step, plain[0], None, True) == (0, True)


def test_what_is_told_of_recomputing_holds_and_host_memory_follows():
    model, step = tiny(loaded=False), Step(8, 512)
    none = estimate_training(model, step, 0).peak
    assert save_memory(model, step, none, False, None) == (0, False)
    assert save_memory(model, step, none - 1, False, None) == (0, True)
    assert save_memory(model, step, none, True, None) == (3, True)
    assert save_memory(model, step, none, True, False) == (3, False)
    unfused = replace(step, fused=False)
    assert save_memory(model, unfused, 0, None, None) == (3, False)


def test_host_memory_holds_inputs_and_the_residuals_of_what_is_not_recomputed():
    model, step = tiny(loaded=False), Step(8, 512)
    d = model.config.hidden_size
    assert [host_bytes(model, step, n) for n in (0, 1, 3)] == [n * 2 * 8 * 512 * d for n in (6, 5, 3)]
    assert host_bytes(model, Step(5, 512), 3) == host_bytes(model, step, 3)  # torch pins powers of two
    saved = estimate_training(model, step, 0).parts["activations"]
    saved -= estimate_training(model, replace(step, offloaded=True), 0).parts["activations"]
    assert saved == (6 - 3) * 2 * 8 * 512 * d  # three stay: in use, leaving, arriving


@pytest.mark.parametrize("captured", [False, True])
def test_attention_is_kept_with_the_memory_that_all_else_leaves(captured):
    model = tiny(loaded=False)
    step = Step(8, 512, captured=captured)
    d, heads = model.config.hidden_size, model.config.num_attention_heads
    kept = estimate_training(model, replace(step, keeps_attention=True), 0)
    more = kept.parts["activations"] - estimate_training(model, step, 0).parts["activations"]
    assert more == 3 * 8 * 512 * (2 * d + 4 * heads)  # outputs in bf16, and their logsumexp in fp32, of three blocks
    beside = kept.parts["activations"] + max(kept.parts["loss"], kept.parts["backward"]) if captured else 0
    assert attention_fits(model, step, 0, kept.peak + beside)
    assert not attention_fits(model, step, 0, kept.peak + beside - 1)
    assert not attention_fits(model, step, 1, 10 * kept.peak)
    assert not attention_fits(model, replace(step, fused=False), 0, 10 * kept.peak)


def test_graphs_fit_where_a_step_has_room_beside_the_captured_one():
    model = tiny(loaded=False)
    step = Step(8, 512)
    estimated = estimate_training(model, step, 0)
    own = estimated.parts["activations"] + max(estimated.parts["loss"], estimated.parts["backward"])
    assert graphs_fit(model, step, 0, estimated.peak + own)
    assert not graphs_fit(model, step, 0, estimated.peak + own - 1)
