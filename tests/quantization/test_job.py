"""The whole quantization of small real models, from the command or the function to a folder that is read back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import alpaca_items, corpus
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

import accessory
from accessory.config import ModelConfig, Precision
from accessory.errors import UserError
from accessory.quantization import block_linears, job, linear_weight, rtn
from accessory.quantization.int4 import Int4
from accessory.quantization.job import quantize_base
from accessory.quantization.job.plan import make_plan
from accessory.quantization.job.work import Work
from accessory.quantization.methods import gptq
from accessory.quantization.packed import Scheme
from accessory.quantize_options import (
    AutoRoundConfig,
    AwqConfig,
    CalibrationConfig,
    EvaluationConfig,
    GptqConfig,
    Method,
    QuantizeConfig,
)

ROOT = Path(__file__).resolve().parents[2]
NSAMPLES, SEQLEN = 8, 32
CALIBRATED = [Method.autoround, Method.awq, Method.gptq]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(corpus()))
    return file


def settings(base: Path, out: Path, method: Method, text: Path | None = None, **changes) -> QuantizeConfig:
    """4 bit asymmetric in groups of 32, 8 rows of 32 tokens, two tuning steps, fp32."""
    defaults = {
        "group_size": 32,
        "sym": False,
        "precision": Precision.tf32,
        "calib": CalibrationConfig(
            dataset=None if text is None else str(text), nsamples=NSAMPLES, seqlen=SEQLEN, batch_size=4
        ),
        "autoround": AutoRoundConfig(iters=2),
    }
    model = ModelConfig(pretrained_path=[str(base)])
    return QuantizeConfig(model=model, output_dir=str(out), method=method, device="cpu", **defaults | changes)


def quantized(*args, **changes) -> Path:
    return quantize_base(settings(*args, **changes))


def logits(folder: Path) -> torch.Tensor:
    model = accessory.load_model(str(folder))
    return model(torch.arange(3, 35).view(2, 16))


def digest(folder: Path) -> dict[str, str]:
    """Every file of a folder by its checksum, less the manifest's time."""
    return {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f.name != "quantization.json"
    }


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[*CALIBRATED, Method.rtn, Method.int8], ids=lambda method: method.value)
def result(request, tmp_path_factory, hf_folder, text) -> tuple[Method, Path]:
    out = tmp_path_factory.mktemp("job") / "out"
    return request.param, quantized(hf_folder, out, request.param, text)


def test_every_linear_of_the_blocks_is_packed_and_the_rest_is_as_in_the_base(result, hf_folder):
    method, folder = result
    model, base = accessory.load_model(str(folder)), accessory.load_model(str(hf_folder))
    layers = block_linears(model)
    bits = 8 if method is Method.int8 else 4
    assert len(layers) == 14 and all(isinstance(layer.backend, Int4) for layer in layers.values())
    assert {layer.backend.bits for layer in layers.values()} == {bits}
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert model.tokenizer.fingerprint() == base.tokenizer.fingerprint()


def test_the_quantized_model_is_near_its_base(result, hf_folder):
    method, folder = result
    expected = logits(hf_folder)
    error = (logits(folder) - expected).norm() / expected.norm()
    assert error < (0.02 if method is Method.int8 else 0.35)


def test_the_manifest_says_where_the_folder_comes_from_and_what_it_is_worth(result, hf_folder):
    method, folder = result
    manifest = json.loads((folder / "quantization.json").read_text())
    assert manifest["method"] == method.value
    assert manifest["source"] == str(hf_folder)
    assert manifest["seconds"] > 0 and manifest["peak_memory_gib"] > 0
    if method in CALIBRATED:
        assert manifest["calibration"]["nsamples"] == NSAMPLES
        assert set(manifest["perplexity"]["calibration"]) == {"pretrain", "fake_quant"}
    else:
        assert manifest["calibration"] is None


