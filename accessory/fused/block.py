"""A decoder block as one function with a hand-written backward.

What autograd would keep of a block is decided here instead: its input, the rotated q, k and v, the residual after
attention, and gate and up. Everything else is a pointwise step or a dequantization away and is made again in backward.
Attention's output is a tenth more to keep, and the longer the rows, the more it takes to make it again, so
`keeps_attention` is a choice. A *recomputed* block keeps its input alone, and in backward repeats its forward up to
gate and up: the last matmul's result is needed by nothing. Input and residual can lie in host memory meanwhile: they
are a fifth of what a block keeps, and are copied while it computes.

Frozen weights need no gradients, so a matmul's backward is one matmul; trainables are reached through `Group`.
"""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from accessory.fused import pointwise
from accessory.fused.host import HostStack, Place
from accessory.fused.linears import Group
from accessory.models.llama import Block, Cache, Mask, attend

Kept = Union[Tensor, Place]


class FusedBlock:
    """The forward of `block` while it trains; everything that it holds, the block holds too."""

    def __init__(self, block: Block):
        attention, mlp = block.self_attn, block.mlp
        self.block, self.plain = block, block.forward
        self.qkv = Group([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = Group([attention.o_proj])
        self.gate_up = Group([mlp.gate_proj, mlp.up_proj])
        self.down = Group([mlp.down_proj])
        self.norms = block.input_layernorm, block.post_attention_layernorm
        self.host: Optional[HostStack] = None  # where the input lies until backward, and the residual that is kept
        self.keeps_attention = False  # its output too, unless the block is recomputed
        self.head_dim = attention.head_dim
        queries, keys, _ = (part.layer.out_features // attention.head_dim for part in self.qkv.parts)
        self.heads = (queries, keys, keys)

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        return self.qkv, self.out, self.gate_up, self.down

    def __call__(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Mask = None,
        cache: Optional[Cache] = None,
        recompute: bool = False,
    ) -> Tensor:
        """As Block.forward; recompute: keep nothing but x for backward."""
        if cache is not None:
            return self.plain(x, rope, mask, cache)
        b, s, d = x.shape
        cos, sin = (t.expand(b, 1, s, -1).reshape(b * s, -1) for t in rope)
        trainables = [norm.weight for norm in self.norms] + [p for group in self.groups for p in group.trainables]
        trains = torch.is_grad_enabled()
        flat = _Function.apply(x.reshape(b * s, d), self, (cos, sin), (b, s), mask, recompute, trains, *trainables)
        return flat.view(b, s, d)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: tuple[int, int],
        mask: Mask,
        repeated: bool = False,
        keeps: bool = False,
    ) -> tuple[Optional[Tensor], list[Any]]:
        """x: [m, d] -> the block's output, and what backward needs besides x. repeated: within backward, where the
        output is not needed, and attention's own backward is. keeps: a backward will come, and repeat nothing: the
        residual goes where it lies until then, and attention's output is kept if it is to be."""
        first, second = self.norms
        keeps_attention = repeated or (keeps and self.keeps_attention)
        normed, rstd_1 = pointwise.norm(x, first.weight, first.eps)
        qkv, t_qkv = self.qkv.forward(normed)
        qkv = pointwise.rotate_(qkv.unflatten(1, (-1, self.head_dim)), *rope, sum(self.heads[:2]))
        heard = self.attend(qkv, rows, mask, for_backward=keeps_attention)
        y, t_out = self.out.forward(heard[0].detach())
        middle, normed, rstd_2 = pointwise.add_norm(x, y, second.weight, second.eps)
        residual = self.host.push(middle) if keeps and self.host is not None else middle
        heard = [heard] if keeps_attention else []
        del y  # beside all that the blocks keep, the MLP is where a forward takes most
        gate_up, t_gate_up = self.gate_up.forward(normed)
        del normed
        kept = [rstd_1, qkv, residual, rstd_2, gate_up, t_qkv, t_out, t_gate_up]
        if repeated:
            return None, [*kept, None, *heard]
        y, t_down = self.down.forward(pointwise.swiglu(gate_up))
        y += middle
        return y, [*kept, t_down, *heard]

    def backward(
        self, dy: Tensor, x: Kept, kept: list[Any], rope: tuple[Tensor, Tensor], rows: tuple[int, int], mask: Mask
    ) -> tuple[Tensor, list[Optional[Tensor]]]:
        """dy: [m, d] -> dx [m, d], and the gradients of the norms and of each group's trainables. Empties `kept`, lest
        the caller hold what is done with."""
        rstd_1, qkv, residual, rstd_2, gate_up, t_qkv, t_out, t_gate_up, t_down, *heard = kept
        kept.clear()
        first, second = self.norms

        h = pointwise.swiglu(gate_up) if self.down.ranks else None
        down, u = self.down.gradients(dy, h, self.down.project(h) if self.down.ranks and t_down is None else t_down)
        del h
        d_gate_up, sums = pointwise.swiglu_backward_(gate_up, self.down.input_gradient(dy, u), self.gate_up.trains_bias)
        del gate_up
        middle = self.fetch(residual)
        normed = pointwise.norm_again(middle, rstd_2, second.weight) if self.gate_up.ranks else None
        of_gate_up, u = self.gate_up.gradients(d_gate_up, normed, t_gate_up, sums)
        del normed
        d_normed = self.gate_up.input_gradient(d_gate_up, u)
        del d_gate_up
        d_middle, d_second, sums = pointwise.norm_backward(
            d_normed, middle, rstd_2, second.weight, dy, self.out.trains_bias
        )
        del d_normed, middle

        ((heard, *leaves),) = heard or [self.attend(qkv, rows, mask, for_backward=True)]
        of_out, u = self.out.gradients(d_middle, heard.detach(), t_out, sums)
        d_heads = torch.autograd.grad(heard, leaves, self.out.input_gradient(d_middle, u))
        del heard, leaves
        d_qkv, sums = pointwise.rotate_back_(qkv, *d_heads, *rope, self.qkv.trains_bias)
        d_qkv = d_qkv.flatten(1)
        del qkv, d_heads
        x = self.fetch(x)
        normed = pointwise.norm_again(x, rstd_1, first.weight) if self.qkv.ranks else None
        of_qkv, u = self.qkv.gradients(d_qkv, normed, t_qkv, sums)
        del normed
        d_normed = self.qkv.input_gradient(d_qkv, u)
        dx, d_first, _ = pointwise.norm_backward(d_normed, x, rstd_1, first.weight, d_middle)
        return dx, [d_first, d_second, *of_qkv, *of_out, *of_gate_up, *down]

    def fetch(self, kept: Kept) -> Tensor:
        return kept if isinstance(kept, Tensor) else self.host.pop(kept)

    def attend(self, qkv: Tensor, rows: tuple[int, int], mask: Mask, for_backward: bool) -> tuple[Tensor, ...]:
        """qkv: [m, heads, e], rotated -> attention's output [m, queries * e], and the q, k and v, [b, heads, s, e],
        that autograd can differentiate it by, if it is for backward."""
        q, k, v = (t.unflatten(0, rows).transpose(1, 2) for t in qkv.detach().split(self.heads, 1))
        with torch.set_grad_enabled(for_backward):
            leaves = [t.requires_grad_(for_backward) for t in (q, k, v)]
            return attend(*leaves, mask).flatten(0, 1).flatten(1), *leaves


class FusedNorm(torch.autograd.Function):
    """The norm behind the last block: keeps its input and the statistics, where autograd would keep fp32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = pointwise.norm(x.flatten(0, -2), weight, eps)
        ctx.save_for_backward(x, rstd, weight)
        return y.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        x, rstd, weight = ctx.saved_tensors
        flat = dy.contiguous().flatten(0, -2)
        dx, d_weight, _ = pointwise.norm_backward(flat, x.flatten(0, -2), rstd, weight, torch.zeros_like(flat))
        return dx.view_as(x), d_weight if ctx.needs_input_grad[1] else None, None


class _Function(torch.autograd.Function):
    """Keeps by itself what backward needs, where save_for_backward would hold all of it until backward has ended: a
    block's peak would be larger by gate and up. So backward runs once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, block: FusedBlock, rope: tuple, rows: tuple, mask: Mask, recompute: bool, trains: bool,
        *_: nn.Parameter,
    ) -> Tensor:  # fmt: skip
        trains = trains and any(ctx.needs_input_grad)
        kept_x = block.host.push(x) if trains and block.host is not None else x
        y, kept = block.forward(x, rope, rows, mask, keeps=trains and not recompute)
        ctx.block, ctx.where, ctx.kept = block, (rope, rows, mask), [kept_x] if recompute else [kept_x, *kept]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        block, kept, ctx.kept = ctx.block, ctx.kept, None
        assert kept is not None, "a fused block's backward runs once"
        x, *kept = kept
        if not kept:
            x = block.fetch(x)
            _, kept = block.forward(x, *ctx.where, repeated=True)
        dx, gradients = block.backward(dy.contiguous(), x, kept, *ctx.where)
        wanted = ctx.needs_input_grad
        gradients = [g if wants else None for g, wants in zip(gradients, wanted[7:], strict=True)]
        return dx if wanted[0] else None, None, None, None, None, None, None, *gradients
