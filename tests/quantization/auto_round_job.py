"""auto-round at work, in a process of its own (it patches transformers on import): python auto_round_job.py jobs.json.

A job writes folders ({"base", "out": {format: folder}, …}) or reads one ({"folder", "how", "out"}): the weights that
auto-round's own layers compute with, float16 [out, in] by name, and, of a whole model, its logits.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

IDS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79, 32, 38, 46, 26]]


def write(base: str, out: dict[str, str], bits: int, group_size: int, sym: bool, layer_config=None):
    """out: the folder of each format; what is tuned is tuned once."""
    from auto_round import AutoRound
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    model = LlamaForCausalLM.from_pretrained(base)
    tuner = AutoRound(
        model,
        PreTrainedTokenizerFast(tokenizer_object=words),
        bits=bits,
        group_size=group_size,
        sym=sym,
        iters=0,
        disable_opt_rtn=True,
        layer_config=layer_config,
    )
    with tempfile.TemporaryDirectory() as folder:
        _, written = tuner.quantize_and_save(folder, format=",".join(out))
        for target, path in zip(out.values(), written if isinstance(written, list) else [written], strict=True):
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("tokenizer*"))


def read_model(folder: str) -> dict[str, Tensor]:
    """As transformers loads it."""
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    torch_layers = AutoRoundConfig(backend="torch")  # "auto" might take a kernel that has no gradients
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=torch_layers, dtype=torch.float16)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    found = {name: weight_of(layer, layer.infeatures) for name, layer in layers.items()}
    return found | {"logits": model(torch.tensor(IDS)).logits.float()}


def read_layers(folder: str, how: str) -> dict[str, Tensor]:
    """Layer by layer, where transformers would need other libraries. how: gptq (zero points less 1) or awq."""
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    tensors = load_file(Path(folder) / "model.safetensors")
    found = {}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        parts = {leaf: tensors[f"{name}.{leaf}"] for leaf in ("qweight", "qzeros", "scales")}
        groups, out = parts["scales"].shape
        bits = parts["qzeros"].shape[1] * 32 // out
        if how == "awq":
            found[name] = dequantize_gemm(**parts, bits=bits, group_size=len(parts["qweight"]) // groups).t()
            continue
        in_features = len(parts["qweight"]) * 32 // bits
        group_size = in_features // groups
        if f"{name}.g_idx" in tensors:  # its own use of it fails on more outputs than inputs: a group for each column
            g_idx, group_size = tensors[f"{name}.g_idx"], 1
            parts |= {leaf: parts[leaf][g_idx] for leaf in ("qzeros", "scales")}
        layer = QuantLinear(bits, group_size, in_features, out, bias=False)
        layer.load_state_dict(parts)
        found[name] = weight_of(layer, in_features)
    return found


@torch.no_grad()
def weight_of(layer: nn.Module, in_features: int) -> Tensor:
    """The weight [out, in] that a layer computes with, bit for bit: sums with one term."""
    return layer(torch.eye(in_features, dtype=torch.float16)).t()


if __name__ == "__main__":
    import auto_round.compressors.base  # noqa: F401

    gc.freeze()  # auto-round collects garbage all the time: else, mostly, the libraries' own objects, a second each
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "base" in job:
            write(**job)
        else:
            how = job["how"]
            found = read_model(job["folder"]) if how == "model" else read_layers(job["folder"], how)
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, job["out"])
