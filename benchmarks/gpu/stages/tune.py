"""Looks for faster tiles: from each configuration in use to its neighbours, and on from the best of them while time lasts.

Every candidate is compiled first, all of a round in parallel; it must then give the right numbers, and only a gain beyond
the noise moves us (contest.py). What ends the process is passed over by the next one. The winners of a card are its own table, kernels/tuning/<card>.json.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from duplex_attn.kernels import tuning
from duplex_attn.kernels.tuning import Config
from triton import TritonError

from ..clock import Clock
from ..contest import Found, fastest
from ..families import build
from ..parts import go_on, in_parts
from ..registry import workloads
from ..settings import Settings
from ..small_grid import packed_with_all
from ..store import Store, now
from ..trials import Trials
from ..workload import Problem, Workload
from .bench import TENSORS, TIMING, abort_unless_it_works, in_short, watch, works

# Which workloads show how fast a kind of kernel is.
MEASURED_BY: dict[str, Callable[[Workload], bool]] = {
    "forward": lambda w: w.family == "dense",
    "forward_terms": lambda w: w.family == "biased",
    "dq": lambda w: w.family == "backward",
    "dkdv": lambda w: w.family == "backward",
    "dq_terms": lambda w: w.family == "biased",
    "dkdv_terms": lambda w: w.family == "biased",
    "dbias": lambda w: w.family == "biased" and w.pair_bias,
    "ddistance": lambda w: w.family == "biased" and w.distance_radius > 0,
    "paged": lambda w: w.family == "decode" and w.queries > 1 and not w.terms,
    "paged_terms": lambda w: w.family == "decode" and w.queries > 1 and w.terms,
    "paged_decode": lambda w: w.family == "decode" and w.queries == 1,
}
MOST_WORKLOADS = 3  # of one entry
# Serve calls with more terms than a workload has, which need more shared memory.
ALSO_WITH_TERMS = {"forward_terms", "dq_terms", "dkdv_terms"}
TERMS = "every term of a score"
COMPILING = 0.6  # of the time left, at most
# More than a step away from what is in use: rows, keys, warps and stages that keep two programs on a multiprocessor of Hopper,
# or more copies in flight. By kernel and class of head_dim, in 16 bits.
FURTHER = {
    ("forward", 128): ((128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 3), (256, 64, 8, 2)),
    ("forward", 64): ((128, 128, 4, 2), (128, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3)),
    ("dq", 128): ((64, 64, 4, 2), (128, 64, 4, 2), (64, 128, 4, 2), (64, 64, 4, 3)),
    ("dkdv", 128): ((64, 64, 4, 2), (64, 128, 4, 2), (64, 64, 4, 3), (32, 128, 4, 3)),
    ("paged_decode", 128): ((16, 128, 4, 2), (16, 64, 4, 3), (16, 128, 8, 3), (16, 32, 4, 4)),
}
VALUES_BEHIND = {"forward", "forward_terms"}
ROWS, KEYS, WARPS, STAGES = (32, 64, 128, 256), (16, 32, 64, 128, 256), (4, 8), (1, 2, 3, 4)


@dataclass(frozen=True)
class Target:
    """One entry of the tables, and the workloads that measure it: the first of each kind of call that it serves."""

    kernel: str
    bits: int
    head_dim_class: int
    workloads: tuple[Workload, ...]

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.bits} {self.head_dim_class}"


def serves(entry: str, w: Workload) -> bool:
    """Whether calls of the workload look up the entry of that name."""
    kernel, bits, head_dim_class = entry.split()
    return MEASURED_BY[kernel](w) and (8 * w.dtype.itemsize, class_of(w)) == (int(bits), int(head_dim_class))


def class_of(w: Workload) -> int:
    return next(n for n in tuning.HEAD_DIMS if w.head_dim <= n)


def run(settings: Settings, store: Store, record: dict[str, Any], deadline: float) -> None:
    device = torch.device(settings.device)
    table = table_of(device, settings.tuning)
    clock = Clock(device, settings.tiny)
    goals = list(targets(settings, table))[: 2 if settings.tiny else None]
    current = {goal: tuning.config(goal.kernel, table, goal.bits, goal.head_dim_class) for goal in goals}
    for name, nothing in (("tried", 0), ("winners", {}), ("before", {}), ("gains", {}), ("refused", {})):
        record.setdefault(name, nothing)  # what an interrupted run had found stays found
    seeds = {goal: further(goal, current[goal]) for goal in goals}
    longest = 0.0  # seconds of a contest
    while goals and time.monotonic() < deadline:
        wanted = [(g, c) for g in goals for c in (*seeds.pop(g, ()), *neighbours(g, current[g]))]
        compiled = compile_all(settings, store, record, wanted, deadline)
        moved = []
        for goal in goals:
            begin = time.monotonic()
            if begin + longest > deadline:
                break
            found = contest(goal, current[goal], compiled[goal], table, clock, store, record)
            longest = max(longest, time.monotonic() - begin)
            if found is None or found.way == current[goal]:
                continue
            current[goal] = found.way
            moved.append(goal)
            record["winners"][goal.name] = {**found.way._asdict(), "seconds": found.seconds}
            record["gains"][goal.name] = record["gains"].get(goal.name, 1.0) * found.gain
            record["before"].setdefault(goal.name, entry_of(table, goal.name))
            keep(settings, table, {goal.name: found.way._asdict()}, store)
        goals = moved if not settings.tiny else []


def table_of(device: torch.device, folder: Path) -> str:
    """The name of the table that this device's winners belong in, which this process has from now on."""
    name = "interpreter" if device.type == "cpu" else tuning.file_name(torch.cuda.get_device_name(device))
    own = folder / f"{name}.json"
    if own.exists():
        tuning.adopt(name, json.loads(own.read_text()))
    elif name not in tuning.tables():
        tuning.adopt(name, {"inherits": tuning.architecture(*torch.cuda.get_device_capability(device))})
    return name


