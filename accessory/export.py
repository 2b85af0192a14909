"""Results for other programs: a plain Hugging Face model in 16 bit, or a PEFT adapter.

Merging goes into the *dequantized* base, which the trainables were trained on, and never back into 4 bit, where the
update would vanish.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlamaConfig

from accessory.bases import CONFIG_FILE, IMAGE_FILE, META_FILE, VISION_CONFIG_FILE
from accessory.config import LlamaType
from accessory.errors import UserError
from accessory.files import atomic_folder, check_writable
from accessory.hf_files import ShardWriter, save_tensors
from accessory.models import describe_vision
from accessory.models.llama import Llama, RMSNorm
from accessory.models.qformer import QFormerLlama
from accessory.models.tokenizer import Tokenizer
from accessory.models.tokenizer_export import save_for_transformers
from accessory.quantization import QuantLinear, block_linears, linear_weight
from accessory.shards import is_image_part
from accessory.tuning.recipe import canonical_name, trainable_state

ADAPTER_PREFIX = "base_model.model."


def export_hf(model: Llama, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json, *.safetensors and the tokenizer: AutoModelForCausalLM.from_pretrained loads it. The image part
    of a multimodal model lies in a file of its own.

    Norms, biases and merged LoRA included; biases become the model's own (attention_bias, mlp_bias). Tensor by tensor,
    so memory needs one shard on top of the model.
    """
    config = _export_config(model, dtype)
    with atomic_folder(folder) as partial:
        writer = ShardWriter(partial)
        for name, tensor in _export_tensors(model, config, dtype):
            writer.add(name, tensor.cpu())
        writer.close()
        config.save_pretrained(partial)
        if isinstance(model, QFormerLlama):
            _write_image_part(model, partial, dtype)
        if model.tokenizer is not None:
            save_for_transformers(model.tokenizer, partial)


def _write_image_part(model: QFormerLlama, folder: Path, dtype: torch.dtype) -> None:
    """Beside the language model, which stays one for transformers: what accessory needs to make it multimodal again."""
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear) and is_image_part(path):
            tensors[f"{path}.weight"] = module.dequantize(dtype)
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if is_image_part(name):
                tensors[name] = parameter
    ready = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    save_tensors(ready, folder / IMAGE_FILE)
    (folder / VISION_CONFIG_FILE).write_text(describe_vision(model.vision_config))
    meta = {"llama_type": LlamaType.llama_qformerv2_peft.value, "image_transform": model.image_transform.value}
    (folder / META_FILE).write_text(json.dumps({"format": 1} | meta, indent=2) + "\n")


def _export_config(model: Llama, dtype: torch.dtype) -> LlamaConfig:
    biased = {path.split(".")[-1] for path, layer in block_linears_by_name(model).items() if layer.bias is not None}
    config = LlamaConfig.from_dict(model.config.to_dict())
    config.attention_bias = bool(biased & {"q_proj", "k_proj", "v_proj", "o_proj"})
    config.mlp_bias = bool(biased & {"gate_proj", "up_proj", "down_proj"})
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    if model.tokenizer is not None:
        config.bos_token_id, config.eos_token_id = model.tokenizer.bos_id, end_tokens(config, model.tokenizer)
    return config


def end_tokens(config: LlamaConfig, tokenizer: Tokenizer) -> int | list[int]:
    """EOS, and what else ends an answer by the base's config, as LLaMA 3's list does."""
    named = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = list(dict.fromkeys(i for i in (tokenizer.eos_id, *named) if i is not None))
    return ends if len(ends) > 1 else ends[0]


def block_linears_by_name(model: nn.Module) -> dict[str, QuantLinear]:
    return {canonical_name(f"{path}.").removesuffix("."): layer for path, layer in block_linears(model).items()}


def merged_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """dq(W) + scaling * B A of a linear with LoRA, computed in fp32; dq(W) of one without."""
    if not isinstance(layer, LoraLayer):
        return linear_weight(layer, dtype)
    weight = layer.base_layer.dequantize(torch.float32)
    for name in layer.active_adapters:
        # Not in place: an unquantized base hands out its own weight.
        weight = weight + layer.scaling[name] * (layer.lora_B[name].weight @ layer.lora_A[name].weight)
    return weight.to(dtype)


def _export_tensors(model: Llama, config: LlamaConfig, dtype: torch.dtype):
    def ready(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", dtype).contiguous()

    done: set[int] = set()
    for path, module in model.named_modules():
        name = canonical_name(f"{path}.").removesuffix(".")
        if is_image_part(name):
            continue
        if isinstance(module, (RMSNorm, nn.Embedding)):
            yield f"{name}.weight", ready(module.weight)
        elif isinstance(module, LoraLayer) or (isinstance(module, QuantLinear) and id(module) not in done):
            base = module.base_layer if isinstance(module, LoraLayer) else module
            done.add(id(base))
            yield f"{name}.weight", ready(merged_weight(module, dtype))
            wants_bias = config.attention_bias if ".self_attn." in name else config.mlp_bias and ".mlp." in name
            if wants_bias:
                yield f"{name}.bias", ready(base.bias if base.bias is not None else torch.zeros(base.out_features))
        elif module is model.lm_head and not config.tie_word_embeddings:
            yield f"{name}.weight", ready(linear_weight(module, dtype))


def export_peft(model: Llama, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors: PeftModel.from_pretrained loads them on the base.

    A PEFT adapter holds LoRA matrices, and no bias for a linear that has none.
    """
    state = trainable_state(model)
    if isinstance(model, QFormerLlama):
        raise UserError(
            "a PEFT adapter cannot hold an image part; export --format hf instead, or the language part alone with "
            "--no_visual"
        )
    if biased := next((name for name in state if name.endswith(".bias")), None):
        raise UserError(
            f"a PEFT adapter cannot add biases ({biased} was trained); export --format hf instead, or train recipe=lora"
        )
    loras = {path: m for path, m in model.named_modules() if isinstance(m, LoraLayer)}
    if not loras:
        raise UserError("no LoRA in this model, so there is no adapter to export; export --format hf instead")
    first = next(iter(loras.values()))
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.base["path"],
        "r": first.r["default"],
        "lora_alpha": first.lora_alpha["default"],
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in loras}),
        "inference_mode": True,
    }
    with atomic_folder(folder) as partial:
        adapter = {ADAPTER_PREFIX + name: tensor for name, tensor in state.items()}
        save_tensors(adapter, partial / "adapter_model.safetensors")
        (partial / "adapter_config.json").write_text(json.dumps(content, indent=2))
        if model.tokenizer is not None:
            save_for_transformers(model.tokenizer, partial)


def check_target(folder: Path) -> None:
    """An export never overwrites a folder that holds something, and appears in one step, which a disk's own folder
    cannot."""
    if folder.is_mount():
        raise UserError(f"--output_dir {folder}: a disk is mounted there; name a folder in it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        kind = "model" if (folder / CONFIG_FILE).is_file() else "something"
        raise UserError(f"--output_dir {folder}: holds {kind} already; choose another, or remove it")
    check_writable(folder, f"--output_dir {folder}")
