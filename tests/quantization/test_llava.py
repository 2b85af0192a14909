"""A tiny LLaVA (CLIP and LLaMA, random weights) through auto-round and back, as its users have it: Hugging Face folders
and transformers to read the result. The reference unpacks the files with shifts and masks of its own, and runs in
fp32."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCAB, corpus
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.config import ModelConfig
from accessory.errors import UserError
from accessory.quantization.llava import is_llava_type, quantize_llava
from accessory.quantize_options import AutoRoundConfig, CalibrationConfig, Method, QuantizeConfig

IMAGE_ID, IMAGE_WORDS = 3, 4  # of 28 x 28 pixels, in patches of 14
QUANTIZED = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


@pytest.fixture(autouse=True)
def _usual_dtype():
    """auto-round's loader leaves the model's behind."""
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A LLaVA folder as transformers writes it, fp16."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("llava")
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet)
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, extra_special_tokens={"image_token": "<image>"}, **names
    )
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_ID)
    )
    model.half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """text.txt, and conversation.json in LLaVA's format with its images in a folder."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("\n".join(corpus()))
    (folder / "images").mkdir()
    rng, items = np.random.default_rng(0), []
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        turns = [("human", "<image>\nWhat does it do?"), ("gpt", "It wraps long lines and keeps whitespace.")]
        items.append({"image": f"{i}.png", "conversations": [{"from": who, "value": text} for who, text in turns]})
    (folder / "conversation.json").write_text(json.dumps(items))
    return folder


def config(folder: Path, target: Path, dataset: Path | None = None, **stated) -> QuantizeConfig:
    calib = CalibrationConfig(dataset=str(dataset) if dataset else None, nsamples=4, seqlen=24, batch_size=2)
    base = {"calib": calib, "autoround": AutoRoundConfig(iters=2), "device": "cpu", "group_size": 32}
    return QuantizeConfig(model=ModelConfig(pretrained_path=[str(folder)]), output_dir=str(target), **(base | stated))


@pytest.fixture(scope="module")
def results(folder, data, tmp_path_factory) -> dict[str, Path]:
    """Three quantized folders, made side by side: each takes a process of its own that mostly imports.

    text: calibrated on text, in two formats; images: on images and text, asymmetric, vision blocks and output layer
    too; rtn: rounded to nearest.
    """
    target = tmp_path_factory.mktemp("results")
    rules = {r"layers\.1\..*down_proj": {"bits": 8}, r"layers\.1\..*k_proj": {"bits": 16}}
    shown = CalibrationConfig(
        str(data / "conversation.json"), nsamples=4, seqlen=24, batch_size=2, image_root=str(data / "images")
    )
    tuning = AutoRoundConfig(iters=2, lr=0.01, minmax_lr=0.02, nblocks=2, adam=True, enable_quanted_input=False)
    settings = {
        "text": {"dataset": data / "text.txt", "format": "auto_round,auto_gptq", "layer_config": rules},
        "images": {"calib": shown, "autoround": tuning, "sym": False, "vision": True, "quant_lm_head": True},
        "rtn": {"method": Method.rtn, "vision": True},
    }
    with ThreadPoolExecutor() as pool:
        jobs = {name: pool.submit(quantize_llava, config(folder, target / name, **s)) for name, s in settings.items()}
        return {name: job.result() for name, job in jobs.items()}


# --- an independent reader --------------------------------------------------------------------------------------------


def codes_of(words: np.ndarray, bits: int) -> np.ndarray:
    """Along the first axis, lowest bits first: int32 [n, m] -> [n * 32 / bits, m]."""
    shifts = np.arange(0, 32, bits)[None, :, None]
    return ((words.view(np.uint32)[:, None] >> shifts.astype(np.uint32)) & (2**bits - 1)).reshape(-1, words.shape[1])


def unpacked(folder: Path, bits_of=lambda name: 4) -> dict[str, Tensor]:
    """The folder's weights in fp32, under the names of transformers' modules."""
    tensors = load_file(folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    offset = 0 if settings.get("packing_format") == "auto_round:gptqmodel" else 1
    weights = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            bits = bits_of(path)
            codes = codes_of(tensor.numpy(), bits).astype(np.int64)  # [in, out]
            zeros = codes_of(tensors[f"{path}.qzeros"].numpy().T.copy(), bits).T.astype(np.int64) + offset
            group = np.arange(len(codes)) // (len(codes) // len(zeros))
            weight = (codes - zeros[group]) * tensors[f"{path}.scales"].double().numpy()[group]
            weights[f"{path}.weight"] = torch.from_numpy(weight.T.copy()).float()
        elif leaf not in ("qzeros", "scales", "g_idx"):
            weights[name] = tensor.float()
    return weights


def inputs_with_image() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB, (1, 20), generator=g)
    ids[0, 1 : 1 + IMAGE_WORDS] = IMAGE_ID
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=g)}


