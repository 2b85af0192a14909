"""Which linear gets which scheme."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig

from accessory.errors import UserError
from accessory.models import build_model
from accessory.quantization.job.schemes import default_scheme, output_formats, schemes_of
from accessory.quantization.packed import Scheme
from accessory.quantize_options import Method, QuantizeConfig

DOWN = "model.layers.1.mlp.down_proj"


def model(hidden: int = 576, mlp: int = 1536, tied: bool = True, layers: int = 2):
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=tied,
    )
    return build_model(config)


def schemes(**settings) -> dict[str, Scheme]:
    tied, layers = settings.pop("tied", True), settings.pop("layers", 2)
    return schemes_of(model(tied=tied, layers=layers), QuantizeConfig(output_dir="x", **settings))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": Method.autoround}, Scheme(4, 128, True)),
        ({"method": Method.rtn}, Scheme(4, 64, False)),
        ({"method": Method.awq}, Scheme(4, 64, False)),
        ({"method": Method.gptq, "bits": 8}, Scheme(8, -1, True)),
        ({"method": Method.int8}, Scheme(8, -1, True)),
        ({"method": Method.gptq, "bits": 3, "group_size": 32, "sym": True}, Scheme(3, 32, True)),
        ({"method": Method.autoround, "scheme": "asym"}, Scheme(4, 128, False)),
        ({"method": Method.autoround, "scheme": "W2A16G64"}, Scheme(2, 64, True)),
    ],
)
def test_each_method_has_the_defaults_of_its_authors(settings, expected):
    assert default_scheme(QuantizeConfig(output_dir="x", **settings)) == expected


def test_where_no_group_size_is_set_each_linear_gets_the_largest_usual_one_that_divides_its_inputs():
    found = schemes(method=Method.autoround)
    assert {name: s.group_size for name, s in found.items() if ".1." in name} == {
        **{f"model.layers.1.self_attn.{p}_proj": 64 for p in "qkvo"},
        "model.layers.1.mlp.gate_proj": 64,
        "model.layers.1.mlp.up_proj": 64,
        DOWN: 128,
    }


def test_a_group_size_that_was_set_and_does_not_divide_is_refused_with_the_way_out():
    with pytest.raises(
        UserError, match=r"group_size=128 does not divide the 576 inputs of model.layers.0.*group_size=64"
    ):
        schemes(method=Method.autoround, group_size=128)


def test_layer_config_changes_one_linear_by_name_and_many_by_pattern():
    rules = {DOWN: {"bits": 8}, r"layers\.0\..*(gate|up)_proj": {"bits": 2, "group_size": 32}, "v_proj": {"bits": 16}}
    found = schemes(method=Method.rtn, layer_config=json.dumps(rules))
    assert found[DOWN] == Scheme(8, 64, True)
    assert found["model.layers.0.mlp.up_proj"] == Scheme(2, 32, False)
    assert not any("v_proj" in name for name in found)
    assert found["model.layers.1.mlp.up_proj"] == Scheme(4, 64, False)


def test_a_key_of_layer_config_is_text_before_it_is_an_expression():
    """As an expression, `layers.1.` would mean the layers 10 to 12 too."""
    found = schemes(layers=13, method=Method.rtn, layer_config={"layers.1.": {"bits": 16}})
    assert not any("layers.1." in name for name in found)
    assert len([name for name in found if "layers.1" in name]) == 3 * 7


def test_layer_config_may_be_a_file_and_may_use_auto_rounds_names(tmp_path):
    (tmp_path / "layers.json").write_text(json.dumps({DOWN: "W8A16"}))
    assert schemes(method=Method.rtn, layer_config=str(tmp_path / "layers.json"))[DOWN].bits == 8


def test_the_output_layer_is_quantized_only_where_it_is_one_of_its_own():
    assert schemes(tied=False, quant_lm_head=True)["lm_head"].bits == 4
    with pytest.raises(UserError, match="output layer is its embedding"):
        schemes(quant_lm_head=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits=5: must be one of 2, 3, 4, 8"),
        ({"bits": 8, "sym": False}, "bits=8 sym=false"),
        ({"group_size": 0}, "group_size=0: must be above 0, or -1"),
        ({"scheme": "W4A8"}, "--scheme W4A8: expected a name like W4A16"),
        ({"layer_config": "{"}, "not valid JSON"),
        ({"layer_config": ""}, "--layer_config: is empty; give JSON or a JSON file"),
        ({"layer_config": "[" * 10**5}, r"--layer_config: not valid JSON \(nested too deeply"),
        ({"layer_config": '{"a":' * 10**5}, r"--layer_config: not valid JSON \(nested too deeply"),
        ({"layer_config": {"dwn_proj$": {"bits": 8}}}, "matches no linear"),
        ({"layer_config": {"(": {"bits": 8}}}, "no regular expression"),
        ({"layer_config": {DOWN: {"bit": 8}}}, r"unknown key 'bit' \(did you mean bits"),
        ({"layer_config": {DOWN: {"bits": "8"}}}, "bits='8': must be a whole number"),
        ({"layer_config": {DOWN: {"sym": 1}}}, "sym=1: must be true or false"),
        ({"layer_config": {"proj": {"bits": 16}}}, "nothing to quantize"),
        ({"vision": True}, "vision=true: this model is language-only"),
        ({"bits": 2, "format": "auto_awq"}, "auto_awq holds 4 bits only"),
        ({"method": Method.int8, "scheme": "W4A16G64"}, "--scheme W4A16G64: method=int8 is 8 bits"),
        ({"method": Method.int8, "bits": 2}, "bits=2: method=int8 is 8 bits"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        schemes(**settings)


def test_formats_are_a_list_of_known_names():
    config = QuantizeConfig(output_dir="x", format="auto_round, auto_gptq")
    assert [kind.value for kind in output_formats(config)] == ["auto_round", "auto_gptq"]
    with pytest.raises(UserError, match=r"--format auto_gtpq: no such format \(did you mean auto_gptq"):
        output_formats(QuantizeConfig(output_dir="x", format="auto_gtpq"))
    with pytest.raises(UserError, match="names a format twice"):
        output_formats(QuantizeConfig(output_dir="x", format="auto_awq,auto_awq"))


def test_shapes_that_a_format_cannot_hold_are_refused_before_any_work():
    narrow = model(hidden=72, mlp=96)
    with pytest.raises(UserError, match="does not fit format=auto_round"):
        schemes_of(narrow, QuantizeConfig(output_dir="x", method=Method.rtn, group_size=-1))
    assert all(p.device == torch.device("meta") for p in narrow.parameters())
