"""The card at hand, whether it can be used, and what would spoil a measurement on it."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass

OLDEST = (8, 0)  # compute capability
ENOUGH = 8 * 2**30  # bytes of free memory
BUSY = 10  # percent of the time
# Compute modes in which the stages cannot run: the command, a stage and the processes that it starts have the card all at once.
NOT_SHARED = {
    "Exclusive_Process": "the card is in compute mode Exclusive_Process, of one process at a time, and a stage has several: "
    "nvidia-smi --compute-mode=DEFAULT lets them share it",
    "Prohibited": "the card is in compute mode Prohibited, of no process: nvidia-smi --compute-mode=DEFAULT lets them use it",
}
EACH = 2 * 2**30  # bytes for one of several processes: half a gigabyte is its context


@dataclass(frozen=True)
class Card:
    name: str  # empty where there is none
    problem: str  # why nothing can be measured here
    conditions: tuple[str, ...] = ()  # what a reader of the numbers should know


def look(device: str) -> Card:
    """Asked before anything is built, so of torch alone."""
    import torch

    if device == "cpu":
        return Card(f"rehearsal on {platform.machine()}", "", ("no card: sizes and times of a rehearsal mean nothing",))
    if not torch.cuda.is_available():
        return Card("", f"there is no CUDA card that torch {torch.__version__} can use")
    card = torch.cuda.get_device_properties(0)
    if (card.major, card.minor) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return Card(card.name, f"compute capability {card.major}.{card.minor}: the kernels need {wanted} or newer")
    uuid = getattr(card, "uuid", None)
    if (mode := ask("compute_mode", uuid)) in NOT_SHARED:
        return Card(card.name, NOT_SHARED[mode])
    try:
        free, total = torch.cuda.mem_get_info(0)  # from now on this process has the card too
    except RuntimeError as error:  # of a card that another process holds alone, say
        return Card(card.name, f"the card cannot be used: {str(error).splitlines()[0]}")
    if free < ENOUGH:
        return Card(card.name, f"short of memory: {free / 2**30:.1f} of {total / 2**30:.0f} GiB are free")
    conditions = []
    if free < 0.9 * total:
        conditions.append(f"{free / 2**30:.1f} of {total / 2**30:.0f} GiB were free: something else held the rest")
    if (busy := utilisation(uuid)) is not None and busy > BUSY:
        conditions.append(
            f"the card was busy {busy}% of the time before anything ran here: times are not to be trusted"
        )
    return Card(card.name, "", tuple(conditions))


def room(most: int) -> int:
    """So many processes at a time, or as many as the card has memory for."""
    import torch

    return min(most, max(1, torch.cuda.mem_get_info(0)[0] // EACH)) if torch.cuda.is_available() else most


def utilisation(uuid: object) -> int | None:
    """Percent of the last moments in which a kernel ran, where nvidia-smi tells."""
    told = ask("utilization.gpu", uuid)
    return int(told) if told is not None and told.isdigit() else None


def ask(what: str, uuid: object) -> str | None:
    """What nvidia-smi tells of the card, which it numbers otherwise than torch."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    query.append("--id=0" if uuid is None else f"--id=GPU-{uuid}")
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
