"""paged_append and copy_pages: what lies in the pages afterwards, and that nothing else was touched."""

from __future__ import annotations

import duplex_attn as da
import pytest
import torch

from ..lanes import Lane, written_on
from .pool import bits, rotated

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rope", [None, 16, 6])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn])
def test_tokens_land_in_their_slots(
    lane: Lane, dtype: torch.dtype, stored: torch.dtype | None, rope: int | None, interleaved: bool
) -> None:
    """Ragged sequences, one skipped token, one sequence without tokens; all other slots keep every bit."""
    if rope is None and interleaved:
        pytest.skip("there is nothing to interleave")
    g = torch.Generator().manual_seed(0)
    pages, page_size, heads, dim, dim_v = 9, 5, 3, 32, 20
    block_table = torch.tensor([[7, 2, -1], [4, -1, -1], [0, 8, 3]], dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 4, 4, 10], dtype=torch.int32)
    positions = torch.tensor([3, 4, 5, 6, 0, 1, -1, 12, 13, 14], dtype=torch.int32)
    sequence = [0] * 4 + [2] * 6
    k = torch.randn(11, heads, 2 * dim, generator=g)[..., ::2].to(dtype)[:10]
    v = torch.randn(heads, 10, dim_v, generator=g).to(dtype).transpose(0, 1)
    junk = torch.randint(0, 100, (pages, heads, page_size, dim + 8), generator=g, dtype=torch.uint8)
    k_pages = junk[..., :dim].to(stored or dtype).transpose(1, 2)  # heads before slots
    v_pages = junk[..., :dim_v].transpose(1, 2).contiguous().to(stored or dtype)
    scales = {}
    if stored is not None:
        scales = {name: torch.rand(pages, page_size, heads, generator=g) for name in ("k_scales", "v_scales")}
    options = dict(scales)
    if rope is not None:
        angle = torch.rand(15, rope // 2, generator=g) * 6
        options |= {"rope_cos": angle.cos(), "rope_sin": angle.sin(), "rope_interleaved": interleaved}
    before = [bits(x).clone() for x in (k_pages, v_pages)]
    before_scales = {name: x.clone() for name, x in scales.items()}

    written_on(lane, da.paged_append, k, v, k_pages, v_pages, block_table, positions, cu_seqlens, **options)

    live = positions >= 0
    place = [
        (int(block_table[s, p // page_size]), int(p % page_size)) for s, p in zip(sequence, positions, strict=True)
    ]
    turned = k.double()
    if rope is not None:
        turned = rotated(k, positions.clamp(min=0).long(), options["rope_cos"], options["rope_sin"], interleaved)
    touched = torch.zeros(pages, page_size, dtype=torch.bool)
    for n in torch.nonzero(live)[:, 0].tolist():
        touched[place[n]] = True
        for x, held, name in ((turned[n], k_pages, "k_scales"), (v[n].double(), v_pages, "v_scales")):
            got = held[place[n]].double()
            eps = torch.finfo(dtype).eps
            if stored is None:
                torch.testing.assert_close(got, x, atol=eps * 4, rtol=eps)
                continue
            scale = scales[name][place[n]].double()
            torch.testing.assert_close(scale, x.abs().amax(-1) / LARGEST[stored], atol=0, rtol=2 * eps)
            error = (got * scale[:, None] - x).abs()
            step = scale[:, None] * (0.5 if stored == torch.int8 else 1 / 16 * got.abs().clamp(min=2**-6))
            assert (error <= step * 1.01 + 4 * eps).all(), f"token {n}, {name}"
    for x, was in zip((k_pages, v_pages), before, strict=True):
        assert torch.equal(bits(x)[~touched], was[~touched]), "a slot of nobody was written"
    for name, was in before_scales.items():
        assert torch.equal(scales[name][~touched], was[~touched])


@pytest.mark.parametrize("stored", LARGEST)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2)])
def test_given_scales_are_read(lane: Lane, stored: torch.dtype, shape: tuple[int, ...]) -> None:
    scale = torch.full(shape, 0.01)
    k = torch.linspace(-9, 9, 64).reshape(2, 2, 16)
    k_pages = torch.zeros(2, 4, 2, 16).to(stored)
    v_pages = k_pages.clone()
    table, positions = torch.tensor([[1], [0]], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)
    written_on(lane, da.paged_append, k, -k, k_pages, v_pages, table, positions, k_scales=scale, v_scales=scale)
    assert (scale == 0.01).all()
    largest = LARGEST[stored]
    for n, place in enumerate(((1, 2), (0, 0))):
        want = (k[n] / 0.01).clamp(-largest, largest)
        want = want.round() if stored == torch.int8 else want
        assert torch.equal(k_pages[place].float(), want.to(stored).float())
        assert torch.equal(v_pages[place].float(), (-want).to(stored).float())


def test_every_float8_is_rounded_to_nearest_even(lane: Lane) -> None:
    """Each number, and each midpoint between two, against torch's own cast."""
    numbers = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    k = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, numbers * 1.03, torch.tensor([1e-9, 0.0])])
    k = k[: len(k) // 2 * 2].reshape(2, 1, -1)
    k = torch.nn.functional.pad(k, (0, 256 - k.shape[-1]))
    pages = torch.zeros(2, 1, 1, 256).to(torch.float8_e4m3fn)
    one, table = torch.ones(1, 1, 1), torch.tensor([[0], [1]], dtype=torch.int32)
    positions = torch.zeros(2, dtype=torch.int32)
    written_on(lane, da.paged_append, k, -k, pages, pages.clone(), table, positions, k_scales=one, v_scales=one)
    assert torch.equal(pages[:, 0].float(), k.clamp(max=448).to(torch.float8_e4m3fn).float())


def test_pages_of_any_numbers_are_copied(lane: Lane) -> None:
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float64, torch.float8_e5m2):
        pages = torch.randint(0, 2, (3, 2, 1, 5), generator=torch.Generator().manual_seed(2)).to(dtype)
        want = bits(pages).clone()
        want[2] = want[1]
        src, dst = (torch.tensor([n], dtype=torch.int32) for n in (1, 2))
        written_on(lane, da.copy_pages, pages, pages.clone(), src, dst)
        assert torch.equal(bits(pages), want), dtype


