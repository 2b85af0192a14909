"""What makes a step fast, part by part: what is wanted (`fast.*` of the configuration), what this run allows, and why
not, where it does not."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch

from accessory.config import Config, FastConfig, Precision
from accessory.estimate import GIB, Step, attention_fits, graphs_fit, host_bytes, save_memory
from accessory.fused.model import fuse_blocks, keep_attention, keep_on_host, why_not_fused
from accessory.models.llama import Llama, flash_takes
from accessory.precision import DTYPES
from accessory.strategies import World, gather, is_sharded

log = logging.getLogger(__name__)
HOST_ROOM = 0.5  # of the free host memory
CGROUPS = [
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]
ROOM = 0.94  # of the GPU's free memory; the rest is for fragmentation, and for an estimate that is a little short
NAMES = {
    "blocks": "fused blocks",
    "compile": "compiled blocks",
    "graphs": "CUDA graphs",
    "padding_free": "padding-free",
    "offload": "inputs and residuals of blocks in host memory",
    "keep_attention": "attention's outputs kept",
}
WHAT_FITS = ("offload", "keep_attention")  # decide these, where they are unset


@dataclass
class Fast:
    """Which parts are active; why_not: for each that is wanted and is not."""

    active: set[str] = field(default_factory=set)
    why_not: dict[str, str] = field(default_factory=dict)

    def take(self, part: str, wanted: bool, obstacle: str | None) -> None:
        if wanted and obstacle is None:
            self.active.add(part)
        elif wanted:
            self.why_not[part] = obstacle

    def line(self) -> str:
        """For the summary."""
        return ", ".join(name for part, name in NAMES.items() if part in self.active) or "none of its parts"

    def warn(self) -> None:
        """Once, before training: what this run does without."""
        for part, reason in self.why_not.items():
            log.warning("fast.%s: not used, as %s", part, reason)


def choose(config: Config, world: World) -> Fast:
    """All that can be known without a model."""
    wants, fast = _wanted(config.fast, world.device), Fast()
    is_cpu = world.device.type == "cpu"
    needs_gpu = "it needs a CUDA GPU" if is_cpu else None
    has_dropout = "recipe.dropout is above 0, which a fused block does not know" if config.recipe.dropout > 0 else None
    fast.take("padding_free", wants["padding_free"] and not config.data.packing, None)
    fast.take("blocks", wants["blocks"], has_dropout)
    fast.take("compile", wants["compile"] and "blocks" not in fast.active, None)
    fast.take("graphs", wants["graphs"], needs_gpu or _against_graphs(config, world, fast))
    return fast


def _wanted(config: FastConfig, device: torch.device) -> dict[str, bool]:
    default = config.enabled if config.enabled is not None else device.type == "cuda"
    parts = (part for part in NAMES if part not in WHAT_FITS)
    return {part: default if getattr(config, part) is None else getattr(config, part) for part in parts}


def _against_graphs(config: Config, world: World, fast: Fast) -> str | None:
    if is_sharded(config.strategy, world):
        return "ranks gather blocks while a step runs"
    if config.train.precision is Precision.fp16:
        return "precision fp16 scales each step's loss as it finds right"
    if config.recipe.dropout > 0:
        return "recipe.dropout is above 0"
    if not (config.data.packing or "padding_free" in fast.active):
        return "batches that are padded to their longest item have many shapes (fast.padding_free or data.packing)"
    return None


def takes_one_row(config: Config, world: World, head_dim: int) -> bool:
    """Whether attention takes a micro-batch as one long row: FlashAttention does, item by item. Elsewhere a row needs a
    mask of its size squared, so several short ones are better."""
    return flash_takes(world.device, DTYPES[config.train.precision], head_dim)


def install(fast: Fast, config: Config, model: Llama, world: World) -> None:
    """Put the parts that are in the model in place; called last, when all else is."""
    _replace_blocks(fast, model)
    make_room(fast, config, model, world.local_size)
    _spare_graphs(fast, config, model)
    _agree_on_graphs(fast)
    _keep_attention(fast, config, model)


def _replace_blocks(fast: Fast, model: Llama) -> None:
    if "blocks" in fast.active and (obstacle := why_not_fused(model)) is not None:
        fast.active.discard("blocks")  # and compiled ones are no way out: they need Triton as well
        fast.why_not["blocks"] = obstacle
    if "blocks" in fast.active:
        fuse_blocks(model)
    elif "compile" in fast.active:
        for block in model.model.layers:
            block.forward = torch.compile(block.forward)  # not block.compile(): fsdp's hooks are no part of the graph


def make_room(fast: Fast, config: Config, model: Llama, local_ranks: int = 1) -> None:
    """Decide what is recomputed and what lies in host memory: as told, or the least that fits into the GPU's memory."""
    step, offload = largest_step(config, model), config.fast.offload
    recomputed, offloaded = _saving(config, model, step, offload)
    if offload and "blocks" not in fast.active:
        fast.why_not["offload"] = "only fused blocks (fast.blocks) can"
    elif offloaded and (obstacle := _short_of_host_memory(model, step, recomputed, local_ranks)) is not None:
        fast.why_not["offload"] = obstacle
        recomputed, offloaded = _saving(config, model, step, False)
    model.model.recomputed = recomputed
    if offloaded:
        fast.active.add("offload")
        keep_on_host(model, step.tokens)


