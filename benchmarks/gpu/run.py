"""The stages in their order, each in a process of its own and under its own time limit.

Whatever happens in one, the next one runs; what happened is in the results file and in the exit status: 0 all is well,
1 something failed or was cut short, 2 nothing could be measured here.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .card import Card, look
from .limits import LIMITS, after_build
from .settings import RESULTS, ROOT, Settings, parse
from .store import UNFINISHED, Store, slug

GRACE = 5.0  # seconds before its limit, by which a stage should end by itself
LEAST = 15.0  # seconds that any stage has: its process must come up to say that time is over
ASIDE = ROOT / "build" / "gpu"  # what is no result of a card goes here
STUCK = 30.0  # seconds of one thing among many after which its process is stopped: a kernel that waits for ever, say
LOOK = 1.0  # seconds between looks at what a process is at
RESTARTS = 20  # of a stage whose process died; each time what it died of is passed over


def main(arguments: list[str]) -> int:
    settings = parse(arguments)
    if settings.inside:
        return inside(settings)
    card = look(settings.device)
    folder = RESULTS if card.name and not settings.rehearsal else ASIDE
    path = settings.results or folder / f"{slug(card.name) or 'no-card'}.json"
    try:
        store = Store(path, card.name, settings.rehearsal)
    except ValueError as error:
        print(f"gpu: {error}: move the file away to begin anew", file=sys.stderr)
        return 2
    for line in (card.name or "no card", *card.conditions):
        print(f"gpu: {line}", flush=True)
    stages = settings.stages or tuple(s for s in LIMITS if not is_done(store, s)) or tuple(LIMITS)
    limits = after_build(settings.limits, settings.limits["build"] * ("build" in stages), settings.asked)
    most = sum(limits[stage] for stage in stages)
    print(f"gpu: {', '.join(stages)}: at most {most / 60:.1f} minutes", flush=True)
    leave_no_stage_behind()
    for stage in stages:
        if card.problem and stage != "build":
            if store.stage(stage):
                print(f"gpu: {stage}: left as it was: {card.problem}", flush=True)
                continue
            skip(store, stage, card.problem)
        else:
            supervise(settings, store, stage)
        found = store.stage(stage)
        if card.conditions:
            found["conditions"] = list(card.conditions)
            store.save()
        if stage == "build":
            settings = replace(settings, limits=after_build(settings.limits, found["seconds"], settings.asked))
        print(f"gpu: {stage}: {found['status']} in {found['seconds']:.0f} s {found.get('reason', '')}", flush=True)
    print(f"gpu: written to {path}", flush=True)
    return status(card, {name: store.stage(name).get("status", "") for name in stages})


def is_done(store: Store, stage: str) -> bool:
    """On this machine: a build that another one with such a card had is none here."""
    return store.is_done(stage) and (stage != "build" or importlib.util.find_spec("duplex_attn") is not None)


def leave_no_stage_behind() -> None:
    """On the card, where a batch system or a terminal that is gone ends this process; nohup's runs go on."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def status(card: Card, stages: Mapping[str, str]) -> int:
    if card.problem:
        return 2
    return 0 if all(found in ("done", "skipped") for found in stages.values()) else 1


def skip(store: Store, stage: str, reason: str) -> None:
    store.begin(stage).update(status="skipped", reason=reason)
    store.save()


def supervise(settings: Settings, store: Store, stage: str) -> None:
    """Runs the stage's process to its end, again where it died of one thing among many, or stops it at its limit."""
    forget(store.begin(stage))
    store.save()
    begin, limit = time.monotonic(), settings.limits[stage]
    for _ in range(RESTARTS):
        left = begin + limit - time.monotonic()
        code = process(settings, store.path, stage, left)
        store.data = Store(store.path, checked=False).data
        record = store.stage(stage)
        if code is None or code >= 0:
            break
        died = record.get("running")
        record["reason"] = why_it_died(record, code)
        forget(record)
        record.setdefault("crashes", []).append(record["reason"])
        if died is None or left < GRACE:
            break
        record.setdefault("crashed", []).append(died)
        record["reason"] = UNFINISHED
        store.save()
    record["seconds"] = round(time.monotonic() - begin, 1)
    if code is None:
        running = record.get("running", "its work")
        record.update(status="cut", reason=f"stopped at its limit of {limit:.0f} s in {running}")
    elif code < 0 or (code > 0 and record["status"] == "cut"):
        record["status"] = "failed"
        record["reason"] = record["crashes"][-1] if code < 0 else f"its process ended with status {code}"
    forget(record)
    store.save()


def why_it_died(record: dict[str, Any], code: int) -> str:
    of, said = record.get("running"), record.get("said")
    if is_stuck(record.get("since")):
        return f"{of} took more than {STUCK:.0f} s"
    where, why = f" in {of}" if of else "", f": {said}" if said else ""
    return f"its process died of {signal.Signals(-code).name}{where}{why}"


def forget(record: dict[str, Any]) -> None:
    """What a process leaves for the case that it dies."""
    for name in ("running", "since", "said"):
        record.pop(name, None)


def is_stuck(since: float | None) -> bool:
    return since is not None and time.time() - since > STUCK


def process(settings: Settings, results: Path, stage: str, seconds: float) -> int | None:
    """Exit status, negative of a signal, which it also gets where it is stuck; None where it had to be stopped at its limit."""
    command = settings.command(stage, max(seconds - GRACE, 0), results)
    started = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=environment(settings))
    end = time.monotonic() + max(seconds, LEAST)
    try:
        while (left := end - time.monotonic()) > 0:
            try:
                return started.wait(min(left, LOOK))
            except subprocess.TimeoutExpired:
                if is_stuck(Store(results, checked=False).stage(stage).get("since")):
                    return -signal.SIGKILL
        return None
    finally:
        stop(started)


def stop(started: subprocess.Popen[bytes]) -> None:
    """With all that it started, which has its session."""
    try:
        os.killpg(started.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    started.wait()


def environment(settings: Settings) -> dict[str, str]:
    """Of the stages. torch.compile would move Triton's cache to a folder of its own in the midst of a process, where nothing of what
    was compiled before is found, and start a pool of compilers in each of our processes."""
    changed = {"PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    home = os.environ.get("TRITON_HOME") or str(Path.home())
    changed["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")
    if settings.device == "cpu":
        changed |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **changed}


def inside(settings: Settings) -> int:
    """The process of one stage."""
    assert settings.results is not None
    store = Store(settings.results, checked=False)
    deadline = time.monotonic() + settings.seconds
    module = importlib.import_module(f".stages.{settings.inside}", __package__)
    if settings.part:
        return module.part(settings, deadline)
    record = store.stage(settings.inside)
    try:
        module.run(settings, store, record, deadline)
        if record["reason"] == UNFINISHED:
            record.update(status="done", reason="")
    except Exception as error:
        traceback.print_exc()
        record.update(status="failed", reason=f"{type(error).__name__}: {error}")
    forget(record)
    store.save()
    return 0
