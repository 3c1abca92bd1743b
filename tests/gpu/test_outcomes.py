"""A call that a card's backend does not take is passed over, and a process that has lost its card ends."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from .. import conftest
from ..lanes import Lane

REFUSAL = ValueError(conftest.REFUSED + "cuda: it takes bfloat16 and float16")


def caused_by(cause: Exception) -> Exception:
    error = RuntimeError("a check of torch's failed")
    error.__cause__ = cause
    return error


def outcome(error: Exception, lane: Lane) -> str:
    """Of a test of this lane in which there is such an error."""
    item = SimpleNamespace(callspec=SimpleNamespace(params={"card": lane, "dim": 64}))
    around = conftest.pytest_pyfunc_call(item)
    next(around)
    try:
        around.throw(error)
    except pytest.skip.Exception as skipped:
        return f"skipped: {skipped}"
    except Exception as raised:
        assert raised is error
    return "failed"


@pytest.mark.parametrize("error", [REFUSAL, caused_by(REFUSAL)])
def test_what_a_backend_of_a_card_refuses_is_passed_over(error: Exception) -> None:
    assert outcome(error, Lane("cuda", device="cuda")) == "skipped: cuda: it takes bfloat16 and float16"
    assert outcome(error, Lane("cuda")) == "failed"


@pytest.mark.parametrize("error", [ValueError("scale: expected a finite number"), AssertionError(str(REFUSAL))])
def test_all_else_is_a_failure(error: Exception) -> None:
    assert outcome(error, Lane("cuda", device="cuda")) == "failed"


@pytest.mark.parametrize("lost", [False, True])
def test_a_worker_without_its_card_ends(monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    def synchronize() -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def end(status: int) -> None:
        raise SystemExit(status)

    with monkeypatch.context() as patch:
        patch.setenv("PYTEST_XDIST_WORKER", "gw0")
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "synchronize", synchronize)
        patch.setattr(os, "_exit", end)
        after = conftest.pytest_runtest_teardown()
        next(after)
        with pytest.raises(SystemExit if lost else StopIteration):
            after.send(None)
