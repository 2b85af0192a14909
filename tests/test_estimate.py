"""The memory estimate against what is really allocated: tensors of tiny models, and what autograd keeps of them."""

from __future__ import annotations

import json
import runpy
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from conftest import VISION
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Blip2Config, LlamaConfig

import accessory
from accessory.config import (
    DataConfig,
    DataParallel,
    FastConfig,
    LlamaType,
    ModelConfig,
    OptimConfig,
    QuantizationConfig,
    QuantMethod,
    RecipeConfig,
    StrategyConfig,
    TrainConfig,
)
from accessory.decoding import Decoder, KVCache
from accessory.errors import UserError
from accessory.estimate import (
    GIB,
    OVERHEAD,
    SHAPES,
    Step,
    counting,
    estimate_generation,
    estimate_training,
    graphs_fit,
    held_bytes,
    host_bytes,
    payload_bytes,
    recomputed_blocks_that_fit,
    save_memory,
    training,
)
from accessory.estimate.cases import Estimator
from accessory.estimate.command import estimate
from accessory.estimate.description import build, describe_model
from accessory.estimate.options import EstimateConfig
from accessory.estimate.shapes import Shape
from accessory.fused.model import fuse_blocks
from accessory.generation import _logits
from accessory.models import build_model
from accessory.models.loss import GPU_CHUNK
from accessory.module import batch_loss
from accessory.optim import make_optimizer
from accessory.quantization import QuantLinear, quantize
from accessory.quantization.dense import Dense
from accessory.quantization.int4 import Int4
from accessory.quantization.nf4 import NF4
from accessory.tuning.recipe import add_trainables, mark_trainable
from accessory.weights import weight_places

NORM_BIAS, BOTH = RecipeConfig(), RecipeConfig(name="norm_bias_lora", lora=True)
LORA = RecipeConfig(name="lora", norm=False, bias=False, lora=True, targets=["q_proj", "down_proj"], rank=8)
RECIPES = [NORM_BIAS, BOTH, LORA]
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}


def tiny(recipe: RecipeConfig = BOTH, loaded: bool = True, dtype=torch.bfloat16, images=None, **settings):
    """Three blocks of 256 in NF4, on the CPU or without weights. settings: other sizes; the rest is quantization's."""
    sizes = {name: settings.pop(name, size) for name, size in SIZES.items()}
    config = QuantizationConfig(**({"method": QuantMethod.nf4} | settings))
    model = build_model(LlamaConfig(**sizes), images)
    quantize(model, config, dtype)
    with torch.device("cpu" if loaded else "meta"):
        add_trainables(model, recipe)
    mark_trainable(model, recipe)
    if loaded:
        for _, (shape, store, _) in weight_places(model, torch.device("cpu"), dtype):
            store(0.02 * torch.randn(shape))
    return model


@pytest.fixture(scope="module")
def model():
    """For all who leave its weights' places alone."""
    return tiny()


def batch(rows: int, width: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, (rows, width))
    return {"input_ids": ids, "targets": ids, "position_ids": torch.arange(width).expand(rows, width)}


# --- what is there all the time --------------------------------------------------------------------------------------


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


# --- what a block keeps ----------------------------------------------------------------------------------------------


