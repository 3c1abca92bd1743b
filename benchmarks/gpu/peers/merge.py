"""Peers of a merge: the formula in torch, and flashinfer's cascade."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ..workload import Peer
from . import module


def formula(outs: list[Tensor], lses: list[Tensor], dtype: torch.dtype) -> Tensor:
    """outs: (..., S, H, D), lses: (..., H, S)."""
    weights = torch.stack(lses).double().softmax(0).to(dtype).transpose(-1, -2)[..., None]
    return (weights * torch.stack(outs).to(dtype)).sum(0)


def in_torch(outs: list[Tensor], lses: list[Tensor]) -> Peer:
    """One behind the other beforehand."""
    v, s = torch.stack(outs), torch.stack(lses)
    return Peer(lambda: (s.softmax(0).transpose(-1, -2)[..., None] * v).sum(0).to(v.dtype))


def flashinfer(outs: list[Tensor], lses: list[Tensor]) -> Peer:
    """(rows, parts, heads, head_dim), laid out so beforehand; its logarithms are to the base of 2."""
    function = module("flashinfer").merge_states
    v = torch.stack([out.flatten(0, 1) for out in outs], 1)
    s = torch.stack([lse.transpose(1, 2).flatten(0, 1) / math.log(2) for lse in lses], 1)
    return Peer(partial(function, v, s), lambda found: found[0].view(outs[0].shape))
