"""The generated grid: what a call may look like, in few cases that together try every pair of choices.

A `Case` is only a description. `problem(case)` makes its tensors: each lies in a larger storage full of NaN, rows outside the sequences
hold NaN too, and `Problem.assert_untouched` proves that nothing in or around an input was written.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from .oracle import Answer, Call, answer, floors, plain_answer

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
POISON = -(2**30) - 12345  # around lengths; the integer that NaN is to floats


@dataclasses.dataclass(frozen=True)
class Case:
    layout: str = "dense"
    lengths: str | tuple[tuple[int, ...], tuple[int, ...]] = "ragged"  # a name, or those of q and of k
    heads: tuple[int, int] = (2, 2)  # of q, of k and v
    head_dims: tuple[int, int] = (64, 64)  # of q and k, of v
    dtype: torch.dtype = FLOAT32
    mask: str | tuple[int | str, int | None, int | None] = "full"  # a name, or prefix ("each": random), left and right
    top_left: bool = False
    scale: float | None = None
    softcap: float = 0.0
    distance_radius: int | None = None
    alibi: bool = False
    bias: str = "none"
    sink: str = "none"
    dropout_p: float = 0.0
    lse_gradient: bool = True
    deterministic: bool = True
    row_col_radius: int | None = None
    seed: int = 0

    def __str__(self) -> str:
        changed = [f for f in dataclasses.fields(self) if f.name != "seed" and getattr(self, f.name) != f.default]
        words = [f"{f.name}={getattr(self, f.name)}" for f in changed]
        return f"{self.seed}:" + ",".join(words).replace("torch.", "").replace(" ", "").replace("'", "")


LENGTHS = {  # of q, of k
    "same": ([37, 37], [37, 37]),
    "ragged": ([65, 1, 30], [65, 1, 30]),
    "short_queries": ([5, 17], [70, 33]),
    "long_queries": ([70, 33], [5, 17]),
    "empty": ([0, 20, 3, 0], [11, 20, 0, 0]),
    "one_query": ([1, 1], [130, 64]),
    "tiles": ([128], [256]),
    "long": ([150], [290]),
}
LAYOUTS = {  # kind, memory order of (batch, rows, heads, dim), gap around each dimension, first element
    "dense": ("dense", (0, 1, 2, 3), 0, 0),
    "dense_odd": ("dense", (0, 1, 2, 3), 0, 1),
    "dense_transposed": ("dense", (0, 2, 1, 3), 0, 0),
    "dense_sliced": ("dense", (0, 1, 2, 3), 1, 3),
    "padded_right": ("right", (0, 1, 2, 3), 0, 0),
    "padded_left": ("left", (0, 2, 1, 3), 0, 0),
    "padded_anywhere": ("anywhere", (0, 1, 2, 3), 2, 0),
    "packed": ("packed", (1, 2, 3), 0, 0),
    "packed_heads_first": ("packed", (2, 1, 3), 1, 5),
    "packed_with_tail": ("packed_tail", (1, 2, 3), 0, 0),
}
MASKS = {  # prefix, left, right
    "full": (0, None, None),
    "causal": (0, None, 0),
    "prefix": (5, None, 0),
    "prefix_each": ("each", None, 0),
    "window_back": (0, 9, 0),
    "window_both": (0, 6, 4),
    "sinks_and_window": (3, 8, 0),
    "prefix_each_and_window": ("each", 4, 2),
    "only_ahead": (0, 0, None),
}
BIASES = {  # dimensions that are not broadcast among (b, h, q, k), dtype, what is special
    "full": ("bhqk", "own", ""),
    "full_float32": ("bhqk", FLOAT32, ""),
    "heads": ("hqk", "own", ""),
    "plane": ("qk", FLOAT32, "2-D"),
    "keys": ("bk", "own", ""),
    "rows": ("bq", FLOAT32, ""),
    "expanded": ("bqk", FLOAT32, "expanded"),
    "columns_first": ("bhqk", "own", "columns_first"),
    "holes": ("bhqk", FLOAT32, "holes"),
    "bool": ("bhqk", torch.bool, "holes"),
    "bool_keys": ("bk", torch.bool, ""),
    "bool_plane": ("qk", torch.bool, "2-D"),
}
CHOICES: dict[str, Sequence[object]] = {
    "layout": list(LAYOUTS),
    "lengths": list(LENGTHS),
    "heads": [(1, 1), (4, 4), (4, 2), (3, 1)],
    "head_dims": [
        (1, 1),
        (8, 8),
        (40, 40),
        (64, 64),
        (80, 80),
        (96, 96),
        (128, 128),
        (192, 128),
        (256, 256),
        (64, 24),
        (24, 72),
    ],
    "dtype": [FLOAT32, FLOAT16, BFLOAT16],
    "mask": list(MASKS),
    "top_left": [False, True],
    "scale": [None, 0.3],
    "softcap": [0.0, 3.0],
    "distance_radius": [None, 0, 7, 100],
    "alibi": [False, True],
    "bias": ["none", *BIASES],
    "sink": ["none", "float32", "own"],
    "dropout_p": [0.0, 0.3],
    "lse_gradient": [True, False],
    "deterministic": [True, False],
}
# Not in the grid: as above with gaps of whole bulk copies.
LAYOUTS |= {
    "dense_sliced_by_8": ("dense", (0, 1, 2, 3), 8, 0),
    "padded_anywhere_by_8": ("anywhere", (0, 1, 2, 3), 8, 0),
    "packed_heads_first_by_8": ("packed", (2, 1, 3), 8, 0),
}


IN_LITTLE = {  # what the interpreter, whose blocks are 32 x 32, is given for a choice: several blocks still, and several heads
    "lengths": {"long": ((70,), (140,)), "tiles": ((64,), (128,))},
    "heads": {(4, 4): (2, 2)},
}


def in_little(case: Case) -> Case:
    return dataclasses.replace(
        case, **{name: found.get(getattr(case, name), getattr(case, name)) for name, found in IN_LITTLE.items()}
    )


def covering(choices: Mapping[str, Sequence[object]], seed: int = 0, tries: int = 12) -> list[dict[str, object]]:
    """Few assignments that hold every pair of choices of two dimensions (greedy, as in AETG: Cohen et al., 1997)."""
    rng = random.Random(seed)
    names = list(choices)

    def pairs(row: Mapping[str, int], name: str, value: int) -> list[tuple[str, int, str, int]]:
        return [(*a, *b) for other, v in row.items() if other != name for a, b in [sorted([(name, value), (other, v)])]]

    left = {  # a dict keeps its order in every process, a set does not
        (a, x, b, y): None
        for a, b in itertools.combinations(sorted(names), 2)
        for x in range(len(choices[a]))
        for y in range(len(choices[b]))
    }
    rows = []
    while left:
        best: tuple[int, dict[str, int]] = (-1, {})
        for _ in range(tries):
            a, x, b, y = rng.choice(list(left))
            row = {a: x, b: y}
            for name in rng.sample(names, len(names)):
                if name not in row:
                    gains = [sum(p in left for p in pairs(row, name, v)) for v in range(len(choices[name]))]
                    row[name] = rng.choice([v for v, gain in enumerate(gains) if gain == max(gains)])
            gain = sum((*a, *b) in left for a, b in itertools.combinations(sorted(row.items()), 2))
            best = max(best, (gain, row), key=lambda candidate: candidate[0])
        for a, b in itertools.combinations(sorted(best[1].items()), 2):
            left.pop((*a, *b), None)
        rows.append({name: choices[name][best[1][name]] for name in names})
    return rows


@cache
def grid() -> list[Case]:
    return [Case(seed=n, **row) for n, row in enumerate(covering(CHOICES))]  # type: ignore[arg-type]


class Guard:
    """Puts tensors into larger storages full of NaN (POISON for integers) and remembers every byte."""

    def __init__(self) -> None:
        self.storages: list[tuple[Tensor, Tensor]] = []

    def place(self, values: Tensor, order: Sequence[int] | None = None, gap: int = 0, offset: int = 0) -> Tensor:
        """A view equal to `values`, laid out in memory in `order` (outermost first) with `gap` entries around each dimension."""
        order = list(order or range(values.dim()))
        around = [values.shape[n] + 2 * gap for n in order]
        size, margin = math.prod(around), 64
        fill = math.nan if values.is_floating_point() else False if values.dtype == torch.bool else POISON
        flat = torch.full((margin + offset + size + margin,), fill, dtype=values.dtype)
        view = (
            flat[margin + offset : margin + offset + size]
            .view(around)
            .permute([order.index(n) for n in range(values.dim())])
        )
        view = view[tuple(slice(gap, gap + n) for n in values.shape)]
        view.copy_(values)
        self.storages.append((flat, flat.clone()))
        return view

    def assert_untouched(self) -> None:
        for n, (now, before) in enumerate(self.storages):
            assert torch.equal(now.view(torch.uint8), before.view(torch.uint8)), (
                f"input {n} or what lies around it was written"
            )


@dataclasses.dataclass
class Problem:
    case: Case
    call: Call
    dout: Tensor  # like out, NaN outside the sequences
    dlse: Tensor | None
    guard: Guard
    known: dict[bool, tuple[Answer, Answer, dict[str, float]]] = dataclasses.field(default_factory=dict)

    def answers(self, gradients: bool) -> tuple[Answer, Answer, dict[str, float]]:
        """The oracle's answer, the plain formula's, and the floors of the accuracy contract; computed once for all lanes."""
        if gradients not in self.known:
            grads = (self.dout, self.dlse) if gradients else (None, None)
            exact = answer(self.call, torch.float64, *grads)
            self.known[gradients] = (
                exact,
                plain_answer(self.call, exact, *grads),
                floors(self.call, exact, *grads),
            )
        return self.known[gradients]


@cache
def problem(case: Case) -> Problem:
    """The tensors of a case of the grid, made once for all lanes."""
    return make(case)


def make(case: Case) -> Problem:
    g, guard = torch.Generator().manual_seed(case.seed), Guard()
    kind, order, gap, offset = LAYOUTS[case.layout]
    packed = kind.startswith("packed")
    lens_q, lens_k = LENGTHS[case.lengths] if isinstance(case.lengths, str) else map(list, case.lengths)
    if kind == "dense" and lens_q:
        lens_q, lens_k = [max(lens_q)] * len(lens_q), [max(lens_k)] * len(lens_k)
    batch, (heads_q, heads_kv), (dim, dim_v) = len(lens_q), case.heads, case.head_dims

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def int32(values: Sequence[int]) -> Tensor:
        return guard.place(torch.tensor(values, dtype=torch.int32), offset=1)

    def rows_of(lens: list[int]) -> tuple[list[int], list[int]]:
        """Where each sequence starts in its row of the tensor, and the rows: those of the tensor (dense) or of all (packed)."""
        if packed:
            return [sum(lens[:b]) for b in range(batch)], [sum(lens) + (6 if kind == "packed_tail" else 0)]
        rows = max(lens, default=0) + (0 if kind == "dense" else 4)
        free = [rows - n for n in lens]
        starts = {"left": free, "anywhere": [torch.randint(0, n + 1, (1,), generator=g).item() for n in free]}
        return starts.get(kind, [0] * batch), [batch, rows]

    starts_q, shape_q = rows_of(lens_q)
    starts_k, shape_k = rows_of(lens_k)
    memory = order if not packed else [n - 1 for n in order]

    def tokens(shape: list[int], starts: list[int], lens: list[int], heads: int, width: int, spread: float) -> Tensor:
        values = torch.full((*shape, heads, width), math.nan)
        for b in range(batch):
            rows = slice(starts[b], starts[b] + lens[b])
            values[(rows,) if packed else (b, rows)] = spread * normal(lens[b], heads, width)
        return guard.place(values.to(case.dtype), memory, gap, offset)

    call = Call(
        tokens(shape_q, starts_q, lens_q, heads_q, dim, 2.0),
        tokens(shape_k, starts_k, lens_k, heads_kv, dim, 1.0),
        tokens(shape_k, starts_k, lens_k, heads_kv, dim_v, 1.0),
        top_left=case.top_left,
        scale=case.scale,
        softcap=case.softcap,
        dropout_p=case.dropout_p,
        seed=case.seed * 0x9E3779B97F4A7C15 % 2**63 - 2**62,
    )
    if packed:
        call.cu_seqlens_q, call.cu_seqlens_k = (int32([0, *itertools.accumulate(lens)]) for lens in (lens_q, lens_k))
    elif kind != "dense":
        call.seqlens_q, call.seqlens_k = int32(lens_q), int32(lens_k)
        if kind != "right":
            call.starts_q, call.starts_k = int32(starts_q), int32(starts_k)
    prefix, call.left, call.right = MASKS[case.mask] if isinstance(case.mask, str) else case.mask
    each = [int(torch.randint(-2, n + 4, (1,), generator=g)) for n in lens_k]  # beyond both ends: clamped
    call.prefix = int32(each) if prefix == "each" else prefix
    stored_q, stored_k = (max(lens_q, default=0), max(lens_k, default=0)) if packed else (shape_q[1], shape_k[1])
    own = torch.float32 if case.sink == "float32" else case.dtype
    if case.distance_radius is not None:
        call.distance_bias = guard.place(normal(heads_q, 2 * case.distance_radius + 1).to(own), offset=1)
    if case.alibi:
        call.alibi_slopes = guard.place(0.02 + 0.3 * torch.rand(heads_q, generator=g), offset=1)
    if case.row_col_radius is not None:
        width = 2 * case.row_col_radius + 1
        call.row_distance_bias = guard.place(normal(batch, heads_q, stored_q, width).to(own), gap=1)
        call.col_distance_bias = guard.place(normal(batch, heads_q, stored_k, width).to(own), (0, 2, 3, 1), offset=1)
    if case.sink != "none":
        call.sink = guard.place(normal(heads_q).to(own), offset=1)
    if case.bias != "none":
        call.bias = bias(case, (batch, heads_q, stored_q, stored_k), g, guard)
    # Gradients come in memory orders of their own, and hold NaN where no sequence has a row.
    dout = tokens(shape_q, starts_q, lens_q, heads_q, dim_v, 1.0)
    dlse = None
    if case.lse_gradient:
        inside = tokens(shape_q, starts_q, lens_q, heads_q, 1, 1.0)[..., 0].float()
        dlse = guard.place(inside.transpose(-1, -2))
    return Problem(case, call, dout, dlse, guard)


def bias(case: Case, shape: tuple[int, int, int, int], g: torch.Generator, guard: Guard) -> Tensor:
    full, dtype, special = BIASES[case.bias]
    size = [n if letter in full else 1 for letter, n in zip("bhqk", shape, strict=True)]
    if dtype == torch.bool:
        values = torch.rand(size, generator=g) < 0.7
    else:
        values = torch.randn(size, generator=g).to(case.dtype if dtype == "own" else dtype)
    if special == "holes":
        hidden = False if values.dtype == torch.bool else -math.inf
        values = torch.where(torch.rand(size, generator=g) < 0.2, hidden, values).to(values.dtype)
        values[..., : size[2] // 3, :] = hidden  # rows that see nothing
    if special == "2-D":
        return guard.place(values[0, 0], gap=1)
    view = guard.place(
        values, (0, 1, 3, 2) if special == "columns_first" else None, gap=0 if special == "expanded" else 1
    )
    return view.expand(shape) if special == "expanded" else view
