"""The formulas of docs/semantics.md as written: the specification of what the kernels compute faster.

Scores are a dense tensor, float32 (float64 for float64 inputs), and outputs are rounded once. A packed batch is padded,
computed as a dense one with lengths, and packed again. A sequence's row is *stored* at some index of its padded
tensor, and is row `i` (or key `j`) of the sequence; a bias is indexed as stored, all else by i and j.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call import GRADIENTS, Call


class _Span(NamedTuple):
    """Masks for a padded batch of (B, Sq) queries and (B, Sk) keys."""

    i: Tensor  # (B, Sq) row within the sequence
    j: Tensor  # (B, Sk)
    live_q: Tensor  # (B, Sq) the stored row belongs to the sequence
    live_k: Tensor  # (B, Sk)
    distance: Tensor  # (B, Sq, Sk) j - p(i)
    visible: Tensor  # (B, Sq, Sk)


class _Attention(NamedTuple):
    """What forward computes and backward starts from; B, H, Sq, Sk unless noted."""

    q: Tensor  # (B, Sq, Hkv, G, D): G query heads share a kv head
    k: Tensor  # (B, Sk, Hkv, D)
    v: Tensor  # (B, Sk, Hkv, Dv)
    span: _Span
    p: Tensor  # probabilities before dropout
    lse: Tensor  # (B, H, Sq)
    kept: Tensor | None  # 1 / (1 - dropout_p), or 0 where dropped
    cap_slope: Tensor | None  # derivative of the soft cap


def _pad(x: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """(total, ...) -> (B, rows, ...); whatever lies past a sequence's end is for the caller to hide."""
    index = cu_seqlens[:-1, None] + torch.arange(rows, device=x.device)
    return x[index.clamp(max=len(x) - 1)] if len(x) else x.new_zeros(*index.shape, *x.shape[1:])


def _pack(x: Tensor, cu_seqlens: Tensor, total: int, fill: float = 0) -> Tensor:
    """(B, rows, ...) -> (total, ...), `fill` past the last sequence."""
    out = x.new_full((total, *x.shape[2:]), fill)
    inside = torch.arange(x.shape[1], device=x.device) < cu_seqlens.diff()[:, None]
    out[: int(cu_seqlens[-1])] = x[inside]
    return out


def _padded(c: Call) -> Call:
    """The same call as a dense one."""
    if c.cu_seqlens_q is None or c.cu_seqlens_k is None:
        return c
    return c._replace(
        q=_pad(c.q, c.cu_seqlens_q, c.max_seqlen_q),
        k=_pad(c.k, c.cu_seqlens_k, c.max_seqlen_k),
        v=_pad(c.v, c.cu_seqlens_k, c.max_seqlen_k),
        seqlens_q=c.cu_seqlens_q.diff(),
        seqlens_k=c.cu_seqlens_k.diff(),
    )


