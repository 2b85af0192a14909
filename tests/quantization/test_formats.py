"""Int4 folders against auto-round itself: what it writes is read here, what is written here it reads, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from auto_round_job import IDS
from int4_folders import act_order, linear_names, run_auto_round, write_base, write_int4
from safetensors.torch import load_file, save_file
from torch import Tensor

import accessory
from accessory.bases import fingerprint, open_folder
from accessory.errors import UserError
from accessory.quantization import QuantLinear, block_linears, formats
from accessory.quantization.int4 import Int4
from accessory.quantization.packed import Packed, Scheme
from accessory.quantization.stored import read_statement
from accessory.quantize_options import Format

Q_PROJ, V_PROJ, DOWN = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.0.mlp.down_proj",
)


@pytest.fixture(scope="session")
def base(tmp_path_factory, tokenizer_file) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tokenizer_file)


# --- written by auto-round -------------------------------------------------------------------------------------------

MIXED = {DOWN: {"bits": 16}, V_PROJ: {"bits": 8, "group_size": -1}}
RUNS = [  # bits, group size, sym, exceptions; the formats, and how auto-round itself reads each
    (4, 32, True, None, {"auto_round": "model", "auto_gptq": "model", "auto_awq": "awq"}),
    (2, 32, True, None, {"auto_round": "model", "auto_gptq": "gptq"}),
    (3, 64, True, None, {"auto_round": "model", "auto_gptq": "gptq"}),
    (8, -1, True, None, {"auto_round": "model", "auto_gptq": "gptq"}),
    (4, 32, False, None, {"auto_round:gptqmodel": "model", "auto_round:auto_gptq": "gptq", "auto_gptq": "gptq"}),
    (4, 32, False, {DOWN: {"bits": 16}}, {"auto_awq": "awq"}),
    (4, 64, False, None, {"auto_round": "awq"}),
    (2, 32, False, None, {"auto_round:gptqmodel": "model"}),
    (3, -1, False, None, {"auto_round:gptqmodel": "model"}),
    (4, 32, True, MIXED, {"auto_round": "model"}),
    (4, 32, True, MIXED, {"auto_gptq": "model"}),
]
CASES = {
    f"{format}-{'sym' if run[2] else 'asym'}-{run[0]}{'-mixed' if run[3] else ''}": (format, *run[:4], how)
    for run in RUNS
    for format, how in run[4].items()
}


@pytest.fixture(scope="session")
def by_auto_round(base, tmp_path_factory) -> Path:
    """Folders by auto-round, and beside each what its own layers make of it."""
    root = tmp_path_factory.mktemp("auto_round")
    jobs = []
    for bits, group_size, sym, exceptions, ways in RUNS:
        cases = {case: own for case, own in CASES.items() if own[1:5] == (bits, group_size, sym, exceptions)}
        out = {own[0]: str(root / case) for case, own in cases.items() if own[0] in ways}
        settings = {"bits": bits, "group_size": group_size, "sym": sym, "layer_config": exceptions}
        jobs.append({"base": str(base), "out": out} | settings)
    for case, (*_, how) in CASES.items():
        jobs.append({"folder": str(root / case), "how": how, "out": str(root / f"{case}.safetensors")})
    run_auto_round(jobs, root)
    for case in CASES:
        (root / case / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    return root


def assert_same_weights(folder: Path, expected: dict[str, Tensor]) -> None:
    """Those that the loaded model computes with, and those that auto-round's layers do."""
    model = accessory.load_model(folder)
    found = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear) and isinstance(m.backend, Int4)}
    assert found.keys() == expected.keys() - {"logits"}
    for name, layer in found.items():
        assert torch.equal(layer.dequantize(torch.float16), expected[name]), name
    if "logits" in expected:  # computed in fp16 there
        torch.testing.assert_close(model(torch.tensor(IDS)), expected["logits"], atol=0.03, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_folder_by_auto_round_has_its_weights_bit_for_bit_and_its_logits(by_auto_round, case):
    assert_same_weights(by_auto_round / case, load_file(by_auto_round / f"{case}.safetensors"))


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_input_gradients_are_those_of_auto_rounds_weights_bit_for_bit(by_auto_round, case):
    linears = block_linears(accessory.load_model(by_auto_round / case))
    for name, weight in load_file(by_auto_round / f"{case}.safetensors").items():
        if name != "logits":
            x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0)).requires_grad_()
            same = x.detach().requires_grad_()
            y, expected = linears[name](x), F.linear(same, weight.float())
            assert torch.equal(y, expected), name
            y.square().sum().backward()
            expected.square().sum().backward()
            assert torch.equal(x.grad, same.grad), name


