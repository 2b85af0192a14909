"""LLaMA2-Accessory's flags and Hydra's overrides, in one command line; a mistake is one line on stderr."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from conftest import alpaca_items, write_data
from hydra import compose, initialize_config_dir

import accessory
from accessory.cli import finetune_main, help_text, run_command
from accessory.composition import check_composition
from accessory.config import (
    Config,
    DataConfig,
    DataParallel,
    ImageTransform,
    LlamaType,
    ModelConfig,
    Precision,
    PromptType,
    QuantMethod,
)
from accessory.data.sources import read_data_config
from accessory.errors import OwnError, UserError
from accessory.estimate_cli import EstimateConfig, estimate_main
from accessory.flags import FINETUNE_FLAGS, adopt_lora_settings, rewrite
from accessory.folders import require_folders
from accessory.quantize_options import QuantizeConfig
from accessory.schema import to_typed
from accessory.shipped import CONFIG_DIR, group_options, groups_of
from accessory.tools import EvaluateConfig, ExportConfig, evaluate_main

SCRIPT = Path(accessory.__file__).resolve().parents[1] / "main_finetune.py"
REQUIRED = ["--pretrained_path", "base", "--data_config", "data.yaml"]


def composed(*argv: str) -> Config:
    """The typed Config that these words give, by the steps of main_finetune.py."""
    overrides = adopt_lora_settings(rewrite([*REQUIRED, *argv], FINETUNE_FLAGS))
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return to_typed(compose("finetune", overrides=overrides))


def run_script(*argv: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *argv], cwd=cwd, capture_output=True, text=True, timeout=120)


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--llama_type llama", "model.llama_type", LlamaType.llama),
        ("--llama_type llama_qformerv2_peft", "model.llama_type", LlamaType.llama_qformerv2_peft),
        ("--llama_config a.json b.json", "model.llama_config", ["a.json", "b.json"]),
        ("--no_visual", "model.visual", False),
        ("--tokenizer_path t.model", "model.tokenizer_path", "t.model"),
        ("--pretrained_path a b", "model.pretrained_path", ["a", "b"]),
        ("--pretrained_type meta_ori", "model.pretrained_type", "meta_ori"),
        ("--quant --only_save_trainable", "quantization.method", QuantMethod.nf4),
        ("--only_save_trainable", "only_save_trainable", True),
        ("--weight_decay 0.1", "optim.weight_decay", 0.1),
        ("--lr 0.00005", "optim.lr", 5e-5),
        ("--min_lr 5e-6", "optim.min_lr", 5e-6),
        ("--clip_grad 8", "optim.clip_grad", 8.0),
        ("--clip_grad -1", "optim.clip_grad", -1.0),
        ("--warmup_epochs 0.5", "optim.warmup_epochs", 0.5),
        ("--epochs 4", "train.epochs", 4),
        ("--batch_size 2", "train.batch_size", 2),
        ("--accum_iter 8", "train.accum_iter", 8),
        ("--precision fp16", "train.precision", Precision.fp16),
        ("--precision tf32", "train.precision", Precision.tf32),
        ("--checkpointing", "train.checkpointing", True),
        ("--max_words 2048", "data.max_words", 2048),
        ("--dialog", "data.dialog", True),
        ("--data_config d.yaml", "data.data_config", "d.yaml"),
        ("--image_transform padded_resize", "data.image_transform", ImageTransform.padded_resize),
        ("--cache_ann_on_disk", "data.cache_ann_on_disk", True),
        ("--num_workers 5", "data.num_workers", 5),
        ("--pin_mem", "data.pin_mem", True),
        ("--no_pin_mem", "data.pin_mem", False),
        ("--output_dir out/run", "output_dir", "out/run"),
        ("--save_interval 2", "save.epoch_interval", 2),
        ("--save_iteration_interval 50", "save.step_interval", 50),
        ("--seed 7", "seed", 7),
        ("--resume out/run/checkpoints/step-4", "resume.path", "out/run/checkpoints/step-4"),
        ("--data_parallel sdp", "strategy.data_parallel", DataParallel.sdp),
        ("--model_parallel_size 1", "strategy.model_parallel_size", 1),
        # spelled another way
        ("--lr=0.01", "optim.lr", 0.01),
        ("--llama_type=llama", "model.llama_type", LlamaType.llama),
        ("--pretrained_path=only", "model.pretrained_path", ["only"]),
        ("--batch-size 2", "train.batch_size", 2),
        ("--only-save-trainable", "only_save_trainable", True),
        # in the order of a shell script: the last one counts
        ("--epochs 4 --epochs 2", "train.epochs", 2),
        ("--epochs 4 train.epochs=3", "train.epochs", 3),
    ],
)
def test_flag_sets_its_key(words, key, value, tmp_path, monkeypatch):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    found = attrgetter(key)(composed(*words.split()))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("name", ["alpaca", "shortqa", "qg", "caption", "None", "chat"])
def test_prompt_type_is_given_by_the_name_that_data_files_use(name):
    assert composed(f"data.prompt_type={name}").data.prompt_type is PromptType(name)


@pytest.mark.parametrize(
    "words",
    [
        "--pretrained_path a b recipe=norm_bias_lora --lr 1e-3",
        "recipe=norm_bias_lora --pretrained_path a b --lr 1e-3",
        "--lr 1e-3 --pretrained_path a b recipe=norm_bias_lora",
        "--pretrained_path a b optim.lr=1e-3 recipe=norm_bias_lora",
        "--pretrained_path a b --local_rank 1 --lr=1e-3 --dist_url env:// recipe=norm_bias_lora",
    ],
)
def test_list_flag_ends_at_the_next_flag_or_override(words):
    config = composed(*words.split())
    assert config.model.pretrained_path == ["a", "b"]
    assert config.recipe.name == "norm_bias_lora"
    assert config.optim.lr == 1e-3


def test_flags_of_the_ancestors_first_versions_are_taken(capsys):
    config = composed("--log_dir", "output/mine", "--device", "cuda", "--lr", "1e-3")
    assert config.optim.lr == 1e-3
    (told,) = capsys.readouterr().err.splitlines()
    assert told == "--log_dir output/mine: is not used; a run's figures lie in logs/ of its --output_dir"


AWKWARD = [
    "my models/7B base",
    "runs/lr=0.1,rank=16",
    "it's here",
    'a "quoted" name',
    "both ' and \"",
    "[brackets] {braces} (round)",
    "colon: and hash #1",
    "100% & more; a|b <c> $HOME `x` !",
    "back\\slash",
    "back\\\\slashes at the end\\",
    "quote after a slash\\'",
    "été/模型",
    "caret^tilde~at@plus+",
    "tab\there",
    "~/home",
    "true",
    "1e-3",
    "2024_01",
    "007",
]


@pytest.mark.parametrize("path", AWKWARD)
def test_awkward_path_arrives_as_it_was_typed(path):
    folder = path if "=" not in path else f"./{path}"  # in a list, word=… is an override
    config = composed("--output_dir", path, f"--tokenizer_path={path}", "--pretrained_path", "/models/base", folder)
    assert config.output_dir == path
    assert config.model.tokenizer_path == path
    assert config.model.pretrained_path == ["/models/base", folder]


def test_awkward_path_survives_a_real_command(tmp_path):
    path = 'it\'s a/lr=0.1, "b" {x}'
    result = run_script(*REQUIRED, "--output_dir", path, "--cfg", "job", cwd=tmp_path)
    assert yaml.safe_load(result.stdout)["output_dir"] == path


# --- Hydra's own options ---------------------------------------------------------------------------------------------


def test_cfg_job_prints_the_composed_configuration_and_runs_nothing(tmp_path):
    result = run_script("--cfg", "job", *REQUIRED, "--lr", "0.25", "recipe=norm_bias_lora", cwd=tmp_path)
    shown = yaml.safe_load(result.stdout)
    assert result.returncode == 0
    assert shown["optim"]["lr"] == 0.25
    assert shown["recipe"]["lora"] is True
    assert shown["model"]["pretrained_path"] == ["base"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "head"),
    [
        ("recipe=lora --cfg job --lr 1", ["--cfg=job"]),
        ("recipe=lora --cfg=job --lr 1", ["--cfg=job"]),
        ("recipe=lora --lr 1 -c job --resolve", ["-c=job", "--resolve"]),
        ("recipe=lora -m --lr 1", ["-m"]),
        ("--info recipe=lora --lr 1", ["--info=all"]),
        ("recipe=lora --info defaults --lr 1", ["--info=defaults"]),
        ("recipe=lora -i=plugins --lr 1", ["-i=plugins"]),
    ],
)
def test_hydra_options_come_before_the_overrides(words, head):
    assert rewrite(words.split(), FINETUNE_FLAGS) == [*head, "recipe=lora", "optim.lr='1'"]


def test_list_flag_ends_at_a_short_option_of_hydra():
    words = ["--pretrained_path", "hf", "-m", "recipe=lora,bias_lora"]
    assert rewrite(words, FINETUNE_FLAGS) == ["-m", "model.pretrained_path=['hf']", "recipe=lora,bias_lora"]


def test_cfg_among_overrides_and_flags_prints_the_configuration(tmp_path):
    result = run_script("recipe=lora", *REQUIRED, "--cfg", "job", "--lr", "1e-3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["recipe"]["name"] == "lora"


def test_help_lists_every_flag_group_and_key(tmp_path):
    result = run_script("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert all(f"--{flag.name} " in result.stdout for flag in FINETUNE_FLAGS)
    assert "norm_bias_lora" in result.stdout
    assert "model.pretrained_path (required): Checkpoint folders, base first" in result.stdout
    assert "optim.lr (0.0005): Learning rate after warmup" in result.stdout


def test_multirun_trains_once_a_value_each_in_its_own_folder_and_repeated_goes_on(tmp_path, meta_folder):
    data = write_data(tmp_path / "data", alpaca_items(8), prompt_type="None")
    command = [
        "--pretrained_path", str(meta_folder), "--data_config", str(data), "--output_dir", str(tmp_path / "out"),
        "-m", "--quant", "--only_save_trainable", "--num_workers", "0", "train.max_steps=1",
        "recipe=norm_bias,norm_bias_lora",
    ]  # fmt: skip
    result = run_script(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (tmp_path / "out" / "1" / "trainable.safetensors").unlink()  # as if it had been stopped
    result = run_script(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^.*(out/.*)$", result.stdout, re.M)[:1] == ["out/0: finished before"]
    kept = [yaml.safe_load((tmp_path / "out" / job / "config.yaml").read_text()) for job in ("0", "1")]
    assert [config["recipe"]["name"] for config in kept] == ["norm_bias", "norm_bias_lora"]
    assert all((tmp_path / "out" / job / "trainable.safetensors").is_file() for job in ("0", "1"))


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Run main_finetune.py's entry point with these words; the one line it ends with."""

    def run(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["main_finetune.py"])
        with pytest.raises(SystemExit) as caught:
            finetune_main(list(argv))
        printed = capsys.readouterr()
        assert caught.value.code == 2
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--batch_sise 3", ["unknown flag --batch_sise", "did you mean --batch_size?", "--help"]),
        ("--dailog", ["unknown flag --dailog", "did you mean --dialog?"]),
        ("-x", ["unknown flag -x"]),
        ("optim.lrr=3", ["unknown key optim.lrr", "did you mean optim.lr?"]),
        ("optm.lr=3", ["unknown key optm.lr", "did you mean optim.lr?"]),
        ("batch_size=3", ["unknown key batch_size", "did you mean train.batch_size?"]),
        ("resume=out/run", ["resume=out/run: resume is a group of keys", "--resume", "resume.path="]),
        ("recipe=norm_bais", ["norm_bais", "did you mean norm_bias?", "norm_bias_lora"]),
        ("experiment=alpaca", ["alpaca", "alpaca_norm_bias"]),
        ("--lr abc", ["optim.lr", "abc", "Float"]),
        ("--epochs 1.5", ["train.epochs", "1.5", "Integer"]),
        ("--precision fp8", ["train.precision", "fp8", "bf16, fp16, tf32"]),
        ("--llama_type gpt2", ["model.llama_type", "gpt2", "llama, llama_peft, llama_qformerv2_peft"]),
        ("optim.lr=[", ["optim.lr=["]),
        ("norm_bias_lora", ["norm_bias_lora", "key=value"]),
        ("--batch_size", ["--batch_size needs a value"]),
        ("--batch_size --lr 1", ["--batch_size needs a value"]),
        ("--dialog=yes", ["--dialog is a switch", "'yes'"]),
        ("--quant True", ["--quant is a switch and takes no value", "'True'"]),
        ("--device cpu", ["--device cpu", "CUDA_VISIBLE_DEVICES="]),
        ("--quant", ["--quant", "--only_save_trainable"]),
        ("--model_parallel_size 2", ["--model_parallel_size 2", "use 1", "--data_parallel fsdp"]),
        ("--output_dir x/${y}", ["output_dir", "'y' not found"]),
        ("recipe=null", ["recipe=null", "norm_bias_lora"]),
        ("logger=null", ["logger=null", "csv"]),
        ("recipe=3", ["recipe=3", "known: ", "norm_bias"]),
        ("+optim.foo=1", ["unknown key optim.foo"]),
        ("++optim.lrr=1", ["unknown key optim.lrr", "did you mean optim.lr?"]),
        ("+optim.lrr=1,2 -m", ["unknown key optim.lrr", "did you mean optim.lr?"]),
        ("--image_transform crop", ["data.image_transform", "crop", "resized_center_crop, padded_resize"]),
        ("--config-dir x", ["unknown flag --config-dir"]),
        ("--config-name x", ["unknown flag --config-name"]),
        ("-cp x", ["unknown flag -cp"]),
        ("--cfg", ["--cfg needs a value"]),
        ("--batch_size 0 --epochs 0", ["--batch_size 0", "--epochs 0"]),
    ],
)
def test_mistake_is_told_in_one_line(words, told, refusal):
    line = refusal(*REQUIRED, *words.split())
    assert all(part in line for part in told), line


