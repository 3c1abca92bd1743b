"""T5, mT5 and UMT5 of Hugging Face transformers: `duplex_attn.swap(model)` gives their attention a bias by distance.

transformers makes their bias a tensor of all pairs, (1, heads, queries, keys), and its gradient one too, though it follows
from the distance alone (Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer",
2020). Here it travels from layer to layer as a table (heads, 2 * max_distance + 1), which the attention entry takes for a
distance_bias: a tensor, so that gradient checkpointing sees it, with three dimensions of 1 in front, so that nobody takes it
for one of pairs. The cross attention of UMT5 keeps its tensor of zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mt5 import modeling_mt5 as mt5
from transformers.models.t5 import modeling_t5 as t5
from transformers.models.umt5 import modeling_umt5 as umt5

from .transformers import NAME


class _ByDistance:
    def compute_bias(
        self: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int | Tensor = 0
    ) -> Tensor:
        """A table where the last query stands at the last key, else the tensor of all pairs."""
        known = isinstance(past_seen_tokens, int) and key_length == query_length + past_seen_tokens
        if not known or self.config._attn_implementation != NAME:
            return super().compute_bias(query_length, key_length, device, past_seen_tokens)  # type: ignore[misc]
        weight = self.relative_attention_bias.weight
        # Further away all have one bucket: that of the largest distance, or where that is among the exact ones, of the last.
        reach = max(self.relative_attention_max_distance, self.relative_attention_num_buckets)
        distance = torch.arange(-reach, reach + 1, device=weight.device)
        return self.relative_attention_bias(self.buckets(distance)).mT.contiguous()[None, None, None]

    def buckets(self: Any, distance: Tensor) -> Tensor:
        return self._relative_position_bucket(
            distance,
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )


class _NoZeros:
    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Any = None,
        key_value_states: Any = None,
        position_bias: Any = None,
        **more: Any,
    ) -> Any:
        """Cross attention, whose bias is a tensor of zeros in transformers, has an empty one."""
        if position_bias is None and not self.has_relative_attention_bias and self.config._attn_implementation == NAME:
            position_bias = hidden_states.new_empty(1, 1, 1, 0, 0)
        return super().forward(hidden_states, mask, key_value_states, position_bias, **more)  # type: ignore[misc]


class T5Attention(_NoZeros, _ByDistance, t5.T5Attention):
    pass


class MT5Attention(_NoZeros, _ByDistance, mt5.MT5Attention):
    pass


class UMT5Attention(_ByDistance, umt5.UMT5Attention):
    def buckets(self, distance: Tensor) -> Tensor:
        return self._relative_position_bucket(distance)


_OWN: dict[type[nn.Module], type[nn.Module]] = {
    t5.T5Attention: T5Attention,
    mt5.MT5Attention: MT5Attention,
    umt5.UMT5Attention: UMT5Attention,
}


def replace(model: nn.Module) -> None:
    """Give the attention of each T5 in `model` the classes of this file; with another implementation they do what theirs do."""
    for part in model.modules():
        part.__class__ = _OWN.get(type(part), type(part))
