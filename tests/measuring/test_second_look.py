"""A configuration that `tune` found and `winners` measures slower than what was used before leaves the card's table again."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from duplex_attn.kernels import tuning

from benchmarks.gpu.second_look import speed

from .test_results import measured

SHORT, LONG = "forward hd64 full 512, batch 32", "forward hd64 full 4096"
TABLE, ENTRY, OTHER = "interpreter", "forward 16 64", "forward 16 128"
WIDE = "forward hd128 full 2048"
FOUND = {"block_m": 64, "block_n": 32, "num_warps": 8, "num_stages": 3, "descriptors": True, "values_behind": False}
BEFORE = FOUND | {"block_m": 16}


def stage(**times: dict[str, float | str]) -> dict[str, Any]:
    """A stage's record: seconds of each system of each workload, or what it came to instead."""

    def record(found: float | str) -> dict[str, Any]:
        return measured(found) if isinstance(found, float) else {"status": found, "reason": "why"}

    workloads = {SHORT: times.get("short", {}), LONG: times.get("long", {}), WIDE: times.get("wide", {})}
    return {"workloads": {name: {"systems": {n: record(t) for n, t in of.items()}} for name, of in workloads.items()}}


def test_the_speed_of_an_entry_is_that_of_all_its_workloads() -> None:
    before = stage(short={"triton": 2.0, "cuda": 1.0}, long={"triton": 8.0, "cuda": 4.0})
    now = stage(short={"triton": 1.0, "cuda": 1.0}, long={"triton": 16.0, "cuda": 4.0})
    assert speed(before, now, [SHORT]) == 2.0
    assert speed(before, now, [SHORT, LONG]) == pytest.approx(1.0)
    assert speed(before, now, [WIDE]) is None


def test_a_slower_card_is_no_slower_configuration() -> None:
    before = stage(short={"triton": 2.0, "cuda": 1.0, "flex": 1.0})
    now = stage(short={"triton": 2.1, "cuda": 1.2, "flex": 1.2, "sdpa": 9.0})
    assert speed(before, now, [SHORT]) == pytest.approx(2.0 / 2.1 * 1.2)


@pytest.mark.parametrize(("then", "today", "found"), [
    (1.0, "wrong", 0.0), (1.0, "crashed", 0.0), (1.0, "skipped", None), ("wrong", 1.0, None), ("wrong", "wrong", None),
])  # fmt: skip
def test_what_goes_wrong_is_slower_than_anything(then: float | str, today: float | str, found: float | None) -> None:
    assert speed(stage(short={"triton": then}), stage(short={"triton": today}), [SHORT]) == found


