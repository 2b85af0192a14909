"""The typed configuration of a run: Hydra composes it, `schema.to_typed` turns it into these dataclasses.

Each field's meaning stands under the field; `--help` prints exactly that text. A `Config` that cannot work is refused
as it is made, with all problems at once (`checks`), before anything is read or allocated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from accessory.errors import UserError


class LlamaType(str, Enum):
    llama = "llama"
    llama_peft = "llama_peft"
    llama_qformerv2_peft = "llama_qformerv2_peft"


class Precision(str, Enum):
    bf16 = "bf16"
    fp16 = "fp16"
    tf32 = "tf32"


class QuantMethod(str, Enum):
    none = "none"
    nf4 = "nf4"
    int4 = "int4"
    int8 = "int8"
    rtn = "rtn"
    autoround = "autoround"
    awq = "awq"
    gptq = "gptq"


class DataParallel(str, Enum):
    sdp = "sdp"
    fsdp = "fsdp"


class BadImages(str, Enum):
    stop = "stop"
    skip = "skip"


class ImageTransform(str, Enum):
    random_resized_crop = "random_resized_crop"
    resized_center_crop = "resized_center_crop"
    padded_resize = "padded_resize"


# By a mapping, as the ancestor's name for "no prompt around the instruction" cannot be written as a class attribute.
PromptType = Enum(
    "PromptType", {name: name for name in ("alpaca", "shortqa", "qg", "caption", "None", "chat")}, type=str
)


class LoggerName(str, Enum):
    csv = "csv"
    wandb = "wandb"
    tensorboard = "tensorboard"


@dataclass
class ModelConfig:
    llama_type: Optional[LlamaType] = None
    """llama_peft (or llama): language only; llama_qformerv2_peft: with BLIP-2's Q-Former in front. Unset: as the
    folders say."""
    llama_config: list[str] = field(default_factory=list)
    """JSON files whose union describes the model (Meta's params.json, LoRA settings); later files win."""
    vision_path: Optional[str] = None
    """BLIP-2 folder (or Hub name) with the vision model and Q-Former, where no pretrained folder holds them."""
    vision_config: Optional[str] = None
    """JSON with the sizes of vision model and Q-Former (transformers' Blip2Config without its language part). Unset:
    the folders' vision_config.json, else those of BLIP-2 opt-2.7b."""
    tokenizer_path: Optional[str] = None
    """tokenizer.model (sentencepiece) or a Hugging Face folder; unset: the last pretrained folder that has one."""
    pretrained_path: list[str] = MISSING
    """Checkpoint folders, base first: Hugging Face, Meta, LLaMA2-Accessory or our trainables; later ones win."""
    pretrained_type: Optional[str] = None
    """Ignored: the format of a folder is recognised by its files."""
    visual: bool = True
    """Whether a multimodal model takes images; --no_visual loads its language part alone."""


CALIBRATED = (QuantMethod.autoround, QuantMethod.awq, QuantMethod.gptq)


@dataclass
class QuantizationConfig:
    method: QuantMethod = QuantMethod.none
    """none: frozen linears stay as the base has them; nf4: 4-bit NormalFloat through bitsandbytes; rtn: 4 bits rounded
    to nearest, asymmetric; int8: 8 bits rounded to nearest, symmetric, a scale a row; autoround, awq, gptq: calibrated
    int4, made before training and kept in cache_dir; int4: what a base has that was quantized before
    (scripts/quantize.py), and keeps under none and nf4 too."""
    blocksize: int = 64
    """Weights that share one scale (nf4)."""
    double_quant: bool = True
    """Quantize the scales too (nf4; QLoRA, arXiv:2305.14314, section 3): 4.127 instead of 4.5 bits a weight."""
    group_size: Optional[int] = None
    """Weights of a row that share one scale (rtn, autoround, awq, gptq); -1: the whole row. Unset: 128 for autoround,
    64 for the others."""
    bits: int = 4
    """Bits of a weight (autoround, awq, gptq): 2, 3, 4 or 8."""
    sym: Optional[bool] = None
    """Symmetric, without zero points (autoround, awq, gptq). Unset: yes for autoround, no for the others."""
    dataset: Optional[str] = None
    """Calibration data of autoround, awq and gptq, as in scripts/quantize.py. Unset: the run's training data."""
    nsamples: Optional[int] = None
    """Calibration rows. Unset: 128."""
    seqlen: Optional[int] = None
    """Tokens in a calibration row. Unset: data.max_words."""
    iters: Optional[int] = None
    """Tuning iterations a block (autoround). Unset: 200."""
    cache_dir: Optional[str] = None
    """Where calibrated bases are kept; unset: ~/.cache/accessory/quantized."""
    lm_head: bool = False
    """Quantize the output layer as well, as LLaMA2-Accessory did; costs quality, saves little."""
    vision: bool = False
    """Quantize the linears of vision model, Q-Former and projector as well, as LLaMA2-Accessory did."""


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a decoder block


@dataclass
class RecipeConfig:
    name: str = "norm_bias"
    """The recipe's name, for logs and metadata."""
    norm: bool = True
    """Train the weights of the norms."""
    bias: bool = True
    """Train a bias on every linear of the decoder blocks (added as zeros where the base has none)."""
    lora: bool = False
    """Train LoRA matrices (arXiv:2106.09685) on the linears of the decoder blocks."""
    projector: bool = False
    """Train all of the projector between Q-Former and LLaMA, and the image tags (alignment; norm and bias train its
    LayerNorm and biases anyway)."""
    vision: bool = False
    """Train the vision model and the Q-Former, in fp32 (for small ones that start from nothing)."""
    rank: int = 16
    """LoRA rank."""
    alpha: Optional[float] = None
    """LoRA alpha; the update is scaled by alpha / rank. Unset: alpha = rank, a scale of 1."""
    dropout: float = 0.0
    """Dropout on the input of LoRA."""
    targets: list[str] = field(default_factory=lambda: list(LINEARS))
    """Linears of a block that get LoRA, by name. One that matches nothing is an error."""


@dataclass
class DataConfig:
    data_config: str = MISSING
    """Data YAML: a list META of {path, type, preprocess, prompt_type}."""
    val_config: Optional[str] = None
    """Data YAML of the validation split; unset: val_fraction of the training data."""
    val_fraction: float = 0.01
    """Share of the training data held out for validation when val_config is unset (0: none)."""
    val_items: Optional[int] = None
    """Validate on no more than so many items, taken evenly from all of the split; unset: on all."""
    dialog: bool = False
    """Items are conversations: {"conversations": [{"from": "human", "value": …}, …]}."""
    max_words: int = 512
    """Longest sequence in tokens, image tokens included; longer items are cut and reported."""
    packing: bool = False
    """Pack several items into one row of max_words tokens; attention stays inside each item."""
    prompt_type: Optional[PromptType] = None
    """Prompt of data files that name none in the YAML: alpaca (default), shortqa, qg, caption, None, chat."""
    image_transform: ImageTransform = ImageTransform.random_resized_crop
    """How training images become square: random_resized_crop, resized_center_crop or padded_resize. Where nothing may
    be random (validation, answers), random_resized_crop becomes resized_center_crop."""
    image_root: Optional[str] = None
    """Folder of the images whose data YAML entry has no root; unset: they are looked up from the working directory,
    then from the data file's folder."""
    bad_images: BadImages = BadImages.stop
    """At an image that is missing, broken or too large: stop before training, or skip its items and count them."""
    cache_dir: Optional[str] = None
    """Where tokenized data is kept (memory-mapped); unset: ~/.cache/accessory."""
    cache_ann_on_disk: bool = False
    """Accepted for LLaMA2-Accessory's commands; data is always cached on disk and memory-mapped."""
    num_workers: int = 2
    """Processes that prepare batches."""
    pin_mem: bool = True
    """Pin host memory for the copy to the GPU."""


@dataclass
class OptimConfig:
    lr: float = 5e-4
    """Learning rate after warmup (AdamW, betas 0.9 and 0.95)."""
    min_lr: float = 5e-5
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.02
    """Weight decay of the LoRA matrices; norms and biases never decay."""
    warmup_epochs: float = 0.1
    """Epochs (fractions allowed) of linear warmup."""
    clip_grad: float = 2.0
    """Largest norm of the gradient; 0 or less: no clipping."""


@dataclass
class TrainConfig:
    epochs: int = 3
    """Passes over the data."""
    max_steps: int = -1
    """Stop after this many optimizer steps (-1: run all epochs); the schedule then ends there."""
    batch_size: int = 4
    """Rows per device and micro-batch. Effective batch: batch_size x accum_iter x devices."""
    accum_iter: int = 1
    """Micro-batches per optimizer step; changes memory, not the result."""
    precision: Optional[Precision] = None
    """Compute type: bf16, fp16 or tf32 (fp32 with TF32 matmuls). Trainables are fp32 in each. Unset: bf16; on a CPU
    without instructions for it, where it takes several times as long, tf32 (twice the memory of an unquantized base),
    and on a GPU before Ampere fp16. A run that is continued keeps its own."""
    checkpointing: Optional[bool] = None
    """Recompute activations in backward: less memory, about a third more time. Unset: as few blocks as the GPU's memory
    allows, by the estimate; none on a CPU."""
    val_interval: float = 1.0
    """Epochs between validations (0.25: four an epoch)."""


@dataclass
class FastConfig:
    enabled: Optional[bool] = None
    """The switch for all parts that are unset below: fast=on, fast=off; unset (fast=auto): on with a CUDA GPU."""
    blocks: Optional[bool] = None
    """Compute a decoder block as one function with a backward of its own: dequantization, bias and LoRA in one matmul,
    fused norms and SwiGLU, the fewest activations kept."""
    compile: Optional[bool] = None
    """torch.compile the decoder blocks, one by one, where `blocks` does not apply."""
    graphs: Optional[bool] = None
    """Launch forward and backward of a micro-batch as one CUDA graph (one GPU, or several with sdp)."""
    offload: Optional[bool] = None
    """Keep the inputs of blocks, and the residuals of those that are not recomputed, in host memory: copied beside the
    computation, a fifth of the activations less. Unset: on a GPU where a step does not fit otherwise, before any block
    is recomputed, and where all are (train.checkpointing=true); needs `blocks`."""
    keep_attention: Optional[bool] = None
    """Keep attention's output for backward, a tenth of the activations more, instead of computing it there again: 1 %
    of a step at 512 tokens, more with longer items. Unset: with FlashAttention, where it fits besides all else and no
    block is recomputed; needs `blocks`."""
    padding_free: Optional[bool] = None
    """Lay the items of a micro-batch behind each other in one row (in rows of up to max_words tokens, where there is no
    FlashAttention) instead of padding them to the longest: the same update, fewer tokens. data.packing instead fills
    batch_size whole rows: larger batches."""


@dataclass
class SaveConfig:
    epoch_interval: int = 1
    """Epochs between checkpoints."""
    step_interval: int = 5000
    """Optimizer steps between checkpoints within an epoch."""
    keep: int = 2
    """Checkpoints kept; older ones are removed once a newer one is whole."""


@dataclass
class ResumeConfig:
    path: Optional[str] = None
    """Checkpoint folder to continue from, or another run's output_dir; unset: the newest whole one of output_dir, if
    any."""
    allow_world_size: bool = False
    """Continue with another number of devices than the checkpoint was saved with, from the start of the next epoch."""


@dataclass
class StrategyConfig:
    data_parallel: DataParallel = DataParallel.sdp
    """sdp: the frozen base on every rank, trainables all-reduced. fsdp: the quantized part of it spread over the ranks
    and gathered block by block, so that a base fits that is too large for one GPU."""
    model_parallel_size: int = 1
    """Only 1: tensor parallelism is not offered; where the base is too large for one GPU, use fsdp."""


@dataclass
class LoggerConfig:
    name: LoggerName = LoggerName.csv
    """csv, wandb or tensorboard; a CSV log is always written as well."""
    project: str = "accessory"
    """Project name at wandb."""
    offline: bool = False
    """wandb without network; `wandb sync` uploads later."""
    log_every_n_steps: int = 1
    """Optimizer steps between logged points."""


@dataclass
class Config:
    output_dir: str = "output_dir"
    """Folder of this run: trainables, checkpoints, logs, curves."""
    seed: int = 0
    """Seed of LoRA's initialisation, dropout and data order."""
    only_save_trainable: bool = False
    """Save the trainables only (needed with quantization); otherwise a merged 16-bit model is saved too."""
    model: ModelConfig = field(default_factory=ModelConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    fast: FastConfig = field(default_factory=FastConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def __post_init__(self) -> None:
        from accessory.checks import find_problems  # which reads the classes above

        if problems := find_problems(self):
            raise UserError("; ".join(problems))
