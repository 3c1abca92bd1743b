"""What every backend is compared with: the formulas of docs/semantics.md, sequence by sequence and head by head.

Nothing here is shared with the package. `attend` in the inputs' dtype is what a user would write in PyTorch; the same in float64 is the
oracle; `assert_accurate` is the contract between the two and a backend. test_oracle.py checks this file itself, against scalar arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

GRADIENTS = ("q", "k", "v", "bias", "distance_bias", "row_distance_bias", "col_distance_bias", "sink")
FEW = 64  # rows of all heads
Answer = dict[str, Tensor]  # "out", "lse", and "dq", "dbias", ... of the inputs that want a gradient


@dataclasses.dataclass
class Call:
    """One attention call, dense (q is 4-D) or packed (q is 3-D, cu_seqlens given), as the operators have it."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqlens_q: Tensor | None = None
    seqlens_k: Tensor | None = None
    starts_q: Tensor | None = None
    starts_k: Tensor | None = None
    prefix: int | Tensor = 0
    left: int | None = None
    right: int | None = None
    top_left: bool = False
    bias: Tensor | None = None
    distance_bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    row_distance_bias: Tensor | None = None
    col_distance_bias: Tensor | None = None
    sink: Tensor | None = None
    scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    seed: int = 0

    @property
    def heads_q(self) -> int:
        return self.q.shape[-2]

    @property
    def scaling(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def with_grad(self, dtype: torch.dtype) -> Call:
        """The same call on fresh leaves, every floating tensor in `dtype`."""

        def leaf(name: str, x: object) -> object:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return x.detach().cpu().to(dtype, copy=True).requires_grad_(name in GRADIENTS)

        return Call(**{f.name: leaf(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)})


@dataclasses.dataclass
class Placed:
    """Sequence b: where its rows lie in q and k, and in a bias."""

    batch: int
    q: tuple[int | slice, ...]
    k: tuple[int | slice, ...]
    len_q: int
    len_k: int
    bias_row: int
    bias_col: int


def sequences(call: Call) -> Iterator[Placed]:
    if call.cu_seqlens_q is not None:
        cu_q, cu_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
        for b in range(len(cu_q) - 1):
            len_q, len_k = cu_q[b + 1] - cu_q[b], cu_k[b + 1] - cu_k[b]
            yield Placed(b, (slice(cu_q[b], cu_q[b + 1]),), (slice(cu_k[b], cu_k[b + 1]),), len_q, len_k, 0, 0)
        return

    def per_sequence(x: Tensor | None, default: int) -> list[int]:
        return [default] * call.q.shape[0] if x is None else x.tolist()

    starts_q, starts_k = per_sequence(call.starts_q, 0), per_sequence(call.starts_k, 0)
    lens_q, lens_k = per_sequence(call.seqlens_q, call.q.shape[1]), per_sequence(call.seqlens_k, call.k.shape[1])
    for b, (sq, sk, nq, nk) in enumerate(zip(starts_q, starts_k, lens_q, lens_k, strict=True)):
        yield Placed(b, (b, slice(sq, sq + nq)), (b, slice(sk, sk + nk)), nq, nk, sq, sk)


def positions(call: Call, len_q: int, len_k: int) -> Tensor:
    return torch.arange(len_q)[:, None] + (0 if call.top_left else len_k - len_q)  # p(i), (len_q, 1)


def visible(call: Call, b: int, len_q: int, len_k: int) -> Tensor:
    """The span of a mask as booleans (len_q, len_k)."""
    p, j = positions(call, len_q, len_k), torch.arange(len_k)[None, :]
    prefix = int(call.prefix[b]) if isinstance(call.prefix, Tensor) else call.prefix
    seen = torch.ones(len_q, len_k, dtype=torch.bool)
    if call.left is not None:
        seen &= j >= p - call.left
    if call.right is not None:
        seen &= j <= p + call.right
    return seen | (j < prefix)


def philox_4x32_10(key: int, counters: np.ndarray) -> np.ndarray:
    """Philox-4x32-10 (Salmon et al., SC 2011, as in Random123): counters (..., 4) to random words (..., 4)."""
    low32 = np.uint64(0xFFFFFFFF)
    c = [counters[..., n].astype(np.uint64) for n in range(4)]
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (second >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            second & low32,
            (first >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            first & low32,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, -1).astype(np.uint32)


def dropout_keeps(seed: int, p: float, batch: int, head: int, len_q: int, len_k: int) -> Tensor:
    """Which of P(i, j) dropout keeps, (len_q, len_k)."""
    blocks = -(-len_k // 4)
    counters = np.empty((len_q, blocks, 4), np.uint32)
    counters[..., 0] = np.arange(blocks)[None, :]
    counters[..., 1] = np.arange(len_q)[:, None]
    counters[..., 2], counters[..., 3] = head, batch
    words = philox_4x32_10(seed & (2**64 - 1), counters).reshape(len_q, blocks * 4)[:, :len_k]
    return torch.from_numpy(words.astype(np.int64) >= math.floor(p * 2**32))


def scores(call: Call, seq: Placed, head: int) -> Tensor:
    """The scores s(i, j), (len_q, len_k), -inf where hidden; in the dtype of q."""
    group = call.heads_q // call.k.shape[-2]
    q, k = call.q[seq.q][:, head], call.k[seq.k][:, head // group]
    s = (q @ k.T) * call.scaling
    if call.softcap > 0:
        s = call.softcap * torch.tanh(s / call.softcap)
    distance = torch.arange(seq.len_k)[None, :] - positions(call, seq.len_q, seq.len_k)  # j - p(i)

    def by_distance(table: Tensor) -> Tensor:  # (rows, 2R+1) -> (rows, len_k)
        radius = table.shape[-1] // 2
        return table.gather(-1, distance.clamp(-radius, radius) + radius)

    if call.distance_bias is not None:
        table = call.distance_bias[head].to(s.dtype)
        s = s + by_distance(table.expand(seq.len_q, -1))
    if call.row_distance_bias is not None:
        s = s + by_distance(call.row_distance_bias[seq.batch, head, : seq.len_q].to(s.dtype))
    if call.col_distance_bias is not None:
        table = call.col_distance_bias[seq.batch, head, : seq.len_k].to(
            s.dtype
        )  # (len_k, 2R+1), indexed by (j, j - p(i))
        radius = table.shape[-1] // 2
        s = s + table.gather(-1, (distance.clamp(-radius, radius) + radius).T).T
    if call.alibi_slopes is not None:
        s = s - call.alibi_slopes[head].to(s.dtype) * distance.abs().to(s.dtype)
    hidden = ~visible(call, seq.batch, seq.len_q, seq.len_k)
    if call.bias is not None:
        bias = call.bias[(None,) * (4 - call.bias.dim())]
        rows, cols = bias.shape[2:]
        bias = bias[seq.batch if bias.shape[0] > 1 else 0, head if bias.shape[1] > 1 else 0]
        bias = bias[seq.bias_row : seq.bias_row + seq.len_q] if rows > 1 else bias
        bias = bias[:, seq.bias_col : seq.bias_col + seq.len_k] if cols > 1 else bias
        bias = bias.expand(seq.len_q, seq.len_k)
        if bias.dtype == torch.bool:
            hidden = hidden | ~bias
        else:
            hidden = hidden | (bias == -math.inf)
            s = s + bias.to(s.dtype)
    return s.masked_fill(hidden, -math.inf)


def attend(call: Call) -> tuple[Tensor, Tensor]:
    """out like q with v's head_dim, lse (B, Hq, Sq) or (Hq, total), at least float32; differentiable."""
    dense = call.q.dim() == 4
    group = call.heads_q // call.k.shape[-2]
    lse_dtype = torch.promote_types(call.q.dtype, torch.float32)
    out = call.q.new_zeros(*call.q.shape[:-1], call.v.shape[-1])
    lse = torch.full(call.q.shape[:-1], -math.inf, dtype=lse_dtype)
    for seq in sequences(call):
        for head in range(call.heads_q):
            s = scores(call, seq, head)
            live = torch.arange(seq.len_q) if call.sink is not None else torch.nonzero((s > -math.inf).any(1))[:, 0]
            if len(live) == 0:
                continue
            s = s[live]
            if call.sink is not None:
                s = torch.cat([s, call.sink[head].to(s.dtype).expand(len(live), 1)], 1)
            p = torch.softmax(s, 1)[:, : seq.len_k]
            if call.dropout_p > 0:
                keeps = dropout_keeps(call.seed, call.dropout_p, seq.batch, head, seq.len_q, seq.len_k)[live]
                p = p * keeps.to(p.dtype) / (1 - call.dropout_p)
            rows = (*seq.q[:-1], live + seq.q[-1].start, head)
            out[rows] = p @ call.v[seq.k][:, head // group]
            lse[rows] = torch.logsumexp(s.to(lse_dtype), 1)
    return out, lse.transpose(1, 2) if dense else lse.T


def answer(call: Call, dtype: torch.dtype, dout: Tensor | None = None, dlse: Tensor | None = None) -> Answer:
    """Outputs, and with `dout` the gradients, computed in `dtype`: float64 is the oracle, the call's own dtype the plain formula."""
    call = call.with_grad(dtype)
    with torch.set_grad_enabled(dout is not None):
        out, lse = attend(call)
    result = {"out": out.detach(), "lse": lse.detach()}
    if dout is None:
        return result
    leaves = {n: x for n in GRADIENTS if isinstance(x := getattr(call, n), Tensor) and x.requires_grad}
    loss = (out * dout.cpu().to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + (torch.where(lse.isfinite(), lse, 0) * dlse.cpu().to(lse.dtype)).sum()
    if not loss.requires_grad:
        return result | {f"d{n}": torch.zeros_like(x) for n, x in leaves.items()}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return result | {
        f"d{n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads, strict=True)
    }


def plain_answer(call: Call, exact: Answer, dout: Tensor | None = None, dlse: Tensor | None = None) -> Answer:
    """The plain formula's answer. Few rows may round well by luck, another release of torch otherwise: of these, number by
    number the worse of two answers, the second with the sum q . k the other way round."""
    plain = answer(call, call.q.dtype, dout, dlse)
    if exact["lse"].numel() > FEW:
        return plain
    turned = answer(dataclasses.replace(call, q=call.q.flip(-1), k=call.k.flip(-1)), call.q.dtype, dout, dlse)
    turned |= {name: turned[name].flip(-1) for name in ("dq", "dk") if name in turned}
    return {
        name: torch.where((x.double() - want).abs() < (turned[name].double() - want).abs(), turned[name], x)
        for name, x in plain.items()
        for want in [exact[name].double()]
    }


def floors(call: Call, exact: Answer, dout: Tensor | None = None, dlse: Tensor | None = None) -> dict[str, float]:
    """The absolute part of the accuracy contract, for each quantity."""

    def largest(x: Tensor | None, rows: Sequence[tuple[int | slice, ...]] | None = None) -> float:
        parts = [x] if rows is None or x is None else [x[r] for r in rows]
        return max(
            (float(p[p.isfinite()].abs().max()) for p in parts if p is not None and p.isfinite().any()), default=0.0
        )

    eps = torch.finfo(call.q.dtype).eps
    eps32 = min(eps, torch.finfo(torch.float32).eps)
    where = list(sequences(call))
    q_rows, k_rows = [s.q for s in where], [s.k for s in where]
    score_grad = largest(dout) * largest(call.v, k_rows) + largest(dlse)  # |dS| stays below this
    unit = 2 * eps * (1 + largest(exact["lse"]))
    bounds = {
        "out": eps * (1 + largest(exact["out"])),
        "lse": eps32 * (1 + largest(exact["lse"])),
        "dq": unit * score_grad * largest(call.k, k_rows) * abs(call.scaling),
        "dk": unit * score_grad * largest(call.q, q_rows) * abs(call.scaling),
        "dv": unit * largest(dout),
    }
    # The contract bounds dq, dk and dv. A bias or a sink sums dS over rows; P sums to 1 in a row, so each row errs by at most one unit, and rows
    # err independently. Last, the sum is stored in its own dtype.
    rows, longest = sum(s.len_q for s in where), max((s.len_q for s in where), default=0)
    summed = {"distance_bias": rows, "sink": rows, "row_distance_bias": 1, "col_distance_bias": longest}
    if call.bias is not None:
        batch, heads, rows_q, _ = (1,) * (4 - call.bias.dim()) + call.bias.shape
        summed["bias"] = (
            (1 if rows_q > 1 else longest) * (1 if batch > 1 else len(where)) * (1 if heads > 1 else call.heads_q)
        )
    for name, count in summed.items():
        if f"d{name}" in exact:
            stored = torch.finfo(getattr(call, name).dtype).eps
            bounds[f"d{name}"] = unit * score_grad * max(count, 1) ** 0.5 + stored * largest(exact[f"d{name}"])
    return bounds


def assert_accurate(
    got: Mapping[str, Tensor], exact: Answer, plain: Answer, floor: Mapping[str, float], what: str = ""
) -> None:
    """The accuracy contract: the largest error is at most twice the plain formula's plus the floor; what is not finite agrees exactly."""
    problems = []
    for name, x in got.items():
        x, want = x.detach().cpu().double(), exact[name].double()
        if x.shape != want.shape:
            problems.append(f"{name}: shape {tuple(x.shape)}, expected {tuple(want.shape)}")
            continue
        finite = want.isfinite()
        wrong = torch.where(finite, ~x.isfinite(), x != want)
        if wrong.any():
            at = tuple(torch.nonzero(wrong)[0].tolist())
            problems.append(
                f"{name}: {int(wrong.sum())} of {x.numel()} not finite where it should be (or the reverse), first at {at}: {x[at]}, expected {want[at]}"
            )
            continue
        if not finite.any():
            continue

        def error(y: Tensor, finite: Tensor = finite, want: Tensor = want) -> Tensor:
            return torch.where(finite, (y.double() - want).abs(), 0)

        err, allowed = error(x), 2 * float(error(plain[name]).max()) + floor[name]
        if not float(err.max()) <= allowed:
            at = tuple(int(n) for n in np.unravel_index(int(err.argmax()), err.shape))
            problems.append(
                f"{name}: largest error {err.max():.3g} at {at} (got {x[at]:.6g}, expected {want[at]:.6g}), allowed {allowed:.3g} "
                f"= 2 * {(allowed - floor[name]) / 2:.3g} of the plain formula + {floor[name]:.3g}; {int((err > allowed).sum())} of {x.numel()} beyond"
            )
    assert not problems, "\n".join([what, *problems])
