"""Frozen linears that share their input, computed as one: q, k and v; gate and up.

    forward   y = x W^T + b + (x A^T) (s B)^T            W, A, b: the linears' stacked, B: block-diagonal
    backward  dx = dy W + u A,   u = dy (s B)            dA = u^T x,   dB = s dy^T (x A^T),   db = sum over tokens of dy

W exists in 16 bit only while it is multiplied; where that is too much, one linear's at a time. Where a backend's kernel
can add s B A to the weight as it dequantizes (in fp32, rounded once), the adapter's share of y and of dx comes out of
the same matmul.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from accessory.quantization import QuantLinear


@dataclass
class Part:
    """One linear of a group: where its outputs lie, and what trains in it."""

    layer: QuantLinear
    rows: slice
    a: Optional[nn.Parameter] = None
    b: Optional[nn.Parameter] = None
    scale: float = 1.0
    ranks: Optional[slice] = None


MAX_RANK = 64  # what the kernels add to a weight, or multiply beside others
STACKED = 2**28  # numbers of several linears' weights together at most; gate and up of a 70B model have 470 million
FOLD_FROM = 4096  # tokens; below, adding the adapter's product to y and dx is cheaper than adding it to the weight


class Group:
    """Linears of one input. 16-bit copies of what trains are kept, and are `refresh`ed at the start of each step."""

    def __init__(self, linears: list[nn.Module]):
        self.parts: list[Part] = []
        rows = ranks = 0
        for linear in linears:
            layer = linear.base_layer if isinstance(linear, LoraLayer) else linear
            part = Part(layer, slice(rows, rows + layer.out_features))
            if isinstance(linear, LoraLayer):
                (name,) = linear.active_adapters
                part.a, part.b = linear.lora_A[name].weight, linear.lora_B[name].weight
                part.scale, part.ranks = linear.scaling[name], slice(ranks, ranks + part.a.shape[0])
                ranks += part.a.shape[0]
            self.parts.append(part)
            rows += layer.out_features
        self.rows, self.ranks, self.in_features = rows, ranks, self.parts[0].layer.in_features
        # In 16 bit a sum with a small adapter would round it away; a kernel that dequantizes has the weight in fp32.
        wide = max((part.a.shape[0] for part in self.parts if part.a is not None), default=0) > MAX_RANK
        self.can_fold = not wide and all(part.layer.can_fold for part in self.parts)
        together = rows * self.in_features <= STACKED
        self.stacks = [list(range(len(self.parts)))] if together else [[i] for i in range(len(self.parts))]
        self.bias: Optional[Tensor] = None
        self._a: Optional[Tensor] = None
        self._b: dict[int, Tensor] = {}

    @property
    def trainables(self) -> list[nn.Parameter]:
        """What may train: for each linear its bias, A and B, as far as it has them."""
        found = [p for part in self.parts for p in (part.layer.bias, part.a, part.b)]
        return [p for p in found if p is not None]

    @property
    def trains_bias(self) -> bool:
        return any(part.layer.bias is not None and part.layer.bias.requires_grad for part in self.parts)

    def copies(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, float]]:
        """Make the 16-bit copies: (copy, master, factor) of each."""
        pairs = []
        device = self.parts[0].layer.payload[0].device
        if any(part.layer.bias is not None for part in self.parts):
            self.bias = torch.zeros(self.rows, dtype=dtype, device=device)
        if self.ranks:
            self._a = torch.zeros(self.ranks, self.in_features, dtype=dtype, device=device)
        for i, part in enumerate(self.parts):
            if part.layer.bias is not None:
                pairs.append((self.bias[part.rows], part.layer.bias, 1.0))
            if part.a is not None:
                self._b[i] = torch.zeros(part.b.shape, dtype=dtype, device=device)
                pairs += [(self._a[part.ranks], part.a, 1.0), (self._b[i], part.b, part.scale)]
        return pairs

    def _weight(self, dtype: torch.dtype, folded: bool, stack: list[int]) -> tuple[Tensor, slice]:
        """The stacked weight [out of the stack's parts, in], plus s B A, if folded; and which of all rows these are."""
        first, last = self.parts[stack[0]], self.parts[stack[-1]]
        rows = slice(first.rows.start, last.rows.stop)
        if len(stack) == 1 and not folded:
            return first.layer.dequantize(dtype), rows  # an unquantized one is not copied
        device = first.layer.payload[0].device
        weight = torch.empty(rows.stop - rows.start, self.in_features, dtype=dtype, device=device)
        for i in stack:
            part = self.parts[i]
            lora = (self._b[i], self._a[part.ranks]) if folded and part.a is not None else None
            part.layer.dequantize_into(weight[part.rows.start - rows.start : part.rows.stop - rows.start], lora)
        return weight, rows

    def _folds(self, x: Tensor) -> bool:
        return self.can_fold and bool(self.ranks) and len(x) >= FOLD_FROM

    def project(self, x: Tensor) -> Optional[Tensor]:
        """x: [m, in] -> x A^T [m, ranks of all]; None without LoRA."""
        return x @ self._a.T if self.ranks else None

    def forward(self, x: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        """x: [m, in] -> y [m, out of all], and `project(x)`."""
        folded, t = self._folds(x), self.project(x)
        share = None if folded or t is None else self._share(t)
        return self._product(x, folded, share), t

    def _share(self, t: Tensor) -> Tensor:
        """t: [m, ranks of all] -> t (s B)^T + b, [m, out of all]."""
        share = t.new_empty(len(t), self.rows)
        for i, part in enumerate(self.parts):
            out, bias = share[:, part.rows], None if self.bias is None else self.bias[part.rows]
            if part.a is not None:
                adapter_(t[:, part.ranks], self._b[i], bias, out)
            elif bias is not None:
                out.copy_(bias)
            else:
                out.zero_()
        return share

    def _product(self, x: Tensor, folded: bool, share: Optional[Tensor]) -> Tensor:
        """x W^T + b; with a share x W^T + share, written over the share, and rounded once: what is small is lost where
        it is added to rounded numbers (QuantLinear.forward)."""
        if len(self.stacks) == 1 and share is None:
            weight, _ = self._weight(x.dtype, folded, self.stacks[0])
            return F.linear(x, weight, self.bias)
        y = x.new_empty(len(x), self.rows) if share is None else share
        for stack in self.stacks:
            weight, rows = self._weight(x.dtype, folded, stack)
            if share is not None:
                y[:, rows].addmm_(x, weight.T)
            elif self.bias is None:
                torch.mm(x, weight.T, out=y[:, rows])
            else:
                torch.addmm(self.bias[rows], x, weight.T, out=y[:, rows])
            del weight  # before the next one is made
        return y

    def input_gradient(self, dy: Tensor, u: Optional[Tensor]) -> Tensor:
        """dy: [m, out of all]; u as from `gradients` -> dx [m, in], rounded after each stack."""
        folded = self._folds(dy)
        dx = None if folded or u is None else u @ self._a
        for stack in self.stacks:
            weight, rows = self._weight(dy.dtype, folded, stack)
            dx = dy[:, rows] @ weight if dx is None else dx.addmm_(dy[:, rows], weight)
            del weight
        return dx

    def gradients(
        self, dy: Tensor, x: Optional[Tensor], t: Optional[Tensor], d_bias: Optional[Tensor] = None
    ) -> tuple[list[Optional[Tensor]], Optional[Tensor]]:
        """dy: [m, out of all]; x and t as in forward, None without LoRA; d_bias: dy's sum over the tokens, where it is
        known -> the gradients of `trainables` in fp32, and u = dy (s B), [m, ranks of all]."""
        d_a = u = None
        if d_bias is None and self.trains_bias:
            d_bias = wide_mm(dy.new_ones(8, len(dy)), dy)[0]  # a sum over the tokens, at a matmul's speed
        if self.ranks:
            u = dy.new_empty(len(dy), self.ranks)
            for i, part in self._adapted:
                torch.mm(dy[:, part.rows], self._b[i], out=u[:, part.ranks])
            d_a = wide_mm(u.T, x)
        found: list[Optional[Tensor]] = []
        for part in self.parts:
            if part.layer.bias is not None:
                found.append(None if d_bias is None else d_bias[part.rows])
            if part.a is not None:
                d_b = wide_mm(dy[:, part.rows].T, t[:, part.ranks])
                found += [d_a[part.ranks], d_b if part.scale == 1 else d_b * part.scale]
        return found, u

    @property
    def _adapted(self) -> list[tuple[int, Part]]:
        """The parts that have LoRA, with their numbers."""
        return [(i, part) for i, part in enumerate(self.parts) if part.a is not None]


def adapter_(t: Tensor, b: Tensor, bias: Optional[Tensor], out: Tensor) -> Tensor:
    """t: [m, r], b: [n, r], bias: [n] -> t b^T + bias, written to out, [m, n]; rows of t and out may be apart."""
    if bias is None:
        return torch.mm(t, b.T, out=out)
    if t.is_cuda and t.element_size() == 2 and b.shape[1] <= MAX_RANK:
        from accessory.fused import kernels_cuda  # Triton need not be installed elsewhere

        return kernels_cuda.adapter_(t, b, bias, out)
    return torch.addmm(bias, t, b.T, out=out)


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 16-bit matrices in fp32."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b if a.dtype in (torch.float32, torch.float64) else a.float() @ b.float()
