"""Other libraries' models on these kernels: one file a library, imported only on request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from .transformers import SwapReport


def swap(model: nn.Module) -> SwapReport:
    """Run the attention of a built transformers model on these kernels; see `integrations.transformers.swap`."""
    from . import transformers

    return transformers.swap(model)
