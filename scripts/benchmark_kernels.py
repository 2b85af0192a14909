"""Are our kernels worth having? Each of them beside what a library makes of the same function, on a GPU.

    python scripts/benchmark_kernels.py --model 7b --tokens 512 8192 --output kernels.json

Pointwise functions: torch.compile of the plain function. What LoRA adds to one of two linears that share y: cuBLAS.
NF4's weight: bitsandbytes' three kernels; int4's: torch.compile of plain PyTorch. With LoRA's product added on the way,
beside adding it to the weight afterwards. A few rows' product with the packed weight: bitsandbytes' own for NF4, a
product with the dequantized weight for int4.

Medians of calls in a CUDA graph, as a training step and a decoder make them, with an empty cache: launching a short
kernel takes longer than running it, and is no property of the kernel. `of a copy` is the share of that time in which a
copy would move what must be read and written once.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import _checkout  # noqa: F401

import accessory  # noqa: F401

# isort: split
import bitsandbytes
import torch  # after accessory, which sets what torch reads when it is loaded

from accessory.fused import linears, pointwise
from accessory.quantization.int4 import Int4, unpack_codes
from accessory.quantization.nf4 import NF4
from accessory.sizes import SHAPES

Call = Callable[[], object]
DTYPE = torch.bfloat16


def random(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")


def pointwise_cases(model: str, tokens: int) -> Iterator[tuple[str, Call, Call, int]]:
    """(name, ours, the library's, bytes that must be moved)."""
    d, f, _, heads, kv_heads, _ = SHAPES[model]
    size = d // heads
    angle = torch.rand(tokens, size // 2, device="cuda")
    rope = [turn(angle).repeat(1, 2).to(DTYPE) for turn in (torch.cos, torch.sin)]
    qkv = random(tokens, heads + 2 * kv_heads, size)
    gradients = [random(1, tokens, h, size).transpose(1, 2) for h in (heads, kv_heads, kv_heads)]
    x, dy, residual = (random(tokens, d) for _ in range(3))
    rstd = torch.rand(tokens, 1, device="cuda")
    weight, gate_up, dh = random(d, dtype=torch.float32), random(tokens, 2 * f), random(tokens, f)
    turned = heads + kv_heads
    arguments = {
        "norm_backward": ((dy, x, rstd, weight, residual, True), 4 * x.nbytes),
        "rotate_": ((qkv, *rope, turned), 2 * qkv.nbytes * turned // qkv.shape[1]),
        "rotate_back_": ((qkv, *gradients, *rope, True), 2 * qkv.nbytes),
        "swiglu_backward_": ((gate_up, dh, True), 2 * gate_up.nbytes + dh.nbytes),
    }
    for name, (given, moved) in arguments.items():
        function = getattr(pointwise, name)
        yield f"{name} {tokens}", partial(function, *given), partial(torch.compile(function.plain), *given), moved
    t, b, side_by_side = random(tokens, 16), random(f, 16), random(tokens, 2 * f)
    bias, out = gate_up[0, :f], side_by_side[:, :f]
    plain = partial(torch.addmm, bias, t, b.T, out=out)
    yield f"adapter_ {tokens}", partial(linears.adapter_, t, b, bias, out), plain, t.nbytes + b.nbytes + dh.nbytes


def weight_cases(model: str) -> Iterator[tuple[str, Call, Call, int]]:
    d, f, *_ = SHAPES[model]
    for shape in ((d, d), (f, d), (d, f)):
        weight, out = random(*shape, dtype=torch.float32), torch.empty(shape, dtype=DTYPE, device="cuda")
        lora = random(shape[0], 16), random(16, shape[1])
        for backend, library in ((NF4(), bitsandbytes_weight), (Int4(4, 64), torch.compile(plain_int4_weight))):
            payload = backend.quantize(weight)
            moved = out.nbytes + sum(tensor.nbytes for tensor in payload)

            name, read = f"{backend.name} {shape[0]} x {shape[1]}", partial(library, payload, shape)
            yield name, partial(backend.dequantize_into, payload, out, None), read, moved
            added = partial(backend.dequantize_into, payload, out, lora)
            yield f"{name} + LoRA", added, partial(read_and_add, read, lora), moved


def product_cases(model: str) -> Iterator[tuple[str, Call, Call, int]]:
    from accessory.quantization import matvec_cuda  # Triton need not be installed where there is no GPU

    d, f, *_ = SHAPES[model]
    for shape in ((d, d), (f, d), (d, f)):
        weight = random(*shape, dtype=torch.float32)
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight.to(DTYPE), quant_type="nf4", compress_statistics=True
        )
        nf4, int4 = NF4(), Int4(4, 64)
        codes = int4.quantize(weight)
        for rows in (1, 8):
            x = random(rows, shape[1])
            theirs = {
                nf4: partial(bitsandbytes.matmul_4bit, x, packed.t(), state),
                int4: partial(torch.compile(plain_int4_product), x, codes, shape),
            }
            for backend, library in theirs.items():
                payload = nf4.quantize(weight) if backend is nf4 else codes
                ours = partial(matvec_cuda.matvec, x, payload, backend, shape)
                moved = sum(tensor.nbytes for tensor in payload)
                yield f"{rows} x {backend.name} {shape[0]} x {shape[1]}", ours, library, moved


def plain_int4_product(x: torch.Tensor, payload: tuple[torch.Tensor, ...], shape: tuple[int, int]) -> torch.Tensor:
    return x @ plain_int4_weight(payload, shape).T


def read_and_add(read: Call, lora: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return read().addmm_(*lora)


def bitsandbytes_weight(payload: tuple[torch.Tensor, ...], shape: tuple[int, int]) -> torch.Tensor:
    packed, codes, codebook, scales, mean = payload
    absmax = torch.ops.bitsandbytes.dequantize_blockwise(codes, scales, codebook, 256, torch.float32) + mean
    return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, "nf4", shape, DTYPE)


def plain_int4_weight(payload: tuple[torch.Tensor, ...], shape: tuple[int, int]) -> torch.Tensor:
    codes, scales, zeros = payload
    whole = unpack_codes(codes, 4).to(torch.int8).view(*scales.shape, -1) - zeros.to(torch.int8).unsqueeze(-1)
    return (whole.to(torch.float16) * scales.unsqueeze(-1)).view(shape).to(DTYPE)


class Clock:
    """us of a call: a graph of calls, each behind a fill that empties the cache, less a graph of the fills alone."""

    CALLS, REPLAYS = 10, 21

    def __init__(self) -> None:
        self._fill = torch.empty(2**28, dtype=torch.uint8, device="cuda")
        self._fills = self._captured(lambda: None)

    def __call__(self, call: Call) -> float:
        for _ in range(3):  # compiles, chooses
            call()
        calls, differences = self._captured(call), []
        for _ in range(self.REPLAYS):
            differences.append(self._ms(calls) - self._ms(self._fills))
        return 1000 * statistics.median(differences) / self.CALLS

    def _captured(self, call: Call) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.CALLS):
                self._fill.zero_()
                call()
        return graph

    def _ms(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="7b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the figures")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU; torch sees none")
    clock = Clock()
    source = torch.randint(2**31 - 1, (2**28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    # By a kernel: the copy that a graph makes of copy_ is another one, and slower.
    speed = 2000 * source.nbytes / clock(lambda: torch.bitwise_not(source, out=target))  # bytes/ms
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: a copy moves {speed / 1e9:.2f} TB/s")
    print(f"{'':<34}{'ours us':>10}{'library us':>12}{'ratio':>8}{'of a copy':>11}")
    rows = []
    groups = [product_cases(options.model), weight_cases(options.model)]
    groups += [pointwise_cases(options.model, tokens) for tokens in options.tokens]
    for cases in groups:
        for name, ours, library, moved in cases:
            mine, theirs = clock(ours), clock(library)
            share = 1000 * moved / speed / mine
            rows.append({"name": name, "ours_us": mine, "library_us": theirs, "of_copy": share})
            print(f"{name:<34}{mine:>10.1f}{theirs:>12.1f}{theirs / mine:>8.2f}{share:>11.0%}", flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
