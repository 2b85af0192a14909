"""Fused blocks in a model, and the 16-bit copies of what trains that they compute with."""

from __future__ import annotations

from typing import Optional

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from accessory.fused.block import FusedBlock, FusedNorm
from accessory.fused.host import HostStack
from accessory.kernels import obstacle
from accessory.models.llama import Llama


def why_not_fused(model: Llama) -> Optional[str]:
    """What a fused block cannot do and this model asks for; None where all is well."""
    for module in model.model.layers.modules():
        if isinstance(module, LoraLayer) and any(isinstance(d, nn.Dropout) for d in module.lora_dropout.values()):
            return "recipe.dropout is above 0"
    device = model.device
    if device.type == "cuda" and (reason := obstacle("accessory.fused.kernels_cuda", device)) is not None:
        return f"its kernels do not run here: {reason}"
    return None


class Copies:
    """All 16-bit copies of a model's trainables, brought up to date together: a few launches, not one for each."""

    def __init__(self, pairs: list[tuple[Tensor, nn.Parameter, float]]):
        self._copies = [copy for copy, _, _ in pairs]
        self._masters = [master for _, master, _ in pairs]
        self._scaled: dict[float, list[Tensor]] = {}
        for copy, _, factor in pairs:
            if factor != 1:
                self._scaled.setdefault(factor, []).append(copy)

    @torch.no_grad()
    def refresh(self) -> None:
        if not self._copies:
            return
        torch._foreach_copy_(self._copies, [master.detach() for master in self._masters])
        for factor, copies in self._scaled.items():
            torch._foreach_mul_(copies, factor)


def fuse_blocks(model: Llama) -> None:
    """Let the decoder blocks of a loaded model compute by `FusedBlock`; with a KV cache they stay as they are."""
    assert why_not_fused(model) is None
    pairs = []
    for block in model.model.layers:
        fused = FusedBlock(block)
        pairs += [pair for group in fused.groups for pair in group.copies(model.dtype)]
        block.forward = fused  # not the module: hooks of fsdp stay around it
    norm = model.model.norm
    norm.forward = lambda x: FusedNorm.apply(x, norm.weight, norm.eps)
    copies = Copies(pairs)
    model.model.register_forward_pre_hook(lambda *_: copies.refresh())
    model.model.fused = True


def keep_attention(model: Llama) -> None:
    """Let blocks that are not recomputed keep attention's output for backward."""
    for block in model.model.layers:
        block.forward.keeps_attention = True


def keep_on_host(model: Llama, tokens: int) -> HostStack:
    """Let blocks keep their input in host memory, and those that are not recomputed the residual after attention as
    well. tokens: of the largest micro-batch."""
    stack = HostStack(model.device, tokens * model.config.hidden_size)
    for block in model.model.layers:
        block.forward.host = stack
    model.model.register_forward_pre_hook(lambda *_: stack.clear() if torch.is_grad_enabled() else None)
    return stack
