"""BERT, RoBERTa with XLM-R, and DeBERTa of all versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..modules.bert import Bert, BertClassifier, BertConfig, BertMaskedLM
from ..modules.disentangled import Disentangled
from .family import Family, Modules, Plan, Stored, activation, below, drop, need, refuse, tie

BERT: Modules = {
    "embedding.word": ("embeddings.word_embeddings",),
    "embedding.position": ("embeddings.position_embeddings",),
    "embedding.segment": ("embeddings.token_type_embeddings",),
    "embedding.norm": ("embeddings.LayerNorm",),
    "layers.{}.qkv": tuple("encoder.layer.{}.attention.self." + name for name in ("query", "key", "value")),
    "layers.{}.out": ("encoder.layer.{}.attention.output.dense",),
    "layers.{}.attention_norm": ("encoder.layer.{}.attention.output.LayerNorm",),
    "layers.{}.up": ("encoder.layer.{}.intermediate.dense",),
    "layers.{}.down": ("encoder.layer.{}.output.dense",),
    "layers.{}.norm": ("encoder.layer.{}.output.LayerNorm",),
    "pooler": ("pooler.dense",),
}
DEBERTA: Modules = BERT | {
    "layers.{}.qkv": tuple(
        "encoder.layer.{}.attention.self." + name for name in ("query_proj", "key_proj", "value_proj")
    ),
    "layers.{}.distances.key": ("encoder.layer.{}.attention.self.pos_key_proj",),
    "layers.{}.distances.query": ("encoder.layer.{}.attention.self.pos_query_proj",),
    "distances.embedding": ("encoder.rel_embeddings",),
    "distances.norm": ("encoder.LayerNorm",),
}
POSITIONS = "embeddings.position_embeddings.weight"
BERT_HEADS: Modules = {
    "dense": ("cls.predictions.transform.dense",),
    "norm": ("cls.predictions.transform.LayerNorm",),
    "decoder": ("cls.predictions.decoder",),
    "classifier": ("classifier",),
}
ROBERTA_HEADS: Modules = {
    "dense": ("lm_head.dense",),
    "norm": ("lm_head.layer_norm",),
    "decoder": ("lm_head.decoder",),
    "bert.pooler": ("classifier.dense",),  # which a classifier has in its head
    "classifier": ("classifier.out_proj",),
}


def bert_config(raw: Mapping[str, Any], **changes: Any) -> BertConfig:
    """A Hugging Face BERT config.json as ours; `changes` are RoBERTa's."""
    refuse(raw, "position_embedding_type", "absolute")
    refuse(raw, "is_decoder", False)
    refuse(raw, "add_cross_attention", False)
    options: dict[str, Any] = {
        "vocab_size": need(raw, "vocab_size"),
        "hidden": need(raw, "hidden_size"),
        "layers": need(raw, "num_hidden_layers"),
        "heads": need(raw, "num_attention_heads"),
        "inner": need(raw, "intermediate_size"),
        "max_positions": need(raw, "max_position_embeddings"),
        "segments": raw.get("type_vocab_size", 2),
        "activation": activation(raw, "hidden_act", "gelu"),
        "eps": raw.get("layer_norm_eps", 1e-12),
        "dropout": raw.get("hidden_dropout_prob", 0.1),
        "attention_dropout": raw.get("attention_probs_dropout_prob", 0.1),
        "tied": raw.get("tie_word_embeddings", True),
        "labels": len(raw.get("id2label") or range(raw.get("num_labels", 2))),
        "classifier_dropout": raw.get("classifier_dropout"),
    }
    return BertConfig(**options | changes)


def roberta_offset(raw: Mapping[str, Any]) -> int:
    """Rows of the table that stand for padding and for what no position has."""
    return need({"pad_token_id": 1, **raw}, "pad_token_id") + 1


def roberta_config(raw: Mapping[str, Any]) -> BertConfig:
    max_positions = need(raw, "max_position_embeddings") - roberta_offset(raw)
    return bert_config(raw, max_positions=max_positions, positions="tokens")


