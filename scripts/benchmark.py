"""Training speed and memory on random weights of LLaMA2's shapes: our recipes and plain transformers + PEFT +
bitsandbytes, each in its own process, same shapes, same tokens, medians.

    python scripts/benchmark.py --models 7b --recipes norm_bias norm_bias_lora --batches 4 16 --length 512
    python scripts/benchmark.py --models tiny --steps 5 --batches 2 --length 64        # anywhere, in a minute

A step is forward, backward, clipping and AdamW on one micro-batch in which every token is an answer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import _checkout  # noqa: F401

import accessory  # noqa: F401

# isort: split
import torch  # after accessory, which sets what torch reads when it is loaded

# hidden size, MLP's width, blocks, heads, key/value heads, vocabulary
SHAPES = {
    "tiny": (128, 352, 4, 4, 4, 1000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "70b": (8192, 28672, 80, 64, 8, 32000),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16


def llama_config(name: str):
    from transformers import LlamaConfig

    hidden, width, blocks, heads, kv_heads, vocab = SHAPES[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    )


def build_ours(name: str, recipe: str, checkpointing: bool, compile_blocks: bool):
    """Our model, and its loss as a function of input_ids; weights are made and quantized layer by layer."""
    from accessory.checkpoint import slots
    from accessory.config import QuantizationConfig, QuantMethod, RecipeConfig
    from accessory.models import build_model
    from accessory.module import batch_loss
    from accessory.quantization import quantize
    from accessory.tuning.recipe import add_trainables, mark_trainable

    chosen = RecipeConfig(norm="norm" in recipe, bias="bias" in recipe, lora="lora" in recipe)
    model = build_model(llama_config(name))
    quantize(model, QuantizationConfig(method=QuantMethod.nf4), DTYPE)
    add_trainables(model, chosen)
    for key, (shape, store, _) in slots(model, DEVICE, DTYPE):
        store(torch.randn(shape, device=DEVICE, dtype=DTYPE) * 0.02 + ("norm" in key))
    model.model.rotary_emb.to(DEVICE)
    mark_trainable(model, chosen)
    model.model.checkpointing = checkpointing
    if compile_blocks:
        for block in model.model.layers:
            block.compile()

    def loss(input_ids: torch.Tensor) -> torch.Tensor:
        targets = input_ids.roll(-1, dims=1)
        targets[:, -1] = -100
        positions = torch.arange(input_ids.shape[1], device=DEVICE).expand_as(input_ids)
        batch = {"input_ids": input_ids, "targets": targets, "position_ids": positions}
        return batch_loss(model, batch) / (targets.numel() - len(targets))

    return model, loss


def build_plain(name: str, recipe: str, checkpointing: bool, compile_blocks: bool):
    """transformers' LLaMA with bitsandbytes' Linear4bit and PEFT's LoRA, as their documentation combines them."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

    config = llama_config(name)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(DTYPE)
    for parent in list(model.model.layers.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                linear = bnb.nn.Linear4bit(child.in_features, child.out_features, bias="bias" in recipe, device="meta",
                                           compute_dtype=DTYPE, compress_statistics=True, quant_type="nf4")  # fmt: skip
                linear.support_avx512bf16_for_cpu = False
                weight = torch.randn(child.out_features, child.in_features, dtype=DTYPE, device=DEVICE) * 0.02
                linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(DEVICE)
                if "bias" in recipe:
                    linear.bias = nn.Parameter(torch.zeros(child.out_features, device=DEVICE))
                setattr(parent, child_name, linear)
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.randn(parameter.shape, dtype=DTYPE, device=DEVICE) * 0.02
                setattr(module, key, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(DEVICE)
    model.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if "lora" in recipe:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    for module in model.modules():
        if "norm" in recipe and isinstance(module, LlamaRMSNorm):
            module.weight = nn.Parameter(torch.ones_like(module.weight))
        if "bias" in recipe and isinstance(module, bnb.nn.Linear4bit):
            module.bias.requires_grad_(True)
    model.train()
    return model, lambda input_ids: model(input_ids=input_ids, labels=input_ids, use_cache=False).loss


BUILDERS = {"ours": build_ours, "plain": build_plain}


def measure(case: dict) -> dict:
    """Median step time and peak memory of one case, in this process."""
    torch.manual_seed(0)
    model, loss = BUILDERS[case["system"]](case["model"], case["recipe"], case["checkpointing"], case["compile"])
    trainables = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainables, lr=1e-4, betas=(0.9, 0.95), fused=DEVICE.type == "cuda")
    vocab = llama_config(case["model"]).vocab_size
    times = []
    for i in range(case["warmup"] + case["steps"]):
        if i == case["warmup"] and DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        input_ids = torch.randint(vocab, (case["batch"], case["length"]), device=DEVICE)
        _synchronize()
        start = time.perf_counter()
        value = loss(input_ids)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trainables, 2.0)
        optimizer.step()
        optimizer.zero_grad()
        _synchronize()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[case["warmup"] :])
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else _peak_rss()
    assert torch.isfinite(value)
    return case | {
        "trainable": sum(p.numel() for p in trainables), "ms_per_step": 1000 * median, "loss": value.item(),
        "tokens_per_s": case["batch"] * case["length"] / median, "peak_gib": peak,
    }  # fmt: skip


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _peak_rss() -> float:
    from accessory.callbacks import peak_memory_gib

    return peak_memory_gib()


def cases(args: argparse.Namespace) -> list[dict]:
    return [
        {"system": system, "model": model, "recipe": recipe, "batch": batch, "length": args.length,
         "checkpointing": checkpointing, "compile": system == "ours" and not args.no_compile and DEVICE.type == "cuda",
         "warmup": args.warmup, "steps": args.steps}
        for model in args.models for recipe in args.recipes for batch in args.batches
        for checkpointing in ([False, True] if args.checkpointing == "both" else [args.checkpointing == "yes"])
        for system in args.systems
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["tiny"])
    parser.add_argument("--recipes", nargs="+", default=["norm_bias", "norm_bias_lora"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4])
    parser.add_argument("--systems", nargs="+", choices=BUILDERS, default=list(BUILDERS))
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--checkpointing", choices=["no", "yes", "both"], default="no")
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures")
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        print("RESULT " + json.dumps(measure(json.loads(args.case))))
        return
    results = []
    print(
        f"{'system':<8}{'model':<6}{'recipe':<16}{'batch':>10}{'ckpt':>6}{'tokens/s':>10}{'ms/step':>9}{'peak GiB':>10}"
    )
    for case in cases(args):
        run = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], capture_output=True, text=True)
        line = next((row for row in run.stdout.splitlines() if row.startswith("RESULT ")), None)
        shape = f"{case['batch']} x {case['length']}"
        head = f"{case['system']:<8}{case['model']:<6}{case['recipe']:<16}{shape:>10}{case['checkpointing']!s:>6}"
        if line is None:
            error = (run.stderr.strip().splitlines() or ["no output"])[-1][:150]
            results.append(case | {"error": error})
            print(f"{head}  failed: {error}", flush=True)
            continue
        result = json.loads(line.removeprefix("RESULT "))
        results.append(result)
        print(
            f"{head}{result['tokens_per_s']:>10,.0f}{result['ms_per_step']:>9.0f}{result['peak_gib']:>10.2f}",
            flush=True,
        )
        if args.output is not None:
            args.output.write_text(json.dumps({"device": _device_name(), "results": results}, indent=2))


def _device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
