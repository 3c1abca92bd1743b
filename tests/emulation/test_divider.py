"""Division by a multiplication: exact for every divisor that a launch may have and every number below 2^31."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest

from .library import compiler, functions
from .primitives import passed

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
LARGEST = 2**31 - 1


def quotients(divisor: int, numbers: np.ndarray) -> np.ndarray:
    out = np.zeros_like(numbers)
    functions().quotients_of(ctypes.c_int64(divisor), len(numbers), passed(numbers), passed(out))
    return out


@pytest.mark.parametrize("divisors", [range(1, 1100), [2**n + m for n in range(11, 31) for m in (-1, 0, 1)], [LARGEST]])
def test_quotients_where_they_change(divisors: list[int]) -> None:
    rng = random.Random(0)
    for divisor in divisors:
        most = LARGEST // divisor
        multiples = {0, 1, 2, most, *(rng.randrange(most + 1) for _ in range(200))}
        near = {n for m in multiples for n in (m * divisor - 1, m * divisor, m * divisor + 1)} | {LARGEST}
        numbers = np.array(sorted(n for n in near if 0 <= n <= LARGEST), np.uint32)
        assert (quotients(divisor, numbers) == numbers // divisor).all(), divisor
