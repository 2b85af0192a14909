"""Command lines: LLaMA2-Accessory's flags and Hydra's overrides, mixed freely.

Each flag is rewritten to a Hydra override *in place of* sys.argv, before Hydra sees it (Lightning relaunches ranks with
sys.argv). argparse in front of Hydra would swallow overrides after a list flag and read `--cfg` as an abbreviation.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

# GNU OpenMP's threads spin for each other, for ever by default: on a CPU that others use too, a step of many small
# operations was seen to take 28 s instead of 2. Read when torch is loaded, which comes later.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from accessory.config import Config, describe, to_typed
from accessory.errors import UserError, suggest

_HERE = Path(__file__).resolve().parent
CONFIG_DIR = next((d for d in (_HERE / "configs", _HERE.parent / "configs") if d.is_dir()), _HERE.parent / "configs")


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
    Flag("resume", "resume"),
    Flag("data_parallel", "strategy.data_parallel"),
    Flag("model_parallel_size", "strategy.model_parallel_size"),
]
# Hydra's own options; those that take a value may have it in the next word.
_HYDRA_SWITCHES = ("--multirun", "-m", "--run", "-r", "--resolve", "--info", "-i", "--hydra-help", "--version")
_HYDRA_VALUES = (
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-name",
    "-cn",
    "--config-dir",
    "-cd",
    "--config-path",
    "-cp",
    "--experimental-rerun",
)
# Launchers of the ancestor's time passed these; torchrun says the same in the environment.
_IGNORED_VALUES = ("--local_rank", "--local-rank", "--world_size", "--dist_url")
_IGNORED_SWITCHES = ("--dist_on_itp",)


def quote(value: str) -> str:
    """A literal string in Hydra's grammar, where backslashes escape only in front of a quote. Always quoted: what a
    flag's text means (number, path, name) is decided by the key's type, not by how it looks."""
    escaped = re.sub(r"(\\*)'", r"\1\1\'", value)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def rewrite(argv: list[str], flags: Iterable[Flag]) -> list[str]:
    """Flags -> overrides; everything else (overrides, Hydra's options) stays. Raises UserError for unknown flags."""
    table = {f"--{flag.name}": flag for flag in flags}
    out, i = [], 0
    while i < len(argv):
        word, i = argv[i], i + 1
        name, has_value, value = word.partition("=")
        if name.replace("-", "_").replace("__", "--", 1) in table and name.startswith("--"):
            name = name.replace("-", "_").replace("__", "--", 1)
        if name in table:
            flag = table[name]
            if flag.kind in ("value", "list"):
                values = [value] if has_value else []
                while not has_value and i < len(argv) and not _ends_values(argv[i], flag, values):
                    values.append(argv[i])
                    i += 1
                if not values and flag.kind == "value":
                    raise UserError(f"{name} needs a value")
                joined = "[" + ",".join(map(quote, values)) + "]" if flag.kind == "list" else quote(values[0])
                out.append(f"{flag.key}={joined}")
            elif has_value:
                raise UserError(f"{name} is a switch and takes no value (found {value!r})")
            else:
                out.append(f"{flag.key}={flag.kind}")
        elif name in _IGNORED_SWITCHES or name in _IGNORED_VALUES:
            i += name in _IGNORED_VALUES and not has_value
        elif word.startswith("-") and name not in (*_HYDRA_SWITCHES, *_HYDRA_VALUES):
            raise UserError(
                f"unknown flag {name}{suggest(name, [*table, *_HYDRA_VALUES, '--multirun'])}; --help lists them"
            )
        else:
            out.append(word)
            if name in _HYDRA_VALUES and not has_value and i < len(argv):
                out.append(argv[i])
                i += 1
    return out


def _ends_values(word: str, flag: Flag, values: list[str]) -> bool:
    if flag.kind == "value":
        return len(values) == 1 or word.startswith("--")
    # A list ends at the next flag or override; paths may hold '=', but an override's key is dotted words only.
    key = word.partition("=")[0]
    return word.startswith("--") or ("=" in word and key.lstrip("+~").replace(".", "").replace("_", "").isalnum())


def adopt_lora_settings(overrides: list[str]) -> list[str]:
    """LLaMA2-Accessory chose the recipe in llama_config's JSON (lora_rank, bias_tuning); choose it so here, unless a
    recipe is named on the command line."""
    if any(word.startswith(("recipe=", "experiment=")) for word in overrides):
        return overrides
    settings: dict[str, Any] = {}
    for word in overrides:
        if word.startswith("model.llama_config=["):
            override = OverridesParser.create().parse_override(word)
            for path in override.value():
                try:
                    settings |= json.loads(Path(str(path)).expanduser().read_text())
                except (OSError, ValueError):
                    continue  # reported with file and line when the model is built
    rank, bias = settings.get("lora_rank", -1), settings.get("bias_tuning", True)
    if isinstance(rank, int) and rank > 0:
        chosen = ["recipe=norm_bias_lora", f"recipe.rank={rank}"]
        return chosen + ([] if bias else ["recipe.bias=false"]) + overrides
    return overrides


def check_composition(config_name: str, schema: type, argv: list[str]) -> None:
    """Compose once by ourselves, so that a wrong key or value is one line with a suggestion, not Hydra's report."""
    overrides = []
    for before, word in zip(["", *argv], argv, strict=False):
        if word.startswith("-") or before in _HYDRA_VALUES or word.startswith(("hydra.", "hydra/", "+hydra")):
            continue
        overrides.append(_first_choice(word))
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            node = compose(config_name, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, schema)) from None
    if not any(word in argv for word in ("--cfg", "-c", "--info", "-i")):
        to_typed(node, schema)