def test_mistake_that_only_the_run_finds_is_told_in_one_line_too(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--pretrained_path base: no such folder" in refusal(*REQUIRED)


def test_a_folder_that_cannot_be_had_is_told_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    (tmp_path / "file").touch()
    told = {
        "lama": rf"lama: no such folder \(did you mean {tmp_path}/llama\?\)",
        "meta-llama/Llama-2-7b-hf": "no such folder; nothing is downloaded",
        "file": f"file: is a file; name its folder, {tmp_path}",
        "": "--pretrained_path is empty",
        "x" * 300: "cannot be read",
    }
    for name, line in told.items():
        with pytest.raises(UserError, match=line):
            require_folders([str(tmp_path / name) if name in ("lama", "file") else name])
    require_folders(["llama"])

    def forbid(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", forbid)
    with pytest.raises(UserError, match=r"llama: cannot be read \(Permission denied\)"):
        require_folders(["llama"])
    with pytest.raises(UserError, match=r"lama: no such folder$"):  # what lies beside it cannot be read either
        require_folders(["lama"])


def test_what_a_user_may_not_read_is_one_line(capsys):
    def read() -> None:
        raise PermissionError(13, "Permission denied", "/secret/config.json")

    with pytest.raises(SystemExit) as end:
        run_command(read)
    assert end.value.code == 2 and capsys.readouterr().err == "error: /secret/config.json: Permission denied\n"


@pytest.mark.parametrize(("rank", "local", "tells"), [(0, 0, True), (1, 1, False), (8, 0, True)])
def test_of_a_machines_ranks_the_first_tells_and_the_others_leave_it_the_time(rank, local, tells, monkeypatch, capsys):
    """torchrun ends all of them as soon as one has ended."""
    waited = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr("accessory.cli.time.sleep", waited.append)

    def fail() -> None:
        raise UserError("wrong")

    with pytest.raises(SystemExit):
        run_command(fail)
    assert (capsys.readouterr().err == "error: wrong\n") == tells and bool(waited) != tells


@pytest.mark.parametrize("command", ["finetune", "estimate", "evaluate", "export", "quantize"])
def test_a_command_names_no_groups_but_its_own(command):
    schemas = {"finetune": Config, "estimate": EstimateConfig, "evaluate": EvaluateConfig}
    schema = schemas.get(command, ExportConfig if command == "export" else QuantizeConfig)
    groups = groups_of(command)
    assert ("recipe" in groups) == (command in ("finetune", "estimate")) and bool(groups) == (command != "quantize")
    for group in groups:
        option = group_options(group)[0]
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            compose(command, overrides=[f"{group}={option}"])
    assert ("Groups:" in help_text(command, [], schema, groups)) == bool(groups)


def test_command_without_anything_names_what_is_required(refusal):
    line = refusal()
    assert "--pretrained_path" in line
    assert "--data_config" in line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lerning_rate", "1"], "unknown flag --lerning_rate"),
        (["optim.lrr=1"], "unknown key optim.lrr (did you mean optim.lr?)"),
    ],
)
def test_mistake_ends_the_real_command_with_code_2_and_no_traceback(words, told, tmp_path):
    result = run_script(*REQUIRED, *words, cwd=tmp_path)
    assert result.returncode == 2
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_error_leaves_the_line_of_a_progress_bar(monkeypatch):
    def fail() -> None:
        raise UserError("wrong")

    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(SystemExit):
        run_command(fail)
    assert sys.stderr.getvalue() == "\nerror: wrong\n"


