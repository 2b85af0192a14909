"""Where a run runs: devices, ranks, and how they share the work."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from pytorch_lightning.plugins import MixedPrecision, TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from accessory.config import DataParallel, StrategyConfig
from accessory.errors import UserError

# How long ranks wait for each other: one may read and quantize a large base from a slower disk than another.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class World:
    """This process among all: as torchrun says, or alone."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def nodes(self) -> int:
        return self.size // self.local_size


def find_world() -> World:
    size, local_size = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    if not torch.cuda.is_available():
        return World(rank, local_rank, size, local_size, torch.device("cpu"))
    if local_size > torch.cuda.device_count():
        raise UserError(
            f"torchrun --nproc_per_node={local_size}, but this machine has {torch.cuda.device_count()} GPU(s): "
            "start one process per GPU"
        )
    torch.cuda.set_device(local_rank)
    return World(rank, local_rank, size, local_size, torch.device("cuda", local_rank))


def is_sharded(strategy: StrategyConfig, world: World) -> bool:
    """Whether a rank holds no more than its share of the base."""
    return strategy.data_parallel is DataParallel.fsdp and world.size > 1


def gather(value: Any) -> list[Any]:
    """The value of every rank, in their order."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


class Vote:
    """Whether any rank wants something, found out while a GPU computes: to read it off the stream that computes would
    be to wait for all that is on it."""

    def __init__(self, device: torch.device):
        self._told = torch.zeros(1, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._read = torch.zeros(1, pin_memory=self._stream is not None)
        self._ready = torch.cuda.Event() if self._stream is not None else None

    def ask(self, wanted: bool) -> None:
        """Comes before what is to be computed meanwhile; on every rank equally often."""
        if self._ready is not None:
            torch.cuda.current_stream().wait_event(self._ready)  # the last answer is read
        self._told.fill_(wanted)
        work = torch.distributed.all_reduce(self._told, async_op=True)
        if self._stream is None:
            work.wait()
            return
        with torch.cuda.stream(self._stream):
            work.wait()
            self._read.copy_(self._told, non_blocking=True)
            self._ready.record()

    def answer(self) -> bool:
        """Of the newest question; waits until every rank has asked it, and this one's GPU has come to it."""
        if self._ready is None:
            return self._told.item() > 0
        self._ready.synchronize()
        return self._read.item() > 0


def join_ranks(world: World) -> None:
    """Let the ranks talk to each other, from here until the process ends."""
    if world.size == 1 or torch.distributed.is_initialized():
        return
    gpu = {"backend": "nccl", "device_id": world.device} if world.device.type == "cuda" else {"backend": "gloo"}
    torch.distributed.init_process_group(**gpu, timeout=PATIENCE)
    atexit.register(_leave_ranks)


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone. (gloo raises no type of its own.)"""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def _leave_ranks() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class OwnSums(DDPStrategy):
    """Ranks with gradients that DistributedDataParallel does not see, as autograd does not make them: whoever does
    sums them over the ranks."""

    def configure_ddp(self) -> None:
        """No wrapper around the module."""


def make_strategy(world: World, own_sums: bool) -> Strategy:
    """own_sums: the module sums its gradients over the ranks itself."""
    if world.size == 1:
        return SingleDeviceStrategy(world.device)
    # Nothing is sent around at the start: all ranks hold the same, which their digests say, and buffers are the frozen
    # payload, or with fsdp each rank's own place to gather it.
    return (OwnSums if own_sums else DDPStrategy)(
        broadcast_buffers=False,
        init_sync=False,
        gradient_as_bucket_view=True,
        process_group_backend="nccl" if world.device.type == "cuda" else "gloo",
    )


class PlainCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint where it belongs. Lightning's own makes a copy in memory, and of that one in /tmp."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)


class Float16(MixedPrecision):
    """fp16 compute with loss scaling. No autocast: the model computes in its embedding's dtype."""

    def __init__(self, device: torch.device):
        super().__init__("16-mixed", device.type, scaler=torch.amp.GradScaler(device.type))

    def forward_context(self) -> Any:
        return torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad()
