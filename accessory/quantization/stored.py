"""The packed linears of a folder on disk, whoever wrote it: what its configuration says of them, and how to read them.

Sizes follow from the tensors' shapes; the configuration says the layout, the group size and which layers differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.errors import UserError
from accessory.models import read_json
from accessory.quantization.formats import AWQ, GPTQ_V1, GPTQ_V2, LEAVES, Layout, columns_in_order, unpack, weight_name
from accessory.quantization.int4 import Int4
from accessory.quantization.packed import BITS, Packed, Scheme
from accessory.shards import is_image_part

OWN_FILES = {"quantize_config.json": "gptq", "quantization_config.json": None, "quant_config.json": "awq"}  # its method
_DTYPES = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32"), "g_idx": ("I32", "I64")}
_PACKINGS = {
    "auto": GPTQ_V1,
    "auto_round:auto_gptq": GPTQ_V1,
    "auto_round:gptq": GPTQ_V1,
    "auto_round": GPTQ_V2,
    "auto_round:gptqmodel": GPTQ_V2,
    "auto_round:auto_awq": AWQ,
    "auto_round:awq": AWQ,
}
_GPTQ_VERSIONS = {"gptq": GPTQ_V1, "gptq_v2": GPTQ_V2}
_FIRST_ROWS = 32  # the fewest that are whole words in every layout


@dataclass(frozen=True)
class Stated:
    """What a quantization_config says. exceptions: (pattern, settings that differ there), exact names first."""

    source: str
    layout: Layout
    default: Scheme
    exceptions: tuple[tuple[re.Pattern, dict[str, Any]], ...] = ()

    def scheme(self, module: str) -> Scheme:
        """The scheme of a linear by its name."""
        found = next((settings for pattern, settings in self.exceptions if pattern.search(module)), {})
        known = {key: found[key] for key in ("group_size", "sym") if found.get(key) is not None}
        return replace(self.default, **known)


def find_statement(folder: Path, config_json: dict[str, Any]) -> Stated:
    """The folder's quantization_config: in config.json, or in a file of its own as older tools wrote it. Raises
    UserError for methods that are not int4."""
    if config_json.get("quantization_config") is not None:
        return read_statement(config_json["quantization_config"], f"{folder}/config.json: quantization_config")
    for name, method in OWN_FILES.items():
        if (folder / name).is_file():
            content = read_json(folder / name)
            return read_statement(({"quant_method": method} if method else {}) | content, str(folder / name))
    raise UserError(
        f"{folder}: holds packed weights (…qweight), but no quantization_config says how; is config.json whole?"
    )


def read_statement(content: Any, source: str) -> Stated:
    """A quantization_config of auto-round, GPTQ or AWQ."""
    method = content.get("quant_method") if isinstance(content, dict) else None
    if method in ("auto-round", "intel/auto-round"):
        layout = _known(content, source, ("packing_format", "backend"), _PACKINGS, "auto_round:auto_gptq")
        exceptions = content.get("extra_config")
    elif method == "gptq":
        layout = _known(content, source, ("checkpoint_format", "format"), _GPTQ_VERSIONS, "gptq")
        dynamic = content.get("dynamic") or {}
        if not isinstance(dynamic, dict):
            raise UserError(f"{source}: dynamic is a {type(dynamic).__name__}, expected an object")
        exceptions = {key.removeprefix("+:"): value for key, value in dynamic.items() if not key.startswith("-:")}
    elif method == "awq":
        layout = _known(content, source, ("version",), {"gemm": AWQ}, "gemm")
        exceptions = None
    else:
        raise UserError(
            f"{source}: quant_method={method!r} cannot be read; auto-round, gptq and awq can. Name the 16-bit model "
            "instead: it can be quantized while loading (--quant) or once for all (scripts/quantize.py)"
        )
    if exceptions is not None and not isinstance(exceptions, dict):
        raise UserError(f"{source}: exceptions for some linears are a {type(exceptions).__name__}, expected an object")
    if content.get("data_type", "int") != "int" or (content.get("act_bits") or 16) < 16:
        raise UserError(f"{source}: only weights in whole numbers and activations in 16 bit can be read")
    sym = content.get("sym", not content.get("zero_point", True) if method == "awq" else True)
    bits, size = (
        content.get(key, content.get(old)) for key, old in (("bits", "w_bit"), ("group_size", "q_group_size"))
    )
    if bits not in BITS or isinstance(bits, bool):
        raise UserError(f"{source}: bits={bits!r}: must be one of {', '.join(map(str, BITS))}")
    if not isinstance(size, int) or (size < 1 and size != -1):
        raise UserError(f"{source}: group_size={size!r}: must be above 0, or -1 for one scale a row")
    return Stated(source, layout, Scheme(bits, size, bool(sym)), _patterns(exceptions or {}))


def _known(
    content: dict[str, Any], source: str, keys: tuple[str, ...], layouts: dict[str, Layout], default: str
) -> Layout:
    key = next((key for key in keys if content.get(key) is not None), keys[0])
    stated = content.get(key) or default
    if str(stated).lower() not in layouts:
        raise UserError(f"{source}: {key}={stated!r} cannot be read; known are {', '.join(layouts)}")
    return layouts[str(stated).lower()]


def _patterns(exceptions: dict[str, Any]) -> tuple[tuple[re.Pattern, dict[str, Any]], ...]:
    """Keys are names or regular expressions; what is neither matches nothing, as for other readers."""
    exact, loose = [], []
    for key, settings in exceptions.items():
        settings = settings if isinstance(settings, dict) else {}
        exact.append((re.compile(f"^{re.escape(key)}$"), settings))
        try:
            loose.append((re.compile(key), settings))
        except re.error:
            continue
    return (*exact, *loose)


# --- tensors ---------------------------------------------------------------------------------------------------------

Readers = dict[str, Callable[[], Any]]


def merge_packed(
    folder: Path, config_json: dict[str, Any], read: Readers, slices: Readers
) -> tuple[Readers, Readers, dict[str, Int4]]:
    """read, slices: of every tensor of the folder, by its name on disk -> the same with one weight, given as Packed,
    in place of a packed linear's tensors, and how each such weight is held in memory. What slices a packed weight gives
    its first rows only. Raises UserError for what cannot be read, is missing or does not fit."""
    stated = find_statement(folder, config_json)
    modules = sorted(name.removesuffix(".qweight") for name in read if name.endswith(".qweight"))
    if not modules:
        raise UserError(f"{stated.source}: says that weights are packed, but the folder holds no …qweight")
    linears = {f"{module}.weight": _Linear(module, stated, read, slices) for module in modules}
    merged = {name: reader for name, reader in read.items() if weight_name(name) not in linears}
    if not (config_json.get("attention_bias") or config_json.get("mlp_bias")):
        # GPTQ's tools store biases of zeros for linears that have none.
        for name in [f"{module}.bias" for module in modules if not is_image_part(module)]:
            if name in merged and not merged[name]().any():
                del merged[name]
    return (
        merged | {name: linear.whole for name, linear in linears.items()},
        slices | {name: linear.first_rows for name, linear in linears.items()},
        {name: linear.backend for name, linear in linears.items()},
    )


class _Linear:
    """A packed linear on disk: checked when it is found, read when it is asked for."""

    def __init__(self, module: str, stated: Stated, read: Readers, slices: Readers):
        self.module, self.source, self.layout = module, stated.source, stated.layout
        self.names = {leaf: f"{module}.{leaf}" for leaf in LEAVES if f"{module}.{leaf}" in read}
        self._read, self._slices = read, slices
        for leaf in ("qzeros", "scales"):
            if leaf not in self.names:
                raise UserError(f"{self.source}: {module}.{leaf} is missing, which {module}.qweight needs")
        shapes = {leaf: self._shape(leaf) for leaf in self.names}
        groups, out = shapes["scales"]
        self.bits = shapes["qzeros"][1] * 32 // out
        in_features = (
            shapes["qweight"][0] if self.layout.interleaved else shapes["qweight"][0] * 32 // max(self.bits, 1)
        )
        self.group_size = self._group_size(stated, in_features, groups)
        self._check(shapes, (out, in_features), groups)
        self.backend = self._backend(stated, in_features, groups)

    def _shape(self, leaf: str) -> tuple[int, ...]:
        found = self._slices[self.names[leaf]]()
        if found.get_dtype() not in _DTYPES[leaf] or len(found.get_shape()) != (1 if leaf == "g_idx" else 2):
            raise self._odd(f"{leaf} is {found.get_dtype()} {found.get_shape()}")
        return tuple(found.get_shape())

    def _odd(self, what: str) -> UserError:
        return UserError(f"{self.source}: does not fit the tensors of {self.module}: {what}")

    def _group_size(self, stated: Stated, in_features: int, groups: int) -> int:
        if is_image_part(self.module):  # of which other readers, and so the configuration, know nothing
            return -1 if groups == 1 else in_features // groups
        return stated.scheme(self.module).group_size

    def _check(self, shapes: dict[str, tuple[int, ...]], shape: tuple[int, int], groups: int) -> None:
        out, in_features = shape
        words = out * self.bits // 32
        if self.bits not in BITS or (self.layout.interleaved and self.bits != 4):
            raise self._odd(f"{self.bits} bits")
        fits = {
            "qweight": (in_features, words) if self.layout.interleaved else (in_features * self.bits // 32, out),
            "qzeros": (groups, words),
            "scales": (groups, out),
            "g_idx": (in_features,),
        }
        for leaf, found in shapes.items():
            if found != fits[leaf]:
                raise self._odd(f"{leaf} has shape {list(found)}, expected {list(fits[leaf])}")
        size = self.group_size
        if groups != (1 if size == -1 else -(-in_features // size)):
            raise self._odd(f"group_size={size}, but {groups} groups for {in_features} inputs")

    def _backend(self, stated: Stated, in_features: int, groups: int) -> Int4:
        whole = self.group_size if self.group_size != -1 else in_features
        reordered = in_features % whole != 0
        if "g_idx" in self.names:
            g_idx = self._read[self.names["g_idx"]]()
            if not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
                raise self._odd(f"g_idx names group {int(g_idx.max())} of {groups}")
            reordered = reordered or not (g_idx == columns_in_order(in_features, whole)).all()
        return Int4(self.bits, self.group_size, stated.scheme(self.module).sym, bool(reordered))

    def whole(self) -> Packed:
        return self._unpack({leaf: self._read[name]() for leaf, name in self.names.items()})

    def first_rows(self) -> Tensor:
        """At least one row of the weight, from as little of the file as there is to it: float32 [n, in]."""
        out = self._slices[self.names["scales"]]().get_shape()[1]
        rows = min(_FIRST_ROWS, out)
        words = rows * self.bits // 32
        ends = {"qweight": words if self.layout.interleaved else rows, "qzeros": words, "scales": rows}
        parts = {leaf: self._slices[self.names[leaf]]()[:, :end] for leaf, end in ends.items()}
        if "g_idx" in self.names:
            parts["g_idx"] = self._read[self.names["g_idx"]]()
        return self._unpack(parts).dequantize(torch.float32)

    def _unpack(self, tensors: dict[str, Tensor]) -> Packed:
        return unpack(tensors, self.layout, self.bits, self.group_size)
