"""accessory-quantize: AutoRound's flags, Hydra's keys, llmc's YAML."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import corpus
from hydra import compose, initialize_config_dir

from accessory.cli import help_text
from accessory.composition import check_composition
from accessory.errors import UserError
from accessory.flags import rewrite
from accessory.quantize_cli import QUANTIZE_FLAGS, quantize_main, without_foreign_words
from accessory.quantize_options import Method, QuantizeConfig, Tuning
from accessory.schema import to_typed
from accessory.shipped import CONFIG_DIR

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "scripts" / "quantize.py")


def composed(*words: str) -> QuantizeConfig:
    """What a command line makes of itself."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return to_typed(compose("quantize", overrides=rewrite(list(words), QUANTIZE_FLAGS)), QuantizeConfig)


def run(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=600, **options)


def test_auto_rounds_documented_commands_mean_what_they_say():
    config = composed(
        *"--model_name m --amp --bits 4 --group_size -1 --low_gpu_mem_usage --train_bs 1".split(),
        *"--gradient_accumulate_steps 8 --enable_minmax_tuning --use_quant_input --output_dir o".split(),
    )
    assert config.model.pretrained_path == ["m"]
    assert (config.bits, config.group_size, config.low_gpu_mem_usage, config.calib.batch_size) == (4, -1, True, 1)
    tuning = config.autoround
    assert (tuning.amp, tuning.gradient_accumulate_steps, tuning.enable_quanted_input) == (True, 8, True)

    best = composed(*"--model m --bits 4 --group_size 128 --nsamples 512 --iters 1000 --output_dir o".split())
    assert (best.calib.nsamples, best.autoround.iters) == (512, 1000)
    original = composed(*"--model m --iters 400 --lr 0.0025 --minmax_lr 0.0025 --adam --output_dir o".split())
    assert (original.autoround.lr, original.autoround.minmax_lr, original.autoround.adam) == (0.0025, 0.0025, True)
    several = composed("--model", "m", "--format", "auto_round,auto_gptq", "--output_dir", "o")
    assert several.format == "auto_round,auto_gptq"
    multimodal = composed(
        *"--model m --quant_lm_head --quant_vision --image_folder i --question_file q.json --output_dir o".split()
    )
    assert (multimodal.quant_lm_head, multimodal.vision, multimodal.calib.image_root) == (True, True, "i")


@pytest.mark.parametrize("flag", QUANTIZE_FLAGS, ids=lambda flag: flag.name)
def test_every_flag_reaches_a_setting_that_help_explains(flag):
    meaning = next(
        line for line in help_text("q", QUANTIZE_FLAGS, QuantizeConfig).splitlines() if f"--{flag.name} " in line
    )
    assert "same as" not in meaning  # the setting is known, with its own text


def test_keys_and_flags_mix():
    config = composed(
        "--model", "m", "method=gptq", "gptq.percdamp=0.05", "--output_dir", "o", "autoround.recipe=light"
    )
    assert (config.method, config.gptq.percdamp, config.autoround.recipe) == (Method.gptq, 0.05, Tuning.light)


def test_layer_config_is_json_on_the_command_line():
    rule = json.dumps({"model.layers.0.mlp.down_proj": {"bits": 8}})
    assert composed("--model", "m", "--output_dir", "o", "--layer_config", rule).layer_config == rule


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bit", "4"), r"unknown flag --bit \(did you mean --bits"),
        (("--iterations", "4"), "unknown flag --iterations"),
        (("itres=4",), "unknown key itres"),
        (("autoround.itres=4",), r"unknown key autoround.itres \(did you mean autoround.iters"),
        (("method=autoaround",), "method: "),
        ((), "not set: .*--pretrained_path"),
    ],
)
def test_unknown_and_missing_settings_are_told_in_a_line(words, message):
    with pytest.raises(UserError, match=message):
        check_composition("quantize", QuantizeConfig, rewrite([*words, "--output_dir", "o"], QUANTIZE_FLAGS))


def test_words_of_auto_round_that_mean_nothing_here_are_passed_over():
    assert list(without_foreign_words(["--model", "m", "--disable_eval", "--platform", "hf", "--mllm"])) == [
        "--model",
        "m",
    ]


def test_evaluation_is_another_command_and_the_line_names_it():
    with pytest.raises(UserError, match=r"--tasks: .*scripts/evaluate.py .*--tasks lambada_openai"):
        list(without_foreign_words(["--model", "m", "--tasks", "x"]))


# --- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(corpus()))
    return file


def documented(base: Path, text: Path, out: Path, method: str) -> dict:
    """llmc-tpu's documented example, with paths changed, for a language model of hidden size 64."""
    return {
        "base": {"seed": 42},
        "model": {"type": "Llama", "path": str(base), "torch_dtype": "auto"},
        "calib": {
            "name": "pileval", "download": False, "path": str(text), "n_samples": 128, "bs": 1, "seq_len": 64,
            "preproc": "pileval_awq" if method == "Awq" else "wikitext2_gptq", "seed": 42,
        },
        "eval": {
            "eval_pos": ["pretrain", "fake_quant"], "name": "wrap", "download": False, "path": str(text), "bs": 1,
            "seq_len": 128,
        },
        "quant": {
            "method": method, "quant_objects": ["language"],
            "weight": {"bit": 4, "symmetric": False, "granularity": "per_group", "group_size": 64},
            "special": {"trans": True, "trans_version": "v2", "weight_clip": True, "clip_sym": True}
            if method == "Awq" else {"percdamp": 0.01, "blocksize": 128, "true_sequential": True},
        },
        "save": {"save_trans": method == "Awq", "save_path": str(out)},
        "run": {"task_name": "w_only", "task_type": "LLM"},
    }  # fmt: skip


@pytest.mark.parametrize("method", ["Awq", "GPTQ"])
def test_llmcs_documented_yaml_runs_as_it_is(hf_folder, text, tmp_path, method):
    file, out = tmp_path / "example.yml", tmp_path / "save_path"
    file.write_text(yaml.safe_dump(documented(hf_folder, text, out, method)))
    done = run("--llmc_tpu_path", ".", "--config_path", str(file))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("EVAL: ppl on wrap is ") == 2
    assert (out / "quantized_model" / "quantization.json").is_file()
    assert (out / "transformed_model" / "config.json").is_file() == (method == "Awq")


def test_a_mistake_in_llmcs_yaml_is_one_line_and_exit_code_2(hf_folder, text, tmp_path):
    content = documented(hf_folder, text, tmp_path / "out", "Awq")
    content["quant"]["weight"]["bits"] = content["quant"]["weight"].pop("bit")
    (tmp_path / "x.yml").write_text(yaml.safe_dump(content))
    done = run("--config_path", str(tmp_path / "x.yml"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "quant.weight.bits: unknown (did you mean bit" in done.stderr


@pytest.mark.parametrize("words", [("--config_path", "nowhere.yml", "--help"), ("-h", "--config_path=nowhere.yml")])
def test_help_is_printed_beside_llmcs_yaml_too(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quantize.py", *words])
    quantize_main()
    assert capsys.readouterr().out.startswith("usage: quantize.py")


def test_what_the_command_line_says_wins_over_llmcs_yaml(hf_folder, text, tmp_path):
    (tmp_path / "x.yml").write_text(yaml.safe_dump(documented(hf_folder, text, tmp_path / "out", "GPTQ")))
    done = run("--config_path", str(tmp_path / "x.yml"), "--nsamples", "0")
    assert done.returncode == 2 and "--nsamples 0: must be at least 1" in done.stderr