def targets(settings: Settings, table: str) -> Iterator[Target]:
    """Every kind of kernel at the width and classes of head_dim that the workloads of its family have."""
    inherited = tuning.tables()[tuning.base(table)]
    kinds = [kind for kind, entry in inherited.items() if isinstance(entry, dict)]
    chosen: dict[tuple[str, int, int], dict[Hashable, Workload]] = defaultdict(dict)
    wanted = [w.tiny() if settings.tiny else w for w in workloads() if settings.wants(w.name)]
    for workload in wanted:
        for kind in kinds:
            if MEASURED_BY[kind](workload):
                entry = chosen[kind, 8 * workload.dtype.itemsize, class_of(workload)]
                if len(entry) < MOST_WORKLOADS:
                    entry.setdefault(kind_of_call(workload), workload)
    for (kind, bits, head_dim_class), entry in chosen.items():
        yield Target(kind, bits, head_dim_class, tuple(entry.values()))


def kind_of_call(w: Workload) -> Hashable:
    return w.left is None, w.right is None, w.prefix > 0, w.stored, w.distance_radius > 0, w.pair_bias, w.alibi


def further(goal: Target, c: Config) -> list[Config]:
    numbers = FURTHER.get((goal.kernel, goal.head_dim_class), ()) if goal.bits == 16 else ()
    known = (c, *neighbours(goal, c))
    return [found for n in numbers if (found := Config(*n, c.descriptors, c.values_behind)) not in known]


def neighbours(goal: Target, c: Config) -> list[Config]:
    """One step away in one of its numbers."""

    def steps(values: tuple[int, ...], value: int) -> list[int]:
        lower, upper = [v for v in values if v < value], [v for v in values if v > value]
        return lower[-1:] + upper[:1]

    found = [c._replace(block_m=m) for m in steps(ROWS, c.block_m)]
    found += [c._replace(block_n=n) for n in steps(KEYS, c.block_n)]
    found += [c._replace(num_warps=n) for n in steps(WARPS, c.num_warps)]
    found += [c._replace(num_stages=n) for n in steps(STAGES, c.num_stages)]
    return found + [c._replace(values_behind=not c.values_behind)] * (goal.kernel in VALUES_BEHIND)


def compile_all(
    settings: Settings, store: Store, record: dict[str, Any], wanted: list[tuple[Target, Config]], deadline: float
) -> dict[Target, list[Config]]:
    """Those that compile, fit the card and came in time."""
    until = time.monotonic() + COMPILING * (deadline - time.monotonic())
    found: dict[Target, list[Config]] = {goal: [] for goal, _ in wanted}
    if settings.tiny:
        wanted = wanted[:2]
    jobs = [job(goal, c) for goal, c in wanted]
    answers, said = in_parts(settings, "tune", store.path, jobs, until)
    problems = {json.dumps(one["job"]): one["problem"] for one in answers}
    record["tried"] += len(problems)
    for told, (goal, candidate) in zip(jobs, wanted, strict=True):
        problem = problems.get(json.dumps(told), "it was not compiled in time")
        if problem is None:
            found[goal].append(candidate)
        else:
            refuse(record, problem)
    if not answers:
        print(said[-2000:], file=sys.stderr)
    return found