def deberta_config(raw: Mapping[str, Any]) -> BertConfig:
    """A config.json of DeBERTa, version 1, 2 or 3, as ours."""
    hidden, heads = need(raw, "hidden_size"), need(raw, "num_attention_heads")
    for name, computed in {
        "conv_kernel_size": 0,
        "embedding_size": hidden,
        "pooler_hidden_size": hidden,
        "attention_head_size": hidden // heads,
        "pooler_dropout": 0.0,
        "talking_head": False,
    }.items():
        refuse(raw, name, computed)
    terms = raw.get("pos_att_type") or []
    terms = [term.strip() for term in terms.lower().split("|")] if isinstance(terms, str) else terms
    if not {"c2p", "p2c"}.issuperset(terms):
        raise ValueError(f"pos_att_type: expected c2p and p2c in config.json, got {raw['pos_att_type']!r}")
    if terms:  # without embeddings, transformers still divides the scores by their number
        refuse({"relative_attention": False, **raw}, "relative_attention", True)
    span = raw.get("max_relative_positions") or -1
    norm = (raw.get("norm_rel_ebd") or "none").lower()
    options = Disentangled(
        span=need(raw, "max_position_embeddings") if span < 1 else span,
        buckets=max(raw.get("position_buckets") or 0, 0),
        content_to_position="c2p" in terms,
        position_to_content="p2c" in terms,
        shared=raw.get("share_att_key", False),
        normalised="layer_norm" in norm.split("|"),
    )
    return bert_config(
        {"type_vocab_size": 0, "layer_norm_eps": 1e-7, **raw},
        positions="columns" if raw.get("position_biased_input", True) else "none",
        disentangled=options if raw.get("relative_attention", False) else None,
        pooler_activation=raw.get("pooler_hidden_act") or "gelu",
        classifier_dropout=raw.get("cls_dropout"),
    )


def as_later_versions(stored: Stored, heads: int) -> None:
    """Version 1 has queries, keys and values of each head in one matrix, and biases for some of its projections."""
    for name in [name for name in stored if name.endswith(".in_proj.weight")]:
        place = name.removesuffix("in_proj.weight")
        weights = stored.pop(name).unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2)  # (3, H * D, C)
        q_bias, v_bias = stored.pop(f"{place}q_bias"), stored.pop(f"{place}v_bias")
        biases = (q_bias, torch.zeros_like(q_bias), v_bias)
        for kind, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            stored[f"{place}{kind}_proj.weight"], stored[f"{place}{kind}_proj.bias"] = weight, bias
        for ours, theirs in (("pos_key_proj", "pos_proj"), ("pos_query_proj", "pos_q_proj")):
            if (weight := stored.pop(f"{place}{theirs}.weight", None)) is not None:
                bias = stored.pop(f"{place}{theirs}.bias", torch.zeros_like(q_bias))
                stored[f"{place}{ours}.weight"], stored[f"{place}{ours}.bias"] = weight, bias


def encoder_plan(
    raw: Mapping[str, Any],
    made: type[nn.Module],
    stored: Stored,
    *,
    config_of: Callable[[Mapping[str, Any]], BertConfig],
    heads: Modules,
    encoder: Modules = BERT,
    unused_positions: Callable[[Mapping[str, Any]], int] = lambda raw: 0,  # rows in front of the table
) -> Plan:
    config, modules = config_of(raw), encoder
    if made is not BertClassifier:
        config = replace(config, pooler="pooler.dense.weight" in stored)
    if made is Bert:
        drop(stored, "cls.", "classifier.", "lm_head.", "lm_predictions.")
    else:
        modules = below("bert", encoder) | heads
        if made is BertClassifier and modules["bert.pooler"] != encoder["pooler"]:  # a head with a layer in its place
            drop(stored, "pooler.")
    if (skipped := unused_positions(raw)) and POSITIONS in stored:
        stored[POSITIONS] = stored[POSITIONS][skipped:]
    for older in ("cls.predictions.bias", "lm_head.bias"):
        if older in stored:
            stored[f"{heads['decoder'][0]}.bias"] = stored.pop(older)
    if made is BertMaskedLM and config.tied:
        tie(stored, f"{heads['decoder'][0]}.weight", "embeddings.word_embeddings.weight")
    return Plan(config, modules)


def deberta_plan(raw: Mapping[str, Any], made: type[nn.Module], stored: Stored) -> Plan:
    as_later_versions(stored, need(raw, "num_attention_heads"))
    drop(stored, "mask_predictions.")  # of its pretraining
    if not raw.get("position_biased_input", True):
        drop(stored, POSITIONS)
    if made is BertMaskedLM:
        refuse(raw, "legacy", True)
    return encoder_plan(raw, made, stored, config_of=deberta_config, heads=BERT_HEADS, encoder=DEBERTA)


MODELS = (Bert, BertMaskedLM, BertClassifier)
BERT_FAMILY = Family(MODELS, "bert.", partial(encoder_plan, config_of=bert_config, heads=BERT_HEADS))
ROBERTA_FAMILY = Family(
    MODELS,
    "roberta.",
    partial(encoder_plan, config_of=roberta_config, heads=ROBERTA_HEADS, unused_positions=roberta_offset),
)
DEBERTA_FAMILY = Family(MODELS, "deberta.", deberta_plan)
