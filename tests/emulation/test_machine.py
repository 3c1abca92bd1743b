"""The primitives, each alone, emulated and on a card, against the layouts of the PTX manual as written down here a second time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from .library import compiler
from .primitives import Emulated, OnCard, golden, nvcc

BF16, FP16 = torch.bfloat16, torch.float16
Machine = Emulated | OnCard


@pytest.fixture(params=["emulated", pytest.param("card", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == "card":
        if nvcc() is None or not torch.cuda.is_available():
            pytest.skip("no nvcc, or no card")
        return OnCard()
    if compiler() is None:
        pytest.skip("no C++ compiler")
    return Emulated(golden())


@pytest.fixture
def hopper(machine: Machine) -> Machine:
    if isinstance(machine, OnCard) and not machine.hopper:
        pytest.skip("Hopper's instructions")
    return machine


def bits(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(torch.int16).numpy().view(np.uint16)


# Layouts of the manual: "Shared memory matrix layout", "Register fragments for wgmma.mma_async.m64nNk16".


def swizzle(rows: np.ndarray) -> np.ndarray:
    """(rows, 64 or 32) numbers as they lie: lines of 128 bytes in groups of 8 (or 4); in line n, 16-byte units move to unit ^ n."""
    units = 8 if rows.shape[1] == 64 else 4
    lines = rows.reshape(-1, 8 // units, units, 8)  # of 128 bytes: one row, or two
    out = np.empty_like(lines)
    for n, unit in itertools.product(range(len(lines)), range(units)):
        out[n, :, unit ^ (n % units)] = lines[n, :, unit]
    return out.reshape(-1)


class Image:
    """Operands side by side in shared memory, NaN around them."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []

    def add(self, matrix: torch.Tensor, inner_contiguous: bool, width: int, step: int) -> int:
        """(outer, 16) as the step-th 16 of a larger operand in rows of `width`; its descriptor from the image's start."""
        at, outer = sum(p.size for p in self.parts) * 2, matrix.shape[0]
        row_bytes = 2 * width
        if inner_contiguous:
            tile = torch.full((outer, width), float("nan"), dtype=matrix.dtype)
            tile[:, 16 * step : 16 * step + 16] = matrix
            self.parts.append(swizzle(bits(tile)))
            at, leading = at + 32 * step, 16
        else:  # panels of (inner, width), one behind the other
            depth = 16 * (step + 2)
            leading = depth * row_bytes
            for panel in matrix.split(width):
                tile = torch.full((depth, width), float("nan"), dtype=matrix.dtype)
                tile[16 * step : 16 * step + 16, : panel.shape[0]] = panel.T
                self.parts.append(swizzle(bits(tile)))
            at += 16 * step * row_bytes
        mode = 1 if width == 64 else 2
        return at >> 4 | leading >> 4 << 16 | 8 * row_bytes >> 4 << 32 | mode << 62

    def words(self) -> np.ndarray:
        return np.concatenate(self.parts).view(np.int32)


def accumulators() -> Iterator[tuple[int, int, int, int]]:
    """Thread, number, row, column of the first 8 columns of D: four numbers a thread."""
    for thread in range(128):
        group, member = divmod(thread % 32, 4)
        top = thread // 32 * 16 + group
        for number, (row, column) in enumerate([(0, 0), (0, 1), (8, 0), (8, 1)]):
            yield thread, number, top + row, 2 * member + column


