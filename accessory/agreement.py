"""What all ranks of a run must have in common, compared before its first step.

A rank with other codes, or with the same codes and other scales, trains another model, and nothing else would show it:
the all-reduced gradients look fine. Nor would a node whose data, or whose checkpoints, are not the first one's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from accessory.digest import digest
from accessory.errors import UserError
from accessory.files import sha256
from accessory.models.llama import Llama
from accessory.resume import SUMS_FILE
from accessory.strategies import gather

SAME_COMMAND = "start all ranks with the same command, and keep base, data and --output_dir where every node sees them"
UNSET_PRECISION = "give all the same --precision; unset it is what each machine has instructions for"


def refuse_other_runs(settings: dict[str, Any], checkpoint: Optional[Path]) -> None:
    """Stop all ranks where one was given other settings or data than rank 0, or sees another checkpoint to continue."""
    mine = None if checkpoint is None else f"{checkpoint.name} ({sha256(checkpoint / SUMS_FILE)[:8]})"
    expected, *others = gather({"checkpoint": mine} | settings)  # a cause before what follows from it
    for rank, found in enumerate(others, 1):
        for key in {**expected, **found}:
            if found.get(key) != expected.get(key):
                advice = UNSET_PRECISION if key == "precision" else SAME_COMMAND
                raise UserError(f"rank {rank} has {key}={found.get(key)!r}, rank 0 has {expected.get(key)!r}; {advice}")


def weight_digests(model: nn.Module) -> dict[str, int]:
    """A digest for every parameter and buffer, by name."""
    return {name: digest(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def refuse_other_weights(model: Llama) -> None:
    """Stop all ranks where one holds another weight than rank 0; with fsdp, before the shares are connected."""
    if not torch.distributed.is_initialized():
        return
    mine = weight_digests(model) | (model.sharded.digests if model.sharded is not None else {})
    if len(set(gather(hashlib.sha256(repr(sorted(mine.items())).encode()).digest()))) == 1:
        return
    expected, *others = gather(mine)
    for rank, found in enumerate(others, 1):
        if odd := sorted(name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)):
            raise UserError(
                f"rank {rank} holds other weights than rank 0: {odd[0]}"
                f"{f' and {len(odd) - 1} more' if len(odd) > 1 else ''}; every rank must read the same "
                "--pretrained_path and quantize it with the same versions on the same kind of device"
            )
