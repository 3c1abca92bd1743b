"""What tests/kernels/test_not_numbers.py asks of every backend, of the CUDA kernels."""

from __future__ import annotations

import math

import pytest
import torch

from ..cases import BFLOAT16, FLOAT16
from ..kernels import test_not_numbers as numbers
from ..lanes import Lane

DTYPES = pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf])


@DTYPES
@BAD
def test_a_row_of_queries(kernels: Lane, dtype: torch.dtype, bad: float) -> None:
    numbers.test_a_row_of_queries(kernels, dtype, bad)


@DTYPES
@BAD
@pytest.mark.parametrize("sink", [False, True])
def test_the_only_key_of_a_row(kernels: Lane, dtype: torch.dtype, bad: float, sink: bool) -> None:
    numbers.test_the_only_key_of_a_row(kernels, dtype, bad, sink)


@DTYPES
def test_merged_parts(kernels: Lane, dtype: torch.dtype) -> None:
    numbers.test_merged_parts(kernels, dtype)


@DTYPES
@pytest.mark.parametrize("wrong", ["one key", "every key"])
@pytest.mark.parametrize("invariant", [False, True])
def test_keys_in_pages(kernels: Lane, dtype: torch.dtype, wrong: str, invariant: bool) -> None:
    numbers.test_keys_in_pages(kernels, dtype, wrong, invariant, length=300)
