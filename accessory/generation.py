"""Answers: greedy or nucleus sampling with a KV cache, batched prompts padded on the left, streaming."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Optional, Union

import torch
from PIL import Image
from torch import Tensor

from accessory.data.images import ImageProblem, load_pixels
from accessory.data.packing import IMAGE_SLOT, insert_image
from accessory.errors import UserError
from accessory.models.llama import NO_IMAGES, Llama


class KVCache:
    """Keys and values of all layers, [b, k, capacity, e] each, written in place."""

    def __init__(self, model: Llama, batch: int, capacity: int):
        config = model.config
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=model.device, dtype=model.dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # positions filled before the current forward pass

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key and value [b, k, s, e]; returns all so far, [b, k, length + s, e]."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


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
    drawn = torch.multinomial(ordered, 1, generator=generator)  # normalises by itself
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
) -> Iterator[Tensor]:
    """Yields the next token of every prompt, int64 [b], until each has met a token of `stop` (yielded too) or
    max_new_tokens are out; after its stop token a prompt yields stop tokens.

    pixels: float [n, 3, p, p], the images for which the prompts hold slots, in order.
    """
    batch, longest = len(prompts), max(map(len, prompts))
    pad = torch.tensor([longest - len(ids) for ids in prompts], device=model.device)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    cache = KVCache(model, batch, longest + max_new_tokens)
    places = torch.arange(longest + max_new_tokens, device=model.device)
    done = torch.zeros(batch, dtype=torch.bool, device=model.device)
    stops = torch.tensor(sorted(stop), device=model.device)
    step = ids
    for _ in range(max_new_tokens):
        start, end = cache.length, cache.length + step.shape[1]
        position_ids = (places[start:end] - pad[:, None]).clamp(min=0)
        # Without padding, causal attention needs no mask, and the fast kernels take none.
        mask = _mask(places[start:end], places[:end], pad) if pad.any() else None
        hidden = model.model(model.embed(step, pixels), position_ids, mask, cache)
        cache.length = end
        token = sample(model.lm_head(hidden[:, -1]).float(), temperature, top_p)
        token = torch.where(done, stops[0], token)
        yield token
        done |= torch.isin(token, stops)
        if done.all():
            return
        step, pixels = token[:, None], None


def _mask(queries: Tensor, keys: Tensor, pad: Tensor) -> Tensor:
    """bool [b, 1, queries, keys]: causal, and not into the padding; a padding row may see itself, so that its softmax
    is not over nothing."""
    causal = keys[None, :] <= queries[:, None]
    real = keys[None, None, :] >= pad[:, None, None]
    itself = keys[None, :] == queries[:, None]
    return ((causal & real) | itself).unsqueeze(1)


def stop_ids(model: Llama) -> set[int]:
    """Tokens that end an answer: the tokenizer's EOS and those the model's config names."""
    named = model.config.eos_token_id
    listed = named if isinstance(named, list) else [named]
    return {i for i in (*listed, model.tokenizer.eos_id) if i is not None}


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
    encoded = []
    for prompt, picture in zip(prompts, pictures, strict=True):
        writes_bos = tokenizer.bos_text is not None and prompt.startswith(tokenizer.bos_text)  # a chat template did
        ids = tokenizer.encode(prompt, bos=not writes_bos, eos=False)
        if picture is not None:
            ids = insert_image(ids, model.image_words, IMAGE_SLOT)
        if len(ids) + max_new_tokens > limit:
            raise UserError(
                f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the model's {limit} positions; "
                "shorten one of them"
            )
        encoded.append(ids)
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
