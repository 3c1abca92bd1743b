"""What a run was asked for, on its way from the command line to the process of each stage."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from .limits import LIMITS, limits_here

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TUNING = ROOT / "kernels" / "tuning"
REHEARSED_TUNING = ROOT / "build" / "gpu" / "tuning"


@dataclass(frozen=True)
class Settings:
    stages: tuple[str, ...]  # none: those that are not done yet, or all again
    device: str  # "cuda", or "cpu" for a rehearsal
    tiny: bool
    results: Path | None  # None: by the card's name
    tuning: Path  # the folder of a device's own table
    only: str  # a pattern of workloads' names
    tests: str  # what pytest's -k takes
    limits: dict[str, float]
    inside: str  # the stage that this process is, or none: the process that starts them
    seconds: float  # until the stage should end by itself
    asked: frozenset[str] = frozenset()  # stages whose limits were
    part: str = ""  # of a stage that shares its work out over processes: which of them this is

    def command(self, stage: str, seconds: float, results: Path, part: str = "") -> list[str]:
        """What starts the process of one stage, or of a part of it."""
        given = [
            sys.executable,
            str(Path(__file__).parent),
            "--inside",
            stage,
            "--seconds",
            f"{seconds:.0f}",
            "--device",
            self.device,
            "--results",
            str(results),
        ]
        given += ["--tuning", str(self.tuning), "--only", self.only, "--tests", self.tests, "--part", part]
        return [*given, *(["--tiny"] if self.tiny else [])]

    @property
    def rehearsal(self) -> bool:
        """Nothing is measured that anybody should read."""
        return self.tiny or self.device == "cpu"

    def wants(self, workload: str) -> bool:
        return re.search(self.only, workload) is not None


def parse(arguments: list[str]) -> Settings:
    parser = argparse.ArgumentParser(
        prog="make gpu", description="Builds, tests, measures, sanitizes and tunes every kernel on the card at hand."
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"some of {', '.join(LIMITS)}")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu rehearses the stages")
    parser.add_argument("--tiny", action="store_true", help="sizes that cost nothing, and measure nothing")
    parser.add_argument("--results", type=Path, help="the file; by default benchmarks/results/<card>.json")
    parser.add_argument("--tuning", type=Path, help="where the card's own table goes; by default kernels/tuning")
    parser.add_argument("--only", default="", metavar="PATTERN", help="workloads whose names match")
    parser.add_argument("--tests", default="", metavar="EXPRESSION", help="as pytest's -k")
    parser.add_argument("--limit", action="append", default=[], metavar="STAGE=SECONDS")
    parser.add_argument("--inside", default="", choices=["", *LIMITS], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.tuning is None:
        given.tuning = REHEARSED_TUNING if given.tiny or given.device == "cpu" else TUNING
    limits, asked = limits_here(ROOT / "csrc"), set()
    for text in given.limit:
        stage, _, seconds = text.partition("=")
        if stage not in LIMITS or not re.fullmatch(r"\d+(\.\d+)?", seconds):
            parser.error(f"--limit: expected STAGE=SECONDS with one of {', '.join(LIMITS)}, got {text!r}")
        limits[stage] = float(seconds)
        asked.add(stage)
    for stage in given.stages:
        if stage not in LIMITS:
            parser.error(f"STAGE: expected some of {', '.join(LIMITS)}, got {stage!r}")
    return Settings(
        tuple(stage for stage in LIMITS if stage in given.stages), given.device, given.tiny, given.results,
        given.tuning, given.only, given.tests, limits, given.inside, given.seconds, frozenset(asked), given.part,
    )  # fmt: skip
