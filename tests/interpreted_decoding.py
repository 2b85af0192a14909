"""Run by test_decoding.py, in a process of its own, where Triton's interpreter takes the place of its compiler.

The step that a GPU captures is run here as it stands, uncaptured.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from accessory import decoding, decoding_cuda, generation
from accessory.config import QuantizationConfig, QuantMethod, RecipeConfig
from accessory.models import build_model, config_from_params
from accessory.models.llama import Llama, RMSNorm
from accessory.quantization import quantize
from accessory.tuning.recipe import add_trainables
from accessory.weights import weight_places

PROMPTS = [[1, 5, 9, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
NEW = 4


def tiny_model(lora: bool = False) -> Llama:
    torch.manual_seed(0)
    params = {"dim": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 100, "multiple_of": 32}
    model = build_model(config_from_params(params, 100, "test"))
    quantize(model, QuantizationConfig(method=QuantMethod.nf4), torch.float32)
    add_trainables(model, RecipeConfig(lora=lora, rank=4, alpha=8))
    for name, (shape, store, _) in weight_places(model, torch.device("cpu"), torch.float32):
        store(0.3 * torch.randn(shape) + ("norm" in name))
    return model


class Uncaptured(decoding.Decoder):
    def step(self, token):
        self.token.copy_(token)
        return self.forward(self.model)


def tokens(model: Llama, monkeypatch, decoded: bool, prompts=PROMPTS, temperature: float = 0.0, stop=(-1,)):
    @contextlib.contextmanager
    def borrowed(model, batch, capacity):
        decoder = Uncaptured(model, batch, capacity, decoding_cuda) if decoded else None
        if decoded:
            decoder.model = model
        yield decoder

    monkeypatch.setattr(generation, "borrowed", borrowed)
    torch.manual_seed(0)
    return torch.stack(list(generation.generate_ids(model, prompts, NEW, temperature, 0.9, set(stop)))).T.tolist()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "prompts", [PROMPTS, [PROMPTS[1], PROMPTS[1][::-1]], [[1]]], ids=["different_lengths", "equal_lengths", "one_token"]
)
def test_prompts_get_the_tokens_of_the_plain_path(prompts, lora, monkeypatch):
    model = tiny_model(lora)
    plain = tokens(model, monkeypatch, decoded=False, prompts=prompts)
    assert tokens(model, monkeypatch, decoded=True, prompts=prompts) == plain


def test_a_seed_draws_the_tokens_of_the_plain_path_also_after_a_stop_token(monkeypatch):
    model = tiny_model()
    plain = tokens(model, monkeypatch, decoded=False, temperature=1.0)
    stop = [row[1] for row in plain]
    expected = tokens(model, monkeypatch, decoded=False, temperature=1.0, stop=stop)
    after = torch.rand(3)
    assert len(expected[0]) < NEW
    assert tokens(model, monkeypatch, decoded=True, temperature=1.0, stop=stop) == expected
    assert torch.equal(torch.rand(3), after)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("position", [0, 64, 200])
def test_attention_reads_what_is_filled_and_not_the_padding(groups, position):
    torch.manual_seed(0)
    q = torch.randn(2, 2 * groups, 24)
    keys, values = (torch.full((2, 2, 256, 24), float("nan")) for _ in range(2))
    pad = torch.tensor([0, min(position, 70)])
    expected = []
    for row, first in enumerate(pad.tolist()):
        for cache in (keys, values):
            cache[row, :, first : position + 1] = torch.randn(2, position + 1 - first, 24)
        k, v = (cache[row, :, first : position + 1].repeat_interleave(groups, 0) for cache in (keys, values))
        expected.append(F.scaled_dot_product_attention(q[row].unsqueeze(1), k, v).flatten())
    found = decoding_cuda.attend(q, keys, values, torch.tensor([position]), pad)
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_norm_is_that_of_the_model_behind_the_sum(dtype):
    norm = RMSNorm(72, 1e-5)
    norm.weight.data = torch.randn(72)
    x, added = torch.randn(2, 30, 72).to(dtype)
    total, normed = decoding_cuda.add_norm(x, added, norm.weight, norm.eps)
    assert torch.equal(total, x + added)
    torch.testing.assert_close(normed, norm(x + added))
    assert dtype == torch.float32 or (normed == norm(x + added)).double().mean() > 0.99  # no other rounding