@pytest.mark.parametrize("module", ["cli", "demo_flags", "estimate_cli", "quantize_cli", "tools"])
def test_importing_a_command_line_does_not_load_torch(module):
    code = f"import sys, accessory.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, timeout=120).returncode == 0


# --- the recipe that llama_config's JSON asks for --------------------------------------------------------------------


@pytest.fixture
def lora_json(tmp_path) -> str:
    file = tmp_path / "my llama=config.json"
    file.write_text(json.dumps({"lora_rank": 8, "bias_tuning": True}))
    return str(file)


def test_lora_rank_in_llama_config_selects_norm_bias_lora(lora_json):
    recipe = composed("--llama_config", lora_json).recipe
    assert (recipe.name, recipe.norm, recipe.bias, recipe.lora, recipe.rank) == ("norm_bias_lora", True, True, True, 8)


def test_shipped_llama_config_asks_for_rank_16():
    file = CONFIG_DIR / "model/finetune/sg/llamaPeft_normBiasLora.json"
    recipe = composed("--llama_config", str(file)).recipe
    assert (recipe.name, recipe.rank) == ("norm_bias_lora", 16)


def test_recipe_given_by_the_user_wins_over_llama_config(lora_json):
    recipe = composed("--llama_config", lora_json, "recipe=norm_bias").recipe
    assert (recipe.name, recipe.lora) == ("norm_bias", False)


