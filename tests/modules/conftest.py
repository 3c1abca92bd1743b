"""Small random Hugging Face models, saved as checkpoints: what the modules are compared with."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()


def bert_options(**changes):
    small = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
    return {**small, "intermediate_size": 80, "max_position_embeddings": 40, "initializer_range": 0.2, **changes}


def roberta_options(**changes):
    return bert_options(type_vocab_size=2, pad_token_id=0, **changes)


def deberta_options(**changes):
    terms = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    return bert_options(**{**terms, "type_vocab_size": 0, "pad_token_id": 0, **changes})


def gpt2_options(**changes):
    small = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 3, "n_positions": 40, "initializer_range": 0.2}
    return {**small, "bos_token_id": 1, "eos_token_id": 1, **changes}


def llama_options(**changes):
    small = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
    small |= {"num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 64}
    return {**small, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, **changes}


def gemma_options(**changes):
    return llama_options(**{"head_dim": 20, "query_pre_attn_scalar": 30, "sliding_window": 6, **changes})


def glm_options(**changes):
    return llama_options(**{"head_dim": 16, "pad_token_id": 0, **changes})


def t5_options(**changes):
    small = {"vocab_size": 97, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4}
    small |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "initializer_factor": 1.0}
    return {**small, "decoder_start_token_id": 0, "feed_forward_proj": "relu", **changes}


def bart_options(**changes):
    small = {"vocab_size": 97, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 40}
    small |= {f"{kind}_attention_heads": 4 for kind in ("encoder", "decoder")}
    return {**small, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "init_std": 0.2, **changes}


OPTIONS = {
    "T5": t5_options,
    "MT5": t5_options,
    "UMT5": t5_options,
    "Bart": bart_options,
    "Bert": bert_options,
    "Roberta": roberta_options,
    "XLMRoberta": roberta_options,
    "DebertaV2": deberta_options,
    "Deberta": deberta_options,
    "GPT2": gpt2_options,
    "Llama": llama_options,
    "Mistral": llama_options,
    "Qwen2": llama_options,
    "Qwen3": llama_options,
    "Phi3": llama_options,
    "Glm4": glm_options,
    "Glm": glm_options,
    "Gemma2": gemma_options,
    "Gemma3": gemma_options,
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


@pytest.fixture
def save(tmp_path):
    """save("BertModel", **options) -> the transformers model in eval mode (eager) and its checkpoint directory."""

    def make(architecture, dtype=torch.float32, **changes):
        family = next(name for name in OPTIONS if architecture.startswith(name))
        torch.manual_seed(len(architecture))
        config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(
            **OPTIONS[family](**copy.deepcopy(changes))
        )
        config._attn_implementation = "eager"
        model = getattr(transformers, architecture)(config).eval().to(dtype)
        for name, parameter in model.named_parameters():  # biases and norms are 0 and 1 until trained
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name.lower() or "ln" in name else 0.0, std=0.2)
        model.save_pretrained(tmp_path / architecture, safe_serialization=True)
        return model, tmp_path / architecture

    return make


@pytest.fixture
def ragged():
    """ids (B, S) in 3 .. 96, their lengths, one of them full and one of 1, and the mask transformers takes."""
    torch.manual_seed(1)
    seqlens = torch.tensor([7, 19, 1, 12, 19], dtype=torch.int32)
    attention_mask = (torch.arange(19) < seqlens[:, None]).long()
    ids = torch.randint(3, 97, (5, 19)) * attention_mask
    return ids, seqlens, attention_mask
