"""DeBERTa-v3-base end to end: transformers' model after `swap` against itself, which computes attention in plain PyTorch."""

from __future__ import annotations

import copy

import duplex_attn as da
import pytest
import torch
from duplex_attn.profile.workloads import Settings, tokenised
from duplex_attn.text import default_text
from torch import Tensor

from .bar import Bench, faster
from .gpu.check import against

CHECKED_LINES = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("shape", ["lines", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_deberta(bench: Bench, dtype: str, shape: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        vocab_size=1000, relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
        **({"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96} if bench.tiny else {}),
    )  # fmt: skip
    theirs = transformers.DebertaV2Model(config).eval().to(bench.device)
    if shape == "lines":
        settings = Settings(default_text(), bench.device, DTYPES[dtype], "base", 16, 512, 0)
        tokens = tokenised(settings, None, config.vocab_size, 512)
        ids, mask = tokens.ids.to(bench.device), tokens.attention_mask.to(bench.device)
        name = f"{len(ids)} real lines, {ids.shape[1]} columns, {1 - tokens.total / ids.numel():.0%} padding"
    else:
        ids = torch.randint(1000, (4, 64 if bench.tiny else 512), device=bench.device)
        mask = torch.ones_like(ids)
        name = f"{ids.shape[0]} x {ids.shape[1]}"

    @torch.inference_mode()
    def hidden(model: torch.nn.Module, rows: int = len(ids)) -> Tensor:
        return model(ids[:rows], attention_mask=mask[:rows]).last_hidden_state

    kept = mask[:CHECKED_LINES].bool()
    exact = hidden(copy.deepcopy(theirs).double(), CHECKED_LINES)[kept]
    theirs = theirs.to(DTYPES[dtype])
    ours = copy.deepcopy(theirs)
    da.swap(ours)
    found, peer = (hidden(model, CHECKED_LINES)[kept] for model in (ours, theirs))
    assert against(found, exact, peer, None).passes(ours=True)
    bench.compare(
        "DeBERTa-base end to end", f"{dtype} {name}", faster(1.2), lambda: hidden(ours), {"HF eager": lambda: hidden(theirs)},
        dtype=DTYPES[dtype],
    )  # fmt: skip
