"""`pytest -m gpu`: first what is written for cards, then every other test on the card's backends, as far as time goes."""

from __future__ import annotations

import importlib.util
import math
import re
import signal
import threading
import time
from collections import Counter
from typing import Any

import pytest

from ..card import room
from ..golden import gather
from ..limits import cores
from ..settings import Settings
from ..store import UNFINISHED, Store

FIRST = ("tests/gpu", "tests/emulation", "tests/contracts")  # these must come to their end
WORKERS = 14  # processes on one card: what takes long is the compiler and the oracle, both of which have one thread
STUCK = 60  # seconds of one test, which has then not come to its end: a slow card, or one that all tests want, makes none wrong
ENDING = 10.0  # seconds that pytest-xdist gives its workers to end, of which those in the midst of a test take all
SAVED_EVERY = 1.0  # seconds


def run(settings: Settings, store: Store, record: dict[str, Any], deadline: float) -> None:
    on_card = settings.device == "cuda"
    arguments = [*(FIRST if on_card else FIRST[:1]), "-q", "--no-header", "-p", "no:cacheprovider"]
    arguments += ["--continue-on-collection-errors"]  # they are kept among the failures
    arguments += ["-m", "gpu" if on_card else "not gpu", *(["-k", settings.tests] if settings.tests else [])]
    if on_card and importlib.util.find_spec("xdist"):
        arguments += ["-n", str(min(room(WORKERS), cores())), "--dist", "worksteal"]
        deadline -= ENDING
        if importlib.util.find_spec(
            "pytest_timeout"
        ):  # the worker ends, for nothing else ends a kernel that waits for ever
            arguments += [f"--timeout={STUCK}", "--timeout-method=thread"]
    crashed = record.get("crashed", [])
    arguments += [f"--deselect={test}" for test in crashed]
    first = Recorder(store, record, deadline)
    ended = pytest.main(arguments, plugins=[first])
    if on_card:
        gather()
    if ended in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
        record.update(status="failed", reason=f"pytest ended with {ended!r}")
    elif first.total == 0 and time.monotonic() > deadline:
        record.update(status="cut", reason="time was over before the tests were collected")
    elif first.total == 0:
        record.update(status="failed", reason="no test was found")
    elif first.finished < first.total:
        record.update(status="cut", reason=f"time was over after {first.finished} of {first.total} tests")
    elif on_card and time.monotonic() + 2 * first.came_up < deadline:
        rest = Recorder(store, record.setdefault("others", {}), deadline)
        ignored = [f"--ignore={folder}" for folder in FIRST]
        pytest.main(["tests", *ignored, *arguments[len(FIRST) :]], plugins=[rest])
        record["others"]["not_run"] = rest.total - rest.finished
    elif on_card:
        record["others"] = {"reason": "no time was left to bring them up"}
    record["failures"] += [{"test": test, "message": "its process died"} for test in crashed]
    failures, late = ([*record[kind], *record.get("others", {}).get(kind, ())] for kind in ("failures", "late"))
    if failures:
        record.update(status="failed", reason=f"{len(failures)} tests failed, first {failures[0]['test']}")
    elif late and record["status"] == "cut":
        begun = "" if record["reason"] == UNFINISHED else f"{record['reason']}; "
        record["reason"] = f"{begun}{len(late)} tests did not end within {STUCK} s, first {late[0]['test']}"


class Recorder:
    """A plugin of pytest that keeps what failed, what was skipped and why, as it happens, and ends the run at the deadline, in the
    midst of tests too: where every worker has the compiler at work, nothing happens for half a minute."""

    def __init__(self, store: Store, record: dict[str, Any], deadline: float) -> None:
        self.store, self.record, self.deadline = store, record, deadline
        self.begin, self.came_up = time.monotonic(), 0.0  # seconds until the first test began
        self.alarm = threading.Timer(deadline - self.begin, self.wake)
        self.alone = True  # tests run in this process
        self.total = self.finished = 0
        self.skips: Counter[str] = Counter()
        self.saved = 0.0
        self.begun: dict[str, float] = {}  # of tests that have not ended
        record.update(passed=0, failures=[], late=[], skips={}, slowest={})

    def pytest_sessionstart(self) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: pytest.exit("time is over"))
        self.alarm.daemon = True
        self.alarm.start()

    def wake(self) -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.total = max(self.total, len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.total, self.alone = len(ids), False

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed(report.nodeid, str(report.longrepr))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.came_up = self.came_up or time.monotonic() - self.begin
        self.begun[nodeid] = time.monotonic()
        self.record["running"] = nodeid
        self.save(at_once=self.alone)  # a death of this process is told by what it was at

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        worker_died = report.when == "???"  # so pytest-xdist has it
        if worker_died and time.monotonic() - self.begun.get(report.nodeid, math.inf) >= STUCK:
            self.record["late"].append({"test": report.nodeid})
        elif report.failed:
            self.failed(report.nodeid, message(report))
        elif report.skipped:
            self.skips[reason(report)] += 1
            self.record["skips"] = dict(self.skips)
        elif report.when == "call":
            self.record["passed"] += 1
            slowest = self.record["slowest"] | {report.nodeid: round(report.duration, 1)}
            self.record["slowest"] = dict(sorted(slowest.items(), key=lambda pair: -pair[1])[:5])
        if report.when == "teardown" or worker_died:
            self.begun.pop(report.nodeid, None)
            self.finished += 1
            self.save()
            if time.monotonic() > self.deadline and self.finished < self.total:
                pytest.exit("time is over")

    def pytest_sessionfinish(self) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self.alarm.cancel()
        self.record.pop("running", None)
        self.store.save()

    def failed(self, test: str, why: str) -> None:
        self.record["failures"].append({"test": test, "message": why[-1500:]})
        self.store.save()

    def save(self, at_once: bool = False) -> None:
        if at_once or time.monotonic() > self.saved + SAVED_EVERY:
            self.saved = time.monotonic()
            self.store.save()


def message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr)


def reason(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return re.sub(r"^Skipped: ", "", text)