def test_no_work_is_left_beside_the_result(result):
    _, folder = result
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_calibrated_perplexity_is_that_of_the_loaded_models_on_the_rows(result, hf_folder, text):
    method, folder = result
    if method not in CALIBRATED:
        pytest.skip("measures nothing")
    rows = make_plan(settings(hf_folder, folder.parent / "other", method, text)).rows.ids
    stated = json.loads((folder / "quantization.json").read_text())["perplexity"]["calibration"]
    for base, name in ((hf_folder, "pretrain"), (folder, "fake_quant")):
        scores = accessory.load_model(str(base))(rows)[:, :-1].double().log_softmax(-1)
        nll = -scores.gather(-1, rows[:, 1:, None]).mean()
        assert nll.exp().item() == pytest.approx(stated[name], rel=1e-4)


# --- against independent drivers --------------------------------------------------------------------------------------


def test_gptq_is_what_a_loop_over_transformers_own_model_gives(hf_folder, text, tmp_path):
    """Each group of linears is calibrated on the outputs of everything before it, rounded."""
    folder = quantized(hf_folder, tmp_path / "out", Method.gptq, text)
    rows = make_plan(settings(hf_folder, tmp_path / "other", Method.gptq, text)).rows.ids
    reference = LlamaForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    for i in range(2):
        block = f"model.layers.{i}"
        for names in (["q", "k", "v"], ["o"], ["gate", "up"], ["down"]):
            part = "self_attn" if names[0] in "qkvo" else "mlp"
            linears = [reference.get_submodule(f"{block}.{part}.{name}_proj") for name in names]
            seen = gptq.Hessian(linears[0].in_features)
            handle = linears[0].register_forward_pre_hook(lambda module, args, seen=seen: seen.add(args[0]))
            with torch.no_grad():
                for batch in rows.split(4):
                    reference(batch)
            handle.remove()
            for linear in linears:
                linear.weight.data = gptq.quantize(linear.weight, seen, Scheme(4, 32, False), GptqConfig()).dequantize(
                    torch.float32
                )
    for name, layer in block_linears(accessory.load_model(str(folder))).items():
        expected = reference.get_submodule(name).weight
        differing = (layer.dequantize(torch.float32) != expected).float().mean()
        assert differing < 0.01, name  # a code on the edge between two


def test_rounding_the_saved_adjusted_model_gives_awqs_own_weights(hf_folder, text, tmp_path):
    folder = quantized(hf_folder, tmp_path / "awq", Method.awq, text, save_trans=str(tmp_path / "trans"))
    rounded = quantized(tmp_path / "trans", tmp_path / "rtn", Method.rtn)
    assert torch.equal(logits(folder), logits(rounded))
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(
        load_file(tmp_path / "trans" / "model.safetensors")[norm], load_file(hf_folder / "model.safetensors")[norm]
    )


def test_awqs_adjusted_model_without_clipping_computes_what_the_base_does(hf_folder, text, tmp_path):
    quantized(
        hf_folder, tmp_path / "awq", Method.awq, text,
        save_trans=str(tmp_path / "trans"), awq=AwqConfig(weight_clip=False),
    )  # fmt: skip
    torch.testing.assert_close(logits(tmp_path / "trans"), logits(hf_folder), atol=1e-4, rtol=1e-4)


def test_rtn_is_the_same_on_load_and_in_a_folder(hf_folder, tmp_path):
    from accessory.config import QuantizationConfig, QuantMethod

    folder = quantized(hf_folder, tmp_path / "out", Method.rtn)
    on_load = accessory.load_model(
        str(hf_folder), quantization=QuantizationConfig(method=QuantMethod.rtn, group_size=32)
    )
    ids = torch.arange(3, 35).view(2, 16)
    assert torch.equal(on_load(ids), logits(folder))


def test_blocks_that_are_tuned_together_give_a_whole_model_too(hf_folder, text, tmp_path):
    folder = quantized(
        hf_folder, tmp_path / "out", Method.autoround, text, autoround=AutoRoundConfig(iters=2, nblocks=2)
    )
    assert len(block_linears(accessory.load_model(str(folder)))) == 14


def test_more_tuning_brings_the_blocks_output_nearer(hf_folder, text, tmp_path):
    errors = []
    for iters in (1, 20):
        out = tmp_path / str(iters)
        folder = quantized(hf_folder, out, Method.autoround, text, bits=2, autoround=AutoRoundConfig(iters=iters))
        errors.append((logits(folder) - logits(hf_folder)).norm().item())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("method", [Method.gptq, Method.rtn, Method.autoround], ids=lambda method: method.value)
