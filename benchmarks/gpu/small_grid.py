"""Few small calls that meet every kernel of every backend, for tools under which each takes a hundred times as long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import duplex_attn as da
import torch
from torch import Tensor

from .stages.bench import backends, in_short

LENGTHS = [37, 1, 20]
PAGE = 16


def calls(device_name: str, only: str = "") -> Iterator[str]:
    """Makes them, or those of one name, and names each; one that a backend refuses is named with its reason."""
    device = torch.device(device_name)
    for backend in backends(device):
        for name in [only] if only else CALLS:
            try:
                CALLS[name](device, backend)
                if device.type == "cuda":
                    torch.cuda.synchronize()
            except ValueError as error:
                if not str(error).startswith("backend:"):
                    raise
                name += f", refused: {in_short(error)}"
            yield f"{backend}: {name}"


def rows(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).bfloat16().requires_grad_()


def dense(device: torch.device, backend: str) -> None:
    """Causal with shared heads, and all gradients."""
    q, k, v = rows(device, 2, 70, 4, 64), rows(device, 2, 70, 2, 64), rows(device, 2, 70, 2, 64)
    out = da.attention(q, k, v, da.causal(), backend=backend)
    torch.autograd.grad(out, (q, k, v), torch.randn_like(out))


def packed(device: torch.device, backend: str) -> None:
    """Terms of a score that every backend has, a prefix for each sequence, and all gradients."""
    run_packed(device, backend)


def packed_with_all(device: torch.device, backend: str, head_dim: int = 64) -> None:
    """With a bias and dropout too."""
    longest = max(LENGTHS)
    bias = rows(device, len(LENGTHS), 2, longest, longest)
    run_packed(device, backend, head_dim, bias=bias, dropout_p=0.1, seed=7)


def run_packed(device: torch.device, backend: str, head_dim: int = 64, bias: Tensor | None = None, **more: Any) -> None:
    total, heads, longest = sum(LENGTHS), 2, max(LENGTHS)
    q, k, v = (rows(device, total, heads, head_dim) for _ in range(3))
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32, device=device)
    terms = {
        "distance_bias": torch.randn(heads, 9, device=device).requires_grad_(),
        "sink": torch.randn(heads, device=device).requires_grad_(),
        **({} if bias is None else {"bias": bias}),
    }
    mask = da.Mask(torch.tensor([5, 0, 20], dtype=torch.int32, device=device), 30, 0)
    out, lse = da.varlen_attention(
        q, k, v, cu, cu, longest, longest, mask, **terms, alibi_slopes=torch.rand(heads, device=device), softcap=20.0,
        return_lse=True, deterministic=True, backend=backend, **more,
    )  # fmt: skip
    leaves = (q, k, v, *terms.values())
    torch.autograd.grad((out, lse), leaves, (torch.randn_like(out), torch.randn_like(lse)))


def merge(device: torch.device, backend: str) -> None:
    q, k, v = (rows(device, 1, 20, 2, 64).detach() for _ in range(3))
    parts = [da.attention(q, k[:, s], v[:, s], return_lse=True, backend=backend) for s in (slice(7), slice(7, None))]
    da.merge_attention([out for out, _ in parts], [lse for _, lse in parts], backend=backend)


def paged(device: torch.device, backend: str) -> None:
    """Append with RoPE, decode over what was written, and a copied page."""
    batch, pages, heads_kv, head_dim = 3, 8, 2, 64
    k_pages, v_pages = (torch.randn(pages, PAGE, heads_kv, head_dim, device=device).bfloat16() for _ in range(2))
    table = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32, device=device)
    lens = torch.tensor([20, 1, 32], dtype=torch.int32, device=device)
    k, v = (torch.randn(batch, heads_kv, head_dim, device=device).bfloat16() for _ in range(2))
    cos, sin = torch.rand(64, head_dim // 2, device=device), torch.rand(64, head_dim // 2, device=device)
    da.paged_append(k, v, k_pages, v_pages, table, lens - 1, rope_cos=cos, rope_sin=sin, backend=backend)
    q = torch.randn(batch, 4, head_dim, device=device).bfloat16()
    da.paged_attention(q, k_pages, v_pages, table, lens, rope_cos=cos, rope_sin=sin, backend=backend)
    source, target = (torch.tensor([n], dtype=torch.int32, device=device) for n in (4, 6))
    da.copy_pages(k_pages, v_pages, source, target, backend=backend)


CALLS: dict[str, Callable[[torch.device, str], None]] = {
    "packed with all": packed_with_all,
    "packed": packed,
    "dense": dense,
    "paged": paged,
    "merge": merge,
}
