"""DeBERTa, versions 1 to 3, of Hugging Face transformers: `duplex_attn.swap(model)` runs its attention here.

A score of DeBERTa's has, beside <q_i, k_j>, a product of the query with an embedding of the distance and one of the key
with another (He et al., "DeBERTa: Decoding-enhanced BERT with Disentangled Attention", 2021). Both are tables that a matrix
product makes, row_distance_bias and col_distance_bias; nothing of the size queries x keys is made, where transformers
makes it many times over. Its attention asks no interface, so its modules get classes of their own here, which `restore`
takes back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deberta import modeling_deberta as v1
from transformers.models.deberta_v2 import modeling_deberta_v2 as v2
from transformers.utils.import_utils import is_tracing

from ..checks import MAX_HEAD_DIM
from ..modules.disentangled import Padding, attend, behind, clamped, log_bucket
from .transformers import refuse_output_attentions


def padding_of(tokens: Tensor) -> Padding:
    """tokens (batch, seqlen) bool. Costs one look at its contents; while a graph is traced nothing is read."""
    if not is_tracing(tokens):
        host = tokens.cpu()
        lengths = host.sum(1, dtype=torch.int32)
        if host.all():
            return Padding()
        if torch.equal(host, torch.arange(host.shape[1]) < lengths[:, None]):
            return Padding(lengths.to(tokens.device), tuple(lengths.tolist()))
    return Padding(keys=tokens[:, None, None, :])


class _Encoder:
    """What an encoder prepares once for all of its layers: the padding as lengths, and no positions."""

    def get_attention_mask(self, attention_mask: Tensor) -> Padding:
        if attention_mask.dim() <= 2:
            return padding_of(attention_mask.bool())
        return Padding(keys=super().get_attention_mask(attention_mask).bool())  # type: ignore[misc]

    def get_rel_pos(self, hidden_states: Tensor, query_states: Tensor | None = None, relative_pos: Any = None) -> Any:
        return relative_pos


class _Attention:
    """The forward of both versions, whose parameters have other names."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Padding | Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """hidden_states (batch, seqlen, hidden) -> the same, and None for the weights, which are never formed.

        Raises ValueError for output_attentions=True, and for positions other than 0, 1, 2 ...
        """
        if output_attentions:
            refuse_output_attentions()
        if relative_pos is not None:
            raise ValueError("relative_pos: expected None, got a tensor; restore(model) computes with it")
        padding = attention_mask if isinstance(attention_mask, Padding) else Padding(keys=attention_mask.bool())
        q, k, v = self.projections(hidden_states, query_states)
        scale = (q.shape[-1] * self.products()) ** -0.5
        keys = queries = None  # of distances
        if self.relative_attention and rel_embeddings is not None:
            rel_embeddings = self.pos_dropout(rel_embeddings)
            entries = self.entries(q.shape[1], q.device)
            keys = self.keys_of(rel_embeddings)[entries] * scale if "c2p" in self.pos_att_type else None
            queries = self.queries_of(rel_embeddings)[entries] * scale if "p2c" in self.pos_att_type else None
        out = attend(q, k, v, keys, queries, padding, scale, self.dropout.p if self.training else 0.0)
        return out.flatten(2), None

    def heads(self: Any, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_attention_heads, -1))


class DisentangledAttention(_Attention, v1.DisentangledSelfAttention):
    def projections(self, hidden_states: Tensor, query_states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if query_states is not None:
            raise ValueError("query_states: expected None, got a tensor; transformers computes nothing with it either")
        q, k, v = self.heads(self.in_proj(hidden_states)).chunk(3, -1)
        return q + self.heads(self.q_bias), k, v + self.heads(self.v_bias)

    def products(self) -> int:
        """Of which a score is the sum."""
        return 1 + len(self.pos_att_type)

    def entries(self, length: int, device: torch.device) -> Tensor:
        span = self.max_relative_positions
        return clamped(behind(length, span, device), min(length, span)) + span - min(length, span)

    def keys_of(self, rel_embeddings: Tensor) -> Tensor:
        return self.heads(self.pos_proj(rel_embeddings))

    def queries_of(self, rel_embeddings: Tensor) -> Tensor:
        return self.heads(self.pos_q_proj(rel_embeddings))


class DisentangledAttentionV2(_Attention, v2.DisentangledSelfAttention):
    def projections(self, hidden_states: Tensor, query_states: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q = self.query_proj(hidden_states if query_states is None else query_states)
        return self.heads(q), self.heads(self.key_proj(hidden_states)), self.heads(self.value_proj(hidden_states))

    def products(self) -> int:
        return 1 + len({"c2p", "p2c"}.intersection(self.pos_att_type))

    def entries(self, length: int, device: torch.device) -> Tensor:
        steps = behind(length, self.max_relative_positions, device)
        if self.position_buckets > 0:
            steps = log_bucket(steps, self.position_buckets, self.max_relative_positions)
        return clamped(steps, self.pos_ebd_size)

    def keys_of(self, rel_embeddings: Tensor) -> Tensor:
        return self.heads((self.key_proj if self.share_att_key else self.pos_key_proj)(rel_embeddings))

    def queries_of(self, rel_embeddings: Tensor) -> Tensor:
        return self.heads((self.query_proj if self.share_att_key else self.pos_query_proj)(rel_embeddings))


class DebertaEncoder(_Encoder, v1.DebertaEncoder):
    pass


class DebertaV2Encoder(_Encoder, v2.DebertaV2Encoder):
    pass


MODELS = (v1.DebertaPreTrainedModel, v2.DebertaV2PreTrainedModel)
ATTENTION = (DisentangledAttention, DisentangledAttentionV2)
_OWN: dict[type[nn.Module], type[nn.Module]] = {
    v1.DisentangledSelfAttention: DisentangledAttention,
    v2.DisentangledSelfAttention: DisentangledAttentionV2,
    v1.DebertaEncoder: DebertaEncoder,
    v2.DebertaV2Encoder: DebertaV2Encoder,
}


def replace(model: nn.Module) -> None:
    """Give each DeBERTa in `model` the classes of this file, but for one that _is_another()."""
    for part in model.modules():
        if isinstance(part, MODELS) and not any(map(_is_another, part.modules())):
            _to_classes(part, _OWN)


def _is_another(part: nn.Module) -> bool:
    """Whether it is an encoder or its attention that somebody changed, whose heads mix, or are too wide for the kernels."""
    if not isinstance(part, tuple(_OWN)):
        return False
    changed = type(part) not in (*_OWN, *_OWN.values()) or "forward" in vars(part)
    return changed or getattr(part, "talking_head", False) or getattr(part, "attention_head_size", 1) > MAX_HEAD_DIM


def restore(model: nn.Module) -> None:
    """What `replace` changed is transformers' own again."""
    _to_classes(model, {own: theirs for theirs, own in _OWN.items()})


def _to_classes(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for part in model.modules():
        part.__class__ = classes.get(type(part), type(part))