def test_rank_given_by_the_user_wins_over_llama_config(lora_json):
    assert composed("--llama_config", lora_json, "recipe.rank=4").recipe.rank == 4


def test_later_llama_config_wins(lora_json, tmp_path):
    (tmp_path / "later.json").write_text(json.dumps({"lora_rank": 2, "bias_tuning": False}))
    recipe = composed("--llama_config", lora_json, str(tmp_path / "later.json")).recipe
    assert (recipe.lora, recipe.rank, recipe.bias) == (True, 2, False)


@pytest.mark.parametrize("settings", [{}, {"lora_rank": -1}, {"dim": 64}])
def test_llama_config_without_lora_leaves_the_recipe(settings, tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(settings))
    assert composed("--llama_config", str(tmp_path / "params.json")).recipe.name == "norm_bias"


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"bias_tuning": False}, ("norm_bias", True, False, False)),
        ({"norm_tuning": False}, ("norm_bias", False, True, False)),
        ({"lora_rank": 8, "norm_tuning": False}, ("norm_bias_lora", False, True, True)),
        ({"lora_rank": 8, "norm_tuning": False, "bias_tuning": False}, ("norm_bias_lora", False, False, True)),
    ],
)
def test_norm_and_bias_tuning_in_llama_config_switch_that_part(settings, found, tmp_path):
    (tmp_path / "lora.json").write_text(json.dumps(settings))
    recipe = composed("--llama_config", str(tmp_path / "lora.json")).recipe
    assert (recipe.name, recipe.norm, recipe.bias, recipe.lora) == found


