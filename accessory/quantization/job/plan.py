"""Everything about a quantization that can be wrong, looked at before any work."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Optional

import torch
from torch import Tensor
from transformers import LlamaConfig

from accessory import __version__
from accessory.bases import Folder, weights_digest
from accessory.errors import UserError
from accessory.models import build_model, find_device
from accessory.models.qformer import image_input
from accessory.models.tokenizer import require_tokenizer
from accessory.precision import DTYPES
from accessory.quantization.calibration import read_calibration
from accessory.quantization.int4 import Int4
from accessory.quantization.job.schemes import block_linear_shapes, output_formats, schemes_of
from accessory.quantization.methods.autoround import RECIPES, require_auto_round
from accessory.quantization.packed import Scheme
from accessory.quantize_options import AutoRoundConfig, AwqConfig, Format, GptqConfig, Method, QuantizeConfig
from accessory.shards import EMBEDDING, is_image_part
from accessory.sources import Sources, open_sources
from accessory.weights import refuse_unfit_weights

CALIBRATED = (Method.autoround, Method.awq, Method.gptq)
CHECK_ROWS, CHECK_TOKENS = 2, 64  # of random ids, for methods without calibration data
SETTING_KEYS = (
    "bits",
    "group_size",
    "sym",
    "scheme",
    "method",
    "layer_config",
    "quant_lm_head",
    "vision",
    "calib",
    "autoround",
    "awq",
    "gptq",
    "seed",
)


@dataclass(frozen=True)
class Rows:
    """What flows through the blocks: ids int64 [n, s]; pixels(i): the images of row i, [k, 3, p, p], or None."""

    ids: Tensor
    pixels: Callable[[int], Optional[Tensor]]
    fingerprint: Optional[str] = None  # None: random ids, nothing is calibrated
    report: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    config: QuantizeConfig
    sources: Sources
    schemes: dict[str, Scheme]
    unquantized: list[str]
    rows: Rows
    device: torch.device
    dtype: torch.dtype  # of computing
    stored: torch.dtype  # of what is left unquantized, on disk
    unused: list[str]  # settings that only another method would look at

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the result: interrupted work is continued under the same only."""
        stated = asdict(self.config)
        for path in ("dataset", "image_root"):  # what was read there counts, not where it lies
            del stated["calib"][path]
        return (
            self.sources.identity
            | {key: stated[key] for key in SETTING_KEYS}
            | {
                "format": self.config.format,
                "schemes": {name: str(scheme) for name, scheme in self.schemes.items()},
                "rows": self.rows.fingerprint,
                "weights": weights_digest(self.sources.folders[0]),
                "dtype": str(self.dtype),
                "save_trans": self.config.save_trans is not None,
                "versions": self.versions,
            }
        )

    @property
    def digest(self) -> str:
        """The same in 16 hex digits."""
        settings = json.dumps(self.settings, sort_keys=True, default=str)
        return hashlib.sha256(settings.encode()).hexdigest()[:16]

    @property
    def versions(self) -> dict[str, str]:
        tuner = {"auto-round": version("auto-round")} if self.config.method is Method.autoround else {}
        return {"accessory": __version__, "torch": torch.__version__} | tuner

    @property
    def backends(self) -> dict[str, Int4]:
        """How each quantized linear is held in memory, by name."""
        usual = reordered(self.config)
        return {
            name: Int4(s.bits, s.group_size, s.sym, usual and s.group_size != -1) for name, s in self.schemes.items()
        }

    @property
    def usual_scheme(self) -> Scheme:
        """The scheme of most linears."""
        return Counter(self.schemes.values()).most_common(1)[0][0]

    @property
    def formats(self) -> list[Format]:
        return output_formats(self.config)

    @property
    def is_reordered(self) -> bool:
        return reordered(self.config)

    @property
    def is_calibrated(self) -> bool:
        return self.rows.fingerprint is not None

    @property
    def store(self) -> torch.device:
        """Where hidden states wait between blocks."""
        return torch.device("cpu") if self.config.low_gpu_mem_usage else self.device


