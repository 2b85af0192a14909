"""The typed configuration of a run: what it refuses."""

from __future__ import annotations

import math

import pytest

from accessory.config import (
    Config,
    DataConfig,
    LoggerConfig,
    OptimConfig,
    QuantizationConfig,
    QuantMethod,
    RecipeConfig,
    SaveConfig,
    StrategyConfig,
    TrainConfig,
)
from accessory.errors import UserError, suggest


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
        ({"data": DataConfig(val_items=0)}, "data.val_items=0: must be at least 1"),
        ({"save": SaveConfig(epoch_interval=0)}, "--save_interval 0: must be at least 1"),
        ({"save": SaveConfig(step_interval=0)}, "--save_iteration_interval 0: must be at least 1"),
        ({"save": SaveConfig(keep=0)}, "save.keep=0: must be at least 1"),
        ({"strategy": StrategyConfig(model_parallel_size=2)}, "--model_parallel_size 2: .*use 1, .*fsdp"),
        ({"data": DataConfig(num_workers=-1)}, "--num_workers -1: must not be negative"),
        ({"seed": -1}, r"--seed -1: must be in \[0, 4294967295\]"),
        ({"seed": 2**32}, r"--seed 4294967296: must be in \[0, 4294967295\]"),
        ({"optim": OptimConfig(weight_decay=-0.1)}, "--weight_decay -0.1: must not be negative"),
        ({"train": TrainConfig(max_steps=0)}, "train.max_steps=0: must be at least 1, or -1"),
        ({"train": TrainConfig(max_steps=-2)}, "train.max_steps=-2: must be at least 1, or -1"),
        ({"train": TrainConfig(val_interval=1.5)}, "train.val_interval=1.5: above 1 it must be whole"),
        ({"train": TrainConfig(val_interval=math.nan)}, "train.val_interval=nan: must be above 0"),
        ({"recipe": RecipeConfig(lora=True, targets=["q_proj", "v_porj"])}, "'v_porj' matches .* mean v_proj"),
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
            strategy=StrategyConfig(model_parallel_size=2),
        )
    told = ("--batch_size 0", "--lr -1.0", "recipe.rank=0", "--model_parallel_size 2")
    assert all(name in str(caught.value) for name in told)
    assert "\n" not in str(caught.value)


def test_quantized_base_is_accepted_when_only_trainables_are_saved():
    config = Config(quantization=QuantizationConfig(QuantMethod.nf4), only_save_trainable=True)
    assert config.quantization.method is QuantMethod.nf4


@pytest.mark.parametrize(
    ("word", "hint"),
    [("batch_sise", " (did you mean batch_size?)"), ("zzz", ""), ("accum", " (did you mean accum_iter?)")],
)
def test_suggestion_is_the_nearest_known_word_or_nothing(word, hint):
    assert suggest(word, ["batch_size", "accum_iter", "lr"]) == hint
