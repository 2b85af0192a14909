"""Time and peak memory of quantizing models of LLaMA2's shapes with random weights, by the number of their blocks.

    python scripts/benchmark_quantize.py --tokenizer_path model --dataset calib.txt --blocks 2 4 --methods rtn awq gptq

Each is `scripts/quantize.py` in a process of its own; peak memory is what quantization.json says: of the GPU's
allocations, or, on a CPU, of memory that no file backs. It must not grow with the number of blocks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import _checkout  # noqa: F401
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from accessory.models.tokenizer import Tokenizer

QUANTIZE = Path(__file__).resolve().with_name("quantize.py")
SHAPES = {"7b": (4096, 11008, 32), "13b": (5120, 13824, 40)}  # hidden, intermediate, heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--methods", nargs="+", default=["rtn", "awq", "gptq", "autoround"])
    parser.add_argument("--tokenizer_path", required=True, help="any LLaMA-type folder with a tokenizer")
    parser.add_argument("--dataset", required=True, help="calibration data")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--iters", type=int, default=20, help="AutoRound's iterations a block")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--keep_on_gpu", action="store_true", help="calibration data too; default: low_gpu_mem_usage")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    rows = []
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory() as scratch:
            base = make_base(Path(scratch) / "base", options, blocks)
            for method in options.methods:
                rows.append(
                    {"method": method, "blocks": blocks} | quantize(base, Path(scratch) / method, method, options)
                )
                row = rows[-1]
                print(
                    f"{method:<10} {blocks} blocks  {row['seconds']:7.1f} s  peak {row['peak_memory_gib']:6.2f} GiB",
                    flush=True,
                )
    if options.output is not None:
        options.output.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")


def make_base(folder: Path, options: argparse.Namespace, blocks: int) -> Path:
    """A Hugging Face folder with random bf16 weights."""
    tokenizer = Tokenizer(options.tokenizer_path)
    hidden, intermediate, heads = SHAPES[options.shapes]
    config = LlamaConfig(
        vocab_size=tokenizer.n_words,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    tokenizer.save(folder)
    return folder


def quantize(base: Path, out: Path, method: str, options: argparse.Namespace) -> dict[str, float]:
    words = [
        "--pretrained_path", str(base), "--output_dir", str(out), "--method", method, "--dataset", options.dataset,
        "--nsamples", str(options.nsamples), "--seqlen", str(options.seqlen), "--iters", str(options.iters),
        "--batch_size", str(options.batch_size),
    ]  # fmt: skip
    words += [] if options.keep_on_gpu else ["--low_gpu_mem_usage"]
    subprocess.run([sys.executable, str(QUANTIZE), *words], check=True, stdout=subprocess.DEVNULL)
    manifest = json.loads((out / "quantization.json").read_text())
    return {key: manifest[key] for key in ("seconds", "peak_memory_gib", "device")}


if __name__ == "__main__":
    main()
