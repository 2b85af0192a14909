"""How files hold weights in whole numbers: the layouts of auto_round, auto_gptq and auto_awq.

Per linear there are qweight, qzeros (both int32), scales (float16) and sometimes g_idx (int32, a column's group). Codes
are a stream of bits, lowest first, that fills 32-bit words:

    auto_gptq    qweight [in * b / 32, out] along the inputs, qzeros [groups, out * b / 32] along the outputs, each zero
                 point less 1 (GPTQ's first version)
    auto_round   the same; where not all weights are symmetric, zero points as they are (packing auto_round:gptqmodel)
    auto_awq     4 bits only: qweight [in, out / 8] and qzeros [groups, out / 8] along the outputs, the eight of a word
                 in the order 0 2 4 6 1 3 5 7 (AWQ's GEMM kernel)

scales are [groups, out] in all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from accessory.errors import UserError
from accessory.quantization.int4 import pack_codes, unpack_codes
from accessory.quantization.packed import Packed, Scheme
from accessory.quantize_options import Format
from accessory.shards import is_image_part

LEAVES = ("qweight", "qzeros", "scales", "g_idx")
WORD = 32
ALIGNMENT = 32  # of rows and columns: other readers compute the files' shapes with it
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which column each nibble of a word holds


@dataclass(frozen=True)
class Layout:
    """interleaved: AWQ's, along the outputs; zero_offset: by how much the stored zero points are too small."""

    interleaved: bool
    zero_offset: int


GPTQ_V1, GPTQ_V2, AWQ = Layout(False, 1), Layout(False, 0), Layout(True, 0)


def all_symmetric(schemes: Iterable[Scheme]) -> bool:
    """What `sym` is below: a folder has one layout for all its weights."""
    return all(scheme.sym for scheme in schemes)


def layout_of(format: Format, sym: bool) -> Layout:
    """sym: whether every weight of the folder is symmetric."""
    if format is Format.auto_awq:
        return AWQ
    return GPTQ_V1 if sym or format is Format.auto_gptq else GPTQ_V2


def check_layout(name: str, shape: tuple[int, int], scheme: Scheme, format: Format) -> None:
    """Refuse a linear [out, in] that the format cannot hold."""
    out, in_features = shape
    leave = f'leave it in 16 bit: layer_config {{"{name}": {{"bits": 16}}}}'
    if format is Format.auto_awq and scheme.bits != 4:
        raise UserError(f"format=auto_awq holds 4 bits only, {name} has {scheme.bits}; use format=auto_round")
    if scheme.group_size != -1 and in_features % scheme.group_size:
        raise UserError(
            f"{name}: group_size={scheme.group_size} does not divide its {in_features} inputs; choose one that does, "
            f"-1 (one scale a row), or {leave}"
        )
    # The image part is read by accessory alone: there whole words will do.
    unit = WORD // math.gcd(scheme.bits, WORD) if is_image_part(name) else ALIGNMENT
    if out % unit or in_features % unit:
        raise UserError(
            f"{name}: {out} x {in_features} does not fit format={format.value} with {scheme.bits} bits, which needs "
            f"multiples of {unit}; {leave}"
        )


def representable(packed: Packed, format: Format) -> Packed:
    """The nearest weight that files of this format hold: GPTQ's first version has no zero point 0 (it would be stored
    as -1). Such groups move up by one, zero point and codes alike, and only their largest code is cut."""
    if format is not Format.auto_gptq or not bool((packed.zeros == 0).any()):
        return packed
    lift = (packed.zeros == 0).to(torch.uint8)
    group = packed.g_idx
    if group is None:
        group = torch.arange(packed.shape[1], device=lift.device) // packed.group_size
    up = lift.index_select(1, group)
    codes = torch.minimum(packed.codes, 2**packed.bits - 1 - up) + up
    return Packed(codes, packed.scales, packed.zeros + lift, packed.bits, packed.g_idx)


def pack(name: str, packed: Packed, format: Format, sym: bool) -> dict[str, Tensor]:
    """A linear's tensors by their names on disk. packed: `representable`; sym: whether every weight of the folder is
    symmetric (see `all_symmetric`)."""
    layout = layout_of(format, sym)
    zeros = (packed.zeros - layout.zero_offset).t()
    if layout.interleaved:
        assert packed.g_idx is None and packed.bits == 4
        qweight, qzeros = _words(_interleave(packed.codes.t()), 4), _words(_interleave(zeros), 4)
    else:
        qweight, qzeros = _words(packed.codes, packed.bits).t(), _words(zeros, packed.bits)
    tensors = {"qweight": qweight, "qzeros": qzeros, "scales": packed.scales.t()}
    if format is Format.auto_gptq or layout == GPTQ_V2:
        in_order = columns_in_order(packed.shape[1], packed.group_size)
        tensors["g_idx"] = in_order if packed.g_idx is None else packed.g_idx
    return {f"{name}.{leaf}": tensor.to("cpu").contiguous() for leaf, tensor in tensors.items()}


