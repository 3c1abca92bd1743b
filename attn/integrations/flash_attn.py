"""The functions of the package flash-attn (2.x) on these kernels: on a CPU too, in float32 too, with nothing to compile.

    from duplex_attn.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func

    from duplex_attn.integrations import flash_attn
    flash_attn.register()   # or so, for code that imports `flash_attn`

Arguments and results are those of Dao, "FlashAttention-2" (2023), and of its package: tensors (batch, seqlen, heads, head_dim)
or (total, heads, head_dim), queries that stand at the end of their keys, window_size (left, right) with -1 for no bound. A row
that sees nothing has out 0 and, where log-sum-exps are returned, -inf. Errors are those of `duplex_attn`'s calls, and for what
they cannot say (slopes for each sequence, keys that start later, probabilities under dropout) ValueError.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from math import gcd
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..checks import wrong_value
from ..mask import Mask
from ..paged.call import MAX_PAGE_SIZE
from ..paged.functional import paged_append, paged_attention

__version__ = "2.8.4"  # of the interface


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """q (B, Sq, Hq, D), k and v (B, Sk, Hkv, D) -> (B, Sq, Hq, D); with return_attn_probs also lse (B, Hq, Sq) and None."""
    out, lse = functional.attention(
        q, k, v, _span(causal, window_size), dropout_p=dropout_p, scale=softmax_scale, softcap=softcap,
        alibi_slopes=_slopes(alibi_slopes), deterministic=deterministic or None, return_lse=True,
    )  # fmt: skip
    return _results(out, lse, return_attn_probs, dropout_p)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """kv (B, Sk, 2, Hkv, D); all else as in `flash_attn_func`."""
    k, v = kv.unbind(-3)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """qkv (B, S, 3, H, D); all else as in `flash_attn_func`."""
    q, k, v = qkv.unbind(-3)
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """q (total_q, Hq, D), k and v (total_k, Hkv, D) -> (total_q, Hq, D); with return_attn_probs also lse (Hq, total_q) and None.

    With block_table int32 (B, max_pages), k and v are pages (num_pages, page_size, Hkv, D), and there are no gradients.
    """
    terms: dict[str, Any] = {"scale": softmax_scale, "softcap": softcap, "alibi_slopes": _slopes(alibi_slopes)}
    span = _span(causal, window_size)
    if block_table is None:
        out, lse = functional.varlen_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, span,
            dropout_p=dropout_p, deterministic=deterministic or None, return_lse=True, **terms,
        )  # fmt: skip
    else:
        if dropout_p:
            wrong_value("dropout_p", "0 with a block_table", dropout_p)
        pages = _small_pages(k, v, block_table)
        out, lse = paged_attention(
            q, *pages, cu_seqlens_k.diff(), span, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, return_lse=True,
            **terms,
        )  # fmt: skip
    return _results(out, lse, return_attn_probs, dropout_p)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """kv (total_k, 2, Hkv, D); all else as in `flash_attn_varlen_func`."""
    k, v = kv.unbind(-3)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *args, **kwargs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> Any:
    """qkv (total, 3, H, D); all else as in `flash_attn_varlen_func`."""
    q, k, v = qkv.unbind(-3)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention over a cache, after new keys and values were written into it: q (B, Sq, Hq, D) -> (B, Sq, Hq, D).

    k_cache, v_cache: (caches, capacity, Hkv, D), of which sequence b has number b or cache_batch_idx[b], int32 (B,); or with
        block_table int32 (B, max_pages), pages (num_pages, page_size, Hkv, D). A capacity or page_size whose divisors up
        to 256 are small ones makes small pages of it, which are slower.
    cache_seqlens: an int or int32 (B,), the keys that are there; None: the whole capacity.
    k, v: (B, Sn, Hkv, D), written in place behind those. rotary_cos, rotary_sin (positions, R): rotate k and q, which stand
        at cache_seqlens, cache_seqlens + 1 ...; interleaved pairs are (2x, 2x + 1), others (x, x + R).
    num_splits is not read, keys are divided by their number. Returns out, and with return_softmax_lse lse (B, Hq, Sq). There are
    no gradients.
    """
    if cache_leftpad is not None:
        wrong_value("cache_leftpad", "None: keys start at 0", "a tensor")
    if (k is None) != (v is None):
        wrong_value("k, v", "both or neither", "one")
    if (rotary_cos is None) != (rotary_sin is None):
        wrong_value("rotary_cos, rotary_sin", "both or neither", "one")
    if k is None and rotary_cos is not None:
        wrong_value("rotary_cos", "None without new keys", "a tensor")
    batch, rows = q.shape[:2]
    if rotary_cos is not None:
        if k is not None and k.shape[1] != rows:
            wrong_value("k", f"as many rows as q ({rows}) where they are rotated", k.shape[1])
        if rows > 1 and not causal and max(window_size) < 0:
            wrong_value(
                "rotary_cos", "None where several queries see everything, and so stand at one place", "a tensor"
            )

    if block_table is None:
        if cache_batch_idx is None:
            cache_batch_idx = torch.arange(batch, dtype=torch.int32, device=q.device)
        block_table = cache_batch_idx[:, None]
    capacity = block_table.shape[1] * k_cache.shape[1]
    pages = _small_pages(k_cache, v_cache, block_table)
    if not isinstance(cache_seqlens, Tensor):
        held = capacity if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((batch,), held, dtype=torch.int32, device=q.device)

    rope: dict[str, Any] = {}
    if rotary_cos is not None and rotary_sin is not None:
        rope = {"rope_cos": rotary_cos.float(), "rope_sin": rotary_sin.float(), "rope_interleaved": rotary_interleaved}
    if k is not None and v is not None:
        new = k.shape[1]
        positions = cache_seqlens[:, None] + torch.arange(new, dtype=torch.int32, device=q.device)
        paged_append(k.flatten(0, 1), v.flatten(0, 1), *pages, positions.flatten(), _every(new, k), **rope)
        cache_seqlens = cache_seqlens + new
    out, lse = paged_attention(
        q.flatten(0, 1), *pages, cache_seqlens, _span(causal, window_size), cu_seqlens_q=_every(rows, q), max_seqlen_q=rows,
        scale=softmax_scale, softcap=softcap, alibi_slopes=_slopes(alibi_slopes), return_lse=True, **rope,
    )  # fmt: skip
    out = out.unflatten(0, (batch, rows))
    return (out, lse.unflatten(1, (batch, rows)).transpose(0, 1)) if return_softmax_lse else out


