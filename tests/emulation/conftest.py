from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from duplex_attn.backends import BACKENDS

from ..lanes import Lane
from .library import EmulatedCuda

EMULATED = EmulatedCuda()


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
