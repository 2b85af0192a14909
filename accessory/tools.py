"""Command lines besides training: accessory-evaluate and accessory-export."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from accessory.cli import launch, run_command
from accessory.config import (
    BadImages,
    DataConfig,
    ModelConfig,
    Precision,
    PromptType,
    QuantizationConfig,
    QuantMethod,
)
from accessory.errors import UserError
from accessory.files import atomic_file, check_writable
from accessory.flags import MODEL_FLAGS, Flag
from accessory.folders import require_folders
from accessory.schema import to_typed


class ExportFormat(str, Enum):
    hf = "hf"
    peft = "peft"


@dataclass
class EvaluateConfig:
    """What accessory-evaluate measures."""

    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    precision: Optional[Precision] = None
    """Compute type: bf16, fp16 or tf32 (fp32). Unset: bf16; on a CPU without instructions for it tf32 (twice the memory
    of an unquantized base; not for side_by_side), and on a GPU before Ampere fp16."""
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
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, with commas between them; needs pip install 'accessory[eval]'."""
    include_path: Optional[str] = None
    """Folder with YAMLs of more tasks, for data of one's own or a machine without network."""
    num_fewshot: Optional[int] = None
    """Examples in front of each question of a task; unset: as the task says."""
    limit: Optional[float] = None
    """Only so many items of each task; below 1: that share of them."""
    side_by_side: bool = False
    """Measure the 16-bit base, the quantized weights held in 16 bit, and the packed ones, one after the other."""
    reference: Optional[str] = None
    """16-bit base of a quantized folder, for side_by_side; unset: as its quantization.json says."""
    output: Optional[str] = None
    """JSON file for the figures."""

    def __post_init__(self) -> None:
        self.tasks = [name.strip() for names in self.tasks for name in names.split(",") if name.strip()]
        data = (self.text, self.data_config)
        if None not in data or (data == (None, None) and (not self.tasks or self.side_by_side)):
            tasks = "" if self.side_by_side else ", or --tasks NAMES (lm-evaluation-harness)"
            raise UserError(f"give one of --text FILE (plain text) or --data_config YAML (instruction data){tasks}")
        if self.side_by_side and self.tasks:
            raise UserError("--side_by_side compares perplexities; run --tasks without it")
        if not self.tasks and (self.include_path, self.num_fewshot, self.limit) != (None, None, None):
            raise UserError("--include_path, --num_fewshot and --limit are for --tasks; name some")
        if self.reference is not None and not self.side_by_side:
            raise UserError(f"--reference {self.reference}: is for --side_by_side; add it")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit.is_integer())):
            raise UserError(f"--limit {self.limit}: must be a whole number of items, or a share between 0 and 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"--num_fewshot {self.num_fewshot}: must not be negative")
        if self.text is None and self.max_tokens != -1:
            raise UserError(f"--max_tokens {self.max_tokens}: is for --text; leave it out")
        if self.data_config is None and self.dialog:
            raise UserError("--dialog: is for --data_config; leave it out")
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
    Flag("tasks", "tasks", "list"),
    Flag("include_path", "include_path"),
    Flag("num_fewshot", "num_fewshot"),
    Flag("limit", "limit"),
    Flag("side_by_side", "side_by_side", "true"),
    Flag("reference", "reference"),
    Flag("output", "output"),
]
EXPORT_FLAGS = [*COMMON_FLAGS, Flag("format", "format"), Flag("output_dir", "output_dir")]


def _open(config: Any) -> Any:
    """The opened folders, with a tokenizer."""
    from accessory.models.tokenizer import require_tokenizer
    from accessory.sources import open_sources

    sources = open_sources(config.model)
    require_tokenizer(sources)
    return sources


def _load(sources: Any, config: Any) -> Any:
    from accessory.assemble import assemble
    from accessory.models import find_device
    from accessory.precision import DTYPES

    return assemble(sources, config.quantization, None, find_device(config.device), DTYPES[config.precision])


