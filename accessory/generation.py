"""Answers: greedy or nucleus sampling with a KV cache, batched prompts padded on the left, streaming.

Prompts run through the model's own forward pass, and so do the tokens of an answer, one by one; on a GPU both are
`accessory.decoding`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Optional, Union

import torch
from PIL import Image
from torch import Tensor

from accessory.capture import between_captures
from accessory.data.images import ImageProblem, load_pixels
from accessory.data.packing import IMAGE_SLOT, insert_image
from accessory.decoding import Decoder, KVCache, borrowed
from accessory.errors import UserError
from accessory.models.llama import NO_IMAGES, Llama
from accessory.models.tokenizer import Tokenizer


def sample(logits: Tensor, temperature: float, top_p: float, generator: Optional[torch.Generator] = None) -> Tensor:
    """logits: float [b, v] -> token ids int64 [b].

    temperature 0: argmax; otherwise a draw from the smallest set of tokens whose probability reaches top_p (nucleus
    sampling, arXiv:1904.09751).
    """
    if temperature <= 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    ordered, index = probabilities.sort(-1, descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p  # not the token that crosses top_p
    beyond[:, 0] = False  # and never the likeliest
    ordered[beyond] = 0
    # torch.multinomial's own way, less its check of the probabilities, for which the host would wait on a GPU.
    with between_captures:
        noise = torch.empty_like(ordered).exponential_(generator=generator)
    drawn = (ordered / noise).argmax(-1, keepdim=True)
    return index.gather(-1, drawn).squeeze(-1)


@torch.inference_mode()
def generate_ids(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop: set[int],
    pixels: Optional[Tensor] = None,
    graphs: bool = True,
) -> Iterator[Tensor]:
    """Yields the next token of every prompt, int64 [b] on the CPU, until each has met a token of `stop` (yielded too)
    or max_new_tokens are out; after its stop token a prompt yields stop tokens.

    pixels: float [n, 3, p, p], the images for which the prompts hold slots, in order. graphs: on a GPU, answer with
    `accessory.decoding`'s kernels and captured graph rather than with the model's own forward pass.
    """
    batch, longest = len(prompts), max(map(len, prompts))
    pads = [longest - len(ids) for ids in prompts]
    pad = torch.tensor(pads, device=model.device) if any(pads) else None
    ids = torch.tensor([[0] * n + ids for n, ids in zip(pads, prompts, strict=True)], device=model.device)
    done = torch.zeros(batch, dtype=torch.bool, device=model.device)
    stops = torch.tensor(sorted(stop), device=model.device)
    capacity = longest + max_new_tokens
    with borrowed(model, batch, capacity) if graphs else contextlib.nullcontext() as decoder:
        if decoder is None:
            cache = KVCache(model, batch, capacity)
            logits = _logits(model, cache, ids, pad, pixels)
        else:
            logits = _read(model, decoder, ids, pad, pixels)
        for left in range(max_new_tokens - 1, -1, -1):
            token = torch.where(done, stops[0], sample(logits, temperature, top_p))
            done = done | torch.isin(token, stops)
            seen = _Seen(token, done)
            if decoder is not None and left:  # runs while the host waits for the token and the caller looks at it
                logits = decoder.step(token)
            tokens, all_done = seen.wait()
            yield tokens
            if all_done:
                return
            if decoder is None and left:
                logits = _logits(model, cache, token[:, None], pad)


def _read(model: Llama, decoder: Decoder, ids: Tensor, pad: Optional[Tensor], pixels: Optional[Tensor]) -> Tensor:
    """`_logits` of prompts by a decoder, whose `step` then goes on behind them."""
    hidden = decoder.read(model, model.embed(ids, pixels), *_places(ids, 0, pad), pad)
    return model.lm_head(hidden).float()


def _logits(
    model: Llama, cache: KVCache, ids: Tensor, pad: Optional[Tensor], pixels: Optional[Tensor] = None
) -> Tensor:
    """The model's own forward pass of ids, int64 [b, s], behind what the cache holds -> logits of the next token,
    float32 [b, v]. pad: int64 [b], empty positions before each prompt."""
    hidden = model.model(model.embed(ids, pixels), *_places(ids, cache.length, pad), cache)
    cache.length += ids.shape[1]
    return model.lm_head(hidden[:, -1]).float()


def _places(ids: Tensor, start: int, pad: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
    """Where ids, int64 [b, s], stand behind `start` others: position_ids, int64 [b, s], and the mask."""
    places = torch.arange(start + ids.shape[1], device=ids.device)
    if pad is None:  # causal attention then needs no mask, and the fast kernels take none
        return places[start:].expand_as(ids), None
    return (places[start:] - pad[:, None]).clamp(min=0), _mask(places[start:], places, pad)


class _Seen:
    """Tokens on their way to the host, which waits for them alone, not for what was queued after them."""

    def __init__(self, token: Tensor, done: Tensor):
        both = torch.cat((token, done.all()[None].long()))
        self._arrived: Optional[torch.cuda.Event] = None
        self._host = both
        if both.is_cuda:
            self._host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self._host.copy_(both, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(both.device))

    def wait(self) -> tuple[Tensor, bool]:
        """The tokens, int64 [b] on the CPU, and whether all prompts are done."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host[:-1], bool(self._host[-1])


