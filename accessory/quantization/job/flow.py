"""Calibration data on its way through the model, twice: in floating point, and with every block so far quantized."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from accessory.bases import open_folder
from accessory.config import QuantizationConfig
from accessory.models import build_model
from accessory.quantization import formats, put_backends, quantize
from accessory.quantization.job.memory import PeakMemory
from accessory.quantization.job.plan import Plan
from accessory.quantization.job.streaming import Streamed
from accessory.quantization.job.work import TRANS, Work
from accessory.quantization.methods import Calibration, Chain, quantize_unit
from accessory.quantization.packed import Packed
from accessory.quantization.setting import stored_backends
from accessory.quantize_options import Method
from accessory.shards import is_image_part
from accessory.sources import Sources

Call = Callable[[nn.Module, Tensor], Tensor]
VISION_BLOCKS = "qformer.vision_model.encoder.layers"
HEAD_BYTES = 2 << 30  # of logits, where the output layer is calibrated: so many rows are shown to it


@dataclass(frozen=True)
class Unit:
    """What is quantized at once. paths: its modules in the model; call: how one is called on a batch."""

    paths: list[str]
    call: Call


@dataclass(frozen=True)
class Hidden:
    """Hidden states, a list of batches [b, s, d]: in floating point, and of the quantized model."""

    reference: list[Tensor]
    inputs: list[Tensor]


class Flow:
    """Runs a plan's rows through the model, quantizing block after block into `work`."""

    def __init__(self, plan: Plan, work: Work, memory: PeakMemory):
        self.plan, self.work, self.memory = plan, work, memory
        folders = plan.sources.folders
        whole = build_model(plan.sources.architecture, plan.sources.vision)
        self.float = Streamed(whole, lambda: folders, plan.device, plan.dtype)
        packed = build_model(plan.sources.architecture, plan.sources.vision)
        put_backends(packed, plan.backends)
        self.packed = Streamed(packed, lambda: [*folders, open_folder(work.folder)], plan.device, plan.dtype)
        self._done = 0

    @torch.no_grad()
    def run(self) -> Hidden:
        """Quantize everything; returns the hidden states before the final norm."""
        with self.float.head():  # which is read last: bad values in it are told at once
            pass
        blocks, vision = self._language_units(), self._vision_units()
        has_head = "lm_head" in self.plan.schemes
        total = len(blocks) + len(vision) + self.plan.config.vision + has_head
        name = self.plan.config.method.value
        with tqdm(total=total, desc=name, unit="block", disable=not sys.stderr.isatty()) as bar:
            if vision:
                patches = self._patches()
                self._through(vision, Hidden(patches, patches), bar)
            if self.plan.config.vision:
                self._round_rest_of_image_part(bar)
            hidden = self._through(blocks, self._embedded(), bar)
            if has_head:
                self._quantize_head(hidden, bar)
        return hidden

    def streamed(self, sources: Sources) -> Streamed:
        """A finished quantized model, as the folders say it is stored."""
        model = build_model(sources.architecture, sources.vision)
        quantize(model, QuantizationConfig(), self.plan.dtype, stored=stored_backends(sources.folders))
        return Streamed(model, lambda: sources.folders, self.plan.device, self.plan.dtype)

    @torch.no_grad()
    def replay(self, model: Streamed) -> Tensor:
        """The first batch of rows through another model: hidden states before the final norm."""
        rows, size = self.plan.rows, self.plan.config.calib.batch_size
        (x,) = model.embed(rows.ids[:size], rows.pixels, size)
        for unit in self._language_units():
            with model.loaded(*unit.paths) as blocks:
                (x,) = self._run(blocks, [x], unit)
        return x

    # --- what flows where ---

    def _language_units(self) -> list[Unit]:
        plan = self.plan
        rope = self.float.rope(plan.rows.ids.shape[1])
        together = plan.config.autoround.nblocks if plan.config.method is Method.autoround else 1
        call = lambda block, x: block(x, tuple(part.to(x.dtype) for part in rope))
        paths = [f"model.layers.{i}" for i in range(plan.sources.architecture.num_hidden_layers)]
        return [Unit(paths[start : start + together], call) for start in range(0, len(paths), together)]

    def _vision_units(self) -> list[Unit]:
        if not (self.plan.config.vision and self.plan.is_calibrated):
            return []
        count = self.plan.sources.vision.vision_config.num_hidden_layers
        return [Unit([f"{VISION_BLOCKS}.{i}"], lambda block, x: block(x)) for i in range(count)]

    def _patches(self) -> list[Tensor]:
        """Images in front of the vision model's blocks: a batch for each row that has some."""
        with self.float.loaded("qformer.vision_model.embeddings") as (embeddings,):
            found = (self.plan.rows.pixels(i) for i in range(len(self.plan.rows.ids)))
            return [
                embeddings(pixels.to(self.plan.device, self.plan.dtype)).to(self.plan.store)
                for pixels in found
                if pixels is not None
            ]

    def _embedded(self) -> Hidden:
        rows, size, store = self.plan.rows, self.plan.config.calib.batch_size, self.plan.store
        reference = [x.to(store) for x in self.float.embed(rows.ids, rows.pixels, size)]
        if not self.plan.config.vision:
            return Hidden(reference, reference)
        return Hidden(reference, [x.to(store) for x in self.packed.embed(rows.ids, rows.pixels, size)])

    def _quantize_head(self, hidden: Hidden, bar: tqdm) -> None:
        """The output layer; AutoRound, which compares logits, sees so few rows that they fit."""
        plan = self.plan
        index, self._done = self._done, self._done + 1
        if not self.work.is_done(index):
            row_bytes = plan.rows.ids.shape[1] * plan.sources.architecture.vocab_size * 4
            rows = max(1, HEAD_BYTES // row_bytes) if plan.config.method is Method.autoround else len(plan.rows.ids)
            with self.float.loaded("model.norm") as (norm,):
                reference, inputs = (
                    [norm(x.to(plan.device)).to(plan.store) for x in _first_rows(batches, rows)]
                    for batches in (hidden.reference, hidden.inputs)
                )
            unit = Unit(["lm_head"], lambda head, x: head(x))
            with self.float.loaded("lm_head") as blocks:
                self._quantize(index, blocks, unit, Hidden(reference, inputs))
        bar.update()

    # --- the blocks ---

    def _through(self, units: list[Unit], hidden: Hidden, bar: tqdm) -> Hidden:
        """Quantize the units one after the other, each on what comes out of those before."""
        for unit in units:
            index, self._done = self._done, self._done + 1
            with self.float.loaded(*unit.paths) as blocks:
                reference = self._run(blocks, hidden.reference, unit)
                if not self.work.is_done(index):
                    self._quantize(index, blocks, unit, hidden)
            with self.packed.loaded(*unit.paths) as blocks:
                inputs = self._run(blocks, hidden.inputs, unit)
            told = f"error {_error(reference, inputs):.2e}, peak {self.memory.gib:.2f} GiB"
            if bar.disable:  # a log instead of a terminal
                print(f"block {index + 1} of {bar.total}: {told}", flush=True)
            bar.set_postfix_str(told, refresh=False)
            bar.update()
            hidden = Hidden(reference, inputs)
        return hidden

    def _run(self, blocks: Chain, batches: list[Tensor], unit: Unit) -> list[Tensor]:
        def through(x: Tensor) -> Tensor:
            for block in blocks:
                x = unit.call(block, x)
            return x

        return [through(batch.to(self.plan.device)).to(self.plan.store) for batch in batches]

    def _quantize(self, index: int, blocks: Chain, unit: Unit, hidden: Hidden) -> None:
        plan = self.plan
        local = {path: f"{i}" for i, path in enumerate(unit.paths)}
        schemes = {
            f"{local[path]}{name.removeprefix(path)}": scheme
            for name, scheme in plan.schemes.items()
            for path in unit.paths
            if f"{name}.".startswith(f"{path}.")
        }
        kept = {name: p.clone() for name, p in blocks.named_parameters() if name.removesuffix(".weight") not in schemes}
        calibration = Calibration(hidden.reference, hidden.inputs, unit.call, plan.device)
        packed = quantize_unit(blocks, schemes, calibration, plan.config)
        if plan.config.method is Method.awq:  # which changes norms and biases too
            kept = {name: dict(blocks.named_parameters())[name] for name in kept}
            if plan.config.save_trans is not None:
                self.work.write(index, _named(dict(blocks.named_parameters()), unit), TRANS)
        self._write(index, _named(packed, unit), _named(kept, unit))

    def _write(self, index: int, packed: dict[str, Packed], kept: dict[str, Tensor]) -> None:
        kinds, is_symmetric = self.plan.formats, formats.all_symmetric(self.plan.schemes.values())
        tensors, stored = dict(kept), {}
        for name, weight in packed.items():
            for kind in kinds:  # what one of them cannot hold, all do without
                weight = formats.representable(weight, kind)
            stored[name] = weight
            tensors |= formats.pack(name, weight, kinds[0], is_symmetric)
        self.work.write(index, tensors)
        written = open_folder(self.work.folder)
        for name, weight in stored.items():  # that layout and configuration mean the same
            read, meant = written.tensor(f"{name}.weight"), weight.to(torch.device("cpu"))
            if not torch.equal(read.dequantize(torch.float32), meant.dequantize(torch.float32)):
                raise RuntimeError(f"{self.work.folder}: {name} is not read as it was written")

    def _round_rest_of_image_part(self, bar: tqdm) -> None:
        """Q-Former and projector, without calibration; the vision model too, where there is none at all."""
        from accessory.quantization import rtn

        index, self._done = self._done, self._done + 1
        if not self.work.is_done(index):
            names = [name for name in self.plan.schemes if is_image_part(name)]
            if self.plan.is_calibrated:
                names = [name for name in names if not name.startswith(VISION_BLOCKS)]
            packed, kept = {}, {}
            for name in names:
                with self.float.loaded(name) as (linear,):
                    packed[name] = rtn.quantize(linear.weight, self.plan.schemes[name])
                    if linear.bias is not None:
                        kept[f"{name}.bias"] = linear.bias.clone()
            self._write(index, packed, kept)
        bar.update()


def _named(tensors: dict, unit: Unit) -> dict:
    """Names in a chain (0.mlp.down_proj) -> names in the model."""
    return {f"{unit.paths[int(i)]}{dot}{rest}": value for name, value in tensors.items()
            for i, dot, rest in [name.partition(".")]}  # fmt: skip


def _first_rows(batches: list[Tensor], count: int) -> list[Tensor]:
    """The first `count` rows of batches."""
    kept = []
    for batch in batches:
        kept.append(batch[: max(0, count)])
        count -= len(batch)
    return [batch for batch in kept if len(batch)]


def _error(reference: list[Tensor], inputs: list[Tensor]) -> float:
    """|quantized - floating point|^2 / |floating point|^2 of hidden states."""
    wrong = sum((a.float() - b.float()).pow(2).sum().item() for a, b in zip(reference, inputs, strict=True))
    return wrong / sum(a.float().pow(2).sum().item() for a in reference)
