"""accessory-estimate: a run's settings, and a few of its own. Mistakes in them are told before torch is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Optional

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from accessory.checks import find_problems
from accessory.cli import launch, run_command
from accessory.config import (
    DataConfig,
    FastConfig,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    QuantizationConfig,
    RecipeConfig,
    ResumeConfig,
    SaveConfig,
    StrategyConfig,
    TrainConfig,
)
from accessory.errors import UserError, suggest
from accessory.flags import FINETUNE_FLAGS, Flag
from accessory.folders import require_folders
from accessory.schema import to_typed
from accessory.sizes import SHAPES


@dataclass
class EstimateConfig:
    """What accessory-estimate is asked: the settings of a run, and its own."""

    size: Optional[str] = None
    """Model by its size: 7b, 13b or 70b (LLaMA2's shapes), or tiny; otherwise --pretrained_path or --llama_config
    describe it, by config.json or params.json alone, without weights."""
    ranks: int = 1
    """GPUs that the run will have; with strategy.data_parallel=fsdp the quantized weights are spread over them."""
    gpu_memory: Optional[float] = None
    """GiB of a GPU's memory to fit into. Unset: the GPU's that is here; without one a table of common sizes."""
    prompt: int = 512
    """Tokens of a prompt when answering."""
    new_tokens: int = 128
    """Tokens of an answer."""
    prompts: int = 1
    """Prompts that are answered together."""
    json: Optional[str] = None
    """JSON file for the figures, in bytes."""
    output_dir: str = "output_dir"
    """Accepted, as all that follows, so that a training command can be asked about as it is."""
    seed: int = 0
    """Accepted."""
    only_save_trainable: bool = True
    """Accepted."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(pretrained_path=[]))
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(data_config=""))
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    fast: FastConfig = field(default_factory=FastConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def __post_init__(self) -> None:
        problems = find_problems(self)
        for name in ("ranks", "prompt", "new_tokens", "prompts"):
            if getattr(self, name) < 1:
                problems.append(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.gpu_memory is not None and not 0 < self.gpu_memory < math.inf:
            problems.append(f"--gpu_memory {self.gpu_memory:g}: must be above 0 (GiB)")
        if self.size is not None and self.size not in SHAPES:
            known = ", ".join(SHAPES)
            problems.append(f"--model {self.size}: no such size{suggest(self.size, SHAPES)}; known: {known}")
        if self.size is not None and self.model.pretrained_path:
            problems.append(f"--model {self.size} with --pretrained_path: leave one of them out")
        if problems:
            raise UserError("; ".join(problems))


ESTIMATE_FLAGS = [
    Flag("model", "size"),
    Flag("ranks", "ranks"),
    Flag("gpu_memory", "gpu_memory"),
    Flag("prompt", "prompt"),
    Flag("new_tokens", "new_tokens"),
    Flag("prompts", "prompts"),
    Flag("json", "json"),
    *FINETUNE_FLAGS,
]


def _estimate(node: DictConfig) -> None:
    config = to_typed(node, EstimateConfig)
    require_folders(config.model.pretrained_path)
    from accessory.estimate.command import estimate

    estimate(config)


def estimate_main() -> None:
    """accessory-estimate, scripts/estimate.py."""
    launch("estimate", ESTIMATE_FLAGS, EstimateConfig, lambda node: run_command(lambda: _estimate(node), goes_on=False))


ConfigStore.instance().store("estimate_schema", node=EstimateConfig)
