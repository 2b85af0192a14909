"""Training speed and memory on random weights of LLaMA2's shapes: our recipes and plain transformers + PEFT +
bitsandbytes, each in its own process, same shapes, same tokens, medians.

    python scripts/benchmark.py --models 7b --recipes norm_bias norm_bias_lora --batches 4 16 --length 512
    python scripts/benchmark.py --models 13b --images nf4 16bit --systems ours --checkpointing yes --task both
    python scripts/benchmark.py --models tiny --steps 5 --batches 2 --length 64        # anywhere, in a minute

A training step is forward, backward, clipping and AdamW on one micro-batch in which every token of text is an answer;
generation answers prompts of `length` tokens with 64 more. With --images every row has an image of BLIP-2's size,
counted in the length; the flag's value is how the vision model is stored.
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
NEW_TOKENS = 64


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


def build_ours(case: dict, share: tuple[int, int] | None = None):
    """Our model, and its loss as a function of input_ids; weights are made and quantized layer by layer. share: (rank,
    ranks) with fsdp."""
    from transformers import Blip2Config

    from accessory.config import QuantizationConfig, QuantMethod, RecipeConfig
    from accessory.data.packing import IMAGE_SLOT
    from accessory.models import build_model
    from accessory.module import batch_loss
    from accessory.quantization import quantize
    from accessory.sharding import ShardedPayload
    from accessory.tuning.recipe import add_trainables, mark_trainable
    from accessory.weights import weight_places

    recipe, images = case["recipe"], case["images"]
    chosen = RecipeConfig(norm="norm" in recipe, bias="bias" in recipe, lora="lora" in recipe)
    model = build_model(llama_config(case["model"]), Blip2Config() if images else None)
    quantize(model, QuantizationConfig(method=QuantMethod.nf4, vision=images == "nf4"), DTYPE)
    add_trainables(model, chosen)
    mark_trainable(model, chosen)
    model.sharded = None if share is None else ShardedPayload(model, *share)
    for key, (shape, store, _) in weight_places(model, DEVICE, DTYPE):
        store(torch.randn(shape, device=DEVICE, dtype=DTYPE) * 0.02 + ("norm" in key))
        if model.sharded is not None:
            model.sharded.loaded(key)
    model.model.rotary_emb.to(DEVICE)
    model.model.checkpointing = case["checkpointing"]
    if case["compile"]:
        for block in model.model.layers:
            block.forward = torch.compile(block.forward)

    def loss(input_ids: torch.Tensor) -> torch.Tensor:
        targets = input_ids.roll(-1, dims=1)
        targets[:, -1] = -100
        positions = torch.arange(input_ids.shape[1], device=DEVICE).expand_as(input_ids)
        batch = {"input_ids": input_ids, "targets": targets, "position_ids": positions}
        if images:
            slots = slice(1, 1 + model.image_words)
            input_ids[:, slots], targets[:, : model.image_words] = IMAGE_SLOT, -100
            batch["images"] = torch.randn(len(input_ids), 3, model.image_size, model.image_size, device=DEVICE)
        return batch_loss(model, batch) / (targets != -100).sum()

    return model, loss


def generate_once(model, case: dict) -> None:
    """An answer of NEW_TOKENS tokens to prompts of `length` tokens each."""
    from accessory.data.packing import IMAGE_SLOT, insert_image
    from accessory.generation import generate_ids

    pixels = (
        torch.randn(case["batch"], 3, model.image_size, model.image_size, device=DEVICE) if case["images"] else None
    )
    prompt = [1] * (case["length"] - model.image_words)
    prompt = insert_image(prompt, model.image_words, IMAGE_SLOT) if case["images"] else prompt
    for _ in generate_ids(model, [prompt] * case["batch"], NEW_TOKENS, 0.0, 1.0, {-1}, pixels):
        pass


def build_plain(case: dict):
    """transformers' LLaMA with bitsandbytes' Linear4bit and PEFT's LoRA, as their documentation combines them."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

    recipe, config = case["recipe"], llama_config(case["model"])
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
    if case["checkpointing"]:
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
    """Median time of a step or an answer, and peak memory, of one case in this process."""
    torch.manual_seed(0)
    model, loss = BUILDERS[case["system"]](case)
    step, new_tokens = (train_step(model, loss, case), case["length"])
    if case["task"] == "generate":
        step, new_tokens = (lambda: generate_once(model, case)), NEW_TOKENS
    median, peak = time_steps(step, case["warmup"], case["steps"])
    return case | {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "ms_per_step": 1000 * median, "tokens_per_s": case["batch"] * new_tokens / median, "peak_gib": peak,
    }  # fmt: skip


def time_steps(step, warmup: int, steps: int) -> tuple[float, float]:
    """(median seconds of a step, peak GiB), after the warm-up."""
    from accessory.callbacks import peak_memory_gib

    times = []
    for i in range(warmup + steps):
        if i == warmup and DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _synchronize()
        start = time.perf_counter()
        step()
        _synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:]), peak_memory_gib()


def train_step(model, loss, case: dict):
    trainables = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainables, lr=1e-4, betas=(0.9, 0.95), fused=DEVICE.type == "cuda")
    vocab = llama_config(case["model"]).vocab_size

    def step() -> None:
        value = loss(torch.randint(vocab, (case["batch"], case["length"]), device=DEVICE))
        value.backward()
        torch.nn.utils.clip_grad_norm_(trainables, 2.0)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(value)

    return step


def _synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def cases(args: argparse.Namespace) -> list[dict]:
    tasks = ["train", "generate"] if args.task == "both" else [args.task]
    compiled = not args.no_compile and DEVICE.type == "cuda"
    return [
        {"task": task, "system": system, "model": model, "recipe": recipe, "images": images, "batch": batch,
         "length": args.length, "checkpointing": checkpointing, "warmup": args.warmup, "steps": args.steps,
         "compile": compiled and system == "ours" and task == "train"}
        for model in args.models for recipe in args.recipes for images in args.images for batch in args.batches
        for checkpointing in ([False, True] if args.checkpointing == "both" else [args.checkpointing == "yes"])
        for task in tasks for system in args.systems if system == "ours" or (images is None and task == "train")
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["tiny"])
    parser.add_argument("--recipes", nargs="+", default=["norm_bias", "norm_bias_lora"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4])
    parser.add_argument("--systems", nargs="+", choices=BUILDERS, default=list(BUILDERS))
    parser.add_argument("--images", nargs="+", choices=["16bit", "nf4"], default=[None], help="an image in every row")
    parser.add_argument("--task", choices=["train", "generate", "both"], default="train")
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
        f"{'system':<8}{'task':<10}{'model':<6}{'images':<8}{'recipe':<16}{'batch':>10}{'ckpt':>6}{'tokens/s':>10}"
        f"{'ms/step':>9}{'peak GiB':>10}"
    )
    for case in cases(args):
        run = subprocess.run([sys.executable, __file__, "--case", json.dumps(case)], capture_output=True, text=True)
        line = next((row for row in run.stdout.splitlines() if row.startswith("RESULT ")), None)
        shape = f"{case['batch']} x {case['length']}"
        head = f"{case['system']:<8}{case['task']:<10}{case['model']:<6}{case['images'] or '-':<8}{case['recipe']:<16}"
        head += f"{shape:>10}{case['checkpointing']!s:>6}"
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
