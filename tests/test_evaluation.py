"""Perplexity, against transformers' own LLaMA on the same folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import alpaca_items, corpus, write_data
from transformers import AutoModelForCausalLM

import accessory
from accessory.config import DataConfig, ModelConfig, Precision, QuantizationConfig, QuantMethod
from accessory.data.datamodule import answer_loader
from accessory.errors import UserError
from accessory.evaluation import Perplexity, answer_perplexity, read_text, text_perplexity
from accessory.tools import EvaluateConfig, evaluate

TEXT = "\n".join(corpus()[:60])


@pytest.fixture(scope="module")
def model(hf_folder):
    return accessory.load_model(str(hf_folder))


@pytest.fixture(scope="module")
def reference(hf_folder):
    return AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.float64)


def window_losses(reference, ids: list[int], seqlen: int) -> list[float]:
    """Negative log-likelihood of tokens 2 … seqlen of every whole window, one window at a time, in fp64."""
    losses = []
    for start in range(0, len(ids) - seqlen + 1, seqlen):
        window = torch.tensor([ids[start : start + seqlen]])
        with torch.no_grad():
            log_p = reference(window).logits[0].log_softmax(-1)
        losses += [-log_p[i, window[0, i + 1]].item() for i in range(seqlen - 1)]
    return losses


@pytest.mark.parametrize(("seqlen", "max_tokens"), [(32, -1), (50, -1), (32, 200)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_perplexity_is_that_of_transformers_over_whole_windows(seqlen, max_tokens, batch_size, model, reference):
    ids = model.tokenizer.encode(TEXT, bos=False, eos=False)
    assert len(ids) % seqlen != 0  # the rest must be left out
    losses = window_losses(reference, ids[:max_tokens] if max_tokens > 0 else ids, seqlen)
    found = text_perplexity(model, TEXT, seqlen, max_tokens, batch_size)
    assert found.tokens == len(losses)
    assert found.nll == pytest.approx(sum(losses), rel=1e-5)
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_model_that_prefers_no_token_has_the_vocabularys_size_as_perplexity(hf_folder):
    flat = accessory.load_model(str(hf_folder))
    with torch.no_grad():
        flat.lm_head.weight.zero_()
    assert text_perplexity(flat, TEXT, seqlen=32).value == pytest.approx(384, rel=1e-5)


def test_text_shorter_than_a_window_is_refused(model):
    ids = model.tokenizer.encode("the text", bos=False, eos=False)
    with pytest.raises(UserError, match=f"the text has {len(ids)} tokens, fewer than one window of seqlen=64"):
        text_perplexity(model, "the text", seqlen=64)


def test_max_tokens_shorter_than_a_window_is_refused(model):
    with pytest.raises(UserError, match="the text has 20 tokens, fewer than one window of seqlen=64"):
        text_perplexity(model, TEXT, seqlen=64, max_tokens=20)


def answer_losses(reference, tokenizer, items: list[dict]) -> list[float]:
    """Negative log-likelihood of every answer's tokens and EOS, item by item, in fp64."""
    losses = []
    for item in items:
        ids = tokenizer.encode(item["instruction"] + item["output"], bos=True, eos=True)
        prompt = tokenizer.encode(item["instruction"], bos=True, eos=False)
        shared = next(i for i, (a, b) in enumerate(zip([*prompt, None], ids, strict=False)) if a != b)
        with torch.no_grad():
            log_p = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-log_p[i - 1, ids[i]].item() for i in range(shared, len(ids))]
    return losses


@pytest.fixture
def answers(tmp_path) -> Path:
    return write_data(tmp_path / "answers", alpaca_items(10), prompt_type="None")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answer_perplexity_is_that_of_transformers_over_all_answer_tokens(batch_size, answers, model, reference):
    config = DataConfig(data_config=str(answers), max_words=128, num_workers=0)
    losses = answer_losses(reference, model.tokenizer, alpaca_items(10))
    found = answer_perplexity(model, answer_loader(config, model.tokenizer, batch_size))
    assert found.tokens == len(losses)
    assert found.nll == pytest.approx(sum(losses), rel=1e-5)


def test_perplexity_is_the_exponential_of_the_mean_loss():
    assert Perplexity(nll=20 * math.log(7), tokens=20).value == pytest.approx(7)


# --- the command -----------------------------------------------------------------------------------------------------


def settings(base: Path, **more) -> EvaluateConfig:
    return EvaluateConfig(ModelConfig(pretrained_path=[str(base)]), precision=Precision.tf32, device="cpu", **more)


def test_evaluate_writes_and_prints_the_figures_of_a_text(tmp_path, hf_folder, reference, model, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    output = tmp_path / "figures.json"
    figures = evaluate(settings(hf_folder, text=str(tmp_path / "text.txt"), seqlen=32, output=str(output)))
    losses = window_losses(reference, model.tokenizer.encode(TEXT, bos=False, eos=False), 32)
    expected = math.exp(sum(losses) / len(losses))
    assert figures["ppl"] == pytest.approx(expected, rel=1e-5)
    assert json.loads(output.read_text()) == figures
    assert f"text.txt is {figures['ppl']:.4f} ({len(losses):,} predictions, none)" in capsys.readouterr().out


def test_evaluate_measures_the_answers_of_a_data_yaml(answers, hf_folder, reference, model):
    figures = evaluate(settings(hf_folder, data_config=str(answers), seqlen=128))
    losses = answer_losses(reference, model.tokenizer, alpaca_items(10))
    assert (figures["tokens"], figures["nll"]) == (len(losses), pytest.approx(sum(losses), rel=1e-5))


def test_evaluate_measures_the_quantized_model(tmp_path, hf_folder):
    (tmp_path / "text.txt").write_text(TEXT)
    more = {"text": str(tmp_path / "text.txt"), "seqlen": 32}
    figures = evaluate(settings(hf_folder, **more, quantization=QuantizationConfig(QuantMethod.nf4)))
    model = accessory.load_model(str(hf_folder), quantization="nf4")
    with torch.no_grad():
        windows = torch.tensor(model.tokenizer.encode(TEXT, bos=False, eos=False))
        windows = windows[: len(windows) // 32 * 32].view(-1, 32)
        nll = torch.nn.functional.cross_entropy(model(windows)[:, :-1].flatten(0, 1).double(), windows[:, 1:].flatten())
    assert figures["quantization"] == "nf4"
    assert figures["ppl"] == pytest.approx(nll.exp().item(), rel=1e-5)
    assert figures["ppl"] != pytest.approx(evaluate(settings(hf_folder, **more))["ppl"], rel=1e-3)


@pytest.mark.parametrize("given", [{}, {"text": "t.txt", "data_config": "d.yaml"}])
def test_exactly_one_of_text_and_data_is_asked_for(given, hf_folder):
    with pytest.raises(UserError, match=r"give one of --text FILE .* or --data_config YAML"):
        settings(hf_folder, **given)


@pytest.mark.parametrize("wrong", [{"seqlen": 1}, {"batch_size": 0}])
def test_window_and_batch_that_cannot_be_are_refused(wrong, hf_folder):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}.*must be at least"):
        settings(hf_folder, text="t.txt", **wrong)


def test_missing_text_is_refused_before_the_model_is_read(hf_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("accessory.tools._load", None)
    with pytest.raises(UserError, match=r"--text .*nowhere\.txt: no such file"):
        evaluate(settings(hf_folder, text=str(tmp_path / "nowhere.txt")))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"--text .*latin\.txt: not readable as UTF-8 text"):
        read_text(tmp_path / "latin.txt")
