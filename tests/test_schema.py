"""A command's schema: composed nodes become typed, and every setting says what it means."""

from __future__ import annotations

import pytest
from omegaconf import MISSING, OmegaConf

from accessory.config import Config, ModelConfig, Precision, TrainConfig
from accessory.errors import UserError
from accessory.schema import describe, field_docs, to_typed
from accessory.tools import EvaluateConfig, ExportConfig

SCHEMAS = [Config, EvaluateConfig, ExportConfig]


def node(**settings):
    return OmegaConf.merge(
        OmegaConf.structured(Config),
        {"model": {"pretrained_path": ["base"]}, "data": {"data_config": "d.yaml"}},
        settings,
    )


def test_composed_node_becomes_typed():
    config = to_typed(node(train={"precision": "fp16", "epochs": 2}, optim={"lr": "1e-4"}))
    assert type(config) is Config
    assert type(config.train) is TrainConfig
    assert config.train.precision is Precision.fp16
    assert (config.train.epochs, config.optim.lr, config.model.pretrained_path) == (2, 1e-4, ["base"])


def test_every_unset_required_value_is_named_with_its_flag():
    with pytest.raises(UserError) as caught:
        to_typed(OmegaConf.structured(Config))
    assert "--pretrained_path (model.pretrained_path)" in str(caught.value)
    assert "--data_config (data.data_config)" in str(caught.value)


def test_only_what_has_no_sensible_default_is_required():
    assert {key for key, default, _ in describe(Config) if default == MISSING} == {
        "model.pretrained_path",
        "data.data_config",
    }


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_setting_has_a_meaning_under_it(schema):
    for key, _, meaning in describe(schema):
        assert meaning.endswith("."), key


def leaves(node: dict, prefix: str = "") -> list[str]:
    nested = [leaves(v, f"{prefix}{k}.") if isinstance(v, dict) else [prefix + k] for k, v in node.items()]
    return [key for keys in nested for key in keys]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_description_lists_every_setting_once(schema):
    assert [key for key, _, _ in describe(schema)] == leaves(OmegaConf.to_container(OmegaConf.structured(schema)))


def test_meaning_is_the_text_under_the_field():
    assert field_docs(ModelConfig)["pretrained_type"] == "Ignored: the format of a folder is recognised by its files."
