"""What the card said of each primitive alone, as the tests found it, gathered for the emulated machine to be held to."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .settings import ROOT

FOUND = ROOT / "build" / "ptx_golden"  # a folder a kind of card, a file an answer (tests/emulation/primitives.py)
GOLDEN = ROOT / "tests" / "data" / "ptx_golden"  # a file a kind of card


def gather(found: Path = FOUND, folder: Path = GOLDEN) -> None:
    for card in sorted(path for path in found.glob("*") if path.is_dir()):
        if answers := {path.stem: np.load(path) for path in sorted(card.glob("*.npy"))}:
            kept = folder / f"{card.name}.npz"
            if kept.exists():  # of primitives whose tests did not run this time
                with np.load(kept) as before:
                    answers = {**before, **answers}
            folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(kept, **answers)