def test_llama_config_that_trains_nothing_is_refused(refusal, tmp_path):
    (tmp_path / "none.json").write_text(json.dumps({"norm_tuning": False, "bias_tuning": False}))
    assert "'norm_bias' trains nothing" in refusal(*REQUIRED, "--llama_config", str(tmp_path / "none.json"))


def test_lora_rank_in_llama_config_goes_before_an_experiments_recipe(lora_json):
    recipe = composed("experiment=alpaca_norm_bias", "--llama_config", lora_json, "--only_save_trainable").recipe
    assert (recipe.name, recipe.rank) == ("norm_bias_lora", 8)


def test_last_llama_config_flag_counts(lora_json, tmp_path):
    (tmp_path / "plain.json").write_text("{}")
    words = ["--llama_config", lora_json, "--llama_config", str(tmp_path / "plain.json")]
    assert composed(*words).recipe.name == "norm_bias"


@pytest.mark.parametrize(
    ("text", "told"), [("[1]", "JSON object"), ("{", "not valid JSON"), (None, "no such file")], ids=str
)
def test_unusable_llama_config_is_told_in_one_line(text, told, refusal, tmp_path):
    file = tmp_path / "lora.json"
    if text is not None:
        file.write_text(text)
    line = refusal(*REQUIRED, "--llama_config", str(file))
    assert str(file) in line
    assert told in line


