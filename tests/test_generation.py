"""Greedy answers against transformers' generate, sampling against its definition, and streaming against both."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import VOCAB
from torch import Tensor
from transformers import LlamaForCausalLM

import accessory
from accessory import generation
from accessory.errors import UserError
from accessory.generation import generate_ids, sample, stream
from accessory.models.llama import Llama
from accessory.quantization import block_linears

PROMPTS = ["Wrap", "The text wrapper breaks long lines into short ones, and", "keep whitespace", "Lines of text:"]
NEW = 20


@pytest.fixture
def model(hf_folder) -> Llama:
    return accessory.load_model([hf_folder])


@pytest.fixture(scope="module")
def reference(hf_folder) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(hf_folder).eval()


def ids_of(model: Llama, prompt: str) -> list[int]:
    """BOS and sentencepiece's own ids, past our tokenizer class."""
    return [1, *model.tokenizer._inner.encode(prompt)]


def greedy_by_transformers(reference: LlamaForCausalLM, ids: list[int], stop: int | None = None) -> list[int]:
    out = reference.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=NEW, eos_token_id=stop, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


def columns(steps) -> list[list[int]]:
    """Tokens per prompt from the tokens per step."""
    return torch.stack(list(steps)).T.tolist()


# --- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_of_transformers_generate(model, reference, prompt):
    ids = ids_of(model, prompt)
    (found,) = columns(generate_ids(model, [ids], NEW, 0.0, 1.0, stop={-1}))
    assert len(set(found)) > 3
    assert found == greedy_by_transformers(reference, ids)


def test_a_batch_of_prompts_of_different_lengths_gives_the_tokens_of_each_alone(model, reference):
    batch = [ids_of(model, prompt) for prompt in PROMPTS]
    assert len({len(ids) for ids in batch}) == len(batch)
    found = columns(generate_ids(model, batch, NEW, 0.0, 1.0, stop={-1}))
    assert found == [greedy_by_transformers(reference, ids) for ids in batch]


def test_generate_returns_the_answers_as_text_without_the_prompts(model, reference):
    texts = model.generate(PROMPTS, max_new_tokens=NEW)
    expected = [greedy_by_transformers(reference, ids_of(model, prompt), stop=2) for prompt in PROMPTS]
    decode = model.tokenizer._inner.decode
    assert texts == [decode([token for token in ids if token != 2]) for ids in expected]
    assert all(texts)


def test_a_batch_gives_the_texts_of_each_prompt_alone(model):
    alone = [model.generate([prompt], max_new_tokens=NEW)[0] for prompt in PROMPTS]
    assert model.generate(PROMPTS, max_new_tokens=NEW) == alone