def to_registers(d: torch.Tensor) -> torch.Tensor:
    """(64, N) to (128, N / 2)."""
    out = torch.empty(128, d.shape[1] // 2)
    for thread, number, row, column in accumulators():
        out[thread, number::4] = d[row, column::8]
    return out


def a_registers(a: torch.Tensor) -> np.ndarray:
    """(64, 16) to (128, 4) words of two numbers."""
    out = torch.empty(128, 8, dtype=a.dtype)
    for thread, number, row, column in accumulators():
        out[thread, number::4] = a[row, column::8]
    return bits(out).view(np.uint32)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


PRODUCTS = [  # N, dtype, whether A's and B's inner dimension is contiguous
    (64, BF16, True, True),
    (96, FP16, True, True),
    (128, BF16, True, False),
    (192, FP16, False, False),
    (256, BF16, False, True),
    (32, BF16, False, False),
]


@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize("which", range(len(PRODUCTS)))
def test_product_of_shared_memory(hopper: Machine, which: int, width: int) -> None:
    n, dtype, a_inner, b_inner = PRODUCTS[which]
    a, b, c = normal(64, 16, dtype=dtype), normal(n, 16, dtype=dtype), to_registers(normal(64, n))
    for seed, accumulate in itertools.product(hopper.seeds(), (0, 1)):
        image = Image()
        step = seed % (width // 16)
        a_at, b_at = image.add(a, a_inner, width, step), image.add(b, b_inner, width, step)
        words, d = image.words(), c.numpy().copy()
        assert hopper.call("probe_product", which, words, len(words), a_at, b_at, accumulate, d) is None
        want = to_registers((a.double() @ b.double().T).float()) + c * accumulate
        torch.testing.assert_close(torch.from_numpy(d), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("which", "n", "dtype", "b_inner"), [(0, 64, BF16, False), (1, 96, FP16, False), (2, 128, BF16, True)])  # fmt: skip
def test_product_of_registers(hopper: Machine, which: int, n: int, dtype: torch.dtype, b_inner: bool) -> None:
    a, b, c = normal(64, 16, dtype=dtype), normal(n, 16, dtype=dtype), to_registers(normal(64, n))
    for seed in hopper.seeds():
        image = Image()
        b_at = image.add(b, b_inner, 32 if n == 96 else 64, seed % 2)
        words, registers, d = image.words(), a_registers(a), c.numpy().copy()
        assert hopper.call("probe_product_registers", which, words, len(words), registers, b_at, 1, d) is None
        want = to_registers((a.double() @ b.double().T).float()) + c
        torch.testing.assert_close(torch.from_numpy(d), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("columns", [64, 32])
@pytest.mark.parametrize(
    "at", [(0, 0, 0, 0), (64, 5, 2, 1), (32, 15, 1, 0), (0, -3, 0, 1), (64, 40, 1, 1), (128, 0, 0, 0)]
)
def test_copy_swizzles_and_fills_with_zeros(hopper: Machine, columns: int, at: tuple[int, ...]) -> None:
    storage = normal(2, 20, 3, 96, dtype=FP16)
    x = storage[..., :80]  # head_dim 80 in rows of 96
    wanted = torch.zeros(16, columns, dtype=FP16)
    for row, column in itertools.product(range(16), range(columns)):
        if 0 <= at[1] + row < 20 and at[0] + column < 80:
            wanted[row, column] = x[at[3], at[1] + row, at[2], at[0] + column]
    image = np.full(16 * columns // 2, -1, np.int32)
    for _ in hopper.seeds():
        assert hopper.call("probe_copy", (x, columns, 16), *at, image) is None
        assert np.array_equal(image.view(np.uint16), swizzle(bits(wanted)))


# Layouts of the manual: "Matrix fragments for mma.m16n8k16", "ldmatrix".


def warp_fragments() -> Iterator[tuple[str, int, int, int, int]]:
    """Operand, lane, number, row, column."""
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        for i in range(8):
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            yield "a", lane, i, row, (member * 2) + (i & 1) + (0 if i < 4 else 8)
        for i in range(4):
            yield "b", lane, i, (member * 2) + (i & 1) + (0 if i < 2 else 8), group
            yield "d", lane, i, group if i < 2 else group + 8, (member * 2) + (i & 1)


def as_fragments(name: str, matrix: torch.Tensor) -> torch.Tensor:
    out = torch.empty(32, 8 if name == "a" else 4, dtype=matrix.dtype)
    for operand, lane, number, row, column in warp_fragments():
        if operand == name:
            out[lane, number] = matrix[row, column]
    return out


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_product_of_a_warp(machine: Machine, dtype: torch.dtype) -> None:
    a, b, c = normal(16, 16, dtype=dtype), normal(16, 8, dtype=dtype), normal(16, 8)
    for _ in machine.seeds():
        d = as_fragments("d", c).numpy().copy()
        words = [bits(as_fragments(name, x)).view(np.uint32) for name, x in (("a", a), ("b", b))]
        assert machine.call("probe_warp_product", int(dtype == BF16), *words, d) is None
        want = as_fragments("d", (a.double() @ b.double()).float() + c)
        torch.testing.assert_close(torch.from_numpy(d), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_from_shared_memory(machine: Machine, transposed: bool) -> None:
    numbers = np.random.default_rng(0).permutation(2048).astype(np.uint16)
    places = np.random.default_rng(1).permutation(256)[:32].astype(np.int32) * 16
    rows = numbers.reshape(256, 8)[places // 16].reshape(4, 8, 8)  # of four matrices, in the order of the lanes
    out = np.zeros((32, 4, 2), np.uint16)
    for _ in machine.seeds():
        assert machine.call("probe_matrices", numbers, 1024, places, int(transposed), out) is None
        for lane, r, half in itertools.product(range(32), range(4), range(2)):
            at = (lane // 4, 2 * (lane % 4) + half)
            assert out[lane, r, half] == rows[r][at[::-1] if transposed else at]


def test_matrices_to_shared_memory(hopper: Machine) -> None:
    numbers = np.random.default_rng(2).permutation(256).astype(np.uint16).reshape(4, 8, 8)  # as above
    places = np.random.default_rng(3).permutation(256)[:32].astype(np.int32) * 16
    words = np.zeros((32, 4, 2), np.uint16)
    for lane, r, half in itertools.product(range(32), range(4), range(2)):
        words[lane, r, half] = numbers[r, lane // 4, 2 * (lane % 4) + half]
    want = np.full(2048, 7, np.uint16)
    for lane in range(32):
        want[places[lane] // 2 :][:8] = numbers[lane // 8, lane % 8]
    for _ in hopper.seeds():
        image = np.full(2048, 7, np.uint16)
        assert hopper.call("probe_matrices_stored", words, places, 1024, image) is None
        assert np.array_equal(image, want)


def test_reduction_adds_to_memory(hopper: Machine) -> None:
    x, before = normal(512).numpy(), normal(600).numpy()
    for _ in hopper.seeds():
        sums = before.copy()
        assert hopper.call("probe_reduction", x, 512, sums) is None
        assert np.array_equal(sums[:512], before[:512] + x) and np.array_equal(sums[512:], before[512:])


@pytest.mark.parametrize("unit", [4, 8, 16])
def test_copies_of_threads_fill_with_zeros(machine: Machine, unit: int) -> None:
    source = np.random.default_rng(unit).integers(1, 255, 128 * unit, np.uint8)
    read = (np.arange(128) * 3 % (unit + 1)).astype(np.int32)
    want = np.where(np.arange(unit) < read[:, None], source.reshape(128, unit), 0)
    for _ in machine.seeds():
        image = np.full(128 * unit, 255, np.uint8)
        assert machine.call("probe_copy_units", unit, source, read, image) is None
        assert np.array_equal(image.reshape(128, unit), want)


def test_sixteen_bytes_by_ordinary_access(machine: Machine) -> None:
    source, got = np.arange(512, dtype=np.int32), np.zeros(512, np.int32)
    for _ in machine.seeds():
        assert machine.call("probe_store_and_load", source, got) is None
        assert np.array_equal(got, source)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_lanes(machine: Machine, dtype: torch.dtype) -> None:
    x = torch.cat([normal(128, 2), torch.tensor([[1e-8, -70000.0], [3e38, 1 + 2**-8], [1 + 3 * 2**-8, 0.1]])])[-128:]
    out = np.zeros((128, 4), np.uint32)
    for _, mask in itertools.product(machine.seeds(), (1, 2, 16, 31)):
        assert machine.call("probe_lanes", int(dtype == BF16), mask, x.numpy().copy(), out) is None
        threads = np.arange(128)
        assert np.array_equal(out[:, 0], threads ^ mask)
        assert np.array_equal(out[:, 1], threads // 32 * 32)
        assert np.array_equal(out[:, 2], threads // 32 * 32 + threads * 7 % 32)
        assert np.array_equal(out[:, 3], bits(x.to(dtype)).view(np.uint32)[:, 0])


def test_one_lane_of_a_warp_is_elected(hopper: Machine) -> None:
    out = np.zeros(128, np.uint32)
    for _ in hopper.seeds():
        assert hopper.call("probe_elected", out, compared=False) is None
        assert out.reshape(4, 32).sum(1).tolist() == [1, 1, 1, 1]


def test_what_lanes_of_a_warp_find_together(machine: Machine) -> None:
    x = np.random.default_rng(4).integers(0, 2**31, 128, np.uint32) * 2  # even, and past what is positive with a sign
    x[70] += 1
    matrices = x.view(np.uint16).reshape(4, 8, 4, 2).reshape(4, 8, 8)
    out = np.zeros((128, 3), np.uint32)
    for _ in machine.seeds():
        assert machine.call("probe_of_a_warp", x, out) is None
        assert np.array_equal(out[:, 0], x.reshape(4, 32).max(1).repeat(32))
        assert np.array_equal(out[:, 1], np.repeat([0, 0, 1, 0], 32))
        transposed = np.ascontiguousarray(matrices.transpose(0, 2, 1))
        assert np.array_equal(out[:, 2], transposed.view(np.uint32).reshape(128))


def test_halves(machine: Machine) -> None:
    bytes_as_halves = np.arange(256, dtype=np.uint16) + 0x6400  # 1024 + n, as int8 comes
    numbers = normal(256).numpy().astype(np.float16)
    numbers[:6] = [65504, 6e-8, -6e-8, np.inf, np.nan, 0]
    x = np.concatenate([bytes_as_halves.view(np.float16)[:128], numbers[:128]])
    y = np.concatenate([np.full(128, -1152, np.float16), numbers[128:]])
    out = np.zeros((128, 2, 2), np.float16)
    with np.errstate(over="ignore"):
        want = np.stack([x * y, x + y]).reshape(2, 128, 2).transpose(1, 0, 2)
    for _ in machine.seeds():
        assert machine.call("probe_halves", x, y, out) is None
        np.testing.assert_array_equal(out, want)


def test_every_pair_of_float8(hopper: Machine) -> None:
    pairs = np.arange(65536, dtype=np.uint16)
    want = torch.from_numpy(pairs.view(np.uint8)).view(torch.float8_e4m3fn).half().numpy()
    out = np.zeros(131072, np.float16)
    for _ in hopper.seeds():
        assert hopper.call("probe_float8_pairs", pairs, 65536, out) is None
        np.testing.assert_array_equal(out, want)