# --- every shipped YAML ----------------------------------------------------------------------------------------------

GROUPS = sorted(p.relative_to(CONFIG_DIR).with_suffix("") for p in CONFIG_DIR.glob("*/*.yaml"))


@pytest.mark.parametrize("option", GROUPS, ids=str)
def test_every_shipped_option_composes_and_its_values_are_in_force(option):
    """What an option's file says must be what the run gets, not what finetune.yaml says beside it."""
    content = yaml.safe_load((CONFIG_DIR / f"{option}.yaml").read_text())
    is_global = option.parts[0] in ("experiment", "debug")
    content.pop("defaults", None)
    config = composed("--only_save_trainable", f"{option.parent}={option.name}")

    def check(stated: dict, found: object) -> None:
        for key, value in stated.items():
            if isinstance(value, dict):
                check(value, getattr(found, key))
            else:
                assert getattr(getattr(found, key), "value", getattr(found, key)) == value, key

    check(content, config if is_global else getattr(config, option.parts[0]))


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIG_DIR.glob("experiment/*.yaml")))
def test_shipped_experiment_needs_no_more_than_paths(name):
    config = composed(f"experiment={name}")
    assert name.endswith(f"_{config.recipe.name}")
    assert config.quantization.method is QuantMethod.nf4


def test_flags_win_over_an_experiment():
    config = composed("experiment=alpaca_norm_bias_lora", "--lr", "0.125", "--epochs", "9")
    assert (config.optim.lr, config.train.epochs) == (0.125, 9)


def test_finetune_yaml_says_the_same_defaults_as_the_dataclasses():
    config, plain = composed(), Config()
    assert (config.optim, config.train, config.save, config.recipe) == (
        plain.optim,
        plain.train,
        plain.save,
        plain.recipe,
    )
    assert (config.quantization, config.strategy, config.logger) == (plain.quantization, plain.strategy, plain.logger)
    assert config.data == DataConfig(data_config="data.yaml")
    assert config.model == ModelConfig(pretrained_path=["base"])
    assert (config.seed, config.output_dir) == (plain.seed, plain.output_dir)


@pytest.mark.parametrize(
    ("name", "schema", "overrides"),
    [
        ("estimate", EstimateConfig, ["size=7b", "fast=on", "train.checkpointing=true"]),
        ("evaluate", EvaluateConfig, ["model.pretrained_path=[base]", "text=t.txt"]),
        ("export", ExportConfig, ["model.pretrained_path=[base]", "output_dir=out"]),
    ],
)
def test_tools_yaml_composes_to_its_schema(name, schema, overrides):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = to_typed(compose(name, overrides=[*overrides, "quantization=nf4"]), schema)
    assert type(config) is schema
    assert config.quantization.method is QuantMethod.nf4


DATA_YAMLS = sorted(CONFIG_DIR.glob("data/finetune/**/*.yaml"))


@pytest.mark.parametrize("file", DATA_YAMLS, ids=lambda file: file.stem)
def test_shipped_data_yaml_reads_the_file_it_names(file, tmp_path, monkeypatch):
    """Its path is the ancestor's, ../data/NAME, seen from the folder that the commands run in."""
    named = [Path(entry["path"]) for entry in yaml.safe_load(file.read_text())["META"]]
    (tmp_path / "accessory").mkdir()
    monkeypatch.chdir(tmp_path / "accessory")
    named[0].parent.mkdir(parents=True)
    for path in named:
        path.write_text(json.dumps(alpaca_items(1)))
    entries = read_data_config(str(file), None)
    assert [(entry.path, entry.prompt_type) for entry in entries] == [(path, PromptType.alpaca) for path in named]


