"""A stage's work shared out over processes, for Triton compiles in one thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from .card import room
from .limits import cores
from .settings import ROOT, Settings

MOST = 16  # processes on one card: each holds a context of half a gigabyte on it
QUIET = 45.0  # seconds without a word of any process, after which none is waited for: kernels that wait for ever
LOOK = 0.1


class Part(NamedTuple):
    process: subprocess.Popen[str]
    printed: IO[str]  # no pipes: what a part has started may outlive it and would keep them open
    errors: IO[str]

    def progress(self) -> tuple[int | None, int]:
        return self.process.poll(), os.fstat(self.printed.fileno()).st_size


def in_parts(
    settings: Settings, stage: str, results: Path, jobs: list[Any], deadline: float
) -> tuple[list[dict[str, Any]], str]:
    """Every line of JSON that the processes print, each having its share of `jobs` on stdin; and what they had to say."""
    count = 1 if settings.device == "cpu" else max(1, min(room(MOST), cores(), len(jobs)))
    seconds = deadline - time.monotonic()
    parts = [start(settings.command(stage, seconds, results, f"{n}/{count}"), jobs[n::count]) for n in range(count)]
    wait(parts, deadline)
    found, said = [], []
    for part in parts:
        part.process.kill()
        part.process.wait()
        found += [json.loads(line) for line in read(part.printed) if line.startswith("{") and line.endswith("}")]
        said += read(part.errors)
    return found, "\n".join(said)


def start(command: list[str], jobs: list[Any]) -> Part:
    printed, errors = (tempfile.TemporaryFile("w+", errors="replace") for _ in range(2))  # noqa: SIM115  read closes them
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=printed, stderr=errors)
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(json.dumps(jobs))
    return Part(process, printed, errors)


def wait(parts: list[Part], deadline: float) -> None:
    """Until all have ended, or time is over, or nothing is to be hoped for."""
    before, last = None, time.monotonic()
    while (now := time.monotonic()) < min(deadline, last + QUIET):
        progress = [part.progress() for part in parts]
        if all(ended is not None for ended, _ in progress):
            return
        if progress != before:
            before, last = progress, now
        time.sleep(LOOK)


def go_on(settings: Settings, deadline: float, jobs: list[Any]) -> NoReturn:
    """A part that has lost the card, to an illegal access, say, does the rest of its jobs as a new program in the same process."""
    assert settings.results is not None
    with tempfile.TemporaryFile("w+") as rest:
        json.dump(jobs, rest)
        rest.flush()
        rest.seek(0)
        os.dup2(rest.fileno(), sys.stdin.fileno())
        command = settings.command(settings.inside, deadline - time.monotonic(), settings.results, settings.part)
        os.execv(command[0], command)


def read(file: IO[str]) -> list[str]:
    with file:
        file.seek(0)
        return file.read().splitlines()