def kept_by_block(model, rows: int, width: int) -> int:
    """Bytes that autograd saves of the first block, the model's own tensors and the rotary tables aside."""
    x = torch.randn(rows, width, 256, dtype=model.dtype, requires_grad=True)
    cos, sin = model.model.rotary_emb(x, torch.arange(width).expand(rows, width))
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.model.layers[0](x, (cos.unsqueeze(1), sin.unsqueeze(1)))
    if model.model.fused:  # keeps by itself, behind the view that gives rows back
        ((node, _),) = y.grad_fn.next_functions
        saved |= {t.untyped_storage().data_ptr(): t for t in node.kept if t is not None}
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), cos, sin)}
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in known)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_fused_block_keeps_what_is_said(recipe, dtype):
    model = tiny(recipe, dtype=dtype, num_hidden_layers=1)
    expected = training._fused(Shape.of(model, dtype), 2 * 96).kept
    fuse_blocks(model)
    assert kept_by_block(model, 2, 96) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_plain_block_keeps_what_is_said(recipe, dtype):
    model = tiny(recipe, dtype=dtype, num_hidden_layers=1)
    expected = training._plain(Shape.of(model, dtype), 2 * 96).kept
    assert kept_by_block(model, 2, 96) == pytest.approx(expected, rel=2e-3)  # 16-bit copies of the norms' weights


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are made and not freed yet, as an allocator would. there: those made before."""

    def __init__(self, there):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._there = {tensor.untyped_storage().data_ptr() for tensor in there}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes and storage.data_ptr() not in self._there:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@pytest.mark.parametrize("recomputed", [0, 1, 3])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (4, 192)])
def test_peak_of_a_plain_step_is_just_below_the_estimate(recomputed, rows, width, model, monkeypatch):
    monkeypatch.setattr(model.model, "recomputed", recomputed)
    monkeypatch.setattr("accessory.models.loss.CPU_CHUNK", GPU_CHUNK)  # the estimate is a GPU's
    batch_loss(model, batch(rows, width)).backward()  # gradients are there from now on
    tensors = [*model.parameters(), *model.buffers()]
    there = [*tensors, *(p.grad for p in tensors if p.grad is not None)]
    with Live(there) as live:
        batch_loss(model, batch(rows, width)).backward()
    estimated = estimate_training(model, Step(rows, width, fused=False), recomputed)
    passing = estimated.peak - sum(estimated.parts[name] for name in ("base", "trainables", "gradients", "optimizer"))
    assert live.peak <= 1.005 * passing
    assert passing <= (1.05 if recomputed < 3 else 1.35) * live.peak


def test_line_for_the_summary_adds_up_to_the_peak():
    line = estimate_training(tiny(loaded=False), Step(64, 2048), 0).line()
    peak, parts = line.split(" GiB: ")
    assert sum(float(part.rsplit(" ", 1)[1]) for part in parts.split("; ")) == pytest.approx(float(peak), abs=0.2)


@pytest.mark.parametrize("name", ["norm_bias_lora", "norm_bias"])
def test_more_tokens_take_more_and_more_recomputed_blocks_less(name):
    model = tiny({"norm_bias": NORM_BIAS, "norm_bias_lora": BOTH}[name], loaded=False)
    peaks = [estimate_training(model, Step(8, 512), n).peak for n in range(4)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[2]
    sizes = [estimate_training(model, Step(rows, width), 0).peak for rows, width in ((1, 64), (2, 64), (2, 128))]
    assert sizes == sorted(set(sizes))


def test_fewest_blocks_are_recomputed_that_make_it_fit():
    model, step = tiny(loaded=False), Step(8, 512)
    peaks = [estimate_training(model, step, n).peak for n in range(4)]
    for available in (peaks[0], peaks[0] - 1, peaks[1], peaks[1] - 1, peaks[2], peaks[3]):
        fewest = next(n for n in range(4) if peaks[n] <= available)
        assert recomputed_blocks_that_fit(model, step, available) == fewest
    assert recomputed_blocks_that_fit(model, step, 0) == 3


def test_host_memory_comes_before_recomputing_and_after_nothing():
    model, step = tiny(loaded=False), Step(8, 512)
    sent = replace(step, offloaded=True)
    plain, offloaded = ([estimate_training(model, s, n).peak for n in range(4)] for s in (step, sent))
    assert offloaded[0] < plain[0] and offloaded[1] < plain[1]
    assert save_memory(model, step, plain[0], None, None) == (0, False)
    assert save_memory(model, step, plain[0] - 1, None, None) == (0, True)
    assert save_memory(model, step, offloaded[0] - 1, None, None) == (1, True)
    assert save_memory(model, step, 0, None, None) == (3, True)
    assert save_memory(model, step, plain[0] - 1, None, False) == (1, False)
    assert save_memory(model, step, plain[0], None, True) == (0, True)


def test_what_is_told_of_recomputing_holds_and_host_memory_follows():
    model, step = tiny(loaded=False), Step(8, 512)
    none = estimate_training(model, step, 0).peak
    assert save_memory(model, step, none, False, None) == (0, False)
    assert save_memory(model, step, none - 1, False, None) == (0, True)
    assert save_memory(model, step, none, True, None) == (3, True)
    assert save_memory(model, step, none, True, False) == (3, False)
    unfused = replace(step, fused=False)
    assert save_memory(model, unfused, 0, None, None) == (3, False)


def test_host_memory_holds_inputs_and_the_residuals_of_what_is_not_recomputed():
    model, step = tiny(loaded=False), Step(8, 512)
    d = model.config.hidden_size
    assert [host_bytes(model, step, n) for n in (0, 1, 3)] == [n * 2 * 8 * 512 * d for n in (6, 5, 3)]
    assert host_bytes(model, Step(5, 512), 3) == host_bytes(model, step, 3)  # torch pins powers of two
    saved = estimate_training(model, step, 0).parts["activations"]
    saved -= estimate_training(model, replace(step, offloaded=True), 0).parts["activations"]
    assert saved == (6 - 3) * 2 * 8 * 512 * d  # three stay: in use, leaving, arriving


def test_a_decoder_holds_what_is_said(model):
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
    found, expected = (_logits(model, place, ids, pad) for place in (decoder, cache))
    torch.testing.assert_close(found, expected)
    for filled, plain in ((decoder.cache.keys, cache.keys), (decoder.cache.values, cache.values)):
        torch.testing.assert_close(filled[:, :, :, 4:30], plain[:, :, :, 4:])
    assert decoder.position.item() == decoder.cache.length == 30 and torch.equal(decoder.pad, pad)


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
        _logits(model, decoder, ids, None)
    parts = estimate_generation(model, 2, 126, 2).parts
    passing = parts["activations"] + parts["prompt"]
    assert 0.93 * passing <= live.peak <= 1.005 * passing


# --- the command -----------------------------------------------------------------------------------------------------


def asked(**more) -> EstimateConfig:
    return EstimateConfig(**({"size": "tiny", "quantization": QuantizationConfig(QuantMethod.nf4)} | more))


def test_seven_b_trains_as_many_as_published():
    described = describe_model(asked(size="7b"))
    model = build(described, QuantizationConfig(QuantMethod.nf4), BOTH, torch.bfloat16)
    base, trainable = held_bytes(model)
    assert trainable / 4 == pytest.approx(41.6e6, rel=0.001)
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert base == pytest.approx(linears * 4.127 / 8 + 2 * 2 * 32000 * 4096, rel=0.001)


def test_weights_are_counted_as_the_same_without_them(hf_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    quantization = QuantizationConfig(QuantMethod.nf4)
    models = [
        build(describe_model(asked(size=None, model=ModelConfig(pretrained_path=[str(folder)]))), quantization, BOTH,
              torch.float32)
        for folder in (hf_folder, tmp_path)
    ]  # fmt: skip
    loaded = accessory.load_model([str(hf_folder)], quantization="nf4")
    assert held_bytes(models[0], torch.float32) == held_bytes(models[1], torch.float32)
    norms_and_biases = held_bytes(loaded)[0] + 4 * sum(
        m.out_features for m in loaded.modules() if isinstance(m, QuantLinear)
    )
    base, trainable = held_bytes(models[0], torch.float32)
    lora = 4 * sum(p.numel() for name, p in models[0].named_parameters() if "lora_" in name)
    assert base + trainable == norms_and_biases + lora


def test_calibrated_methods_are_counted_by_their_scheme():
    described = describe_model(asked())
    sizes = {}
    for bits in (3, 4, 8):
        quantization = QuantizationConfig(QuantMethod.autoround, bits=bits)
        sizes[bits] = held_bytes(build(described, quantization, NORM_BIAS, torch.bfloat16))[0]
    assert sizes[3] < sizes[4] < sizes[8]


def test_script_prints_a_table_and_writes_the_figures(tmp_path, monkeypatch, capsys):
    scripts = Path(accessory.__file__).resolve().parents[1] / "scripts"
    (tmp_path / "lora.json").write_text(json.dumps({"lora_rank": 16, "bias_tuning": True}))  # as good as recipe=
    words = "--model tiny --quant --llama_config lora.json --batch_size 16 --gpu_memory 0.8 --json out.json"
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(scripts)
    monkeypatch.setattr(sys, "argv", ["estimate.py", *words.split()])
    runpy.run_path(str(scripts / "estimate.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "activations" in printed and "does not fit" in printed and "--batch_size" in printed
    figures = json.loads(Path("out.json").read_text())
    assert figures["fits"] is False and figures["gpu_memory"] == int(0.8 * GIB)
    described = describe_model(asked())
    model = build(described, QuantizationConfig(QuantMethod.nf4), BOTH, torch.bfloat16)
    assert figures["train"]["0"]["peak"] == estimate_training(model, Step(16, 512), 0).peak
    assert figures["train"]["4"]["peak"] < figures["train"]["0"]["peak"]


def test_suggestions_give_the_peak_that_they_would_have():
    config = asked(gpu_memory=0.92, recipe=BOTH, train=TrainConfig(batch_size=16, checkpointing=False))
    offered = estimate(config)["suggestions"]
    smaller = replace(config, train=TrainConfig(batch_size=8, accum_iter=2))
    assert offered["--batch_size 8 --accum_iter 2"] == estimate(smaller)["train"]["0"]["peak"]
    other = replace(config, recipe=NORM_BIAS)
    assert offered["recipe=norm_bias: no LoRA"] == estimate(other)["train"]["0"]["peak"]
    spread = replace(config, ranks=2, strategy=StrategyConfig(DataParallel.fsdp))
    assert offered["--data_parallel fsdp on 2 GPUs"] == estimate(spread)["train"]["0"]["peak"]
    left = estimate(replace(config, train=TrainConfig(batch_size=16)))
    (some,) = (peak for what, peak in offered.items() if what.startswith("train.checkpointing=null"))
    assert some == left["train"][str(left["recomputed_blocks"])]["peak"]


def test_checkpointing_is_as_told_and_unset_as_few_blocks_as_fit():
    def recomputed(checkpointing, gpu_memory):
        train = TrainConfig(batch_size=16, checkpointing=checkpointing)
        return estimate(asked(recipe=BOTH, train=train, gpu_memory=gpu_memory))["recomputed_blocks"]

    assert [recomputed(told, 0.92) for told in (False, True)] == [0, 4]
    model = build(describe_model(asked()), QuantizationConfig(QuantMethod.nf4), BOTH, torch.bfloat16)
    fewest = recomputed_blocks_that_fit(model, Step(16, 512), int(0.92 * GIB) - OVERHEAD)
    assert 0 < fewest < 4
    assert [recomputed(None, memory) for memory in (0.92, 80)] == [fewest, 0]


def test_without_a_known_gpu_no_block_is_recomputed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert estimate(asked())["recomputed_blocks"] == 0


@pytest.mark.parametrize(
    ("settings", "fused", "captured"),
    [
        ({}, True, True),
        ({"fast": FastConfig(enabled=False)}, False, False),
        ({"fast": FastConfig(blocks=False)}, False, True),
        ({"fast": FastConfig(graphs=False)}, True, False),
        ({"ranks": 2}, True, False),
        ({"recipe": replace(BOTH, dropout=0.1)}, False, False),
    ],
    ids=str,
)
def test_a_step_is_as_fast_as_a_gpu_would_make_it(settings, fused, captured):
    estimator = Estimator(asked(**settings), None)
    step = estimator.step(estimator.asked)
    assert (step.fused, step.captured) == (fused, captured)


def test_packed_rows_hold_as_many_images_as_there_is_room_for(tmp_path):
    (tmp_path / "vision.json").write_text(json.dumps(VISION))
    model = ModelConfig(LlamaType.llama_qformerv2_peft, pretrained_path=[], vision_config=str(tmp_path / "vision.json"))
    steps = []
    for packing in (False, True):
        data = DataConfig(data_config="", max_words=90, packing=packing)
        estimator = Estimator(asked(model=model, data=data), None)
        steps.append(estimator.step(estimator.asked))
    assert [(step.rows, step.width, step.images) for step in steps] == [(4, 90, 4), (4, 90, 4 * 10)]


def test_without_a_gpu_common_sizes_are_listed(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    estimate(asked())
    assert "80 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": None}, "which model"),
        ({"size": "7bb"}, "did you mean 7b"),
        ({"model": ModelConfig(pretrained_path=["base"])}, "leave one of them out"),
        ({"size": None, "model": ModelConfig(pretrained_path=["/nowhere/base"])}, "no such folder"),
        ({"gpu_memory": -1.0}, "--gpu_memory -1: must be above 0"),
        ({"ranks": 0}, "--ranks 0: must be at least 1"),
        ({"train": TrainConfig(batch_size=0)}, "--batch_size 0"),
        ({"quantization": QuantizationConfig(QuantMethod.int4)}, "a base that says how it is stored"),
        ({"recipe": RecipeConfig(projector=True)}, "for models that take images"),
        ({"json": "/nowhere/out.json"}, "--json /nowhere/out.json: name a file in a folder that exists"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(settings, message):
    with pytest.raises(UserError, match=message):
        estimate(asked(**settings))


def test_a_folder_that_describes_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither weights nor config"):
        estimate(asked(size=None, model=ModelConfig(pretrained_path=[str(tmp_path)])))


def test_shapes_are_llama2s():
    assert SHAPES["70b"] == (8192, 28672, 80, 64, 8, 32000)


def test_graphs_fit_where_a_step_has_room_beside_the_captured_one():
    model = tiny(loaded=False)
    step = Step(8, 512)
    estimated = estimate_training(model, step, 0)
    own = estimated.parts["activations"] + max(estimated.parts["loss"], estimated.parts["backward"])
    assert graphs_fit(model, step, 0, estimated.peak + own)
    assert not graphs_fit(model, step, 0, estimated.peak + own - 1)
