"""A step of generation of a Llama of transformers: its keys in pages, against its own attention with its own cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from duplex_attn.modules import GPTConfig
from torch import Tensor

from .bar import Bench, faster
from .gpu.check import against

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXTS, LENGTH = 4, 2048
CHECKED = 40  # tokens of the texts whose logits are compared


def llama(tiny: bool) -> Any:
    """Of SmolLM2-135M's shape, seeded; sharper than it starts, so that no two logits are all but equal."""
    import transformers

    shape = GPTConfig.llama()
    sizes = dict(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden, num_hidden_layers=shape.layers, intermediate_size=shape.inner,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads_kv, max_position_embeddings=8192,
    )  # fmt: skip
    if tiny:
        sizes |= {"vocab_size": 1000, "hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 64}
        sizes |= {"num_attention_heads": 3, "num_key_value_heads": 1}
    torch.manual_seed(0)
    options = transformers.LlamaConfig(
        **sizes, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa", initializer_range=0.05
    )
    return transformers.LlamaForCausalLM(options).eval()


@pytest.mark.parametrize(("beams", "bar"), [(False, 1.2), (True, 1.5)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_step(bench: Bench, dtype: str, beams: bool, bar: float) -> None:
    """beams: the texts go on from one another between steps, as beams do."""
    transformers = pytest.importorskip("transformers")
    from duplex_attn.integrations.paged_cache import PagedCache

    exact = llama(bench.tiny).to(bench.device)
    theirs = copy.deepcopy(exact).to(DTYPES[dtype])
    ours = copy.deepcopy(theirs)
    length = CHECKED if bench.tiny else LENGTH
    ids = torch.randint(exact.config.vocab_size, (TEXTS, length + 1), device=bench.device)
    order = torch.tensor([1, 0, 3, 3], device=bench.device)
    paged = PagedCache(ours)
    argument = paged.model.cache_argument

    def filled(model: Any, cache: Any, tokens: Tensor) -> Any:
        model(tokens, **{argument: cache}, logits_to_keep=1)
        return cache

    def logits(model: Any, cache: Any, token: Tensor) -> Tensor:
        return model(token, **{argument: cache}).logits[:, 0]

    def step(model: Any, cache: Any) -> None:
        logits(model, cache, ids[:, length:])
        if beams:
            cache.reorder_cache(order)
        cache.crop(-1)

    few, after = ids[:2, :CHECKED], ids[:2, CHECKED - 1 : CHECKED]
    found = logits(ours, filled(ours, copy.deepcopy(paged), few), after)
    plain = logits(theirs, filled(theirs, transformers.DynamicCache(), few), after)
    truth = exact.double()(torch.cat((few, after), 1), logits_to_keep=1).logits[:, 0]
    assert against(found, truth, plain, None).passes(ours=True)
    filled(ours, paged, ids[:, :length])
    dynamic = filled(theirs, transformers.DynamicCache(), ids[:, :length])
    bench.compare(
        "a step of a Llama of transformers", f"{dtype} {TEXTS} x {length}, keys in pages" + beams * ", reordered as beams",
        faster(bar), lambda: step(ours, paged), {"HF sdpa": lambda: step(theirs, dynamic)}, dtype=DTYPES[dtype],
    )  # fmt: skip
