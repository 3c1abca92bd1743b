"""BERT, and RoBERTa with XLM-R."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..modules.bert import Bert, BertClassifier, BertConfig, BertMaskedLM
from .family import Family, Modules, Plan, Stored, activation, drop, need, refuse, tie

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


def encoder_plan(
    raw: Mapping[str, Any],
    made: type[nn.Module],
    stored: Stored,
    *,
    config_of: Callable[[Mapping[str, Any]], BertConfig],
    heads: Modules,
    unused_positions: Callable[[Mapping[str, Any]], int] = lambda raw: 0,  # rows in front of the table
) -> Plan:
    config, modules = config_of(raw), BERT
    if made is not BertClassifier:
        config = replace(config, pooler="pooler.dense.weight" in stored)
    if made is Bert:
        drop(stored, "cls.", "classifier.", "lm_head.")
    else:
        modules = {f"bert.{ours}": theirs for ours, theirs in BERT.items()} | heads
        if made is BertClassifier and modules["bert.pooler"] != BERT["pooler"]:  # a head with a layer in its place
            drop(stored, "pooler.")
    if (skipped := unused_positions(raw)) and POSITIONS in stored:
        stored[POSITIONS] = stored[POSITIONS][skipped:]
    for older in ("cls.predictions.bias", "lm_head.bias"):
        if older in stored:
            stored[f"{heads['decoder'][0]}.bias"] = stored.pop(older)
    if made is BertMaskedLM and config.tied:
        tie(stored, f"{heads['decoder'][0]}.weight", "embeddings.word_embeddings.weight")
    return Plan(config, modules)


MODELS = (Bert, BertMaskedLM, BertClassifier)
BERT_FAMILY = Family(MODELS, "bert.", partial(encoder_plan, config_of=bert_config, heads=BERT_HEADS))
ROBERTA_FAMILY = Family(
    MODELS,
    "roberta.",
    partial(encoder_plan, config_of=roberta_config, heads=ROBERTA_HEADS, unused_positions=roberta_offset),
)
