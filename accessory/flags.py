"""LLaMA2-Accessory's flags as Hydra's overrides.

Each flag is rewritten to an override *in place of* sys.argv, before Hydra sees it (Lightning relaunches ranks with
sys.argv). argparse in front of Hydra would swallow overrides after a list flag and read `--cfg` as an abbreviation.
"""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from accessory.composition import parse_override
from accessory.errors import UserError, suggest
from accessory.shipped import find_file


@dataclass(frozen=True)
class Flag:
    """--name -> key=value. kind: value, list, or the text that a bare switch stands for (true, false, nf4)."""

    name: str
    key: str
    kind: str = "value"


MODEL_FLAGS = [
    Flag("llama_type", "model.llama_type"),
    Flag("llama_config", "model.llama_config", "list"),
    Flag("no_visual", "model.visual", "false"),
    Flag("tokenizer_path", "model.tokenizer_path"),
    Flag("pretrained_path", "model.pretrained_path", "list"),
    Flag("pretrained_type", "model.pretrained_type"),
    Flag("quant", "quantization", "nf4"),
]
FINETUNE_FLAGS = [
    *MODEL_FLAGS,
    Flag("only_save_trainable", "only_save_trainable", "true"),
    Flag("data_config", "data.data_config"),
    Flag("dialog", "data.dialog", "true"),
    Flag("max_words", "data.max_words"),
    Flag("image_transform", "data.image_transform"),
    Flag("image_root", "data.image_root"),
    Flag("cache_ann_on_disk", "data.cache_ann_on_disk", "true"),
    Flag("num_workers", "data.num_workers"),
    Flag("pin_mem", "data.pin_mem", "true"),
    Flag("no_pin_mem", "data.pin_mem", "false"),
    Flag("lr", "optim.lr"),
    Flag("min_lr", "optim.min_lr"),
    Flag("weight_decay", "optim.weight_decay"),
    Flag("warmup_epochs", "optim.warmup_epochs"),
    Flag("clip_grad", "optim.clip_grad"),
    Flag("epochs", "train.epochs"),
    Flag("batch_size", "train.batch_size"),
    Flag("accum_iter", "train.accum_iter"),
    Flag("precision", "train.precision"),
    Flag("checkpointing", "train.checkpointing", "true"),
    Flag("output_dir", "output_dir"),
    Flag("save_interval", "save.epoch_interval"),
    Flag("save_iteration_interval", "save.step_interval"),
    Flag("seed", "seed"),
    Flag("resume", "resume.path"),
    Flag("data_parallel", "strategy.data_parallel"),
    Flag("model_parallel_size", "strategy.model_parallel_size"),
]
# Hydra's own options, less those that name another configuration folder: check_composition knows ours only.
_HYDRA_SWITCHES = ("--multirun", "-m", "--run", "-r", "--resolve", "--hydra-help", "--version")
_HYDRA_VALUES = ("--cfg", "-c", "--package", "-p", "--experimental-rerun")
_HYDRA_INFO = ("--info", "-i")
_INFO_TOPICS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
# Launchers of the ancestor's time passed these; torchrun says the same in the environment.
_IGNORED_VALUES = ("--local_rank", "--local-rank", "--world_size", "--dist_url")
_IGNORED_SWITCHES = ("--dist_on_itp",)
# Its first versions had these two.
_LOG_DIR, _DEVICE = "--log_dir", "--device"


