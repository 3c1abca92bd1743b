"""The time of each stage: what a build needs on a machine, and nine minutes in all on a machine of 16 cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import ROOT

CSRC, MINUTES = ROOT / "csrc", 60.0


def total(build: float) -> float:
    from benchmarks.gpu.limits import LIMITS, after_build

    return sum(after_build({**LIMITS, "build": build}, build).values())


@pytest.mark.parametrize("nvcc", [False, True])
def test_nine_minutes_are_enough_for_16_cores(nvcc: bool) -> None:
    from benchmarks.gpu.limits import LIMITS, build_limit

    assert sum(LIMITS.values()) == 9 * MINUTES
    assert LIMITS["build"] < build_limit(CSRC, 16, nvcc)
    assert total(build_limit(CSRC, 16, nvcc)) <= 9 * MINUTES


def test_a_build_has_time_for_what_there_is_to_compile(tmp_path: Path) -> None:
    from benchmarks.gpu.limits import LIMITS, build_limit

    def limit(cores: int, nvcc: bool) -> int:
        return build_limit(tmp_path, cores, nvcc)

    assert limit(1, nvcc=True) == LIMITS["build"], "there is nothing to compile"
    (tmp_path / "cpu" / "kernels").mkdir(parents=True)
    (tmp_path / "cpu" / "kernels" / "forward.cpp").touch()
    without = limit(1, nvcc=True)
    for name in ("sm90/forward.cu", "sm90/backward.cu", "sm80/forward.cu"):
        before = limit(1, nvcc=True)
        (tmp_path / "cuda" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cuda" / name).touch()
        assert limit(1, nvcc=True) > before, "a kernel more"
    assert limit(1, nvcc=False) == without, "without nvcc it is not compiled"
    assert limit(1, True) > limit(2, True) > limit(16, True)


def test_what_the_build_took_comes_off_the_elastic_stages() -> None:
    from benchmarks.gpu.limits import ELASTIC, LEAST, LIMITS, after_build

    assert after_build(LIMITS, 5.0) == LIMITS, "compiled before: all have their time"
    assert sum(after_build(LIMITS, 120.0).values()) == pytest.approx(8 * MINUTES)
    for stage, limit in after_build(LIMITS, 1000.0).items():
        assert limit == LIMITS[stage] * (LEAST if stage in ELASTIC else 1)
    assert after_build(LIMITS, 120.0, asked={"bench"})["bench"] == LIMITS["bench"], "asked for"


def test_a_limit_that_is_asked_for_is_told_from_one_that_is_not() -> None:
    from benchmarks.gpu.limits import LIMITS
    from benchmarks.gpu.settings import parse

    given = parse(["--limit", f"bench={LIMITS['bench']}"])
    assert given.asked == {"bench"} and given.limits["bench"] == LIMITS["bench"]


def test_nvcc_is_found_where_setup_py_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.gpu import limits

    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    if Path("/usr/local/cuda/bin/nvcc").exists():
        assert limits.has_nvcc()
    else:
        assert not limits.has_nvcc()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert limits.has_nvcc()
