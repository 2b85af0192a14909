"""What the tests of the memory estimate share: tiny models, and a count of what is allocated."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from accessory.config import QuantizationConfig, QuantMethod, RecipeConfig
from accessory.models import build_model
from accessory.quantization import quantize
from accessory.tuning.recipe import add_trainables, mark_trainable
from accessory.weights import weight_places

NORM_BIAS, BOTH = RecipeConfig(), RecipeConfig(name="norm_bias_lora", lora=True)
LORA = RecipeConfig(name="lora", norm=False, bias=False, lora=True, targets=["q_proj", "down_proj"], rank=8)
RECIPES = [NORM_BIAS, BOTH, LORA]
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}


def tiny(recipe: RecipeConfig = BOTH, loaded: bool = True, dtype=torch.bfloat16, images=None, **settings):
    """Three blocks of 256 in NF4, on the CPU or without weights. settings: other sizes; the rest is quantization's."""
    sizes = {name: settings.pop(name, size) for name, size in SIZES.items()}
    config = QuantizationConfig(**({"method": QuantMethod.nf4} | settings))
    model = build_model(LlamaConfig(**sizes), images)
    quantize(model, config, dtype)
    with torch.device("cpu" if loaded else "meta"):
        add_trainables(model, recipe)
    mark_trainable(model, recipe)
    if loaded:
        for _, (shape, store, _) in weight_places(model, torch.device("cpu"), dtype):
            store(0.02 * torch.randn(shape))
    return model


def batch(rows: int, width: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, (rows, width))
    return {"input_ids": ids, "targets": ids, "position_ids": torch.arange(width).expand(rows, width)}


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are made and not freed yet, as an allocator would. there: those made before."""

    def __init__(self, there):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._there = {tensor.untyped_storage().data_ptr() for tensor in there}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes and storage.data_ptr() not in self._there:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
