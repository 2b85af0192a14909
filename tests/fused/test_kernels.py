"""The kernels of the fused blocks, on a CPU through Triton's interpreter; tests/test_gpu.py has them compiled."""

from __future__ import annotations

from pathlib import Path

from interpreter import run_interpreted


def test_kernels_compute_what_the_plain_functions_do():
    run_interpreted(Path(__file__).with_name("interpreted_kernels.py"))