def test_an_output_layer_of_its_own_can_be_quantized_too(meta_folder, text, tmp_path, method):
    folder = quantized(meta_folder, tmp_path / "out", method, text, quant_lm_head=True)
    model = accessory.load_model(str(folder))
    assert model.lm_head.backend.bits == 4
    expected = logits(meta_folder)
    assert (logits(folder) - expected).norm() < 0.4 * expected.norm()


def test_several_formats_hold_one_model(hf_folder, text, tmp_path):
    folder = quantized(hf_folder, tmp_path / "out", Method.gptq, text, format="auto_round,auto_gptq,auto_awq")
    found = [logits(folder / name) for name in ("auto_round", "auto_gptq", "auto_awq")]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_linears_left_in_16_bit_are_the_bases(hf_folder, text, tmp_path):
    rule = {"model.layers.0.mlp.down_proj": {"bits": 16}, "layers.1.*v_proj": {"bits": 8}}
    folder = quantized(hf_folder, tmp_path / "out", Method.gptq, text, layer_config=json.dumps(rule))
    layers = block_linears(accessory.load_model(str(folder)))
    kept = layers["model.layers.0.mlp.down_proj"]
    base = load_file(hf_folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(kept.dequantize(torch.float32), base)
    assert layers["model.layers.1.self_attn.v_proj"].backend.bits == 8


@pytest.mark.parametrize("method", [Method.autoround, Method.awq], ids=lambda method: method.value)
def test_a_whole_block_may_stay_in_16_bit(hf_folder, text, tmp_path, method):
    folder = quantized(hf_folder, tmp_path / "out", method, text, layer_config={"layers.1.": {"bits": 16}})
    layers = block_linears(accessory.load_model(str(folder)))
    packed = {name for name, layer in layers.items() if isinstance(layer.backend, Int4)}
    assert len(packed) == 7 and all("layers.0." in name for name in packed)


def test_what_is_left_unquantized_of_a_base_in_fp16_stays_in_it(hf_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(hf_folder, base)
    tensors = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    folder = quantized(base, tmp_path / "out", Method.rtn, precision=None)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    kept = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert kept.dtype == torch.float16 and torch.equal(kept, tensors["model.embed_tokens.weight"])


def test_a_finished_job_that_is_repeated_is_left_as_it_is_and_one_of_other_settings_refused(
    hf_folder, tmp_path, capsys
):
    folder = quantized(hf_folder, tmp_path / "out", Method.rtn)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert quantize_base(settings(hf_folder, folder, Method.rtn), repeated=True) == folder
    assert capsys.readouterr().out.splitlines()[-1] == f"{folder}: finished before"
    with pytest.raises(UserError, match="holds model already"):
        quantize_base(settings(hf_folder, folder, Method.rtn, sym=True), repeated=True)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_another_fine_tuning_of_a_base_is_another_base(hf_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(hf_folder, base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 1e-3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    plans = [make_plan(settings(folder, tmp_path / "out", Method.rtn)) for folder in (hf_folder, base)]
    assert plans[0].sources.base["fingerprint"] == plans[1].sources.base["fingerprint"]
    assert plans[0].settings["weights"] != plans[1].settings["weights"]


def test_options_that_do_nothing_are_named(hf_folder, text, tmp_path, capsys):
    quantized(hf_folder, tmp_path / "out", Method.int8, text)
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("not used"))
    assert told.split(maxsplit=2)[2] == (
        "autoround.iters, group_size, sym, calib.dataset: method=int8 has no use for it"
    )


def test_a_text_is_measured_before_and_after(hf_folder, text, tmp_path, capsys):
    options = EvaluationConfig(text=str(text), name="wrap", seqlen=32)
    folder = quantized(hf_folder, tmp_path / "out", Method.rtn, eval=options)
    stated = json.loads((folder / "quantization.json").read_text())["perplexity"]["wrap"]
    printed = capsys.readouterr().out
    assert f"EVAL: ppl on wrap is {stated['pretrain']:.4f} (pretrain)" in printed
    assert f"EVAL: ppl on wrap is {stated['fake_quant']:.4f} (fake_quant)" in printed


# --- multimodal ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """llmc's samples.json with an image each."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    items = []
    for i, item in enumerate(alpaca_items(16)):
        Image.new("RGB", (40, 30), (16 * i, 255 - 16 * i, 90)).save(folder / f"{i}.png")
        items.append({"image": f"{i}.png", "question": item["instruction"], "answer": item["output"]})
    (folder / "samples.json").write_text(json.dumps(items))
    return folder


@pytest.mark.parametrize("vision", [False, True], ids=["language", "vision and language"])
@pytest.mark.parametrize("method", CALIBRATED, ids=lambda method: method.value)
def test_a_multimodal_model_is_calibrated_on_images_and_text(qformer_folder, pictures, tmp_path, method, vision):
    folder = quantized(
        qformer_folder, tmp_path / "out", method, pictures, vision=vision, group_size=-1 if vision else 32
    )
    model, base = accessory.load_model(str(folder)), accessory.load_model(str(qformer_folder))
    ids = torch.arange(3, 35).view(2, 16)
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    expected = base(ids, images=images)
    assert (model(ids, images=images) - expected).norm() < 0.6 * expected.norm()
    packed = [name for name, module in model.named_modules() if isinstance(getattr(module, "backend", None), Int4)]
    in_vision = [name for name in packed if name.startswith("qformer")]
    linears = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.startswith("qformer")]
    assert len(packed) - len(in_vision) == 14
    assert sorted(in_vision) == (sorted(linears) if vision else [])


@pytest.mark.parametrize("method", [Method.rtn, Method.int8], ids=lambda method: method.value)
def test_the_image_part_is_rounded_without_data_too(qformer_folder, tmp_path, method):
    folder = quantized(qformer_folder, tmp_path / "out", method, vision=True, group_size=-1, sym=method is Method.int8)
    packed = [n for n, m in accessory.load_model(str(folder)).named_modules() if hasattr(m, "backend")]
    base = accessory.load_model(str(qformer_folder))
    linears = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.startswith("qformer")]
    assert sorted(n for n in packed if n.startswith("qformer")) == sorted(linears)


@pytest.mark.parametrize(("sym", "of_images"), [(True, False), (False, True)])
def test_parts_of_which_one_is_symmetric_are_read_as_they_were_rounded(qformer_folder, tmp_path, sym, of_images):
    """Files have one layout for all: that of the asymmetric."""
    exceptions = json.dumps({"^qformer": {"sym": of_images}})
    folder = quantized(
        qformer_folder, tmp_path / "out", Method.rtn, vision=True, group_size=-1, sym=sym, layer_config=exceptions
    )
    model, base = accessory.load_model(str(folder)), accessory.load_model(str(qformer_folder))
    for name in ("model.layers.0.mlp.up_proj", "qformer.vision_model.encoder.layers.0.mlp.fc1"):
        weight = linear_weight(base.get_submodule(name), torch.float32)
        scheme = Scheme(4, -1, of_images if name.startswith("qformer") else sym)
        expected = rtn.quantize(weight, scheme).dequantize(torch.float32)
        assert torch.equal(model.get_submodule(name).dequantize(torch.float32), expected)


def test_vision_needs_images_to_be_calibrated_on(qformer_folder, text, tmp_path):
    with pytest.raises(UserError, match=r"vision=true: .* holds no image"):
        quantized(qformer_folder, tmp_path / "out", Method.gptq, text, vision=True, group_size=-1)


# --- interruptions ---------------------------------------------------------------------------------------------------


def command(base: Path, out: Path, text: Path, *more: str) -> list[str]:
    """`settings` on the command line."""
    return [
        sys.executable, str(ROOT / "scripts" / "quantize.py"), "--pretrained_path", str(base), "--output_dir", str(out),
        "--dataset", str(text), "--nsamples", str(NSAMPLES), "--seqlen", str(SEQLEN), "--batch_size", "4", "--asym",
        "--group_size", "32", "--precision", "tf32", "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(("method", "iters"), [(Method.gptq, 2), (Method.autoround, 40)], ids=["gptq", "autoround"])
def test_killed_in_the_middle_and_started_again_it_writes_the_same_files(
    hf_folder, text, tmp_path, capsys, method, iters
):
    tuning = AutoRoundConfig(iters=iters)
    whole = quantized(hf_folder, tmp_path / "whole", method, text, autoround=tuning)

    killed, work = tmp_path / "killed", tmp_path / ".killed.work"
    words = command(hf_folder, killed, text, "--method", method.value, "--iters", str(iters))
    process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (work / "block-0000.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not killed.exists()
    finished = len(list(work.glob("block-*.safetensors")))
    assert finished >= 1

    quantized(hf_folder, killed, method, text, autoround=tuning)
    assert f"after {finished} finished blocks" in capsys.readouterr().out
    assert digest(killed) == digest(whole)
    assert not work.exists()


def test_interrupted_work_is_not_continued_with_other_settings(hf_folder, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(gptq, "quantize", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantized(hf_folder, out, Method.gptq, text)
    assert not out.exists()
    with pytest.raises(
        UserError, match=r"\.out\.work: an interrupted .* with gptq.percdamp=0\.01, now gptq.percdamp=0\.1"
    ):
        quantized(hf_folder, out, Method.gptq, text, gptq=GptqConfig(percdamp=0.1))


def test_work_on_another_architecture_is_other_work(meta_folder, tmp_path):
    """Two LLaMAs of the same weights that compute differently."""
    params = json.loads((meta_folder / "params.json").read_text())
    plans = []
    for eps in (1e-5, 1e-2):
        (tmp_path / "params.json").write_text(json.dumps(params | {"norm_eps": eps}))
        config = settings(meta_folder, tmp_path / "out", Method.rtn)
        config.model.llama_config = [str(tmp_path / "params.json")]
        plans.append(make_plan(config).settings)
    assert plans[0] != plans[1]


def test_a_damaged_block_is_done_again(hf_folder, text, tmp_path, monkeypatch):
    whole = quantized(hf_folder, tmp_path / "whole", Method.gptq, text)
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_folder", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantized(hf_folder, tmp_path / "out", Method.gptq, text)
    block = tmp_path / ".out.work" / "block-0001.safetensors"
    block.write_bytes(block.read_bytes()[:-50])
    assert digest(quantized(hf_folder, tmp_path / "out", Method.gptq, text)) == digest(whole)


def test_a_second_job_on_one_output_is_refused(hf_folder, tmp_path):
    plan = make_plan(settings(hf_folder, tmp_path / "out", Method.rtn))
    with Work(tmp_path / "out", plan.settings).locked(), pytest.raises(UserError, match="another job is at work"):
        quantized(hf_folder, tmp_path / "out", Method.rtn)
    quantized(hf_folder, tmp_path / "out", Method.rtn)


def test_a_result_that_reads_back_otherwise_is_not_kept(hf_folder, tmp_path, monkeypatch):
    from accessory.quantization.job import flow

    with monkeypatch.context() as patch:
        replay = flow.Flow.replay
        patch.setattr(flow.Flow, "replay", lambda self, model: replay(self, model) + 1e-3)
        with pytest.raises(RuntimeError, match="differ by up to"):
            quantized(hf_folder, tmp_path / "out", Method.rtn)
    assert not (tmp_path / "out").exists()


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": Method.gptq}, "method=gptq needs text of the kind"),
        ({"method": Method.autoround, "autoround": AutoRoundConfig(iters=0)}, "--iters 0: must be at least 1"),
        ({"save_trans": "x"}, "only awq changes the floating-point model"),
        ({"calib": CalibrationConfig(nsamples=0)}, "--nsamples 0"),
        ({"seed": -1}, "--seed -1"),
        ({"eval": EvaluationConfig(seqlen=1)}, "eval.seqlen=1: must be at least 2"),
        ({"eval": EvaluationConfig(batch_size=0)}, "eval.batch_size=0"),
        ({"autoround": AutoRoundConfig(lr=float("nan"))}, "--lr nan: must be a number above 0"),
        ({"gptq": GptqConfig(percdamp=float("inf"))}, "gptq.percdamp=inf"),
        (
            {"method": Method.gptq, "gptq": GptqConfig(static_groups=False), "format": "auto_awq"},
            "only auto_gptq holds g_idx",
        ),
        ({"method": Method.gptq, "gptq": GptqConfig(static_groups=False)}, "only auto_gptq holds g_idx"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_read(tmp_path, changes, message):
    method = changes.pop("method", Method.rtn)
    with pytest.raises(UserError, match=message):
        quantized(tmp_path / "no such base", tmp_path / "out", method, **changes)


@pytest.mark.parametrize("inner", ["", "/below"])
def test_the_adjusted_model_has_a_folder_of_its_own(hf_folder, text, tmp_path, inner):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="lie in each other"):
        quantized(hf_folder, out, Method.awq, text, save_trans=f"{out}{inner}")


def test_a_base_that_lacks_a_weight_is_refused_before_any_work(hf_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(hf_folder, base)
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, the first is model.layers.1.mlp.up_proj.weight"):
        quantized(base, tmp_path / "out", Method.rtn)
    assert not (tmp_path / ".out.work").exists()


@pytest.mark.parametrize("method", [*CALIBRATED, Method.rtn, Method.int8], ids=lambda method: method.value)
@pytest.mark.parametrize(
    ("name", "value", "finished"),
    [("model.layers.1.mlp.up_proj.weight", float("nan"), 1), ("model.norm.weight", float("inf"), 0)],
)
def test_a_weight_that_is_no_number_is_named_before_its_block_is_quantized(
    hf_folder, text, tmp_path, method, name, value, finished
):
    base = tmp_path / "base"
    shutil.copytree(hf_folder, base)
    weights = load_file(base / "model.safetensors")
    weights[name].view(-1)[7] = value
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{base}: {name} holds NaN or infinity"):
        quantized(base, tmp_path / "out", method, text)
    assert len(list((tmp_path / ".out.work").glob("block-*"))) == finished


def test_a_text_without_a_whole_window_is_refused_before_any_work(hf_folder, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(UserError, match=r"short.txt: \d+ tokens, fewer than one window of eval.seqlen=512"):
        quantized(hf_folder, tmp_path / "out", Method.rtn, eval=EvaluationConfig(text=str(short)))


def test_an_output_that_cannot_be_made_is_one_line(hf_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_dir.*cannot be written"):
        quantized(hf_folder, tmp_path / "file" / "out", Method.rtn)


def test_a_format_that_cannot_hold_the_model_is_refused_before_any_work(hf_folder, text, tmp_path):
    rule = json.dumps({"down_proj": {"group_size": -1}})
    with pytest.raises(UserError, match="format=auto_awq"):
        quantized(hf_folder, tmp_path / "out", Method.gptq, text, format="auto_round,auto_awq", layer_config=rule)
    assert not (tmp_path / ".out.work").exists()


def test_a_quantized_base_is_not_quantized_again(hf_folder, tmp_path):
    folder = quantized(hf_folder, tmp_path / "one", Method.rtn)
    with pytest.raises(UserError, match="is quantized already; name the 16-bit base"):
        quantized(folder, tmp_path / "two", Method.rtn)


def test_rows_longer_than_the_model_has_positions_are_refused(hf_folder, text, tmp_path):
    calib = CalibrationConfig(dataset=str(text), nsamples=1, seqlen=512, batch_size=1)
    with pytest.raises(UserError, match="--seqlen 512: this model has 256 positions"):
        quantized(hf_folder, tmp_path / "out", Method.gptq, calib=calib)


def test_a_folder_that_holds_something_is_not_overwritten(hf_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="holds something already"):
        quantized(hf_folder, tmp_path, Method.rtn)


def test_stored_zero_points_and_scales_are_what_rtn_says(hf_folder, tmp_path):
    folder = quantized(hf_folder, tmp_path / "out", Method.rtn)
    name = "model.layers.1.self_attn.o_proj"
    weight = load_file(hf_folder / "model.safetensors")[f"{name}.weight"]
    layer = block_linears(accessory.load_model(str(folder)))[name]
    expected = rtn.quantize(weight, Scheme(4, 32, False))
    assert torch.equal(layer.backend.unpack(layer.payload).codes, expected.codes)
    assert torch.equal(layer.scales, expected.scales)
