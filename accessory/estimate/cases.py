"""One model's estimates under changing settings: as asked, and what would save memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Optional

import torch

from accessory.config import DataParallel, Precision, QuantMethod
from accessory.errors import UserError
from accessory.estimate.description import build, describe_model
from accessory.estimate.generation import estimate_generation
from accessory.estimate.parts import Estimate
from accessory.estimate.training import Step, attention_fits, estimate_training, graphs_fit, host_bytes, save_memory
from accessory.estimate_cli import EstimateConfig
from accessory.fast import Fast, choose
from accessory.models.llama import Llama
from accessory.precision import DTYPES, default_precision
from accessory.strategies import World


@dataclass(frozen=True)
class Case:
    """What can be changed to save memory."""

    method: QuantMethod
    lora: bool
    rows: int
    width: int
    shards: int
    recomputed: int = 0
    offloaded: bool = False
    keeps_attention: bool = False
    captured: bool = True


class Estimator:
    """Estimates of one model under changing settings. available: bytes that tensors can take on a GPU, if it is known
    which; what train.checkpointing, fast.offload and fast.keep_attention leave open is then the fastest that fits."""

    def __init__(self, config: EstimateConfig, available: Optional[int]):
        self.config = config = _with_precision(config)
        self.described = describe_model(config)
        self.dtype = DTYPES[config.train.precision]
        self.blocks = self.described.architecture.num_hidden_layers
        sharded = config.strategy.data_parallel is DataParallel.fsdp
        sizes = config.train.batch_size, config.data.max_words, config.ranks if sharded else 1
        self.asked = Case(config.quantization.method, config.recipe.lora, *sizes)
        self._models: dict[tuple[QuantMethod, bool], Llama] = {}
        self._check_width()
        self.asked = self.fitting(self.asked, math.inf if available is None else available, config.train.checkpointing)

    def _check_width(self) -> None:
        """Positions that images need."""
        model = self.model(self.asked)
        if model.image_words >= self.asked.width:
            raise UserError(
                f"--max_words {self.asked.width}: an image alone takes {model.image_words} positions; give more"
            )

    def model(self, case: Case) -> Llama:
        key = case.method, case.lora
        if key not in self._models:
            quantization = replace(self.config.quantization, method=case.method)
            recipe = replace(self.config.recipe, lora=case.lora)
            self._models[key] = build(self.described, quantization, recipe, self.dtype)
        return self._models[key]

    def step(self, case: Case) -> Step:
        """Every row as long as may be: what shares rows (data.packing, fast.padding_free) fills no more than these."""
        active = self.fast(case).active
        fused, captured = "blocks" in active, "graphs" in active
        sizes = case.rows, case.width, self._images(case), case.shards
        return Step(*sizes, self.dtype, fused, captured, fused and case.offloaded, fused and case.keeps_attention)

    def fast(self, case: Case) -> Fast:
        """What a run on GPUs would choose."""
        ranks = max(self.config.ranks, case.shards)
        fast = choose(self.config, World(0, 0, ranks, ranks, torch.device("cuda")))
        chosen = {"offload": case.offloaded, "keep_attention": case.keeps_attention}
        fast.active |= {part for part, active in chosen.items() if active}
        fast.active -= set() if case.captured else {"graphs"}
        return fast

    def _images(self, case: Case) -> int:
        """Of a micro-batch: one a row, but as many as there is room for where rows are packed."""
        if self.described.vision is None:
            return 0
        room = self.model(case).image_words + 1
        return case.rows * (case.width // room if self.config.data.packing else 1)

    def train(self, case: Case) -> Estimate:
        return estimate_training(self.model(case), self.step(case), case.recomputed)

    def fitting(self, case: Case, available: float, checkpointing: Optional[bool]) -> Case:
        """The case with as little recomputed and offloaded as fits, or as told; where nothing fits, with all of it."""
        offload, keeps_attention = self.config.fast.offload, self.config.fast.keep_attention
        case = replace(case, keeps_attention=bool(keeps_attention), captured=True)
        recomputed, offloaded = save_memory(self.model(case), self.step(case), available, checkpointing, offload)
        case = replace(case, recomputed=recomputed, offloaded=offloaded)
        case = replace(case, captured=graphs_fit(self.model(case), self.step(case), recomputed, available))
        if keeps_attention is None:
            keeps_attention = attention_fits(self.model(case), self.step(case), recomputed, available)
        return replace(case, keeps_attention=keeps_attention and recomputed < self.blocks)

    def recomputing(self, blocks: int) -> Case:
        """What is asked, with so many blocks recomputed."""
        if blocks == self.asked.recomputed:
            return self.asked
        if blocks == self.blocks:
            return self.fitting(self.asked, math.inf, True)
        fast = self.config.fast
        told = {"offloaded": bool(fast.offload), "keeps_attention": bool(fast.keep_attention)}
        return replace(self.asked, recomputed=blocks, captured=True, **told)

    def saving(self, case: Case) -> str:
        """What of a step is recomputed or lies elsewhere."""
        if case.recomputed:
            away = ", inputs in host memory" if case.offloaded else ""
            return f"{case.recomputed} of {self.blocks} blocks recomputed{away}"
        if case.offloaded:
            return "inputs in host memory"
        again = self.step(case).fused and not case.keeps_attention
        return "attention's output recomputed" if again else "nothing recomputed"

    def on_host(self) -> int:
        """Bytes of host memory that a rank's step takes, as asked."""
        case = self.asked
        return host_bytes(self.model(case), self.step(case), case.recomputed) if case.offloaded else 0

    def generate(self) -> Estimate:
        c, model = self.config, self.model(self.asked)
        images = c.prompts if self.described.vision is not None else 0
        return estimate_generation(model, c.prompts, c.prompt, c.new_tokens, self.dtype, images)

    def suggestions(self, available: int) -> Iterator[tuple[str, int]]:
        """(what to change, the peak that it gives), each for itself; all together at the end."""
        asked, train = self.asked, self.config.train

        def peak(case: Case) -> int:
            return self.train(self.fitting(case, available, train.checkpointing)).peak

        together = self.recomputing(self.blocks)
        if asked.recomputed < self.blocks:
            some = self.fitting(asked, available, None)
            yield f"train.checkpointing=null: {self.saving(some)}", self.train(some).peak
        if self.config.fast.offload is False and self.step(asked).fused:
            yield "fast.offload=null: inputs in host memory", self.train(replace(asked, offloaded=True)).peak
        if self.config.fast.keep_attention and self.step(asked).fused and asked.recomputed < self.blocks:
            again = replace(asked, keeps_attention=False)
            yield "fast.keep_attention=null: attention's output recomputed", self.train(again).peak
        for name, smallest in (("rows", 1), ("width", 128)):
            smaller = self._halved(asked, name, smallest, available)
            if smaller != asked:
                divided = f" --accum_iter {train.accum_iter * asked.rows // smaller.rows}"
                flag = f"--batch_size {smaller.rows}{divided}" if name == "rows" else f"--max_words {smaller.width}"
                yield flag, peak(smaller)
                together = replace(together, **{name: getattr(smaller, name)}) if name == "rows" else together
        if asked.method in (QuantMethod.none, QuantMethod.int8) and not self.described.stored:
            together = replace(together, method=QuantMethod.nf4)
            yield "--quant: the base in NF4", peak(replace(asked, method=QuantMethod.nf4))
        if asked.lora and self.config.recipe.norm and self.config.recipe.bias:
            together = replace(together, lora=False)
            yield "recipe=norm_bias: no LoRA", peak(replace(asked, lora=False))
        yield "all of these but shorter rows", self.train(together).peak
        for shards in (n for n in (2, 4, 8) if n > asked.shards):
            yield f"--data_parallel fsdp on {shards} GPUs", peak(replace(asked, shards=shards))

    def _halved(self, case: Case, name: str, smallest: int, available: int) -> Case:
        while getattr(case, name) // 2 >= smallest and self.train(case).peak > available:
            case = replace(case, **{name: getattr(case, name) // 2})
        return case


def _with_precision(config: EstimateConfig) -> EstimateConfig:
    """Unset, the compute type is that of the GPU here; without one that of GPUs that have bf16."""
    if config.train.precision is not None:
        return config
    here = default_precision(torch.device("cuda")) if torch.cuda.is_available() else Precision.bf16
    return replace(config, train=replace(config.train, precision=here))
