"""The memory of answers against what reading a prompt allocates; and that it is read rightly."""

from __future__ import annotations

import pytest
import torch
from estimates import BOTH, NORM_BIAS, Live, tiny

from accessory.config import RecipeConfig
from accessory.decoding import Decoder, KVCache
from accessory.estimate import estimate_generation
from accessory.generation import _logits, _read
from accessory.quantization.nf4 import NF4


def test_a_decoder_holds_what_is_said():
    model = tiny()
    decoder = Decoder(model, 2, 256, kernels=None)
    copies = sum(a.nbytes + b.nbytes for layer in decoder.adapters.values() for a, b, _ in layer)
    parts = estimate_generation(model, 2, 30, 12).parts
    assert parts["cache"] == decoder.cache.keys.nbytes + decoder.cache.values.nbytes
    assert parts["decoder"] == copies + 2 * 1000 * 4


class PlainKernels:
    """accessory.decoding_cuda's functions that prompts need, in plain PyTorch, which make no more than those do."""

    @staticmethod
    def add_norm(x, added, weight, eps):
        total = x if added is None else x + added
        square = torch.linalg.vector_norm(total, dim=-1, keepdim=True).square_()
        return total, (total * square.div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(weight)

    @staticmethod
    def rotate_into_cache(q, k, v, cos, sin, keys, values, position):
        b, _, _, size = keys.shape
        s, half = len(q) // b, size // 2
        rotated = q.new_empty(len(q), q.shape[1] // size, size)
        cos, sin = (t.view(b, s, 1, size) for t in (cos, sin))
        for source, target in ((q, rotated.unflatten(0, (b, s))), (k, keys[:, :, :s].transpose(1, 2))):
            first, second = source.view(target.shape).split(half, -1)
            torch.mul(first, cos[..., :half], out=target[..., :half]).addcmul_(second, sin[..., :half], value=-1)
            torch.mul(second, cos[..., half:], out=target[..., half:]).addcmul_(first, sin[..., half:])
        values[:, :, :s] = v.view(b, s, -1, size).transpose(1, 2)
        return rotated

    @staticmethod
    def swiglu(gate, up):
        return torch.nn.functional.silu(gate).mul_(up)


def prompt_model(recipe: RecipeConfig, width: int, dtype: torch.dtype = torch.bfloat16):
    return tiny(recipe, dtype=dtype, intermediate_size=width, num_key_value_heads=4, num_hidden_layers=2)


@torch.inference_mode()
def test_prompts_are_read_as_by_the_models_own_forward_pass():
    model, ids = prompt_model(BOTH, 64, torch.float32), torch.arange(2 * 30).view(2, 30)
    decoder, cache = Decoder(model, 2, 256, PlainKernels), KVCache(model, 2, 30)
    pad = torch.tensor([0, 4])
    torch.testing.assert_close(_read(model, decoder, ids, pad, None), _logits(model, cache, ids, pad))
    for filled, plain in ((decoder.cache.keys, cache.keys), (decoder.cache.values, cache.values)):
        torch.testing.assert_close(filled[:, :, :, 4:30], plain[:, :, :, 4:])
    assert decoder.position.item() == 30 and torch.equal(decoder.pad, pad)


@pytest.mark.parametrize("recipe", [NORM_BIAS, BOTH], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("width", [704, 64])
@torch.inference_mode()
def test_peak_of_a_prompt_is_just_below_the_estimate(recipe, width, monkeypatch):
    # As a GPU's kernel does it: nothing but the weight is made.
    monkeypatch.setattr(NF4, "dequantize", lambda self, payload, shape, dtype: torch.full(shape, 0.01, dtype=dtype))
    model = prompt_model(recipe, width)
    decoder, ids = Decoder(model, 2, 256, PlainKernels), torch.full((2, 126), 5)
    held = [decoder.cache.keys, decoder.cache.values, decoder.position, *model.parameters(), *model.buffers()]
    with Live([*held, *(t for layer in decoder.adapters.values() for a, b, _ in layer for t in (a, b))]) as live:
        _read(model, decoder, ids, None, None)
    parts = estimate_generation(model, 2, 126, 2).parts
    passing = parts["activations"] + parts["prompt"]
    assert 0.93 * passing <= live.peak <= 1.005 * passing
