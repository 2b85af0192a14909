"""Int4 folders for tests: an untied tiny LLaMA, and what auto-round and accessory.quantization.formats make of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import torch
from conftest import VOCAB
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.quantization import formats, rtn
from accessory.quantization.packed import Packed, Scheme
from accessory.quantize_options import Format

JOB = Path(__file__).parent / "quantization" / "auto_round_job.py"


def write_base(folder: Path, tokenizer_file: Path, layers: int = 1) -> Path:
    """A 16-bit base as transformers writes it, with an output layer of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(torch.float16).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    return folder


def run_auto_round(jobs: list[dict], folder: Path) -> None:
    """Do the jobs of auto_round_job.py, in one process; folder: for its list."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(JOB), str(folder / "jobs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def linear_names(tensors: dict[str, Tensor]) -> list[str]:
    """The decoder blocks' linears of a base."""
    return sorted(name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight"))


def write_int4(
    base: Path,
    folder: Path,
    format: Format = Format.auto_round,
    scheme: Scheme = Scheme(4, 32, False),
    exceptions: Optional[dict[str, Optional[Scheme]]] = None,
    quantize: Callable[[Tensor, Scheme], Packed] = rtn.quantize,
    reordered: bool = False,
) -> dict[str, Packed]:
    """Round a base's linears and write them; returns what was written, by name. exceptions: other schemes by name, None
    for 16 bit."""
    tensors = load_file(base / "model.safetensors")
    stated: dict[str, Optional[Scheme]] = dict.fromkeys(linear_names(tensors), scheme) | (exceptions or {})
    schemes = {name: own for name, own in stated.items() if own is not None}
    sym = formats.all_symmetric(schemes.values())
    written = {}
    for name, own in schemes.items():
        written[name] = formats.representable(quantize(tensors.pop(f"{name}.weight"), own), format)
        tensors |= formats.pack(name, written[name], format, sym)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    unquantized = [name for name, own in stated.items() if own is None]
    config["quantization_config"] = formats.quantization_config(format, scheme, schemes, unquantized, reordered)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.model").write_bytes((base / "tokenizer.model").read_bytes())
    return written


def act_order(weight: Tensor, scheme: Scheme) -> Packed:
    """Columns in groups by a random order, as GPTQ's act-order leaves them."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    g_idx = torch.empty(weight.shape[1], dtype=torch.int32)
    g_idx[order] = torch.arange(weight.shape[1], dtype=torch.int32) // scheme.group_size
    scales, zeros = rtn.grid(weight[:, order], scheme)
    return Packed(rtn.encode(weight, scales, zeros, scheme.bits, g_idx), scales, zeros, scheme.bits, g_idx)