def _saving(config: Config, model: Llama, step: Step, offload: bool | None) -> tuple[int, bool]:
    """(blocks to recompute, whether to offload)."""
    if model.device.type == "cpu":  # not before it is asked for: host memory is all there is
        return len(model.model.layers) if config.train.checkpointing else 0, bool(offload) and step.fused
    return save_memory(model, step, _available(model.device), config.train.checkpointing, offload)


def _short_of_host_memory(model: Llama, step: Step, recomputed: int, local_ranks: int) -> str | None:
    """It is pinned, so it cannot be swapped out, and other ranks of this machine want as much."""
    wanted, free = host_bytes(model, step, recomputed) * local_ranks, free_host_memory()
    if wanted <= HOST_ROOM * free:
        return None
    each = f" for {local_ranks} ranks" if local_ranks > 1 else ""
    return f"it would take {wanted / GIB:.1f} GiB of host memory{each}, more than half of the {free / GIB:.1f} GiB free"


def free_host_memory() -> int:
    """Bytes; in a container, what its limit leaves."""
    free = psutil.virtual_memory().available
    for limit, used in CGROUPS:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # another version's, or "max"
            continue
    return free


def _available(device: torch.device) -> int:
    """Bytes that this process can have on the GPU, the model's own among them."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(ROOM * (free + torch.cuda.memory_reserved(device)))


def _spare_graphs(fast: Fast, config: Config, model: Llama) -> None:
    """Where memory is short, steps are long, and a graph gains little: rather none than more blocks recomputed."""
    if "graphs" not in fast.active:
        return
    if not graphs_fit(model, planned_step(fast, config, model), model.model.recomputed, _available(model.device)):
        fast.active.discard("graphs")
        fast.why_not["graphs"] = "there is no memory for a step beside the captured one (--batch_size, --max_words)"


def _agree_on_graphs(fast: Fast) -> None:
    """Ranks sum their gradients in one way with graphs, in another without."""
    everywhere = all(gather("graphs" in fast.active))
    if "graphs" in fast.active and not everywhere:
        fast.active.discard("graphs")
        fast.why_not["graphs"] = "another rank does without them"


def _keep_attention(fast: Fast, config: Config, model: Llama) -> None:
    """As told; otherwise, with FlashAttention, if it fits into what all else leaves."""
    told, recomputed = config.fast.keep_attention, model.model.recomputed
    if told and "blocks" not in fast.active:
        fast.why_not["keep_attention"] = "plain blocks keep it as autograd does; only fused ones (fast.blocks) need not"
    elif told and recomputed == len(model.model.layers):
        fast.why_not["keep_attention"] = "all blocks are recomputed"
    elif told is None and flash_takes(model.device, model.dtype, model.config.head_dim):
        told = attention_fits(model, planned_step(fast, config, model), recomputed, _available(model.device))
    if told and "keep_attention" not in fast.why_not:
        fast.active.add("keep_attention")
        keep_attention(model)


def planned_step(fast: Fast, config: Config, model: Llama) -> Step:
    """The largest micro-batch as it will be computed."""
    step, active = largest_step(config, model), fast.active
    keeps_attention = step.keeps_attention or "keep_attention" in active
    return replace(step, captured="graphs" in active, offloaded="offload" in active, keeps_attention=keeps_attention)


def largest_step(config: Config, model: Llama) -> Step:
    """The micro-batch that takes the most memory: every row as long as may be."""
    rows, width, images = config.train.batch_size, config.data.max_words, None
    if config.data.packing and model.image_words:
        images = rows * (width // (model.image_words + 1))
    keeps_attention = bool(config.fast.keep_attention) and model.model.fused
    return Step(rows, width, images, fused=model.model.fused, keeps_attention=keeps_attention)
