"""Captured decoding: its step under Triton's interpreter, its pool on fakes, and the whole of it on a GPU."""

from __future__ import annotations

import gc
import logging
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import pytest
import torch
from interpreter import run_interpreted

from accessory import decoding
from accessory.config import QuantizationConfig, QuantMethod, RecipeConfig
from accessory.decoding import KEPT, borrowed
from accessory.generation import generate_ids
from accessory.models import build_model, config_from_params
from accessory.models.llama import Llama
from accessory.quantization import quantize
from accessory.tuning.recipe import add_trainables
from accessory.weights import weight_places

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch sees none")]
PROMPTS = [[1, 5, 9, 7], [1, 3], [1, *range(2, 90)]]


def gpu_test(function):
    for mark in GPU:
        function = mark(function)
    return function


def test_the_step_gives_the_tokens_of_the_models_own_forward_pass():
    run_interpreted(Path(__file__).with_name("interpreted_decoding.py"))


# --- the pool --------------------------------------------------------------------------------------------------------


class FakeModel:
    device, sharded = torch.device("cuda"), None


class FakeDecoder:
    made: list[tuple[int, int]] = []
    fault: str | None = None

    def __init__(self, model, batch, capacity, kernels):
        self.batch, self.capacity = batch, capacity
        self.made.append((batch, capacity))

    def capture(self, model):
        if self.fault:
            raise RuntimeError(f"{self.fault}\nand more")

    def suits(self, model, batch, capacity):
        return self.batch == batch and self.capacity >= capacity


@pytest.fixture
def made(monkeypatch) -> list[tuple[int, int]]:
    monkeypatch.setattr(decoding, "Decoder", FakeDecoder)
    monkeypatch.setattr(decoding, "working", lambda *_: object())
    monkeypatch.setattr(FakeDecoder, "made", [])
    monkeypatch.setattr(decoding, "_warned", set())
    return FakeDecoder.made


def test_a_later_answer_that_fits_uses_the_same_graph(made):
    model = FakeModel()
    for capacity in (100, 256, 30):
        with borrowed(model, 1, capacity):
            pass
    assert made == [(1, 256)]


def test_a_longer_answer_takes_a_larger_graph_in_the_place_of_the_smaller(made):
    model = FakeModel()
    for capacity in (100, 257, 100):
        with borrowed(model, 1, capacity):
            pass
    assert made == [(1, 256), (1, 512)]
    assert [decoder.capacity for decoder in decoding._idle[model]] == [512]


def test_two_answers_at_a_time_never_share_a_graph(made):
    model = FakeModel()
    with borrowed(model, 1, 10) as first, borrowed(model, 1, 10) as second:
        assert first is not second
    assert len(decoding._idle[model]) == 1


def test_only_a_few_idle_graphs_are_kept_and_none_beyond_the_model(made):
    model = FakeModel()
    with ExitStack() as answers:
        for batch in range(1, KEPT + 3):
            answers.enter_context(borrowed(model, batch, 10))
    assert len(decoding._idle[model]) == KEPT
    before = len(decoding._idle)
    del model
    gc.collect()
    assert len(decoding._idle) == before - 1


