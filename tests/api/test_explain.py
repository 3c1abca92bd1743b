"""explain and backends tell what would run and why not the others; a backend that is named runs the call or says why it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duplex_attn as da
import pytest
import torch
from duplex_attn.backends import BACKENDS, CpuBackend, _candidates
from torch import Tensor

from ..lanes import ISAS
from .calls import BATCH, HEADS, SEQLEN_Q, int32

Call = dict[str, Any]
NO_CARD = "there is no CUDA card (TRITON_INTERPRET=1 interprets it on the CPU)"
ON_THE_CPU = "it runs on CUDA tensors, these are on cpu (TRITON_INTERPRET=1 interprets it on the CPU)"
NO_CUDA = (  # why the CUDA kernels do not run a call on the CPU
    "libduplex_cuda.so is not there: the package was built without nvcc"
    if not BACKENDS["cuda"].library.exists()
    else "this torch is built without CUDA"
    if torch.version.cuda is None
    else "there is no CUDA card"
    if not torch.cuda.is_available()
    else "it runs on CUDA tensors, these are on cpu"
)
NOT_INTERPRETED = ON_THE_CPU if torch.cuda.is_available() else NO_CARD

pytestmark = pytest.mark.skipif(not da.backends()["cpu"].available, reason="built without the CPU backend")


def dense(dtype: torch.dtype = torch.float32, **given: Any) -> Call:
    x = torch.randn(BATCH, SEQLEN_Q, HEADS, 8).to(dtype)
    return {"q": x, "k": x, "v": x} | given


def packed(**given: Any) -> Call:
    x, cu = torch.randn(6, HEADS, 8), int32(0, 2, 6)
    return {
        "q": x,
        "k": x,
        "v": x,
        "cu_seqlens_q": cu,
        "cu_seqlens_k": cu,
        "max_seqlen_q": 4,
        "max_seqlen_k": 4,
    } | given


CALLS: dict[str, tuple[Call, str, str, str]] = {  # the call, who runs it, why the CPU's kernels do not, why Triton does not
    "plain": (dense(), "cpu", "", "could run it, cpu comes first"),
    "packed": (packed(), "cpu", "", "could run it, cpu comes first"),
    "asked": (dense(backend="reference"), "reference", "could run it, reference was asked for", "could run it, reference was asked for"),
    "interpreted": (dense(backend="triton"), "triton", "could run it, triton was asked for", ""),
    "float64": (dense(torch.float64), "reference", "float64 runs in the reference only", "float64 runs in the reference only"),
    "float64 beside": (
        dense(col_distance_bias=torch.randn(BATCH, HEADS, SEQLEN_Q, 3).double()), "reference",
        "col_distance_bias: float64 runs in the reference only", "could run it, reference comes first",
    ),
    "meta": (
        {name: x.to("meta") for name, x in dense().items()}, "reference",
        "it runs on CPU tensors, these are on meta", "it runs on CUDA tensors, these are on meta",
    ),
}  # fmt: skip


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which backends ran forward, in their order."""
    names: list[str] = []
    for name, backend in BACKENDS.items():
        if backend.missing() is None:

            def spy(*arguments: Any, name: str = name, real: Any = backend.attention_forward) -> tuple[Tensor, Tensor]:
                names.append(name)
                return real(*arguments)

            monkeypatch.setattr(backend, "attention_forward", spy)
    return names


def call(arguments: Call) -> Any:
    return (da.varlen_attention if "cu_seqlens_q" in arguments else da.attention)(**arguments)


@pytest.mark.parametrize("name", CALLS)
def test_who_runs_a_call_and_why_the_others_do_not(interpreted: None, name: str) -> None:
    arguments, runs, cpu, triton = CALLS[name]
    explanation = da.explain(**arguments)
    assert explanation.backend == runs
    first = "could run it, cpu comes first" if runs == "cpu" else f"could run it, {runs} was asked for"
    reasons = {
        "cpu": cpu,
        "triton": triton,
        "cuda": NO_CUDA if name != "meta" else NO_CUDA.replace("on cpu", "on meta"),
        "reference": first,
    }
    assert explanation.refusals == {name: reason for name, reason in reasons.items() if name != runs}


@pytest.mark.parametrize("name", [name for name in CALLS if name != "meta"])
def test_the_call_takes_the_backend_that_explain_names(interpreted: None, ran: list[str], name: str) -> None:
    expected = da.explain(**CALLS[name][0]).backend
    assert ran == [], "explain computes nothing"
    call(CALLS[name][0])
    assert ran == [expected]