@torch.no_grad()
def reference_logits(folder: Path, weights: dict[str, Tensor]) -> Tensor:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(folder)).float().eval()
    model.load_state_dict(weights)
    return model(**inputs_with_image()).logits


READ = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoRoundConfig
settings = AutoRoundConfig(backend="torch")
inputs = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=settings, device_map="cpu")
    assert AutoProcessor.from_pretrained(folder).image_token == "<image>"
    with torch.no_grad():
        logits = model(inputs["input_ids"], pixel_values=inputs["pixel_values"].to(model.dtype)).logits
    torch.save(logits.float(), folder + "/logits.pt")
"""


@pytest.fixture(scope="module")
def read_by_transformers(results, tmp_path_factory) -> list[Path]:
    """The folders, with logits.pt in each. In a process of its own: auto-round patches transformers."""
    file = tmp_path_factory.mktemp("inputs") / "inputs.pt"
    torch.save(inputs_with_image(), file)
    folders = [results["text"] / "auto_round", results["text"] / "auto_gptq", results["images"]]
    subprocess.run([sys.executable, "-c", READ, file, *folders], check=True, env=os.environ | {"AR_LOG_LEVEL": "ERROR"})
    return folders


def eight_bits(name: str) -> int:
    return 8 if name.endswith("layers.1.mlp.down_proj") else 4


# --- facts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "bits_of"), [(0, eight_bits), (1, eight_bits), (2, lambda name: 4)])
def test_transformers_reads_the_model_that_the_files_hold(folder, read_by_transformers, number, bits_of):
    read = read_by_transformers[number]
    expected, found = reference_logits(folder, unpacked(read, bits_of)), torch.load(read / "logits.pt")
    assert (found - expected).abs().max() < 0.02 * expected.std()  # it computes in fp16


def test_quantized_logits_stay_near_those_of_the_source(folder, results):
    source = reference_logits(folder, source_weights(folder))
    found = reference_logits(folder, unpacked(results["text"] / "auto_round", eight_bits))
    assert 0.01 < ((found - source).std() / source.std()) < 0.5


def source_weights(folder: Path) -> dict[str, Tensor]:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_all_but_the_language_models_linears_keep_every_bit(folder, results):
    from transformers import LlavaForConditionalGeneration

    source = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto").state_dict()
    found = load_file(results["text"] / "auto_round" / "model.safetensors")
    quantized = {name.removesuffix(".qweight") for name in found if name.endswith(".qweight")}
    assert len(quantized) == 2 * len(QUANTIZED) - 1
    assert all(name.startswith("model.language_model.layers.") for name in quantized)
    kept = {name: tensor for name, tensor in source.items() if name.removesuffix(".weight") not in quantized}
    assert "model.language_model.layers.1.self_attn.k_proj.weight" in kept
    assert any("vision_tower" in name for name in kept)
    for name, tensor in kept.items():
        assert found[name].dtype is torch.float16 and torch.equal(found[name], tensor), name


def test_vision_blocks_and_output_layer_are_quantized_when_asked(results):
    quantized = [name for name in load_file(results["images"] / "model.safetensors") if name.endswith(".qweight")]
    assert "lm_head.qweight" in quantized
    assert sum("vision_tower.encoder.layers" in name for name in quantized) == 2 * 6
    assert sum("language_model.layers" in name for name in quantized) == 2 * len(QUANTIZED)
    assert len(quantized) == 1 + 2 * 6 + 2 * len(QUANTIZED)


def test_manifest_names_scheme_source_and_calibration(results, folder, data):
    text = json.loads((results["text"] / "auto_round" / "quantization.json").read_text())
    images = json.loads((results["images"] / "quantization.json").read_text())
    assert text["scheme"] == {"bits": 4, "group_size": 32, "sym": True} and not images["scheme"]["sym"]
    assert text["exceptions"] == {
        "model.language_model.layers.1.mlp.down_proj": {"bits": 8, "group_size": 32, "sym": True}
    }
    assert text["unquantized"] == ["model.language_model.layers.1.self_attn.k_proj"]
    assert text["source"] == str(folder) and text["source_fingerprint"] == images["source_fingerprint"]
    assert text["calibration"]["images"] == 0 and images["calibration"]["images"] >= 4
    assert text["calibration"]["dataset"] == str(data / "text.txt") and text["calibration"]["seqlen"] == 24
    assert text["options"]["iters"] == 2 and images["options"]["nblocks"] == 2
    for measured in (text["perplexity"]["calibration"], images["perplexity"]["calibration"]):
        assert 1 < measured["fake_quant"] < 2 * measured["pretrain"]


def test_rounding_to_nearest_needs_no_data(folder, results):
    weights, source = unpacked(results["rtn"]), source_weights(folder)
    assert json.loads((results["rtn"] / "quantization.json").read_text())["calibration"] is None
    for name in (
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "model.language_model.layers.1.mlp.up_proj.weight",
    ):
        groups, error = source[name].view(-1, 32), (weights[name] - source[name]).view(-1, 32)
        step = (groups.amax(-1) - groups.amin(-1)) / 15
        assert (error.abs().amax(-1) <= 1.01 * step).all()  # half of it is the rounded zero point's
        assert (error.square().mean(-1).sqrt() <= 0.4 * step).all()


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ({"model_type": "llava"}, True),
        ({"model_type": "llava_next"}, True),
        ({"model_type": "llava_llama"}, True),
        ({"model_type": "qwen2_vl", "vision_config": {}}, True),
        ({"model_type": "blip-2", "vision_config": {}, "text_config": {}}, False),
        ({"model_type": "llama"}, False),
        ({"dim": 64}, False),
    ],
)
def test_kinds_of_folders(tmp_path, content, answer):
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert is_llava_type(tmp_path) is answer


def test_a_folder_without_config_is_not_of_this_kind(meta_folder):
    assert not is_llava_type(meta_folder)


def refusal(setting: QuantizeConfig) -> str:
    with pytest.raises(UserError) as caught:
        quantize_llava(setting)
    assert "\n" not in str(caught.value)
    assert not Path(setting.output_dir).exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("stated", "line"),
    [
        ({"method": Method.awq}, "--method awq: multimodal models besides ours"),
        ({"method": Method.gptq}, "--method gptq"),
        ({"group_size": 48}, "group_size=48 does not divide the 64 inputs of model.language_model.layers.0.self_attn"),
        ({"format": "auto_awq"}, "--format auto_awq"),
        ({"format": "auto_gptq", "sym": False}, "--format auto_gptq: auto-round reads symmetric weights only"),
        ({"layer_config": {"no_proj": {"bits": 8}}}, "'no_proj' matches no linear"),
        ({"layer_config": {"0.mlp.up_proj": {"sym": False}}}, "symmetric and asymmetric"),
        ({"vision": True}, "4 of 4 rows hold no image"),
        ({"save_trans": "trans"}, "save_trans=trans"),
        ({"calib": CalibrationConfig(nsamples=4)}, "--dataset"),
        ({"calib": CalibrationConfig("absent.json", nsamples=4, batch_size=2)}, "no such file"),
    ],
)
def test_what_cannot_be_done_gives_one_line(folder, data, tmp_path, stated, line):
    assert line in refusal(config(folder, tmp_path / "out", data / "text.txt", **stated))


def test_samples_that_are_too_short_or_rows_too_long_give_one_line(folder, data, tmp_path):
    setting = config(folder, tmp_path / "out", data / "text.txt")
    setting.calib.concat = False
    setting.calib.seqlen = 60
    assert "samples of at least 60 tokens" in refusal(setting)
    setting.calib.seqlen = 65
    assert "this model has 64 positions" in refusal(setting)


def test_images_are_refused_where_rows_cannot_be_made_of_them(folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr("accessory.quantization.llava.rows._image_input", lambda *_: "images come with image_sizes")
    setting = config(folder, tmp_path / "out", data / "conversation.json")
    assert "images come with image_sizes: calibrate this model on text" in refusal(setting)


def test_text_that_holds_the_image_token_is_refused(folder, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(line + " <image> " for line in corpus()))
    assert "holds the token that marks an image" in refusal(config(folder, tmp_path / "out", tmp_path / "text.txt"))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "llava_llama"}, "does not read model_type=llava_llama"),
        ({"quantization_config": {"bits": 4}}, "is quantized already"),
    ],
)
def test_folders_that_cannot_be_used_give_one_line(folder, data, tmp_path, change, line):
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in folder.iterdir():
        (changed / file.name).symlink_to(file)
    (changed / "config.json").unlink()
    (changed / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
    assert line in refusal(config(changed, tmp_path / "out", data / "text.txt"))


def test_a_weight_that_is_no_number_is_named(folder, tmp_path):
    broken, name = tmp_path / "broken", "model.language_model.layers.1.mlp.up_proj.weight"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    (stored,) = [key for key in weights if key.endswith("layers.1.mlp.up_proj.weight") and "vision" not in key]
    weights[stored][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert f"{broken}: {name} holds NaN" in refusal(config(broken, tmp_path / "out", method=Method.rtn))


def test_an_output_folder_that_holds_something_is_left_alone(folder, data, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something already"):
        quantize_llava(config(folder, tmp_path, data / "text.txt"))
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("has_bf16, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_without_bf16_is_tuned_on_in_fp32_as_auto_round_does(
    monkeypatch, folder, data, tmp_path, has_bf16, dtype
):
    from auto_round.utils.device_manager import get_ar_device

    from accessory.quantization.llava.worker import _compute_dtype

    device = torch.device("cpu")
    monkeypatch.setattr(type(get_ar_device(device)), "supports_bf16", lambda self: has_bf16)
    chosen = config(folder, tmp_path / "out", dataset=data / "text.txt")
    assert _compute_dtype(chosen, torch.float16, device) is dtype
