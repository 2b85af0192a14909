"""Cross-entropy of a frozen output layer, without ever holding the logits of all tokens.

    loss = sum_i  logsumexp(W h_i) - (W h_i)[t_i]          d loss / d h_i = (softmax(W h_i) - e_{t_i}) W

Only tokens with a target are projected, a chunk at a time; since W is frozen, the gradient of h is all that backward
needs, and it is computed in forward, where the chunk's logits are at hand.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens: the fp32 logits of 512 take 65 MB with 32,000 words; on a CPU larger ones are a little faster.
GPU_CHUNK, CPU_CHUNK = 512, 1024


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, counted: Optional[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = GPU_CHUNK if hidden.is_cuda else CPU_CHUNK
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            log_probabilities = F.linear(hidden[chunk], weight).float().log_softmax(-1)
            target = targets[chunk, None]
            gathered = log_probabilities.gather(1, target)
            total -= (gathered if counted is None else gathered * counted[chunk, None]).sum()
            if gradient is not None:
                difference = log_probabilities.exp_()
                difference.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
                if counted is not None:
                    difference.mul_(counted[chunk, None])
                gradient[chunk] = difference.to(hidden.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, fixed_shape: bool = False) -> Tensor:
    """hidden: [b, s, d]; weight: [v, d], frozen; targets: int64 [b, s], -100 ignored -> fp32 sum over the targets.

    fixed_shape: project the ignored tokens too, and count them as zero, so that no shape depends on the data."""
    assert not weight.requires_grad
    counted = targets != -100
    if fixed_shape:
        mask = counted.flatten()
        return _FrozenHeadLoss.apply(hidden.flatten(0, 1), weight, targets.flatten().clamp(min=0), mask)
    return _FrozenHeadLoss.apply(hidden[counted], weight, targets[counted], None)
