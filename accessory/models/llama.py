"""LLaMA, read from top to bottom: embedding -> blocks of (norm, attention, norm, SwiGLU) -> norm -> logits.

Plain modules with Hugging Face's layout and names, so that a checkpoint's key is a module's path. Nothing here knows of
quantization or of what trains: `accessory.quantization` replaces the linears, `accessory.tuning` marks parameters.

Shapes: b batch, s sequence, d hidden size, h heads, k key/value heads, e head dimension, v vocabulary.
The order of roundings in 16 bit follows transformers' LLaMA, so exported models give the same logits there.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Protocol, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import Blip2Config, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from accessory.config import ImageTransform, QuantizationConfig
from accessory.errors import UserError

NO_IMAGES = "images given, but this model is language-only (llama_type llama_qformerv2_peft takes them)"


class Segments(NamedTuple):
    """Sequences that lie behind each other in the rows of a batch; attention stays inside each.

    bounds: int32 [n + 1], the first token of each sequence, counted over all rows, and the end of the last (which may
    stand there again and again: empty sequences behind it); longest: no sequence has more tokens."""

    bounds: Tensor
    longest: int

    def matrix(self, b: int, s: int) -> Tensor:
        """bool [b, 1, s, s]: causal, and only within a sequence."""
        place = torch.arange(b * s, device=self.bounds.device)
        sequence = torch.bucketize(place, self.bounds[1:].to(place.dtype), right=True).view(b, s)
        same = sequence[:, :, None] == sequence[:, None, :]
        return (same & torch.ones(s, s, dtype=torch.bool, device=place.device).tril()).unsqueeze(1)


Mask = Optional[Union[Tensor, Segments]]
"""Who attends to whom: bool, broadcastable to [b, h, s, keys], True may attend; Segments; or None: causal."""


class Cache(Protocol):
    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]: ...


class RMSNorm(nn.Module):
    """x / rms(x) * weight (arXiv:1910.07467); statistics and weight in fp32: bf16 numbers are 0.4 to 0.8 % apart, so a
    rounded weight would stay behind its master until that has moved as far."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and 1 / rms, where autograd would keep two fp32 copies of x. x / rms is rounded before it meets the
    weight, as in transformers; the sums of backward are in fp32.

    n = x / rms(x), g = dy * weight:    dweight = sum over tokens of dy * n    dx = (g - n * mean(g * n)) / rms(x)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse_rms = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        # Both in fp32: a product of two types is slow on a CPU.
        return ((wide * inverse_rms).to(x.dtype).float() * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        dy, normed = dy.float(), x.float() * inverse_rms
        products = dy * normed
        d_weight = products.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = products.mul_(weight).mean(-1, keepdim=True)
        dx = (dy * weight).sub_(normed.mul_(mean)).mul_(inverse_rms)
        return dx.to(x.dtype), d_weight, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv:2104.09864) in the halves layout. x: [b, h, s, e]; cos, sin: [b, 1, s, e]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def has_flash(q: Tensor) -> bool:
    """Whether FlashAttention takes queries like q, [b, h, s, e]."""
    return flash_takes(q.device, q.dtype, q.shape[-1])


