"""A text and small checkpoints, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from duplex_attn.text import default_text, train_tokenizer

VOCAB = 600
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "reference.txt"
    path.write_text("\n".join(default_text().lines[:60]))
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders bert, gpt2, llama, olmo2 and t5: random weights as transformers saves them, each with a tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_tokenizer(default_text().lines[:500], VOCAB)
    torch.manual_seed(0)
    shared = {**SMALL, "vocab_size": VOCAB, "max_position_embeddings": 256}
    gpt2 = transformers.GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=2, n_positions=256, bos_token_id=0)
    models = {
        "bert": transformers.BertModel(transformers.BertConfig(**shared)),
        "gpt2": transformers.GPT2LMHeadModel(gpt2),
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared, num_key_value_heads=1)),
    }
    olmo2 = transformers.Olmo2Config(**shared, num_key_value_heads=1, initializer_range=0.3)
    models["olmo2"] = transformers.Olmo2ForCausalLM(olmo2)  # none of the families of reference models
    t5 = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    models["t5"] = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCAB, **t5))
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
    return folder
