"""GPT-2, and Llama with its relatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..modules.gpt import GPT, GPTConfig
from .family import Family, Modules, Plan, Stored, activation, need, refuse, tie
from .ropes import rope_options, rope_scaling

GPT2: Modules = {
    "word": ("wte",),
    "position": ("wpe",),
    "layers.{}.attention_norm": ("h.{}.ln_1",),
    "layers.{}.qkv": ("h.{}.attn.c_attn",),
    "layers.{}.out": ("h.{}.attn.c_proj",),
    "layers.{}.norm": ("h.{}.ln_2",),
    "layers.{}.up": ("h.{}.mlp.c_fc",),
    "layers.{}.down": ("h.{}.mlp.c_proj",),
    "norm": ("ln_f",),
    "head": ("lm_head",),
}
LLAMA: Modules = {
    "word": ("embed_tokens",),
    "layers.{}.attention_norm": ("layers.{}.input_layernorm",),
    "layers.{}.qkv": tuple(f"layers.{{}}.self_attn.{name}_proj" for name in "qkv"),
    "layers.{}.out": ("layers.{}.self_attn.o_proj",),
    "layers.{}.norm": ("layers.{}.post_attention_layernorm",),
    "layers.{}.up": ("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"),
    "layers.{}.down": ("layers.{}.mlp.down_proj",),
    "norm": ("norm",),
    "head": ("lm_head",),
}
HEAD_NORMS: Modules = {f"layers.{{}}.{name}_norm": (f"layers.{{}}.self_attn.{name}_norm",) for name in "qk"}
FUSED_QKV: Modules = {"layers.{}.qkv": ("layers.{}.self_attn.qkv_proj",)}
FUSED_UP: Modules = {"layers.{}.up": ("layers.{}.mlp.gate_up_proj",)}
POST_NORMS: Modules = {
    "layers.{}.attention_post_norm": ("layers.{}.post_attention_layernorm",),
    "layers.{}.norm": ("layers.{}.pre_feedforward_layernorm",),
    "layers.{}.post_norm": ("layers.{}.post_feedforward_layernorm",),
}
GLM4_POST_NORMS: Modules = {
    "layers.{}.attention_post_norm": ("layers.{}.post_self_attn_layernorm",),
    "layers.{}.post_norm": ("layers.{}.post_mlp_layernorm",),
}


def gpt2_config(raw: Mapping[str, Any]) -> GPTConfig:
    """A Hugging Face GPT-2 config.json as ours."""
    refuse(raw, "scale_attn_weights", True)
    refuse(raw, "scale_attn_by_inverse_layer_idx", False)
    refuse(raw, "add_cross_attention", False)
    hidden, heads = need(raw, "n_embd"), need(raw, "n_head")
    return GPTConfig(
        vocab_size=need(raw, "vocab_size"),
        hidden=hidden,
        layers=need(raw, "n_layer"),
        heads=heads,
        heads_kv=heads,
        head_dim=hidden // heads,
        inner=raw.get("n_inner") or 4 * hidden,
        max_positions=need(raw, "n_positions"),
        activation=activation(raw, "activation_function", "gelu_new"),
        tied=raw.get("tie_word_embeddings", True),
        eps=raw.get("layer_norm_epsilon", 1e-5),
        embedding_dropout=raw.get("embd_pdrop", 0.1),
        dropout=raw.get("resid_pdrop", 0.1),
        attention_dropout=raw.get("attn_pdrop", 0.1),
    )


def llama_config(
    raw: Mapping[str, Any],
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn"),
    partial_rotary: bool = False,
    **changes: Any,
) -> GPTConfig:
    """A Hugging Face Llama config.json as ours, with either form of its rotary options; `changes` are of its relatives.

    rope_types: that the relative has. partial_rotary: whether it heeds partial_rotary_factor.
    """
    hidden, heads = need(raw, "hidden_size"), need(raw, "num_attention_heads")
    head_dim = raw.get("head_dim") or hidden // heads
    max_positions = need(raw, "max_position_embeddings")
    rope = rope_options(raw)
    if rope["rope_type"] not in rope_types:
        expected = ", ".join(rope_types[:-1]) + f" or {rope_types[-1]}"
        raise ValueError(f"rope_type: expected {expected} in config.json, got {rope['rope_type']!r}")
    if not partial_rotary:
        refuse(rope, "partial_rotary_factor", 1.0)
    part = rope["partial_rotary_factor"]
    options: dict[str, Any] = {
        "vocab_size": need(raw, "vocab_size"),
        "hidden": hidden,
        "layers": need(raw, "num_hidden_layers"),
        "heads": heads,
        "heads_kv": raw.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "inner": need(raw, "intermediate_size"),
        "max_positions": max_positions,
        "positions": "rotary",
        "norm": "rms",
        "activation": activation(raw, "hidden_act", "silu"),
        "gated": True,
        "attention_bias": raw.get("attention_bias", False),
        "mlp_bias": raw.get("mlp_bias", False),
        "tied": raw.get("tie_word_embeddings", False),
        "eps": raw.get("rms_norm_eps", 1e-6),
        "rope_theta": rope["rope_theta"] or 10000.0,
        "rope_scaling": rope_scaling(rope, max_positions),
        "rotary_dim": None if part is None else int(head_dim * part),
        "attention_dropout": raw.get("attention_dropout", 0.0),
    }
    return GPTConfig(**options | changes)


def windows(raw: Mapping[str, Any], is_sliding: Callable[[int], bool]) -> tuple[int | None, ...]:
    """Of each layer, as layer_types has it or, before there were any, the place of the layer."""
    size = raw.get("sliding_window", 4096)
    layers = range(need(raw, "num_hidden_layers"))
    kinds = raw.get("layer_types") or ["sliding_attention" if is_sliding(n) else "full_attention" for n in layers]
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ValueError(f"layer_types: expected sliding_attention and full_attention in config.json, got {kind!r}")
    found = tuple(size if kind == "sliding_attention" else None for kind in kinds)
    return found if any(found) else ()


def mistral_config(raw: Mapping[str, Any], **changes: Any) -> GPTConfig:
    return llama_config(raw, windows=windows({**raw, "layer_types": None}, lambda layer: True), **changes)


def phi3_config(raw: Mapping[str, Any]) -> GPTConfig:
    rope = rope_options({"original_max_position_embeddings": 4096, **raw})
    if rope["rope_type"] in ("su", "yarn"):  # longrope's names of old
        rope["rope_type"] = "longrope"
    return mistral_config(
        {"sliding_window": None, "rms_norm_eps": 1e-5, **raw, "rope_parameters": rope},
        rope_types=("default", "longrope"),
        partial_rotary=True,
        dropout=raw.get("resid_pdrop", 0.0),
    )


def glm_config(raw: Mapping[str, Any], **changes: Any) -> GPTConfig:
    left_out = {"head_dim": 128, "num_key_value_heads": 2, "attention_bias": True, "rms_norm_eps": 1.5625e-7}
    return llama_config(
        {**left_out, "partial_rotary_factor": 0.5, **raw},
        partial_rotary=True,
        rope_interleaved=True,
        out_bias=False,
        mlp_bias=False,
        **changes,
    )


def glm4_config(raw: Mapping[str, Any]) -> GPTConfig:
    return glm_config(raw, post_norms=True)


def qwen2_config(raw: Mapping[str, Any]) -> GPTConfig:
    return replace(qwen3_config({"head_dim": None, **raw}), attention_bias=True, out_bias=False, head_norms=False)


def qwen3_config(raw: Mapping[str, Any]) -> GPTConfig:
    slides, first = raw.get("use_sliding_window", False), raw.get("max_window_layers", 28)
    seen = windows(raw, lambda layer: layer >= first) if slides else ()
    return llama_config({"head_dim": 128, **raw}, head_norms=True, windows=seen)


def gemma2_config(
    raw: Mapping[str, Any], every: int = 2, softcaps: tuple[float, float] = (50.0, 30.0), **changes: Any
) -> GPTConfig:
    """every: of so many layers the last has no window. softcaps: of scores and logits, where the config has none."""
    refuse(raw, "use_bidirectional_attention", False)
    shared: dict[str, Any] = {
        "norm": "rms_offset",
        "post_norms": True,
        "activation": activation(raw, "hidden_activation", "gelu_pytorch_tanh"),
        "tied": raw.get("tie_word_embeddings", True),
        "windows": windows(raw, lambda layer: (layer + 1) % every != 0),
        "scale": need(raw, "query_pre_attn_scalar") ** -0.5,
        "softcap": raw.get("attn_logit_softcapping", softcaps[0]) or 0.0,
        "logit_softcap": raw.get("final_logit_softcapping", softcaps[1]) or 0.0,
        "embedding_scale": need(raw, "hidden_size") ** 0.5,
    }
    return llama_config({"head_dim": 256, **raw}, **shared | changes)


def gemma3_config(raw: Mapping[str, Any]) -> GPTConfig:
    rope = raw.get("rope_parameters") or {}
    near = rope.get("sliding_attention") or {}
    refuse(near, "rope_type", "default")
    return gemma2_config(
        raw,
        raw.get("sliding_window_pattern") or 6,
        (0.0, 0.0),
        rope_types=("default", "linear", "llama3"),
        head_norms=True,
        rope_theta=(rope.get("full_attention") or {}).get("rope_theta") or raw.get("rope_theta") or 1000000.0,
        window_rope_theta=near.get("rope_theta") or raw.get("rope_local_base_freq") or 10000.0,
    )


def decoder_plan(
    raw: Mapping[str, Any],
    made: type[nn.Module],
    stored: Stored,
    *,
    config_of: Callable[[Mapping[str, Any]], GPTConfig],
    modules: Modules,
) -> Plan:
    config = config_of(raw)
    if config.tied:
        tie(stored, "lm_head.weight", f"{modules['word'][0]}.weight")
    return Plan(config, modules)


def relative_of_llama(config: Callable[[Mapping[str, Any]], GPTConfig], more: Modules | None = None) -> Family:
    return Family((GPT,), "model.", partial(decoder_plan, config_of=config, modules=LLAMA | (more or {})))


GPT2_FAMILY = Family(
    (GPT,), "transformer.", partial(decoder_plan, config_of=gpt2_config, modules=GPT2), transposed=True
)
