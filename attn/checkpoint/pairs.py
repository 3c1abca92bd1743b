"""T5 with mT5, Flan-T5 and UMT5, and BART: encoders with decoders, and T5's encoders alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..modules.seq2seq import Encoder, Seq2Seq, Seq2SeqConfig
from .family import Family, Modules, Plan, Stored, activation, below, drop, need, refuse

T5_OF: dict[str, Modules] = {
    kind: {
        "distances.{}": (f"{kind}.block.{{}}.layer.0.SelfAttention.relative_attention_bias",),
        "layers.{}.qkv": tuple(f"{kind}.block.{{}}.layer.0.SelfAttention.{name}" for name in "qkv"),
        "layers.{}.out": (f"{kind}.block.{{}}.layer.0.SelfAttention.o",),
        "layers.{}.attention_norm": (f"{kind}.block.{{}}.layer.0.layer_norm",),
        "norm": (f"{kind}.final_layer_norm",),
    }
    for kind in ("encoder", "decoder")
}
T5_SOURCE: Modules = {
    "layers.{}.source_q": ("decoder.block.{}.layer.1.EncDecAttention.q",),
    "layers.{}.source_kv": tuple(f"decoder.block.{{}}.layer.1.EncDecAttention.{name}" for name in "kv"),
    "layers.{}.source_out": ("decoder.block.{}.layer.1.EncDecAttention.o",),
    "layers.{}.source_norm": ("decoder.block.{}.layer.1.layer_norm",),
}
BART_OF: dict[str, Modules] = {
    kind: {
        "position": (f"{kind}.embed_positions",),
        "embedding_norm": (f"{kind}.layernorm_embedding",),
        "layers.{}.qkv": tuple(f"{kind}.layers.{{}}.self_attn.{name}_proj" for name in "qkv"),
        "layers.{}.out": (f"{kind}.layers.{{}}.self_attn.out_proj",),
        "layers.{}.attention_norm": (f"{kind}.layers.{{}}.self_attn_layer_norm",),
        "layers.{}.up": (f"{kind}.layers.{{}}.fc1",),
        "layers.{}.down": (f"{kind}.layers.{{}}.fc2",),
        "layers.{}.norm": (f"{kind}.layers.{{}}.final_layer_norm",),
    }
    for kind in ("encoder", "decoder")
}
BART_SOURCE: Modules = {
    "layers.{}.source_q": ("decoder.layers.{}.encoder_attn.q_proj",),
    "layers.{}.source_kv": tuple(f"decoder.layers.{{}}.encoder_attn.{name}_proj" for name in "kv"),
    "layers.{}.source_out": ("decoder.layers.{}.encoder_attn.out_proj",),
    "layers.{}.source_norm": ("decoder.layers.{}.encoder_attn_layer_norm",),
}
BART_OFFSET = 2  # rows in front of the tables of positions
WORD, HEAD = "shared.weight", "lm_head.weight"


def start_token(raw: Mapping[str, Any], default: int) -> int:
    given = raw.get("decoder_start_token_id")
    token = default if given is None else given
    if not isinstance(token, int) or not 0 <= token < need(raw, "vocab_size"):
        raise ValueError(f"decoder_start_token_id: expected an id below vocab_size in config.json, got {token!r}")
    return token


def t5_config(raw: Mapping[str, Any]) -> Seq2SeqConfig:
    """A config.json of T5, mT5 or UMT5 as ours."""
    kind, _, name = (raw.get("feed_forward_proj") or "relu").rpartition("-")
    if kind not in ("", "gated"):
        raise ValueError(f"feed_forward_proj: expected a name or gated-name, got {raw['feed_forward_proj']!r}")
    hidden, layers = need(raw, "d_model"), need(raw, "num_layers")
    # Newer versions tie every checkpoint and say so of its logits; older ones scaled those of tied ones. mT5 never does.
    scaled = raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings") is not False)
    scaled = scaled and raw.get("model_type") != "mt5"
    dropout = raw.get("dropout_rate", 0.1)
    return Seq2SeqConfig(
        vocab_size=need(raw, "vocab_size"),
        hidden=hidden,
        layers=layers,
        decoder_layers=raw.get("num_decoder_layers") or layers,
        heads=need(raw, "num_heads"),
        head_dim=need(raw, "d_kv"),
        inner=need(raw, "d_ff"),
        buckets=raw.get("relative_attention_num_buckets", 32),
        max_distance=raw.get("relative_attention_max_distance", 128),
        biased_layers="each" if raw.get("model_type") == "umt5" else "first",
        activation="gelu_tanh"
        if (kind, name) == ("gated", "gelu")
        else activation({"feed_forward_proj": name}, "feed_forward_proj", name),
        gated=kind == "gated",
        logit_scale=hidden**-0.5 if scaled else 1.0,
        start_token=start_token(raw, raw.get("pad_token_id") or 0),
        eps=raw.get("layer_norm_epsilon", 1e-6),
        dropout=dropout,
        attention_dropout=dropout,
        inner_dropout=dropout,
        final_dropout=dropout,
    )


def t5_plan(raw: Mapping[str, Any], made: type[nn.Module], stored: Stored) -> Plan:
    config = t5_config(raw)
    feed = {"up": ("wi_0", "wi_1") if config.gated else ("wi",), "down": ("wo",)}

    def stack(kind: str, at: int) -> Modules:
        found = dict(T5_OF[kind])
        for ours, names in feed.items():
            found[f"layers.{{}}.{ours}"] = tuple(
                f"{kind}.block.{{}}.layer.{at}.DenseReluDense.{name}" for name in names
            )
        found["layers.{}.norm"] = (f"{kind}.block.{{}}.layer.{at}.layer_norm",)
        return found

    return pair_plan(config, made, stored, stack("encoder", 1), stack("decoder", 2) | T5_SOURCE)


def bart_config(raw: Mapping[str, Any]) -> Seq2SeqConfig:
    hidden, heads = need(raw, "d_model"), need(raw, "encoder_attention_heads")
    refuse(raw, "decoder_attention_heads", heads)
    for older in ("add_final_layer_norm", "normalize_before"):
        refuse(raw, older, False)
    refuse(raw, "normalize_embedding", True)
    refuse(raw, "static_position_embeddings", False)
    return Seq2SeqConfig.bart(
        vocab_size=need(raw, "vocab_size"),
        hidden=hidden,
        layers=need(raw, "encoder_layers"),
        decoder_layers=need(raw, "decoder_layers"),
        heads=heads,
        head_dim=hidden // heads,
        inner=need(raw, "encoder_ffn_dim"),
        decoder_inner=need(raw, "decoder_ffn_dim"),
        max_positions=need(raw, "max_position_embeddings"),
        activation=activation(raw, "activation_function", "gelu"),
        embedding_scale=hidden**0.5 if raw.get("scale_embedding") else 1.0,
        start_token=start_token(raw, 2),
        dropout=raw.get("dropout", 0.1),
        attention_dropout=raw.get("attention_dropout", 0.0),
        inner_dropout=raw.get("activation_dropout", 0.0),
    )


def bart_plan(raw: Mapping[str, Any], made: type[nn.Module], stored: Stored) -> Plan:
    for kind in BART_OF:
        if (name := f"{kind}.embed_positions.weight") in stored:
            stored[name] = stored[name][BART_OFFSET:]
    config = bart_config(raw)
    bias = stored.pop("final_logits_bias", None)
    if bias is not None:
        stored["lm_head.bias"] = bias.flatten()
    config = replace(config, head_bias=bias is not None)
    return pair_plan(config, made, stored, BART_OF["encoder"], BART_OF["decoder"] | BART_SOURCE)


def pair_plan(config: Seq2SeqConfig, made: type[nn.Module], stored: Stored, encoder: Modules, decoder: Modules) -> Plan:
    """Both stacks read one embedding, of which a checkpoint may hold copies; the head's matrix is it where no other is stored."""
    for copy in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        if (weight := stored.pop(copy, None)) is not None and not stored.setdefault(WORD, weight).equal(weight):
            raise ValueError(f"{copy}: expected {WORD}, got another")
    if made is Encoder:
        drop(stored, "decoder.", "lm_head.")
        return Plan(config, {"word": ("shared",)} | below("stack", encoder))
    tied = WORD in stored and stored.setdefault(HEAD, stored[WORD]).equal(stored[WORD])
    modules: Modules = {"encoder.word": ("shared",), "head": ("lm_head",)}
    return Plan(replace(config, tied=tied), modules | below("encoder.stack", encoder) | below("decoder", decoder))


MODELS = (Seq2Seq, Encoder)
T5_FAMILY = Family(MODELS, "", t5_plan)
BART_FAMILY = Family(MODELS, "model.", bart_plan)
