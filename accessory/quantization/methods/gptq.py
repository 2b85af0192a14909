"""GPTQ (arXiv:2210.17323): rounding errors are made up for by the weights that are not rounded yet.

A linear's output error for a row of W, rounded to Q, is (w - q) H (w - q)^T with the Hessian of its inputs

    H = (2/n) sum x x^T + percdamp mean(diag H) I

Rounding column i and choosing the columns after it best (eq. 2, 3) is, with the upper triangular U of H^-1 = U^T U
(section 3.3, step 3):

    e = (W[:, i] - Q[:, i]) / U[i, i]        W[:, i+1:] -= e U[i, i+1:]

Inside a block of columns, a column is brought up to date when its turn comes; the columns behind a block, when it ends.
So the result does not depend on blocksize. A block never spans the start of a group: the group's scales come from
weights that have seen all errors before them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Optional

import torch
from torch import Tensor

from accessory.errors import UserError
from accessory.quantization import rtn
from accessory.quantization.packed import Packed, Scheme
from accessory.quantize_options import GptqConfig


class Hessian:
    """(2/n) sum x x^T over the n inputs x that were added: `matrix`, fp32 [in, in]."""

    def __init__(self, in_features: int, device: Optional[torch.device] = None):
        self.matrix = torch.zeros(in_features, in_features, device=device)
        self.count = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """x: float [..., in]. Keeps the mean, not the sum: fp32 holds it however many inputs come."""
        x = x.reshape(-1, x.shape[-1]).to(self.matrix)
        total = self.count + len(x)
        if len(x):
            self.matrix.addmm_(x.T, x, beta=self.count / total, alpha=2 / total)
        self.count = total


@torch.no_grad()
def quantize(weight: Tensor, hessian: Hessian, scheme: Scheme, options: GptqConfig) -> Packed:
    """weight: float [out, in], on the Hessian's device. options.true_sequential is up to the caller.

    Weights of inputs that were always 0 become 0. Raises UserError if some input was not finite.
    """
    assert hessian.count, "no inputs were added"
    out, in_features = weight.shape
    size = in_features // scheme.groups(in_features)
    matrix = hessian.matrix.clone()
    dead = matrix.diagonal() == 0
    matrix.diagonal()[dead] = 1
    weight = weight.float().masked_fill(dead, 0)

    column = torch.arange(in_features, device=weight.device)
    order = matrix.diagonal().argsort(descending=True, stable=True) if options.actorder else column
    fixed = options.static_groups or size == in_features
    group = (order if fixed else column) // size  # of the columns in `order`
    scales, zeros = rtn.grid(weight, scheme)  # unless fixed, each group's are found anew when its turn comes
    factor = _inverse_factor(matrix[order][:, order], options.percdamp)
    del matrix

    bounds = {*range(0, in_features, options.blocksize), in_features}
    if not fixed:
        bounds.update(range(0, in_features, size))
    columns = weight.T[order].contiguous()  # [in, out]
    codes = torch.empty_like(columns, dtype=torch.uint8)
    groups = group.tolist()
    for start, end in pairwise(sorted(bounds)):
        if not fixed and start % size == 0:
            own_scheme = Scheme(scheme.bits, -1, scheme.sym)
            own_scales, own_zeros = rtn.grid(columns[start : start + size].T, own_scheme)
            scales[:, groups[start]], zeros[:, groups[start]] = own_scales[:, 0], own_zeros[:, 0]
        errors = torch.empty(end - start, out, device=weight.device)
        for i in range(start, end):
            own = slice(groups[i], groups[i] + 1)
            current = columns[i] - factor[start:i, i] @ errors[: i - start]
            codes[i] = rtn.encode(current[:, None], scales[:, own], zeros[:, own], scheme.bits)[:, 0]
            rounded = (codes[i].float() - zeros[:, groups[i]]) * scales[:, groups[i]]
            errors[i - start] = (current - rounded) / factor[i, i]
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)

    position = order.argsort()
    g_idx = group[position].int() if options.actorder and not fixed else None
    return Packed(codes.T[:, position].contiguous(), scales, zeros, scheme.bits, g_idx)


def _inverse_factor(matrix: Tensor, percdamp: float) -> Tensor:
    """Upper triangular U, fp32 [in, in], with U^T U the inverse of the damped matrix.

    With rows and columns in reverse, matrix = L L^T gives U = L^-1, reversed back: no inverse to factorize again.
    """
    attempts = [(torch.float32, percdamp), (torch.float64, percdamp), (torch.float64, max(10 * percdamp, 0.1))]
    for dtype, damping in attempts:
        damped = matrix.to(dtype, copy=True)
        damped.diagonal().add_(damping * damped.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            identity = torch.eye(len(matrix), dtype=dtype, device=matrix.device)
            factor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).float()
            if factor.isfinite().all():
                return factor
    raise UserError("gptq: activations are not finite numbers in this precision: set precision=bf16 or precision=tf32")
