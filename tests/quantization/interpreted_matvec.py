"""Run by test_matvec.py, in a process of its own, where Triton's interpreter takes the place of its compiler."""

from __future__ import annotations

import pytest
import torch
from matvec_cases import BACKENDS, check

from accessory.quantization import matvec_cuda

every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())


@pytest.fixture(autouse=True)
def several_rows_a_program(monkeypatch):
    """As for weights of thousands of rows."""
    monkeypatch.setattr(matvec_cuda, "PROGRAMS", 2)


@every_backend
@pytest.mark.parametrize("rows", [1, 3])
def test_a_few_rows_times_an_odd_number_of_rows_of_weights(backend, rows):
    check(backend, (9, 768), rows, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("name", "columns"), [("nf4-double_quant", 776), ("nf4-single_quant", 200), ("int4-groups_of_8", 40)]
)
def test_inputs_that_loads_of_sixteen_do_not_divide(name, columns):
    check(BACKENDS[name], (9, columns), 1, torch.float32, "cpu")


@pytest.mark.parametrize("name", ["nf4-double_quant", "int4", "int3"])
def test_inputs_that_take_several_steps_and_a_part_of_one(name):
    check(BACKENDS[name], (5, 11008 - 256), 1, torch.float32, "cpu", bias=False)


@pytest.mark.parametrize("name", ["nf4-double_quant", "int4", "int3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 8])
def test_every_tile_in_16_bit(name, dtype, rows):
    check(BACKENDS[name], (5, 192), rows, dtype, "cpu")
