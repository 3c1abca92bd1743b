"""How Hugging Face stores the models that `checkpoint.py` loads: what its config.json says as ours, and the names of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .modules.bert import Bert, BertClassifier, BertConfig, BertMaskedLM
from .modules.gpt import GPT, GPTConfig
from .modules.rope import RopeScaling

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
ARCHITECTURES: dict[str, type[nn.Module]] = {
    "BertModel": Bert,
    "BertForMaskedLM": BertMaskedLM,
    "BertForPreTraining": BertMaskedLM,
    "BertForSequenceClassification": BertClassifier,
    **{f"{kind}Model": Bert for kind in ("Roberta", "XLMRoberta")},
    **{f"{kind}ForMaskedLM": BertMaskedLM for kind in ("Roberta", "XLMRoberta")},
    **{f"{kind}ForSequenceClassification": BertClassifier for kind in ("Roberta", "XLMRoberta")},
    "GPT2Model": GPT,
    "GPT2LMHeadModel": GPT,
    "LlamaForCausalLM": GPT,
    "MistralForCausalLM": GPT,
    "Qwen2ForCausalLM": GPT,
    "Qwen3ForCausalLM": GPT,
    "Phi3ForCausalLM": GPT,
    "Gemma2ForCausalLM": GPT,
    "Gemma3ForCausalLM": GPT,
}

# Our module -> the stored modules whose weights, one below the other, make up its own. {} is the layer.
Modules = dict[str, tuple[str, ...]]
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
FUSED: Modules = {
    "layers.{}.qkv": ("layers.{}.self_attn.qkv_proj",),
    "layers.{}.up": ("layers.{}.mlp.gate_up_proj",),
}
POST_NORMS: Modules = {
    "layers.{}.attention_post_norm": ("layers.{}.post_attention_layernorm",),
    "layers.{}.norm": ("layers.{}.pre_feedforward_layernorm",),
    "layers.{}.post_norm": ("layers.{}.post_feedforward_layernorm",),
}
# Stored, but no weight of ours: buffers of older versions, and next-sentence prediction, which no head here computes.
UNUSED = re.compile(
    r"embeddings\.position_ids|cls\.seq_relationship\..*|h\.\d+\.attn\.(bias|masked_bias)|.*rotary_emb\.inv_freq"
)


def need(raw: Mapping[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        raise ValueError(f"{name}: expected it in config.json, found nothing")
    return raw[name]


def refuse(raw: Mapping[str, Any], name: str, supported: Any) -> None:
    """Stops at an option that these models do not compute."""
    if raw.get(name) not in (None, supported):
        raise ValueError(f"{name}: expected {supported!r} in config.json, got {raw[name]!r}")


def activation(raw: Mapping[str, Any], name: str, default: str) -> str:
    given = raw.get(name) or default
    if given not in ACTIVATIONS:
        raise ValueError(f"{name}: expected one of {', '.join(ACTIVATIONS)} in config.json, got {given!r}")
    return ACTIVATIONS[given]


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


def rope_scaling(rope: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    """Rotary options of either form as ours."""
    refuse(rope, "partial_rotary_factor", 1.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope_type: expected default, linear or llama3 in config.json, got {kind!r}")
    return RopeScaling(
        kind,
        need(rope, "factor"),
        rope.get("low_freq_factor", 1.0),
        rope.get("high_freq_factor", 4.0),
        rope.get("original_max_position_embeddings") or max_positions,
    )


def llama_config(raw: Mapping[str, Any], **changes: Any) -> GPTConfig:
    """A Hugging Face Llama config.json as ours, with either form of its rotary options; `changes` are of its relatives."""
    hidden, heads = need(raw, "hidden_size"), need(raw, "num_attention_heads")
    max_positions = need(raw, "max_position_embeddings")
    refuse(raw, "partial_rotary_factor", 1.0)
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})  # transformers >= 5, and before
    rope = rope.get("full_attention", rope)
    options: dict[str, Any] = {
        "vocab_size": need(raw, "vocab_size"),
        "hidden": hidden,
        "layers": need(raw, "num_hidden_layers"),
        "heads": heads,
        "heads_kv": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or hidden // heads,
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
        "rope_theta": rope.get("rope_theta") or raw.get("rope_theta") or 10000.0,
        "rope_scaling": rope_scaling(rope, max_positions),
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


def mistral_config(raw: Mapping[str, Any]) -> GPTConfig:
    return llama_config(raw, windows=windows({**raw, "layer_types": None}, lambda layer: True))


def phi3_config(raw: Mapping[str, Any]) -> GPTConfig:
    return mistral_config({"sliding_window": None, **raw})


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
        head_norms=True,
        rope_theta=(rope.get("full_attention") or {}).get("rope_theta") or raw.get("rope_theta") or 1000000.0,
        window_rope_theta=near.get("rope_theta") or raw.get("rope_local_base_freq") or 10000.0,
    )


@dataclass(frozen=True)
class Family:
    """How one model_type is stored: what reads its config, and the names of its tensors."""

    config: Callable[[Mapping[str, Any]], BertConfig] | Callable[[Mapping[str, Any]], GPTConfig]
    modules: Modules
    prefix: str  # before the names of all but the heads, where the checkpoint has a head
    word: str
    head: str  # tied to `word` or stored
    transposed: bool = False  # linear weights of layers are (in, out)
    heads: Modules = field(default_factory=dict)  # of encoders
    unused_positions: Callable[[Mapping[str, Any]], int] = lambda raw: 0  # rows in front of the table


ROBERTA = Family(
    roberta_config, BERT, "roberta.", "embeddings.word_embeddings.weight", "lm_head.decoder.weight",
    heads=ROBERTA_HEADS, unused_positions=roberta_offset,
)  # fmt: skip


def relative_of_llama(config: Callable[[Mapping[str, Any]], GPTConfig], more: Modules | None = None) -> Family:
    return Family(config, LLAMA | (more or {}), "model.", "embed_tokens.weight", "lm_head.weight")


FAMILIES = {
    "bert": Family(
        bert_config,
        BERT,
        "bert.",
        "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.weight",
        heads=BERT_HEADS,
    ),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "gpt2": Family(gpt2_config, GPT2, "transformer.", "wte.weight", "lm_head.weight", transposed=True),
    "llama": relative_of_llama(llama_config),
    "mistral": relative_of_llama(mistral_config),
    "qwen2": relative_of_llama(qwen2_config),
    "qwen3": relative_of_llama(qwen3_config, HEAD_NORMS),
    "phi3": relative_of_llama(phi3_config, FUSED),
    "gemma2": relative_of_llama(gemma2_config, POST_NORMS),
    "gemma3_text": relative_of_llama(gemma3_config, POST_NORMS | HEAD_NORMS),
}