def _mask(queries: Tensor, keys: Tensor, pad: Tensor) -> Tensor:
    """bool [b, 1, queries, keys]: causal, and not into the padding; a padding row may see itself, so that its softmax
    is not over nothing."""
    causal = keys[None, :] <= queries[:, None]
    real = keys[None, None, :] >= pad[:, None, None]
    itself = keys[None, :] == queries[:, None]
    return ((causal & real) | itself).unsqueeze(1)


def stop_ids(model: Llama) -> set[int]:
    """Tokens that end an answer: EOS, the end mark of the chat template, and those that the model's config names."""
    named = model.config.eos_token_id
    listed = named if isinstance(named, list) else [named]
    return {i for i in (*listed, model.tokenizer.eos_id, model.tokenizer.chat_end_id) if i is not None}


def prompt_ids(tokenizer: Tokenizer, prompt: str, image_words: int, max_new_tokens: int, limit: int) -> list[int]:
    """A prompt as token ids, with slots for `image_words`; refused where it and its answer exceed `limit` positions."""
    writes_bos = tokenizer.bos_text is not None and prompt.startswith(tokenizer.bos_text)  # a chat template did
    ids = tokenizer.encode(prompt, bos=not writes_bos, eos=False)
    if image_words:
        ids = insert_image(ids, image_words, IMAGE_SLOT)
    if len(ids) + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the model's {limit} positions; "
            "shorten one of them"
        )
    return ids


Picture = Union[str, Path, Image.Image, None]


def _encode(
    model: Llama, prompts: list[str], pictures: list[Picture], max_new_tokens: int
) -> tuple[list[list[int]], Optional[Tensor]]:
    """Prompts as token ids, with slots for their images, and those images: float [n, 3, p, p], None where there are
    none."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError("this model has no tokenizer; load it with tokenizer_path to use text")
    limit = model.config.max_position_embeddings
    encoded = [
        prompt_ids(tokenizer, prompt, 0 if picture is None else model.image_words, max_new_tokens, limit)
        for prompt, picture in zip(prompts, pictures, strict=True)
    ]
    shown = [_pixels(model, picture) for picture in pictures if picture is not None]
    return encoded, torch.stack(shown).to(model.device) if shown else None


def _pixels(model: Llama, picture: Picture) -> Tensor:
    if not isinstance(picture, (str, Path, Image.Image)):
        raise UserError(f"generate() takes image files or PIL images, found {type(picture).__name__}")
    try:
        return load_pixels(picture, model.image_transform, model.image_size)
    except ImageProblem as problem:
        name = "image" if isinstance(picture, Image.Image) else picture
        raise UserError(f"{name}: {problem}") from None


def _one_each(model: Llama, prompts: list[str], images: Optional[list[Picture]]) -> list[Picture]:
    """An image or None for every prompt."""
    pictures = [None] * len(prompts) if images is None else list(images)
    if len(pictures) != len(prompts):
        raise UserError(f"{len(pictures)} images for {len(prompts)} prompts: give one a prompt, or None in its place")
    if model.image_words == 0 and any(picture is not None for picture in pictures):
        raise UserError(NO_IMAGES)
    return pictures


def generate(
    model: Llama,
    prompts: list[str],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_text: Optional[str] = None,
    images: Optional[list[Picture]] = None,
) -> list[str]:
    """Answers to a batch of prompts, without the prompts; each ends at an end token or before stop_text. images: a
    file, a PIL image or None for every prompt."""
    if isinstance(prompts, str):
        raise UserError("generate() takes a list of prompts")
    if isinstance(images, (str, Path, Image.Image)):
        raise UserError("generate() takes a list of images, one a prompt")
    pictures = _one_each(model, prompts, images)
    if not prompts:
        return []
    encoded, pixels = _encode(model, prompts, pictures, max_new_tokens)
    stop = stop_ids(model)
    answers: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for tokens in generate_ids(model, encoded, max_new_tokens, temperature, top_p, stop, pixels):
        for i, token in enumerate(tokens.tolist()):
            finished[i] = finished[i] or token in stop
            if not finished[i]:
                answers[i].append(token)
                finished[i] = stop_text is not None and stop_text in model.tokenizer.decode(answers[i])
        if all(finished):
            break
    return [_before(model.tokenizer.decode(ids), stop_text) for ids in answers]


def _before(text: str, stop_text: Optional[str]) -> str:
    return text.partition(stop_text)[0] if stop_text else text


def _certain(text: str, stop_text: Optional[str]) -> str:
    """The text without an end that may grow into stop_text."""
    beginnings = [(stop_text or "")[:n] for n in range(len(stop_text or ""), 0, -1)]
    return text.removesuffix(next((start for start in beginnings if text.endswith(start)), ""))


def stream(
    model: Llama,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_text: Optional[str] = None,
    image: Picture = None,
) -> Iterator[str]:
    """The growing answer to one prompt, which ends before stop_text; a character whose bytes are not all there yet, and
    what may become stop_text, are held back."""
    encoded, pixels = _encode(model, [prompt], _one_each(model, [prompt], [image]), max_new_tokens)
    stop, answer = stop_ids(model), []
    for tokens in generate_ids(model, encoded, max_new_tokens, temperature, top_p, stop, pixels):
        token = int(tokens[0])
        if token in stop:
            break
        answer.append(token)
        text = model.tokenizer.decode(answer)
        if stop_text and stop_text in text:
            break
        if not text.endswith("\ufffd"):
            yield _certain(text, stop_text)
    yield _before(model.tokenizer.decode(answer), stop_text)
