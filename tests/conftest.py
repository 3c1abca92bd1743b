"""Lanes for every test that asks for one, and a memory in which nothing is zero by luck."""

from __future__ import annotations

import importlib
import os
from collections.abc import Generator, Iterator

import pytest

# Read when torch is imported. Where several processes share the cores, threads that wait by spinning take them from those
# that work: 88 seconds of a core instead of 6 in a part of the paged tests, on two busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from duplex_attn.backends import BACKENDS

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: kernels then run on CPU tensors

from . import interpreter
from .emulation.library import EMULATED
from .lanes import CPU_LANES, GPU_LANES, Lane, forced, missing, repeats_another

# A machine with a card may lack these: what needs them is then left out.
NEEDED_BY = {
    "hypothesis": [
        "runtime/test_model.py", "kernels/test_random.py", "kernels/test_visibility.py", "paged/test_plan.py",
        "integrations/test_transformers_masks.py",
    ],
    "tokenizers": ["cli", "generate", "modules/test_text.py", "integrations/test_transformers_models.py"],
    "click": ["cli"],
    "safetensors": [
        "cli", "generate", "integrations", "modules/test_bert.py", "modules/test_checkpoint.py", "modules/test_deberta.py",
        "modules/test_gpt.py", "modules/test_seq2seq.py",
    ],
}  # fmt: skip


def is_lacking(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return True
    return False


collect_ignore = sorted({path for package, paths in NEEDED_BY.items() if is_lacking(package) for path in paths})
if not is_lacking("hypothesis"):
    from hypothesis import Phase, settings

    # Phase.explain has Python traced line by line, which makes the interpreter of Triton several times slower.
    settings.register_profile("untraced", phases=[phase for phase in Phase if phase is not Phase.explain])
    settings.load_profile("untraced")

interpreter.hasten()
interpreter.treat_rows_alike()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "lane" in metafunc.fixturenames and not getattr(metafunc.module, "OWN_LANE", False):
        lanes = [*CPU_LANES, *(pytest.param(lane, marks=pytest.mark.gpu) for lane in GPU_LANES)]
        metafunc.parametrize("lane", lanes, ids=str, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, so that no process is left alone with it at the end."""
    items[:] = [item for item in items if not _repeats_another(item)]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def _repeats_another(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec else ()
    dtypes = {x for x in (*values, *(getattr(x, "dtype", None) for x in values)) if isinstance(x, torch.dtype)}
    return any(isinstance(x, Lane) and repeats_another(x, dtypes) for x in values)


REFUSED = "backend: expected one that can run this call, got "


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """What a card's backend says that it does not take is no failure of it: tests of every lane ask for more than each has."""
    try:
        return (yield)
    except Exception as error:
        params = getattr(pyfuncitem, "callspec", None)
        on_card = params and any(isinstance(x, Lane) and x.device == "cuda" for x in params.params.values())
        refusals = [
            str(e) for e in (error, error.__cause__) if isinstance(e, ValueError) and str(e).startswith(REFUSED)
        ]
        if on_card and refusals:
            pytest.skip(refusals[0].removeprefix(REFUSED))
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, object, object]:
    """A kernel that reads where nothing is takes the process's card away for good: a worker of pytest-xdist then ends, its test
    fails, and another worker goes on with those that are left."""
    try:
        return (yield)
    finally:
        if torch.cuda.is_initialized() and "PYTEST_XDIST_WORKER" in os.environ:
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)


@pytest.fixture
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lane]:
    lane: Lane = request.param
    if reason := missing(lane):
        pytest.skip(f"{lane}: {reason}")
    if lane.isa:
        monkeypatch.setenv("DUPLEX_ATTN_ISA", forced(lane))
    threads = torch.get_num_threads()
    if lane.slow:  # the interpreter is one thread, and the oracle's tiny tensors leave a second one spinning
        torch.set_num_threads(1)
    yield lane
    torch.set_num_threads(threads)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lane]:
    """The lane of the CUDA kernels on the emulated machine."""
    if reason := EMULATED.missing():
        pytest.skip(reason)
    monkeypatch.setitem(BACKENDS, "cuda", EMULATED)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the machine is one thread, and the oracle's tiny tensors leave a second one spinning
    yield Lane("cuda")
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """Every torch.empty, the outputs and workspaces of the operators too, comes filled with NaN or the largest integer, and each
    task on the CPU begins with NaN in its scratch."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # only then is fill_uninitialized_memory, on by default, obeyed
    fill = torch.ops.duplex_attn_cpu.fill_scratch_with_nan if BACKENDS["cpu"].missing() is None else lambda on: None
    fill(True)
    yield
    fill(False)
    torch.use_deterministic_algorithms(before)