def reordered(config: QuantizeConfig) -> bool:
    """Whether groups hold columns that are not neighbours (g_idx)."""
    gptq = config.gptq
    return config.method is Method.gptq and gptq.actorder and not gptq.static_groups


def make_plan(config: QuantizeConfig) -> Plan:
    """Open the base and the calibration data; raise UserError for all that cannot work."""
    if config.method is Method.autoround:
        require_auto_round()
    unused = _unused(config)
    fill_defaults(config)
    sources = open_sources(config.model)
    _check_base(sources)
    require_tokenizer(sources)
    _check_image_part(sources)
    model = build_model(sources.architecture, sources.vision)
    schemes = schemes_of(model, config)
    refuse_unfit_weights(model, sources.folders)
    base_dtype = _stored_dtype(sources.folders[0])
    dtype = stored = DTYPES[config.precision] if config.precision is not None else base_dtype
    device = find_device(config.device)
    if device.type == "cpu" and dtype is torch.float16:
        dtype = torch.float32  # holds every float16, and CPUs compute in it
        stored = stored if base_dtype is torch.float16 else dtype  # another base's values would be rounded behind it
    unquantized = sorted(block_linear_shapes(model).keys() - schemes.keys())
    return Plan(config, sources, schemes, unquantized, _rows(config, sources), device, dtype, stored, unused)


def fill_defaults(config: QuantizeConfig) -> None:
    """Put AutoRound's recipe where nothing was set, and check what needs no files."""
    fill_recipe(config)
    problems = [message for wrong, message in _checks(config) if wrong]
    if problems:
        raise UserError("; ".join(problems))


def _unused(config: QuantizeConfig) -> list[str]:
    """What was set and only another method would look at."""
    options = {Method.autoround: AutoRoundConfig(), Method.awq: AwqConfig(), Method.gptq: GptqConfig()}
    found = [
        f"{method.value}.{key}"
        for method, usual in options.items()
        for key, value in asdict(usual).items()
        if method is not config.method and getattr(getattr(config, method.value), key) != value
    ]
    if config.method is Method.int8:
        found += [key for key in ("group_size", "sym") if getattr(config, key) is not None]
    return found + ["calib.dataset"] * (config.method not in CALIBRATED and config.calib.dataset is not None)


def fill_recipe(config: QuantizeConfig) -> None:
    nsamples, iters, lr, seqlen = RECIPES[config.autoround.recipe]
    tuning, calib = config.autoround, config.calib
    is_tuned = config.method is Method.autoround
    tuning.iters = iters if tuning.iters is None else tuning.iters
    tuning.lr = lr if tuning.lr is None else tuning.lr
    if calib.nsamples is None:
        calib.nsamples = nsamples if is_tuned else 128
    if calib.batch_size is None:
        calib.batch_size = max(1, min(8, calib.nsamples))
    if calib.seqlen is None and is_tuned:
        calib.seqlen = seqlen


def row_length(config: QuantizeConfig, architecture: LlamaConfig) -> int:
    """Tokens in a row of calibration data."""
    usual = min(2048, architecture.max_position_embeddings)
    return usual if config.calib.seqlen is None else config.calib.seqlen


def _is_positive(value: Optional[float]) -> bool:
    """None: unset, which is fine."""
    return value is None or (value > 0 and math.isfinite(value))