def _span(c: Call) -> _Span:
    def rows(x: Tensor, lengths: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        lengths = index.new_full(x.shape[:1], x.shape[1]) if lengths is None else lengths.long()
        index = index if starts is None else index - starts[:, None]
        return index, lengths, (index >= 0) & (index < lengths[:, None])

    i, len_q, live_q = rows(c.q, c.seqlens_q, c.starts_q)
    j, len_k, live_k = rows(c.k, c.seqlens_k, c.starts_k)
    position = i if c.top_left else i + (len_k - len_q)[:, None]
    distance = j[:, None, :] - position[:, :, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if c.left is not None:
        visible &= distance >= -c.left
    if c.right is not None:
        visible &= distance <= c.right
    if c.prefix is not None:
        visible |= (j < c.prefix[:, None])[:, None, :]
    visible &= live_q[:, :, None] & live_k[:, None, :]
    return _Span(i, j, live_q, live_k, distance, visible)


def _softmax(s: Tensor, dim: int) -> Tensor:
    """softmax, 0 where all are -inf. Not exp(s - logsumexp): that rounds relative to the size of the scores."""
    return torch.softmax(s, dim).masked_fill(s == -math.inf, 0)


def _bucket(distance: Tensor, table: Tensor) -> Tensor:
    """Index of clamp(j - p(i), -R, R) into the last dimension, 2R+1, of a table."""
    reach = table.shape[-1] // 2
    return distance.clamp(-reach, reach) + reach


def _row_of_sequence(table: Tensor, index: Tensor) -> Tensor:
    """(B, H, S, 2R+1) by row within the sequence -> the same by stored row."""
    return table.take_along_dim(index.clamp(0, max(table.shape[2] - 1, 0))[:, None, :, None], 2)


def _attend(c: Call, first: int = 0) -> _Attention:
    """Masks and scores of a dense call; `first` is the place of its first sequence in the batch."""
    span = _span(c)
    distance, visible = span.distance[:, None], span.visible[:, None]  # (B, 1, Sq, Sk)
    q = torch.where(span.live_q[..., None, None], c.q, 0).to(c.accumulator)
    k, v = (torch.where(span.live_k[..., None, None], x, 0).to(c.accumulator) for x in (c.k, c.v))
    q = q.unflatten(2, (k.shape[2], -1))

    scale = q.shape[-1] ** -0.5 if c.scale is None else c.scale
    s = scale * torch.einsum("bihgd,bjhd->bhgij", q, k).flatten(1, 2)
    cap_slope = None
    if c.softcap > 0:
        t = torch.tanh(s / c.softcap)
        s, cap_slope = c.softcap * t, 1 - t * t
    if c.distance_bias is not None:
        s = s + c.distance_bias[:, _bucket(span.distance, c.distance_bias)].transpose(0, 1)
    if c.row_distance_bias is not None:
        table = _row_of_sequence(c.row_distance_bias, span.i).to(s)
        s = s + table.gather(3, _bucket(distance, table).expand(s.shape))
    if c.col_distance_bias is not None:
        table = _row_of_sequence(c.col_distance_bias, span.j).to(s)
        s = s + table.gather(3, _bucket(distance, table).expand(s.shape).mT).mT
    if c.alibi_slopes is not None:
        s = s - c.alibi_slopes[:, None, None] * distance.abs()
    if c.bias is not None and c.bias.dtype == torch.bool:
        visible = visible & c.bias
    elif c.bias is not None:
        s = s + c.bias
    s = s.masked_fill(~visible, -math.inf)

    if c.sink is not None:  # one more key, which has no value
        sink = c.sink[:, None, None].expand(*s.shape[:-1], 1).masked_fill(~span.live_q[:, None, :, None], -math.inf)
        s = torch.cat([s, sink], -1)
    lse = s.logsumexp(-1)
    p = _softmax(s, -1)[..., : span.distance.shape[-1]]
    kept = None
    if c.dropout_p > 0 and c.seed is not None:
        kept = dropout_kept(s.shape[1], span.i, span.j, c.dropout_p, c.seed, first) / (1 - c.dropout_p)
    return _Attention(q, k, v, span, p, lse, kept, cap_slope)


def attention_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    c = Call(*arguments)
    out, lse = (_one_by_one if c.batch_invariant else _output)(_padded(c))
    if c.cu_seqlens_q is None:
        return out.contiguous(), lse
    lse = _pack(lse.transpose(1, 2), c.cu_seqlens_q, len(c.q), fill=-math.inf)
    return _pack(out, c.cu_seqlens_q, len(c.q)), lse.T.contiguous()


def _output(c: Call, first: int = 0) -> tuple[Tensor, Tensor]:
    a = _attend(c, first)
    p = a.p if a.kept is None else a.p * a.kept
    p = p.unflatten(1, a.q.shape[2:4])  # (B, Hkv, G, Sq, Sk)
    return torch.einsum("bhgij,bjhd->bihgd", p, a.v).flatten(2, 3).to(c.q.dtype), a.lse


def _one_by_one(c: Call) -> tuple[Tensor, Tensor]:
    """Each sequence apart, without its padding: a matrix product over more rows may sum in another order."""
    out = c.q.new_zeros(*c.q.shape[:-1], c.v.shape[-1])
    lse = c.q.new_full((c.batch, c.q.shape[2], c.q.shape[1]), -math.inf, dtype=c.accumulator)
    no_lengths: dict[str, Any] = dict.fromkeys(("seqlens_q", "seqlens_k", "starts_q", "starts_k"))
    for b in range(c.batch):
        rows, keys = _stored(c.q, c.seqlens_q, c.starts_q, b), _stored(c.k, c.seqlens_k, c.starts_k, b)
        one = slice(b, b + 1)
        own: dict[str, Any] = {"q": c.q[one, rows], "k": c.k[one, keys], "v": c.v[one, keys]}
        for name in ("prefix", "row_distance_bias", "col_distance_bias"):
            x = getattr(c, name)
            own[name] = None if x is None else x[one]
        if c.bias is not None:
            own["bias"] = c.bias.expand(c.batch, -1, c.q.shape[1], c.k.shape[1])[one, :, rows, keys]
        (out[b, rows],), (lse[b, :, rows],) = _output(c._replace(**own, **no_lengths), first=b)
    return out, lse


def _stored(x: Tensor, lengths: Tensor | None, starts: Tensor | None, b: int) -> slice:
    start = 0 if starts is None else int(starts[b])
    return slice(start, start + (x.shape[1] if lengths is None else int(lengths[b])))


def attention_backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Recomputes everything from the inputs, so `out` and `lse` are not read."""
    c, wanted = Call(*rest[:-1]), rest[-1]
    dense = _padded(c)
    a = _attend(dense)
    if c.cu_seqlens_q is not None:
        dout = _pad(dout, c.cu_seqlens_q, c.max_seqlen_q)
        dlse = None if dlse is None else _pad(dlse.T, c.cu_seqlens_q, c.max_seqlen_q).transpose(1, 2)
    dout = torch.where(a.span.live_q[..., None, None], dout, 0).to(c.accumulator)
    dout = dout.unflatten(2, a.q.shape[2:4])  # (B, Sq, Hkv, G, Dv)
    dlse = torch.zeros_like(a.lse) if dlse is None else dlse.masked_fill(a.lse == -math.inf, 0)

    dp = torch.einsum("bihgd,bjhd->bhgij", dout, a.v).flatten(1, 2)
    dropped_p = a.p
    if a.kept is not None:
        dropped_p, dp = a.p * a.kept, dp * a.kept
    dv = torch.einsum("bhgij,bihgd->bjhd", dropped_p.unflatten(1, a.q.shape[2:4]), dout)
    dlse_minus_delta = dlse - (a.p * dp).sum(-1)  # (B, H, Sq)
    ds = a.p * (dp + dlse_minus_delta[..., None])  # of a score after the soft cap

    ds_cap = ds if a.cap_slope is None else ds * a.cap_slope
    ds_cap = (ds_cap * (c.q.shape[-1] ** -0.5 if c.scale is None else c.scale)).unflatten(1, a.q.shape[2:4])
    dq = torch.einsum("bhgij,bjhd->bihgd", ds_cap, a.k).flatten(2, 3)
    dk = torch.einsum("bhgij,bihgd->bjhd", ds_cap, a.q)
    if c.cu_seqlens_q is not None and c.cu_seqlens_k is not None:
        dq = _pack(dq, c.cu_seqlens_q, len(c.q))
        dk, dv = (_pack(x, c.cu_seqlens_k, len(c.k)) for x in (dk, dv))

    grads: dict[str, Tensor] = {"q": dq, "k": dk, "v": dv}
    if c.bias is not None and wanted[3]:
        grads["bias"] = ds.sum_to_size(c.bias.shape)
    if c.distance_bias is not None and wanted[4]:
        grads["distance_bias"] = _sum_by_distance(ds, a.span.distance, c.distance_bias).sum((0, 2))
    if c.row_distance_bias is not None and wanted[5]:
        by_row = _sum_by_distance(ds, a.span.distance, c.row_distance_bias)
        grads["row_distance_bias"] = _to_row_of_sequence(by_row, a.span.i)
    if c.col_distance_bias is not None and wanted[6]:
        by_column = _sum_by_distance(ds.mT, a.span.distance.mT, c.col_distance_bias)
        grads["col_distance_bias"] = _to_row_of_sequence(by_column, a.span.j)
    if c.sink is not None and wanted[7]:
        share = torch.exp(c.sink[:, None] - a.lse).masked_fill(a.lse == -math.inf, 0)
        grads["sink"] = (share * dlse_minus_delta).sum((0, 2))
    return tuple(
        grads[name].to(getattr(c, name).dtype).contiguous() if want else c.q.new_empty(0, dtype=torch.float32)
        for name, want in zip(GRADIENTS, wanted, strict=True)
    )


def _sum_by_distance(ds: Tensor, distance: Tensor, table: Tensor) -> Tensor:
    """Sums each row of ds (B, H, M, N) into the buckets of `table`, (B, H, M, 2R+1).

    Only the two outermost buckets take more than one score of a row; summed apart, no sum depends on an order.
    """
    bucket = _bucket(distance, table)[:, None].expand(ds.shape)
    outermost = {0, table.shape[-1] - 1}
    inner = ds
    for end in outermost:
        inner = inner.masked_fill(bucket == end, 0)
    grad = ds.new_zeros(*ds.shape[:3], table.shape[-1]).scatter_add_(3, bucket, inner)
    for end in outermost:
        grad[..., end] = ds.masked_fill(bucket != end, 0).sum(-1)
    return grad


def _to_row_of_sequence(by_stored_row: Tensor, index: Tensor) -> Tensor:
    """The way back of `_row_of_sequence`; rows outside a sequence add only zeros, to any row."""
    index = index.clamp(0, max(by_stored_row.shape[2] - 1, 0))[:, None, :, None].expand(by_stored_row.shape)
    return torch.zeros_like(by_stored_row).scatter_add_(2, index, by_stored_row)


def dropout_kept(heads: int, i: Tensor, j: Tensor, dropout_p: float, seed: Tensor, first: int = 0) -> Tensor:
    """(B, H, Sq, Sk) bool: the probabilities that dropout keeps, for rows i (B, Sq) and keys j (B, Sk) from sequence `first` on."""
    batch = torch.arange(first, first + len(i), device=i.device)[:, None, None, None]
    head = torch.arange(heads, device=i.device)[:, None, None]
    i, j = i[:, None, :, None], j[:, None, None, :]
    word = torch.stack(torch.broadcast_tensors(*_philox(j // 4, i, head, batch, seed)), -1)
    word = word.gather(-1, (j % 4).expand(word.shape[:-1])[..., None])[..., 0]
    return word >= math.floor(dropout_p * 2**32)


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), 32-bit words in int64.

    A product of two words wraps with the same bits as in uint64, so both of its halves come out right.
    """
    low = 0xFFFFFFFF
    key0, key1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ key0, b & low, (a >> 32 & low) ^ c3 ^ key1, a & low
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def merge_attention(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Weights each part by exp(lse_part - lse); out (..., H, D), lse (B, H, S) or (H, total)."""
    lse_parts = torch.stack(lses)
    lse = lse_parts.logsumexp(0)
    weights = _softmax(lse_parts, 0).mT[..., None]  # (parts, B, S, H, 1)
    parts = torch.stack(outs).to(lse.dtype)
    return torch.where(weights != 0, parts * weights, 0).sum(0).to(outs[0].dtype), lse