@pytest.mark.parametrize("case", CASES)
def test_a_folder_by_auto_round_is_recognised_for_what_it_is(by_auto_round, case):
    _, bits, group_size, sym, exceptions, _ = CASES[case]
    packed = open_folder(by_auto_round / case).packed
    usual = {
        name: backend for name, backend in packed.items() if name.removesuffix(".weight") not in (exceptions or {})
    }
    assert set(usual.values()) == {Int4(bits, group_size, sym)}
    assert len(packed) == (7 if not exceptions else 6)


@pytest.mark.parametrize("case", ["auto_round-sym-4-mixed", "auto_gptq-sym-4-mixed"])
def test_linears_with_other_bits_and_in_16_bit_are_held_so(by_auto_round, case, base):
    linears = block_linears(accessory.load_model(by_auto_round / case, dtype=torch.bfloat16))
    assert linears[V_PROJ].backend == Int4(8, -1, True)
    assert linears[DOWN].backend.name == "none"
    stored = load_file(base / "model.safetensors")[f"{DOWN}.weight"]
    assert torch.equal(linears[DOWN].dense, stored.to(torch.bfloat16))


def test_one_model_has_one_fingerprint_in_all_formats_and_another_in_16_bit(by_auto_round, base):
    formats_of_one = ("auto_round:gptqmodel-asym-4", "auto_round:auto_gptq-asym-4")
    found = {fingerprint(open_folder(by_auto_round / case)) for case in formats_of_one}
    assert len(found) == 1
    assert found != {fingerprint(open_folder(base))}
    assert found != {fingerprint(open_folder(by_auto_round / "auto_round-sym-4"))}


# --- written here ----------------------------------------------------------------------------------------------------

OURS = {  # format, scheme, exceptions; and how auto-round reads it
    "auto_round-sym-4": (Format.auto_round, Scheme(4, 32, True), None, "model"),
    "auto_round-sym-3": (Format.auto_round, Scheme(3, 32, True), None, "model"),
    "auto_round-sym-8": (Format.auto_round, Scheme(8, -1, True), None, "model"),
    "auto_round-asym-4": (Format.auto_round, Scheme(4, 64, False), None, "model"),
    "auto_round-asym-2": (Format.auto_round, Scheme(2, 32, False), None, "model"),
    "auto_round-asym-3": (Format.auto_round, Scheme(3, -1, False), None, "model"),
    "auto_round-mixed": (
        Format.auto_round,
        Scheme(4, 32, False),
        {DOWN: None, V_PROJ: Scheme(8, -1, True), "lm_head": Scheme(4, 64, False)},
        "model",
    ),
    "auto_gptq-sym-4": (Format.auto_gptq, Scheme(4, 32, True), None, "model"),
    "auto_gptq-mixed": (Format.auto_gptq, Scheme(4, 32, True), {DOWN: None, V_PROJ: Scheme(8, -1, True)}, "model"),
    "auto_gptq-asym-4": (Format.auto_gptq, Scheme(4, 32, False), None, "gptq"),
    "auto_gptq-asym-2": (Format.auto_gptq, Scheme(2, 32, False), None, "gptq"),
    "auto_gptq-act_order": (Format.auto_gptq, Scheme(4, 32, False), None, "gptq"),
    "auto_awq-sym-4": (Format.auto_awq, Scheme(4, 32, True), None, "awq"),
    "auto_awq-asym-4": (Format.auto_awq, Scheme(4, 32, False), {DOWN: None}, "awq"),
}


