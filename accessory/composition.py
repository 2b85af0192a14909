"""Hydra's composition of overrides, checked before Hydra runs: a mistake is one line with the nearest known word."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from accessory.errors import UserError, suggest
from accessory.schema import boolean_keys, describe, to_typed
from accessory.shipped import CONFIG_DIR, group_options

# Options with which Hydra shows something instead of running: what is required may still be unset.
_QUESTIONS = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--version")


def check_composition(config_name: str, schema: type, argv: list[str]) -> None:
    """Compose once by ourselves, so that a wrong key or value is one line with a suggestion, not Hydra's report."""
    own = [word for word in argv if not word.startswith("-") and not word.lstrip("+~").startswith(("hydra.", "hydra/"))]
    several = any(word in ("--multirun", "-m") for word in argv)
    overrides = [_first_choice(word, several) for word in own]
    _refuse_numbers_for_switches(own, schema)
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


def _refuse_numbers_for_switches(words: list[str], schema: type) -> None:
    """OmegaConf takes any number for true: 3 of something would be lost without a word."""
    switches = boolean_keys(schema)
    for word in words:
        override = parse_override(word)
        if override.key_or_group in switches and type(override.value()) in (int, float):
            raise UserError(f"{word}: must be true, false{switches[override.key_or_group]}")


def _first_choice(word: str, several: bool) -> str:
    """An override as it is; of a sweep the first value. several: whether a sweep is meant (--multirun)."""
    override = parse_override(word)
    options = group_options(override.key_or_group)
    if options and (override.value() is None or isinstance(override.value(), (bool, int, float))):
        raise UserError(f"{word}: a group needs an option; known: {', '.join(options)}")
    if override.is_sweep_override() and not several:
        raise UserError(f"{word}: several values at once; add --multirun for a run with each")
    if override.key_or_group == "resume":
        raise UserError(f"{word}: resume is a group of keys; name the folder with --resume or resume.path=")
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


def _explain(error: Exception, schema: type) -> str:
    """Hydra's and OmegaConf's messages in one line, with the nearest known key or option."""
    text = f"{error}\n{error.__cause__ or ''}"
    if missing := re.search(r"Could not find '(.+)/(.+)'", text):
        group, name = missing.groups()
        options = group_options(group)
        return f"{group}={name}: no such option{suggest(name, options)}; known: {', '.join(options)}"
    if unknown := re.search(r"Could not override '(.+)'", text):
        return _unknown_key(unknown[1], [key for key, _, _ in describe(schema)])
    key = re.search(r"full_key: (\S+)", text)
    reason = str(error.__cause__ or error).splitlines()[0]
    return f"{key[1]}: {reason}" if key else reason