def test_an_answer_that_the_garbage_collector_ends_in_the_middle_of_another_gives_its_decoder_back(made):
    model, abandoned = FakeModel(), ExitStack()
    abandoned.enter_context(borrowed(model, 1, 10))

    def collected() -> None:
        with decoding._lock:
            abandoned.close()

    thread = Thread(target=collected, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert len(decoding._idle[model]) == 1


def test_where_capturing_fails_the_plain_path_stays_with_one_warning_that_says_why(made, monkeypatch, caplog):
    monkeypatch.setattr(FakeDecoder, "fault", "operation not permitted when stream is capturing")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with borrowed(FakeModel(), 1, 10) as decoder:
                assert decoder is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("several times slower: operation not permitted when stream is capturing")


def test_a_sharded_model_and_one_on_a_cpu_answer_plainly_without_a_warning(made, caplog):
    sharded, on_cpu = FakeModel(), FakeModel()
    sharded.sharded, on_cpu.device = object(), torch.device("cpu")
    for model in (sharded, on_cpu):
        with borrowed(model, 1, 10) as decoder:
            assert decoder is None
    assert made == [] and not caplog.records


# --- on a GPU --------------------------------------------------------------------------------------------------------


def gpu_model(lora: bool = False, dtype: torch.dtype = torch.float32) -> Llama:
    """Two blocks with grouped heads in NF4; in fp32, so that rounding decides no token."""
    torch.manual_seed(0)
    params = {"dim": 512, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 1000}
    model = build_model(config_from_params(params, 1000, "test"))
    quantize(model, QuantizationConfig(method=QuantMethod.nf4), dtype)
    add_trainables(model, RecipeConfig(lora=lora, rank=4))
    device = torch.device("cuda")
    for name, (shape, store, _) in weight_places(model, device, dtype):
        store(0.1 * torch.randn(shape, device=device) + ("norm" in name))
    model.model.rotary_emb.to(device)
    return model


def answer(model: Llama, graphs: bool, prompts=PROMPTS, new: int = 40, temperature: float = 0.0, stop=(-1,)):
    torch.manual_seed(1)
    return torch.stack(list(generate_ids(model, prompts, new, temperature, 0.95, set(stop), None, graphs))).T.tolist()


@gpu_test
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_captured_answers_are_the_plain_ones(lora, temperature):
    model = gpu_model(lora)
    plain = answer(model, graphs=False, temperature=temperature)
    for _ in range(2):
        assert answer(model, graphs=True, temperature=temperature) == plain
    assert len(decoding._idle[model]) == 1


@gpu_test
def test_in_a_captured_batch_each_prompt_gets_its_own_answer():
    model = gpu_model()
    assert answer(model, graphs=True) == [answer(model, graphs=True, prompts=[prompt])[0] for prompt in PROMPTS]


@gpu_test
def test_a_captured_answer_ends_at_its_stop_token():
    model = gpu_model()
    (plain,) = answer(model, graphs=False, prompts=PROMPTS[:1])
    stop = plain[7]
    expected = plain[: plain.index(stop) + 1]
    assert answer(model, graphs=True, prompts=PROMPTS[:1], stop=[stop]) == [expected]


@gpu_test
def test_a_second_call_replays_the_same_graph_and_a_moved_weight_makes_a_new_one():
    model = gpu_model()
    answer(model, graphs=True)
    (first,) = decoding._idle[model]
    answer(model, graphs=True)
    assert decoding._idle[model] == [first]
    norm = model.model.norm
    kept = norm.weight  # lest the new one get its address
    norm.weight = torch.nn.Parameter(-kept.detach())
    assert answer(model, graphs=True) == answer(model, graphs=False)
    assert decoding._idle[model] != [first]


@gpu_test
def test_trainables_that_moved_in_place_are_seen_by_the_graph():
    model = gpu_model(lora=True)
    before = answer(model, graphs=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith(("bias", "norm.weight")):
                parameter.mul_(-1.5)
    assert answer(model, graphs=True) == answer(model, graphs=False) != before


@gpu_test
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_models_on_two_gpus_of_one_process_answer_as_each_alone():
    first, second = gpu_model(), gpu_model().to("cuda:1")
    expected = answer(first, graphs=False)
    assert answer(first, graphs=True) == answer(second, graphs=True) == expected
    assert len(decoding._idle[second]) == 1


@gpu_test
def test_answers_are_drawn_in_one_thread_while_others_capture():
    drawing, capturing, told = gpu_model(), gpu_model(), []

    def draw():
        try:
            for _ in range(40):
                list(generate_ids(drawing, PROMPTS, 40, 1.0, 0.95, {-1}))  # seeding is not for threads
        except Exception as error:
            told.append(error)

    thread = Thread(target=draw)
    thread.start()
    captures = 0
    while thread.is_alive() or captures < 20:
        decoding.release(capturing)
        answer(capturing, graphs=True)
        captures += 1
    thread.join()
    assert told == []


@gpu_test
def test_nothing_stays_in_memory_when_the_model_goes():
    answer(gpu_model(), graphs=True)  # what libraries keep for themselves
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = gpu_model()
    answer(model, graphs=True)
    del model
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


@gpu_test
def test_logits_in_bf16_are_as_near_to_fp32_as_those_of_the_plain_forward_pass():
    from accessory import decoding_cuda
    from accessory.generation import _logits, _read

    ids, token = torch.tensor([PROMPTS[2]], device="cuda"), torch.tensor([17], device="cuda")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = gpu_model(dtype=dtype)
        with torch.inference_mode():
            decoder, cache = decoding.Decoder(model, 1, 256, decoding_cuda), decoding.KVCache(model, 1, 256)
            decoder.capture(model)
            found["prompt", "captured", dtype] = _read(model, decoder, ids, None, None)
            found["prompt", "plain", dtype] = _logits(model, cache, ids, None)
            found["token", "captured", dtype] = decoder.step(token).clone()
            found["token", "plain", dtype] = _logits(model, cache, token[:, None], None)
    for what in ("prompt", "token"):
        exact = found[what, "plain", torch.float32]
        captured, plain = ((found[what, way, torch.bfloat16] - exact).norm() for way in ("captured", "plain"))
        assert captured < 1.25 * plain and plain < 0.05 * exact.norm()
