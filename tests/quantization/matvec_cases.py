"""The few-row kernels against the dequantized weight in fp64; for Triton's interpreter and for a GPU alike."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.quantization.int4 import Int4
from accessory.quantization.matvec_cuda import fits, matvec
from accessory.quantization.nf4 import NF4

BACKENDS = {
    "nf4-double_quant": NF4(),
    "nf4-single_quant": NF4(double_quant=False),
    "nf4-blocks_of_256": NF4(blocksize=256),
    "int4": Int4(4, 64),
    "int4-groups_of_8": Int4(4, 8),
    "int4-per_channel": Int4(4, -1, sym=True),
    "int4-reordered": Int4(4, 64, reordered=True),
    "int2": Int4(2, 64),
    "int3": Int4(3, 64),
    "int3-reordered": Int4(3, 64, reordered=True),
    "int8": Int4(8, 64),
    "int8-per_channel": Int4(8, -1, sym=True),
}
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}


def exact_weight(backend, payload: tuple[Tensor, ...], shape: tuple[int, int]) -> Tensor:
    """fp64, without the rounding of int4's products to float16."""
    if isinstance(backend, NF4):
        return backend.dequantize(payload, shape, torch.float32).double()
    packed = backend.unpack(payload)
    group = torch.arange(shape[1], device=packed.codes.device) // packed.group_size
    group = group if packed.g_idx is None else packed.g_idx.long()
    return (packed.codes.double() - packed.zeros[:, group].double()) * packed.scales[:, group].double()


def check(backend, shape: tuple[int, int], rows: int, dtype: torch.dtype, device: str, bias: bool = True) -> None:
    g = torch.Generator().manual_seed(rows)
    weight = torch.randn(shape, generator=g) * torch.rand(shape[0], 1, generator=g)
    payload = list(backend.quantize(weight.to(device)))
    if getattr(backend, "reordered", False):
        payload[3] = payload[3][torch.randperm(shape[1], generator=g).to(device)]
    x = torch.randn(rows, shape[1], generator=g).to(device, dtype)
    bias = torch.randn(shape[0], generator=g).to(device) if bias else None
    added = torch.randn(rows, shape[0], generator=g).to(device, dtype) if rows % 2 else None
    assert fits(x, backend)
    found = matvec(x, payload, backend, shape, bias, added)
    expected = x.double() @ exact_weight(backend, tuple(payload), shape).T
    expected += 0 if bias is None else bias.to(dtype).double()
    expected += 0 if added is None else added.double()
    assert found.dtype == dtype and found.shape == (rows, shape[0])
    # Of every output, against the size of its row's terms: a lost last column or group shows.
    error = (found.double() - expected).abs() / expected.norm(dim=1, keepdim=True) * shape[0] ** 0.5
    assert error.max() < 8 * TOLERANCE[dtype], (backend, rows, dtype, error.max().item())
    assert torch.equal(found, matvec(x, payload, backend, shape, bias, added))
