"""The peers' side: transformers + PEFT + bitsandbytes, litgpt and unsloth, each as its own documentation combines it.

Each builds LLaMA2's shapes from random weights that are made and quantized layer by layer on the device, and loads
nothing. What a peer needs beyond a model (Fabric for litgpt; a folder with a config and a tokenizer for unsloth) is
made here too, so that the peer's own code does the rest.
"""

from __future__ import annotations

import contextlib
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import benchmark_steps as steps
import torch
from benchmark_cases import RANK, SHAPES, TARGETS, llama_config
from benchmark_steps import DTYPE, System
from torch import Tensor, nn


def llama_in_4_bit(config, bias: bool) -> nn.Module:
    """transformers' LLaMA with bitsandbytes' Linear4bit in its blocks, random frozen weights, on the device: what
    from_pretrained with a BitsAndBytesConfig (nf4, double quantization) returns."""
    from transformers import BitsAndBytesConfig
    from transformers.models.llama import modeling_llama

    with torch.device("meta"):
        model = modeling_llama.LlamaForCausalLM(config).to(DTYPE)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, _linear_4bit(child.in_features, child.out_features, bias))
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.randn(parameter.shape, dtype=DTYPE, device=steps.DEVICE) * 0.02
                value += "Norm" in type(module).__name__
                setattr(module, key, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(config=config).to(steps.DEVICE)
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPE
    )
    model.quantization_method = model.config.quantization_config.quant_method
    model.is_loaded_in_4bit = True  # PEFT asks for it before it takes its layer for 4 bits
    return model.requires_grad_(False)


def _linear_4bit(in_features: int, out_features: int, bias: bool) -> nn.Module:
    import bitsandbytes as bnb

    linear = bnb.nn.Linear4bit(in_features, out_features, bias=bias, device="meta", compute_dtype=DTYPE,
                               compress_statistics=True, quant_type="nf4")  # fmt: skip
    linear.support_avx512bf16_for_cpu = False  # it would repack the weight at the first evaluation, for good
    weight = torch.randn(out_features, in_features, dtype=DTYPE, device=steps.DEVICE) * 0.02
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(steps.DEVICE)
    if bias:
        linear.bias = nn.Parameter(torch.zeros(out_features, device=steps.DEVICE), requires_grad=False)
    return linear


def _autocast(on: bool):
    """As transformers' Trainer(bf16=True) runs a model: without it PEFT computes LoRA in fp32."""
    return torch.autocast(steps.DEVICE.type, DTYPE) if on else contextlib.nullcontext()


def plain(group: dict[str, Any]) -> System:
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    recipe = group["recipe"]
    base = model = llama_in_4_bit(llama_config(group["model"]), "bias" in recipe)
    if "lora" in recipe:
        targets = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        model = get_peft_model(base, targets)
    for module in model.modules():
        if "norm" in recipe and isinstance(module, LlamaRMSNorm):
            module.weight.requires_grad_(True)
        if "bias" in recipe and isinstance(module, bnb.nn.Linear4bit):
            module.bias.requires_grad_(True)
    model.train()

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with _autocast("lora" in recipe):
            return model(**batch, use_cache=False).loss

    def checkpoint(on: bool) -> None:
        if on:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            base.gradient_checkpointing_disable()

    def generate(case: dict[str, Any]) -> None:
        model.eval()
        prompts = torch.ones(case["batch"], case["length"], dtype=torch.int64, device=steps.DEVICE)
        model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=case["new_tokens"],
                       min_new_tokens=case["new_tokens"], do_sample=False, pad_token_id=0)  # fmt: skip
        model.train()

    notes = ["LoRA in fp32 under bf16 autocast, as its Trainer(bf16=True) runs it"] if "lora" in recipe else []
    return System(model, loss, checkpoint, generate=generate, notes=notes)


def litgpt(group: dict[str, Any]) -> System:
    """What `litgpt finetune_lora --quantize bnb.nf4 --precision bf16-true` builds: its LoRA model under Fabric, every
    linear in NF4 (lm_head too), its chunked loss. Its own checkpointing is one of several GPUs; here its blocks are
    wrapped in the same way."""
    import lightning
    from lightning.fabric.plugins import BitsandbytesPrecision
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy
    from torch.utils.checkpoint import checkpoint as recomputed

    hidden, width, blocks, heads, kv_heads, vocab = SHAPES[group["model"]]
    config = Config(
        name=f"random-{group['model']}", block_size=4096, vocab_size=vocab, padded_vocab_size=vocab, n_layer=blocks,
        n_head=heads, n_embd=hidden, n_query_groups=kv_heads, intermediate_size=width, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=1e-5, mlp_class_name="LLaMAMLP",
        lora_r=RANK, lora_alpha=RANK, lora_dropout=0.0, lora_query=True, lora_key=True, lora_value=True,
        lora_projection=True, lora_mlp=True,
    )  # fmt: skip
    on_gpu = steps.DEVICE.type == "cuda"  # Lightning quantizes on GPUs alone
    how = {"plugins": BitsandbytesPrecision("nf4", DTYPE)} if on_gpu else {"precision": "bf16-true"}
    fabric = lightning.Fabric(devices=1, accelerator="cuda" if on_gpu else "cpu", **how)
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    checkpointing = [False]
    for block in model.transformer.h:
        block.forward = partial(_recompute_if, checkpointing, recomputed, block.forward)
    model = fabric.setup_module(model)
    model.train()

    def loss(batch: dict[str, Tensor]) -> Tensor:
        logits = model(batch["input_ids"], lm_head_chunk_size=128)
        logits[-1] = logits[-1][:, :-1]  # the last position predicts nothing
        return chunked_cross_entropy(logits, batch["labels"][:, 1:])

    def checkpoint(on: bool) -> None:
        checkpointing[0] = on

    base = "lm_head in NF4 too" if on_gpu else "not quantized, as Lightning quantizes on GPUs alone"
    notes = [f"trains LoRA alone, in bf16; {base}"]
    return System(model, loss, checkpoint, notes=notes)


def _recompute_if(on: list[bool], recomputed, forward, *args, **kwargs):
    if not on[0]:
        return forward(*args, **kwargs)
    return recomputed(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def unsloth(group: dict[str, Any]) -> System:
    """What FastLanguageModel.from_pretrained(load_in_4bit=True) and get_peft_model make of a checkpoint. The one thing
    replaced is transformers' loading of weights, which returns the random ones made here."""
    from unsloth.models import llama as fast

    config = llama_config(group["model"])
    config.architectures = ["LlamaForCausalLM"]

    class RandomWeights:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> nn.Module:
            return llama_in_4_bit(config, bias=False)

    fast.AutoModelForCausalLM = RandomWeights
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        _write_tokenizer(Path(folder), config.vocab_size)
        model, _ = fast.FastLlamaModel.from_pretrained(
            folder, max_seq_length=2048, dtype=DTYPE, load_in_4bit=True, fix_tokenizer=False, local_files_only=True
        )
    model = fast.FastLlamaModel.get_peft_model(
        model, r=RANK, lora_alpha=RANK, lora_dropout=0.0, bias="none", target_modules=list(TARGETS),
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with _autocast(True):
            return model(**batch).loss

    def checkpoint(on: bool) -> None:
        fast.FastLlamaModel.for_training(model, use_gradient_checkpointing="unsloth" if on else False)

    return System(model, loss, checkpoint, notes=["trains LoRA alone; its checkpointing keeps activations on the host"])


def _write_tokenizer(folder: Path, vocab: int) -> None:
    """A word a token: nothing is tokenized, but unsloth loads one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
    ).save_pretrained(folder)  # fmt: skip
