"""What the models are made of beside attention: activations and initial weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def activate(x: Tensor, name: str) -> Tensor:
    """`name` of x; in x's own memory where no gradient is recorded, for x is the widest tensor of a layer."""
    in_place = not torch.is_grad_enabled()
    if name in ("gelu", "gelu_tanh"):
        approximate = "tanh" if name == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_(x, approximate=approximate) if in_place else F.gelu(x, approximate=approximate)
    return F.silu(x, inplace=in_place) if name == "silu" else F.relu(x, inplace=in_place)


def check_activation(name: str) -> None:
    if name not in ("gelu", "gelu_tanh", "silu", "relu"):
        raise ValueError(f"activation: expected gelu, gelu_tanh, silu or relu, got {name!r}")


def gate(x: Tensor, activation: str, gated: bool, by_row: bool = False) -> Tensor:
    """The activation of x (..., inner), or where gated that of the first half times the second, [gate, up].

    by_row: torch computes the last elements of a thread's share otherwise than those before them.
    """
    first, second = x.chunk(2, -1) if gated else (x, None)
    if by_row and len(first):
        first = torch.stack([activate(row, activation) for row in first])
    else:
        first = activate(first, activation)
    return first if second is None else first * second


def init_weights(module: nn.Module) -> None:
    """The initialisation of BERT and GPT-2: normal with deviation 0.02, biases 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