@pytest.fixture(scope="session")
def by_us(base, tmp_path_factory) -> dict[str, tuple[Path, dict[str, Packed], dict[str, Tensor]]]:
    """Our folders, what was put into them, and what auto-round makes of them."""
    root = tmp_path_factory.mktemp("ours")
    written, jobs = {}, []
    for case, (format, scheme, exceptions, how) in OURS.items():
        reorder = {"quantize": act_order, "reordered": True} if "act_order" in case else {}
        written[case] = write_int4(base, root / case, format, scheme, exceptions, **reorder)
        jobs.append({"folder": str(root / case), "how": how, "out": str(root / f"{case}.safetensors")})
    run_auto_round(jobs, root)
    return {case: (root / case, written[case], load_file(root / f"{case}.safetensors")) for case in OURS}


@pytest.mark.parametrize("case", OURS)
def test_auto_round_reads_our_folder_bit_for_bit(by_us, case):
    _, written, found = by_us[case]
    assert found.keys() - {"logits"} == written.keys()
    for name, packed in written.items():
        assert torch.equal(found[name], packed.dequantize(torch.float16)), name


@pytest.mark.parametrize("case", OURS)
def test_our_folder_gives_the_same_model_here_as_there(by_us, case):
    folder, _, found = by_us[case]
    assert_same_weights(folder, found)


@pytest.mark.parametrize("case", OURS)
def test_our_folder_is_read_as_it_was_written_code_by_code(by_us, case):
    folder, written, _ = by_us[case]
    opened = open_folder(folder)
    for name, packed in written.items():
        found = opened.tensor(f"{name}.weight")
        assert torch.equal(found.codes, packed.codes) and torch.equal(found.zeros, packed.zeros)
        assert torch.equal(found.scales, packed.scales) and found.bits == packed.bits
        assert (found.g_idx is None) == (packed.g_idx is None)
        assert found.g_idx is None or torch.equal(found.g_idx, packed.g_idx)


@pytest.mark.parametrize("case", OURS)
def test_the_first_row_of_a_packed_weight_is_that_of_the_whole(by_us, case):
    opened = open_folder(by_us[case][0])
    for name in opened.packed:
        assert torch.equal(opened.first_row(name), opened.tensor(name).dequantize(torch.float32)[:1])


def test_a_quantized_output_layer_is_written_and_read(base, tmp_path):
    written = write_int4(base, tmp_path / "int4", exceptions={"lm_head": Scheme(4, 64, False)})
    content = json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"]
    assert content["extra_config"] == {"lm_head": {"bits": 4, "group_size": 64, "sym": False, "data_type": "int"}}
    model = accessory.load_model(tmp_path / "int4")
    assert model.lm_head.backend == Int4(4, 64, False)
    assert torch.equal(model.lm_head.dequantize(torch.float32), written["lm_head"].dequantize(torch.float32))


