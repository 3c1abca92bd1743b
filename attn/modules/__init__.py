"""Reference models: one readable file each, on `duplex_attn`'s attention."""

from .bert import Bert, BertClassifier, BertConfig, BertMaskedLM
from .gpt import GPT, GPTConfig
from .kv_cache import KVCache
from .rope_scaling import RopeScaling
from .seq2seq import Encoder, Seq2Seq, Seq2SeqConfig

__all__ = [
    "GPT", "Bert", "BertClassifier", "BertConfig", "BertMaskedLM", "Encoder", "GPTConfig", "KVCache", "RopeScaling",
    "Seq2Seq", "Seq2SeqConfig",
]  # fmt: skip
