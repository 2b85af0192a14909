"""Triton's kernels compile for GPUs that this machine does not have, down to their machine code: what the interpreter
lets pass (a constant assigned twice, types that do not meet, PTX with a mistake) is found without one.

A driver that knows nothing but a GPU's name takes the place of CUDA's, and a launch compiles and goes no further.
"""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton")

from accessory import decoding_cuda  # noqa: E402
from accessory.fused import kernels_cuda  # noqa: E402
from accessory.quantization import eights_cuda, int4_cuda, matvec_cuda, nf4_cuda  # noqa: E402
from accessory.quantization.int4 import Int4  # noqa: E402
from accessory.quantization.nf4 import NF4  # noqa: E402

BF16 = torch.bfloat16


class NamedGPU:
    """What triton.compile asks a driver."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(params=[80, 90])
def compiled(request, monkeypatch, tmp_path):
    """The kernels that the test's calls compiled: {name: its variants}."""
    from triton.runtime import JITFunction, driver

    found: dict[str, list] = {}
    run = JITFunction.run

    def compile_alone(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        found.setdefault(self.fn.__name__, []).append(kernel)
        return kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_alone)
    monkeypatch.setattr(driver, "_active", NamedGPU(request.param))
    return found


@pytest.fixture(params=[True, False], ids=["shuffled", "read"])
def shuffled(request, monkeypatch):
    for module in (nf4_cuda, matvec_cuda):
        monkeypatch.setattr(module, "shuffles", lambda: request.param)
    return request.param


def lora(rows: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, rank, dtype=BF16), torch.zeros(rank, columns, dtype=BF16)


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4s_dequantization(compiled, shuffled, double_quant):
    shape = (64, 256)
    payload = NF4(double_quant=double_quant).quantize(torch.zeros(shape))
    for added in (None, lora(*shape, 16), lora(*shape, 64)):
        nf4_cuda.dequantize(payload, 64, shape, BF16, lora=added)
    assert len(compiled["_nf4_weight"]) == 3


@pytest.mark.parametrize("bits, reordered", [(2, False), (3, False), (4, False), (8, False), (4, True)])
def test_int4s_dequantization(compiled, bits, reordered):
    shape = (64, 256)
    payload = Int4(bits, 64, reordered=reordered).quantize(torch.zeros(shape))
    for added in (None, lora(*shape, 16)):
        int4_cuda.dequantize(payload, bits, shape, BF16, lora=added)
    assert len(compiled["_int4_weight"]) == 2


def test_a_weight_without_lora_passes_through_no_shared_memory(compiled):
    shape = (64, 256)
    nf4_cuda.dequantize(NF4().quantize(torch.zeros(shape)), 64, shape, BF16)
    for bits in (2, 3, 4, 8):
        int4_cuda.dequantize(Int4(bits, 64).quantize(torch.zeros(shape)), bits, shape, BF16)
    variants = [*compiled["_nf4_weight"], *compiled["_int4_weight"]]
    assert len(variants) == 5 and all(kernel.metadata.shared == 0 for kernel in variants)


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_nf4s_product_with_a_few_rows(compiled, shuffled, rows):
    backend, shape = NF4(), (4096, 256)
    payload = backend.quantize(torch.zeros(shape))
    x, share = torch.zeros(rows, shape[1], dtype=BF16), torch.zeros(rows, shape[0], dtype=BF16)
    for added in (None, share):
        matvec_cuda.matvec(x, payload, backend, shape, torch.zeros(shape[0]), added)
    assert len(compiled["_words_kernel"]) == 2


@pytest.mark.parametrize(
    "backend", [Int4(2, 64), Int4(3, 64), Int4(4, 64), Int4(4, 8), Int4(4, 64, reordered=True), Int4(8, 64)]
)
def test_int4s_product_with_a_few_rows(compiled, backend):
    shape = (4096, 256)
    payload = backend.quantize(torch.zeros(shape))
    for rows in (1, 8):
        matvec_cuda.matvec(torch.zeros(rows, shape[1], dtype=BF16), payload, backend, shape)
    kernel = "_columns_kernel" if backend.bits == 3 or backend.reordered else "_words_kernel"
    assert list(compiled) == [kernel] and len(compiled[kernel]) == 2


def test_the_comparison_of_the_ptx_with_the_table(compiled):
    words, out = torch.zeros(1024, dtype=torch.int32), torch.zeros(2, 8, 1024)
    eights_cuda._both_ways[(1,)](words, torch.zeros(16), out, 1024)
    assert len(compiled["_both_ways"]) == 1


def test_the_fused_blocks_kernels(compiled):
    x, wide = torch.zeros(4, 64, dtype=BF16), torch.zeros(4, 1)
    kernels_cuda.rotate_(x.view(4, 4, 16).clone(), x[:, :16].contiguous(), x[:, :16].contiguous(), 2)
    heads = [torch.zeros(1, count, 4, 16, dtype=BF16) for count in (2, 1, 1)]
    angle = x[:, :16].contiguous()
    for summed in (False, True):
        kernels_cuda.norm_backward(x, x, wide, torch.zeros(64), x, summed)
        kernels_cuda.swiglu_backward_(x.repeat(1, 2), x, summed)
        kernels_cuda.rotate_back_(x.view(4, 4, 16).clone(), *heads, angle, angle, summed)
    for rank in (16, 64):
        kernels_cuda.adapter_(x[:, :rank], torch.zeros(64, rank, dtype=BF16), x[0], x.clone())
    assert {"_norm_backward", "_swiglu_backward", "_rotate", "_rotate_back", "_adapter"} == set(compiled)


def test_a_tokens_kernels(compiled):
    x, wide = torch.zeros(2, 64, dtype=BF16), torch.zeros(64)
    for added in (None, x):
        decoding_cuda.add_norm(x, added, wide, 1e-5)
    decoding_cuda.swiglu(x, x)
    rope = torch.zeros(2, 1, 16, dtype=BF16)
    keys, position = torch.zeros(2, 2, 256, 16, dtype=BF16), torch.zeros(1, dtype=torch.int64)
    narrow = torch.zeros(2, 32, dtype=BF16)
    q = decoding_cuda.rotate_into_cache(x, narrow, narrow, rope, rope, keys, keys.clone(), position)
    decoding_cuda.attend(q, keys, keys.clone(), position, torch.zeros(2, dtype=torch.int64))
    assert len(compiled) == 5


def test_long_prompts_are_reached_with_64_bits(compiled):
    x, weight = torch.zeros(2, 64, dtype=BF16), torch.zeros(64)
    decoding_cuda.add_norm(x, None, weight, 1e-5)
    decoding_cuda._swiglu_kernel[(1,)](x, x, x, 2**31 + 1024, 1024)
    for name, narrow in (("_add_norm_kernel", ["i32"]), ("_swiglu_kernel", [])):  # the norm's weight is short
        offsets = re.findall(r"tt\.addptr .*, (?:tensor<\d+x)?(i\d+)", compiled[name][0].asm["ttir"])
        assert "i64" in offsets and [width for width in offsets if width != "i64"] == narrow
