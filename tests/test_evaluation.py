"""Perplexity, against transformers' own LLaMA on the same folder."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from conftest import alpaca_items, corpus, write_data
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import accessory
from accessory.cli import run_command
from accessory.config import DataConfig, ModelConfig, Precision, QuantizationConfig, QuantMethod, RecipeConfig
from accessory.data.datamodule import answer_loader
from accessory.errors import UserError
from accessory.evaluation import Perplexity, answer_perplexity, read_text, text_perplexity
from accessory.quantization import block_linears, put_backends
from accessory.quantization.dense import Dense
from accessory.quantization.int4 import Int4
from accessory.quantization.job import quantize_base
from accessory.quantization.nf4 import NF4
from accessory.quantize_options import Method, QuantizeConfig
from accessory.side_by_side import fake_quantized, memory_bytes
from accessory.tools import EvaluateConfig, _run_tasks, evaluate
from accessory.tuning.recipe import add_trainables, mark_trainable

TEXT = "\n".join(corpus()[:60])
NF4_ON_LOAD = QuantizationConfig(QuantMethod.nf4)


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
    assert f"text.txt is {figures['ppl']:.4f} ({len(losses):,} predictions, none, tf32)" in capsys.readouterr().out


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


@pytest.mark.parametrize("side_by_side", [False, True])
def test_scales_that_are_no_numbers_give_one_line_and_no_figure(tmp_path, int4_folder, text_file, capsys, side_by_side):
    folder = tmp_path / "int4"
    shutil.copytree(int4_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as exit:
        run_command(lambda: evaluate(settings(folder, text=text_file, seqlen=32, side_by_side=side_by_side)))
    said = capsys.readouterr()
    assert exit.value.code == 2 and "ppl" not in said.out
    line = f"error: the model on {folder}: model.layers.1.mlp.up_proj.scales holds NaN or infinity; .*\n"
    assert re.fullmatch(line, said.err)


def test_tasks_are_not_run_on_weights_that_are_no_numbers(hf_folder):
    pytest.importorskip("lm_eval")
    broken = accessory.load_model(str(hf_folder))
    with torch.no_grad():
        broken.model.norm.weight[0] = math.inf
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN or infinity"):
        _run_tasks(settings(hf_folder, tasks=["lambada_openai"]), broken, None)


def test_outputs_that_are_no_numbers_give_no_perplexity_either(hf_folder, answers, model):
    broken = accessory.load_model(str(hf_folder))
    with torch.no_grad():
        broken.model.norm.weight.mul_(1e38)
    config = DataConfig(data_config=str(answers), max_words=128, num_workers=0)
    for measure in (
        lambda: text_perplexity(broken, TEXT, seqlen=32),
        lambda: answer_perplexity(broken, answer_loader(config, model.tokenizer, 4)),
    ):
        with pytest.raises(UserError, match=f"the model on {hf_folder}: its mean loss is .*, so it has no perplexity"):
            measure()


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
    with pytest.raises(UserError, match=r"--text .*latin\.txt: not UTF-8 text \(byte 3\)"):
        read_text(tmp_path / "latin.txt")


# --- side by side ----------------------------------------------------------------------------------------------------

BACKENDS = [NF4(), NF4(32, double_quant=False), Int4(4, 32), Int4(8, -1, sym=True), Int4(3, 64, reordered=True)]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_fake_quantized_model_has_the_packed_ones_logits_bit_for_bit(backend, hf_folder):
    packed = accessory.load_model(str(hf_folder))
    weights = {path: linear.dequantize(torch.float32) for path, linear in block_linears(packed).items()}
    put_backends(packed, dict.fromkeys(weights, backend))
    for path, weight in weights.items():
        packed.get_submodule(path).load_weight(weight)
        packed.get_submodule(path).load_bias(torch.randn(len(weight)))
    ids = torch.randint(384, (2, 20))
    expected, size = packed(ids), memory_bytes(packed)
    fake = fake_quantized(packed, torch.float32)
    assert torch.equal(fake(ids), expected)
    assert {linear.backend for linear in block_linears(fake).values()} == {Dense(torch.float32)}
    assert memory_bytes(fake) > size


def test_fake_quantized_model_keeps_its_trainables(hf_folder):
    model = accessory.load_model(str(hf_folder), quantization="nf4")
    recipe = RecipeConfig(lora=True, rank=4)
    add_trainables(model, recipe)
    mark_trainable(model, recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    ids = torch.randint(384, (2, 20))
    expected, trained = model(ids), {name for name, p in model.named_parameters() if p.requires_grad}
    assert torch.equal(fake_quantized(model, torch.float32)(ids), expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


@pytest.fixture
def text_file(tmp_path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def test_side_by_side_is_three_runs_of_their_own(text_file, hf_folder, capsys):
    more = {"text": text_file, "seqlen": 32}
    found = evaluate(settings(hf_folder, **more, quantization=NF4_ON_LOAD, side_by_side=True))
    base, fake, packed = found["side_by_side"]
    model = accessory.load_model(str(hf_folder), quantization="nf4")
    sizes = [memory_bytes(accessory.load_model(str(hf_folder))), memory_bytes(model)]
    assert base["ppl"] == evaluate(settings(hf_folder, **more))["ppl"]
    assert packed["ppl"] == evaluate(settings(hf_folder, **more, quantization=NF4_ON_LOAD))["ppl"]
    assert fake["ppl"] == text_perplexity(fake_quantized(model, torch.float32), TEXT, 32).value == packed["ppl"]
    assert base["ppl"] != packed["ppl"]
    assert [row["memory_bytes"] for row in (base, fake, packed)] == [sizes[0], sizes[0], sizes[1]]
    on_disk = (hf_folder / "model.safetensors").stat().st_size
    assert [row["disk_bytes"] for row in (base, fake, packed)] == [on_disk, None, None]
    table = [line.split()[0] for line in capsys.readouterr().out.splitlines()[:5]]
    assert table == ["ppl", "model", "16", "fake-quantized", "packed"]


def test_side_by_side_measures_the_answers_of_a_data_yaml(answers, hf_folder):
    more = {"data_config": str(answers), "seqlen": 128}
    found = evaluate(settings(hf_folder, **more, quantization=NF4_ON_LOAD, side_by_side=True))["side_by_side"]
    assert found[0]["nll"] == evaluate(settings(hf_folder, **more))["nll"]
    assert found[2]["nll"] == evaluate(settings(hf_folder, **more, quantization=NF4_ON_LOAD))["nll"]


@pytest.fixture(scope="module")
def int4_folder(tmp_path_factory, hf_folder) -> Path:
    config = QuantizeConfig(
        ModelConfig(pretrained_path=[str(hf_folder)]), str(tmp_path_factory.mktemp("int4") / "rtn"), Method.rtn,
        device="cpu",
    )  # fmt: skip
    return quantize_base(config)


def test_quantized_folder_is_compared_with_the_base_that_it_was_made_from(text_file, hf_folder, int4_folder):
    more = {"text": text_file, "seqlen": 32}
    base, fake, packed = evaluate(settings(int4_folder, **more, side_by_side=True))["side_by_side"]
    assert (base["path"], packed["path"]) == (str(hf_folder), str(int4_folder))
    assert base["ppl"] == evaluate(settings(hf_folder, **more))["ppl"]
    assert packed["ppl"] == evaluate(settings(int4_folder, **more))["ppl"] == fake["ppl"] != base["ppl"]
    assert packed["model"] == "packed (int4)"
    assert packed["disk_bytes"] == (int4_folder / "model.safetensors").stat().st_size < base["disk_bytes"]


def test_reference_names_another_base(text_file, hf_folder, int4_folder, tmp_path):
    shutil.copytree(hf_folder, tmp_path / "moved")
    more = {"text": text_file, "seqlen": 32, "side_by_side": True}
    expected = evaluate(settings(int4_folder, **more))["side_by_side"][0]
    shutil.copytree(int4_folder, tmp_path / "int4")
    manifest = tmp_path / "int4" / "quantization.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"source": "/gone"}))
    with pytest.raises(UserError, match=r"int4 was made from /gone, which is gone; name its 16-bit base with --ref"):
        evaluate(settings(tmp_path / "int4", **more))
    found = evaluate(settings(tmp_path / "int4", **more, reference=str(tmp_path / "moved")))["side_by_side"][0]
    assert (found["path"], found["ppl"]) == (str(tmp_path / "moved"), expected["ppl"])
    manifest.unlink()
    with pytest.raises(UserError, match=r"int4 does not say what it was made from; name its 16-bit base with --ref"):
        evaluate(settings(tmp_path / "int4", **more))


def test_base_that_is_no_16_bit_base_of_the_model_is_refused(text_file, hf_folder, int4_folder, tmp_path):
    more = {"text": text_file, "side_by_side": True}
    with pytest.raises(UserError, match=r"--side_by_side: .* is not quantized; add --quant"):
        evaluate(settings(hf_folder, **more))
    with pytest.raises(UserError, match=r"--side_by_side: .* is quantized itself; name a 16-bit base with --reference"):
        evaluate(settings(int4_folder, **more, reference=str(int4_folder)))
    with pytest.raises(UserError, match=r"--side_by_side, the 16-bit form: .*nowhere: no such folder"):
        evaluate(settings(int4_folder, **more, reference=str(tmp_path / "nowhere")))
    shutil.copytree(hf_folder, tmp_path / "other")
    lines = (line for line in corpus()[::-1])
    trainer = {"model_prefix": str(tmp_path / "other" / "tokenizer"), "vocab_size": 384, "model_type": "bpe"}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, byte_fallback=True, minloglevel=2, **trainer)
    with pytest.raises(UserError, match=r"other has another tokenizer than .*: is it its base\?"):
        evaluate(settings(int4_folder, **more, reference=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"side_by_side": True}, "give one of --text FILE"),
        ({"text": "t.txt", "reference": "base"}, "--reference base: is for --side_by_side"),
    ],
)
def test_side_by_side_settings_that_cannot_be_meant_are_refused(given, complaint, hf_folder):
    with pytest.raises(UserError, match=complaint):
        settings(hf_folder, **given)
