"""Which scheme each linear of a model gets: the settings, and layer_config's exceptions."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from torch import nn

from accessory.errors import UserError, suggest
from accessory.json_text import parse_json
from accessory.models import read_json
from accessory.models.llama import Block, Llama
from accessory.models.qformer import CastLinear, QFormerLlama
from accessory.quantization.formats import check_layout
from accessory.quantization.packed import BITS, Scheme
from accessory.quantize_options import Format, Method, QuantizeConfig

SCHEME_KEYS = ("bits", "group_size", "sym")
_PRESET = re.compile(r"W(\d+)A16(?:G(\d+))?", re.IGNORECASE)  # auto-round's names: W4A16, W2A16G64
UNQUANTIZED_BITS = 16


def default_scheme(config: QuantizeConfig) -> Scheme:
    """bits, group_size and sym of the configuration, with each method's own defaults."""
    stated = {"bits": config.bits, "group_size": config.group_size, "sym": config.sym}
    if config.method is Method.int8:  # whose only free setting is the format
        if config.scheme is not None or config.bits not in (4, 8):  # 4: unset
            what = f"bits={config.bits}" if config.scheme is None else f"--scheme {config.scheme}"
            raise UserError(f"{what}: method=int8 is 8 bits, a scale a row; leave it out, or choose method=rtn")
        stated = {"bits": 8, "group_size": -1, "sym": True}
    if config.scheme in ("sym", "asym"):  # AutoRound's word of 2024
        stated["sym"] = config.scheme == "sym"
    elif config.scheme is not None:
        stated |= _preset(config.scheme, f"--scheme {config.scheme}")
    wide = stated["bits"] == 8
    tuned = config.method is Method.autoround
    if stated["group_size"] is None:
        stated["group_size"] = -1 if wide else 128 if tuned else 64
    if stated["sym"] is None:
        stated["sym"] = wide or tuned
    return _checked(Scheme(**stated), "bits, group_size, sym")


def output_formats(config: QuantizeConfig) -> list[Format]:
    """The formats of `format`, which may name several."""
    names = [name.strip() for name in config.format.split(",")]
    known = [kind.value for kind in Format]
    for name in names:
        if name not in known:
            raise UserError(f"--format {name}: no such format{suggest(name, known)}; known: {', '.join(known)}")
    if len(set(names)) < len(names):
        raise UserError(f"--format {config.format}: names a format twice")
    return [Format(name) for name in names]


def _preset(name: str, where: str) -> dict[str, int]:
    found = _PRESET.fullmatch(name)
    if found is None:
        raise UserError(f"{where}: expected a name like W4A16 or W2A16G64; or set bits, group_size, sym")
    return {"bits": int(found[1])} | ({"group_size": int(found[2])} if found[2] else {})


def _layer_config(config: QuantizeConfig) -> dict[str, Any]:
    """The value of layer_config: a mapping, its JSON, or a JSON file."""
    stated = config.layer_config
    if isinstance(stated, str):
        if not stated.strip():
            raise UserError("--layer_config: is empty; give JSON or a JSON file, or leave it out")
        try:
            stated = parse_json(stated)
        except json.JSONDecodeError as error:
            if stated.lstrip().startswith(("{", "[")):
                raise UserError(f"--layer_config: not valid JSON ({error.msg}, character {error.pos})") from None
            stated = read_json(Path(stated).expanduser())
    if stated is not None and not isinstance(stated, dict):
        raise UserError(f"--layer_config: expected {{linear: settings}}, found {type(stated).__name__}")
    return stated or {}


def _checked(scheme: Scheme, where: str) -> Scheme:
    if scheme.bits not in BITS:
        raise UserError(f"{where}: bits={scheme.bits}: must be one of {', '.join(map(str, BITS))}")
    if scheme.group_size != -1 and scheme.group_size < 1:
        raise UserError(f"{where}: group_size={scheme.group_size}: must be above 0, or -1 for one scale a row")
    if scheme.bits == 8 and not scheme.sym:
        raise UserError(f"{where}: bits=8 sym=false: 8 bit weights are symmetric; use sym=true")
    return scheme


def block_linear_shapes(model: Llama) -> dict[str, tuple[int, int]]:
    """(out, in) of the decoder blocks' linears by name."""
    return {
        f"{path}.{name}": (linear.out_features, linear.in_features)
        for path, block in model.named_modules()
        if isinstance(block, Block)
        for name, linear in block.named_modules()
        if isinstance(linear, nn.Linear)
    }


def image_linear_shapes(model: Llama) -> dict[str, tuple[int, int]]:
    """The same of vision model, Q-Former and projector."""
    if not isinstance(model, QFormerLlama):
        return {}
    return {
        name: (linear.out_features, linear.in_features)
        for name, linear in model.named_modules()
        if type(linear) in (nn.Linear, CastLinear) and name.startswith(("qformer.", "qformer_proj."))
    }