@pytest.mark.parametrize("before", [None, BEFORE], ids=["inherited", "its own"])
@pytest.mark.parametrize("slower", [True, False])
def test_a_slower_winner_is_taken_out(
    slower: bool, before: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu.page import of_card
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.stages import winners
    from benchmarks.gpu.store import Store
    from benchmarks.gpu.verdict import seconds, systems

    def measure_all(
        settings: Any, store: Store, record: dict[str, Any], deadline: float, chosen: Any, peers: Any
    ) -> None:
        assert {SHORT, LONG, WIDE} <= {w.name for w in chosen} and not any(w.head_dim == 256 for w in chosen)
        of = {"triton": 1.1 if slower else 0.9, "cuda": 1.0}
        record |= stage(short=of, long=of, wide={"triton": 0.5, "cuda": 1.0})

    monkeypatch.setattr(winners, "measure_all", measure_all)
    as_it_was = tuning.tables()[TABLE]
    own = {"inherits": "sm_90", "forward": {"16": {"64": FOUND, "128": FOUND}}}
    (tmp_path / f"{TABLE}.json").write_text(json.dumps(own))
    store = Store(tmp_path / "found.json")
    one = {"triton": 1.0, "cuda": 1.0}
    store.begin("bench").update(stage(short=one, long=one, wide=one), status="done", reason="", ceilings={})
    tune = {
        "winners": {ENTRY: {**FOUND, "seconds": 0.9}, OTHER: {**FOUND, "seconds": 0.5}},
        "gains": {ENTRY: 1.1, OTHER: 2},
    }
    store.begin("tune").update(tune, before={ENTRY: before, OTHER: None}, status="done", reason="")
    store.data["tuning"] = own
    given = parse(["winners", "--device", "cpu", "--tuning", str(tmp_path)])
    record = store.begin("winners")
    try:
        winners.run(given, store, record, 0.0)
        left = winners.in_use(store, TABLE)
    finally:
        tuning.adopt(TABLE, as_it_was)
    record.update(status="done", reason="")
    store.save()
    results = Store(store.path).data
    wanted = FOUND if not slower else before
    assert results["tuning"]["forward"]["16"] == {"128": FOUND} | ({} if wanted is None else {"64": wanted})
    assert json.loads((tmp_path / f"{TABLE}.json").read_text()) == results["tuning"]
    assert seconds(systems(results, SHORT), "triton") == (1.0 if slower else 0.9), (
        "what stands is of the table that is left"
    )
    assert seconds(systems(results, WIDE), "triton") == 0.5
    assert left == ([OTHER] if slower else [ENTRY, OTHER])
    page = "\n".join(of_card(results, None))
    assert (f"| {ENTRY} | 0.91 |" in page) == slower and (f"| {ENTRY} | 10% |" in page) != slower


def test_a_winner_that_is_wrong_elsewhere_leaves_the_backend_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was wrong with is in no table any more, and no call meets it."""
    from benchmarks.gpu.evidence import failing
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.stages import winners
    from benchmarks.gpu.store import Store

    as_it_was = tuning.tables()[TABLE]
    store = Store(tmp_path / "found.json")
    store.begin("bench").update(stage(short={"triton": 1.0}, long={"triton": 1.0}))
    store.begin("tune").update(winners={ENTRY: FOUND}, before={ENTRY: None})
    record = store.begin("winners")
    record |= stage(short={"triton": 0.5}, long={"triton": "wrong"})
    assert failing(store.data) == ["triton"]
    given = parse(["winners", "--device", "cpu", "--tuning", str(tmp_path)])
    try:
        winners.take_out_the_slower(given, store, record, TABLE, {ENTRY: [SHORT, LONG]})
    finally:
        tuning.adopt(TABLE, as_it_was)
    assert record["taken_out"] == {ENTRY: 0.0} and failing(store.data) == []
    assert set(record["measured_with_what_was_taken_out"]) == {SHORT, LONG}


def test_winners_are_compiled_together_for_all_that_they_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after another, in the midst of measuring, their compiler would take most of the stage's time."""
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.stages import winners
    from benchmarks.gpu.store import Store

    as_it_was = tuning.tables()[TABLE]
    told: list[Any] = []

    def in_parts(settings: Any, stage: str, results: Path, jobs: list[str], deadline: float) -> tuple[list[Any], str]:
        told.extend([stage, jobs])
        return [{"workload": SHORT, "seconds": 2.0}], ""

    monkeypatch.setattr(winners, "in_parts", in_parts)
    monkeypatch.setattr(winners, "table_of", lambda device, folder: TABLE)
    monkeypatch.setattr(winners, "in_use", lambda store, table: [ENTRY])
    monkeypatch.setattr(winners, "measure_all", lambda *given: None)
    store = Store(tmp_path / "found.json")
    record = store.begin("winners")
    for _ in range(2):  # the second time in a process that goes on after one that died
        winners.run(parse(["winners", "--tuning", str(tmp_path)]), store, record, 0.0)
    assert told[0] == "winners" and {SHORT, LONG} <= set(told[1]) and len(told) == 2
    assert record["compiled"] == {SHORT: 2.0}

    monkeypatch.undo()
    (tmp_path / f"{TABLE}.json").write_text(json.dumps({**as_it_was, "measured": "here"}))
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([SHORT])))
    tables: list[str] = []
    monkeypatch.setattr(
        winners, "call_workload", lambda w, device: tables.append(tuning.tables()[TABLE]["measured"]) or {}
    )
    try:
        winners.part(parse(["winners", "--device", "cpu", "--tiny", "--tuning", str(tmp_path)]), time.monotonic() + 60)
    finally:
        tuning.adopt(TABLE, as_it_was)
    assert tables == ["here"] and json.loads(capsys.readouterr().out)["workload"] == SHORT


def test_an_entry_that_was_taken_out_leaves_nothing_behind(tmp_path: Path) -> None:
    from benchmarks.gpu.settings import parse
    from benchmarks.gpu.stages.tune import entry_of, keep
    from benchmarks.gpu.store import Store

    store, given = Store(tmp_path / "found.json"), parse(["tune", "--device", "cpu", "--tuning", str(tmp_path)])
    try:
        tuning.adopt("some-card", {"inherits": "sm_90"})
        keep(given, "some-card", {ENTRY: FOUND, "dq 16 64": FOUND}, store)
        assert entry_of("some-card", ENTRY) == FOUND and entry_of("some-card", OTHER) is None
        keep(given, "some-card", {ENTRY: None}, store)
        assert "forward" not in store.data["tuning"] and "dq" in store.data["tuning"]
    finally:
        tuning.adopt("some-card", {"inherits": "sm_90"})
        del tuning.tables()["some-card"]
