"""Why the CUDA kernels are not there, or do not take a call; and that they come after Triton until they have been measured."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import duplex_attn as da
import pytest
import torch
from duplex_attn.backends import _ORDER, BACKENDS, CudaBackend, _capability

from ..emulation.library import EMULATED
from ..lanes import Lane


def says(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """Of itself, the driver."""

    def driver_version(to: ctypes._Pointer[ctypes.c_int]) -> int:
        ctypes.cast(to, ctypes.POINTER(ctypes.c_int))[0] = version
        return 0

    monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": SimpleNamespace(cuDriverGetVersion=driver_version)}.get)


def has_cards(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """Of these, the first is the current one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device=None: capabilities[device.index if device else 0]
    )
    _capability.cache_clear()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    _capability.cache_clear()


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """Its library is a file, its torch has CUDA and a card; loading it does nothing."""
    backend = CudaBackend()
    backend.library = tmp_path / "libduplex_cuda.so"
    backend.library.touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    has_cards(monkeypatch, (9, 0))
    says(monkeypatch, 13000)
    monkeypatch.setattr(backend, "load", lambda: None)
    monkeypatch.setattr(torch.ops, "duplex_attn_cuda", SimpleNamespace(runtime_version=lambda: 13000), raising=False)
    return backend


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1)])
def test_nothing_is_missing_on_any_card_from_ampere_on(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    has_cards(monkeypatch, capability)
    assert backend.missing() is None


def test_without_the_library(backend: CudaBackend) -> None:
    backend.library.unlink()
    assert backend.missing() == "libduplex_cuda.so is not there: the package was built without nvcc"


def test_without_cuda_in_torch_the_library_is_not_even_loaded(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_load() -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(backend, "load", must_not_load)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backend.missing() == "this torch is built without CUDA"


def test_without_a_card(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.missing() == "there is no CUDA card"


TOO_OLD = "its kernels are for compute capability 8.0 and later, this card has 7.5"


def test_on_an_older_card(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    has_cards(monkeypatch, (7, 5))
    assert backend.missing() == TOO_OLD


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_each_card_for_itself(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What is refused on an old card runs on the new one beside it, whichever is the current one."""
    has_cards(monkeypatch, (7, 5), (9, 0))
    assert backend.missing() is None
    asked = backend if name == "cuda" else BACKENDS[name]
    on = [SimpleNamespace(device=torch.device("cuda", n), dtype=torch.bfloat16) for n in (0, 1)]
    assert [asked.refuses_merge([x]) for x in on] == [TOO_OLD, None]


def test_with_an_old_driver(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, 12080)
    assert backend.missing() == "the driver is of CUDA 12.8, the library of 13.0"


def test_a_library_that_does_not_load() -> None:
    backend = CudaBackend()
    backend.library = Path(__file__)
    assert str(backend.load()).startswith("test_backend.py does not load: ")


def test_triton_comes_first() -> None:
    assert [backend.name for backend in _ORDER["cuda"]] == ["triton", "cuda", "reference"]


def x(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape or (1, 4, 2, 64)).to(dtype)


REFUSED = {
    "float32": ({"q": x(dtype=torch.float32)}, "it takes bfloat16 and float16"),
    "float64": ({"q": x(dtype=torch.float64)}, "float64 runs in the reference only"),
    "bias": ({"q": x(), "bias": torch.zeros(4, 4)}, "its kernels have no bias"),
    "dropout": ({"q": x(), "dropout_p": 0.5}, "its kernels have no dropout"),
    "row_bias": ({"q": x(), "row_distance_bias": x(1, 2, 4, 3)}, "its kernels have no row_distance_bias"),
    "width": ({"q": x(1, 4, 2, 12)}, "q: bulk copies want strides and a first element at multiples of 16 bytes"),
    "address": ({"q": x(1, 4, 2, 72)[..., 4:68]}, "q: bulk copies want strides and a first element at multiples of 16 bytes"),
    "expanded": ({"q": x(), "k": x(1, 1, 2, 64).expand(1, 4, 2, 64)}, "k: bulk copies want strides and a first element at multiples of 16 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_take(emulated: Lane, name: str) -> None:
    arguments, reason = REFUSED[name]
    arguments = {"k": arguments["q"], "v": arguments["q"]} | arguments
    with pytest.raises(ValueError) as error:
        da.attention(**arguments, backend="cuda")
    assert f"cuda: {reason}" in str(error.value)


NOT_RUN = "; compiled and emulated, this kernel has not run on such a card yet"


@pytest.mark.parametrize(
    ("card", "narrow", "wide", "told"), [(80, "128x64", "128x32", NOT_RUN), (90, "128x128", "128x64", "")]
)
def test_it_tells_its_tile_and_where_it_has_not_run(
    emulated: Lane, card: int, narrow: str, wide: str, told: str
) -> None:
    with EMULATED.on(card):
        assert da.explain(x(), x(), x(), backend="cuda").tile == f"{narrow} of head_dim 64{told}"
        of_wide = da.explain(x(1, 4, 2, 200), x(1, 4, 2, 200), x(1, 4, 2, 8), backend="cuda")
        assert of_wide.tile == f"{wide} of head_dim 256{told}"
    assert da.backends()["cuda"].detail == "forward, backward and paged calls"


def test_an_older_card_is_refused(emulated: Lane) -> None:
    """By the backend, and by the operator itself."""
    with EMULATED.on(75), pytest.raises(ValueError, match=f"cuda: {TOO_OLD}"):
        da.attention(x(), x(), x(), backend="cuda")
    with EMULATED.on(75), pytest.raises(ValueError, match=r"cards of compute capability 8\.0 and later"):
        torch.ops.duplex_attn_cuda.attention_forward(
            x(), x(), x(), None, None, 4, 4, None, None, None, None, None, None, None, False,
            None, None, None, None, None, None, None, 0.0, 0.0, None, False, False,
        )  # fmt: skip


def pages(dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(3, 16, 2, dim).to(dtype)


REFUSED_PAGED = {
    "float32": ({"dtype": torch.float32}, {}, "it takes bfloat16 and float16"),
    "bias": ({}, {"bias": torch.zeros(16)}, "its kernels have no bias"),
    "width": ({"dim": 12}, {}, "k_pages: bulk copies want strides and a first element at multiples of 16 bytes"),
    "bytes": ({"dim": 24, "stored": torch.int8}, {}, "k_pages: bulk copies want strides and a first element at multiples of 16 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_PAGED)
def test_paged_calls_that_it_does_not_take(emulated: Lane, name: str) -> None:
    how, given, reason = REFUSED_PAGED[name]
    dtype, dim = how.get("dtype", torch.bfloat16), how.get("dim", 64)
    held = pages(dim, how.get("stored", dtype))
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError) as error:
        da.paged_attention(x(1, 4, dim, dtype=dtype), held, held, table, lengths, **given, backend="cuda")
    assert f"cuda: {reason}" in str(error.value)


def test_merges_that_it_does_not_take(emulated: Lane) -> None:
    out, lse = x(1, 2, 2, 8), torch.randn(1, 2, 2)
    da.merge_attention([out] * 32, [lse] * 32, backend="cuda")
    with pytest.raises(ValueError, match="cuda: it merges up to 32 parts"):
        da.merge_attention([out] * 33, [lse] * 33, backend="cuda")
    with pytest.raises(ValueError, match="cuda: float64 runs in the reference only"):
        da.merge_attention([out.double()], [lse.double()], backend="cuda")
