"""What this machine has for attention: the facts behind `duplex-attn doctor`, and on every report of a measurement."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .backends import backends

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = 1

# What the kernels could use, as Linux names it: x86-64 in "flags", aarch64 in "Features".
INSTRUCTION_SETS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
    "amx_bf16", "amx_fp16", "asimd", "asimdhp", "bf16", "sve", "sve2", "sme",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Facts of this machine and its software; None where there is nothing of the kind. JSON holds it as it is."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "instruction_sets": instruction_sets(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "python": platform.python_version(),
        "duplex_attn": installed("duplex-attn"),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torch_cuda": torch.version.cuda,
        "triton": installed("triton"),
        "transformers": installed("transformers"),
        "cuda_cards": cuda_cards(),
        "nvcc": first_match(["nvcc", "--version"], r"release ([\d.]+)"),
        "compiler": compiler(),
    }


def cpu_name() -> str:
    name = cpuinfo("model name") or cpuinfo("CPU part") or platform.processor() or platform.machine()
    return name.strip()


def instruction_sets() -> list[str]:
    flags = (cpuinfo("flags") or cpuinfo("Features") or "").split()
    return [name for name in INSTRUCTION_SETS if name in flags]


def cpuinfo(key: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    found = re.search(rf"^{re.escape(key)}\s*: (.*)$", text, re.MULTILINE)
    return found and found[1]


def usable_cores() -> int:
    """Cores this process may run on, which a container or taskset may have narrowed."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def cuda_cards() -> list[dict[str, Any]]:
    cards = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        capability = f"{card.major}.{card.minor}"
        cards.append({"name": card.name, "compute_capability": capability, "memory_bytes": card.total_memory})
    return cards


def compiler() -> str | None:
    """The C++ compiler that a build from source would take, with its version."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        found = first_match([name, "--version"], r"(.+)")
        if found:
            return found
    return None


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def first_match(command: list[str], pattern: str) -> str | None:
    """The first group of `pattern` in what the command prints, or None if it is not there or does not run."""
    if shutil.which(command[0]) is None:
        return None
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, printed)
    return found and found[1]


def diagnose() -> dict[str, Any]:
    """The machine, and each backend with what it is here or why it is missing."""
    statuses = {name: {"available": status.available, "detail": status.detail} for name, status in backends().items()}
    return {"schema": SCHEMA, "machine": machine(), "backends": statuses}


def render(diagnosis: dict[str, Any]) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in diagnosis["machine"].items():
        facts.add_row(key.removesuffix("_bytes").replace("_", " "), Text(in_words(key, value)))
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("backend", "", "what it is, or why it is missing"):
        found.add_column(name)
    for name, status in diagnosis["backends"].items():
        found.add_row(name, "ready" if status["available"] else "missing", Text(status["detail"]))
    return Group(facts, found)


def in_words(key: str, value: Any) -> str:
    if value is None or value == []:
        return "none"
    if key.endswith("_bytes"):
        return f"{value / 2**30:.1f} GiB"
    if key == "cuda_cards":
        return "\n".join(
            f"{card['name']}, compute capability {card['compute_capability']}, {card['memory_bytes'] / 2**30:.1f} GiB"
            for card in value
        )
    return ", ".join(value) if isinstance(value, list) else str(value)
