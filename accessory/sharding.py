"""fsdp: the frozen payload spread over the ranks, block by block.

What is quantized is most of a model and never changes, so no rank needs all of it all the time: each keeps its share of
every block's bytes, and a block is put together on all ranks just before it computes, forward and backward. Trainables
are small and stay whole on every rank, as in sdp; a step and a save never gather more than two blocks.

    block      | 0      | 1      | 2      | …    computing
    buffer     | a      | b      | a      | …    holds its payload
    meanwhile  | 1 -> b | 2 -> a | 3 -> b | …    gathered ahead of use; in backward the other way round

The bytes travel as bytes (uint8): NF4 codes read as 16-bit numbers have NaN patterns among them, which a cast would
change. torch's own FSDP shards parameters, to reduce gradients and keep optimizer state for them; nothing of that is
needed here, and what it shards must be floating-point.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accessory.digest import digest
from accessory.errors import UserError
from accessory.models.llama import Block
from accessory.quantization import QuantLinear, block_linears
from accessory.strategies import PATIENCE
from accessory.tuning.recipe import canonical_name

# The newer name of the same collective, where torch has it.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
ALIGNMENT = 16  # bytes: what vectorized kernels expect of a tensor's address


@dataclass
class _Unit:
    """The payload of one block. share: this rank's bytes, uint8 [size / ranks]; places: (layer, payload name, dtype,
    shape, offset in the whole) of each tensor."""

    block: nn.Module
    layers: dict[str, QuantLinear]
    missing: set[str]
    size: int = 0
    share: Optional[Tensor] = None
    places: list[tuple[QuantLinear, str, torch.dtype, torch.Size, int]] = field(default_factory=list)


class ShardedPayload:
    """The payload of a model's decoder blocks, of which this rank holds a share.

    Blocks are taken in as soon as they are loaded (`loaded`), so a rank never holds more than its shares and one block
    twice; `connect` then lets them compute. digests: of every payload tensor, made before it was split.
    """

    def __init__(self, model: nn.Module, rank: int, ranks: int):
        self.rank, self.ranks = rank, ranks
        self.digests: dict[str, int] = {}
        self._units = _units(model)
        self._unit_of = {name: unit for unit in self._units for name in unit.layers}
        self._turn = Turn()

    @property
    def share_bytes(self) -> int:
        """What this rank holds between steps."""
        return sum(unit.share.nbytes for unit in self._units)

    @property
    def whole_bytes(self) -> int:
        """What all ranks hold together."""
        return sum(unit.size for unit in self._units)

    @property
    def buffer_bytes(self) -> int:
        """What the two gathered blocks take besides."""
        return sum(buffer.nbytes for buffer in self._turn.buffers)

    def loaded(self, name: str) -> None:
        """A weight, by its name on disk, has its values: split its block if that was the last one."""
        unit = self._unit_of.get(name)
        if unit is not None:
            unit.missing.discard(name)
            if not unit.missing:
                self._split(unit)

    def _split(self, unit: _Unit) -> None:
        for name, layer in unit.layers.items():
            for key, tensor in zip(layer.backend.payload_names, layer.payload, strict=True):
                self.digests[f"{name}.{key}"] = digest(tensor)
                unit.places.append((layer, key, tensor.dtype, tensor.shape, unit.size))
                unit.size += _rounded_up(tensor.nbytes, ALIGNMENT)
        unit.size = _rounded_up(unit.size, ALIGNMENT * self.ranks)
        whole = torch.zeros(unit.size, dtype=torch.uint8, device=getattr(*unit.places[0][:2]).device)
        for layer, key, dtype, shape, offset in unit.places:
            _window(whole, dtype, shape, offset).copy_(getattr(layer, key))
            setattr(layer, key, None)
        unit.share = whole.chunk(self.ranks)[self.rank].clone()

    def connect(self) -> None:
        """Give the blocks their buffers, and gather into them whenever a block is called."""
        device = self._units[0].share.device
        size = max(unit.size for unit in self._units)
        buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        # A group of its own: DDP reduces gradients in the other one at the same time.
        self._turn = Turn(buffers, [unit.share for unit in self._units], dist.new_group(timeout=PATIENCE))
        for i, unit in enumerate(self._units):
            for layer, key, dtype, shape, offset in unit.places:
                setattr(layer, key, _window(buffers[i % 2], dtype, shape, offset))
            unit.block.register_forward_pre_hook(lambda _, __, i=i: self._turn.before_forward(i))
            unit.block.register_forward_hook(lambda _, __, out, i=i: _Backward.apply(out, self._turn, i))

    def verify(self) -> None:
        """Make sure that the ranks hold together what was loaded."""
        found = self.gathered_digests()
        if odd := [name for name, value in self.digests.items() if found[name] != value]:
            raise UserError(
                f"{odd[0]} and {len(odd) - 1} more are not what was loaded once the ranks put their shares together: "
                "the connection between the devices is faulty; try --data_parallel sdp, or other devices"
            )

    def gathered_digests(self) -> dict[str, int]:
        """Digests of what the ranks hold now, gathered block by block; to be compared with `digests`."""
        found = {}
        for i, unit in enumerate(self._units):
            self._turn.need(i)
            names = iter(name for name, layer in unit.layers.items() for _ in layer.backend.payload_names)
            for (layer, key, *_), name in zip(unit.places, names, strict=True):
                found[f"{name}.{key}"] = digest(getattr(layer, key))
        return found


class Turn:
    """Which block lies in which of the two buffers, and which one is on its way."""

    def __init__(self, buffers: tuple[Tensor, ...] | list[Tensor] = (), shares: tuple = (), group: Any = None):
        self.buffers, self._shares, self._group = buffers, shares, group
        self._held: list[Optional[int]] = [None, None]
        self._work: list[Optional[dist.Work]] = [None, None]
        self._backward: Optional[int] = None  # the block whose backward is running

    def _fetch(self, i: int) -> None:
        """Start gathering block i. What computed on the buffer's last block comes before, on every device: the GPU's
        collective waits for the kernels that were launched, the CPU has finished them."""
        slot = i % 2
        if self._held[slot] != i:
            share = self._shares[i]
            whole = self.buffers[slot][: share.numel() * self._group.size()]
            self._work[slot] = all_gather(whole, share, group=self._group, async_op=True)
            self._held[slot] = i

    def need(self, i: int, then: Optional[int] = None) -> None:
        """Return when block i can compute; block `then` is on its way."""
        self._fetch(i)
        if (work := self._work[i % 2]) is not None:
            work.wait()
            self._work[i % 2] = None
        if then is not None and 0 <= then < len(self._shares):
            self._fetch(then)

    def before_forward(self, i: int) -> None:
        # Activation checkpointing computes a block again within its backward: what is needed next is the one before.
        # (Behind block 0 the next forward comes, which begins with 0 and 1.)
        is_repeated = self._backward == i and i > 0
        self.need(i, then=None if is_repeated else i + 1)

    def before_backward(self, i: int) -> None:
        self._backward = i
        self.need(i, then=i - 1)


class _Backward(torch.autograd.Function):
    """Nothing but the moment at which the backward of a block begins."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, turn: Turn, block: int) -> Tensor:
        ctx.turn, ctx.block = turn, block
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.turn.before_backward(ctx.block)
        return gradient, None, None


def _units(model: nn.Module) -> list[_Unit]:
    """The decoder blocks in the order in which they compute."""
    linears = block_linears(model)
    units = []
    for path, block in model.named_modules():
        layers = {
            canonical_name(f"{name}.weight"): layer for name, layer in linears.items() if name.startswith(f"{path}.")
        }
        if isinstance(block, Block):
            units.append(_Unit(block, layers, set(layers)))
    return units


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _window(buffer: Tensor, dtype: torch.dtype, shape: torch.Size, offset: int) -> Tensor:
    """A tensor on a part of the buffer. Not a view: those share the buffer's version, which counts what is gathered
    into it, and autograd would refuse them in backward as overwritten. They are, with the same bytes again."""
    window = torch.empty(0, dtype=dtype, device=buffer.device)
    return window.set_(buffer.untyped_storage(), offset // dtype.itemsize, shape)
