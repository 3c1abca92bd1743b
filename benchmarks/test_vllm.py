"""The backend of vLLM against vLLM's own for CPUs, over its pages: steps of attention, then whole engines. `make bench-vllm`."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
pytest.importorskip("vllm")

from duplex_attn.integrations.vllm import NAME, DuplexImpl, DuplexMetadataBuilder, register
from vllm.v1.attention.backend import CommonAttentionMetadata

from .bar import Bench, faster
from .gpu.check import Sample, outputs, seen

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAGE_SIZE = 128  # vLLM's on CPUs

# New tokens and keys of each sequence, heads, heads_kv, head_dim.
STEPS: dict[str, tuple[list[int], list[int], int, int, int]] = {
    "decode 8 x 4096, 32/8 heads": ([1] * 8, [4096] * 8, 32, 8, 128),
    "decode 8 x 4096, 8/8 heads": ([1] * 8, [4096] * 8, 8, 8, 128),
    "decode 32 x 512, 32/8 heads": ([1] * 32, [512] * 32, 32, 8, 128),
    "prompt of 2048, 32/8 heads": ([2048], [2048], 32, 8, 128),
    "prompts of 4 x 512, 12/12 heads": ([512] * 4, [512] * 4, 12, 12, 64),
    "a prompt of 512 beside 16 x 2048, 32/8 heads": ([512] + [1] * 16, [512] + [2048] * 16, 32, 8, 128),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_step(bench: Bench, dtype: str, name: str) -> None:
    """One layer: new keys are written, new queries attend."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    lens_q, lens_k, heads, heads_kv, head_dim = STEPS[name]
    if bench.tiny:
        lens_q, lens_k, heads, heads_kv, head_dim = [1, 40], [70, 40], 4, 2, 32
    kind, rows, generator = DTYPES[dtype], sum(lens_q), torch.Generator().manual_seed(0)

    def made(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(kind)

    counts = [-(-n // PAGE_SIZE) for n in lens_k]
    pages = iter(torch.randperm(sum(counts), generator=generator).int().split(counts))
    table = torch.stack([torch.nn.functional.pad(next(pages), (0, max(counts) - n)) for n in counts])
    slots = torch.tensor(
        [
            int(table[b, j // PAGE_SIZE]) * PAGE_SIZE + j % PAGE_SIZE
            for b, (new, all_) in enumerate(zip(lens_q, lens_k, strict=True))
            for j in range(all_ - new, all_)
        ]
    )
    cu = torch.tensor([0, *torch.tensor(lens_q).cumsum(0).tolist()], dtype=torch.int32)
    lens = torch.tensor(lens_k, dtype=torch.int32)
    q, k, v = made(rows, heads, head_dim), made(rows, heads_kv, head_dim), made(rows, heads_kv, head_dim)
    old_k, old_v = (made(sum(counts), heads_kv, PAGE_SIZE, head_dim) for _ in "kv")

    impl = DuplexImpl(heads, head_dim, head_dim**-0.5, heads_kv)
    common = CommonAttentionMetadata(
        query_start_loc=cu, query_start_loc_cpu=cu, seq_lens=lens, num_reqs=len(lens), num_actual_tokens=rows,
        max_query_len=max(lens_q), max_seq_len=max(lens_k), block_table_tensor=table, slot_mapping=slots,
    )  # fmt: skip
    ours = torch.cat((old_k, old_v), -1)
    found, expected = torch.empty_like(q), torch.empty_like(q)
    metadata = DuplexMetadataBuilder(SimpleNamespace(block_size=PAGE_SIZE), [], None, q.device).build(0, common)

    def duplex() -> None:
        impl.forward(None, q, k, v, ours, metadata, found)

    def sample(b: int, h: int) -> Sample:
        """One head of one sequence, its keys and values as they are in the pages."""
        stored = ours[table[b, : counts[b]].long(), h // (heads // heads_kv)].flatten(0, 1)[: lens_k[b]]
        queries = torch.arange(lens_q[b])
        return Sample(
            q[cu[b] : cu[b + 1], h], stored[:, :head_dim], stored[:, head_dim:],
            seen(queries, lens_q[b], lens_k[b], 0, None, 0),
        )  # fmt: skip

    isa = _get_attn_isa(kind, PAGE_SIZE, head_dim, "auto")
    theirs = torch.empty_like(ours).view(len(ours), heads_kv, 2 * PAGE_SIZE, head_dim)
    their_k, their_v = theirs.chunk(2, dim=2)

    def write(k: Any, v: Any, slots: Any) -> None:
        ops.cpu_attn_reshape_and_cache(k, v, their_k, their_v, slots, isa, 1.0, 1.0, "auto")

    everywhere = torch.arange(len(ours) * PAGE_SIZE)
    write(*(x.transpose(1, 2).reshape(-1, heads_kv, head_dim) for x in (old_k, old_v)), everywhere)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lens), num_heads=heads, num_kv_heads=heads_kv, head_dim=head_dim, seq_lens=lens, dtype=kind,
        query_start_loc=cu, causal=True, sliding_window_size=-1, isa=isa, enable_kv_split=True, dynamic_causal=None,
        kv_cache_dtype="auto",
    )  # fmt: skip

    def vllm() -> None:
        write(k, v, slots)
        ops.cpu_attention_with_kv_cache(
            query=q, key_cache=their_k, value_cache=their_v, output=expected, query_start_loc=cu, seq_lens=lens,
            scale=head_dim**-0.5, causal=True, alibi_slopes=None, sliding_window=-1, block_table=table, softcap=0.0,
            scheduler_metadata=schedule, s_aux=None, dynamic_causal=None, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
        )  # fmt: skip

    duplex()
    check = outputs([(found[cu[b] : cu[b + 1], h], sample(b, h)) for b in (0, len(lens) - 1) for h in (0, heads - 1)])
    assert check.passes(ours=True), str(check)
    vllm()
    torch.testing.assert_close(expected, found, atol=0.03 if dtype == "bf16" else 1e-5, rtol=0)
    bench.compare("vLLM, a layer", f"{dtype} {name}", faster(1.0), duplex, {"CPU_ATTN": vllm}, dtype=kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_engine(bench: Bench, dtype: str, tmp_path: Path) -> None:
    """8 prompts of 64 to 512 tokens, 32 new ones each, by a Llama of SmolLM2-135M's shape with random weights."""
    from vllm import LLM, SamplingParams

    from .test_model_cache import llama

    llama(bench.tiny).save_pretrained(tmp_path)
    draw = random.Random(0)
    lengths = [8, 20] if bench.tiny else [draw.randrange(64, 512) for _ in range(8)]
    prompts = [{"prompt_token_ids": draw.choices(range(1, 1000), k=n)} for n in lengths]
    greedy = SamplingParams(max_tokens=4 if bench.tiny else 32, temperature=0, detokenize=False, ignore_eos=True)
    register()

    def made(backend: str | None) -> Any:
        engine = LLM(
            str(tmp_path), skip_tokenizer_init=True, max_model_len=2048, dtype=DTYPES[dtype], enforce_eager=True,
            enable_prefix_caching=False, attention_backend=backend,
        )  # fmt: skip

        def run() -> list[list[int]]:
            return [list(one.outputs[0].token_ids) for one in engine.generate(prompts, greedy, use_tqdm=False)]

        return run

    ours, theirs = made(NAME), made(None)
    written = list(zip(ours(), theirs(), strict=True))
    if dtype == "fp32":
        assert all(a == b for a, b in written)
    else:  # logits of random weights tie
        assert sum(a[0] == b[0] for a, b in written) > len(written) / 2
    bench.compare(
        "vLLM, an engine", f"{dtype} {len(prompts)} prompts of 64 to 512", faster(1.0), ours, {"CPU_ATTN": theirs},
        dtype=DTYPES[dtype],
    )  # fmt: skip
