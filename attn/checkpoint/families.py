"""Which model_type of a config.json is stored in which way, and which of its architectures is which model here."""

from __future__ import annotations

from torch import nn

from ..modules.bert import Bert, BertClassifier, BertMaskedLM
from ..modules.gpt import GPT
from ..modules.seq2seq import Encoder, Seq2Seq
from .decoders import (
    FUSED_QKV,
    FUSED_UP,
    GLM4_POST_NORMS,
    GPT2_FAMILY,
    HEAD_NORMS,
    POST_NORMS,
    gemma2_config,
    gemma3_config,
    glm4_config,
    glm_config,
    llama_config,
    mistral_config,
    phi3_config,
    qwen2_config,
    qwen3_config,
    relative_of_llama,
)
from .encoders import BERT_FAMILY, DEBERTA_FAMILY, ROBERTA_FAMILY
from .family import Family
from .pairs import BART_FAMILY, T5_FAMILY

LIKE_BERT = ("Bert", "Roberta", "XLMRoberta", "Deberta", "DebertaV2")
ARCHITECTURES: dict[str, type[nn.Module]] = {
    **{f"{kind}Model": Bert for kind in LIKE_BERT},
    **{f"{kind}ForMaskedLM": BertMaskedLM for kind in LIKE_BERT},
    **{f"{kind}ForSequenceClassification": BertClassifier for kind in LIKE_BERT},
    "BertForPreTraining": BertMaskedLM,
    "GPT2Model": GPT,
    "GPT2LMHeadModel": GPT,
    "LlamaForCausalLM": GPT,
    "MistralForCausalLM": GPT,
    "Qwen2ForCausalLM": GPT,
    "Qwen3ForCausalLM": GPT,
    "Phi3ForCausalLM": GPT,
    "GlmForCausalLM": GPT,
    "Glm4ForCausalLM": GPT,
    "Gemma2ForCausalLM": GPT,
    "Gemma3ForCausalLM": GPT,
    **{f"{kind}ForConditionalGeneration": Seq2Seq for kind in ("T5", "MT5", "UMT5", "Bart")},
    **{f"{kind}Model": Seq2Seq for kind in ("T5", "MT5", "UMT5", "Bart")},
    "T5WithLMHeadModel": Seq2Seq,
    **{f"{kind}EncoderModel": Encoder for kind in ("T5", "MT5", "UMT5")},
}

FAMILIES: dict[str, Family] = {
    "bert": BERT_FAMILY,
    "roberta": ROBERTA_FAMILY,
    "xlm-roberta": ROBERTA_FAMILY,
    "deberta": DEBERTA_FAMILY,
    "deberta-v2": DEBERTA_FAMILY,
    "gpt2": GPT2_FAMILY,
    "llama": relative_of_llama(llama_config),
    "mistral": relative_of_llama(mistral_config),
    "qwen2": relative_of_llama(qwen2_config),
    "qwen3": relative_of_llama(qwen3_config, HEAD_NORMS),
    "phi3": relative_of_llama(phi3_config, FUSED_QKV | FUSED_UP),
    "glm": relative_of_llama(glm_config, FUSED_UP),
    "glm4": relative_of_llama(glm4_config, FUSED_UP | GLM4_POST_NORMS),
    "gemma2": relative_of_llama(gemma2_config, POST_NORMS),
    "gemma3_text": relative_of_llama(gemma3_config, POST_NORMS | HEAD_NORMS),
    "t5": T5_FAMILY,
    "mt5": T5_FAMILY,
    "umt5": T5_FAMILY,
    "bart": BART_FAMILY,
}