def test_a_batch_in_nf4_and_bf16_gives_the_texts_of_each_prompt_alone(hf_folder):
    model = accessory.load_model([hf_folder], quantization="nf4", dtype=torch.bfloat16)
    alone = [model.generate([prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert model.generate(PROMPTS, max_new_tokens=6) == alone


@torch.no_grad()
def test_every_greedy_token_is_the_argmax_of_a_forward_pass_without_a_cache(model):
    ids = ids_of(model, PROMPTS[1])
    (found,) = columns(generate_ids(model, [ids], NEW, 0.0, 1.0, stop={-1}))
    logits = model(torch.tensor([ids + found]))[0]
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == found


# --- where it stops --------------------------------------------------------------------------------------------------


def test_an_answer_ends_before_its_end_token_while_the_others_go_on(model, reference):
    answers = [greedy_by_transformers(reference, ids_of(model, prompt)) for prompt in PROMPTS]
    end = answers[1][3]  # this token now ends an answer
    model.config.eos_token_id = end
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in answers]
    assert len({len(answer) for answer in expected}) > 1
    decode = model.tokenizer._inner.decode
    assert model.generate(PROMPTS, max_new_tokens=NEW) == [decode(answer) for answer in expected]


@pytest.mark.parametrize("named", [lambda end: end, lambda end: [5, end]], ids=["one", "a-list"])
def test_the_end_tokens_that_the_models_config_names_end_an_answer(model, reference, named):
    answer = greedy_by_transformers(reference, ids_of(model, PROMPTS[0]))
    model.config.eos_token_id = named(answer[4])
    assert model.generate(PROMPTS[:1], max_new_tokens=NEW) == [
        model.tokenizer._inner.decode(answer[: answer.index(answer[4])])
    ]


def test_the_tokenizers_end_token_ends_an_answer(model, reference, monkeypatch):
    answer = greedy_by_transformers(reference, ids_of(model, PROMPTS[0]))
    model.config.eos_token_id = None
    monkeypatch.setattr(model.tokenizer, "eos_id", answer[2])
    steps = generate_ids(model, [ids_of(model, PROMPTS[0])], NEW, 0.0, 1.0, generation.stop_ids(model))
    assert columns(steps) == [answer[: answer.index(answer[2]) + 1]]


def test_a_prompt_that_is_done_yields_stop_tokens_while_the_others_go_on(model, reference):
    batch = [ids_of(model, prompt) for prompt in PROMPTS[:2]]
    answers = [greedy_by_transformers(reference, ids) for ids in batch]
    stop = next(token for token in answers[0] if token not in answers[1])
    found, other = columns(generate_ids(model, batch, NEW, 0.0, 1.0, {stop}))
    end = answers[0].index(stop)
    assert found == answers[0][:end] + [stop] * (NEW - end) and other == answers[1]


def test_no_more_than_max_new_tokens_come_out(model):
    (found,) = columns(generate_ids(model, [[1, 5, 9]], 7, 0.0, 1.0, stop={-1}))
    assert len(found) == 7


# --- sampling --------------------------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([0.1, 0.5, 0.15, 0.25])


def frequencies(logits: Tensor, temperature: float, top_p: float, count: int = 20_000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits.expand(count, -1), temperature, top_p, generator)
    return torch.bincount(drawn, minlength=logits.shape[-1]) / count


@pytest.mark.parametrize(
    ("top_p", "nucleus"), [(0.3, [1]), (0.6, [1, 3]), (0.74, [1, 3]), (0.8, [1, 2, 3]), (0.95, [0, 1, 2, 3])]
)
def test_the_nucleus_is_the_smallest_set_of_tokens_that_reaches_top_p(top_p, nucleus):
    found = frequencies(PROBABILITIES.log(), 1.0, top_p)
    expected = torch.zeros(4)
    expected[nucleus] = PROBABILITIES[nucleus] / PROBABILITIES[nucleus].sum()
    assert found.nonzero().flatten().tolist() == nucleus
    torch.testing.assert_close(found, expected, rtol=0, atol=0.015)  # 4 standard deviations of 20,000 draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_raises_the_probabilities_to_its_inverse(temperature):
    expected = PROBABILITIES ** (1 / temperature)
    found = frequencies(PROBABILITIES.log(), temperature, 1.0)
    torch.testing.assert_close(found, expected / expected.sum(), rtol=0, atol=0.015)


def test_a_draw_is_that_of_torch_multinomial_with_the_same_seed():
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    ordered, index = logits.softmax(-1).sort(-1, descending=True)
    expected = torch.multinomial(ordered, 1, generator=torch.Generator().manual_seed(2))
    found = sample(logits, 1.0, 2.0, torch.Generator().manual_seed(2))
    assert torch.equal(found, index.gather(-1, expected).squeeze(-1))


def test_each_row_of_a_batch_is_sampled_from_its_own_logits():
    logits = torch.full((3, 5), -100.0)
    logits[0, 4] = logits[1, 0] = logits[2, 2] = 0.0
    assert sample(logits, 1.0, 0.9).tolist() == [4, 0, 2]


def test_temperature_zero_takes_the_most_likely_token_whatever_top_p_is():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    assert sample(logits, 0.0, 0.1).tolist() == sample(logits, 0.0, 1.0).tolist() == [1, 0]


def test_sampled_answers_follow_the_seed(model):
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(model.generate(PROMPTS, max_new_tokens=NEW, temperature=1.0, top_p=1.0))
    assert texts[0] == texts[1] != texts[2]


# --- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streaming_ends_with_the_text_of_generate(model, prompt):
    pieces = list(stream(model, prompt, NEW, 0.0, 1.0))
    assert pieces[-1] == model.generate([prompt], max_new_tokens=NEW)[0]
    assert len(pieces) > 3


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_streamed_text_only_grows(model, prompt):
    pieces = list(stream(model, prompt, NEW, 0.0, 1.0))
    assert all(later.startswith(earlier) for earlier, later in pairwise(pieces))


def test_a_character_is_not_shown_before_all_its_bytes_are_there(model, monkeypatch):
    ids = model.tokenizer._inner.encode("€ 語")  # neither is in the vocabulary: three bytes each
    assert len(ids) > 6

    def bytes_one_by_one(*_):
        yield from (torch.tensor([token]) for token in ids)

    monkeypatch.setattr(generation, "generate_ids", bytes_one_by_one)
    pieces = list(stream(model, "prompt", NEW, 0.0, 1.0))
    assert pieces[-1] == "€ 語"
    assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_stops_before_the_end_token(model, reference):
    answer = greedy_by_transformers(reference, ids_of(model, PROMPTS[0]))
    model.config.eos_token_id = answer[4]
    *_, last = stream(model, PROMPTS[0], NEW, 0.0, 1.0)
    assert last == model.tokenizer._inner.decode(answer[: answer.index(answer[4])])


# --- edges -----------------------------------------------------------------------------------------------------------


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused_with_the_numbers(model):
    prompt = "text " * 30
    length, limit = len(ids_of(model, prompt)), model.config.max_position_embeddings
    too_many = limit - length + 1
    with pytest.raises(UserError, match=f"a prompt of {length} tokens and {too_many} new ones exceed .* {limit} pos"):
        model.generate(["short", prompt], max_new_tokens=too_many)


def test_a_prompt_and_an_answer_that_just_fit_are_answered(model):
    prompt = "text " * 30
    room = model.config.max_position_embeddings - len(ids_of(model, prompt))
    assert 0 < room < 200
    assert len(model.generate([prompt], max_new_tokens=room)) == 1


def test_no_prompts_give_no_answers(model):
    assert model.generate([]) == []


def test_an_empty_prompt_is_answered_from_bos_alone(model, reference):
    expected = greedy_by_transformers(reference, [1], stop=2)
    assert model.generate([""], max_new_tokens=NEW) == [
        model.tokenizer._inner.decode([token for token in expected if token != 2])
    ]


def test_a_single_string_is_refused(model):
    with pytest.raises(UserError, match="takes a list of prompts"):
        model.generate("one prompt")


def test_text_without_a_tokenizer_is_refused(model):
    model.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer"):
        model.generate(PROMPTS)


def test_generating_in_the_middle_of_training_changes_no_gradient(hf_folder):
    gradients = []
    for answering in (False, True):
        model = accessory.load_model([hf_folder], quantization="nf4")
        for layer in block_linears(model).values():
            layer.load_bias(torch.zeros(layer.out_features))
            layer.bias.requires_grad_(True)
        if answering:
            model.generate(PROMPTS, max_new_tokens=3)
        model(torch.arange(12)[None] % VOCAB).square().mean().backward()
        gradients.append([layer.bias.grad for layer in block_linears(model).values()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


# --- stop text -------------------------------------------------------------------------------------------------------

CONVERSATION = "Short lines # of text ## kept ### Human: and"


@pytest.fixture
def says(monkeypatch):
    """Makes a model answer a given text, token by token."""

    def install(model: Llama, text: str) -> None:
        ids = model.tokenizer._inner.encode(text)
        monkeypatch.setattr(generation, "generate_ids", lambda *_: (torch.tensor([token]) for token in ids))

    return install


def test_an_answer_ends_before_its_stop_text(model, says):
    says(model, CONVERSATION)
    (answer,) = generation.generate(model, ["prompt"], NEW, 0.0, 1.0, " ###")
    assert answer == "Short lines # of text ## kept"


def test_a_streamed_answer_never_shows_a_part_of_its_stop_text(model, says):
    says(model, CONVERSATION)
    pieces = list(stream(model, "prompt", NEW, 0.0, 1.0, " ###"))
    assert pieces[-1] == "Short lines # of text ## kept"
    assert all(later.startswith(earlier) for earlier, later in pairwise(pieces))


def test_what_was_held_back_is_shown_where_the_stop_text_never_comes(model, says):
    says(model, "Short lines ##")
    assert list(stream(model, "prompt", NEW, 0.0, 1.0, " ###"))[-1] == "Short lines ##"


def test_in_a_batch_each_answer_ends_at_its_own_stop_text(model):
    texts = model.generate(PROMPTS, max_new_tokens=NEW)
    stop_text = texts[1][5:7]
    assert model.generate(PROMPTS, max_new_tokens=NEW, stop_text=stop_text) == [
        text.partition(stop_text)[0] for text in texts
    ]
