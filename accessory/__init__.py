"""QPEFT: fine-tune LLaMA2-family models on a quantized, frozen base."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Optional, Union

# GNU OpenMP's threads spin for each other, for ever by default: on a CPU that others use too, a step of many small
# operations was seen to take 28 s instead of 2. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# On import bitsandbytes probes for an optional CPU kernel of its own layer, which is not used here, and complains.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    import torch

    from accessory.config import ModelConfig, QuantizationConfig
    from accessory.models.llama import Llama

__version__ = "0.1.0"


def load_model(
    pretrained_path: Union[str, list[str]],
    llama_type: Optional[str] = None,
    llama_config: Union[str, list[str], None] = None,
    tokenizer_path: Optional[str] = None,
    quantization: Union[str, "QuantizationConfig"] = "none",
    device: Union[str, "torch.device"] = "cpu",
    dtype: Optional["torch.dtype"] = None,
) -> "Llama":
    """A base, or a base and trainables, as a model in eval mode.

    pretrained_path: folders, base first; later ones win. llama_type, llama_config, tokenizer_path: unset, they come
    from the last folder that has them. quantization: "none", "nf4", "int8", "rtn" or a QuantizationConfig; a base that
    is quantized on the disk (int4 folders) stays as it is under "none" and "nf4". dtype: compute type, torch.float32
    unless given. Trainables found in the folders have requires_grad set.

        model(input_ids, images=None)    -> logits, float32 [batch, sequence, vocab]
        model.generate(["prompt", …])    -> ["answer", …]; a multimodal model takes images=["file", None, …] too
        model.tokenizer                  -> Tokenizer, or None where no folder has one

    Raises accessory.errors.UserError (a ValueError) with one line about what is wrong and what to do.
    """
    import torch

    from accessory.assemble import assemble
    from accessory.config import QuantizationConfig, QuantMethod
    from accessory.errors import UserError
    from accessory.models import find_device

    if not isinstance(quantization, QuantizationConfig):
        try:
            quantization = QuantizationConfig(method=QuantMethod(quantization))
        except ValueError:
            known = ", ".join(method.value for method in QuantMethod)
            raise UserError(f"quantization={quantization!r}: known are {known}") from None
    model = describe_model(pretrained_path, llama_type, llama_config, tokenizer_path)
    return assemble(model, quantization, None, find_device(device), dtype or torch.float32)


def describe_model(
    pretrained_path: Union[str, list[str]],
    llama_type: Optional[str] = None,
    llama_config: Union[str, list[str], None] = None,
    tokenizer_path: Optional[str] = None,
) -> "ModelConfig":
    """`load_model`'s arguments as the configuration that `sources.open_sources` takes."""
    from accessory.config import LlamaType, ModelConfig
    from accessory.errors import UserError

    def listed(value: Union[str, list[str], None]) -> list[str]:
        return [] if value is None else [str(v) for v in ([value] if isinstance(value, (str, os.PathLike)) else value)]

    try:
        kind = None if llama_type is None else LlamaType(llama_type)
    except ValueError:
        raise UserError(f"llama_type={llama_type!r}: known are {', '.join(t.value for t in LlamaType)}") from None
    return ModelConfig(
        llama_type=kind,
        llama_config=listed(llama_config),
        tokenizer_path=None if tokenizer_path is None else str(tokenizer_path),
        pretrained_path=listed(pretrained_path),
    )
