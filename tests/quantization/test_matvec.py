"""The kernels of a few rows: on a CPU through Triton's interpreter, on a GPU as they are; and who calls them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreter import run_interpreted

from accessory.quantization import QuantLinear
from accessory.quantization.nf4 import NF4

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch sees none")
NAMES = ["nf4-double_quant", "nf4-single_quant", "nf4-blocks_of_256", "int4", "int4-groups_of_8", "int4-per_channel",
         "int4-reordered", "int2", "int3", "int3-reordered", "int8", "int8-per_channel"]  # fmt: skip


def test_the_kernels_compute_what_the_dequantized_weight_does():
    run_interpreted(Path(__file__).with_name("interpreted_matvec.py"))


def test_a_cpu_computes_with_the_dequantized_weight():
    layer = QuantLinear(192, 128, NF4())
    layer.load_weight(torch.randn(128, 192))
    x = torch.randn(1, 192)
    with torch.no_grad():
        assert torch.equal(layer(x), x @ layer.dequantize(torch.float32).T)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_compiled_kernels_compute_what_the_dequantized_weight_does(name, dtype):
    from matvec_cases import BACKENDS, check

    for shape, counts in (((4096, 4096), (1, 2, 3, 5, 8)), ((1003, 11008), (1, 5)), ((1024, 8192), (1, 8))):
        for rows in counts:  # each a kernel of its own, which takes a second to compile
            check(BACKENDS[name], shape, rows, dtype, "cuda", bias=rows != 2)


@pytest.mark.gpu
@gpu
def test_a_layer_takes_the_kernel_for_a_few_rows_without_gradients_and_no_others(monkeypatch):
    from accessory.quantization import matvec_cuda

    layer = QuantLinear(4096, 256, NF4())
    layer.load_weight(torch.randn(256, 4096, device="cuda"))
    few, many = (torch.randn(1, rows, 4096, device="cuda", dtype=torch.bfloat16) for rows in (8, 9))
    with torch.no_grad():
        layer(few)  # the first use in a process tries the kernels out
    calls = []
    real = matvec_cuda.matvec
    monkeypatch.setattr(matvec_cuda, "matvec", lambda x, *rest: calls.append(x.shape) or real(x, *rest))
    layer(few)
    with torch.no_grad():
        layer(many)
        assert calls == []
        y = layer(few)
    assert calls == [(1, 8, 4096)]
    torch.testing.assert_close(y, few @ layer.dequantize(torch.bfloat16).T, rtol=2**-6, atol=2)