def test_a_16_bit_model_and_its_dequantized_folder_give_equal_logits(by_us, base, tmp_path):
    """The reference: the same model, its weights replaced by what the whole numbers are worth."""
    folder, written, _ = by_us["auto_round-mixed"]
    tensors = load_file(base / "model.safetensors")
    tensors |= {f"{name}.weight": packed.dequantize(torch.float32) for name, packed in written.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    ids = torch.tensor(IDS)
    assert torch.equal(accessory.load_model(folder)(ids), accessory.load_model(tmp_path)(ids))


# --- written by others -----------------------------------------------------------------------------------------------


def changed_config(folder: Path, target: Path, **changes) -> Path:
    """The folder with other settings in its quantization_config (None: without one)."""
    target.mkdir()
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    config["quantization_config"] = {key: v for key, v in config["quantization_config"].items() if v is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_zero_points_of_gptq_version_2_are_taken_as_they_are(by_us, tmp_path):
    folder, written, _ = by_us["auto_gptq-asym-4"]
    second = changed_config(folder, tmp_path / "v2", checkpoint_format="gptq_v2")
    found = open_folder(second).tensor(f"{Q_PROJ}.weight")
    assert torch.equal(found.zeros + 1, written[Q_PROJ].zeros)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_an_old_folder_says_how_it_is_packed_in_a_file_of_its_own(by_us, tmp_path, name):
    folder, written, _ = by_us["auto_gptq-asym-4" if name == "quantize_config.json" else "auto_awq-sym-4"]
    old = changed_config(folder, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    stated = {
        "quantize_config.json": {"bits": 4, "group_size": 32, "desc_act": False, "sym": False},
        "quant_config.json": {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"},
    }
    (old / name).write_text(json.dumps(stated[name]))
    del config["quantization_config"]
    (old / "config.json").write_text(json.dumps(config))
    found = open_folder(old)
    assert found.packed[f"{Q_PROJ}.weight"] == Int4(4, 32, False)
    assert torch.equal(found.tensor(f"{Q_PROJ}.weight").codes, written[Q_PROJ].codes)


def test_a_last_group_that_is_shorter_is_read(tmp_path, base):
    """Of 192 inputs in groups of 128, as auto-round packs them."""
    write_int4(base, tmp_path / "whole", Format.auto_round, Scheme(4, 96, False), {DOWN: Scheme(4, 96, False)} | {
        name: None for name in linear_names(load_file(base / "model.safetensors")) if "down" not in name
    })  # fmt: skip
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}
    uneven = changed_config(tmp_path / "whole", tmp_path / "uneven", group_size=128)
    (uneven / "model.safetensors").unlink()
    save_file(tensors, uneven / "model.safetensors")
    weight = open_folder(uneven).tensor(f"{DOWN}.weight")
    assert weight.g_idx.tolist() == [0] * 128 + [1] * 64
    row = (weight.codes[0].float() - weight.zeros[0, weight.g_idx].float()) * weight.scales[0, weight.g_idx].float()
    torch.testing.assert_close(weight.dequantize(torch.float32)[0], row, rtol=1e-3, atol=0)


def test_biases_of_zeros_that_gptq_tools_add_are_left_out(by_us, tmp_path):
    folder = by_us["auto_gptq-sym-4"][0]
    added = changed_config(folder, tmp_path / "biased")
    tensors = load_file(folder / "model.safetensors") | {f"{Q_PROJ}.bias": torch.zeros(64, dtype=torch.float16)}
    (added / "model.safetensors").unlink()
    save_file(tensors, added / "model.safetensors")
    assert f"{Q_PROJ}.bias" not in open_folder(added).names
    save_file(tensors | {f"{Q_PROJ}.bias": torch.ones(64)}, added / "model.safetensors")
    assert f"{Q_PROJ}.bias" in open_folder(added).names


# --- what a format cannot hold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("reordered", [False, True])
def test_a_zero_point_of_0_becomes_1_and_only_the_largest_code_changes_its_value(bits, reordered):
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (32, 64), generator=g, dtype=torch.uint8)
    zeros = torch.randint(0, 3, (32, 2), generator=g, dtype=torch.uint8)
    g_idx = torch.randperm(64, generator=g).int() // 32 if reordered else None
    packed = Packed(codes, torch.rand(32, 2, generator=g).half(), zeros, bits, g_idx)
    stored = formats.representable(packed, Format.auto_gptq)
    assert stored.zeros.min() == 1
    before, after = (p.dequantize(torch.float32) for p in (packed, stored))
    group = g_idx if reordered else torch.arange(64) // 32
    cut = (codes == 2**bits - 1) & (zeros[:, group] == 0)
    assert torch.equal(before[~cut], after[~cut]) and (before[cut] != after[cut]).all()
    assert formats.representable(packed, Format.auto_round) is packed


@pytest.mark.parametrize(
    ("shape", "scheme", "format", "line"),
    [
        (
            (64, 72),
            Scheme(4, 24),
            Format.auto_round,
            r"l: 64 x 72 does not fit format=auto_round.*multiples of 32; leave",
        ),
        (
            (72, 64),
            Scheme(3, 32),
            Format.auto_gptq,
            r"l: 72 x 64 does not fit.*layer_config \{\"l\": \{\"bits\": 16\}\}",
        ),
        ((64, 64), Scheme(8, -1, True), Format.auto_awq, "auto_awq holds 4 bits only, l has 8; use format=auto_round"),
        ((64, 96), Scheme(4, 64), Format.auto_awq, "group_size=64 does not divide its 96 inputs"),
    ],
)
def test_a_linear_that_a_format_cannot_hold_is_refused_with_the_way_out(shape, scheme, format, line):
    with pytest.raises(UserError, match=line):
        formats.check_layout("l", shape, scheme, format)


def test_awq_folders_have_one_scheme_and_no_order():
    schemes = {"model.layers.0.mlp.up_proj": Scheme(4, 64), "lm_head": Scheme(4, 64)}
    with pytest.raises(UserError, match="auto_awq: lm_head cannot differ"):
        formats.quantization_config(Format.auto_awq, Scheme(4, 64), schemes)
    with pytest.raises(UserError, match="auto_round cannot hold columns in another order"):
        formats.quantization_config(Format.auto_round, Scheme(4, 64), schemes, reordered=True)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"quant_method": "bitsandbytes"}, r"quant_method='bitsandbytes' cannot be read; auto-round, gptq and awq can"),
        (
            {"quant_method": "fp8"},
            r"config\.json: quantization_config: quant_method='fp8' cannot be read.*16-bit model",
        ),
        ({"quant_method": None}, "quant_method=None cannot be read"),
        ({"bits": 5}, "bits=5: must be one of 2, 3, 4, 8"),
        ({"bits": True}, "bits=True: must be"),
        ({"group_size": 0}, "group_size=0: must be above 0"),
        ({"group_size": 48}, "does not fit the tensors of .*down_proj: group_size=48, but 6 groups for 192 inputs"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin' cannot be read; known are gptq, gptq_v2"),
        ({"data_type": "mx_fp"}, "only weights in whole numbers"),
        ({"quant_method": "awq"}, "does not fit the tensors of"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_one_line(by_us, tmp_path, changes, line):
    with pytest.raises(UserError, match=line) as caught:
        open_folder(changed_config(by_us["auto_gptq-sym-4"][0], tmp_path / "changed", **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("leaf", "change", "line"),
    [
        ("qzeros", None, f"{Q_PROJ}.qzeros is missing, which {Q_PROJ}.qweight needs"),
        ("scales", None, f"{Q_PROJ}.scales is missing"),
        ("scales", lambda t: t[:1].clone(), "does not fit the tensors of .*q_proj: qzeros has shape"),
        ("qweight", lambda t: t.to(torch.int16), r"q_proj: qweight is I16"),
        ("qweight", lambda t: t[:-1].clone(), "does not fit the tensors of"),
        ("g_idx", lambda t: t + 7, "g_idx names group"),
    ],
)
def test_broken_tensors_are_named(by_us, tmp_path, leaf, change, line):
    broken = changed_config(by_us["auto_gptq-sym-4"][0], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensor = tensors.pop(f"{Q_PROJ}.{leaf}")
    (broken / "model.safetensors").unlink()
    save_file(tensors | ({} if change is None else {f"{Q_PROJ}.{leaf}": change(tensor)}), broken / "model.safetensors")
    with pytest.raises(UserError, match=line):
        open_folder(broken)


def test_packed_weights_without_a_configuration_are_refused(by_us, tmp_path):
    changed = changed_config(by_us["auto_gptq-sym-4"][0], tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    del config["quantization_config"]
    (changed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"holds packed weights .*no quantization_config says how"):
        open_folder(changed)


def test_a_configuration_without_packed_weights_is_refused(base, tmp_path):
    config = json.loads((base / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    config["quantization_config"]["group_size"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(base / "model.safetensors")
    with pytest.raises(UserError, match="says that weights are packed, but the folder holds no …qweight"):
        open_folder(tmp_path)


def test_exceptions_are_names_or_patterns_and_names_come_first():
    stated = read_statement(
        {
            "quant_method": "auto-round",
            "bits": 4,
            "group_size": 128,
            "sym": True,
            "extra_config": {".*v_proj": {"group_size": 32}, V_PROJ: {"group_size": 64, "sym": False}, "(": {}},
        },
        "config.json",
    )
    assert stated.scheme(V_PROJ) == Scheme(4, 64, False)
    assert stated.scheme("model.layers.1.self_attn.v_proj") == Scheme(4, 32, True)
    assert stated.scheme(Q_PROJ) == Scheme(4, 128, True)
