"""Decoders of transformers in the engine: the tokens and logits that transformers computes, from pages."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from duplex_attn import PagedKVCache, causal
from duplex_attn.generate import Engine, SamplingParams, cache_for
from duplex_attn.integrations import paged_model, pages, transformers
from duplex_attn.integrations.paged_model import PagedModel, StepCache
from torch import Tensor
from transformers import PreTrainedModel

DECODERS = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2", "bert_decoder", "deepseek_v3", "jetmoe", "gemma3n")
PROMPTS = [random.Random(n).choices(range(3, 97), k=length) for n, length in enumerate((23, 1, 14, 9))]
NEW = 12


def continued(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", DECODERS)
def test_the_engine_generates_what_transformers_does(build, name: str) -> None:
    expected = [continued(build(name), prompt) for prompt in PROMPTS]
    engine = Engine(PagedModel(build(name)), max_sequences=4, token_budget=10)  # a prompt takes three steps
    requests = engine.generate(PROMPTS, SamplingParams(max_tokens=NEW))
    assert [request.tokens for request in requests] == expected
    requests = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=NEW, n=3, speculate=2))
    assert [output.tokens for output in requests[0].outputs] == [expected[0]] * 3
    assert engine.stats().cache.hit_tokens > 0


def steps(model: PagedModel, cache: PagedKVCache, texts: list[list[int]], counts: list[int], **options: Any) -> Tensor:
    """The logits of all tokens of texts, of which steps take so many each."""
    seqs = [cache.add(text, **options) for text in texts]
    found: list[list[Tensor]] = [[] for _ in texts]
    while any(seq.committed < seq.length for seq in seqs):
        taken = [min(count, seq.length - seq.committed) for seq, count in zip(seqs, counts, strict=True)]
        batch = cache.batch(seqs, taken)
        parts = [text[seq.committed :][:n] for text, seq, n in zip(texts, seqs, taken, strict=True)]
        ids = torch.tensor([token for part in parts for token in part])
        logits = model.step(ids, cache, batch, torch.arange(len(ids))).split(taken)
        for one, part in zip(found, logits, strict=True):
            one.append(part)
        cache.commit_batch(batch)
    return torch.cat([row for one in found for row in one])


@pytest.mark.parametrize("name", DECODERS)
@torch.inference_mode()
def test_logits_are_those_of_each_text_alone(build, name: str) -> None:
    plain, model = build(name), PagedModel(build(name))
    found = steps(model, cache_for(model, 40, 4), PROMPTS, [7, 1, 5, 9])
    expected = torch.cat([plain(torch.tensor([text]), use_cache=False).logits[0] for text in PROMPTS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_bidirectional_prefix(build) -> None:
    plain, model, text, prefix = build("llama"), PagedModel(build("llama")), PROMPTS[0], 9
    found = steps(model, cache_for(model, 20, 4), [text], [prefix], bidirectional_prefix=prefix)
    seen = torch.ones(len(text), len(text)).tril().bool()
    seen[:, :prefix] = True
    mask = torch.zeros(1, 1, len(text), len(text)).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = plain(torch.tensor([text]), attention_mask=mask, use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_that_sees_all_of_itself(build) -> None:
    plain, model, prompt = build("llama"), PagedModel(build("llama")), PROMPTS[0]
    engine = Engine(model, max_sequences=1, token_budget=4)
    (request,) = engine.generate([prompt], SamplingParams(max_tokens=1, logprobs=0), bidirectional_prefix=len(prompt))
    mask = torch.zeros(1, 1, len(prompt), len(prompt))
    with torch.inference_mode():
        both_ways = plain(torch.tensor([prompt]), attention_mask=mask, use_cache=False).logits[0, -1].log_softmax(-1)
    assert request.outputs[0].logprobs[0].logprob == pytest.approx(float(both_ways.max()), abs=1e-4)


def test_training_mode_is_refused_until_it_ends(build) -> None:
    model = build("llama")
    engine = Engine(PagedModel(model))
    request = engine.submit(PROMPTS[0], SamplingParams(max_tokens=NEW))
    engine.step()
    model.train()
    with pytest.raises(ValueError, match=r"model: expected eval mode \(model.eval\(\)\), got training mode"):
        engine.step()
    model.eval()
    while engine.step():
        pass
    assert request.tokens == continued(build("llama"), PROMPTS[0])


def test_quantised_pages_hold_the_same_text_in_a_quarter(build) -> None:
    model = PagedModel(build("llama"))
    whole, bytes_ = cache_for(model, 20, 4), cache_for(model, 20, 4, quantization="int8")
    found = [steps(model, cache, PROMPTS[:2], [8, 8]) for cache in (whole, bytes_)]
    assert 0 < (found[1] - found[0]).norm() / found[0].norm() < 0.05
    assert bytes_.k_pages.nbytes * 4 == whole.k_pages.nbytes


def test_half_precision(build) -> None:
    model = PagedModel(build("llama").bfloat16())
    assert model.cache_shape.dtype == torch.bfloat16
    (request,) = Engine(model).generate(PROMPTS[:1], SamplingParams(max_tokens=NEW))
    assert len(request.tokens) == NEW


def test_a_text_is_as_long_as_its_positions(build) -> None:
    model = PagedModel(build("gpt2"))
    (request,) = Engine(model).generate([[5] * 60], SamplingParams(max_tokens=20))
    assert len(request.tokens) == 4 and request.outputs[0].finish_reason == "length"
    with pytest.raises(ValueError, match=r"prompt: expected 1 to 63 tokens, got 64"):
        Engine(model).submit([5] * 64)
    cache = cache_for(model, 20, 4)
    with pytest.raises(ValueError, match=r"ids: expected at most 64 tokens, got 65"):
        steps(model, cache, [[5] * 65], [65])


@pytest.mark.parametrize("rope_type, most", [("longrope", 16), ("dynamic", 16), ("yarn", 64)])
def test_a_rotation_that_changes_with_the_longest_text_is_not_reached(build, rope_type: str, most: int) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4} if rope_type == "longrope" else {}
    rope = {"rope_type": rope_type, "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4, **factors}
    assert PagedModel(build("llama", rope_parameters=rope)).max_length == most
    of_kinds = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    config = SimpleNamespace(max_position_embeddings=64, rope_parameters=of_kinds)
    assert paged_model.max_length(config) == most


def test_pages_of_a_text_at_most(build) -> None:
    model = PagedModel(build("llama"))
    assert [model.most_pages(size) for size in (1, 10, 16, 100)] == [64, 7, 4, 1]
    assert cache_for(model, page_size=10, max_sequences=3).num_pages == 21


@pytest.mark.parametrize(
    "name, message",
    [
        ("t5", "a decoder alone, got T5ForConditionalGeneration, which has an encoder"),
        ("bloom", "AttentionInterface as the cache gave them, got .reshape"),
        ("roberta_decoder", "position_ids that count from 0, got RobertaForCausalLM, whose own do not"),
        ("lfm2", "a state of keys and values alone, got Lfm2ForCausalLM with LinearAttention"),
        ("gpt", "a cache of keys and values, got OpenAIGPTLMHeadModel, which keeps none"),
        (
            "gemma4",
            r"keys that are alike in all layers \(heads_kv, head_dims, dtype, device\), got Gemma4ForCausalLM with ",
        ),
        ("git", "AttentionInterface as the cache gave them, got matmul"),
        ("bert_both_ways", "that of a causal model, or a window, over pages"),
        ("deepseek_v4", "a state of keys and values alone, got DeepseekV4ForCausalLM with Deepseek"),
    ],
)
def test_models_it_does_not_serve(build, name: str, message: str) -> None:
    model = build(name, "eager")
    with pytest.raises(ValueError, match=message):
        PagedModel(model)
    assert {part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)} == {
        "eager"
    }


OTHER_LOGITS = r"the same logits over pages as without, got \w+, whose differ by \d"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_counts_places_itself_is_found_out(build, dtype: torch.dtype) -> None:
    model = build("gpt2").to(dtype)
    forward = model.transformer.forward
    model.transformer.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ValueError, match=OTHER_LOGITS):
        PagedModel(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["over pages", "with positions", "always"])
def test_nan_is_found_out(build, monkeypatch: pytest.MonkeyPatch, where: str, dtype: torch.dtype) -> None:
    """In one row."""
    model = build("llama").to(dtype)
    forward = model.forward

    def spoilt(input_ids: Tensor, position_ids: Tensor | None = None, **options: Any) -> Any:
        found = forward(input_ids, position_ids=position_ids, **options)
        over_pages = options.get("use_cache")
        if where == "always" or {"over pages": over_pages, "with positions": position_ids is not None}[where]:
            found.logits[0, -1, 5] = torch.nan
        return found

    model.forward = spoilt
    message = {
        "over pages": "the same logits over pages as without, got LlamaForCausalLM, whose differ by nan",
        "with positions": "position_ids that count from 0",
        "always": "logits that are numbers, got LlamaForCausalLM, which has NaN",
    }
    with pytest.raises(ValueError, match=message[where]):
        PagedModel(model)


@pytest.mark.parametrize("never_said", [False, True])
def test_slightly_other_scores_are_found_out(build, monkeypatch: pytest.MonkeyPatch, never_said: bool) -> None:
    """never_said: with logits of tokens that a model leaves out, as Chameleon does those of images."""
    model = build("gemma2")
    if never_said:
        head = model.lm_head.forward
        model.lm_head.forward = lambda x: head(x).index_fill(-1, torch.tensor([3, 4]), torch.finfo(x.dtype).min)
        model.config.final_logit_softcapping = None
    PagedModel(model)
    right = pages.windowed
    monkeypatch.setattr(paged_model, "windowed", lambda scores, mask: replace(right(scores, mask), softcap=1.9))
    with pytest.raises(ValueError, match=OTHER_LOGITS):
        PagedModel(model)


def test_a_layer_that_leaves_out_the_cache_is_found_out(build) -> None:
    model = build("llama")
    layer = model.model.layers[1].self_attn
    forward = layer.forward
    layer.forward = lambda *args, cache=None, past_key_values=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ValueError, match=r"keys: expected those that the cache gave, for others lie in pages"):
        PagedModel(model)


def test_experts_of_16_bits_may_differ(build) -> None:
    """A token that takes another expert for a rounding has other logits, and nothing is wrong."""
    for seed in range(4):
        model = build("gpt_oss", num_local_experts=4)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        PagedModel(model.bfloat16())


def test_bad_input(build) -> None:
    with pytest.raises(TypeError, match=r"model: expected a model of transformers, got Linear"):
        PagedModel(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model: expected eval mode"):
        PagedModel(build("llama").train())
    with pytest.raises(TypeError, match=r"model: expected one that generates \(GPT, Seq2Seq, or PagedModel"):
        Engine(build("llama"))
    model = PagedModel(build("llama"))
    cache = PagedKVCache(2, 8, 4, 4, 8)
    with pytest.raises(ValueError, match=r"cache: expected the model's layers, heads_kv and head_dim \(2, 2, 8\)"):
        Engine(model, cache=cache)
    with pytest.raises(ValueError, match=r"batch_invariant: expected False with a model of transformers"):
        Engine(model, batch_invariant=True)
    cache = cache_for(model, 8, 4)
    batch = cache.batch([cache.add([5, 6, 7])])
    with pytest.raises(ValueError, match=r"ids: expected the batch's 3 new tokens, got \(2,\)"):
        model.step(torch.tensor([5, 6]), cache, batch)
    batch = cache.batch(batch.seqs, [0])
    with pytest.raises(ValueError, match=r"rows: expected the rows wanted, where a sequence has no new token"):
        model.step(torch.tensor([], dtype=torch.int64), cache, batch)
    with pytest.raises(ValueError, match=r"model: expected a head_dim of at most 256, got 320"):
        PagedModel(build("llama", head_dim=320))


def test_models_without_words(build) -> None:
    model = build("llama")
    with pytest.raises(
        ValueError, match=r"model: expected one that predicts tokens, got LlamaModel, which has no head"
    ):
        PagedModel(model.model)
    model.config.attn_temperature_tuning = True
    with pytest.raises(
        ValueError, match=r"model: expected scores that follow position_ids, got LlamaForCausalLM with attn"
    ):
        PagedModel(model)


def test_few_words(build) -> None:
    assert PagedModel(build("llama", vocab_size=11)).vocab_size == 11


def test_states_of_some_tokens_are_refused() -> None:
    states = pages.PagedStates(torch.ones(1, 2, 1, 8), StepCache(SimpleNamespace(attend=None), {}), 0)
    assert states[..., :3].shape == (1, 2, 1, 3)
    with pytest.raises(ValueError, match=r"as the cache gave them, got \["):
        states[:, :, -5:]


def test_scores_that_pages_do_not_have(build) -> None:
    training = build("llama", attention_dropout=0.1).train().model.layers[0].self_attn
    states = [pages.PagedStates(torch.ones(1, 2, 3, 8), pages.CacheOfPages({}), 0) for _ in range(2)]
    with pytest.raises(ValueError, match=r"dropout: expected eval mode over pages, got training mode"):
        transformers.attention(training, torch.ones(1, 4, 3, 8), *states, None, dropout=0.1)
    states = [pages.PagedStates(torch.ones(1, 2, 3, 8), pages.CacheOfPages({}), 0) for _ in range(2)]
    layer, query = build("llama").model.layers[0].self_attn, torch.ones(1, 4, 3, 8)
    with pytest.raises(ValueError, match=r"position_bias: expected None, got one; over pages scores have no bias"):
        transformers.attention(layer, query, *states, None, position_bias=torch.zeros(1, 4, 3, 3))
    step = StepCache(SimpleNamespace(attend=None), {})  # is not asked
    states = [pages.PagedStates(x.new, step, 0) for x in states]
    for module, argument in ((False, None), (True, False)):
        layer.is_causal = module
        with pytest.raises(ValueError, match=r"attention_mask: expected that of a causal model"):
            transformers.attention(layer, query, *states, None, is_causal=argument)
    layer.is_causal, step.attend = False, lambda layer, query, key, value, mask, scores, sink: mask
    assert transformers.attention(layer, query, *states, None, is_causal=True)[0] == causal()


@torch.inference_mode()
def test_a_model_that_computes_all_logits(build) -> None:
    plain, model = build("llama"), build("llama")
    forward = model.forward

    def without_rows(input_ids, position_ids=None, past_key_values=None, use_cache=None, return_dict=None):
        return forward(
            input_ids, position_ids=position_ids, use_cache=use_cache, **{paged_model.CACHE: past_key_values}
        )

    model.forward = without_rows
    requests = Engine(PagedModel(model)).generate(PROMPTS, SamplingParams(max_tokens=NEW))
    assert [request.tokens for request in requests] == [continued(plain, prompt) for prompt in PROMPTS]