def flash_takes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """16 bit, Ampere or newer, heads of usual sizes."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    if not (device.type == "cuda" and is_half and head_dim % 8 == 0 and head_dim <= 256):
        return False
    return _flash_runs(device.index or 0)


@torch.compiler.assume_constant_result
def _flash_runs(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0) and torch.backends.cuda.is_flash_attention_available()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Softmax attention. q: [b, h, s, e]; k, v: [b, k, keys, e], k dividing h -> [b, s, h, e]."""
    b, h, s, _ = q.shape
    if isinstance(mask, Segments):
        if has_flash(q):
            q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
            bounds, longest = mask
            # FlashAttention-2 (arXiv:2307.08691) of sequences of any lengths. torch.nn.attention.varlen wraps the same
            # operator, with arguments that differ between torch 2.11 and 2.13.
            out = torch.ops.aten._flash_attention_forward(q, k, v, bounds, bounds, longest, longest, 0.0, True, False)[
                0
            ]
            return out.unflatten(0, (b, s))
        mask = mask.matrix(b, s)
    if h != k.shape[1] and not (mask is None and has_flash(q)):
        # Repeated, not enable_gqa: but for flash, that option means the slow kernel that holds [h, s, s].
        k, v = (t.repeat_interleave(h // k.shape[1], dim=1) for t in (k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and s > 1, enable_gqa=h != k.shape[1]
    )
    return out.transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask, cache: Optional[Cache]) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (
            proj(x).view(b, s, -1, self.head_dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        return self.o_proj(attend(q, k, v, mask).reshape(b, s, -1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Mask = None, cache: Optional[Cache] = None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        with torch.device("cpu"):  # computed, not loaded: on the meta device its values would be lost
            self.rotary_emb = LlamaRotaryEmbedding(config)
        self.recomputed = 0  # so many blocks, the first ones, keep their input alone and compute again in backward
        self.fused = False  # whether blocks have a forward that does that by itself (accessory.fused)

    def forward(self, embeds: Tensor, position_ids: Tensor, mask: Mask = None, cache: Optional[Cache] = None) -> Tensor:
        """embeds: [b, s, d]; position_ids: int64 [b, s]; mask: see `Mask` -> normed hidden states [b, s, d]."""
        cos, sin = self.rotary_emb(embeds, position_ids)
        rope = cos.unsqueeze(1), sin.unsqueeze(1)
        x = embeds
        for i, block in enumerate(self.layers):
            recomputed = i < self.recomputed and torch.is_grad_enabled()
            if self.fused:
                x = block(x, rope, mask, cache, recomputed)
            elif recomputed:
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        return self.norm(x)


class Llama(nn.Module):
    """The language model that users hold: logits, generation and its tokenizer."""

    # What a multimodal model has: sizes of its image part, and the positions that an image takes in a row.
    vision_config: Optional[Blip2Config] = None
    image_words = 0
    image_transform = ImageTransform.resized_center_crop

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tokenizer: Any = None
        self.base: dict[str, str] = {}  # path and fingerprint of the weights
        self.quantization = QuantizationConfig()  # how they are held
        self.sharded: Any = None  # with fsdp: this rank's share of the quantized ones
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute type: activations have the embedding's dtype."""
        return self.model.embed_tokens.weight.dtype

    def embed(self, input_ids: Tensor, images: Optional[Tensor] = None) -> Tensor:
        """input_ids: int64 [b, s] -> [b, s, d]."""
        assert images is None
        return self.model.embed_tokens(input_ids)

    def hidden_states(
        self,
        input_ids: Tensor,
        position_ids: Optional[Tensor] = None,
        mask: Mask = None,
        images: Optional[Tensor] = None,
    ) -> Tensor:
        """input_ids: int64 [b, s] -> [b, s, d], before the output layer. images: of a multimodal model, see there."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return self.model(self.embed(input_ids, images), position_ids, mask)

    def forward(self, input_ids: Tensor, images: Optional[Tensor] = None) -> Tensor:
        """input_ids: int64 [b, s], padded on the right if at all -> logits float32 [b, s, v]."""
        if images is not None and any(image is not None for image in images):
            raise UserError(NO_IMAGES)
        self._check_ids(input_ids)
        return self.lm_head(self.hidden_states(input_ids)).float()

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < self.config.vocab_size:
            low, high = int(input_ids.min()), int(input_ids.max())
            raise UserError(f"input_ids from {low} to {high}: this model has the ids 0 to {self.config.vocab_size - 1}")

    def generate(
        self,
        prompts: list[str],
        images: Optional[list] = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 0.95,
        stop_text: Optional[str] = None,
    ) -> list[str]:
        """Answers, without the prompts; temperature 0 is greedy, otherwise nucleus sampling with top_p. An answer ends
        before stop_text too. images: of a multimodal model, one a prompt: a file, a PIL image or None."""
        from accessory.generation import generate

        return generate(self, prompts, max_new_tokens, temperature, top_p, stop_text, images)
