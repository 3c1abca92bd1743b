"""Small transformers models with random weights, large enough for a wrong mask to show."""

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from duplex_attn.integrations import transformers as integration

_BERT = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=0,
    max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
)  # fmt: skip
_LLAMA = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    bos_token_id=1, eos_token_id=None, intermediate_size=48, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
_GPT2 = dict(
    vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.3,
)  # fmt: skip
_T5 = dict(
    vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0,
    relative_attention_num_buckets=8, relative_attention_max_distance=16, decoder_start_token_id=0,
    eos_token_id=None, initializer_factor=1.0,
)  # fmt: skip

MODELS = {
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _BERT | {"pad_token_id": 1}),
    "bert_decoder": ("BertLMHeadModel", "BertConfig", _BERT | {"is_decoder": True, "eos_token_id": None}),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        _BERT | {"local_attention": 6, "global_attn_every_n_layers": 2, "initializer_cutoff_factor": 3.0},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA | {"sliding_window": 5}),
    "gemma2": (  # alternating window and full layers, so a dict of masks; softcap
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _LLAMA | {"sliding_window": 5, "head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20},
    ),
    "gpt_oss": (  # attention sinks
        "GptOssForCausalLM",
        "GptOssConfig",
        _LLAMA | {"sliding_window": 5, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "bert_both_ways": ("BertLMHeadModel", "BertConfig", _BERT | {"eos_token_id": None}),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "initializer_range": 0.3},
    ),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "initializer_range": 0.3},
    ),
    "longformer": ("LongformerForMaskedLM", "LongformerConfig", _BERT | {"attention_window": 4}),
    "canine": (
        "CanineForTokenClassification",
        "CanineConfig",
        _BERT | {"num_hash_buckets": 64, "local_transformer_stride": 4, "downsampling_rate": 2},
    ),
    "bigbird_pegasus": (
        "BigBirdPegasusForConditionalGeneration",
        "BigBirdPegasusConfig",
        dict(
            vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, dropout=0.0,
            decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
            attention_type="original_full", init_std=0.3, pad_token_id=0,
        ),
    ),
    "deepseek_v4": (  # keys of which no padding mask knows, one for each 4 tokens
        "DeepseekV4ForCausalLM",
        "DeepseekV4Config",
        _LLAMA | dict(
            num_key_value_heads=1, head_dim=16, q_lora_rank=16, o_groups=2, o_lora_rank=16, n_routed_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=48, index_n_heads=2, index_head_dim=16, index_topk=2,
            sliding_window=5, layer_types=["compressed_sparse_attention"] * 2,
        ),
    ),
    "deepseek_v3": (  # keeps what keys and values are made of
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _LLAMA | dict(
            num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
            n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=48, first_k_dense_replace=1,
        ),
    ),
    "gemma3n": (  # the last layers have the keys of others
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        _LLAMA | dict(
            num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3, num_kv_shared_layers=2, head_dim=8,
            sliding_window=5, laurel_rank=8, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 6,
            hidden_size_per_layer_input=8, vocab_size_per_layer_input=97,
        ),
    ),
    "jetmoe": (  # repeats heads behind the cache
        "JetMoeForCausalLM",
        "JetMoeConfig",
        _LLAMA | dict(num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
    ),
    "roberta_decoder": ("RobertaForCausalLM", "RobertaConfig", _BERT | {"pad_token_id": 1, "is_decoder": True}),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", _LLAMA | {"layer_types": ["conv", "full_attention"]}),
    "gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT2),
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        _LLAMA | {"head_dim": 8, "global_head_dim": 16, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8},
    ),
    "git": (
        "GitForCausalLM",
        "GitConfig",
        _BERT | {"vision_config": {"hidden_size": 24, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def _registered() -> None:
    integration.register()


@pytest.fixture
def build() -> Callable:
    """build("llama", sliding_window=...) -> the model in eval mode; the same weights every time."""

    def build(name: str, implementation: str = "eager", **changes):
        model, config, sizes = MODELS[name]
        torch.manual_seed(0)
        config = getattr(transformers, config)(**(sizes | changes), attn_implementation=implementation)
        return getattr(transformers, model)(config).eval()

    return build


@pytest.fixture
def masks_seen(monkeypatch) -> Iterator[list]:
    """Every attention_mask that reaches the attention entry, in order."""
    seen: list = []
    attention = integration.attention

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return attention(module, query, key, value, attention_mask, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(integration, "attention", spy)
        integration.register()
        yield seen
    integration.register()
