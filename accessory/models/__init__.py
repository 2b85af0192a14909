"""From a description of the architecture to modules on the meta device; weights come later, one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor
from transformers import Blip2Config, LlamaConfig

from accessory.errors import UserError, suggest
from accessory.json_text import parse_json
from accessory.models.llama import Llama
from accessory.models.qformer import QFormerLlama, VisionQFormer

# LLaMA2-Accessory's ModelArgs. The last four say what trains, not what the model is: the recipe owns those.
PARAMS = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": None,
    "vocab_size": -1,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_seq_len": 2048,
    "rope_scaling": None,
    "max_batch_size": 32,
    "lora_rank": -1,
    "bias_tuning": True,
    "norm_tuning": True,
}


VISION_PARTS = ("vision_config", "qformer_config", "num_query_tokens")  # of transformers' Blip2Config


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value > 0


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


_COUNT = (_is_count, "a whole number above 0")
_POSITIVE = (_is_positive, "a number above 0")
_SWITCH = (_is_switch, "true or false")
# What each value of PARAMS has to be; where the default is None, null will do as well.
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dim": _COUNT,
    "n_layers": _COUNT,
    "n_heads": _COUNT,
    "n_kv_heads": _COUNT,
    "vocab_size": (lambda value: _is_count(value) or value == -1, "a whole number above 0, or -1"),
    "multiple_of": _COUNT,
    "ffn_dim_multiplier": _POSITIVE,
    "norm_eps": _POSITIVE,
    "rope_theta": _POSITIVE,
    "max_seq_len": _COUNT,
    "rope_scaling": _POSITIVE,
    "max_batch_size": _COUNT,
    "lora_rank": (_is_whole, "a whole number"),
    "bias_tuning": _SWITCH,
    "norm_tuning": _SWITCH,
}


def check_params(params: dict[str, Any], source: str) -> None:
    """Refuse unknown keys and values of the wrong type."""
    for key, value in params.items():
        if key not in PARAMS:
            raise UserError(f"{source}: unknown key {key!r}{suggest(key, PARAMS)}; known: {', '.join(PARAMS)}")
        fits, wanted = _CHECKS[key]
        if not (fits(value) or (value is None and PARAMS[key] is None)):
            raise UserError(f"{source}: {key}={value!r}: must be {wanted}")


def find_device(name: str | torch.device | None) -> torch.device:
    """A device by name; None: cuda where there is one, else the CPU."""
    usable = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if usable else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: unknown device; known are cuda, cuda:1 (its second GPU) and cpu")
    if device.type == "cuda" and not usable:
        raise UserError(f"--device {name}: this machine has no usable GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: no such GPU; this machine has {torch.cuda.device_count()}")
    return device


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Needs no memory besides: least and greatest carry both on."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or one clear line about what is wrong with it."""
    try:
        content = parse_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def hidden_size_of_mlp(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's rule for the width of the feed-forward layer: 8/3 of dim, stretched, rounded up to multiple_of."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * math.ceil(hidden / multiple_of)


def config_from_params(params: dict[str, Any], vocab_size: int, source: str) -> LlamaConfig:
    """Meta's / LLaMA2-Accessory's params.json -> transformers' LlamaConfig.

    vocab_size: rows of the embedding, used where params.json says -1 (Meta's files do).
    """
    check_params(params, source)
    p = {**PARAMS, **params}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(p["rope_theta"])}
    if p["rope_scaling"] is not None:  # positions are multiplied by it; transformers divides by its factor
        rope |= {"rope_type": "linear", "factor": 1.0 / float(p["rope_scaling"])}
    if p["dim"] % p["n_heads"]:
        raise UserError(f"{source}: dim={p['dim']} is not a multiple of n_heads={p['n_heads']}")
    if p["n_heads"] % (p["n_kv_heads"] or 1):
        raise UserError(f"{source}: n_heads={p['n_heads']} is not a multiple of n_kv_heads={p['n_kv_heads']}")
    return _checked_config(
        source,
        vocab_size=p["vocab_size"] if p["vocab_size"] > 0 else vocab_size,
        hidden_size=p["dim"],
        intermediate_size=hidden_size_of_mlp(p["dim"], p["multiple_of"], p["ffn_dim_multiplier"]),
        num_hidden_layers=p["n_layers"],
        num_attention_heads=p["n_heads"],
        num_key_value_heads=p["n_kv_heads"] or p["n_heads"],
        rms_norm_eps=p["norm_eps"],
        rope_parameters=rope,
        max_position_embeddings=p["max_seq_len"],
        tie_word_embeddings=False,
        bos_token_id=None,  # the tokenizer's business
        eos_token_id=None,
    )


def _checked_config(source: str, **values: Any) -> LlamaConfig:
    try:
        return LlamaConfig(**values)
    except Exception as error:  # the library's validators raise errors of their own, over several lines
        raise UserError(f"{source}: {' '.join(str(error).split())[:300]}") from None


def config_from_hf(path: Path) -> LlamaConfig:
    """A Hugging Face config.json -> LlamaConfig; other architectures are refused."""
    content = read_json(path)
    if content.get("model_type") != "llama":
        raise UserError(f"{path}: model_type={content.get('model_type')!r}; only 'llama' is supported")
    if content.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act={content['hidden_act']!r}; only 'silu' is supported")
    content.pop("quantization_config", None)  # how its weights lie on disk is no part of the architecture
    return _checked_config(str(path), **content)


def vision_config_from(path: Path) -> Blip2Config:
    """vision_config.json, or BLIP-2's config.json, whose language part does not matter here."""
    content = read_json(path)
    parts = {key: content[key] for key in VISION_PARTS if key in content}
    if "vision_config" not in parts:
        raise UserError(f"{path}: no 'vision_config' in it; expected transformers' Blip2Config")
    stated = parts["vision_config"] if isinstance(parts["vision_config"], dict) else {}
    for key in ("image_size", "patch_size"):
        if not _is_count(stated.get(key, 1)):
            raise UserError(f"{path}: {key}={stated[key]!r}: must be a whole number above 0 (images are square)")
    try:
        config = Blip2Config(**parts)
        with torch.device("meta"):
            VisionQFormer(config)  # sizes that do not fit each other
    except Exception as error:  # the library's validators raise errors of their own, over several lines
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    if config.qformer_config.use_qformer_text_input:
        raise UserError(f"{path}: use_qformer_text_input=true: a Q-Former that reads text too is not supported")
    return config


def describe_vision(config: Blip2Config) -> str:
    """vision_config.json's text: the parts of the configuration that make the image part."""
    whole = config.to_dict()
    return json.dumps({key: whole[key] for key in VISION_PARTS}, indent=2) + "\n"


def build_model(config: LlamaConfig, vision: Optional[Blip2Config] = None) -> Llama:
    """The architecture on the meta device, frozen and in eval mode: shapes without memory. vision: with a Q-Former in
    front."""
    with torch.device("meta"):
        model = Llama(config) if vision is None else QFormerLlama(config, vision)
    return model.eval().requires_grad_(False)