def _span(causal: bool, window_size: tuple[int, int]) -> Mask:
    left, right = (None if n < 0 else n for n in window_size)
    return Mask(left=left, right=0 if causal else right)


def _slopes(alibi_slopes: Tensor | None) -> Tensor | None:
    if alibi_slopes is not None and alibi_slopes.dim() != 1:
        wrong_value("alibi_slopes", "(heads_q,), the same for every sequence", alibi_slopes.shape)
    return alibi_slopes


def _results(out: Tensor, lse: Tensor, return_attn_probs: bool, dropout_p: float) -> Any:
    if return_attn_probs and dropout_p > 0:
        wrong_value("return_attn_probs", "False under dropout: probabilities are never formed", True)
    return (out, lse, None) if return_attn_probs else out


def _every(rows: int, x: Tensor) -> Tensor | None:
    """The cu_seqlens of sequences of so many rows each; None where it is one."""
    batch = x.shape[0]
    return None if rows == 1 else torch.arange(batch + 1, dtype=torch.int32, device=x.device) * rows


def _small_pages(k_pages: Tensor, v_pages: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same memory as pages of up to 256 rows, and where they lie."""
    size = k_pages.shape[1]
    if size <= MAX_PAGE_SIZE:
        return k_pages, v_pages, block_table
    between = [_rows_between(name, x) for name, x in (("k_cache", k_pages), ("v_cache", v_pages))]
    if between[0] != between[1]:
        wrong_value("v_cache", f"{between[0]} rows between its pages, as k_cache", between[1])
    common = gcd(size, between[0])
    small = max(n for n in range(1, MAX_PAGE_SIZE + 1) if common % n == 0)
    parts = torch.arange(size // small, dtype=torch.int32, device=block_table.device)
    table = (block_table[:, :, None] * (between[0] // small) + parts).flatten(1)
    return _cut(k_pages, small), _cut(v_pages, small), table


def _rows_between(name: str, pages: Tensor) -> int:
    """From the first row of a page to that of the next, as memory has them."""
    if pages.shape[0] < 2:
        return pages.shape[1]
    rows, rest = divmod(pages.stride(0), pages.stride(1))
    if rest or rows < pages.shape[1]:
        wrong_value(
            name, "the rows of a page behind one another, and pages whole rows apart", f"strides {pages.stride()}"
        )
    return rows


def _cut(pages: Tensor, small: int) -> Tensor:
    number, size, heads, head_dim = pages.shape
    row = pages.stride(1)
    pieces = (max(number - 1, 0) * pages.stride(0) // row + size * (number > 0)) // small
    return pages.as_strided((pieces, small, heads, head_dim), (small * row, *pages.stride()[1:]))


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(B, S, ...) and a mask (B, S), 1 for tokens: the tokens packed, their places int64 (total,), cu_seqlens int32 (B + 1,), the
    longest sequence, and the tokens of each, int32 (B,). Those of unused_mask are packed too, and not in the last."""
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    seqlens = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    used = attention_mask.sum(-1, dtype=torch.int32)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, int(seqlens.max()), used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The tokens (total, ...) back in their places of (batch, seqlen, ...), zeros elsewhere."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_put((indices,), hidden_states).unflatten(0, (batch, seqlen))


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input[indices]"""
    return input.index_select(0, indices)


_ATTENTION = (
    flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func, flash_attn_with_kvcache,
)  # fmt: skip
_MODULES = {
    "flash_attn": _ATTENTION,
    "flash_attn.flash_attn_interface": _ATTENTION,
    "flash_attn.bert_padding": (unpad_input, pad_input, index_first_axis),
}


def register() -> None:
    """From here on `import flash_attn` in this process gives the functions of this file (its layers, ops and losses are not there).

    Raises RuntimeError where another flash_attn was imported already, for whoever did so keeps its functions.
    """
    if _made(sys.modules.get("flash_attn")):
        return
    if "flash_attn" in sys.modules:
        raise RuntimeError("flash_attn: expected not to be imported yet; register before models that import it")
    for name, functions in _MODULES.items():
        module = ModuleType(name, __doc__)
        module.__dict__.update({function.__name__: function for function in functions})
        module.__spec__ = ModuleSpec(name, None, origin=__file__, is_package=name == "flash_attn")
        module.__dict__.update(__version__=__version__, __path__=[], _of_duplex_attn=True)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def unregister() -> None:
    """Undo `register`; an installed flash_attn can be imported again."""
    for name in _MODULES:
        if _made(sys.modules.get(name)):
            del sys.modules[name]


def _made(module: ModuleType | None) -> bool:
    return hasattr(module, "_of_duplex_attn")
