"""Few queries of every sequence against many keys, in every layout: on the CPU a kernel of their own."""

import random

import pytest
import torch

from ..cases import LAYOUTS, Case
from ..checking import check
from ..lanes import CPU_LANES, Lane

OWN_LANE = True

LENGTHS = {
    "one row": ((1, 1, 1), (300, 1, 77)),
    "one sequence": ((1,), (515,)),
    "some rows": ((3, 0, 12, 5), (300, 4, 259, 0)),
    "more rows than keys": ((9, 2), (4, 260)),
    "too many": ((13, 1), (300, 20)),
}
TERMS: dict[str, dict[str, object]] = {
    "plain": {},
    "causal": {"mask": (0, None, 0)},
    "window": {"mask": (0, 70, 3), "sink": "float32"},
    "a prefix for each": {"mask": ("each", 20, 0), "top_left": True},
    "distances": {"mask": (0, None, 0), "distance_radius": 6, "alibi": True, "softcap": 5.0, "scale": 0.3},
    "biased": {"bias": "full"},
    "of some pairs": {"bias": "bool", "sink": "float32"},
    "tables": {"row_col_radius": 4, "mask": (0, None, 0)},
}
HEADS = [(2, 2), (8, 8), (6, 2), (16, 1)]


def cases() -> list[Case]:
    """Each layout with each lengths, the rest by turns."""
    draw = random.Random(5)
    made = []
    for layout in LAYOUTS:
        for lengths in LENGTHS.values():
            for terms in draw.sample(sorted(TERMS), 2):
                made.append(
                    Case(
                        layout,
                        lengths,
                        draw.choice(HEADS),
                        draw.choice([(32, 32), (64, 96), (40, 64)]),
                        draw.choice([torch.float32, torch.bfloat16, torch.float16]),
                        **TERMS[terms],  # type: ignore[arg-type]
                        seed=len(made),
                    )
                )
    return made


@pytest.mark.usefixtures("fresh_memory_is_nan")
@pytest.mark.parametrize("case", cases(), ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("lane", [lane for lane in CPU_LANES if "triton" not in str(lane)], ids=str, indirect=True)
def test_few_rows(lane: Lane, case: Case, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(case, lane, gradients=False)
    finally:
        torch.set_num_threads(before)