@pytest.mark.parametrize("shape", [(6, 1, 1), (6, 1, 3), (6, 4, 1)])
def test_scales_of_a_page_go_with_it(lane: Lane, shape: tuple[int, ...]) -> None:
    pages, scales = torch.zeros(6, 4, 3, 8, dtype=torch.int8), torch.rand(shape)
    want = scales.clone()
    want[[1, 2]] = want[[5, 0]]
    src, dst = torch.tensor([5, 0], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    written_on(lane, da.copy_pages, pages, pages.clone(), src, dst, k_scales=scales, v_scales=scales.clone())
    assert torch.equal(scales, want)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, *LARGEST])
def test_copied_pages(lane: Lane, dtype: torch.dtype, strided: bool) -> None:
    g = torch.Generator().manual_seed(1)
    made = []
    for dim in (16, 8):
        x = torch.randint(0, 100, (6, 4, 3, dim), generator=g, dtype=torch.uint8).to(dtype)
        made.append(x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x)
    scales = [torch.rand(6, 4, 3, generator=g) for _ in range(2)] if dtype in LARGEST else [None, None]
    before = [None if x is None else x.clone() for x in (*made, *scales)]
    src, dst = torch.tensor([5, 0, 5], dtype=torch.int32), torch.tensor([1, 2, 3], dtype=torch.int32)
    written_on(lane, da.copy_pages, *made, src, dst, k_scales=scales[0], v_scales=scales[1])
    for x, was in zip((*made, *scales), before, strict=True):
        if x is not None and was is not None:
            want = bits(was).clone()
            want[dst.long()] = want[src.long()]
            assert torch.equal(bits(x), want)


def test_positions_and_pages_that_do_not_lie_side_by_side(lane: Lane) -> None:
    k, pages, copies = torch.randn(3, 1, 8), torch.zeros(4, 2, 1, 8), torch.zeros(4, 2, 1, 8)
    positions, cu = (torch.tensor(x, dtype=torch.int32)[::2] for x in ([0, 9, 1, 9, 2], [0, 9, 3]))
    table = torch.tensor([[2, 9, 0]], dtype=torch.int32)[:, ::2]
    written_on(lane, da.paged_append, k, k, pages, copies, table, positions, cu)
    assert torch.equal(torch.cat([pages[2], pages[0, :1]]), k)
    src, dst = (torch.tensor(x, dtype=torch.int32)[::2] for x in ([2, 9, 0], [3, 9, 1]))
    written_on(lane, da.copy_pages, pages, copies, src, dst)
    assert torch.equal(pages[3], k[:2]) and torch.equal(pages[1], pages[0])


def test_per_tensor_scales_are_not_copied(lane: Lane) -> None:
    pages, scale = torch.zeros(3, 2, 1, 16, dtype=torch.int8), torch.full((1, 1, 1), 0.5)
    src, dst = (torch.tensor([n], dtype=torch.int32) for n in (0, 2))
    written_on(lane, da.copy_pages, pages, pages.clone(), src, dst, k_scales=scale, v_scales=scale)
    assert float(scale) == 0.5
