"""A `Llama` as lm-evaluation-harness asks it.

loglikelihood           log p(continuation | context), and whether each of its tokens is the likeliest
loglikelihood_rolling   log p(text | BOS), every token once, in windows of as many tokens as the model has positions
generate_until          an answer that ends before the first of several stop texts
"""

from __future__ import annotations

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from accessory.errors import UserError
from accessory.generation import generate_ids, stop_ids
from accessory.models.llama import Llama
from accessory.models.loss import GPU_CHUNK

log = logging.getLogger(__name__)

ANSWER_TOKENS = 256  # of a task that does not say how many; the harness's own
LENGTH_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is set counts
NEUTRAL = {"num_beams": 1, "top_k": 0, "repetition_penalty": 1.0}  # what may be said, as it changes nothing

Request = tuple[Any, list[int], list[int]]  # (not used here, context, continuation)


def generation_settings(stated: dict[str, Any], positions: int) -> dict[str, Any]:
    """A task's generation_kwargs -> until, and the arguments of generate_ids: max_new_tokens, temperature, top_p."""
    rest = dict(stated)
    until = rest.pop("until", None) or []
    lengths = [int(length) for key in LENGTH_KEYS if (length := rest.pop(key, None)) is not None]
    count = lengths[0] if lengths else min(ANSWER_TOKENS, positions // 2)
    if not 0 < count < positions:
        raise UserError(f"{LENGTH_KEYS[0]}={count}: must be above 0 and below the model's {positions} positions")
    temperature, samples = rest.pop("temperature", None), rest.pop("do_sample", None)
    if samples is False or (samples is None and temperature is None):
        temperature = 0.0
    top_p = rest.pop("top_p", None)
    for key, value in rest.items():
        if value is not None and (key not in NEUTRAL or value != NEUTRAL[key]):
            raise UserError(f"generation_kwargs {key}={value!r}: not offered here; until, {LENGTH_KEYS[0]}, do_sample, "
                            "temperature and top_p are")  # fmt: skip
    return {
        "until": [text for text in ([until] if isinstance(until, str) else until) if text],
        "max_new_tokens": count,
        "temperature": 1.0 if temperature is None else float(temperature),
        "top_p": 1.0 if top_p is None else float(top_p),
    }


class HarnessModel(TemplateLM):
    """A `Llama` behind lm-eval's interface, asked without images.

    BOS goes in front where the tokenizer itself puts it there, so that figures compare with the harness's own for the
    same model. What is too long for the model's positions loses its beginning.
    """

    def __init__(self, model: Llama, batch_size: int):
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, model.tokenizer, batch_size
        self._device, self._adds_bos = model.device, model.tokenizer.adds_bos
        self.max_length = model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: Optional[bool] = None, **_: Any) -> list[int]:
        """Ids of `string`, BOS in front: as add_special_tokens says, else as the tokenizer does, but not twice."""
        is_there = self.tokenizer.bos_text is not None and string.startswith(self.tokenizer.bos_text)
        bos = self._adds_bos and not is_there if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, bos=bos, eos=False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        """Requests that feed the model the same tokens (the letters of a multiple choice) share a row."""
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        cut = 0
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens cannot be scored with the model's {self.max_length} "
                    "positions; leave its task out"
                )
            whole = (context or [self.prefix_token_id]) + continuation
            cut += len(whole) > self.max_length + 1
            if continuation:
                rows[tuple(whole[-self.max_length - 1 : -1])].append(i)
        self._warn_of_cuts(cut, len(requests))
        answers = [(0.0, True)] * len(requests)
        for batch in self._batches(list(rows), "loglikelihood", len):
            asked = [(row, i) for row, ids in enumerate(batch) for i in rows[ids]]
            scores = self._score(batch, [(row, requests[i][2]) for row, i in asked])
            for (_, i), score in zip(asked, scores, strict=True):
                answers[i] = score
        return answers

    def _score(self, rows: list[tuple[int, ...]], targets: list[tuple[int, list[int]]]) -> list[tuple[float, bool]]:
        """targets: (row, continuation) -> log-likelihood, all greedy. A row ends one token before its continuations
        do."""
        longest = max(map(len, rows))  # padded on the right, where causal attention does not look
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=self.model.device)
        hidden = self.model.hidden_states(ids)
        ends = [(row, len(rows[row]), len(continuation)) for row, continuation in targets]
        states = torch.cat([hidden[row, end - count : end] for row, end, count in ends])
        tokens = torch.tensor([token for _, continuation in targets for token in continuation], device=states.device)
        scores = token_scores(self.model, states, tokens)
        likelihoods, greedy = (part.cpu().split([count for *_, count in ends]) for part in scores)
        return [(each.sum().item(), bool(all_.all())) for each, all_ in zip(likelihoods, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[Request] = []
        counts = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)  # BOS is the first token's context, not a target
            pieces = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            before = len(windows)
            windows += [(None, *make_disjoint_window(piece)) for piece in pieces]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        alike: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(i)
        answers = [""] * len(requests)
        for settings, members in alike.items():
            how = generation_settings(json.loads(settings), self.max_length)
            room = self.max_length - how["max_new_tokens"]
            asked = {i: self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in members}
            self._warn_of_cuts(sum(len(ids) > room for ids in asked.values()), len(asked))
            prompts = {i: ids[-room:] for i, ids in asked.items()}
            for batch in self._batches(members, "generate", lambda i, prompts=prompts: len(prompts[i])):
                for i, text in zip(batch, self._answer([prompts[i] for i in batch], **how), strict=True):
                    answers[i] = text
        return answers

    def _answer(self, prompts: list[list[int]], until: list[str], **how: Any) -> list[str]:
        ends, decode = stop_ids(self.model), self.tokenizer.decode
        answers: list[list[int]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        for tokens in generate_ids(self.model, prompts, stop=ends, **how):
            for i, token in enumerate(tokens.tolist()):
                finished[i] = finished[i] or token in ends
                if not finished[i]:
                    answers[i].append(token)
                    finished[i] = any(text in decode(answers[i]) for text in until)
            if all(finished):
                break
        return [_before_any(decode(ids), until) for ids in answers]

    def _batches(self, items: list[Any], label: str, length: Callable[[Any], int]) -> Iterator[list[Any]]:
        """Longest first: of like length in a batch, and one that is too large for the memory fails at once."""
        ordered = sorted(items, key=length, reverse=True)
        with tqdm(total=len(ordered), desc=label, disable=not sys.stderr.isatty(), leave=False) as bar:
            for start in range(0, len(ordered), self.batch_size):
                batch = ordered[start : start + self.batch_size]
                yield batch
                bar.update(len(batch))

    def _warn_of_cuts(self, count: int, total: int) -> None:
        if count:
            log.warning("%d of %d prompts are too long for the model's %d positions and lose their beginning",
                        count, total, self.max_length)  # fmt: skip


def token_scores(model: Llama, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """hidden: [n, d]; tokens: int64 [n], what followed -> log-likelihoods float64 [n], from a log-softmax in fp32, and
    whether each was the likeliest, bool [n]. Logits are held for GPU_CHUNK tokens at a time."""
    likelihoods = torch.empty(len(tokens), dtype=torch.float64, device=hidden.device)
    greedy = torch.empty(len(tokens), dtype=torch.bool, device=hidden.device)
    for start in range(0, len(tokens), GPU_CHUNK):
        chunk = slice(start, start + GPU_CHUNK)
        logits = model.lm_head(hidden[chunk]).float()
        likelihoods[chunk] = logits.log_softmax(-1).gather(1, tokens[chunk, None]).squeeze(1).double()
        greedy[chunk] = logits.argmax(-1) == tokens[chunk]
    return likelihoods, greedy


def _before_any(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