def quote(value: str) -> str:
    """A literal string in Hydra's grammar, where backslashes escape only in front of a quote. Always quoted: what a
    flag's text means (number, path, name) is decided by the key's type, not by how it looks."""
    escaped = re.sub(r"(\\*)'", r"\1\1\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def rewrite(argv: list[str], flags: Iterable[Flag]) -> list[str]:
    """Flags -> overrides; overrides stay. Hydra's options come first: its argparse takes none between overrides."""
    table = {f"--{flag.name}": flag for flag in flags}
    words, head, out = deque(argv), [], []
    while words:
        word = words.popleft()
        name, has_value, value = word.partition("=")
        given = [value] if has_value else []
        spelled = name.replace("-", "_").replace("__", "--", 1)
        if name.startswith("--") and spelled in table:
            out.append(_override(table[spelled], given, words))
        elif name in _IGNORED_VALUES:
            _one_value(name, given, words)
        elif name == _LOG_DIR:
            _tell_log_dir(_one_value(name, given, words))
        elif name == _DEVICE:
            _check_device(_one_value(name, given, words))
        elif name in _HYDRA_VALUES:
            head.append(f"{name}={_one_value(name, given, words)}")
        elif name in _HYDRA_INFO:
            # Its value is optional: a bare one would take the override behind it.
            has_topic = given or (words and words[0] in _INFO_TOPICS)
            head.append(f"{name}={_one_value(name, given, words) if has_topic else 'all'}")
        elif word in _HYDRA_SWITCHES:
            head.append(word)
        elif not word.startswith("-"):
            out.append(word)
        elif name not in _IGNORED_SWITCHES:
            raise UserError(f"unknown flag {name}{suggest(name, [*table, '--cfg', '--multirun'])}; --help lists them")
    return head + out


def _override(flag: Flag, given: list[str], words: deque[str]) -> str:
    """The override that a flag stands for; takes the flag's values off `words` unless given as --flag=value."""
    if flag.kind == "value":
        return f"{flag.key}={quote(_one_value(f'--{flag.name}', given, words))}"
    if flag.kind != "list":
        if not given and words and words[0].lower() in ("true", "false"):
            given = [words[0]]
        if given:
            raise UserError(f"--{flag.name} is a switch and takes no value (found {given[0]!r})")
        return f"{flag.key}={flag.kind}"
    values = list(given)
    while not given and words and not _ends_list(words[0]):
        values.append(words.popleft())
    return f"{flag.key}=[{','.join(map(quote, values))}]"


def _tell_log_dir(folder: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{_LOG_DIR} {folder}: is not used; a run's figures lie in logs/ of its --output_dir", file=sys.stderr)


def _check_device(device: str) -> None:
    if device.partition(":")[0] != "cuda":
        raise UserError(
            f"{_DEVICE} {device}: a run takes the GPU where there is one, and the CPU otherwise; leave it out, and "
            "hide a GPU with CUDA_VISIBLE_DEVICES="
        )


def _one_value(name: str, given: list[str], words: deque[str]) -> str:
    if given:
        return given[0]
    if not words or words[0].startswith("--"):
        raise UserError(f"{name} needs a value")
    return words.popleft()


def _ends_list(word: str) -> bool:
    """At the next flag or override; paths may hold '=', but an override's key is dotted words only."""
    key = word.partition("=")[0]
    return word.startswith("-") or ("=" in word and key.lstrip("+~").replace(".", "").replace("_", "").isalnum())


def adopt_lora_settings(overrides: list[str]) -> list[str]:
    """LLaMA2-Accessory chose the recipe in llama_config's JSON (lora_rank, bias_tuning, norm_tuning); choose it so
    here, unless one is named on the command line. In front, so that the words of the command line win."""
    configs = [word for word in overrides if word.startswith("model.llama_config=[")]
    files = parse_override(configs[-1]).value() if configs else []
    is_chosen = any(word.lstrip("+~").startswith("recipe=") for word in overrides)
    if is_chosen or not isinstance(files, list) or not files:
        return overrides
    from accessory.models import read_json  # loads torch

    settings = {key: value for file in files for key, value in read_json(find_file(str(file))).items()}
    rank = settings.get("lora_rank", -1)
    chosen = ["recipe=norm_bias_lora", f"recipe.rank={rank}"] if isinstance(rank, int) and rank > 0 else []
    chosen += [f"recipe.{part}=false" for part in ("norm", "bias") if settings.get(f"{part}_tuning") is False]
    return chosen + overrides
