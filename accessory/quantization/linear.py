"""QuantLinear: one frozen linear for every way of storing its weight.

    forward   y = x @ dq(W)^T + bias + added  backward   dx = dy @ dq(W),   dbias = sum over tokens of dy (fp32)

Neither needs x or y: nothing but the packed weight, which exists anyway, is kept for backward. The weight is
dequantized twice rather than held once in 16 bit. The libraries' own layers each break one of these promises: see
bitsandbytes' in-place cast of a trainable bias, or AutoRound's 16-bit weight in the graph.
"""

from collections.abc import Sequence
from typing import Any, Optional, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.kernels import working
from accessory.quantization.int4 import Int4
from accessory.quantization.packed import Packed


class Backend(Protocol):
    """A storage format: all state is in the payload tensors, all settings in the instance, which is hashable."""

    name: str
    payload_names: tuple[str, ...]

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """weight: float [out_features, in_features] -> payload, in the order of payload_names."""

    def dequantize(self, payload: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """payload -> weight of `shape` in `dtype`."""

    def dequantize_into(self, payload: Sequence[Tensor], out: Tensor, lora: Optional[tuple[Tensor, Tensor]]) -> None:
        """payload -> weight, written to `out` [out, in], whose rows may be apart; plus B A, if lora is (B, A), rounded
        once. Only where `can_fold` says so."""

    def can_fold(self, payload: Sequence[Tensor], shape: tuple[int, int]) -> bool:
        """Whether a kernel for this payload's device can add LoRA's product to the weight before it is rounded."""


# Operators take numbers, not objects: a backend is passed to them by its place here.
_BACKENDS: list[Backend] = []


def _index_of(backend: Backend) -> int:
    if backend not in _BACKENDS:
        _BACKENDS.append(backend)
    return _BACKENDS.index(backend)


# Two operators, opaque to torch.compile. Were the dequantization visible, the compiler would see the same expression in
# forward and backward, compute it once, and keep the 16-bit weight of every layer in between: 13 GB for a 7B model.


def _forward(
    x: Tensor, bias: Optional[Tensor], added: Optional[Tensor], payload: Sequence[Tensor], backend: int,
    out_features: int, in_features: int,
) -> Tensor:  # fmt: skip
    weight = _BACKENDS[backend].dequantize(payload, (out_features, in_features), x.dtype)
    if added is None:
        return F.linear(x, weight, bias)
    return _add_product(added.clone() if bias is None else added + bias, x, weight)


def _add_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + x W^T, rounded once, in y's place."""
    y.view(-1, y.shape[-1]).addmm_(x.flatten(0, -2), weight.T)
    return y


def _input_gradient(dy: Tensor, payload: Sequence[Tensor], backend: int, out_features: int, in_features: int) -> Tensor:
    return dy @ _BACKENDS[backend].dequantize(payload, (out_features, in_features), dy.dtype)


_forward_operator = torch.library.custom_op("accessory::frozen_linear", _forward, mutates_args=())
_input_gradient_operator = torch.library.custom_op(
    "accessory::frozen_linear_input_gradient", _input_gradient, mutates_args=()
)
_forward_operator.register_fake(lambda x, bias, added, payload, backend, out, in_: x.new_empty(*x.shape[:-1], out))
_input_gradient_operator.register_fake(lambda dy, payload, backend, out, in_: dy.new_empty(*dy.shape[:-1], in_))


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Optional[Tensor], added: Optional[Tensor], backend: int, shape: tuple[int, int],
        *payload: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.backend, ctx.shape, ctx.has_bias = backend, shape, bias is not None
        ctx.save_for_backward(*payload)
        bias = None if bias is None else bias.to(x.dtype)
        if torch.compiler.is_compiling():
            return _forward_operator(x, bias, added, payload, backend, *shape)
        if added is None:
            return _forward(x, bias, added, payload, backend, *shape)
        ctx.mark_dirty(added)
        weight = _BACKENDS[backend].dequantize(payload, shape, x.dtype)
        return _add_product(added if bias is None else added.add_(bias), x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        dx = dbias = None
        payload = ctx.saved_tensors  # once: under activation checkpointing a second access is an error
        if ctx.needs_input_grad[0]:
            input_gradient = _input_gradient_operator if torch.compiler.is_compiling() else _input_gradient
            dx = input_gradient(dy.contiguous(), payload, ctx.backend, *ctx.shape)
        if ctx.has_bias and ctx.needs_input_grad[1]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32)
        return dx, dbias, dy if ctx.needs_input_grad[2] else None, None, None, *(None for _ in payload)


class QuantLinear(nn.Module):
    """Frozen linear with `backend`'s storage; `bias`, if any, is fp32 and may train.

    Without a payload (before `load_weight`) it stands for its shape only, as on the meta device.
    """

    def __init__(self, in_features: int, out_features: int, backend: Backend):
        super().__init__()
        self.in_features, self.out_features, self.backend = in_features, out_features, backend
        self._backend_index = _index_of(backend)
        self.bias: Optional[nn.Parameter] = None
        for name in backend.payload_names:
            self.register_buffer(name, None)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def payload(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.backend.payload_names)

    @property
    def is_loaded(self) -> bool:
        return all(tensor is not None for tensor in self.payload)

    @property
    def weight(self) -> Tensor:
        """Empty; PEFT reads its device to put LoRA there (uint8, lest it read a dtype too). See `dequantize`."""
        return torch.empty(0, dtype=torch.uint8, device=self.payload[0].device if self.is_loaded else "cpu")

    @torch.no_grad()
    def load_weight(self, weight: Tensor) -> None:
        """Store `weight`, float [out_features, in_features], in the backend's format on weight's device."""
        assert tuple(weight.shape) == self.shape
        for name, tensor in zip(self.backend.payload_names, self.backend.quantize(weight), strict=True):
            setattr(self, name, tensor)

    @torch.no_grad()
    def load_packed(self, packed: Packed) -> None:
        """Store a weight that is in whole numbers: as it is, or its values where the backend is another."""
        assert packed.shape == self.shape
        if not isinstance(self.backend, Int4):
            self.load_weight(packed.dequantize(torch.float32))
            return
        for name, tensor in zip(self.backend.payload_names, self.backend.pack(packed), strict=True):
            setattr(self, name, tensor)

    def load_bias(self, bias: Tensor) -> None:
        """Set the bias, kept in fp32: [out_features]."""
        trains = self.bias is not None and self.bias.requires_grad
        self.bias = nn.Parameter(bias.detach().to(torch.float32, copy=True), requires_grad=trains)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out_features, in_features] in `dtype`."""
        return self.backend.dequantize(self.payload, self.shape, dtype)

    @property
    def can_fold(self) -> bool:
        """Whether `dequantize_into` can add LoRA's product."""
        return self.backend.can_fold(self.payload, self.shape)

    def dequantize_into(self, out: Tensor, lora: Optional[tuple[Tensor, Tensor]] = None) -> None:
        """The weight, written to `out` [out_features, in_features] in its dtype; plus B A where lora is (B, A)."""
        if self.can_fold:
            self.backend.dequantize_into(self.payload, out, lora)
        else:
            assert lora is None
            out.copy_(self.dequantize(out.dtype))

    def forward(self, x: Tensor, added: Optional[Tensor] = None) -> Tensor:
        """x: [..., in_features] -> [..., out_features], in x's dtype. added: of that shape, an adapter's share, in
        whose place y may be written. It is added before y is rounded: a sum of two 16-bit numbers has no room for one
        that is less than half the distance from the other to its neighbour, and an adapter starts at 0. It would learn,
        and for a while change nothing."""
        if x.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            slower = "each token's forward pass dequantizes all weights"
            kernels = working("accessory.quantization.matvec_cuda", slower, x.device)
            if kernels is not None and kernels.fits(x, self.backend):
                return kernels.matvec(x, self.payload, self.backend, self.shape, self.bias, added)
        return _FrozenLinear.apply(x, self.bias, added, self._backend_index, self.shape, *self.payload)

    def _apply(self, fn, recurse: bool = True):
        """Move, never cast: `model.half()` would destroy scales and codes."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.backend.name}"


def linear_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a linear, quantized or not, in `dtype`: [out_features, in_features]."""
    return layer.dequantize(dtype) if isinstance(layer, QuantLinear) else layer.weight.to(dtype)
