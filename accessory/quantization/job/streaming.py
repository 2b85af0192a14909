"""A model whose blocks are in memory one at a time, so that its size does not matter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor, nn

from accessory.bases import Folder
from accessory.errors import UserError
from accessory.models import is_finite
from accessory.models.llama import Llama
from accessory.models.qformer import QFormerLlama
from accessory.quantization.linear import QuantLinear, linear_weight
from accessory.quantization.methods import Chain
from accessory.weights import layered, read_tensor, weight_places


class Streamed:
    """model: on the meta device, quantized or not; folders: says where its weights lie, asked again at every load."""

    def __init__(self, model: Llama, folders: Callable[[], list[Folder]], device: torch.device, dtype: torch.dtype):
        self.model, self.device, self.dtype = model, device, dtype
        self._folders = folders
        self._places = dict(weight_places(model, device, dtype))

    @contextlib.contextmanager
    def loaded(self, *paths: str) -> Iterator[Chain]:
        """The modules (or lone parameters) at `paths` with their weights, for as long as the context lasts."""
        sources = layered(self._folders())
        for name, (shape, store, _) in self._places.items():
            if any(f"{name}.".startswith(f"{path}.") for path in paths):
                tensor = read_tensor(name, sources[name], shape)
                if isinstance(tensor, Tensor):
                    refuse_not_finite(name, tensor, sources[name][-1].path)
                store(tensor)
        modules = Chain(self.model.get_submodule(path) for path in paths if path not in self._places)
        try:
            yield modules
        finally:
            release(modules)

    def embed(self, rows: Tensor, pixels: Callable[[int], Optional[Tensor]], batch_size: int) -> Iterator[Tensor]:
        """rows: int64 [n, s] -> embeddings, image slots filled, a batch each: [b, s, d]. pixels: see `Rows`."""
        has_images = isinstance(self.model, QFormerLlama) and bool((rows < 0).any())
        image_part = ("qformer", "qformer_proj", "start_img", "end_img") if has_images else ()
        with self.loaded("model.embed_tokens", *image_part):
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                shown = [pixels(i) for i in range(start, start + len(batch))] if has_images else []
                images = [image.to(self.device, self.dtype) for image in shown if image is not None]
                yield self.model.embed(batch.to(self.device), torch.cat(images) if images else None)

    @contextlib.contextmanager
    def head(self) -> Iterator[Callable[[Tensor], tuple[Tensor, Tensor]]]:
        """Yields what takes hidden states before the final norm [b, s, d] to those after it, and to the output layer's
        weight [v, d]."""
        output = "model.embed_tokens" if self.model.config.tie_word_embeddings else "lm_head"
        with self.loaded("model.norm", output) as (norm, layer):
            weight = layer.weight if isinstance(layer, nn.Embedding) else linear_weight(layer, self.dtype)
            yield lambda hidden: (norm(hidden.to(self.device)), weight)

    def rope(self, seqlen: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions 0 … seqlen-1, each [1, 1, s, e] in the compute type."""
        like = torch.empty(0, device=self.device, dtype=self.dtype)
        rotary = self.model.model.rotary_emb.to(self.device)
        cos, sin = rotary(like, torch.arange(seqlen, device=self.device).unsqueeze(0))
        return cos.unsqueeze(1), sin.unsqueeze(1)


def refuse_not_finite(name: str, tensor: Tensor, folder: Path) -> None:
    if not is_finite(tensor):
        raise UserError(f"{folder}: {name} holds NaN or infinity, which cannot be quantized; get a copy that is whole")


def release(module: nn.Module) -> None:
    """Give back the memory of a module's weights."""
    for part in module.modules():
        if isinstance(part, QuantLinear):
            for name in part.backend.payload_names:
                setattr(part, name, None)
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