def _checks(config: QuantizeConfig) -> list[tuple[bool, str]]:
    tuning, calib, gptq, awq = config.autoround, config.calib, config.gptq, config.awq
    needs = config.method in CALIBRATED
    return [
        (
            needs and calib.dataset is None,
            f"method={config.method.value} needs text of the kind that the model will see: --dataset my.txt (or .json, "
            ".jsonl); method=rtn and int8 need none",
        ),
        (calib.nsamples < 1, f"--nsamples {calib.nsamples}: must be at least 1"),
        (calib.seqlen is not None and calib.seqlen < 2, f"--seqlen {calib.seqlen}: must be at least 2"),
        (calib.batch_size < 1, f"--batch_size {calib.batch_size}: must be at least 1"),
        (
            needs and calib.batch_size * tuning.gradient_accumulate_steps > calib.nsamples,
            f"--batch_size {calib.batch_size} x --gradient_accumulate_steps {tuning.gradient_accumulate_steps}: more "
            f"than the {calib.nsamples} samples",
        ),
        (
            config.method is Method.autoround and tuning.iters < 1,
            f"--iters {tuning.iters}: must be at least 1; rounding without tuning is method=rtn",
        ),
        (not _is_positive(tuning.lr), f"--lr {tuning.lr}: must be a number above 0"),
        (not _is_positive(tuning.minmax_lr), f"--minmax_lr {tuning.minmax_lr}: must be a number above 0"),
        (tuning.nblocks < 1, f"--nblocks {tuning.nblocks}: must be at least 1"),
        (tuning.gradient_accumulate_steps < 1, "--gradient_accumulate_steps must be at least 1"),
        (not _is_positive(gptq.percdamp), f"gptq.percdamp={gptq.percdamp}: must be a number above 0"),
        (gptq.blocksize < 1, f"gptq.blocksize={gptq.blocksize}: must be at least 1"),
        (awq.n_grid < 1, f"awq.n_grid={awq.n_grid}: must be at least 1"),
        (
            config.save_trans is not None and config.method is not Method.awq,
            f"save_trans with method={config.method.value}: only awq changes the floating-point model",
        ),
        (
            reordered(config) and output_formats(config) != [Format.auto_gptq],
            f"gptq.actorder=true with gptq.static_groups=false and format={config.format}: only auto_gptq holds g_idx; "
            "set gptq.static_groups=true, or format=auto_gptq",
        ),
        (config.eval.seqlen < 2, f"eval.seqlen={config.eval.seqlen}: must be at least 2"),
        (config.eval.batch_size < 1, f"eval.batch_size={config.eval.batch_size}: must be at least 1"),
        (not 0 <= config.seed < 2**32, f"--seed {config.seed}: must be in [0, {2**32 - 1}]"),
    ]


def _check_base(sources: Sources) -> None:
    base = sources.folders[0]
    if base.packed:
        raise UserError(f"{base.path}: is quantized already; name the 16-bit base that it was made from")
    for folder in sources.folders[1:]:
        if language := sorted(name for name in folder.names if not is_image_part(name)):
            raise UserError(
                f"{folder.path}: trainables ({language[0]}) cannot be quantized; merge them into one base first "
                "(scripts/export.py)"
            )


def _check_image_part(sources: Sources) -> None:
    """A multimodal model is quantized whole, projector and all."""
    if sources.vision is None:
        return
    names = set().union(*(folder.names for folder in sources.folders))
    missing = [name for name in ("qformer.query_tokens", "qformer_proj.0.weight", "start_img") if name not in names]
    if missing:
        where = ", ".join(str(folder.path) for folder in sources.folders)
        raise UserError(
            f"{where}: {missing[0]} is missing for llama_type llama_qformerv2_peft (task_type VLM); name folders with "
            "a whole multimodal model, or quantize the language model alone"
        )


def _stored_dtype(base: Folder) -> torch.dtype:
    """What the base is stored in, so that nothing is lost before rounding."""
    dtype = base.first_row(EMBEDDING).dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def _rows(config: QuantizeConfig, sources: Sources) -> Rows:
    if config.method not in CALIBRATED:
        generator = torch.Generator().manual_seed(config.seed)
        ids = torch.randint(sources.architecture.vocab_size, (CHECK_ROWS, CHECK_TOKENS), generator=generator)
        return Rows(ids, lambda i: None)
    longest = sources.architecture.max_position_embeddings
    seqlen = row_length(config, sources.architecture)
    if seqlen > longest:
        raise UserError(f"--seqlen {seqlen}: this model has {longest} positions")
    image = image_input(sources.vision)
    data = read_calibration(
        config.calib, sources.tokenizer, config.calib.nsamples, seqlen, config.seed, image, sources.image_transform
    )
    if config.vision and not (data.rows < 0).any():
        raise UserError(
            f"vision=true: {config.calib.dataset} holds no image to calibrate the vision model on; name image-text data"
        )
    return Rows(data.rows, data.pixels, data.fingerprint, [line.line() for line in data.report])
