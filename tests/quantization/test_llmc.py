"""llmc-tpu's YAML to our configuration: its documentation's own file, the shipped ones, its rules, every mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from accessory.config import LlamaType, ModelConfig, Precision
from accessory.errors import UserError
from accessory.quantization.llmc import read_llmc
from accessory.quantize_options import (
    AwqConfig,
    CalibrationConfig,
    EvalPosition,
    EvaluationConfig,
    GptqConfig,
    Method,
    QuantizeConfig,
    TransVersion,
)
from accessory.shipped import CONFIG_DIR

# docs of llmc-tpu, "Configuration File Parameter Description", to the letter but for the paths
DOCUMENTED = """
    base:
        seed: &seed 42
    model:
        type: Qwen2VL # Set the model name. For specific supported models, refer to the llmc/models directory.
        path: /workspace/Qwen2-VL-2B-Instruct    # Set the model weights path, please change to your desired model
        torch_dtype: auto
    calib:
        name: mme   # Set to the actual calibration dataset name, such as mme, pileval, etc.
        download: False
        path: {data}/VLM/cali/MME  # Set the calibration dataset path
        n_samples: 128
        bs: 1
        seq_len: 512
        preproc: pileval_awq
        seed: *seed
    eval:
        eval_pos: [pretrain, fake_quant]
        name: mme  # Set to the actual eval dataset name, such as mme, wikitext2, etc.
        download: False
        path: {data}/VLM/eval/MME # Set the eval dataset path
        bs: 1
        seq_len: 2048
    quant:
        method: Awq
        quant_objects: [language] # By default, only quantize the LLM part. If you want to quantize the VIT part, set it to [vision, language].
        weight:
            bit: 4 # Set to the desired quantization bit, supports 4 or 8
            symmetric: False # Set to False for 4-bit and True for 8-bit
            granularity: per_group # Set to per_group for 4-bit and per_channel for 8-bit.
            group_size: 64 # Set to 64 for 4-bit (corresponding to TPU-MLIR); set to -1 for 8-bit.
        special:
            trans: True
            trans_version: v2
            weight_clip: True
            clip_sym: True
    save:
        save_trans: True       # When set to True, you can save the adjusted floating-point weights.
        save_path: ./save_path # Set the path to save the weights
    run:
        task_name: awq_w_only
        task_type: VLM   # Set to VLM or LLM
