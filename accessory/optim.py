"""AdamW in two groups and LLaMA2-Accessory's schedule, per optimizer step by fractional epoch."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from accessory.config import OptimConfig
from accessory.tuning.recipe import canonical_name, weight_kind

BETAS = (0.9, 0.95)


def make_optimizer(model: nn.Module, config: OptimConfig, fused: bool = False) -> AdamW:
    """Only LoRA matrices decay: pulling a norm towards 0, or a bias back to it, is not a prior anyone holds. fused: one
    kernel for all of a step, which can be told to leave everything as it is (`found_inf`). Not with loss scaling:
    Lightning leaves unscaling to such a kernel, and gradients would be clipped before it."""
    trainables = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert trainables and all(p.dtype == torch.float32 for _, p in trainables)
    decayed = [p for name, p in trainables if weight_kind(canonical_name(name)) == "lora"]
    others = [p for name, p in trainables if weight_kind(canonical_name(name)) != "lora"]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=config.lr, betas=BETAS, fused=fused or None)


def lr_at(epoch: float, config: OptimConfig, epochs: float) -> float:
    """Learning rate at a fractional epoch: linear warmup from 0, then a cosine to min_lr."""
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    progress = min(1.0, (epoch - config.warmup_epochs) / max(epochs - config.warmup_epochs, 1e-12))
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_scheduler(optimizer: AdamW, config: OptimConfig, steps_per_epoch: int, epochs: float) -> LambdaLR:
    """epochs: length of the schedule, fractional where max_steps ends the run earlier."""
    # A step's rate is read at its end, (step + 1) / steps_per_epoch: the first step of a warmup is not wasted on 0.
    return LambdaLR(optimizer, lambda step: lr_at((step + 1) / steps_per_epoch, config, epochs) / config.lr)