def schemes_of(model: Llama, config: QuantizeConfig) -> dict[str, Scheme]:
    """name -> scheme of every linear that is to be quantized; those left in 16 bit are absent. Raises UserError where a
    linear and its scheme or the format do not fit."""
    shapes = block_linear_shapes(model)
    if config.vision:
        if not isinstance(model, QFormerLlama):
            raise UserError("vision=true: this model is language-only")
        shapes |= image_linear_shapes(model)
    if config.quant_lm_head:
        if model.config.tie_word_embeddings:
            raise UserError("quant_lm_head=true: this model's output layer is its embedding (tied)")
        shapes["lm_head"] = (model.config.vocab_size, model.config.hidden_size)
    return assign_schemes(shapes, config)


def assign_schemes(shapes: dict[str, tuple[int, int]], config: QuantizeConfig) -> dict[str, Scheme]:
    """The same for linears (out, in) by name."""
    usual, is_stated = default_scheme(config), _states_group_size(config)
    chosen: dict[str, Optional[Scheme]] = {
        name: usual if is_stated else _fitting(usual, in_features) for name, (_, in_features) in shapes.items()
    }
    for key, stated in _layer_config(config).items():
        for name in _matching(key, list(shapes)):
            chosen[name] = _stated_scheme(stated, usual if is_stated else _fitting(usual, shapes[name][1]), key)
    schemes = {name: scheme for name, scheme in chosen.items() if scheme is not None}
    if not schemes:
        raise UserError("layer_config leaves every linear in 16 bit: nothing to quantize")
    for name, scheme in schemes.items():
        _check_group(name, shapes[name], scheme)
        for kind in output_formats(config):
            check_layout(name, shapes[name], scheme, kind)
    return schemes


def _states_group_size(config: QuantizeConfig) -> bool:
    return config.group_size is not None or (config.scheme is not None and "G" in config.scheme.upper())


def _fitting(scheme: Scheme, in_features: int) -> Scheme:
    """The scheme with the largest default group that divides the inputs."""
    sizes = [size for size in (128, 64, 32) if size <= scheme.group_size and in_features % size == 0]
    return scheme if scheme.group_size == -1 else replace(scheme, group_size=sizes[0] if sizes else -1)


def _check_group(name: str, shape: tuple[int, int], scheme: Scheme) -> None:
    size, in_features = scheme.group_size, shape[1]
    if size == -1 or in_features % size == 0:
        return
    fitting = next((n for n in (64, 32, 16) if in_features % n == 0 and n < size), -1)
    rule = json.dumps({f"{name.rsplit('.', 1)[-1]}$": {"group_size": fitting}})
    raise UserError(
        f"group_size={size} does not divide the {in_features} inputs of {name}; leave group_size out (each linear gets "
        f"the largest of 128, 64, 32 that fits), set group_size={fitting}, or for these alone --layer_config '{rule}'"
    )


def _matching(key: str, names: list[str]) -> list[str]:
    """The linears that a key of layer_config means: one by name, those whose names hold it, or those that it matches as
    a regular expression. As an expression alone, `layers.1.` would be `layers.10` too."""
    if key in names:
        return [key]
    if found := [name for name in names if key in name]:
        return found
    try:
        found = [name for name in names if re.search(key, name)]
    except re.error as error:
        raise UserError(f"layer_config: {key!r} is no linear's name and no regular expression ({error})") from None
    if not found:
        raise UserError(f"layer_config: {key!r} matches no linear{suggest(key, names)}; the first is {names[0]}")
    return found


def _stated_scheme(stated: Any, usual: Scheme, key: str) -> Optional[Scheme]:
    """A value of layer_config: {"bits": 8, …} or auto-round's W8A16; None: 16 bit."""
    where = f"layer_config {key!r}"
    if isinstance(stated, str):
        stated = _preset(stated, f"{where}: {stated!r}")
    if not isinstance(stated, dict):
        raise UserError(f"{where}: {stated!r}: expected bits, group_size, sym")
    for name, value in stated.items():
        if name not in SCHEME_KEYS:
            raise UserError(f"{where}: unknown key {name!r}{suggest(str(name), SCHEME_KEYS)}")
        if not isinstance(value, bool if name == "sym" else int) or (name != "sym" and isinstance(value, bool)):
            raise UserError(
                f"{where}: {name}={value!r}: must be {'true or false' if name == 'sym' else 'a whole number'}"
            )
    if stated.get("bits") == UNQUANTIZED_BITS:
        return None
    bits = stated.get("bits", usual.bits)
    sym = stated.get("sym", usual.sym or bits == 8)
    return _checked(Scheme(bits, stated.get("group_size", usual.group_size), sym), where)
