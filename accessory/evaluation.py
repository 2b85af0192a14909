"""Perplexity of any base, with or without trainables, by one protocol for every quantization.

The text is tokenized once, cut into windows of `seqlen` tokens (the rest is left out), and each window predicts its
tokens 2 … seqlen: ppl = exp(sum of negative log-likelihoods / number of predictions).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from accessory.data.datamodule import PlannedLoader
from accessory.errors import UserError
from accessory.models import is_finite
from accessory.models.llama import Llama
from accessory.models.loss import summed_cross_entropy
from accessory.models.tokenizer import Tokenizer
from accessory.module import batch_loss
from accessory.quantization import linear_weight

MAX_LOSS = math.log(sys.float_info.max)  # nats a token, of which the exponential is a number


@dataclass(frozen=True)
class Perplexity:
    """nll: summed negative log-likelihood in nats; tokens: number of predictions."""

    nll: float
    tokens: int

    @property
    def value(self) -> float:
        return math.exp(self.nll / self.tokens)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"--text {path}: no such file") from None
    except OSError as error:
        raise UserError(f"--text {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path}: not UTF-8 text (byte {error.start})") from None


def text_windows(tokenizer: Tokenizer, text: str, seqlen: int, max_tokens: int = -1) -> Tensor:
    """int64 [n, seqlen]. max_tokens: use only so many tokens from the start (-1: all)."""
    ids = tokenizer.encode(text, bos=False, eos=False)
    ids = ids[:max_tokens] if max_tokens > 0 else ids
    windows = torch.tensor(ids[: len(ids) // seqlen * seqlen]).view(-1, seqlen)
    if len(windows) == 0:
        raise UserError(
            f"the text has {len(ids)} tokens, fewer than one window of seqlen={seqlen}; take a longer text, "
            "or a smaller seqlen"
        )
    return windows


@torch.inference_mode()
def text_perplexity(model: Llama, text: str, seqlen: int, max_tokens: int = -1, batch_size: int = 4) -> Perplexity:
    """Perplexity on plain text, in `text_windows`."""
    windows = text_windows(model.tokenizer, text, seqlen, max_tokens)
    check_weights(model)
    nll, tokens = 0.0, 0
    for batch in _bar(windows.split(batch_size), "perplexity"):
        batch = batch.to(model.device)
        hidden = model.hidden_states(batch)
        targets = batch.roll(-1, dims=1)
        targets[:, -1] = -100
        nll += summed_cross_entropy(hidden, linear_weight(model.lm_head, hidden.dtype), targets).item()
        tokens += batch.numel() - len(batch)
    return _finite(nll, tokens, model)


@torch.inference_mode()
def answer_perplexity(model: Llama, loader: PlannedLoader) -> Perplexity:
    """Perplexity of the answers of instruction data, token-weighted."""
    check_weights(model)
    nll, tokens = 0.0, 0
    for batch in _bar(loader, "perplexity"):
        on_device = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        nll += batch_loss(model, on_device).item()
        tokens += int((batch["targets"] != -100).sum())
    return _finite(nll, tokens, model)


def check_weights(model: Llama) -> None:
    """Refuse a model with a weight or scale that is NaN or infinite: nothing measured on it would mean anything."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not is_finite(tensor):
            raise UserError(
                f"the model on {model.base['path']}: {name} holds NaN or infinity; make the folder that it comes from "
                "anew, or get a copy that is whole"
            )


def _finite(nll: float, tokens: int, model: Llama) -> Perplexity:
    if not nll / tokens < MAX_LOSS:
        raise UserError(
            f"the model on {model.base['path']}: its mean loss is {nll / tokens:g}, so it has no perplexity; were its "
            "activations too large for the compute type, --precision bf16 or tf32 helps"
        )
    return Perplexity(nll, tokens)


def _bar(batches: Iterable, label: str) -> tqdm:
    return tqdm(batches, desc=label, unit="batch", disable=not sys.stderr.isatty(), leave=False)
