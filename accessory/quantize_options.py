"""The typed configuration of a quantization: what accessory-quantize reads from flags, keys and llmc's YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING

from accessory.config import BadImages, ModelConfig, Precision, PromptType


class Method(str, Enum):
    autoround = "autoround"
    rtn = "rtn"
    awq = "awq"
    gptq = "gptq"
    int8 = "int8"


class Format(str, Enum):
    auto_round = "auto_round"
    auto_gptq = "auto_gptq"
    auto_awq = "auto_awq"


class Tuning(str, Enum):
    best = "best"
    default = "default"
    light = "light"


class ScaleDtype(str, Enum):
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


class TransVersion(str, Enum):
    v1 = "v1"
    v2 = "v2"


@dataclass
class CalibrationConfig:
    dataset: Optional[str] = None
    """Files, comma-separated: .txt (a sample a line), .json, .jsonl or .csv (text, Alpaca, conversations, captions), a
    folder with llmc's samples.json or such files, a data YAML; each with options, as in a.txt:num=64,b.json:num=64
    (num, concat, whole, apply_chat_template). A path with a comma or colon goes in double quotes."""
    nsamples: Optional[int] = None
    """Rows of seqlen tokens. Unset: 128 (autoround.recipe=best: 512)."""
    seqlen: Optional[int] = None
    """Tokens in a row. Unset: 2048, or what the model has positions for (autoround.recipe=light: 512)."""
    batch_size: Optional[int] = None
    """Rows at a time. Unset: 8, or all of them where they are fewer."""
    whole_file: bool = False
    """Read a .txt file as one document that is cut into rows, instead of a sample a line."""
    concat: bool = True
    """Join samples and cut rows of seqlen tokens out of them; false: only samples of at least seqlen tokens, cut."""
    skip_long: bool = False
    """Leave out texts of more than seqlen tokens, which are cut otherwise (llmc's preproc: pileval_awq)."""
    allow_fewer: bool = False
    """Take the rows that there are where the data does not suffice for nsamples, as llmc does; false: stop."""
    image_root: Optional[str] = None
    """Folder of the images of image-text samples; unset: beside the file (of a data YAML: as in training)."""
    bad_images: BadImages = BadImages.stop
    """At an image that is missing or broken: stop, or skip its sample."""
    add_answer: bool = True
    """Whether the answers of llmc's question-and-answer samples are calibrated on too."""
    prompt_type: Optional[PromptType] = None
    """Prompt around the items of data YAMLs that name none, as in training."""
    apply_chat_template: bool = False
    """Put samples into the tokenizer's chat template."""


@dataclass
class AutoRoundConfig:
    recipe: Tuning = Tuning.default
    """best: 512 samples, 1000 iterations; default: 128, 200; light: 50 iterations with lr 5e-3 on rows of 512."""
    iters: Optional[int] = None
    """Tuning iterations a block. Unset: as the recipe says."""
    lr: Optional[float] = None
    """Learning rate of the rounding. Unset: 1 / iters (twice that with 3 bits or fewer from 1000 iterations)."""
    minmax_lr: Optional[float] = None
    """Learning rate of the weight ranges. Unset: lr."""
    enable_quanted_input: bool = True
    """Tune a block on the output of the quantized blocks before it."""
    enable_minmax_tuning: bool = True
    """Tune the ranges (scales) of the weights too."""
    scale_dtype: ScaleDtype = ScaleDtype.fp16
    """Type of the scales while tuning; files hold fp16."""
    amp: bool = True
    """Tune in 16 bit."""
    nblocks: int = 1
    """Blocks that are tuned together."""
    gradient_accumulate_steps: int = 1
    """Batches a tuning step; with calib.batch_size=1 the least memory."""
    adam: bool = False
    """AdamW instead of signed gradient descent."""


@dataclass
class AwqConfig:
    trans: bool = True
    """Scale salient channels up before rounding (arXiv:2306.00978)."""
    trans_version: TransVersion = TransVersion.v2
    """v2: scales from activations alone; v1: from activations and weights."""
    weight_clip: bool = True
    """Search for the range of each group after scaling."""
    clip_sym: bool = True
    """Cut both ends of a range alike."""
    n_grid: int = 20
    """Points of the search for scales; that for ranges has half as many."""


@dataclass
class GptqConfig:
    percdamp: float = 0.01
    """Damping: share of the mean diagonal that is added to the Hessian (arXiv:2210.17323)."""
    blocksize: int = 128
    """Columns between updates of the rest."""
    actorder: bool = True
    """Quantize columns in the order of their activations' size; stores g_idx unless static_groups."""
    static_groups: bool = True
    """Scales from the weights as they were, known before any column is quantized; with actorder the best of the four,
    and files that every reader takes."""
    true_sequential: bool = True
    """Calibrate the linears of a block one group after the other, on inputs from those already quantized."""


class EvalPosition(str, Enum):
    pretrain = "pretrain"
    transformed = "transformed"
    fake_quant = "fake_quant"


@dataclass
class EvaluationConfig:
    text: Optional[str] = None
    """What perplexity is measured on, besides the calibration rows: a plain text file, llmc's samples.json or a data
    YAML (its answers)."""
    name: Optional[str] = None
    """What to call it in `EVAL: ppl on … is …`. Unset: the file's name."""
    eval_pos: list[EvalPosition] = field(default_factory=lambda: [EvalPosition.pretrain, EvalPosition.fake_quant])
    """pretrain: the base; transformed: after awq's scaling and clipping; fake_quant: quantized."""
    seqlen: int = 512
    """Tokens in a window of text, and the longest item."""
    max_tokens: int = -1
    """Use only so many tokens of the text (-1: all)."""
    batch_size: int = 4
    """Windows or items at a time."""


@dataclass
class QuantizeConfig:
    """What accessory-quantize does."""

    model: ModelConfig = field(default_factory=ModelConfig)
    output_dir: str = MISSING
    """Folder to write; must not hold anything. Work that was interrupted lies beside it and is continued (not that on
    LLaVA-type folders)."""
    method: Method = Method.autoround
    """autoround, rtn, awq, gptq, or int8 (rtn with 8 bits, symmetric, per channel)."""
    bits: int = 4
    """2, 3, 4 or 8."""
    group_size: Optional[int] = None
    """Weights of a row that share one scale; -1: the whole row (per channel). Unset: 128 for autoround, 64 for the
    others, -1 with 8 bits."""
    sym: Optional[bool] = None
    """Symmetric: no zero points. Unset: yes for autoround and with 8 bits, else no."""
    scheme: Optional[str] = None
    """In AutoRound's words: bits, or bits and group size (W4A16, W2A16G64), or sym, or asym; wins over those keys."""
    format: str = Format.auto_round.value
    """auto_round, auto_gptq or auto_awq (4 bits only). Several, separated by commas, are written into folders of those
    names in output_dir."""
    layer_config: Any = None
    """Other settings for some linears, as JSON or a JSON file: {"model.layers.0.mlp.down_proj": {"bits": 8}}; keys may
    be a part of names or regular expressions, 16 bits leave a linear unquantized."""
    quant_lm_head: bool = False
    """Quantize the output layer too."""
    vision: bool = False
    """Quantize the linears of vision model, Q-Former and projector too (multimodal models)."""
    calib: CalibrationConfig = field(default_factory=CalibrationConfig)
    autoround: AutoRoundConfig = field(default_factory=AutoRoundConfig)
    awq: AwqConfig = field(default_factory=AwqConfig)
    gptq: GptqConfig = field(default_factory=GptqConfig)
    low_gpu_mem_usage: bool = False
    """Keep calibration data on the CPU between blocks: less GPU memory, somewhat slower."""
    device: Optional[str] = None
    """cuda, cuda:1, cpu; unset: cuda where there is one."""
    precision: Optional[Precision] = None
    """Type that the base is read into: of forward passes, of weights before they are rounded, and of what is left
    unquantized: bf16, fp16 or tf32 (fp32). Unset: as the base is stored."""
    seed: int = 42
    """Seed of the choice of samples and of tuning."""
    save_trans: Optional[str] = None
    """Folder for the adjusted floating-point model as well (awq: scaled and clipped, not rounded)."""
    eval: EvaluationConfig = field(default_factory=EvaluationConfig)
