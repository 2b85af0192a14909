"""A model on the meta device, from what describes it: a folder's config.json or params.json, --model 7b, a llama_config
file. It is quantized and given its trainables as in a run. Weights are not needed; where a folder has them, their names
are read, as int4 bases say in them how each linear is stored.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from transformers import Blip2Config, LlamaConfig

from accessory.bases import CONFIG_FILE, VISION_CONFIG_FILE
from accessory.config import LlamaType, ModelConfig, QuantizationConfig, QuantMethod, RecipeConfig
from accessory.errors import UserError
from accessory.estimate_cli import EstimateConfig
from accessory.models import build_model, config_from_hf, config_from_params, read_json, vision_config_from
from accessory.models.llama import Llama
from accessory.quantization import quantize
from accessory.quantization.int4 import Int4
from accessory.quantization.job.schemes import block_linear_shapes, schemes_of
from accessory.quantization.setting import CALIBRATED, as_stored, stored_backends
from accessory.quantization.stored import find_statement
from accessory.quantize_options import Method, QuantizeConfig
from accessory.shipped import find_file
from accessory.sizes import SHAPES
from accessory.sources import open_sources
from accessory.tuning.recipe import add_trainables, mark_trainable

VOCABULARY = 32000  # of LLaMA2, where a params.json says -1 and there are no weights


@dataclass(frozen=True)
class Described:
    """What is known of a model without its weights. stored: of an int4 base, how linears are held, by name."""

    name: str
    architecture: LlamaConfig
    vision: Optional[Blip2Config]
    stored: dict[str, Int4]


def describe_model(config: EstimateConfig) -> Described:
    paths = config.model.pretrained_path
    folder = Path(paths[0]).expanduser() if paths else None
    if folder is None or (folder.is_dir() and not any(f.suffix in (".safetensors", ".pth") for f in folder.iterdir())):
        return _without_weights(config, folder)
    sources = open_sources(config.model)
    if config.quantization.method not in CALIBRATED or sources.folders[0].packed:
        as_stored(config.quantization, sources.folders)  # refuses what cannot be
    return Described(paths[0], sources.architecture, sources.vision, stored_backends(sources.folders))


def _without_weights(config: EstimateConfig, folder: Optional[Path]) -> Described:
    vision = _vision(config.model, folder)
    if config.size is not None:
        for path in config.model.llama_config:  # one with LoRA settings alone may stand there
            if "dim" in read_json(find_file(path)):
                raise UserError(f"--model {config.size} and --llama_config {path}: name one of them")
        return Described(f"LLaMA2 {config.size}", _llama2(config.size), vision, {})
    files = [find_file(path) for path in config.model.llama_config]
    if folder is not None:
        found = [folder / name for name in ("params.json", CONFIG_FILE) if (folder / name).is_file()]
        if not found and not files:
            raise UserError(f"--pretrained_path {folder}: neither weights nor config.json or params.json in it")
        files = found[:1] + files
    contents = [read_json(file) for file in files]
    if contents and "model_type" in contents[0]:
        architecture = config_from_hf(files[0])
        return Described(str(folder or files[0]), architecture, vision, _stated(folder, contents[0], architecture))
    params = functools.reduce(lambda one, other: one | other, contents, {})
    if "dim" not in params:
        raise UserError("which model? Give --model 7b (13b, 70b), or a folder with its config.json: --pretrained_path")
    source = ", ".join(map(str, files))
    return Described(source, config_from_params(params, VOCABULARY, source), vision, {})


def _vision(model: ModelConfig, folder: Optional[Path]) -> Optional[Blip2Config]:
    """Sizes of the image part, if the model is to have one: decided as in sources.py, but without weights."""
    wanted = model.llama_type is LlamaType.llama_qformerv2_peft or model.vision_path is not None
    files = [find_file(model.vision_config)] if model.vision_config is not None else []
    for place, name in ((folder, VISION_CONFIG_FILE), (model.vision_path, CONFIG_FILE)):
        if place is not None and (file := Path(place).expanduser() / name).is_file():
            files.append(file)
            wanted = wanted or model.llama_type is None
    if not wanted or not model.visual:
        return None
    return vision_config_from(files[0]) if files else Blip2Config()


def _llama2(size: str) -> LlamaConfig:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return LlamaConfig(**dict(zip((*names, "vocab_size"), SHAPES[size], strict=True)))


def _stated(folder: Optional[Path], content: dict[str, Any], architecture: LlamaConfig) -> dict[str, Int4]:
    """How an int4 base's config.json says that the blocks' linears are held."""
    if folder is None or content.get("quantization_config") is None:
        return {}
    stated = find_statement(folder, content)
    schemes = {name: stated.scheme(name) for name in block_linear_shapes(build_model(architecture))}
    return {f"{name}.weight": Int4(s.bits, s.group_size, s.sym) for name, s in schemes.items()}


def build(described: Described, quantization: QuantizationConfig, recipe: RecipeConfig, dtype: torch.dtype) -> Llama:
    """The model as a run would train it, on the meta device."""
    if described.vision is None and (recipe.projector or recipe.vision or quantization.vision):
        raise UserError(
            "recipe.projector, recipe.vision and quantization.vision are for models that take images; --llama_type "
            "llama_qformerv2_peft makes this one such"
        )
    model = build_model(described.architecture, described.vision)
    stored = described.stored
    if not stored and quantization.method in CALIBRATED:
        job = QuantizeConfig(
            method=Method(quantization.method.value), bits=quantization.bits, group_size=quantization.group_size,
            sym=quantization.sym, quant_lm_head=quantization.lm_head, vision=quantization.vision, output_dir="none",
        )  # fmt: skip
        schemes = schemes_of(model, job)
        stored = {f"{name}.weight": Int4(s.bits, s.group_size, s.sym) for name, s in schemes.items()}
    if not stored and quantization.method is QuantMethod.int4:
        raise UserError(
            "quantization=int4: is for a base that says how it is stored; choose nf4 (--quant), rtn, awq, …"
        )
    quantize(model, quantization, dtype, recipe.projector, stored)
    with torch.device("meta"):
        add_trainables(model, recipe)
    mark_trainable(model, recipe)
    return model
