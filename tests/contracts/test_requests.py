"""Requests for memory that is read soon have no effect that a compiler sees: they are looked for in the machine code."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter

import pytest
from duplex_attn.backends import BACKENDS

ASKING = re.compile(
    r"duplex::(\w+)::(?:\(anonymous namespace\)::)?(dot_few<.+?>\(|dot_many<.+?>\(|add_rows<.+?>\(|\w+_block_of_bytes\(|Rows<.+>::attend\()"
)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions of x86")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_every_kernel_that_reads_keys_asks_for_them() -> None:
    library = BACKENDS["cpu"].library
    if not library.exists():
        pytest.skip("no CPU library")
    text = subprocess.run(["objdump", "-dC", str(library)], capture_output=True, text=True, check=True).stdout
    requests: Counter[str] = Counter()
    for function in text.split("\n\n"):
        if found := ASKING.search(function.partition("\n")[0]):
            requests["::".join(found.groups())] += function.count("\tprefetch")
    assert {name.partition("<")[0] for name in requests} >= {
        f"avx512_bf16::{x}" for x in ("dot_few", "add_rows", "Rows")
    }
    assert [name for name, count in requests.items() if count == 0] == []
