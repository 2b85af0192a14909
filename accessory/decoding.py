"""Answers on a GPU: prompts are read with few launches, and the step from a token to the next one's logits is captured
once as a CUDA graph, and replayed.

Launched one by one, the kernels of a token wait for Python: some 1,400 launches of about 10 us in a 7B model, where its
weights are read in 1 ms. A graph launches them all at once, but always the same ones at the same addresses. So all that
differs from token to token lies in tensors, which the step itself advances: the token, and the position, at which keys
and values are written and up to which attention reads. The cache's capacity costs memory, but no time.

The host stays ahead: while it looks at a token (and the caller decodes text), the forward pass that follows is already
running. Tokens are drawn outside the graph, and only once the answer goes on, so that a seed gives the same draws as
without graphs.

A `Decoder` holds the graph, its cache and 16-bit copies of LoRA matrices, and no reference to the model. Between
answers it waits in a pool, which goes with the model; a graph whose weights have moved since is thrown away.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from itertools import chain
from threading import RLock
from typing import Any, Optional
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.capture import capturing
from accessory.errors import first_line
from accessory.kernels import working
from accessory.models.llama import Llama, Mask, attend
from accessory.tuning.lora import LoraQuantLinear

log = logging.getLogger(__name__)

KEPT = 2  # idle decoders a model; a 7B model's takes 128 MiB a row for 256 positions
BUCKET = 256  # capacities are multiples of it, so that prompts of like length share a graph
SLOWER = "answers come from a plain forward pass for each token, several times slower"


class KVCache:
    """Keys and values of all layers, [b, k, capacity, e] each, written in place."""

    def __init__(self, model: Llama, batch: int, capacity: int):
        config = model.config
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=model.device, dtype=model.dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0  # positions filled before the current forward pass

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key and value [b, k, s, e]; returns all so far, [b, k, length + s, e]."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Decoder:
    """Answers to one number of prompts: `read` puts them into `cache`, then `step` goes from token to token."""

    def __init__(self, model: Llama, batch: int, capacity: int, kernels: Any):
        self.batch, self.capacity, self.kernels = batch, capacity, kernels
        self.cache = KVCache(model, batch, capacity)
        self.token = torch.zeros(batch, dtype=torch.int64, device=model.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.pad = torch.zeros(batch, dtype=torch.int64, device=model.device)
        self.adapters = {id(layer): _halved(layer, model.dtype) for layer in _lora_layers(model)}
        self.weights = _identity(model)
        self._graph: Optional[torch.cuda.CUDAGraph] = None
        self._logits: Optional[Tensor] = None

    def suits(self, model: Llama, batch: int, capacity: int) -> bool:
        return self.batch == batch and self.capacity >= capacity and self.weights == _identity(model)

    def read(self, model: Llama, x: Tensor, position_ids: Tensor, mask: Mask, pad: Optional[Tensor]) -> Tensor:
        """Prompts through the blocks and into the cache, from its start, in a third of the launches of the model's own
        forward pass, for which a short prompt would wait. x: embedded, [b, s, d]; position_ids: int64 [b, s]; pad:
        int64 [b], empty positions before each prompt -> normed hidden states of the last position, [b, d]."""
        self._refresh(model)
        decoder, (b, s, _) = model.model, x.shape
        self.position.zero_()
        rope = [t.flatten(0, 1) for t in decoder.rotary_emb(x, position_ids)]

        def heard(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            q = q.unflatten(0, (b, s)).transpose(1, 2)
            return attend(q, keys[:, :, :s], values[:, :, :s], mask).flatten(0, 1).flatten(1)

        x, added = self._blocks(decoder, x.flatten(0, 1), rope, heard)
        x, added = (t.unflatten(0, (b, s))[:, -1].contiguous() for t in (x, added))
        self.position.fill_(s)
        self.pad.zero_() if pad is None else self.pad.copy_(pad)
        return self.kernels.add_norm(x, added, decoder.norm.weight, decoder.norm.eps)[1]

    def _refresh(self, model: Llama) -> None:
        """The copies of LoRA's matrices, which may have trained since."""
        copies, masters = [], []
        for layer in _lora_layers(model):
            for copied, own in zip(self.adapters[id(layer)], _masters(layer), strict=True):
                copies += copied[:2]
                masters += own[:2]
        if copies:
            torch._foreach_copy_(copies, masters)

    def step(self, token: Tensor) -> Tensor:
        """token: int64 [b] -> logits of the next one, float32 [b, v], valid until the next step."""
        assert self._graph is not None and self._logits is not None
        self.token.copy_(token)
        self._graph.replay()
        return self._logits

    def capture(self, model: Llama) -> None:
        side = _side_stream(model.device)
        with torch.cuda.device(model.device):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles kernels and makes workspaces, which a capture must not
                for _ in range(2):
                    self.forward(model)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, model.device):
                self._logits = self.forward(model)
        self._graph = graph

    def forward(self, model: Llama) -> Tensor:
        """What the graph holds: the forward pass for one token of each row, then one position on."""
        decoder, kernels = model.model, self.kernels
        x = decoder.embed_tokens(self.token)
        rope = [t.squeeze(1) for t in decoder.rotary_emb(x, (self.position - self.pad).unsqueeze(1))]

        def heard(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return kernels.attend(q, keys, values, self.position, self.pad)

        _, h = kernels.add_norm(*self._blocks(decoder, x, rope, heard), decoder.norm.weight, decoder.norm.eps)
        self.position += 1
        return model.lm_head(h).float()

    def _blocks(
        self, decoder: nn.Module, x: Tensor, rope: list[Tensor], heard: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`models/llama.py`'s blocks with a few launches each. x: [m, d], the same number of tokens of each row; rope:
        [m, e] each; heard: attention, of queries [m, h, e] and a layer's cache, to [m, h * e] -> the last block's
        residual and what is to be added to it, [m, d]."""
        kernels, added = self.kernels, None
        for layer, block in enumerate(decoder.layers):
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            x, h = kernels.add_norm(x, added, block.input_layernorm.weight, block.input_layernorm.eps)
            added = self._linear(
                block.self_attn.o_proj, heard(self._queries(block.self_attn, h, rope, keys, values), keys, values)
            )
            norm = block.post_attention_layernorm
            x, h = kernels.add_norm(x, added, norm.weight, norm.eps)
            added = self._mlp(block.mlp, h)
        return x, added

    def _queries(self, attention: nn.Module, h: Tensor, rope: list[Tensor], keys: Tensor, values: Tensor) -> Tensor:
        """Rotated, [m, h, e]; the tokens' keys and values go into the cache."""
        q, k, v = (self._linear(proj, h) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
        return self.kernels.rotate_into_cache(q, k, v, *rope, keys, values, self.position)

    def _mlp(self, mlp: nn.Module, h: Tensor) -> Tensor:
        gated = self.kernels.swiglu(self._linear(mlp.gate_proj, h), self._linear(mlp.up_proj, h))
        return self._linear(mlp.down_proj, gated)

    def _linear(self, layer: nn.Module, x: Tensor) -> Tensor:
        """LoRA in three launches rather than six: its matrices are in x's dtype already."""
        if id(layer) not in self.adapters:
            return layer(x)
        share = None
        for a, b, scaling in self.adapters[id(layer)]:
            beta = 0 if share is None else 1  # 0: what it held is not read
            share = x.new_empty(len(x), len(b)) if share is None else share
            share.addmm_(F.linear(x, a), b.T, beta=beta, alpha=scaling)
        return layer.base_layer(x, share)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all decoders: cuBLAS keeps a workspace of 32 MiB for every stream that it ever met."""
    return torch.cuda.Stream(device)


def _lora_layers(model: Llama) -> list[LoraQuantLinear]:
    return [layer for layer in model.model.modules() if isinstance(layer, LoraQuantLinear)]


def _masters(layer: LoraQuantLinear) -> list[tuple[Tensor, Tensor, float]]:
    """A, B and scaling of the adapters in use."""
    names = [] if layer.disable_adapters else layer.active_adapters
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in names]


def _halved(layer: LoraQuantLinear, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, float]]:
    return [(a.to(dtype, copy=True), b.to(dtype, copy=True), scaling) for a, b, scaling in _masters(layer)]


def _identity(model: Llama) -> tuple:
    """Equal as long as every weight lies where it lay, and means what it meant."""
    parts = (model.model, model.lm_head)
    tensors = chain.from_iterable(chain(part.parameters(), part.buffers()) for part in parts)
    adapters = tuple((id(layer), *(scaling for *_, scaling in _masters(layer))) for layer in _lora_layers(model))
    return adapters, tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors)


_idle: WeakKeyDictionary[Llama, list[Decoder]] = WeakKeyDictionary()
# Demos answer from several threads. Reentrant: an answer that nobody ended gives its decoder back when the garbage
# collector finds it, which may be in here.
_lock = RLock()
_warned: set[str] = set()


@contextlib.contextmanager
def borrowed(model: Llama, batch: int, capacity: int) -> Iterator[Optional[Decoder]]:
    """A captured decoder that no other answer uses; None on a CPU, for a sharded model, and where capturing fails."""
    decoder = _take(model, batch, capacity)
    try:
        yield decoder
    finally:
        if decoder is not None:
            with _lock:
                kept = [decoder, *(other for other in _idle.get(model, []) if other.batch != batch)]
                _idle[model] = kept[:KEPT]


def release(model: Llama) -> None:
    """Free the memory of the model's idle decoders."""
    with _lock:
        _idle.pop(model, None)


def _take(model: Llama, batch: int, capacity: int) -> Optional[Decoder]:
    # A sharded payload is gathered by hooks of the blocks, which the decoder does not call.
    if model.device.type != "cuda" or model.sharded is not None:
        return None
    kernels = working("accessory.decoding_cuda", SLOWER, model.device)
    if kernels is None:
        return None
    with _lock:
        idle = _idle.get(model, [])
        found = next((d for d in idle if d.batch == batch), None)
        _idle[model] = [d for d in idle if d.batch != batch]
    if found is not None and found.suits(model, batch, capacity):
        return found
    found = None  # its memory is for the new one
    try:
        decoder = Decoder(model, batch, -(-capacity // BUCKET) * BUCKET, kernels)
        decoder.capture(model)
    except Exception as error:  # of the driver, or of an operation that cannot be captured
        reason = first_line(error)
        if reason not in _warned:
            _warned.add(reason)
            log.warning("%s: %s", SLOWER, reason)
        return None
    return decoder
