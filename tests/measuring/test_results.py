"""The schema of a results file, what is read out of one, and that everything derived from the committed ones is what they say."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from duplex_attn import evidence as of_package
from duplex_attn import ops
from duplex_attn.paged import ops as paged_ops

from .conftest import ROOT

STAMP = {"status": "done", "reason": "", "seconds": 1.0, "commit": "0" * 40, "sources": "0" * 16, "at": "2026-01-01"}


def measured(median: float, **more: Any) -> dict[str, Any]:
    spread = {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "rounds": 9}
    return {"status": "measured", "seconds": spread, "difference": 0.0, "allowed": 1.0} | more


def results(workloads: dict[str, dict[str, Any]], **stages: Any) -> dict[str, Any]:
    """A results file that nobody measured."""
    found = {name: {"systems": systems, "flops": 1e9, "moved": 4e9} for name, systems in workloads.items()}
    ceilings = {"matmul_flops": 1e15, "copy_bytes": 4e12, "read_bytes": 4e12}
    bench = STAMP | {"workloads": found, "ceilings": ceilings}
    return {
        "schema": 1, "kind": "gpu", "device": "Card", "rehearsal": False, "machine": {}, "stages": {"bench": bench, **stages},
    }  # fmt: skip


GOOD = results({"w": {"triton": measured(1.0, ours=True), "flex": {"status": "skipped", "reason": "why"}}})
BROKEN = {
    "schema": (("schema",), 2, "expected kind gpu and schema 1"),
    "device": (("device",), 5, "device: expected str"),
    "stage": (("stages", "speed"), STAMP, "stages: expected some of"),
    "status": (("stages", "bench", "status"), "fine", "bench: status: expected one of"),
    "reason": (("stages", "bench", "status"), "cut", "bench: cut without a reason"),
    "sources": (("stages", "bench", "sources"), "", "bench: expected seconds and sources"),
    "system": (("stages", "bench", "workloads", "w", "systems", "flex", "reason"), "", "skipped without a reason"),
    "median": (("stages", "bench", "workloads", "w", "systems", "triton", "seconds", "median"), None, "without a median"),
    "order": (("stages", "bench", "workloads", "w", "systems", "triton", "seconds", "q1"), 7.0, "quartiles out of order"),
}  # fmt: skip


def test_the_schema_passes_a_good_file() -> None:
    from benchmarks.gpu.store import wrong_with

    assert list(wrong_with(GOOD)) == []


@pytest.mark.parametrize("what", BROKEN)
def test_the_schema_catches(what: str, tmp_path: Path) -> None:
    from benchmarks.gpu.store import Store

    places, value, told = BROKEN[what]
    broken = copy.deepcopy(GOOD)
    inner: dict[str, Any] = broken
    for place in places[:-1]:
        inner = inner[place]
    inner[places[-1]] = value
    path = tmp_path / "card.json"
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=f"card.json: .*{told}"):
        Store(path)


DECODE = "decode 32 x 4096, pages of 16"
VERDICTS = [  # workload, backend, systems of it, what is measured, whether it is met
    ("forward hd128 full 2048", "triton", {"triton": 1.0, "sdpa cudnn": 0.8}, 0.8, True),
    ("forward hd128 full 2048", "triton", {"triton": 1.0, "sdpa cudnn": 0.7}, 0.7, False),
    ("forward hd128 full 2048", "cuda", {"triton": 1.0, "sdpa cudnn": 0.7}, None, None),
    ("forward hd128 full 2048", "triton", {"triton": 1.0, "flex": 0.7}, None, None),
    (
        "forward hd64 full 512, batch 32",
        "triton",
        {"triton": 1.0, "cuda": 0.1, "flex": 1.5, "sdpa flash": 1.2},
        1.2,
        True,
    ),
    (
        "BERT batch, lengths 32 to 512",
        "triton",
        {"triton": 1.0, "padded sdpa math": 1.8, "varlen_attn": 0.5},
        1.8,
        True,
    ),
    (DECODE, "triton", {"triton": 1.25e-3}, 0.8, False),
    ("eager call from Python", "triton", {"triton": 39e-6}, 39e-6, True),
    ("call in a CUDA graph", "triton", {"triton": 20e-6}, 8e-6, False),
]


@pytest.mark.parametrize(("workload", "backend", "times", "value", "met"), VERDICTS)
def test_a_bar_is_judged(
    workload: str, backend: str, times: dict[str, float], value: float | None, met: bool | None
) -> None:
    from benchmarks.gpu.registry import workloads
    from benchmarks.gpu.verdict import judge

    systems = {name: measured(t, ours=name in ("triton", "cuda"), kernel_seconds=12e-6) for name, t in times.items()}
    (found,) = [w for w in workloads() if w.name == workload]
    (bar,) = [bar for bar in found.bars if bar.backend == backend]
    verdict = judge(bar, found, results({workload: systems}))
    assert verdict.measured == (None if value is None else pytest.approx(value)) and verdict.met is met
    assert bool(verdict.reason) == (met is None)


def test_a_bar_against_another_workload_and_what_was_measured_again() -> None:
    from benchmarks.gpu.registry import workloads
    from benchmarks.gpu.verdict import judge

    (fp8,) = [w for w in workloads() if w.name == f"{DECODE}, fp8"]
    slow, fast = ({fp8.name: {"triton": measured(t, ours=True)}} for t in (1.0, 0.5))
    other = {DECODE: {"triton": measured(1.0, ours=True)}}
    assert judge(fp8.bars[0], fp8, results(slow | other)).met is False
    again = results(fast)["stages"]["bench"]
    assert judge(fp8.bars[0], fp8, results(slow | other, winners=again)).measured == 2.0
    cut = results({fp8.name: {"triton": {"status": "skipped", "reason": "the stage ended before it was timed"}}})
    assert judge(fp8.bars[0], fp8, results(fast | other, winners=cut["stages"]["bench"])).measured == 2.0
    assert judge(fp8.bars[0], fp8, results(slow)).met is None
    assert judge(fp8.bars[0], fp8, results(fast | other) | {"rehearsal": True}).met is None


def test_names_in_the_registry_are_there_and_their_own() -> None:
    from benchmarks.gpu.registry import workloads

    names = [w.name for w in workloads()]
    assert len(set(names)) == len(names)
    against = {bar.against for w in workloads() for bar in w.bars if bar.against.startswith("workload:")}
    assert {one.removeprefix("workload:") for one in against} <= set(names)


def test_evidence_of_a_card() -> None:
    """The geometric mean over a class, against the fastest of ours, where all of them ran; what fails comes last, whatever its speed."""
    from benchmarks.gpu.evidence import evidence

    def ours(**times: float) -> dict[str, Any]:
        return {name: measured(t, ours=True) for name, t in times.items()} | {"flex": measured(0.01)}

    found = {
        "forward hd128 full 2048": ours(triton=2.0, cuda=1.0),
        "forward hd128 full 4096": ours(triton=8.0, cuda=1.0),
        "forward hd64 full 512, batch 32": ours(triton=1.0, cuda=2.0),
        "distance bias, forward + backward 1024": ours(triton=3.0, cuda=1.0),
        "bias of pairs, forward + backward 384": ours(triton=9.0),
        DECODE: {"triton": {"status": "wrong", "reason": "by much", "ours": True}},
        "window of 1024 back": {"all": {"status": "failed", "reason": "no tensors, of no backend", "ours": True}},
    }
    found |= {
        "append 4096 tokens + RoPE": ours(triton=2.0, cuda=1.0),
        "copy of 4 pages": ours(triton=1.0, cuda=2.0),
        "merge of 4 parts, 64 rows": ours(triton=3.0),
        "prefill 8 x 512 after 3584, ALiBi": ours(triton=5.0),
    }
    made = evidence(results(found))
    assert made["failing"] == ["triton"]
    assert made["times"] == {
        "forward, plain, 16 bit, head_dim 128, long": {"cuda": 1.0, "triton": 4.0},
        "forward, plain, 16 bit, head_dim 64, short": {"cuda": 2.0, "triton": 1.0},
        "backward, terms, 16 bit, head_dim 64, short": {"cuda": 1.0, "triton": 3.0},
        "append, 16 bit, head_dim 128, large": {"cuda": 1.0, "triton": 2.0},
        "copy, 16 bit, head_dim 128, small": {"cuda": 2.0, "triton": 1.0},
        "merge, 16 bit, head_dim 128, small": {"triton": 1.0},
        "paged, terms, 16 bit, head_dim 128, short": {"triton": 1.0},
    }


@pytest.mark.parametrize(
    ("test", "failing"),
    [
        ("tests/gpu/test_x.py::test_y[triton-cuda-case]", ["triton"]),
        ("tests/gpu/test_x.py::test_y[plain-torch.float32-64-triton-cuda]", ["triton"]),
        ("tests/gpu/test_x.py::test_y[cuda-cuda]", ["cuda"]),
        ("tests/gpu/test_x.py::test_y[cpu-case]", []),
        ("tests/kernels/test_x.py::test_y[reference-cuda-case]", ["reference"]),
        ("tests/emulation/test_grid.py::test_forward[card-12:layout=packed]", ["cuda"]),
        ("tests/emulation/test_edges.py::test_packed[True-card]", ["cuda"]),
        ("tests/emulation/test_grid.py::test_forward[sm90-12:layout=packed]", []),
        ("tests/emulation/test_machine.py::test_lanes[card-dtype0]", []),
    ],
)
@pytest.mark.parametrize("others", [False, True])
def test_whose_failure_it_is(test: str, failing: list[str], others: bool) -> None:
    from benchmarks.gpu.evidence import evidence

    failures: dict[str, Any] = {"failures": [{"test": test, "message": ""}]}
    stage = STAMP | ({"failures": [], "others": failures} if others else failures)
    assert evidence(results({}, test=stage))["failing"] == failing


CHOICES = {  # how the package chooses a backend for a call -> the class of shapes that the call is then looked up in
    "choose": lambda call, name: of_package.class_of(call, "forward"),
    "choose_backward": lambda call, name: of_package.class_of(call, "backward"),
    "choose_merge": lambda outs, name: of_package.class_of_merge(outs),
    "choose_paged": lambda call, name: of_package.class_of_paged(call),
    "choose_append": lambda call, name: of_package.class_of_append(call),
    "choose_copy": lambda k_pages, v_pages, src, name: of_package.class_of_copy(k_pages, v_pages, src),
}


def test_a_workload_is_evidence_for_the_very_calls_that_it_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.evidence import class_of
    from benchmarks.gpu.families import build
    from benchmarks.gpu.registry import workloads

    asked: set[str] = set()

    def spy(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def choice(*given: Any) -> Any:
            asked.add(CHOICES[name](*given))
            return real(*given)

        return choice

    for module in (ops, paged_ops):
        for name in CHOICES.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, spy(name, getattr(module, name)))
    in_little = dict.fromkeys(replace(w.tiny(), name="") for w in workloads() if class_of(w))
    for workload in in_little:
        asked.clear()
        problem = build(workload, torch.device("cpu"))
        assert problem.check(problem.ours("cpu")()).passes(ours=True), workload
        assert class_of(workload) in asked, workload
    kinds = {class_of(workload).split(",")[0] for workload in in_little}
    assert kinds == {"forward", "backward", "paged", "append", "merge", "copy"}


def test_what_is_derived_from_the_committed_results_is_what_they_say() -> None:
    from benchmarks.report import all_plots, texts

    for path, text in texts().items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)} is old: make report"
    plots = list(all_plots())
    for plot in plots:
        assert f"numbers {plot.shown}" in plot.path.read_text(), f"{plot.path.relative_to(ROOT)} is old: make report"
    assert {plot.path for plot in plots} == set((ROOT / "docs" / "performance").iterdir())
    tables = (ROOT / "kernels" / "tuning").glob("*.json")
    own = {p for p in tables if "inherits" in json.loads(p.read_text()) and not p.stem.startswith("sm_")}
    assert own <= set(texts()), "a card's table without the results that it came from"


def test_committed_results_of_cards_are_of_cards_and_of_a_commit() -> None:
    from benchmarks.report import files, is_a_commit

    cards, _ = files()
    for name, card in cards.items():
        assert not card["rehearsal"], name
        for stage in card["stages"].values():
            assert is_a_commit(stage["commit"]), (
                f"{name}: measured with the sources of no commit, or make report is due"
            )


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_results_of_a_copy_without_git_get_the_commit_that_has_its_sources(tmp_path: Path) -> None:
    from benchmarks.gpu.store import CODE, commit, commit_with, sources
    from benchmarks.report import name_commits

    clone, plain = tmp_path / "clone", tmp_path / "plain"
    for folder in CODE:
        (clone / folder).mkdir(parents=True)
        (clone / folder / "code.py").write_text(folder)
    git(tmp_path, "init", "--quiet", str(clone))
    named = {}
    changes = {"one": "csrc/new.cu", "two": "csrc/new.cu", "tiles": "kernels/tuning/sm_90.json", "three": "csrc/new.cu"}
    (clone / "kernels" / "tuning").mkdir()
    (clone / "kernels" / "tuning" / "card.json").write_text("its own")
    for text, changed in changes.items():
        (clone / changed).write_text(text)
        git(clone, "add", ".")
        git(clone, "commit", "--quiet", "-m", text)
        named[text] = (git(clone, "rev-parse", "HEAD"), sources(clone))
    shutil.copytree(clone, plain, ignore=shutil.ignore_patterns(".git"))
    (plain / "README.md").write_text("no code")
    (plain / "kernels" / "tuning" / "some-card.json").write_text("found by tune in the midst of a run")
    assert sources(plain) == named["three"][1] and len({digest for _, digest in named.values()}) == 4
    (plain / "tests" / "code.py").write_text("changed where it was measured")
    head = commit(clone)
    for changed, told in {"csrc/new.cu": "+", "kernels/tuning/sm_90.json": "+", "kernels/tuning/card.json": ""}.items():
        shutil.copytree(clone, tmp_path / told / changed)
        (tmp_path / told / changed / changed).write_text("not committed")
        assert commit(tmp_path / told / changed) == f"{head}{told}"

    unnamed = {"two": None, "tiles": None, "three": "0" * 40 + "+", "changed": None}
    stages = {
        name: STAMP | {"commit": commit, "sources": sources(plain) if name == "changed" else named[name][1]}
        for name, commit in unnamed.items()
    }
    path = tmp_path / "card.json"
    path.write_text(json.dumps(GOOD | {"stages": stages}))
    assert list(name_commits(tmp_path, clone)) == [path]
    found = {name: stage["commit"] for name, stage in json.loads(path.read_text())["stages"].items()}
    assert found == {name: named[name][0] if name in named else None for name in unnamed}
    assert list(name_commits(tmp_path, clone)) == [], "what is named stays as it is"
    assert commit_with(named["one"][1], clone) == named["one"][0]


def test_a_page_of_a_card_tells_all_that_was_found() -> None:
    from benchmarks.gpu.page import of_card

    test = STAMP | {
        "status": "failed", "reason": "1 tests failed", "passed": 7, "skips": {"no room": 2},
        "failures": [{"test": "tests/x.py::y[triton-cuda]", "message": "off | by one"}],
        "late": [{"test": "tests/x.py::z[triton-cuda]"}],
    }  # fmt: skip
    sanitize = STAMP | {"tools": {"memcheck": {"status": "done", "reason": ""}}}
    found = {
        "forward hd128 full 2048": {"triton": measured(2e-3, ours=True), "sdpa cudnn": measured(1e-3)},
        "prefix-LM 1024 of 4096": {"flex": {"status": "crashed", "reason": "its process died"}},
    }
    page = "\n".join(of_card(results(found, test=test, sanitize=sanitize), "plot.svg"))
    for line in (
        "| forward hd128 full 2048 | triton >= 0.75 x sdpa cudnn | 0.50 | no |",
        "| forward hd128 full 2048 | cuda >= 1 x sdpa cudnn | not measured | cuda: not measured |",
        "| forward hd128 full 2048 | triton | 2.000 ms | 1.800 to 2.200 | 2.00 TB/s | 50% |",
        "| flex | crashed: its process died | prefix-LM 1024 of 4096 |",
        "| `tests/x.py::y[triton-cuda]` | off / by one |",
        "| `tests/x.py::z[triton-cuda]` |",
        "| memcheck | done |  |",
        "Tests: 7 passed, 0 had no time to run.",
        "| 2 | no room |",
        "![Speed of each system on Card](plot.svg)",
    ):
        assert line in page, page


def test_a_page_tells_which_tests_had_no_time() -> None:
    from benchmarks.gpu.page import of_card

    test = STAMP | {"passed": 7, "skips": {}, "failures": [], "others": {"passed": 2, "not_run": 5}}
    assert "Tests: 9 passed, 5 had no time to run." in "\n".join(of_card(results({}, test=test), "plot.svg"))
    cut = test | {"status": "cut", "others": {"passed": 0}}
    told = "Tests: 7 passed, how many more had no time to run is not known."
    assert told in "\n".join(of_card(results({}, test=cut), "plot.svg"))
    test["others"] = {"reason": "no time was left to bring them up"}
    told = "Tests: 7 passed, all but those that come first had no time to run."
    assert told in "\n".join(of_card(results({}, test=test), "plot.svg"))


def test_the_evidence_is_data_of_the_package() -> None:
    assert json.loads(of_package.FILE.read_text()) == json.loads((ROOT / "attn" / "evidence.json").read_text())
