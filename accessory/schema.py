"""Dataclasses as the schema of a command: a composed node made typed, and the settings with what they mean.

A field's meaning is the string under it, which Python itself drops; it is read from the source.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from accessory.config import Config
from accessory.errors import UserError


def to_typed(node: DictConfig, schema: type = Config) -> Any:
    """Hydra's composed node -> typed `schema`; a missing or ill-typed value becomes one line."""
    missing = sorted(OmegaConf.missing_keys(node))
    if missing:
        names = ", ".join(f"--{key.rsplit('.', 1)[-1]} ({key})" for key in missing)
        raise UserError(f"not set: {names}; give the flag or the override key=value")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, by field name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    return {
        node.target.id: inspect.cleandoc(after.value.value)
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }


def describe(cls: type, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(key, default, meaning) of every setting below `cls`, in the order of the source."""
    rows = []
    for item in fields(cls):
        default = item.default_factory() if callable(item.default_factory) else item.default
        if is_dataclass(default):
            rows += describe(type(default), f"{prefix}{item.name}.")
        else:
            rows.append((prefix + item.name, default, field_docs(cls)[item.name]))
    return rows


def boolean_keys(cls: type, prefix: str = "") -> dict[str, str]:
    """The switches among the settings, and what else than true and false they may be, in words."""
    found = {}
    for item in fields(cls):
        default = item.default_factory() if callable(item.default_factory) else item.default
        if is_dataclass(default):
            found |= boolean_keys(type(default), f"{prefix}{item.name}.")
        elif item.type in ("bool", "Optional[bool]"):
            found[prefix + item.name] = " or null (unset)" if item.type.startswith("Optional") else ""
    return found