def job(goal: Target, c: Config) -> list[Any]:
    """What a part is told to do."""
    calls = [w.name for w in goal.workloads] + [TERMS] * (goal.kernel in ALSO_WITH_TERMS)
    return [goal.kernel, goal.bits, goal.head_dim_class, calls, list(c)]


def contest(
    goal: Target, current: Config, compiled: list[Config], table: str, clock: Clock, store: Store, record: dict
) -> Found | None:
    """The best configuration; None where none works, or nothing was compiled that could be better."""
    crashed = set(record.get("crashed", ()))  # of what a process died before
    if crashed & {what(goal, TENSORS), what(goal, TIMING)}:
        return None
    with watch(store, record, what(goal, TENSORS)):
        try:
            problems = [build(w, clock.device) for w in goal.workloads]
        except RuntimeError as error:  # out of memory
            abort_unless_it_works(clock.device, error)
            refuse(record, what(goal, in_short(error)))
            return None
    calls = [(problem, problem.ours("triton")) for problem in problems]
    trials = Trials(table, goal.kernel, goal.bits, goal.head_dim_class)
    able = []
    for c in (current, *compiled):
        if what(goal, c) in crashed:
            continue
        with watch(store, record, what(goal, c)):
            wrong = (wrong_with(clock.device, problem, partial(trials.call, c, call)) for problem, call in calls)
            if why := next(filter(None, wrong), None):
                refuse(record, f"{goal.name}, as it is: {why}" if c == current else why)
            else:
                able.append(c)
    if not able or able == [current]:
        return None
    with watch(store, record, what(goal, TIMING)):
        work = [lambda c, call=call: trials.call(c, call) for _, call in calls]
        return fastest(able[0], able[1:], work, clock)


def what(goal: Target, of: Config | str) -> str:
    return f"{goal.name}: {of if isinstance(of, str) else ' '.join(map(str, of))}"


def refuse(record: dict[str, Any], why: str) -> None:
    record["refused"][why] = record["refused"].get(why, 0) + 1


def wrong_with(device: torch.device, problem: Problem, call: Callable[[], Any]) -> str | None:
    try:
        return None if problem.check(call()).passes(ours=True) else "wrong numbers"
    except (RuntimeError, TritonError) as error:  # of another process it was compiled in, where there was more room
        abort_unless_it_works(device, error)
        return in_short(error)


def entry_of(table: str, name: str) -> dict[str, Any] | None:
    """What the table itself holds; None where it has that of what it inherits."""
    kernel, bits, head_dim_class = name.split()
    return tuning.tables()[table].get(kernel, {}).get(bits, {}).get(head_dim_class)


def keep(settings: Settings, table: str, entries: Mapping[str, dict[str, Any] | None], store: Store) -> None:
    """In this process, in the card's file, and in the results. None takes the entry of that name out."""
    own = copy.deepcopy(tuning.tables()[table])
    for name, entry in entries.items():
        kernel, bits, head_dim_class = name.split()
        held = own.setdefault(kernel, {}).setdefault(bits, {})
        if entry is not None:
            held[head_dim_class] = entry
            continue
        held.pop(head_dim_class, None)
        own[kernel] = {width: found for width, found in own[kernel].items() if found}
        if not own[kernel]:
            del own[kernel]
    own["measured"] = f"on this card by make gpu, {now()}"
    tuning.adopt(table, own)
    settings.tuning.mkdir(parents=True, exist_ok=True)
    path = settings.tuning / f"{table}.json"
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(own, indent=2) + "\n")
    os.replace(beside, path)
    store.data["tuning"] = own
    store.save()


def part(settings: Settings, deadline: float) -> int:
    """Compiles its share of the candidates by calling each once."""
    device = torch.device(settings.device)
    table = table_of(device, settings.tuning)
    by_name = {w.name: w for w in workloads()}
    jobs = json.load(sys.stdin)
    while jobs and time.monotonic() < deadline:
        told = jobs.pop(0)
        kernel, bits, head_dim_class, names, numbers = told
        problem = None
        try:
            with tuning.trial(table, kernel, bits, head_dim_class, Config(*numbers)):
                for name in names:
                    if name == TERMS:
                        packed_with_all(device, "triton", head_dim_class)
                    else:
                        workload = by_name[name].tiny() if settings.tiny else by_name[name]
                        build(workload, device).ours("triton")()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # too much shared memory, say, or a compiler that gives up
            problem = in_short(error)
        print(json.dumps({"job": told, "problem": problem}), flush=True)
        if problem is not None and not works(device):
            go_on(settings, deadline, jobs)
        torch.cuda.empty_cache()  # for the other processes: none keeps the tensors of a job
    return 0
