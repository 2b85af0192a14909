"""Command lines: LLaMA2-Accessory's flags and Hydra's overrides, mixed freely.

Each flag is rewritten to a Hydra override *in place of* sys.argv, before Hydra sees it (Lightning relaunches ranks with
sys.argv). argparse in front of Hydra would swallow overrides after a list flag and read `--cfg` as an abbreviation.
"""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from accessory.config import CONFIG_DIR, Config, describe, find_file, to_typed
from accessory.errors import OwnError, UserError, suggest


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
    Flag("resume", "resume"),
    Flag("data_parallel", "strategy.data_parallel"),
    Flag("model_parallel_size", "strategy.model_parallel_size"),
]
# Hydra's own options, less those that name another configuration folder: check_composition knows ours only.
_HYDRA_SWITCHES = ("--multirun", "-m", "--run", "-r", "--resolve", "--hydra-help", "--version")
_HYDRA_VALUES = ("--cfg", "-c", "--package", "-p", "--experimental-rerun")
_HYDRA_INFO = ("--info", "-i")
_INFO_TOPICS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_QUESTIONS = ("--cfg", "-c", *_HYDRA_INFO, "--hydra-help", "--version")
# Launchers of the ancestor's time passed these; torchrun says the same in the environment.
_IGNORED_VALUES = ("--local_rank", "--local-rank", "--world_size", "--dist_url")
_IGNORED_SWITCHES = ("--dist_on_itp",)


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
        if given:
            raise UserError(f"--{flag.name} is a switch and takes no value (found {given[0]!r})")
        return f"{flag.key}={flag.kind}"
    values = list(given)
    while not given and words and not _ends_list(words[0]):
        values.append(words.popleft())
    return f"{flag.key}=[{','.join(map(quote, values))}]"


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


def check_composition(config_name: str, schema: type, argv: list[str]) -> None:
    """Compose once by ourselves, so that a wrong key or value is one line with a suggestion, not Hydra's report."""
    own = [word for word in argv if not word.startswith("-") and not word.lstrip("+~").startswith(("hydra.", "hydra/"))]
    overrides = [_first_choice(word) for word in own]
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            node = compose(config_name, overrides=overrides)
        known = [key for key, _, _ in describe(schema)]
        if unknown := [key for key in _leaves(OmegaConf.to_container(node)) if key not in known]:
            raise UserError(_unknown_key(unknown[0], known))
        if not any(word.partition("=")[0] in _QUESTIONS for word in argv):
            to_typed(node, schema)
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(error, schema)) from None


def parse_override(word: str) -> Override:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        raise UserError(f"{word}: expected --flag value, key=value or group=option; --help lists them") from None


def _first_choice(word: str) -> str:
    """An override as it is; of a sweep the first value."""
    override = parse_override(word)
    if override.value() is None and (options := _options(override.key_or_group)):
        raise UserError(f"{word}: a group needs an option; known: {', '.join(options)}")
    if not override.is_sweep_override():
        return word
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()), '')}"


def _leaves(content: dict, prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _unknown_key(wanted: str, known: list[str]) -> str:
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in known}
    near = f" (did you mean {by_leaf[wanted]}?)" if wanted in by_leaf else suggest(wanted, known)
    return f"unknown key {wanted}{near}; --help lists all keys"


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def _explain(error: Exception, schema: type) -> str:
    """Hydra's and OmegaConf's messages in one line, with the nearest known key or option."""
    text = f"{error}\n{error.__cause__ or ''}"
    if missing := re.search(r"Could not find '(.+)/(.+)'", text):
        group, name = missing.groups()
        options = _options(group)
        return f"{group}={name}: no such option{suggest(name, options)}; known: {', '.join(options)}"
    if unknown := re.search(r"Could not override '(.+)'", text):
        return _unknown_key(unknown[1], [key for key, _, _ in describe(schema)])
    key = re.search(r"full_key: (\S+)", text)
    reason = str(error.__cause__ or error).splitlines()[0]
    return f"{key[1]}: {reason}" if key else reason


def help_text(program: str, flags: list[Flag], schema: type) -> str:
    rows = {key: (default, meaning) for key, default, meaning in describe(schema)}
    groups = [p.name for p in sorted(CONFIG_DIR.iterdir()) if _options(p.name)]
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
    lines += [f"  {group:<14} {' | '.join(_options(group))}" for group in groups]
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
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is saved", file=sys.stderr, flush=True)
        sys.exit(130)
    except UserError as error:
        first = int(os.environ.get("RANK", 0)) == 0 or int(os.environ.get("LOCAL_RANK", 0)) == 0
        if first or isinstance(error, OwnError):
            if sys.stderr.isatty():
                print(file=sys.stderr)  # off the line of a progress bar
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def launch(config_name: str, flags: list[Flag], schema: type, job: Callable[[DictConfig], None]) -> None:
    """Rewrite sys.argv, check it, and hand over to Hydra."""

    def main() -> None:
        if any(word in ("--help", "-h") for word in sys.argv[1:]):
            print(help_text(Path(sys.argv[0]).name, flags, schema))
            return
        words = rewrite(sys.argv[1:], flags)
        sys.argv[1:] = adopt_lora_settings(words) if schema is Config else words
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
