"""Every workload that is measured on a card, and the bars that it must reach: those of Triton and of CUDA C++ on one H200."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .workload import Bar, Workload

TOKENS = 16384  # of a batch in the sweeps over lengths
SMALL_GRID = ("packed with all", "packed", "dense", "paged", "merge")  # is sanitized (small_grid.py); the longest first
CAUSAL = {"full": None, "causal": 0}
CUDNN, FLEX, BEST, COPY = "sdpa cudnn", "flex", "best peer", "copy"


def both(triton: float, cuda: float, against: str) -> tuple[Bar, ...]:
    return Bar("triton", triton, against), Bar("cuda", cuda, against)


def compiled(head_dim: int, length: int) -> bool:
    """FlexAttention at one shape of a sweep."""
    return (head_dim, length) == (128, 4096)


def forward() -> Iterator[Workload]:
    for head_dim, heads, lengths in ((128, 16, (2048, 4096, 8192, 16384)), (64, 32, (4096,)), (256, 8, (4096,))):
        for length in lengths:
            for mask, right in CAUSAL.items():
                bars = both(0.75, 1.0, CUDNN) if head_dim == 128 else ()
                yield Workload(
                    f"forward hd{head_dim} {mask} {length}", "dense", TOKENS // length, heads, queries=length,
                    head_dim=head_dim, right=right, flex=compiled(head_dim, length), bars=bars,
                )  # fmt: skip
    bert = both(1.0, 1.1, BEST)
    yield Workload("forward hd64 full 512, batch 32", "dense", 32, 12, queries=512, head_dim=64, flex=True, bars=bert)
    yield Workload("forward hd128 causal 4096, 32/8 heads", "dense", 4, 32, 8, queries=4096, right=0)
    yield Workload("cross attention hd64, 128 x 1024", "dense", 32, 16, queries=128, keys=1024, head_dim=64)


def masks() -> Iterator[Workload]:
    bars = both(1.0, 1.2, FLEX)
    sizes = {"batch": 4, "heads": 16, "queries": 4096, "flex": True}
    yield Workload("prefix-LM 1024 of 4096", "dense", prefix=1024, right=0, bars=bars, **sizes)
    yield Workload("window of 1024 back", "dense", left=1023, right=0, bars=bars, **sizes)
    yield Workload("window of 128 to both sides", "dense", left=128, right=128, bars=bars, **sizes)
    yield Workload("window of 1024 back, 64 first tokens", "dense", prefix=64, left=1023, right=0, bars=bars, **sizes)


def backward() -> Iterator[Workload]:
    for head_dim, heads, lengths in ((128, 16, (4096, 8192, 16384)), (64, 32, (4096,))):
        for length in lengths:
            for mask, right in CAUSAL.items():
                yield Workload(
                    f"backward hd{head_dim} {mask} {length}", "backward", TOKENS // length, heads, queries=length,
                    head_dim=head_dim, right=right, flex=compiled(head_dim, length),
                    bars=both(0.7, 0.95, CUDNN) if head_dim == 128 else (),
                )  # fmt: skip
    yield Workload("backward hd128 full 4096, deterministic", "backward", 4, queries=4096, deterministic=True)


def padding_and_bias() -> Iterator[Workload]:
    yield Workload(
        "BERT batch, lengths 32 to 512", "packed", 64, 12, queries=512, head_dim=64, shortest=32,
        bars=both(1.7, 1.8, "padded best"),
    )  # fmt: skip
    yield Workload("GPT batch, lengths 128 to 2048", "packed", 16, 16, queries=2048, right=0, shortest=128)
    yield Workload(
        "distance bias, forward + backward 1024", "biased", 8, 12, queries=1024, head_dim=64, distance_radius=128,
        bars=both(1.5, 1.8, "sdpa with a bias"),
    )  # fmt: skip
    sizes = {"heads": 4, "queries": 384, "pair_bias": True}
    yield Workload("bias of pairs, forward + backward 384", "biased", 128, head_dim=32, **sizes)
    yield Workload("tables by row and key, forward + backward 512", "tables", 16, 12, queries=512, head_dim=64)


def paged() -> Iterator[Workload]:
    sizes = {"heads": 32, "heads_kv": 8, "queries": 1, "right": 0}
    for batch, keys in ((32, 4096), (64, 8192)):
        for page_size in (16, 64):
            name = f"decode {batch} x {keys}, pages of {page_size}"
            yield Workload(name, "decode", batch, keys=keys, page_size=page_size, bars=both(0.85, 0.9, COPY), **sizes)
    name, fp8 = "decode 32 x 4096, pages of 16", torch.float8_e4m3fn
    bars = both(1.6, 1.7, f"workload:{name}")
    yield Workload(f"{name}, fp8", "decode", 32, keys=4096, page_size=16, stored=fp8, bars=bars, **sizes)
    yield Workload(f"{name}, int8", "decode", 32, keys=4096, page_size=16, stored=torch.int8, **sizes)
    one = (Bar("cuda", 0.75, COPY),)
    yield Workload("decode 1 x 32768, pages of 16", "decode", 1, keys=32768, page_size=16, bars=one, **sizes)
    sizes["queries"] = 512
    yield Workload("prefill 8 x 512 after 3584", "decode", 8, keys=4096, page_size=16, **sizes)
    yield Workload("prefill 8 x 512 after 3584, ALiBi", "decode", 8, keys=4096, page_size=16, alibi=True, **sizes)
    yield Workload(
        "append 4096 tokens + RoPE",
        "append",
        8,
        8,
        queries=512,
        page_size=16,
        bars=both(0.75, 0.8, "copy of the bytes"),
    )
    yield Workload("append 64 tokens + RoPE", "append", 64, 8, page_size=16)
    yield Workload("copy of 256 pages", "copy", 32, 8, queries=256, page_size=16, pages=256)
    yield Workload("copy of 4 pages", "copy", 1, 8, queries=128, page_size=16, pages=4)
    yield Workload("merge of 4 parts, 4096 rows", "merge", 1, 16, queries=4096, parts=4)
    yield Workload("merge of 4 parts, 64 rows", "merge", 64, 32, parts=4)


def models() -> Iterator[Workload]:
    yield Workload("BERT-base, 64 texts of 32 to 512", "bert", 64, 12, queries=512, head_dim=64, shortest=32)
    yield Workload("GPT-2 small, 8 x 1024", "gpt", 8, 12, queries=1024, head_dim=64, right=0)


def overhead() -> Iterator[Workload]:
    sizes = {"batch": 1, "heads": 2, "queries": 64, "head_dim": 64}
    yield Workload("eager call from Python", "eager", bars=(Bar("triton", 40e-6, ""),), **sizes)
    yield Workload("call in a CUDA graph", "graph", bars=(Bar("triton", 5e-6, "kernel"),), **sizes)


def workloads() -> list[Workload]:
    """In the order in which they are measured: what has a bar in every part comes early, should the time not last."""
    parts = (forward(), masks(), backward(), padding_and_bias(), paged(), models(), overhead())
    found = [workload for part in parts for workload in part]
    return sorted(found, key=lambda workload: not workload.bars)
