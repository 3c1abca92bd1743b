"""python benchmarks/gpu [STAGE ...]: what `make gpu` runs. python benchmarks/gpu report: what `make report` runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]


def import_benchmarks() -> None:
    """`benchmarks` by its path: the root beside it holds a folder `kernels`, and may not hide the package of that name."""
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (BENCHMARKS / "gpu", BENCHMARKS.parent)]
    init = BENCHMARKS / "__init__.py"
    spec = importlib.util.spec_from_file_location("benchmarks", init, submodule_search_locations=[str(BENCHMARKS)])
    assert spec is not None and spec.loader is not None
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["benchmarks"])


if __name__ == "__main__":
    import_benchmarks()
    if sys.argv[1:] == ["report"]:
        from benchmarks.report import main as report

        sys.exit(report())
    from benchmarks.gpu.run import main

    sys.exit(main(sys.argv[1:]))
