"""LLaMA with BLIP-2's frozen vision model and Q-Former in front (arXiv:2301.12597; LLaMA2-Accessory's llama_qformerv2).

    image -> ViT -> Q-Former's 32 query tokens -> Linear + LayerNorm -> 32 embeddings
    row:     BOS, start_img, 32 image embeddings, end_img, text

In token rows the positions of an image, tags included, hold IMAGE_SLOT; `embed` puts its embeddings there. So packing,
masks, positions and generation know images as tokens like any others.

Shapes: n images, p pixels a side, q query tokens, w = q + 2 positions of an image; otherwise as in llama.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2Config, Blip2QFormerModel, Blip2VisionModel, LlamaConfig

from accessory.data.images import ImageInput
from accessory.data.packing import IMAGE_SLOT
from accessory.errors import UserError
from accessory.models.llama import Llama

TAGS = 2  # start_img and end_img


def image_input(config: Optional[Blip2Config]) -> Optional[ImageInput]:
    """What data has to know of a model's images; None for a language-only model."""
    if config is None:
        return None
    return ImageInput(size=config.vision_config.image_size, words=config.num_query_tokens + TAGS)


class CastLinear(nn.Linear):
    """A linear that computes in its input's dtype, whatever its own: fp32 where it trains."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class CastLayerNorm(nn.LayerNorm):
    """LayerNorm in its input's dtype, from fp32 parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class VisionQFormer(nn.Module):
    """transformers' BLIP-2 without its language model, under its names."""

    def __init__(self, config: Blip2Config):
        super().__init__()
        self.vision_model = Blip2VisionModel(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        self.qformer = Blip2QFormerModel(config.qformer_config)

    def train(self, mode: bool = True) -> "VisionQFormer":
        """Always eval: with BLIP-2's dropout one image would have other features at every look."""
        return super().train(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: float [n, 3, p, p] -> [n, q, 768]; without gradient unless the weights train."""
        trains = self.query_tokens.requires_grad and torch.is_grad_enabled()
        with contextlib.nullcontext() if trains else torch.no_grad():
            patches = self.vision_model(pixel_values.to(self.query_tokens.dtype)).last_hidden_state
            queries = self.query_tokens.expand(len(pixel_values), -1, -1)
            return self.qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state


class QFormerLlama(Llama):
    """The multimodal model; without images it is the language model."""

    def __init__(self, config: LlamaConfig, vision_config: Blip2Config):
        super().__init__(config)
        self.vision_config = vision_config
        self.image_words, self.image_size = image_input(vision_config).words, image_input(vision_config).size
        self.qformer = VisionQFormer(vision_config)
        self.qformer_proj = nn.Sequential(
            CastLinear(vision_config.qformer_config.hidden_size, config.hidden_size), CastLayerNorm(config.hidden_size)
        )
        self.start_img = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.end_img = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    @torch.no_grad()
    def initialize_projector(self) -> None:
        """Fresh values for a projector and tags that no checkpoint has, of the size of token embeddings: at LayerNorm's
        own scale an image would drown the text."""
        scale = self.model.embed_tokens.weight.float().std().item()
        fresh = nn.Linear(self.qformer_proj[0].in_features, self.config.hidden_size)  # its own initialisation
        values = {"weight": fresh.weight, "bias": fresh.bias}
        _set(self.qformer_proj[0], values, self.device)
        size = self.config.hidden_size
        _set(self.qformer_proj[1], {"weight": torch.full((size,), scale), "bias": torch.zeros(size)}, self.device)
        tags = {name: scale * torch.randn(1, 1, size) for name in ("start_img", "end_img")}
        _set(self, tags, self.device)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: float [n, 3, p, p] -> embeddings of their positions, tags included: [n, w, d]."""
        features = self.qformer_proj(self.qformer(pixel_values).to(self.dtype))
        tags = (tag.to(self.dtype).expand(len(features), -1, -1) for tag in (self.start_img, self.end_img))
        start, end = tags
        return torch.cat((start, features, end), dim=1)

    def embed(self, input_ids: Tensor, images: Optional[Tensor] = None) -> Tensor:
        """input_ids: int64 [b, s] with w slots for each of `images`, [n, 3, p, p], in order -> [b, s, d]."""
        if images is None:
            return self._tie_to_image_part(super().embed(input_ids))
        slots = input_ids == IMAGE_SLOT
        embeds = super().embed(input_ids.masked_fill(slots, 0))
        # The n-th slot takes the n-th vector. Not masked_scatter: its backward waits for the GPU to count the slots.
        place = slots.flatten().cumsum(0).sub(1).clamp(min=0)
        shown = self.encode_images(images).flatten(0, 1).index_select(0, place).view_as(embeds)
        return torch.where(slots.unsqueeze(-1), shown, embeds)

    def _tie_to_image_part(self, embeds: Tensor) -> Tensor:
        """The same embeddings, as a function of what trains in the image part too: a text-only batch gives it the
        gradient 0 rather than none, so that all ranks have one, whether they met an image or not."""
        parts = (*self.qformer.parameters(), *self.qformer_proj.parameters(), self.start_img, self.end_img)
        nothing = [p.flatten()[:0].sum() for p in parts if p.requires_grad]
        if not nothing or not torch.is_grad_enabled():
            return embeds
        return embeds + torch.stack(nothing).sum().to(embeds.dtype)

    def forward(self, input_ids: Tensor, images: Union[Tensor, Sequence[Optional[Tensor]], None] = None) -> Tensor:
        """input_ids: int64 [b, s], text only, padded on the right if at all; images: float [b, 3, p, p], one a row, or
        a list with None for rows without -> logits float32 [b, s, v], a row for each text token."""
        if images is None:
            return super().forward(input_ids)
        rows = self._check_images(images, len(input_ids))
        self._check_ids(input_ids)
        shown = torch.tensor([image is not None for image in rows], device=input_ids.device)
        if not shown.any():
            return super().forward(input_ids)
        b, s = input_ids.shape
        # A row with an image gets its slots behind BOS, one without as much padding at its end.
        slots = input_ids.new_full((b, self.image_words), IMAGE_SLOT)
        with_image = torch.cat((input_ids[:, :1], slots, input_ids[:, 1:]), dim=1)
        without = torch.cat((input_ids, slots.zero_()), dim=1)
        pixels = torch.stack([image for image in rows if image is not None]).to(input_ids.device)
        hidden = self.hidden_states(torch.where(shown[:, None], with_image, without), images=pixels)
        start = torch.where(shown, self.image_words, 0)
        places = start[:, None] + torch.arange(s, device=input_ids.device)
        hidden = hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return self.lm_head(hidden).float()

    def _check_images(
        self, images: Union[Tensor, Sequence[Optional[Tensor]]], count: int
    ) -> Sequence[Optional[Tensor]]:
        if isinstance(images, (str, bytes)) or not isinstance(images, (Tensor, Sequence)):
            raise UserError(f"images is a {type(images).__name__}: expected pixels, a tensor or None for each row")
        if len(images) != count:
            raise UserError(f"{len(images)} images for {count} rows of input_ids: give one a row, or None in its place")
        shape = (3, self.image_size, self.image_size)
        for image in images:
            if image is not None and not (isinstance(image, Tensor) and image.is_floating_point()):
                kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
                raise UserError(f"an image is {kind}: expected normalised float pixels; generate() takes files")
            if image is not None and tuple(image.shape) != shape:
                raise UserError(f"an image has shape {list(image.shape)}, this model takes {list(shape)}")
        return images


def _set(module: nn.Module, values: dict[str, Tensor], device: torch.device) -> None:
    """fp32 values for parameters of `module`, which keep training or not."""
    for name, value in values.items():
        trains = getattr(module, name).requires_grad
        setattr(module, name, nn.Parameter(value.detach().to(device, torch.float32), requires_grad=trains))