def unpack(tensors: dict[str, Tensor], layout: Layout, bits: int, group_size: int) -> Packed:
    """The inverse of `pack`. tensors: by leaf; g_idx may lack. group_size: -1 for one group."""
    if layout.interleaved:
        codes, zeros = (_deinterleave(unpack_codes(_bytes(tensors[leaf]), bits)) for leaf in ("qweight", "qzeros"))
        codes = codes.t().contiguous()
    else:
        codes = unpack_codes(_bytes(tensors["qweight"].t().contiguous()), bits)
        zeros = unpack_codes(_bytes(tensors["qzeros"]), bits)
    in_features = codes.shape[1]
    ordered = columns_in_order(in_features, group_size if group_size != -1 else in_features)
    g_idx = tensors.get("g_idx", ordered).to(torch.int32)
    is_even = group_size == -1 or in_features % group_size == 0
    scales = tensors["scales"].to(torch.float16)
    return Packed(
        codes,
        scales.t().contiguous(),
        (zeros + layout.zero_offset).t().contiguous(),
        bits,
        None if is_even and torch.equal(g_idx, ordered) else g_idx,
    )


def columns_in_order(in_features: int, group_size: int) -> Tensor:
    """g_idx of neighbours in groups: int32 [in]; the last group may be shorter."""
    return torch.arange(in_features, dtype=torch.int32) // group_size


def weight_name(name: str) -> str:
    """A tensor's name on disk -> that of the weight it is a part of."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.weight" if leaf in LEAVES else name


def _words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n, m] -> int32 [n, m * bits / 32]."""
    return pack_codes(codes.contiguous(), bits).flatten().view(torch.int32).view(len(codes), -1)


def _bytes(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.uint8)


def _interleave(columns: Tensor) -> Tensor:
    return columns.unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2)


def _deinterleave(columns: Tensor) -> Tensor:
    places = [_AWQ_ORDER.index(i) for i in range(8)]
    return columns.unflatten(-1, (-1, 8))[..., places].flatten(-2)


# --- config.json -----------------------------------------------------------------------------------------------------


def quantization_config(
    format: Format,
    default: Scheme,
    schemes: dict[str, Scheme],
    unquantized: Iterable[str] = (),
    reordered: bool = False,
) -> dict[str, Any]:
    """config.json's "quantization_config" as auto-round, transformers and gptqmodel read it.

    default: the scheme of linears that are not named; schemes: of every quantized linear by name (the image part's are
    no concern of other readers and left out); unquantized: linears of the decoder blocks left in 16 bit; reordered:
    whether a g_idx is not in order.
    """
    if reordered and format is not Format.auto_gptq:
        raise UserError(
            f"format={format.value} cannot hold columns in another order (gptq.actorder without static_groups); use "
            "format=auto_gptq, or gptq.static_groups=true"
        )
    symmetric = all_symmetric(schemes.values())  # of all, as the tensors are packed
    schemes = {name: scheme for name, scheme in schemes.items() if not is_image_part(name)}
    others: dict[str, Optional[Scheme]] = {
        name: scheme for name, scheme in schemes.items() if scheme != default or name == "lm_head"
    }
    others |= dict.fromkeys((name for name in unquantized if not is_image_part(name)), None)
    content: dict[str, Any] = {
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": default.sym,
        "data_type": "int",
    }
    if format is Format.auto_awq:
        return content | _awq_config(default, others)
    if format is Format.auto_gptq:
        return content | _gptq_config(schemes, others, reordered)
    content |= {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq" if symmetric else "auto_round:gptqmodel",
        "block_name_to_quantize": "model.layers",
    }
    return content | ({"extra_config": {name: _fields(scheme) for name, scheme in others.items()}} if others else {})


def _fields(scheme: Optional[Scheme]) -> dict[str, Any]:
    if scheme is None:
        return {"bits": 16, "data_type": "float"}
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym, "data_type": "int"}


def _gptq_config(schemes: dict[str, Scheme], others: dict[str, Optional[Scheme]], reordered: bool) -> dict[str, Any]:
    def rule(name: str, scheme: Optional[Scheme]) -> tuple[str, dict[str, Any]]:
        exactly = f"^{re.escape(name)}$"
        if scheme is None:
            return f"-:{exactly}", {}
        return f"+:{exactly}", {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}

    content = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "desc_act": reordered,
        "true_sequential": False,
        "damp_percent": 0.01,
        "lm_head": "lm_head" in schemes,
    }
    quantized = {_kind(name) for name in schemes if name != "lm_head"}
    if {_kind(name) for name, scheme in others.items() if scheme is None} - quantized:
        content["modules_in_block_to_quantize"] = [sorted(quantized)]  # for readers that do not know `dynamic`
    return content | ({"dynamic": dict(rule(*item) for item in others.items())} if others else {})


def _kind(name: str) -> str:
    """A linear's name within its block."""
    return re.sub(r"^model\.layers\.\d+\.", "", name)


def _awq_config(default: Scheme, others: dict[str, Optional[Scheme]]) -> dict[str, Any]:
    for name, scheme in others.items():
        if scheme is not None:
            raise UserError(f"format=auto_awq: {name} cannot differ from the rest ({scheme}); use format=auto_round")
    return {
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": not default.sym,
        "modules_to_not_convert": [*others, "lm_head"],
    }