def test_a_line_for_each_backend(not_interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUPLEX_ATTN_ISA", "portable")
    lines = ["cpu: runs the call, portable", f"triton: {NOT_INTERPRETED}", f"cuda: {NO_CUDA}"]
    lines.append("reference: could run it, cpu comes first")
    assert str(da.explain(**dense())).split("\n") == lines


def test_the_configuration_of_a_triton_call_is_shown(interpreted: None) -> None:
    assert "block_m=" in da.explain(**dense(backend="triton")).tile


def test_takes_the_arguments_as_the_call_does() -> None:
    a, b = dense(), packed()
    for arguments in (a, b):
        names = list(arguments)
        for positional in range(len(names) + 1):
            named = {name: arguments[name] for name in names[positional:]}
            got = da.explain(*[arguments[name] for name in names[:positional]], **named, return_lse=True)
            assert got == da.explain(**arguments)
    with pytest.raises(TypeError, match="missing a required argument: 'v'"):
        da.explain(a["q"], a["k"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'seqlens_k'"):
        da.explain(**b, seqlens_k=int32(1, 2))


def test_explain_draws_no_seed() -> None:
    arguments = dense(dropout_p=0.5, sink=torch.zeros(HEADS, requires_grad=True))
    before = torch.random.get_rng_state()
    da.explain(**arguments)
    assert torch.equal(before, torch.random.get_rng_state())
    da.attention(**arguments)
    assert not torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("name", "arguments", "reason"), [
    ("cpu", dense(torch.float64), "cpu: float64 runs in the reference only"),
    ("cpu", {name: x.to("meta") for name, x in dense().items()}, "cpu: it runs on CPU tensors, these are on meta"),
    ("triton", dense(), f"triton: {NOT_INTERPRETED}"),
], ids=["cpu-float64", "cpu-meta", "triton-no-card"])  # fmt: skip
def test_a_named_backend_that_cannot_raises_its_reason(
    not_interpreted: None, name: str, arguments: Call, reason: str
) -> None:
    calls = (
        [da.explain] if arguments["q"].is_meta else [da.explain, da.attention]
    )  # a call on meta is a fake and takes no backend
    for function in calls:
        with pytest.raises(ValueError, match=r"^backend: expected one that can run this call, got ") as error:
            function(**arguments, backend=name)
        assert reason in str(error.value)


def test_a_named_backend_is_obeyed_in_backward_and_merge(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_run(*_: Any) -> None:
        raise AssertionError("another backend ran")

    for function in ("attention_forward", "attention_backward", "merge_attention"):
        monkeypatch.setattr(BACKENDS["cpu"], function, must_not_run)
    arguments = dense(backend="reference")
    arguments["q"].requires_grad_()
    out, lse = da.attention(**arguments, return_lse=True)
    da.merge_attention([out, out], [lse, lse], backend="reference")[0].sum().backward()
    assert arguments["q"].grad is not None


def test_backends_says_what_this_machine_has(interpreted: None) -> None:
    status = da.backends()
    assert list(status) == ["cpu", "triton", "cuda", "reference"]
    assert all(s.available and s.name == name for name, s in status.items() if name != "cuda")
    assert status["cpu"].detail.split(", of ")[1].split(", ") == torch.ops.duplex_attn_cpu.isas()
    assert status["triton"].detail == "interpreted"
    assert str(status["reference"]).startswith("reference: torch operations on any device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there")
def test_backends_says_why_one_is_missing(not_interpreted: None) -> None:
    triton = da.backends()["triton"]
    assert (triton.available, triton.detail, str(triton)) == (False, NO_CARD, f"triton: missing, {NO_CARD}")


def test_a_library_that_is_not_there_or_does_not_load_is_a_reason(tmp_path: Path) -> None:
    backend = CpuBackend()
    backend.library = tmp_path / "libduplex_cpu.so"
    assert backend.missing() == "libduplex_cpu.so is not there: the package was built without a C++ compiler"
    broken = CpuBackend()
    broken.library = backend.library
    broken.library.write_bytes(b"no library")
    assert str(broken.missing()).startswith("libduplex_cpu.so does not load: ")


@pytest.fixture
def without_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(BACKENDS["cpu"], "missing", lambda: "it was not built")
    _candidates.cache_clear()
    yield
    _candidates.cache_clear()


def test_without_the_cpu_backend_the_reference_runs_and_says_so(without_cpu_backend: None, ran: list[str]) -> None:
    explanation = da.explain(**dense())
    assert explanation.backend == "reference" and explanation.refusals["cpu"] == "it was not built"
    call(dense())
    assert ran == ["reference"]
    with pytest.raises(ValueError, match="backend: expected one that can run this call, got cpu: it was not built"):
        call(dense(backend="cpu"))
    assert da.backends()["cpu"].detail == "it was not built"


class TestInstructionSet:
    @pytest.mark.parametrize("isa", ISAS)
    def test_the_variable_is_obeyed(self, monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
        monkeypatch.setenv("DUPLEX_ATTN_ISA", isa)
        if isa in torch.ops.duplex_attn_cpu.isas():
            assert da.explain(**dense(torch.bfloat16)).tile == isa
            assert da.explain(**dense()).tile == ("avx512_bf16" if isa == "amx" else isa)
            assert da.backends()["cpu"].detail.startswith(f"{isa}, of ")
        else:
            with pytest.raises(ValueError, match=f"DUPLEX_ATTN_ISA: this CPU cannot run {isa}"):
                da.explain(**dense())

    def test_the_widest_is_the_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("DUPLEX_ATTN_ISA", raising=False)
        widest = torch.ops.duplex_attn_cpu.isas()[-1]
        assert da.explain(**dense(torch.bfloat16)).tile == widest
        monkeypatch.setenv("DUPLEX_ATTN_ISA", "")
        assert da.explain(**dense(torch.bfloat16)).tile == widest

    def test_an_unknown_one_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DUPLEX_ATTN_ISA", "avx1024")
        message = f"DUPLEX_ATTN_ISA: expected one of {' '.join(torch.ops.duplex_attn_cpu.isas())}, got avx1024"
        out, lse = torch.randn(1, 2, HEADS, 8), torch.randn(1, HEADS, 2)
        for function in (da.explain, da.attention, lambda **_: da.merge_attention([out], [lse])):
            with pytest.raises(ValueError, match=message):
                function(**dense())
        status = da.backends()["cpu"]
        assert not status.available and status.detail == message
        assert da.explain(**dense(backend="reference")).backend == "reference"
