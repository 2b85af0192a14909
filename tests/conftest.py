"""Small real parts that all tests share: a sentencepiece tokenizer trained here, a tiny random LLaMA in Meta's format,
the same weights as a Hugging Face folder, and a few instruction items."""

from __future__ import annotations

import inspect
import json
import os
import textwrap
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # on a GPU, too, fp32 is what results are compared in

import pytest
import sentencepiece
import torch

VOCAB = 384
PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
HIDDEN = 192  # 8/3 * 64, rounded up to a multiple of 32
ORACLE = Path(__file__).resolve().parents[2] / "shared" / "oracle"


def corpus() -> list[str]:
    """Plain English that every machine has: the standard library's own docstrings."""
    return [
        line
        for line in inspect.getdoc(textwrap).splitlines() + inspect.getsource(textwrap).splitlines()
        if line.strip()
    ]


# LLaMA 2's: newlines and repeated spaces stay, digits are tokens.
LLAMA_TOKENIZER = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
}


def train_tokenizer(folder: Path, lines: list[str], vocab_size: int, **settings: Any) -> Path:
    """A sentencepiece model with byte pairs and LLaMA's special tokens."""
    (folder / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        minloglevel=2,
        **settings,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"), corpus(), VOCAB)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    from accessory.models.tokenizer import Tokenizer

    return Tokenizer(tokenizer_file)


def meta_weights(seed: int = 0, layers: int = 2) -> dict[str, torch.Tensor]:
    """Random weights with Meta's names and shapes: dim 64, 4 heads, 2 key/value heads."""
    g = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=g) / columns**0.5

    def norm() -> torch.Tensor:
        return 1 + 0.1 * torch.randn(64, generator=g)

    weights = {
        "tok_embeddings.weight": torch.randn(VOCAB, 64, generator=g),
        "output.weight": matrix(VOCAB, 64),
        "norm.weight": norm(),
    }
    for i in range(layers):
        at, ff = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        weights |= {
            f"{at}.wq.weight": matrix(64, 64),
            f"{at}.wk.weight": matrix(32, 64),
            f"{at}.wv.weight": matrix(32, 64),
            f"{at}.wo.weight": matrix(64, 64),
            f"{ff}.w1.weight": matrix(HIDDEN, 64),
            f"{ff}.w2.weight": matrix(64, HIDDEN),
            f"{ff}.w3.weight": matrix(HIDDEN, 64),
            f"layers.{i}.attention_norm.weight": norm(),
            f"layers.{i}.ffn_norm.weight": norm(),
        }
    return weights


VISION = {  # BLIP-2's classes, small: 4 patches of a 28 x 28 image, 6 queries
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "qformer_config": {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "encoder_hidden_size": 32,
    },
    "num_query_tokens": 6,
}
IMAGE_WORDS = 8  # the queries and two tags