def _first_choice(word: str) -> str:
    """An override as it is; of a sweep the first value."""
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        raise UserError(f"{word}: expected --flag value, key=value or group=option; --help lists them") from None
    if not override.is_sweep_override():
        return word
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()), '')}"


def _explain(error: Exception, schema: type) -> str:
    """Hydra's and OmegaConf's messages in one line, with the nearest known key or option."""
    text = f"{error}\n{error.__cause__ or ''}"
    if missing := re.search(r"Could not find '(.+)/(.+)'", text):
        group, name = missing.groups()
        options = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
        return f"{group}={name}: no such option{suggest(name, options)}; known: {', '.join(options)}"
    if unknown := re.search(r"Could not override '(.+)'", text):
        known = {key: key for key, _, _ in describe(schema)}
        wanted = unknown[1]
        by_leaf = {key.rsplit(".", 1)[-1]: key for key in known}
        near = f" (did you mean {by_leaf[wanted]}?)" if wanted in by_leaf else suggest(wanted, known)
        return f"unknown key {wanted}{near}; --help lists all keys"
    key = re.search(r"full_key: (\S+)", text)
    reason = str(error.__cause__ or error).splitlines()[0]
    return f"{key[1]}: {reason}" if key else reason


def help_text(program: str, flags: list[Flag], schema: type) -> str:
    rows = {key: (default, meaning) for key, default, meaning in describe(schema)}
    groups = sorted(p.name for p in CONFIG_DIR.iterdir() if p.is_dir() and any(p.glob("*.yaml")))
    lines = [
        f"usage: {program} [--flag value …] [key=value …] [group=option …]",
        "",
        "Flags (LLaMA2-Accessory's names):",
    ]
    for flag in flags:
        default, meaning = rows.get(flag.key, (None, f"same as {flag.key}={flag.kind}"))
        value = {"value": " VALUE", "list": " VALUE …"}.get(flag.kind, "")
        lines += [f"  --{flag.name + value:<32} {meaning}"]
    lines += ["", "Groups:"]
    for group in groups:
        lines.append(f"  {group:<14} {' | '.join(sorted(p.stem for p in (CONFIG_DIR / group).glob('*.yaml')))}")
    lines += ["", "Keys (default): override as key=value:"]
    for key, (default, meaning) in rows.items():
        shown = getattr(default, "value", default)
        lines.append(f"  {key} ({'required' if shown == '???' else shown}): {meaning}")
    lines += ["", "Hydra: --cfg job prints the composed configuration, --multirun sweeps over comma-separated values."]
    return "\n".join(lines)


def run_command(main: Callable[[], Any]) -> None:
    """Run an entry point; a user's mistake becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0 or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def launch(config_name: str, flags: list[Flag], schema: type, job: Callable[[DictConfig], None]) -> None:
    """Rewrite sys.argv, check it, and hand over to Hydra."""

    def main() -> None:
        if any(word in ("--help", "-h") for word in sys.argv[1:]):
            print(help_text(Path(sys.argv[0]).name, flags, schema))
            return
        sys.argv[1:] = adopt_lora_settings(rewrite(sys.argv[1:], flags))
        check_composition(config_name, schema, sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(job)()

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    run_command(main)


def _finetune_job(node: DictConfig) -> None:
    from accessory.finetune import finetune

    def job() -> None:
        config = to_typed(node)
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            config.output_dir = str(Path(config.output_dir) / str(HydraConfig.get().job.num))
        finetune(config)

    run_command(job)


def finetune_main(argv: Optional[list[str]] = None) -> None:
    """accessory-finetune, main_finetune.py."""
    if argv is not None:
        sys.argv[1:] = argv
    launch("finetune", FINETUNE_FLAGS, Config, _finetune_job)


ConfigStore.instance().store("config_schema", node=Config)
