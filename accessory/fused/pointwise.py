"""What a block does between its matmuls, forward and backward, as plain functions.

On a CPU they run as they stand here. On a GPU torch.compile makes a kernel of each, or, where its kernel was measurably
slower or took more memory, Triton does (`kernels_cuda`). Shapes: m tokens, d hidden size, f the MLP's width, n heads of
size e. Statistics and gradients of weights are fp32, everything else has the activations' dtype; within a function
nothing is rounded before its end. Those of backward can also say what their result sums to over the tokens (`summed`),
which is the gradient of the bias it was added to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor


def compiled_on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; for CUDA tensors, as torch.compile fuses it."""
    compiled = torch.compile(function, dynamic=None)

    def run(first: Tensor, *rest: Any) -> Any:
        if not first.is_cuda:
            return function(first, *rest)
        # Detached, as requires_grad is a reason to compile anew.
        return compiled(*(x.detach() if isinstance(x, Tensor) else x for x in (first, *rest)))

    run.plain = function
    return run


def kernel_on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; for CUDA tensors, the kernel of its name."""

    def run(first: Tensor, *rest: Any) -> Any:
        if not first.is_cuda:
            return function(first, *rest)
        from accessory.fused import kernels_cuda  # Triton need not be installed elsewhere

        return getattr(kernels_cuda, function.__name__)(first, *rest)

    run.plain = function
    return run


@compiled_on_gpu
def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x: [m, d] -> RMSNorm(x) * weight [m, d], 1 / rms(x) fp32 [m, 1]."""
    wide = wide_type(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return ((wide * rstd) * weight).to(x.dtype), rstd


@compiled_on_gpu
def add_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + y [m, d], and `norm` of it."""
    total = x + y
    wide = wide_type(total)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return total, ((wide * rstd) * weight).to(x.dtype), rstd


@compiled_on_gpu
def norm_again(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """`norm`'s output once more, where 1 / rms(x) is known."""
    return ((wide_type(x) * rstd) * weight).to(x.dtype)


@kernel_on_gpu
def norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor, summed: bool = False
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """Gradients of x, [m, d], and of the weight, fp32 [d]; x's sum over the tokens, fp32 [d]. residual: the gradient
    that passes beside the norm, which is added to x's."""
    dy, normed = wide_type(dy), wide_type(x) * rstd
    scaled = dy * weight
    dx = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    dx = wide_type(residual) + dx
    return dx.to(x.dtype), (dy * normed).sum(0), dx.sum(0) if summed else None


@kernel_on_gpu
def rotate_(qkv: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    """qkv: [m, n, e], the heads of q, k and v; cos, sin: [m, e], whose halves are equal. The first `rotated` heads get
    rotary embedding (arXiv:2104.09864) in the halves layout, in place."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    heads = qkv[:, :rotated]
    first, second = heads.chunk(2, dim=-1)
    heads.copy_(heads * cos + torch.cat((-second, first), -1) * sin)
    return qkv


@kernel_on_gpu
def rotate_back_(
    qkv: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, summed: bool = False
) -> tuple[Tensor, Optional[Tensor]]:
    """Gradients of the rotated q and k and of v, [b, heads, s, e] each -> of what was rotated, written over qkv,
    [b * s, n, e]: a rotation's transpose turns back; and its sum over the tokens, fp32 [n * e]."""
    dq, dk, dv = (wide_type(d.transpose(1, 2).flatten(0, 1)) for d in (dq, dk, dv))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = []
    for gradient in (dq, dk):
        first, second = (gradient * sin).chunk(2, dim=-1)
        turned.append(gradient * cos + torch.cat((second, -first), -1))
    d_qkv = torch.cat((*turned, dv), 1)
    return qkv.copy_(d_qkv), d_qkv.flatten(1).sum(0) if summed else None


@compiled_on_gpu
def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up: [m, 2f] -> silu(gate) * up, [m, f] (arXiv:2002.05202)."""
    gate, up = (wide_type(half) for half in gate_up.chunk(2, dim=-1))
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


@kernel_on_gpu
def swiglu_backward_(gate_up: Tensor, dh: Tensor, summed: bool = False) -> tuple[Tensor, Optional[Tensor]]:
    """dh: [m, f]. Writes the gradient of gate_up, [m, 2f], over it; and its sum over the tokens, fp32 [2f]."""
    gate, up = (wide_type(half) for half in gate_up.chunk(2, dim=-1))
    dh, share = wide_type(dh), torch.sigmoid(gate)
    silu = gate * share
    d_gate_up = torch.cat((dh * up * (share + silu * (1 - share)), dh * silu), -1)
    return gate_up.copy_(d_gate_up), d_gate_up.sum(0) if summed else None


def wide_type(x: Tensor) -> Tensor:
    """16-bit numbers as fp32, others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
