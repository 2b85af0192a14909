"""What a quantized folder is worth: perplexity before and after, on the calibration rows and on a text."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from accessory.assemble import assemble
from accessory.config import DataConfig, ModelConfig, QuantizationConfig
from accessory.data.datamodule import answer_loader
from accessory.errors import UserError
from accessory.evaluation import Perplexity, answer_perplexity, read_text, text_perplexity
from accessory.models.llama import Llama
from accessory.models.loss import summed_cross_entropy
from accessory.models.qformer import image_input
from accessory.quantization import linear_weight
from accessory.quantization.calibration import read_calibration
from accessory.quantization.job.flow import Flow, Hidden
from accessory.quantization.job.plan import Plan
from accessory.quantize_options import EvalPosition
from accessory.sources import open_sources


@torch.no_grad()
def perplexity_on_rows(plan: Plan, hidden: Hidden, flow: Flow) -> dict[str, float]:
    """Of the calibration rows themselves, before and after; positions of images are left out."""
    found = {}
    for name, streamed, batches in (
        ("pretrain", flow.float, hidden.reference),
        ("fake_quant", flow.packed, hidden.inputs),
    ):
        nll, tokens = 0.0, 0
        with streamed.head() as head:
            for batch, ids in zip(batches, plan.rows.ids.split(plan.config.calib.batch_size), strict=True):
                targets = _targets(ids)
                nll += summed_cross_entropy(*head(batch), targets.to(plan.device)).item()
                tokens += int((targets >= 0).sum())
        found[name] = Perplexity(nll, tokens).value
    return found


def _targets(ids: Tensor) -> Tensor:
    """The next token of each, -100 where that is none or an image."""
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = -100
    return targets.masked_fill(targets < 0, -100)


class Texts:
    """The text of `eval.text`, read before any work, and measured after."""

    def __init__(self, plan: Plan):
        self.plan, options = plan, plan.config.eval
        self.name = options.name or (Path(options.text).name if options.text is not None else None)
        self._measure = self._protocol() if options.text is not None and options.eval_pos else None
        if EvalPosition.transformed in options.eval_pos and plan.config.save_trans is None:
            raise UserError("eval.eval_pos: transformed is measured on the saved model; set save_trans too")

    def _protocol(self) -> Callable[[Llama], Perplexity]:
        options, path = self.plan.config.eval, Path(self.plan.config.eval.text).expanduser()
        if path.suffix in (".yaml", ".yml"):
            data = DataConfig(data_config=str(path), max_words=options.seqlen, num_workers=0)
            image = image_input(self.plan.sources.vision)
            loader = answer_loader(data, self.plan.sources.tokenizer, options.batch_size, image)
            return lambda model: answer_perplexity(model, loader)
        if path.suffix in (".json", ".jsonl", ".csv") and path.is_file():
            return self._rows_protocol(str(path))
        text = read_text(path)
        ids = self.plan.sources.tokenizer.encode(text, bos=False, eos=False)
        usable = min(len(ids), options.max_tokens) if options.max_tokens > 0 else len(ids)
        if usable < options.seqlen:
            raise UserError(f"--text {path}: {usable} tokens, fewer than one window of eval.seqlen={options.seqlen}")
        return lambda model: text_perplexity(model, text, options.seqlen, options.max_tokens, options.batch_size)

    def _rows_protocol(self, path: str) -> Callable[[Llama], Perplexity]:
        """Samples joined into rows of seqlen tokens, as calibration data is; images in front of their text."""
        options, sources = self.plan.config.eval, self.plan.sources
        calib = replace(self.plan.config.calib, dataset=f'"{path}"', allow_fewer=True)
        rows = 10**6 if options.max_tokens < 0 else max(1, options.max_tokens // options.seqlen)
        image, seed = image_input(sources.vision), self.plan.config.seed
        data = read_calibration(calib, sources.tokenizer, rows, options.seqlen, seed, image, sources.image_transform)

        @torch.inference_mode()
        def measure(model: Llama) -> Perplexity:
            nll, tokens = 0.0, 0
            for i, row in enumerate(data.rows.split(1)):
                pixels = data.pixels(i)
                shown = None if pixels is None else pixels.to(model.device, model.dtype)
                targets = _targets(row)
                hidden = model.hidden_states(row.to(model.device), images=shown)
                weight = linear_weight(model.lm_head, hidden.dtype)
                nll += summed_cross_entropy(hidden, weight, targets.to(model.device)).item()
                tokens += int((targets >= 0).sum())
            return Perplexity(nll, tokens)

        return measure

    def measure(self, quantized: Path, transformed: Optional[Path]) -> dict[str, Any]:
        """Print a line a position, as llmc does, and return the figures by the text's name."""
        if self._measure is None:
            return {}
        own = self.plan.config.model
        models = {
            EvalPosition.pretrain: own,
            EvalPosition.transformed: ModelConfig(pretrained_path=[str(transformed)]),
            EvalPosition.fake_quant: ModelConfig(pretrained_path=[str(quantized)]),
        }
        found = {}
        for position in self.plan.config.eval.eval_pos:
            sources = open_sources(models[position])
            model = assemble(sources, QuantizationConfig(), None, self.plan.device, self.plan.dtype)
            result = self._measure(model)
            found[position.value] = result.value
            print(f"EVAL: ppl on {self.name} is {result.value:.4f} ({position.value})", flush=True)
            del model
            gc.collect()
        return {self.name: found | {"predictions": result.tokens, "seqlen": self.plan.config.eval.seqlen}}
