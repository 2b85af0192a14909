"""Command lines: LLaMA2-Accessory's flags and Hydra's overrides, mixed freely."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, Optional

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from accessory.composition import check_composition
from accessory.config import Config
from accessory.errors import Interrupted, OwnError, UserError
from accessory.flags import FINETUNE_FLAGS, Flag, adopt_lora_settings, rewrite
from accessory.folders import require_folders
from accessory.schema import describe, to_typed
from accessory.shipped import CONFIG_DIR, group_options, groups_of

PATIENCE = 20  # seconds in which the first rank of a machine will have met the same mistake


def help_text(program: str, flags: list[Flag], schema: type, groups: Collection[str] = (), note: str = "") -> str:
    """groups: that the command has; note: a line below the usage."""
    rows = {key: (default, meaning) for key, default, meaning in describe(schema)}
    lines = [
        f"usage: {program} [--flag value …] [key=value …]" + " [group=option …]" * bool(groups),
        *([note] if note else []),
        "",
        "Flags (LLaMA2-Accessory's names):",
    ]
    for flag in flags:
        default, meaning = rows.get(flag.key, (None, f"same as {flag.key}={flag.kind}"))
        value = {"value": " VALUE", "list": " VALUE …"}.get(flag.kind, "")
        lines += [f"  --{flag.name + value:<32} {meaning}"]
    if groups:
        lines += ["", "Groups:"]
        lines += [f"  {group:<14} {' | '.join(group_options(group))}" for group in groups]
    lines += ["", "Keys (default): override as key=value:"]
    for key, (default, meaning) in rows.items():
        shown = getattr(default, "value", default)
        lines.append(f"  {key} ({'required' if shown == '???' else shown}): {meaning}")
    lines += ["", "Hydra: --cfg job prints the composed configuration, --multirun sweeps over comma-separated values."]
    return "\n".join(lines)


def run_command(main: Callable[[], Any], goes_on: bool = True) -> None:
    """Run an entry point; a user's mistake becomes one line on stderr and exit code 2. goes_on: whether the same
    command continues what was stopped."""
    try:
        main()
    except KeyboardInterrupt:
        then = "; the same command goes on from what is saved" if goes_on else ""
        print(f"stopped{then}", file=sys.stderr, flush=True)
        sys.exit(130)
    except Interrupted as stop:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the same once more, while the process is ending
            signal.signal(number, signal.SIG_IGN)
        if int(os.environ.get("RANK", 0)) == 0:
            print(stop.message, file=sys.stderr, flush=True)
        sys.exit(stop.code)
    except UserError as error:
        _tell(str(error), alone=isinstance(error, OwnError))
        sys.exit(2)
    except PermissionError as error:
        if error.filename is None:
            raise
        _tell(f"{error.filename}: {error.strerror}", alone=True)
        sys.exit(2)


def _tell(mistake: str, alone: bool) -> None:
    """One line, once for all ranks of a machine; alone: of a mistake that only this one has met."""
    if alone or int(os.environ.get("RANK", 0)) == 0 or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # off the line of a progress bar
        print(f"error: {mistake}", file=sys.stderr, flush=True)
    else:
        time.sleep(PATIENCE)  # torchrun ends all ranks when one has ended, and the first has yet to tell


def launch(
    config_name: str, flags: list[Flag], schema: type, job: Callable[[DictConfig], None], note: str = ""
) -> None:
    """Rewrite sys.argv, check it, and hand over to Hydra. note: for --help."""

    def main() -> None:
        if any(word in ("--help", "-h") for word in sys.argv[1:]):
            print(help_text(Path(sys.argv[0]).name, flags, schema, groups_of(config_name), note))
            return
        words = rewrite(sys.argv[1:], flags)
        has_recipe = "recipe" in (item.name for item in fields(schema))
        sys.argv[1:] = adopt_lora_settings(words) if has_recipe else words
        check_composition(config_name, schema, sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(job)()

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    run_command(main)


def _finetune_job(node: DictConfig) -> None:
    def job() -> None:
        config = to_typed(node)
        require_folders(config.model.pretrained_path)
        from accessory.finetune import finetune

        sweeps = HydraConfig.get().mode is RunMode.MULTIRUN
        if sweeps:
            config.output_dir = str(Path(config.output_dir) / str(HydraConfig.get().job.num))
        finetune(config, repeated=sweeps)  # the same sweep once more goes on where it was stopped

    run_command(job)


def finetune_main(argv: Optional[list[str]] = None) -> None:
    """accessory-finetune, main_finetune.py."""
    if argv is not None:
        sys.argv[1:] = argv
    launch("finetune", FINETUNE_FLAGS, Config, _finetune_job)


ConfigStore.instance().store("config_schema", node=Config)
