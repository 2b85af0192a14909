"""The typed configuration: what it refuses, and that every setting says what it means."""

from __future__ import annotations

import math

import pytest
from omegaconf import MISSING, OmegaConf

from accessory.config import (
    Config,
    DataConfig,
    DataParallel,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    QuantizationConfig,
    QuantMethod,
    RecipeConfig,
    SaveConfig,
    StrategyConfig,
    TrainConfig,
    describe,
    field_docs,
    to_typed,
)
from accessory.errors import UserError, suggest
from accessory.tools import EvaluateConfig, ExportConfig

SCHEMAS = [Config, EvaluateConfig, ExportConfig]


def node(**settings):
    return OmegaConf.merge(
        OmegaConf.structured(Config),
        {"model": {"pretrained_path": ["base"]}, "data": {"data_config": "d.yaml"}},
        settings,
    )


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"quantization": QuantizationConfig(QuantMethod.nf4)}, r"--quant\) needs --only_save_trainable"),
        ({"recipe": RecipeConfig(name="idle", norm=False, bias=False, lora=False)}, "'idle' trains nothing"),
        ({"recipe": RecipeConfig(rank=0)}, "recipe.rank=0: must be at least 1"),
        ({"recipe": RecipeConfig(dropout=1.0)}, r"recipe.dropout=1.0: must be in \[0, 1\)"),
        ({"train": TrainConfig(batch_size=0)}, "--batch_size 0: must be at least 1"),
        ({"train": TrainConfig(accum_iter=0)}, "--accum_iter 0: must be at least 1"),
        ({"train": TrainConfig(epochs=0)}, "--epochs 0: must be at least 1"),
        ({"train": TrainConfig(val_interval=0.0)}, "train.val_interval=0.0: must be above 0"),
        ({"optim": OptimConfig(lr=0.0)}, "--lr 0.0: must be above 0"),
        ({"optim": OptimConfig(min_lr=-1.0)}, "--min_lr -1.0: must not be negative"),
        ({"optim": OptimConfig(warmup_epochs=-1.0)}, "--warmup_epochs -1.0: must not be negative"),
        ({"data": DataConfig(max_words=1)}, "--max_words 1: must be at least 2"),
        ({"data": DataConfig(val_fraction=1.0)}, r"data.val_fraction=1.0: must be in \[0, 1\)"),
        ({"save": SaveConfig(epoch_interval=0)}, "--save_interval 0: must be at least 1"),
        ({"save": SaveConfig(step_interval=0)}, "--save_iteration_interval 0: must be at least 1"),
        ({"save": SaveConfig(keep=0)}, "save.keep=0: must be at least 1"),
        ({"strategy": StrategyConfig(model_parallel_size=2)}, "--model_parallel_size 2: .*use 1 .*fsdp"),
        ({"strategy": StrategyConfig(DataParallel.fsdp)}, "--data_parallel fsdp is not part .*--data_parallel sdp"),
        ({"data": DataConfig(num_workers=-1)}, "--num_workers -1: must not be negative"),
        ({"seed": -1}, r"--seed -1: must be in \[0, 4294967295\]"),
        ({"seed": 2**32}, r"--seed 4294967296: must be in \[0, 4294967295\]"),
        ({"optim": OptimConfig(weight_decay=-0.1)}, "--weight_decay -0.1: must not be negative"),
        ({"train": TrainConfig(max_steps=0)}, "train.max_steps=0: must be at least 1, or -1"),
        ({"train": TrainConfig(max_steps=-2)}, "train.max_steps=-2: must be at least 1, or -1"),
        ({"train": TrainConfig(val_interval=1.5)}, "train.val_interval=1.5: above 1 it must be whole"),
        ({"train": TrainConfig(val_interval=math.nan)}, "train.val_interval=nan: must be above 0"),
        ({"recipe": RecipeConfig(lora=True, targets=[])}, r"recipe.targets=\[\]: LoRA needs linears"),
        ({"logger": LoggerConfig(log_every_n_steps=0)}, "logger.log_every_n_steps=0: must be at least 1"),
    ],
)
def test_setting_that_cannot_work_is_refused_by_name_and_value(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        Config(**settings)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["lr", "min_lr", "weight_decay", "warmup_epochs", "clip_grad"])
def test_number_that_is_not_finite_is_refused(name, value):
    with pytest.raises(UserError, match=f"--{name} {value}: must be finite"):
        Config(optim=OptimConfig(**{name: value}))


@pytest.mark.parametrize(
    "settings",
    [
        {"train": TrainConfig(val_interval=2.0)},
        {"train": TrainConfig(max_steps=1)},
        {"data": DataConfig(num_workers=0)},
        {"seed": 2**32 - 1},
        {"optim": OptimConfig(clip_grad=-1.0)},
        {"recipe": RecipeConfig(targets=[])},
    ],
)
def test_setting_at_the_edge_of_what_works_is_accepted(settings):
    assert isinstance(Config(**settings), Config)


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError) as caught:
        Config(
            train=TrainConfig(batch_size=0),
            optim=OptimConfig(lr=-1.0),
            recipe=RecipeConfig(rank=0),
            strategy=StrategyConfig(DataParallel.fsdp, model_parallel_size=2),
        )
    told = ("--batch_size 0", "--lr -1.0", "recipe.rank=0", "--data_parallel fsdp is", "--model_parallel_size 2")
    assert all(name in str(caught.value) for name in told)
    assert "\n" not in str(caught.value)


def test_quantized_base_is_accepted_when_only_trainables_are_saved():
    config = Config(quantization=QuantizationConfig(QuantMethod.nf4), only_save_trainable=True)
    assert config.quantization.method is QuantMethod.nf4


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


@pytest.mark.parametrize(
    ("word", "hint"),
    [("batch_sise", " (did you mean batch_size?)"), ("zzz", ""), ("accum", " (did you mean accum_iter?)")],
)
def test_suggestion_is_the_nearest_known_word_or_nothing(word, hint):
    assert suggest(word, ["batch_size", "accum_iter", "lr"]) == hint
