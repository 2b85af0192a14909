"""What is there all the time: base, trainables, gradients and moments, against the bytes of tiny models' tensors."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from conftest import VISION
from estimates import LORA, RECIPES, batch, tiny
from transformers import Blip2Config

from accessory.config import OptimConfig, QuantMethod
from accessory.estimate import Step, counting, estimate_training, held_bytes, payload_bytes
from accessory.module import batch_loss
from accessory.optim import make_optimizer
from accessory.quantization import QuantLinear
from accessory.quantization.dense import Dense
from accessory.quantization.int4 import Int4
from accessory.quantization.nf4 import NF4


@pytest.fixture(scope="module")
def model():
    """For all who leave its weights' places alone."""
    return tiny()


@pytest.mark.parametrize(
    "backend",
    [NF4(), NF4(128, double_quant=False), Int4(), Int4(8, -1, True), Int4(3, 32), Int4(4, 64, True, True), Dense()],
    ids=str,
)
def test_payload_without_weights_is_as_large_as_with(backend):
    empty, loaded = (QuantLinear(704, 320, backend) for _ in range(2))
    loaded.load_weight(torch.randn(320, 704))
    assert payload_bytes(empty) == payload_bytes(loaded) == sum(tensor.nbytes for tensor in loaded.payload)


def test_counting_a_payload_leaves_bitsandbytes_able_to_quantize(monkeypatch):
    monkeypatch.setattr(bnb, "name2qmap", {})  # as in a new process
    monkeypatch.setattr(counting, "_PAYLOADS", {})
    payload_bytes(QuantLinear(128, 64, NF4()))
    assert NF4().quantize(torch.randn(64, 128))[0].device.type == "cpu"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("quantization", [{}, {"lm_head": True}, {"method": QuantMethod.none}], ids=str)
def test_base_and_trainables_are_the_bytes_of_the_tensors(recipe, quantization):
    model = tiny(recipe, num_hidden_layers=1, **quantization)
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values()
    trainable = sum(t.nbytes for t in tensors if t.requires_grad)
    expected = (sum(t.nbytes for t in tensors) - trainable, trainable)
    assert held_bytes(model) == expected
    assert held_bytes(tiny(recipe, loaded=False, num_hidden_layers=1, **quantization)) == expected


def test_gradients_and_moments_are_those_after_a_step(model):
    optimizer = make_optimizer(model, OptimConfig())
    batch_loss(model, batch(1, 8)).backward()
    optimizer.step()
    parts = estimate_training(model, Step(1, 8), 0).parts
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in optimizer.state.values())
    assert (parts["gradients"], parts["optimizer"]) == (gradients, moments)


def test_image_part_counts_to_the_base_and_shrinks_in_nf4():
    vision = Blip2Config(**VISION)
    model, packed = (tiny(LORA, loaded=False, images=vision, **more) for more in ({}, {"vision": True}))
    parts = [*model.qformer.parameters(), *model.qformer_proj.parameters(), model.start_img, model.end_img]
    language, trainable = held_bytes(tiny(LORA, loaded=False))
    in_16_bit = held_bytes(model)[0] - language - 2 * sum(p.numel() for p in parts)
    assert in_16_bit == sum(buffer.nbytes for buffer in model.qformer.buffers())
    assert held_bytes(packed)[0] < held_bytes(model)[0]
    assert held_bytes(model)[1] == trainable
    images = [estimate_training(model, Step(4, 64, images), 0).parts["images"] for images in (0, 1, None)]
    assert images[0] == 0 < images[1] and images[2] == 4 * images[1]


def test_fsdp_spreads_the_payload_and_adds_two_blocks():
    model = tiny(loaded=False)
    block = sum(payload_bytes(m) for m in model.model.layers[0].modules() if isinstance(m, QuantLinear))
    whole, spread = held_bytes(model)[0], held_bytes(model, shards=2)[0]
    assert spread - (whole - 3 * block) == pytest.approx(3 * block / 2 + 2 * block, abs=3)
