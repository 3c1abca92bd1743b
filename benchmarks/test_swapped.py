"""transformers' models after `swap`, or as reference models, against themselves before: DeBERTa's forward, and a step of training of T5's encoder."""

from __future__ import annotations

import copy

import duplex_attn as da
import pytest
import torch
from duplex_attn.checkpoint import from_tensors
from duplex_attn.modules import Bert
from duplex_attn.profile.workloads import Settings, tokenised
from duplex_attn.text import default_text
from torch import Tensor, nn

from .bar import Bench, faster
from .gpu.check import against

CHECKED = 2  # sequences
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize(
    ("shape", "loaded", "bar"), [("lines", False, 1.2), ("full", False, 1.2), ("lines", True, 2.0)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_deberta(bench: Bench, dtype: str, shape: str, loaded: bool, bar: float) -> None:
    """loaded: as the reference model, which computes no padding."""
    transformers = pytest.importorskip("transformers")
    base = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    small = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
    config = transformers.DebertaV2Config(
        vocab_size=1000, num_hidden_layers=2, relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
        **(small if bench.tiny else base),
    )  # fmt: skip
    torch.manual_seed(0)
    exact = transformers.DebertaV2Model(config).eval().to(bench.device)
    if shape == "lines":
        tokens = tokenised(Settings(default_text(), bench.device, DTYPES[dtype], "base", 16, 512, 0), None, 1000, 512)
        ids, mask = tokens.ids.to(bench.device), tokens.attention_mask.to(bench.device)
        name = f"{len(ids)} real lines, {ids.shape[1]} columns, {1 - tokens.total / ids.numel():.0%} padding"
    else:
        ids = torch.randint(1000, (4, 64 if bench.tiny else 512), device=bench.device)
        mask, name = torch.ones_like(ids), "4 x 512"
    ours, theirs = before_and_after(exact, DTYPES[dtype])
    if loaded:
        ours = from_tensors(theirs.config.to_dict(), theirs.state_dict(), Bert)

    @torch.inference_mode()
    def hidden(model: nn.Module, rows: int | None = None) -> Tensor:
        found = model(ids[:rows], attention_mask=mask[:rows])
        return found if isinstance(found, Tensor) else found.last_hidden_state

    kept = mask[:CHECKED].bool()
    found, plain, truth = (hidden(model, CHECKED)[kept] for model in (ours, theirs, exact.double()))
    assert against(found, truth, plain, None).passes(ours=True)
    bench.compare(
        "DeBERTa-base, two layers" + loaded * ", reference model", f"{dtype} {name}", faster(bar),
        lambda: hidden(ours), {"HF eager": lambda: hidden(theirs)}, dtype=DTYPES[dtype],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_t5_training(bench: Bench, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    small = (
        {"d_model": 64, "d_ff": 96, "num_heads": 2} if bench.tiny else {"d_model": 768, "d_ff": 2048, "num_heads": 12}
    )
    config = transformers.T5Config(
        vocab_size=1000, d_kv=64, num_layers=2, dropout_rate=0.0, attn_implementation="sdpa", **small
    )
    torch.manual_seed(0)
    exact = transformers.T5EncoderModel(config).to(bench.device)
    ids = torch.randint(1000, (1, 64 if bench.tiny else 1024), device=bench.device)
    ours, theirs = before_and_after(exact, DTYPES[dtype])

    def step(model: nn.Module) -> Tensor:
        """A step's gradient of the bias by distance, to which every layer adds."""
        model.zero_grad(set_to_none=True)
        model(ids).last_hidden_state.square().mean().backward()
        return model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad

    found, plain, truth = (step(model) for model in (ours, theirs, exact.double()))
    assert against(found, truth, plain, None).passes(ours=True)
    bench.compare(
        "T5-base, two layers, forward and backward", f"{dtype} 1 x 1024", faster(1.2),
        lambda: step(ours), {"HF sdpa": lambda: step(theirs)}, dtype=DTYPES[dtype],
    )  # fmt: skip


def before_and_after(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Copies with our attention and with theirs."""
    theirs = copy.deepcopy(model).to(dtype)
    ours = copy.deepcopy(theirs)
    da.swap(ours)
    return ours, theirs
