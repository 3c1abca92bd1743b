"""Every configuration of the tuning tables compiles for its card, fits it, and uses what the card has. No card is needed."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

SHARED = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_90": 227 * 1024}  # bytes that one program can have
CALL = ("kernel", "call", "bits", "head_dim")
COLUMNS = (*CALL, "tile", "warps", "stages", "registers", "spilled", "shared", "wgmma", "mma", "bulk", "seconds")
TUNING = Path(__file__).parents[2] / "kernels" / "tuning"
# Of cards, whose measured entries stand on an architecture's table: they may spill where that is faster.
INHERITS = {path.stem: base for path in TUNING.glob("*.json") if (base := json.loads(path.read_text()).get("inherits"))}
OWN = {name: base for name, base in INHERITS.items() if name not in SHARED}
TENSOR_CORES = {"sm_80": "mma", "sm_86": "mma", "sm_90": "wgmma"}
# Bytes a thread. Before 3.9, with which the tables were made, the compiler keeps a few numbers less in registers (seen: 3.6).
SPILLS = 0 if tuple(map(int, version("triton").split(".")[:2])) >= (3, 9) else 96
# So does it for another card than that which a configuration was made for (seen: 40). What the others spill is told in docs/kernel-notes.md.
BACKWARD = {"dq", "dkdv"}
FREE_OF_SPILLS = {"forward", "delta", "dsink", "merge", "table", "parts", "planned_parts", "append", "copy"}


@pytest.mark.slow
@pytest.mark.timeout(900)  # two minutes where nothing else runs
@pytest.mark.parametrize("table", [*SHARED, *OWN])
def test_every_configuration_compiles_and_fits(table: str, tmp_path: Path) -> None:
    base = OWN.get(table, table)
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONSAFEPATH": "1"}
    script = Path(__file__).with_name("compile_ahead.py")
    done = subprocess.run([sys.executable, script, table], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = sorted(map(json.loads, done.stdout.splitlines()), key=lambda row: [row[name] for name in CALL])
    lines = [COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]
    print(f"\n{table}", *(" ".join(f"{x:>10}" for x in line) for line in lines), sep="\n")

    for row in rows:
        what = f"{table}: {row}"
        assert row["shared"] <= SHARED[base], what
        assert not row["astray"], what
        if table in OWN:
            continue
        if row["call"] == "narrow":
            continue  # no configuration is made for it
        free = {"training": FREE_OF_SPILLS | BACKWARD, "tables": set()}.get(row["call"], FREE_OF_SPILLS)
        if row["kernel"] in free or (row["kernel"] == "paged" and row["call"] != "everything"):
            assert row["spilled"] <= max(SPILLS, 64 * (table in INHERITS)), what
        if row["products"] and row["bits"] == 16:
            few_rows = row["kernel"] == "paged" and row["call"] in ("plain", "float8")  # less than a wgmma has
            assert row["mma" if few_rows else TENSOR_CORES[base]] > 0, what
            if few_rows:  # as many buffers of keys and of values as loads go ahead
                numbers = (row["stages"] - 1) * 2 * int(row["tile"].split("x")[1]) * row["head_dim"]
                assert row["shared"] >= numbers * (1 if row["call"] == "float8" else 2), what
        assert (row["bulk"] > 0) == row["descriptors"], what
        assert row["slow"] == 0, what
        if row["kernel"] == "forward" and row["wgmma"]:
            assert (row["under"] > 0.5) == row["behind"], what
        if row["call"] == "float8" and row["products"] and base == "sm_90":
            assert row["bytewise"] == 0, what  # bytes are widened in front of shared memory
    compiled = {tuple(row[name] for name in ("kernel", "bits", "head_dim")) for row in rows}
    names = {"forward", "dq", "dkdv", "dbias", "diagonals", "table", "delta", "dsink", "merge"}
    names |= {"paged", "parts", "append", "copy"}
    assert compiled == {
        (name, bits, head_dim) for name in names for bits in (16, 32) for head_dim in (64, 128, 256)
    } | {(name, 16, head_dim) for name in ("planned", "planned_parts") for head_dim in (64, 128, 256)} | {
        ("drow_bias", 16, 64)
    }
    by_bulk_copy = {(row["kernel"], row["head_dim"]) for row in rows if row["descriptors"]}
    expected = {(name, d) for name in ("forward", "dq", "dkdv") for d in (64, 128, 256)}
    assert by_bulk_copy == (expected if base == "sm_90" else set())