def _output_file(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {file.parent}; create it first")
    if file.is_dir():
        raise UserError(f"--output {path}: is a folder; name a file in it")
    check_writable(file.parent, f"--output {path}")
    return file


def _protocol(config: EvaluateConfig, sources: Any) -> Any:
    """How the perplexity of a model is measured; the data's mistakes come here, before any model."""
    from accessory.data.datamodule import answer_loader
    from accessory.evaluation import answer_perplexity, read_text, text_perplexity, text_windows
    from accessory.models.qformer import image_input

    if config.text is not None:
        text = read_text(Path(config.text).expanduser())
        text_windows(sources.tokenizer, text, config.seqlen, config.max_tokens)
        return lambda model: text_perplexity(model, text, config.seqlen, config.max_tokens, config.batch_size)
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
    return lambda model: answer_perplexity(model, loader)


def _open_tasks(config: EvaluateConfig, sources: Any) -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness: pip install 'accessory[eval]' (or lm-eval)")
    from accessory.harness import open_tasks

    folder = None if config.include_path is None else Path(config.include_path).expanduser()
    return open_tasks(config.tasks, folder, sources.architecture.max_position_embeddings)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Perplexity and tasks as the config says; printed, and returned as plain numbers."""
    from accessory.models import find_device
    from accessory.precision import default_precision

    output = _output_file(config.output) if config.output is not None else None
    if config.precision is None:
        usual = default_precision(find_device(config.device))
        is_wide = usual is Precision.tf32 and config.side_by_side  # whose 16-bit rows show memory too
        config = replace(config, precision=Precision.bf16 if is_wide else usual)
    sources = _open(config)
    what = config.text or config.data_config
    measure = _protocol(config, sources) if what is not None else None
    tasks = _open_tasks(config, sources) if config.tasks else None
    figures: dict[str, Any] = {"pretrained_path": config.model.pretrained_path, "precision": config.precision.value}
    if what is not None:
        figures |= {"data": what, "seqlen": config.seqlen}
    if config.side_by_side:
        figures["side_by_side"] = _side_by_side(config, sources, measure)
    else:
        model = _load(sources, config)
        figures["quantization"] = model.quantization.method.value
        if measure is not None:
            figures |= _perplexity(measure(model), figures)
        if tasks is not None:
            figures["tasks"] = _run_tasks(config, model, tasks)
    if output is not None:
        with atomic_file(output) as partial:
            partial.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def _perplexity(result: Any, figures: dict[str, Any]) -> dict[str, Any]:
    print(
        f"ppl on {figures['data']} is {result.value:.4f} ({result.tokens:,} predictions, {figures['quantization']}, "
        f"{figures['precision']})",
        flush=True,
    )
    return {"ppl": result.value, "nll": result.nll, "tokens": result.tokens}


def _run_tasks(config: EvaluateConfig, model: Any, tasks: Any) -> dict[str, Any]:
    from accessory.evaluation import check_weights
    from accessory.harness import results_table, run_tasks

    check_weights(model)
    results = run_tasks(model, tasks, config.batch_size, config.num_fewshot, config.limit)
    print(results_table(results), flush=True)
    return results


def _side_by_side(config: EvaluateConfig, sources: Any, measure: Any) -> list[dict[str, Any]]:
    from accessory.models import find_device
    from accessory.precision import DTYPES
    from accessory.side_by_side import as_figures, open_reference, rows_table, side_by_side

    device, dtype = find_device(config.device), DTYPES[config.precision]
    reference = open_reference(config.model, config.quantization, sources, config.reference)
    rows = side_by_side(reference, sources, config.quantization, device, dtype, measure)
    what = config.text or config.data_config
    print(f"ppl on {what} ({rows[0].tokens:,} predictions, {config.precision.value})", flush=True)
    print(rows_table(rows), flush=True)
    return as_figures(rows)


def export(config: ExportConfig) -> Path:
    from accessory.bases import open_folder
    from accessory.export import check_target, export_hf, export_peft
    from accessory.precision import DTYPES
    from accessory.quantization.setting import trained_on

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
    def run() -> None:
        config = to_typed(node, schema)
        require_folders(config.model.pretrained_path)
        job(config)

    run_command(run, goes_on=False)


ConfigStore.instance().store("evaluate_schema", node=EvaluateConfig)
ConfigStore.instance().store("export_schema", node=ExportConfig)
