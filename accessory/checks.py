"""What a run's settings must fulfil, one function a part of the schema.

A check is (whether it is wrong, what to tell): the setting by its flag or key, its value, and what would be right.
"""

from __future__ import annotations

import math

from accessory.config import (
    CALIBRATED,
    LINEARS,
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
from accessory.errors import suggest

Check = tuple[bool, str]


def find_problems(config: Config) -> list[str]:
    """A line for everything in `config` that cannot work; none where it can."""
    checks = [
        *_quantization(config),
        *_recipe(config.recipe),
        *_train(config.train),
        *_optim(config.optim),
        (not 0 <= config.seed < 2**32, f"--seed {config.seed}: must be in [0, {2**32 - 1}]"),
        *_data(config.data),
        *_save(config.save),
        *_logger(config.logger),
        *_strategy(config.strategy),
    ]
    return [message for wrong, message in checks if wrong]


def _quantization(config: Config) -> list[Check]:
    """The only checks across parts: what is frozen in few bits can neither train nor take an update."""
    method, vision = config.quantization.method, config.quantization.vision
    quantized = method is not QuantMethod.none
    return [
        *_unused(config.quantization),
        (
            quantized and not config.only_save_trainable,
            f"quantization={method.value} (--quant) needs --only_save_trainable: "
            "a quantized base cannot take the update without losing it",
        ),
        (
            config.recipe.vision and vision,
            "recipe.vision=true with quantization.vision=true (or a base whose vision model is quantized): "
            "a quantized vision model cannot train; choose one",
        ),
        (
            vision and not quantized,
            "quantization.vision=true: there is nothing to store it in; choose quantization=nf4 (--quant)",
        ),
    ]


def _unused(quantization: QuantizationConfig) -> list[Check]:
    """Settings that a method does not look at: with bits=8 and rtn, say, a run would go on with 4."""
    users = {
        "blocksize": (QuantMethod.nf4,),
        "double_quant": (QuantMethod.nf4,),
        "group_size": (QuantMethod.rtn, *CALIBRATED),
        **dict.fromkeys(("bits", "sym", "dataset", "nsamples", "seqlen"), CALIBRATED),
        "iters": (QuantMethod.autoround,),
    }
    usual, method = QuantizationConfig(), quantization.method
    return [
        (
            method not in methods and getattr(quantization, key) != getattr(usual, key),
            f"quantization.{key}={getattr(quantization, key)}: does nothing with quantization={method.value}; it is of "
            f"{', '.join(user.value for user in methods)}",
        )
        for key, methods in users.items()
    ]


def _recipe(recipe: RecipeConfig) -> list[Check]:
    return [
        (
            not (recipe.norm or recipe.bias or recipe.lora or recipe.projector or recipe.vision),
            f"recipe {recipe.name!r} trains nothing",
        ),
        (
            recipe.lora and not recipe.targets,
            "recipe.targets=[]: LoRA needs linears; name some or use recipe.lora=false",
        ),
        *((recipe.lora, message) for message in unknown_targets(recipe)),
        (recipe.rank < 1, f"recipe.rank={recipe.rank}: must be at least 1"),
        (not 0 <= recipe.dropout < 1, f"recipe.dropout={recipe.dropout}: must be in [0, 1)"),
    ]


def unknown_targets(recipe: RecipeConfig) -> list[str]:
    """What to tell of targets that are no linears of a block."""
    return [
        f"recipe.targets: {target!r} matches no linear of the model{suggest(target, LINEARS)}; "
        f"it has {', '.join(LINEARS)}"
        for target in recipe.targets
        if target not in LINEARS
    ]


def _train(train: TrainConfig) -> list[Check]:
    return [
        (train.batch_size < 1, f"--batch_size {train.batch_size}: must be at least 1"),
        (train.accum_iter < 1, f"--accum_iter {train.accum_iter}: must be at least 1"),
        (train.epochs < 1, f"--epochs {train.epochs}: must be at least 1"),
        (
            train.max_steps == 0 or train.max_steps < -1,
            f"train.max_steps={train.max_steps}: must be at least 1, or -1 for all epochs",
        ),
        (not train.val_interval > 0, f"train.val_interval={train.val_interval}: must be above 0"),
        (
            train.val_interval > 1 and not float(train.val_interval).is_integer(),
            f"train.val_interval={train.val_interval}: above 1 it must be whole",
        ),
    ]


def _optim(optim: OptimConfig) -> list[Check]:
    return [
        *((not math.isfinite(value), f"--{name} {value}: must be finite") for name, value in vars(optim).items()),
        (optim.lr <= 0, f"--lr {optim.lr}: must be above 0"),
        (optim.min_lr < 0, f"--min_lr {optim.min_lr}: must not be negative"),
        (optim.weight_decay < 0, f"--weight_decay {optim.weight_decay}: must not be negative"),
        (optim.warmup_epochs < 0, f"--warmup_epochs {optim.warmup_epochs}: must not be negative"),
    ]


def _data(data: DataConfig) -> list[Check]:
    return [
        (data.num_workers < 0, f"--num_workers {data.num_workers}: must not be negative"),
        (data.max_words < 2, f"--max_words {data.max_words}: must be at least 2"),
        (not 0 <= data.val_fraction < 1, f"data.val_fraction={data.val_fraction}: must be in [0, 1)"),
        (data.val_items is not None and data.val_items < 1, f"data.val_items={data.val_items}: must be at least 1"),
    ]


def _save(save: SaveConfig) -> list[Check]:
    return [
        (save.epoch_interval < 1, f"--save_interval {save.epoch_interval}: must be at least 1"),
        (save.step_interval < 1, f"--save_iteration_interval {save.step_interval}: must be at least 1"),
        (save.keep < 1, f"save.keep={save.keep}: must be at least 1"),
    ]


def _logger(logger: LoggerConfig) -> list[Check]:
    steps = logger.log_every_n_steps
    return [(steps < 1, f"logger.log_every_n_steps={steps}: must be at least 1")]


def _strategy(strategy: StrategyConfig) -> list[Check]:
    size = strategy.model_parallel_size
    return [
        (
            size != 1,
            f"--model_parallel_size {size}: tensor parallelism is not offered; use 1, and --data_parallel fsdp where "
            "the base is too large for one GPU",
        )
    ]
