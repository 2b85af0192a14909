"""Command lines besides training: accessory-evaluate and accessory-export."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from accessory.cli import MODEL_FLAGS, Flag, launch, run_command
from accessory.config import (
    BadImages,
    DataConfig,
    ModelConfig,
    Precision,
    PromptType,
    QuantizationConfig,
    QuantMethod,
    to_typed,
)
from accessory.errors import UserError


class ExportFormat(str, Enum):
    hf = "hf"
    peft = "peft"


@dataclass
class EvaluateConfig:
    """What accessory-evaluate measures."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    precision: Precision = Precision.bf16
    """Compute type: bf16, fp16 or tf32 (fp32)."""
    device: Optional[str] = None
    """cuda, cuda:1, cpu; unset: cuda where there is one."""
    text: Optional[str] = None
    """Plain text file: perplexity over windows of seqlen tokens."""
    data_config: Optional[str] = None
    """Data YAML: perplexity of the answers."""
    prompt_type: Optional[PromptType] = None
    """Prompt of data files that name none."""
    dialog: bool = False
    """Items are conversations: {"conversations": [{"from": "human", "value": …}, …]}."""
    image_root: Optional[str] = None
    """Folder of the images whose data YAML entry has no root."""
    bad_images: BadImages = BadImages.stop
    """At an image that is missing, broken or too large: stop, or skip its items and count them."""
    seqlen: int = 512
    """Tokens in a window of text, and the longest data item."""
    max_tokens: int = -1
    """Use only so many tokens of the text (-1: all)."""
    batch_size: int = 4
    """Windows or items at a time."""
    output: Optional[str] = None
    """JSON file for the figures."""

    def __post_init__(self) -> None:
        if (self.text is None) == (self.data_config is None):
            raise UserError("give one of --text FILE (plain text) or --data_config YAML (instruction data)")
        if self.seqlen < 2 or self.batch_size < 1:
            raise UserError(f"seqlen={self.seqlen}, batch_size={self.batch_size}: must be at least 2 and 1")


@dataclass
class ExportConfig:
    """What accessory-export writes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    format: ExportFormat = ExportFormat.hf
    """hf: a merged model in 16 bit; peft: the LoRA adapter alone."""
    precision: Precision = Precision.bf16
    """16-bit type of the merged model: bf16 or fp16 (tf32: fp32)."""
    device: str = "cpu"
    """Where the base is dequantized and merged."""
    output_dir: str = MISSING
    """Folder to write; must not hold anything."""


COMMON_FLAGS = [*MODEL_FLAGS, Flag("precision", "precision"), Flag("device", "device")]
EVALUATE_FLAGS = [
    *COMMON_FLAGS,
    Flag("text", "text"),
    Flag("data_config", "data_config"),
    Flag("dialog", "dialog", "true"),
    Flag("image_root", "image_root"),
    Flag("seqlen", "seqlen"),
    Flag("max_tokens", "max_tokens"),
    Flag("batch_size", "batch_size"),
    Flag("output", "output"),
]
EXPORT_FLAGS = [*COMMON_FLAGS, Flag("format", "format"), Flag("output_dir", "output_dir")]


def _open(config: Any) -> Any:
    """The opened folders, with a tokenizer."""
    from accessory.assemble import open_sources
    from accessory.models.tokenizer import require_tokenizer

    sources = open_sources(config.model)
    require_tokenizer(sources)
    return sources


def _load(sources: Any, config: Any) -> Any:
    from accessory.assemble import assemble
    from accessory.models import find_device
    from accessory.strategies import DTYPES

    return assemble(sources, config.quantization, None, find_device(config.device), DTYPES[config.precision])


def _output_file(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {file.parent}; create it first")
    if file.is_dir():
        raise UserError(f"--output {path}: is a folder; name a file in it")
    return file


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Perplexity as the config says; printed, and returned as plain numbers."""
    from accessory.data.datamodule import answer_loader
    from accessory.evaluation import answer_perplexity, read_text, text_perplexity
    from accessory.models.qformer import image_input

    output = _output_file(config.output) if config.output is not None else None
    text = read_text(Path(config.text).expanduser()) if config.text is not None else None
    sources = _open(config)
    if text is None:  # the data's mistakes come before the model
        data = DataConfig(
            data_config=config.data_config,
            dialog=config.dialog,
            max_words=config.seqlen,
            prompt_type=config.prompt_type,
            image_transform=sources.image_transform,
            image_root=config.image_root,
            bad_images=config.bad_images,
            num_workers=0,
        )
        loader = answer_loader(data, sources.tokenizer, config.batch_size, image_input(sources.vision))
        result = answer_perplexity(_load(sources, config), loader)
        what = config.data_config
    else:
        result = text_perplexity(_load(sources, config), text, config.seqlen, config.max_tokens, config.batch_size)
        what = config.text
    figures = {
        "ppl": result.value,
        "nll": result.nll,
        "tokens": result.tokens,
        "data": what,
        "seqlen": config.seqlen,
        "quantization": config.quantization.method.value,
        "pretrained_path": config.model.pretrained_path,
    }
    print(f"ppl on {what} is {result.value:.4f} ({result.tokens:,} predictions, {figures['quantization']})", flush=True)
    if output is not None:
        output.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def export(config: ExportConfig) -> Path:
    from accessory.assemble import trained_on
    from accessory.bases import open_folder
    from accessory.export import check_target, export_hf, export_peft
    from accessory.strategies import DTYPES

    folder = Path(config.output_dir).expanduser()
    check_target(folder)
    if config.quantization.method is QuantMethod.none:  # merge into what the trainables were trained on
        config.quantization = trained_on(open_folder(config.model.pretrained_path[-1])) or config.quantization
    model = _load(_open(config), config)
    if config.format is ExportFormat.peft:
        export_peft(model, folder)
    else:
        export_hf(model, folder, DTYPES[config.precision])
    print(f"wrote {folder}", flush=True)
    return folder


def evaluate_main() -> None:
    launch("evaluate", EVALUATE_FLAGS, EvaluateConfig, lambda node: _job(node, EvaluateConfig, evaluate))


def export_main() -> None:
    launch("export", EXPORT_FLAGS, ExportConfig, lambda node: _job(node, ExportConfig, export))


def _job(node: DictConfig, schema: type, job: Any) -> None:
    run_command(lambda: job(to_typed(node, schema)))


ConfigStore.instance().store("evaluate_schema", node=EvaluateConfig)
ConfigStore.instance().store("export_schema", node=ExportConfig)
