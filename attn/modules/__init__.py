"""Reference models: one readable file each, on `duplex_attn`'s attention."""

from .bert import Bert, BertClassifier, BertConfig, BertMaskedLM
from .gpt import GPT, GPTConfig
from .kv_cache import KVCache
from .rope import RopeScaling

__all__ = ["GPT", "Bert", "BertClassifier", "BertConfig", "BertMaskedLM", "GPTConfig", "KVCache", "RopeScaling"]
