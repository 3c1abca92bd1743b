"""BERT end to end on real lines: unpadded here, padded in Hugging Face's BertModel with sdpa, on the same weights."""

from __future__ import annotations

import pytest
import torch
from duplex_attn.checkpoint import from_tensors
from duplex_attn.modules import Bert, BertConfig
from duplex_attn.profile.workloads import SIZES, Settings, tokenised
from duplex_attn.text import default_text
from torch import Tensor

from .bar import Bench, faster
from .gpu.check import against

CHECKED_LINES = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
def test_bert(bench: Bench, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = SIZES["tiny"][0] if bench.tiny else BertConfig.base()
    torch.manual_seed(0)
    theirs = transformers.BertModel(hugging_face(config, transformers), add_pooling_layer=False).eval()
    theirs = theirs.to(bench.device, DTYPES[dtype])
    model = from_tensors(theirs.config.to_dict(), theirs.state_dict(), Bert)
    settings = Settings(default_text(), bench.device, DTYPES[dtype], "base", 16, config.max_positions, 0)
    tokens = tokenised(settings, None, config.vocab_size, config.max_positions)
    ids, seqlens = tokens.ids.to(bench.device), tokens.seqlens.to(bench.device)
    attention_mask = tokens.attention_mask.to(bench.device)

    @torch.inference_mode()
    def ours() -> Tensor:
        return model(ids, seqlens=seqlens)

    @torch.inference_mode()
    def padded() -> Tensor:
        return theirs(ids, attention_mask=attention_mask).last_hidden_state

    kept = attention_mask[:CHECKED_LINES].bool()
    found, peer = ours()[:CHECKED_LINES][kept], padded()[:CHECKED_LINES][kept]
    exact = exact_hidden(theirs, ids[:CHECKED_LINES], attention_mask[:CHECKED_LINES])[kept]
    assert against(found, exact, peer, None).passes(ours=True)
    padding = 1 - tokens.total / ids.numel()
    name = f"{dtype} {ids.shape[0]} real lines, {ids.shape[1]} columns, {padding:.0%} padding"
    facts = {"text": settings.text.name, "tokens": tokens.total, "padding": padding}
    bench.compare("BERT-base end to end", name, faster(1.5), ours, {"HF sdpa": padded}, dtype=DTYPES[dtype], **facts)


def hugging_face(config: BertConfig, transformers):
    return transformers.BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.inner,
        max_position_embeddings=config.max_positions,
        attn_implementation="sdpa",
    )


@torch.inference_mode()
def exact_hidden(model, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Their model's hidden states in float64, by its own eager formula; the model is as before afterwards."""
    dtype = model.dtype
    model.double().set_attn_implementation("eager")
    hidden = model(ids, attention_mask=attention_mask).last_hidden_state
    model.to(dtype).set_attn_implementation("sdpa")
    return hidden
