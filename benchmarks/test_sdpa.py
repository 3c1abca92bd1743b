"""What calls `F.scaled_dot_product_attention`, with the package's function in its place and without."""

from __future__ import annotations

import pytest
import torch
from duplex_attn.integrations import sdpa
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .bar import Bench, faster
from .gpu.check import against

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_jagged_tensors(bench: Bench, dtype: str, is_causal: bool) -> None:
    most = 32 if bench.tiny else 512
    lengths = torch.randint(most // 16, most + 1, (16,), generator=torch.Generator().manual_seed(0)).tolist()
    parts = [bench.tensor(n, 12, 64, dtype=DTYPES[dtype], seed=seed) for seed, n in enumerate(lengths)]
    ragged = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    padded = pad_sequence(parts, batch_first=True).transpose(1, 2)
    keys = torch.arange(padded.shape[2], device=bench.device)
    seen = (keys < torch.tensor(lengths, device=bench.device)[:, None])[:, None, None]
    if is_causal:
        seen = seen & torch.ones(len(keys), len(keys), dtype=torch.bool, device=bench.device).tril()

    def in_torch(x: Tensor = padded, mask: Tensor = seen) -> Tensor:
        return torch._C._nn.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    def ours() -> Tensor:
        return sdpa.scaled_dot_product_attention(ragged, ragged, ragged, is_causal=is_causal)

    kept = seen[:, 0, 0] if not is_causal else seen[:, 0].diagonal(dim1=-2, dim2=-1)
    plain, truth = (in_torch(x).transpose(1, 2)[kept] for x in (padded, padded.double()))
    assert against(ours().transpose(1, 2).values(), truth, plain, None).passes(ours=True)
    peers = {"SDPA, padded with a mask": in_torch}
    if not is_causal:  # which torch takes on some cards alone
        peers["SDPA, jagged"] = lambda: torch._C._nn.scaled_dot_product_attention(ragged, ragged, ragged)
    padding = 1 - sum(lengths) / (16 * max(lengths))
    name = f"{dtype} {'causal' if is_causal else 'full'}, 16 sequences up to 512, {padding:.0%} padding"
    bench.compare("jagged tensors", name, faster(2.5), ours, peers, dtype=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_of_an_encoder(bench: Bench, dtype: str) -> None:
    torch.manual_seed(0)
    width, heads = (64, 2) if bench.tiny else (768, 12)
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(bench.device, DTYPES[dtype])
    x = bench.tensor(4, 32 if bench.tiny else 512, width, dtype=DTYPES[dtype], seed=0)

    def step(given: Tensor = x) -> Tensor:
        """A step's gradient of the first layer's queries, keys and values."""
        encoder.zero_grad(set_to_none=True)
        encoder(given).square().mean().backward()
        return encoder.layers[0].self_attn.in_proj_weight.grad

    def ours() -> Tensor:
        sdpa.register()
        try:
            return step()
        finally:
            sdpa.unregister()

    found, plain = ours(), step()
    encoder.double()
    truth = step(x.double())
    encoder.to(DTYPES[dtype])
    assert against(found, truth, plain, None).passes(ours=True)
    bench.compare(
        "nn.TransformerEncoder of base size, two layers, forward and backward", f"{dtype} 4 x 512", faster(1.0),
        ours, {"SDPA": step}, dtype=DTYPES[dtype],
    )  # fmt: skip