def blip2_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random vision model, query tokens and Q-Former, under transformers' names."""
    from transformers import Blip2Config, Blip2Model, OPTConfig

    text = OPTConfig(vocab_size=8, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.device("meta"):
        state = Blip2Model(Blip2Config(**VISION, text_config=text)).state_dict()
    g = torch.Generator().manual_seed(seed)
    kept = {k: v.shape for k, v in state.items() if k.startswith(("vision_model.", "qformer.", "query_tokens"))}
    return {
        name: torch.randn(shape, generator=g) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        + (name.lower().endswith(("norm.weight", "norm1.weight", "norm2.weight")))
        for name, shape in kept.items()
    }


def image_part_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Vision model, Q-Former, projector and image tags under LLaMA2-Accessory's names, without `llma.`."""
    g = torch.Generator().manual_seed(seed + 1)
    return {f"qformer.{name}": tensor for name, tensor in blip2_weights(seed).items()} | {
        "qformer_proj.0.weight": torch.randn(64, 48, generator=g) / 7,
        "qformer_proj.0.bias": 0.1 * torch.randn(64, generator=g),
        "qformer_proj.1.weight": 1 + 0.1 * torch.randn(64, generator=g),
        "qformer_proj.1.bias": 0.1 * torch.randn(64, generator=g),
        "start_img": torch.rand(1, 1, 64, generator=g),
        "end_img": torch.rand(1, 1, 64, generator=g),
    }


def split_over_shards(weights: dict[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    """Meta's model parallelism: rows of wq, wk, wv, w1, w3, output; columns of wo, w2, tok_embeddings; norms whole."""

    def dim(name: str) -> int | None:
        if "norm" in name:
            return None
        return 1 if any(part in name for part in ("wo.", "w2.", "tok_embeddings")) else 0

    return [
        {k: v if dim(k) is None else v.chunk(count, dim(k))[i].clone() for k, v in weights.items()}
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def meta_folder(tmp_path_factory, tokenizer_file) -> Path:
    """A base in Meta's format, one shard, with its tokenizer."""
    folder = tmp_path_factory.mktemp("meta")
    torch.save(meta_weights(), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory, tokenizer_file) -> Path:
    """The same with five blocks: more than the two that fsdp gathers at a time."""
    folder = tmp_path_factory.mktemp("deep")
    torch.save(meta_weights(layers=5), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS | {"n_layers": 5}))
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def qformer_folder(tmp_path_factory, tokenizer_file) -> Path:
    """A multimodal base in LLaMA2-Accessory's format, one shard, with its tokenizer and sizes."""
    return write_qformer_base(tmp_path_factory.mktemp("qformer"), tokenizer_file)


def write_qformer_base(folder: Path, tokenizer_file: Path, layers: int = 2) -> Path:
    weights = {f"llma.{name}": tensor for name, tensor in (meta_weights(layers=layers) | image_part_weights()).items()}
    torch.save({"model": weights}, folder / "consolidated.00-of-01.model.pth")
    (folder / "config.json").write_text(json.dumps(PARAMS | {"n_layers": layers}))
    (folder / "vision_config.json").write_text(json.dumps(VISION))
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    return folder


@pytest.fixture(scope="session")
def blip2_folder(tmp_path_factory) -> Path:
    """A BLIP-2 folder of the same sizes, as transformers names and lays it out, with parts for other uses."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("blip2")
    others = {"language_projection.bias": torch.zeros(8), "qformer.embeddings.position_ids": torch.zeros(1, 4)}
    weights = blip2_weights(seed=5) | others
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "blip-2"} | VISION))
    return folder


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory, tokenizer_file) -> Path:
    """A base in Hugging Face's format, written by transformers itself: tied embeddings, 2 key/value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    return folder


def alpaca_items(count: int = 40) -> list[dict[str, str]]:
    """Items of different lengths with words of the tokenizer's corpus."""
    words = "the text wrapper breaks long lines into short ones and keeps whitespace where it should be kept".split()
    return [
        {
            "instruction": f"Wrap {i}: " + " ".join(words[: 1 + i % 7]),
            "input": "lines" if i % 3 == 0 else "",
            "output": " ".join(words[i % 5 : i % 5 + 2 + i % 11]),
        }
        for i in range(count)
    ]


def write_data(folder: Path, items: list[dict], name: str = "data.json", **entry: str) -> Path:
    """A data file and its YAML; returns the YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(items))
    lines = "".join(f"    {key}: {value}\n" for key, value in entry.items())
    config = folder / "data.yaml"
    config.write_text(f"META:\n  - path: {folder / name}\n    type: text\n{lines}")
    return config


@pytest.fixture
def data_yaml(tmp_path) -> Path:
    return write_data(tmp_path / "data", alpaca_items())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Tokenized data goes to the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def caught_model(monkeypatch):
    """The model that the next run assembles, and what `prepare` (if set) did to it before training."""
    caught = {"prepare": lambda model: None}

    def assemble(*arguments):
        caught["model"] = original(*arguments)
        caught["prepare"](caught["model"])
        return caught["model"]

    import accessory.finetune as finetune_module  # not for tests that do without torch

    original = finetune_module.assemble
    monkeypatch.setattr(finetune_module, "assemble", assemble)
    return caught