"""  # noqa: E501


WEIGHT = {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 64}


NO_LLAMA = "only LLaMA-type models are quantized here, and BLIP-2's Q-Former in front of one (Llama)"


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """The working directory, with calibration and evaluation data below `data`."""
    for folder in ("VLM/cali/MME", "VLM/eval/MME"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / "samples.json").write_text("[]")
    (tmp_path / "data/text.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def smallest(data: Path) -> dict[str, Any]:
    return {
        "model": {"type": "Llama", "path": "llama2-7b"},
        "calib": {"path": str(data / "text.txt")},
        "quant": {"method": "Awq", "weight": WEIGHT.copy()},
        "save": {"save_path": "saved"},
        "run": {"task_type": "LLM"},
    }


def read(content: dict[str, Any] | str) -> QuantizeConfig:
    file = Path("llmc.yml")
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return read_llmc(str(file))


def changed(content: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """content with section__key=value set; None takes it out."""
    for key, value in settings.items():
        *groups, name = key.split("__")
        at = content
        for group in groups:
            at = at.setdefault(group, {})
        at.pop(name, None)
        if value is not None:
            at[name] = value
    return content


def refused(content: dict[str, Any] | str) -> str:
    with pytest.raises(UserError) as error:
        read(content)
    return str(error.value)


# --- whole files -----------------------------------------------------------------------------------------------------


def test_the_documented_file_is_read_key_by_key_for_a_llama(data):
    config = read(DOCUMENTED.format(data=data).replace("Qwen2VL", "Llama"))
    assert config == QuantizeConfig(
        model=ModelConfig(
            pretrained_path=["/workspace/Qwen2-VL-2B-Instruct"], llama_type=LlamaType.llama_qformerv2_peft
        ),
        output_dir="save_path/quantized_model",
        method=Method.awq,
        bits=4,
        group_size=64,
        sym=False,
        vision=False,
        calib=CalibrationConfig(
            dataset=str(data / "VLM/cali/MME"),
            nsamples=128,
            seqlen=512,
            batch_size=1,
            skip_long=True,
            allow_fewer=True,
            add_answer=True,
        ),
        awq=AwqConfig(trans=True, trans_version=TransVersion.v2, weight_clip=True, clip_sym=True),
        precision=None,
        seed=42,
        save_trans="save_path/transformed_model",
        eval=EvaluationConfig(
            text=str(data / "VLM/eval/MME/samples.json"),
            name="mme",
            eval_pos=[EvalPosition.pretrain, EvalPosition.fake_quant],
            seqlen=2048,
            batch_size=1,
        ),
    )


def test_the_documented_file_as_it_is_is_refused_for_its_model_alone(data):
    assert refused(DOCUMENTED.format(data=data)) == f"llmc.yml: model.type: Qwen2VL: {NO_LLAMA}"


SHIPPED = sorted((CONFIG_DIR / "llmc").rglob("*.yml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_shipped_file_is_read(file, data):
    text = file.read_text().replace("/path/to/calibration.txt", str(data / "text.txt"))
    text = text.replace("/path/to/test.txt", str(data / "text.txt"))
    config = read(re.sub(r"/path/to/calibration\b", str(data / "VLM/cali/MME"), text))
    assert config.method.value == file.stem.lower()
    assert (config.bits, config.group_size, config.sym) == (4, 64, False)
    assert (config.model.llama_type is LlamaType.llama_qformerv2_peft) == (file.parent.name == "VLM")


def test_a_configuration_from_llmc_takes_overrides_as_any_other(data):
    node = OmegaConf.structured(read(smallest(data)))
    OmegaConf.update(node, "calib.nsamples", 16)
    assert OmegaConf.to_object(node).calib.nsamples == 16


def test_llmcs_defaults_fill_what_a_short_file_leaves_out(data):
    config = read(smallest(data))
    assert (config.calib.nsamples, config.calib.seqlen, config.calib.batch_size, config.seed) == (128, 512, 1, 42)
    assert (config.calib.concat, config.calib.skip_long, config.calib.add_answer) == (True, False, False)
    assert config.save_trans is None and config.model.llama_type is None and config.eval == EvaluationConfig()


# --- single settings -------------------------------------------------------------------------------------------------


def test_gptq_takes_its_own_settings(data):
    special = {"actorder": True, "static_groups": True, "percdamp": 0.05, "blocksize": 64, "true_sequential": False}
    content = changed(smallest(data), quant__method="GPTQ", quant__special=special, quant__quant_out=True)
    config = read(content)
    assert config.method is Method.gptq and config.gptq == GptqConfig(0.05, 64, True, True, False)
    assert config.calib.seqlen == 2048


def test_rtn_with_8_bits_needs_no_calibration(data):
    weight = {"bit": 8, "symmetric": True, "granularity": "per_channel", "group_size": -1}
    config = read(changed(smallest(data), quant__method="RTN", quant__weight=weight, calib=None))
    assert (config.method, config.bits, config.group_size, config.sym) == (Method.rtn, 8, -1, True)
    assert config.calib.dataset is None


WEIGHTS = [
    ({"bit": 4}, (4, 64, False)),
    ({"bit": 4, "granularity": "per_channel"}, (4, -1, False)),
    ({"bit": 4, "granularity": "per-channel", "group_size": -1}, (4, -1, False)),
    ({"bit": 4, "granularity": "per_group", "group_size": 128}, (4, 128, False)),
    ({"bit": 4, "calib_algo": "minmax"}, (4, 64, False)),
    ({"bit": 8}, (8, -1, True)),
]


@pytest.mark.parametrize(("weight", "expected"), WEIGHTS)
def test_weights_are_those_of_the_documented_table(weight, expected, data):
    config = read(changed(smallest(data), quant__weight=weight))
    assert (config.bits, config.group_size, config.sym) == expected


SETTINGS = [
    ("model__torch_dtype", "float16", lambda c: c.precision, Precision.fp16),
    ("model__torch_dtype", "bfloat16", lambda c: c.precision, Precision.bf16),
    ("model__torch_dtype", "float32", lambda c: c.precision, Precision.tf32),
    ("model__type", "Vicuna", lambda c: c.model.pretrained_path, ["llama2-7b"]),
    ("model__path", ["base", "projector"], lambda c: c.model.pretrained_path, ["base", "projector"]),
    ("base__seed", 7, lambda c: c.seed, 7),
    ("calib__seed", 9, lambda c: c.seed, 9),
    ("calib__bs", -1, lambda c: c.calib.batch_size, 128),
    ("calib__preproc", "c4_gptq", lambda c: c.calib.concat, False),
    ("calib__preproc", "wikitext2_gptq", lambda c: (c.calib.concat, c.calib.skip_long), (True, False)),
    ("calib__preproc", "ultrachat_general", lambda c: c.calib.apply_chat_template, True),
    ("calib__apply_chat_template", True, lambda c: c.calib.apply_chat_template, True),
    ("calib__add_answer", True, lambda c: c.calib.add_answer, True),
    ("calib__padding", True, lambda c: c.calib.seqlen, 512),
    ("quant__method", "AWQ", lambda c: c.method, Method.awq),
    ("quant__special__trans_version", "v1", lambda c: c.awq.trans_version, TransVersion.v1),
    ("quant__special__weight_clip", False, lambda c: c.awq.weight_clip, False),
    ("eval__eval_pos", [], lambda c: c.eval.eval_pos, []),
]


@pytest.mark.parametrize(("key", "value", "field", "expected"), SETTINGS, ids=[f"{s[0]}={s[1]}" for s in SETTINGS])
def test_a_setting_arrives(key, value, field, expected, data):
    assert field(read(changed(smallest(data), **{key: value}))) == expected


def test_vision_is_quantized_on_request_only(data):
    content = changed(smallest(data), run__task_type="VLM")
    assert not read(changed(content, quant__quant_objects=["language"])).vision
    assert read(changed(content, quant__quant_objects=["vision", "language"])).vision


def test_a_folder_for_evaluation_means_its_samples_json_or_only_text(data):
    folder = data / "eval"
    folder.mkdir()
    (folder / "test.txt").write_text("text")
    content = changed(smallest(data), eval__path=str(folder))
    assert read(content).eval.text == str(folder / "test.txt")
    (folder / "more.txt").write_text("text")
    assert refused(content).endswith("must be a text file, or a folder with samples.json or one .txt file")
    (folder / "samples.json").write_text("[]")
    assert read(content).eval.text == str(folder / "samples.json")


def test_interrupted_work_in_save_path_is_no_hindrance_but_results_are(data):
    (data.parent / "saved/.quantized_model.work").mkdir(parents=True)
    assert read(smallest(data)).output_dir == "saved/quantized_model"
    (data.parent / "saved/quantized_model").mkdir()
    assert refused(smallest(data)) == "llmc.yml: save.save_path: saved: exists already; name another, or remove it"


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "calib__n_sample=8": "calib.n_sample: unknown (did you mean n_samples?)",
    "quant__bit=4": "quant.bit: unknown (it belongs to quant.weight)",
    "calibration__name=a": "calibration: unknown (did you mean calib?)",
    "quant__special__actorder=True": "quant.special.actorder: is no setting of Awq",
    "quant__weight=4": "quant.weight: 4: expected settings below it; quant.weight.bit: not set",
    "quant__weight__bit=3": "quant.weight.bit: 3: must be 4 or 8",
    "quant__weight__symmetric=True": "quant.weight.symmetric: True: must be False with 4 bits",
    "quant__weight__group_size=-1": (
        "quant.weight.group_size: -1: must be the weights of a group, 64 for TPU-MLIR, with per_group"
    ),
    "quant__weight__granularity=per_channel": "quant.weight.group_size: 64: must be -1 with per_channel",
    "quant__weight__granularity=per_tensor": (
        "quant.weight.granularity: per_tensor: must be one of per_group, per_channel"
    ),
    "quant__weight__bit=8": (
        "quant.weight.symmetric: False: must be True with 8 bits; "
        "quant.weight.granularity: per_group: must be per_channel with 8 bits"
    ),
    "quant__weight__calib_algo=mse": "quant.weight.calib_algo: mse: ranges are those of the weights; set minmax",
    "quant__method=Awg": "quant.method: Awg: must be one of Awq, GPTQ, RTN (did you mean Awq?)",
    "quant__quant_out=False": (
        "quant.quant_out: False: a block is calibrated on what the quantized blocks before it give; set True"
    ),
    "quant__quant_objects=language": "quant.quant_objects: language: must be a list of language, vision",
    "quant__quant_objects=[vision]": (
        "quant.quant_objects: vision with task_type LLM; a model with images is a VLM; "
        "quant.quant_objects: must be [language] or [vision, language]"
    ),
    "calib__download=True": "calib.download: True: nothing is downloaded; set False",
    "calib__download=0": "calib.download: 0: nothing is downloaded; set False",
    "calib__path=7": "calib.path: 7: must be text",
    "eval__download=True": "eval.download: True: nothing is downloaded; set False",
    "calib__path=pileval": "calib.path: pileval: no such file or folder, and nothing is downloaded",
    "calib__path=None": "calib.path: not set; name a file or folder",
    "calib__name=images": (
        "calib.name: images: images alone calibrate no language model; use custom_mm, with questions"
    ),
    "calib__preproc=pileval_smooth": (
        "calib.preproc: pileval_smooth: must be one of pileval_awq, wikitext2_gptq, ptb_gptq, pileval_omni, "
        "random_truncate_txt, c4_gptq, general, ultrachat_general (did you mean pileval_omni?)"
    ),
    "calib__bs=0": "calib.bs: 0: must be a whole number from 1 on, or -1",
    "calib__n_samples=many": "calib.n_samples: many: must be a whole number from 1 on",
    "calib__add_answer=1": "calib.add_answer: 1: must be True or False",
    "eval__type=acc": "eval.type: acc: only perplexity is measured; set ppl",
    "eval__eval_pos=[pretrained]": (
        "eval.eval_pos: ['pretrained']: must be one of pretrain, transformed, fake_quant (did you mean pretrain?)"
    ),
    "model__type=internvl2": (
        f"model.type: internvl2: {NO_LLAMA}"
    ),
    "model__torch_dtype=int8": "model.torch_dtype: int8: must be one of auto, float16, bfloat16, float32",
    "model__path=7": "model.path: 7: must be a folder, or a list of them",
    "save__save_path=None": "save.save_path: not set",
    "save__save_path=data": "save.save_path: data: exists already; name another, or remove it",
    "save__save_fake=True": "save.save_fake: True: the quantized folder itself holds these values, packed; set False",
    "run__task_type=LVM": "run.task_type: LVM: must be one of LLM, VLM (did you mean VLM?)",
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_place_its_value_and_what_would_be_right(mistake, data):
    key, _, value = mistake.partition("=")
    content = changed(smallest(data), **{key: None if value == "None" else yaml.safe_load(value)})
    found = refused(content).removeprefix("llmc.yml: ")
    assert found == MISTAKES[mistake]


def test_transformed_needs_save_trans_and_only_awq_has_it(data):
    content = changed(smallest(data), eval__eval_pos=["transformed"], eval__path=str(data / "text.txt"))
    assert refused(content).endswith(
        "eval.eval_pos: transformed is measured on the saved floating-point model; set save.save_trans to True"
    )
    assert read(changed(content, save__save_trans=True)).save_trans == "saved/transformed_model"
    assert refused(changed(content, quant__method="GPTQ")).endswith(
        "save.save_trans: True: GPTQ does not change the floating-point model, only Awq does; set False"
    )


def test_all_mistakes_of_a_file_are_told_at_once(data):
    content = changed(smallest(data), quant__weight__bit=5, calib__nsamples=3, model__path=None, run__task_type="x")
    assert refused(content) == (
        "llmc.yml: calib.nsamples: unknown (did you mean n_samples?); run.task_type: x: must be one of LLM, VLM; "
        "model.path: not set; quant.weight.bit: 5: must be 4 or 8"
    )


def test_a_key_that_stands_twice_is_refused(data):
    assert refused("base:\n  seed: 1\nmodel:\n  path: a\n  path: b\n") == "llmc.yml:4: 'path' stands there twice"


def test_a_file_that_is_no_yaml_is_refused_with_the_line(data):
    assert refused("base:\n  seed: [1\nmodel: 2\n").startswith("llmc.yml:3: not valid YAML (")
    assert refused("just text").startswith("llmc.yml: expected the sections base, model, calib, eval, quant, save, run")


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"--config_path nowhere.yml: no such file"):
        read_llmc("nowhere.yml")
