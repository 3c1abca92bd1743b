"""The backend of vLLM: single steps against the oracle, then whole engines. `make vllm` makes the environment for it."""

from __future__ import annotations

import gc
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
pytest.importorskip("vllm")

from duplex_attn.integrations import vllm as integration
from duplex_attn.integrations.vllm import NAME, DuplexBackend, DuplexImpl, DuplexMetadataBuilder, Pool, register
from duplex_attn.paged.call import MAX_PAGE_SIZE
from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata

from ..oracle import Call, answer, assert_accurate, floors, plain_answer

HEADS, HEADS_KV, HEAD_DIM, PAGE_SIZE = 4, 2, 32, 16
LENS_Q, LENS_K = [1, 20, 5, 1, 33], [40, 20, 64, 1, 50]
ENCODER = AttentionType.ENCODER_ONLY
SLOPES = [0.5, 0.1, 0.2, 0.9]
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])

# What the layer is, whether it is causal, and what that means.
LAYERS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "causal": ({}, True, {"right": 0}),
    "window, counting the query": ({"sliding_window": 7}, True, {"left": 6, "right": 0}),
    "both ways": ({}, False, {}),
    "both ways in a window": ({"sliding_window": 7}, False, {"left": 6, "right": 6}),
    "a direction for each": (
        {},
        torch.tensor([1, 0, 0, 1, 1], dtype=torch.int32),
        {"prefix": torch.tensor([0, 20, 64, 0, 0], dtype=torch.int32), "right": 0},
    ),
    "softcap": ({"logits_soft_cap": 2.0}, True, {"softcap": 2.0, "right": 0}),
    "alibi": ({"alibi_slopes": SLOPES}, True, {"alibi_slopes": torch.tensor(SLOPES), "right": 0}),
    "alibi both ways": ({"alibi_slopes": SLOPES}, False, {"alibi_slopes": torch.tensor(SLOPES)}),
    "sink": ({"sinks": SINKS}, True, {"sink": SINKS, "right": 0}),
}


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def starts(lens: list[int]) -> Tensor:
    return int32([0, *torch.tensor(lens).cumsum(0).tolist()])


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Step:
    """Sequences whose keys lie in pages in any order, as vLLM describes them."""

    def __init__(self, dtype: torch.dtype, heads_first: bool = True, stored: torch.dtype | None = None) -> None:
        self.q = made(sum(LENS_Q), HEADS, HEAD_DIM, dtype=dtype)
        self.k, self.v = (made(sum(LENS_K), HEADS_KV, HEAD_DIM, dtype=dtype, seed=n) for n in (1, 2))
        counts = [-(-n // PAGE_SIZE) for n in LENS_K]
        pages = iter(random.Random(0).sample(range(sum(counts) + 3), sum(counts)))
        self.table = torch.full((len(counts), max(counts)), 0, dtype=torch.int32)
        self.slots = []
        for b, count in enumerate(counts):
            self.table[b, :count] = int32([next(pages) for _ in range(count)])
            self.slots += [int(self.table[b, j // PAGE_SIZE]) * PAGE_SIZE + j % PAGE_SIZE for j in range(LENS_K[b])]
        shape = (sum(counts) + 3, HEADS_KV, PAGE_SIZE) if heads_first else (sum(counts) + 3, PAGE_SIZE, HEADS_KV)
        cache = torch.full((*shape, 2 * HEAD_DIM), float("nan"), dtype=stored or dtype)
        cache = cache.view(torch.uint8) if stored else cache
        self.cache = cache if heads_first else cache.transpose(1, 2)

    def metadata(self, causal: Any) -> Any:
        common = CommonAttentionMetadata(
            query_start_loc=starts(LENS_Q), query_start_loc_cpu=starts(LENS_Q), seq_lens=int32(LENS_K), num_reqs=len(LENS_Q),
            num_actual_tokens=len(self.q), max_query_len=max(LENS_Q), max_seq_len=max(LENS_K), causal=causal,
            block_table_tensor=self.table, slot_mapping=torch.tensor(self.slots),
        )  # fmt: skip
        spec = SimpleNamespace(block_size=PAGE_SIZE)
        return DuplexMetadataBuilder(spec, [], None, torch.device("cpu")).build(0, common)

    def run(self, impl: DuplexImpl, causal: Any, layer: Any = None, write: bool = True) -> Tensor:
        padded = torch.cat([self.q, torch.full_like(self.q[:3], float("nan"))])  # as CUDA graphs pad
        out = torch.full_like(padded, 7.0)
        k, v = (self.k, self.v) if write else (None, None)
        found = impl.forward(layer, padded, k, v, self.cache, self.metadata(causal), out)
        assert found is out
        assert (out[len(self.q) :] == 7).all()
        return out[: len(self.q)]

    def check(self, out: Tensor, k: Tensor | None = None, v: Tensor | None = None, **meaning: Any) -> None:
        call = Call(
            self.q, self.k if k is None else k, self.v if v is None else v, starts(LENS_Q), starts(LENS_K), **meaning
        )
        exact = answer(call, torch.float64)
        assert_accurate({"out": out}, exact, plain_answer(call, exact), floors(call, exact))


def layer_of(**changes: Any) -> DuplexImpl:
    return DuplexImpl(**({"num_heads": HEADS, "head_size": HEAD_DIM, "scale": 0.2, "num_kv_heads": HEADS_KV} | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_step(kind: str, dtype: torch.dtype) -> None:
    arguments, causal, meaning = LAYERS[kind]
    step = Step(dtype)
    step.check(step.run(layer_of(**arguments), causal), scale=0.2, **meaning)


def test_pages_with_tokens_outermost() -> None:
    step = Step(torch.float32, heads_first=False)
    step.check(step.run(layer_of(), True), scale=0.2, right=0)


def test_layers_share_a_plan_by_their_windows() -> None:
    metadata = Step(torch.float32).metadata(True)
    assert metadata.span(None)[1] is metadata.span(None)[1]
    assert metadata.span(6)[1] is not metadata.span(None)[1]


def test_pages_written_before_are_read() -> None:
    step, impl = Step(torch.float32), layer_of()
    expected, before = step.run(impl, True), step.cache.clone()
    assert torch.equal(step.run(impl, True, write=False), expected)
    step.k += 1
    shares = layer_of(kv_sharing_target_layer_name="another layer")
    assert torch.equal(step.run(shares, True), expected)
    assert torch.equal(step.cache.nan_to_num(9), before.nan_to_num(9))


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3"])
def test_float8_pages_and_their_scales(name: str) -> None:
    step = Step(torch.bfloat16, stored=torch.float8_e4m3fn)
    scales = SimpleNamespace(_k_scale=torch.tensor([0.02]), _v_scale=torch.tensor(0.5))
    out = step.run(layer_of(kv_cache_dtype=name), True, scales)
    k, v = ((x / s).to(torch.float8_e4m3fn).to(x.dtype) * s for x, s in ((step.k, 0.02), (step.v, 0.5)))
    step.check(out, k.bfloat16(), v.bfloat16(), scale=0.2, right=0)


def test_slots_that_are_padded_further_than_keys() -> None:
    step, impl = Step(torch.float32), layer_of()
    step.slots += [-1] * 4
    step.check(step.run(impl, True), scale=0.2, right=0)


def test_a_layer_whose_pool_is_exchanged() -> None:
    impl = layer_of()
    for _ in range(2):
        step = Step(torch.float32)
        step.check(step.run(impl, True), scale=0.2, right=0)
        assert not step.cache.isnan().all()


def test_batch_invariant_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    step = Step(torch.float32)
    step.check(step.run(layer_of(), True), scale=0.2, right=0)  # a plan of one kind and a call of the other are refused
    plan = step.metadata(True).span(None)[1]
    assert plan is None or plan[0, 6] > 0  # keys of a part, whatever the batch


def test_a_slot_of_minus_one_is_skipped() -> None:
    step, impl = Step(torch.float32), layer_of()
    step.run(impl, True)
    before = step.cache.clone()
    kept = step.slots[1]
    step.slots, step.k, step.v = [-1, kept, -1], step.k + 1, step.v + 1
    step.run(impl, True)
    changed = (step.cache != before).any(-1).any(1) & ~before.isnan().any(-1).any(1)
    assert changed.nonzero().tolist() == [[kept // PAGE_SIZE, kept % PAGE_SIZE]]


@pytest.mark.parametrize("window", [None, 7])
def test_encoders_have_no_pages(window: int | None) -> None:
    step, impl = Step(torch.float32), layer_of(attn_type=ENCODER, sliding_window=window, sinks=SINKS)
    k, v = (made(len(step.q) + 2, HEADS_KV, HEAD_DIM, seed=n) for n in (1, 2))
    out = torch.full_like(step.q, float("nan"))
    impl.forward(None, step.q, k, v, torch.empty(0), step.metadata(False), out)
    side = None if window is None else window - 1
    call = Call(step.q, k, v, starts(LENS_Q), starts(LENS_Q), left=side, right=side, scale=0.2, sink=SINKS)
    exact = answer(call, torch.float64)
    assert_accurate({"out": out}, exact, plain_answer(call, exact), floors(call, exact))


def test_cross_attention_writes_the_encoders_keys_in_its_first_step() -> None:
    """Through what vLLM puts around a backend for it, which has slots of its own."""
    backend = create_cross_attention_backend(DuplexBackend)
    step = Step(torch.float32)
    spec = SimpleNamespace(block_size=PAGE_SIZE)
    builder = backend.get_builder_cls()(spec, [], None, torch.device("cpu"))
    impl = backend.get_impl_cls()(HEADS, HEAD_DIM, 0.2, HEADS_KV, attn_type=AttentionType.ENCODER_DECODER)
    layer = SimpleNamespace(kv_sharing_target_layer_name=None)
    for computed in (0, 3):  # tokens of each text so far
        common = CommonAttentionMetadata(
            query_start_loc=starts(LENS_Q), query_start_loc_cpu=starts(LENS_Q), seq_lens=int32(LENS_Q) + computed,
            seq_lens_cpu_upper_bound=int32(LENS_Q) + computed, num_reqs=len(LENS_Q), num_actual_tokens=len(step.q),
            max_query_len=max(LENS_Q), max_seq_len=max(LENS_Q) + computed, block_table_tensor=step.table,
            slot_mapping=torch.arange(len(step.q)), encoder_seq_lens=int32(LENS_K), encoder_seq_lens_cpu=np.array(LENS_K),
        )  # fmt: skip
        k, v = (step.k, step.v) if computed == 0 else (None, None)
        out = torch.full_like(step.q, float("nan"))
        impl.forward(layer, step.q, k, v, step.cache, builder.build(0, common), out)
        step.check(out, scale=0.2)


def test_while_memory_is_measured_there_is_no_metadata() -> None:
    out = torch.full((3, HEADS, HEAD_DIM), float("nan"))
    assert (layer_of().forward(None, out, out, out, torch.empty(0), None, out) == 0).all()


def test_what_it_refuses() -> None:
    step = Step(torch.float32)
    with pytest.raises(NotImplementedError, match="a direction for each request in layers with a window"):
        step.run(layer_of(sliding_window=7), LAYERS["a direction for each"][1])
    with pytest.raises(NotImplementedError, match="quantised outputs"):
        layer_of().forward(None, step.q, step.k, step.v, step.cache, step.metadata(True), step.q, torch.ones(1))
    with pytest.raises(NotImplementedError, match=r"past 2\^31 tokens"):
        Pool.of(torch.empty(2**27, 1, 16, 2, device="meta"), 1, "auto", None)
    assert max(DuplexBackend.get_supported_kernel_block_sizes()) <= MAX_PAGE_SIZE
    for dtype, stored, served in (
        (torch.float32, "bfloat16", False),
        (torch.bfloat16, "float16", False),
        (torch.bfloat16, "bfloat16", True),
        (torch.float32, "auto", True),
    ):
        assert (DuplexBackend.supports_combination(64, dtype, stored, 16) is None) is served
    assert not DuplexBackend.supports_head_size(512)
    assert DuplexBackend.supports_head_size(40)
    assert not DuplexBackend.supports_compute_capability(SimpleNamespace(major=7))


# Engines, on models with random weights.

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "gemma3": (  # windows in some layers
        "Gemma3",
        {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 32, "query_pre_attn_scalar": 32,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt_oss": (  # sinks
        "GptOss",
        {"num_key_value_heads": 2, "head_dim": 64, "sliding_window": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),  # slopes
}  # fmt: skip
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 1024, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def saved(model: Any, folder: Path) -> str:
    model.eval().save_pretrained(folder)
    return str(folder)


def decoder(name: str, folder: Path) -> str:
    import transformers

    family, changes = DECODERS[name]
    config = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(family, family) + "Config")(**(SIZES | changes))
    torch.manual_seed(0)
    return saved(getattr(transformers, f"{family}ForCausalLM")(config), folder)


def prompts() -> list[Any]:
    draw = random.Random(0)
    return [{"prompt_token_ids": draw.choices(range(3, 512), k=n)} for n in (5, 33, 100, 300)]


def engine(folder: str, **arguments: Any) -> Any:
    from vllm import LLM

    return LLM(folder, **({"skip_tokenizer_init": True, "max_model_len": 512, "dtype": "float32"} | arguments))


def tokens_of(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    greedy = SamplingParams(max_tokens=20, temperature=0, detokenize=False, ignore_eos=True)
    found = [list(one.outputs[0].token_ids) for one in llm.generate(prompts(), greedy, use_tqdm=False)]
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of ours."""
    seen: list[int] = []
    forward = DuplexImpl.forward

    def counted(self: DuplexImpl, layer: Any, query: Tensor, *rest: Any, **more: Any) -> Tensor:
        seen.append(len(query))
        return forward(self, layer, query, *rest, **more)

    monkeypatch.setattr(DuplexImpl, "forward", counted)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_the_tokens_of_vllms_own_backend(name: str, tmp_path: Path, steps: list[int]) -> None:
    folder = decoder(name, tmp_path)
    expected = tokens_of(engine(folder, enforce_eager=True))
    assert not steps
    assert tokens_of(engine(folder, enforce_eager=True, attention_backend=NAME)) == expected
    assert len(steps) >= 2 * 20  # two layers


@pytest.mark.slow
def test_prompts_in_chunks_shared_prefixes_and_compiled_models(tmp_path: Path, steps: list[int]) -> None:
    folder = decoder("llama", tmp_path)
    expected = tokens_of(engine(folder, enforce_eager=True))
    in_chunks = {"max_num_batched_tokens": 64, "max_num_seqs": 3, "block_size": 32}
    assert tokens_of(engine(folder, attention_backend=NAME, enforce_eager=True, **in_chunks)) == expected
    assert max(steps) == 64
    assert tokens_of(engine(folder, attention_backend=NAME)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_head_dim_that_vllm_lacks(processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2: the engine has one of its own, which must find the plugin."""
    import transformers

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(processes - 1))
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**(SIZES | {"head_dim": 40, "num_key_value_heads": 2}))
    model = transformers.Qwen3ForCausalLM(config).eval()
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=20, min_new_tokens=20, do_sample=False)[
            0, len(ids) :
        ].tolist()
        for ids in (one["prompt_token_ids"] for one in prompts())
    ]
    assert tokens_of(engine(saved(model, tmp_path), enforce_eager=True, attention_backend=NAME)) == expected


@pytest.mark.slow
def test_large_blocks_and_a_draft_model(tmp_path: Path, steps: list[int]) -> None:
    folder = decoder("llama", tmp_path)
    expected = tokens_of(engine(folder, enforce_eager=True))
    assert tokens_of(engine(folder, enforce_eager=True, attention_backend=NAME, block_size=512)) == expected
    drafts = {"method": "draft_model", "model": folder, "num_speculative_tokens": 3, "max_model_len": 512}
    steps.clear()
    found = tokens_of(engine(folder, enforce_eager=True, attention_backend=NAME, speculative_config=drafts))
    assert found == expected
    assert 4 * len(prompts()) in steps  # a token and three drafts of each text


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
def test_an_encoder(family: str, tmp_path: Path, steps: list[int]) -> None:
    import transformers
    from tokenizers import Tokenizer, models

    changes = {"local_attention": 32, "global_attn_every_n_layers": 2} if family == "ModernBert" else {}
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**(SIZES | changes)))
    folder = saved(model, tmp_path)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(512)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(folder)
    from vllm.config import PoolerConfig

    llm = engine(
        folder, runner="pooling", pooler_config=PoolerConfig(task="token_embed"), skip_tokenizer_init=False,
        enforce_eager=True, attention_backend=NAME,
    )  # fmt: skip
    found = llm.encode(prompts(), pooling_task="token_embed", use_tqdm=False)
    for one, prompt in zip(found, prompts(), strict=True):
        with torch.no_grad():
            state = model(torch.tensor([prompt["prompt_token_ids"]])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(state, dim=-1)
        torch.testing.assert_close(torch.as_tensor(one.outputs.data), expected, atol=2e-5, rtol=0)
    assert steps


@pytest.mark.slow
def test_a_model_it_cannot_serve_is_refused(tmp_path: Path) -> None:
    folder = decoder("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"head_dim": 288, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{NAME} can't serve this model: head_size not supported"):
        engine(folder, load_format="dummy", enforce_eager=True, attention_backend=NAME)


def test_registering_twice_is_once() -> None:
    from vllm.platforms.cpu import CpuPlatform

    register()
    before = CpuPlatform.get_attn_backend_cls.__func__
    register()
    assert CpuPlatform.get_attn_backend_cls.__func__ is before


def test_what_vllm_loads_comes_through_in_another_version(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    def other(name: str, path: str) -> None:
        raise TypeError("no names")

    register()
    monkeypatch.delitem(AttentionBackendEnum._member_map_, NAME)
    monkeypatch.setattr(CpuPlatform, "get_attn_backend_cls", CpuPlatform.get_attn_backend_cls)
    monkeypatch.setattr(integration, "register_backend", other)
    integration.plugin()
    assert "not available in vLLM" in caplog.text and "no names" in caplog.text
    with pytest.raises(TypeError, match="no names"):  # also the second time
        register()