def test_every_shipped_yaml_is_covered_here():
    main = [CONFIG_DIR / f"{name}.yaml" for name in ("finetune", "estimate", "evaluate", "export", "quantize")]
    options = [CONFIG_DIR / f"{option}.yaml" for option in GROUPS]
    assert sorted(CONFIG_DIR.rglob("*.yaml")) == sorted([*main, *options, *DATA_YAMLS])


# --- the published commands ------------------------------------------------------------------------------------------

EXPS = sorted(SCRIPT.parent.glob("exps/finetune/*/*.sh"))


@pytest.mark.parametrize("script", EXPS, ids=lambda script: script.stem)
def test_published_command_composes(script, tmp_path):
    """The script runs with a torchrun that only writes down what it was called with."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "torchrun"
    stand_in.write_text(f"#!/bin/sh\nfor word; do printf '%s\\n' \"$word\"; done > {tmp_path}/words\n")
    stand_in.chmod(0o755)
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "my, images (1)").mkdir()
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OUTPUT": str(tmp_path / "out put")}
    takes_images = script.parent.name == "mm"
    named = ["my base", str(tmp_path / "params.json"), "tokenizer.model", *(["my, images (1)"] if takes_images else [])]
    command = ["bash", str(script), *named, "--lr", "0.5"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    words = (tmp_path / "words").read_text().splitlines()
    config = composed(*words[words.index(str(SCRIPT)) + 1 :])
    assert config.model.pretrained_path == ["my base"]
    assert config.output_dir == str(tmp_path / "out put")
    assert config.recipe.name == ("norm_bias" if "_normBias_" in script.stem else "norm_bias_lora")
    assert config.model.llama_type.value == ("llama_qformerv2_peft" if takes_images else "llama_peft")
    assert (config.data.image_root, config.model.visual) == (
        ("my, images (1)", True) if takes_images else (None, False)
    )
    assert config.quantization.method is QuantMethod.nf4
    assert config.optim.lr == 0.5


def test_training_command_is_a_command_of_the_estimator(monkeypatch, capsys):
    words = ["--model", "tiny", "--quant", "--only_save_trainable", "--checkpointing", "fast=off", "train.max_steps=2"]
    monkeypatch.setattr(sys, "argv", ["estimate.py", *words, "--output_dir", "out", "--cfg", "job"])
    estimate_main()
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["fast"]["enabled"], shown["train"]["checkpointing"], shown["output_dir"]) == (False, True, "out")


@pytest.mark.parametrize(
    ("main", "job", "words"),
    [
        (evaluate_main, "accessory.tools.evaluate", ["--pretrained_path", ".", "--text", "t.txt"]),
        (estimate_main, "accessory.estimate_cli._estimate", ["--model", "7b"]),
    ],
)
def test_what_begins_anew_when_it_is_stopped_does_not_promise_to_go_on(main, job, words, monkeypatch, capsys):
    def interrupt(_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, interrupt)
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code, capsys.readouterr().err) == (130, "stopped\n")


def test_unknown_flag_is_refused_before_hydra_sees_it():
    with pytest.raises(UserError, match="unknown flag --abc"):
        rewrite(["--abc"], FINETUNE_FLAGS)


@pytest.mark.parametrize(("error", "told"), [(UserError, ""), (OwnError, "error: x.png: gone\n")])
def test_a_mistake_is_told_once_by_the_first_rank_or_by_the_rank_that_alone_met_it(error, told, monkeypatch, capsys):
    def main() -> None:
        raise error("x.png: gone")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    assert exit_.value.code == 2 and capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fast=on,off", "add --multirun"),
        ("fast=true", "known: auto, off, on"),
        ("train.checkpointing=3", "must be true, false or null"),
        ("recipe.bias=1", "must be true, false"),
    ],
)
def test_a_sweep_without_multirun_and_a_number_for_a_switch_are_refused(word, message):
    with pytest.raises(UserError, match=message):
        check_composition("finetune", Config, [word, "model.pretrained_path=[x]", "data.data_config=y"])
