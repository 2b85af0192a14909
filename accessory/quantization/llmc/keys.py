"""Every key of llmc-tpu's YAML, from its documentation and templates, and what its value may be.

A check returns the value as we use it, or raises ValueError with what would be right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accessory.config import Precision
from accessory.errors import suggest
from accessory.quantize_options import EvalPosition

DTYPES = {"auto": None, "float16": Precision.fp16, "bfloat16": Precision.bf16, "float32": Precision.tf32}
# llmc's families that are no LLaMA inside, or a LLaMA behind another vision model. Any other word is taken as a name:
# what a folder holds is seen when it is opened.
OTHER_FAMILIES = (
    "Bloom", "ChatGLM", "DeepseekV2", "DeepseekV3", "Falcon", "Gemma2", "GLM4V", "InternLM2", "InternOmni",
    "InternVL2", "Llava", "LlavaHf", "LlavaOneVision", "MiniCPM", "MiniCPMV", "Mistral", "Mixtral", "Mllama", "Opt",
    "Phi", "Phi3", "Qwen", "Qwen2", "Qwen2Audio", "Qwen2Moe", "Qwen2VL", "QwenVL", "StableLm", "Starcoder",
    "VideoLLaVA", "Vila", "Vit",
)  # fmt: skip
# How llmc makes rows of texts -> what does the same here.
PREPROC: dict[str, dict[str, bool]] = {
    "pileval_awq": {"skip_long": True},
    "wikitext2_gptq": {},
    "ptb_gptq": {},
    "pileval_omni": {},
    "random_truncate_txt": {},
    "c4_gptq": {"concat": False},
    "general": {"concat": False},
    "ultrachat_general": {"apply_chat_template": True},
}


# --- values ----------------------------------------------------------------------------------------------------------


def _is(kind: type, what: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise ValueError(f"must be {what}")
        return value

    return check


def _from(least: int, *others: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or (value < least and value not in others):
            raise ValueError(f"must be a whole number from {least} on" + "".join(f", or {other}" for other in others))
        return value

    return check


def _one_of(*known: str) -> Callable[[Any], str]:
    """One of these words, in any case."""

    def check(value: Any) -> str:
        for word in known:
            if str(value).lower() == word.lower():
                return word
        raise ValueError(f"must be one of {', '.join(known)}{suggest(str(value), known)}")

    return check


def _some_of(*known: str) -> Callable[[Any], list[str]]:
    one = _one_of(*known)

    def check(value: Any) -> list[str]:
        if not isinstance(value, list):
            raise ValueError(f"must be a list of {', '.join(known)}")
        return [one(word) for word in value]

    return check


def _granularity(value: Any) -> str:
    return _one_of("per_group", "per_channel")(str(value).replace("-", "_"))


def _family(value: Any) -> str:
    if str(value).lower() in (family.lower() for family in OTHER_FAMILIES):
        raise ValueError("only LLaMA-type models are quantized here, and BLIP-2's Q-Former in front of one (Llama)")
    return str(value)


def _paths(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [
        _is(str, "a folder, or a list of folders")(path) for path in _is(list, "a folder, or a list of them")(value)
    ]


def _only(wanted: Any, why: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            raise ValueError(f"{why}; set {wanted}")
        return value

    return check


_BOOL, _TEXT = _is(bool, "True or False"), _is(str, "text")
_NOT_DOWNLOADED = _only(False, "nothing is downloaded")
KEYS: dict[str, Callable[[Any], Any]] = {
    "base.seed": _from(0),
    "model.type": _family,
    "model.path": _paths,
    "model.torch_dtype": _one_of(*DTYPES),
    "model.tokenizer_mode": _one_of("slow", "fast"),
    "calib.name": _TEXT,
    "calib.download": _NOT_DOWNLOADED,
    "calib.path": _TEXT,
    "calib.n_samples": _from(1),
    "calib.bs": _from(1, -1),
    "calib.seq_len": _from(2),
    "calib.preproc": _one_of(*PREPROC),
    "calib.padding": _BOOL,
    "calib.apply_chat_template": _BOOL,
    "calib.add_answer": _BOOL,
    "calib.seed": _from(0),
    "eval.eval_pos": _some_of(*(position.value for position in EvalPosition)),
    "eval.name": _TEXT,
    "eval.type": _only("ppl", "only perplexity is measured"),
    "eval.download": _NOT_DOWNLOADED,
    "eval.path": _TEXT,
    "eval.bs": _from(1),
    "eval.seq_len": _from(2),
    "eval.inference_per_block": _only(False, "the whole model is evaluated at once"),
    "quant.method": _one_of("Awq", "GPTQ", "RTN"),
    "quant.quant_objects": _some_of("language", "vision"),
    "quant.quant_out": _only(True, "a block is calibrated on what the quantized blocks before it give"),
    "quant.weight.bit": _from(1),
    "quant.weight.symmetric": _BOOL,
    "quant.weight.granularity": _granularity,
    "quant.weight.group_size": _from(1, -1),
    "quant.weight.calib_algo": _only("minmax", "ranges are those of the weights"),
    "quant.special.trans": _BOOL,
    "quant.special.trans_version": _one_of("v1", "v2"),
    "quant.special.weight_clip": _BOOL,
    "quant.special.clip_sym": _BOOL,
    "quant.special.percdamp": _is((int, float), "a number"),
    "quant.special.blocksize": _from(1),
    "quant.special.actorder": _BOOL,
    "quant.special.static_groups": _BOOL,
    "quant.special.true_sequential": _BOOL,
    "save.save_trans": _BOOL,
    "save.save_fake": _only(False, "the quantized folder itself holds these values, packed"),
    "save.save_path": _TEXT,
    "run.task_name": _TEXT,
    "run.task_type": _one_of("LLM", "VLM"),
}
REQUIRED = ("model.path", "quant.method", "quant.weight.bit", "save.save_path")
GROUPS = {key.rpartition(".")[0] for key in KEYS}
