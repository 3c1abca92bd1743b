"""Whatever is wrong with a request is said when it is made, and no other request hears of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from duplex_attn import PagedKVCache
from duplex_attn.generate import Accept, Engine, SamplingParams, cache_for
from duplex_attn.modules import GPT

from .conftest import MakeEngine

PARAMS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_tokens": 0}, ValueError, "max_tokens: expected 1 or more, got 0"),
    ({"max_tokens": 1.5}, TypeError, "max_tokens: expected an int, got float"),
    ({"max_tokens": True}, TypeError, "max_tokens: expected an int, got bool"),
    ({"temperature": -0.1}, ValueError, "temperature: expected 0 or more, got -0.1"),
    ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number, got nan"),
    ({"temperature": float("inf")}, ValueError, "temperature: expected a finite number, got inf"),
    ({"temperature": "hot"}, TypeError, "temperature: expected a number, got str"),
    ({"top_k": -1}, ValueError, "top_k: expected 0 or more, got -1"),
    ({"top_k": None}, TypeError, "top_k: expected an int, got NoneType"),
    ({"top_p": 0.0}, ValueError, "top_p: expected above 0, up to 1, got 0.0"),
    ({"top_p": 1.1}, ValueError, "top_p: expected above 0, up to 1, got 1.1"),
    ({"min_p": -0.1}, ValueError, "min_p: expected 0 to 1, got -0.1"),
    ({"min_p": 1.1}, ValueError, "min_p: expected 0 to 1, got 1.1"),
    ({"seed": -1}, ValueError, "seed: expected 0 to 18446744073709551615, got -1"),
    ({"seed": 2**64}, ValueError, "seed: expected 0 to"),
    ({"seed": "x"}, TypeError, "seed: expected an int, got str"),
    ({"stop": ""}, ValueError, "stop: expected strings that are not empty, got ''"),
    ({"stop": [1]}, TypeError, "stop: expected strings, got int"),
    ({"stop_tokens": [-1]}, ValueError, "stop_tokens: expected 0 or more, got -1"),
    ({"stop_tokens": ["a"]}, TypeError, "stop_tokens: expected an int, got str"),
    ({"stop": None}, TypeError, "stop: expected strings, got NoneType"),
    ({"stop": 5}, TypeError, "stop: expected strings, got int"),
    ({"stop_tokens": 5}, TypeError, "stop_tokens: expected token ids, got int"),
    ({"stop_tokens": None}, TypeError, "stop_tokens: expected token ids, got NoneType"),
    ({"logprobs": -1}, ValueError, "logprobs: expected 0 or more, got -1"),
    ({"n": 0}, ValueError, "n: expected 1 or more, got 0"),
    ({"beam_width": 0}, ValueError, "beam_width: expected 1 or more, got 0"),
    ({"beam_width": 2, "n": 3}, ValueError, r"n: expected at most beam_width \(2\), got 3"),
    ({"beam_width": 2, "temperature": 1.0}, ValueError, "temperature: expected 0 with beam_width, got 1.0"),
    ({"beam_width": 2, "speculate": 1}, ValueError, "speculate: expected 0 with beam_width, got 1"),
    ({"length_penalty": float("nan")}, ValueError, "length_penalty: expected a finite number, got nan"),
    ({"length_penalty": 1e5}, ValueError, "length_penalty: expected -32.0 to 32.0, got 100000.0"),
    ({"length_penalty": -1e5}, ValueError, "length_penalty: expected -32.0 to 32.0, got -100000.0"),
    ({"speculate": -1}, ValueError, "speculate: expected 0 or more, got -1"),
]

REQUESTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prompt": []}, ValueError, "prompt: expected 1 to 127 tokens, got 0"),
    ({"prompt": [1] * 128}, ValueError, "prompt: expected 1 to 127 tokens, got 128"),
    ({"prompt": [300]}, ValueError, "prompt: expected ids from 0 to 299, got 300"),
    ({"prompt": [-1]}, ValueError, "prompt: expected ids from 0 to 299, got -1"),
    ({"prompt": [1.0]}, TypeError, "prompt: expected text or a list of token ids, got one with float"),
    ({"prompt": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, "got one with list"),
    ({"prompt": None}, TypeError, "prompt: expected text or a list of token ids, got NoneType"),
    ({"prompt": b"words"}, TypeError, "prompt: expected text or a list of token ids, got bytes"),
    ({"prompt": bytearray(b"words")}, TypeError, "got bytearray"),
    ({"prompt": torch.tensor(3)}, TypeError, "prompt: expected text or a list of token ids, got a tensor without dim"),
    ({"params": {}}, TypeError, "params: expected SamplingParams, got dict"),
    ({"params": SamplingParams(n=9)}, ValueError, r"n: expected at most max_sequences \(8\), got 9"),
    ({"params": SamplingParams(beam_width=9)}, ValueError, r"beam_width: expected at most max_sequences \(8\), got 9"),
    ({"bidirectional_prefix": 4}, ValueError, "bidirectional_prefix: expected 0 to 3 tokens, got 4"),
    ({"bidirectional_prefix": -1}, ValueError, "bidirectional_prefix: expected 0 to 3 tokens, got -1"),
    ({"bidirectional_prefix": "a"}, TypeError, "bidirectional_prefix: expected an int, got str"),
    ({"salt": 5}, TypeError, "salt: expected str, bytes or None, got int"),
    ({"salt": "\ud800"}, ValueError, "surrogates not allowed"),
    ({"verifier": 5}, TypeError, "verifier: expected a callable or None, got int"),
    ({"verifier": Accept, "params": SamplingParams(beam_width=2)}, ValueError, "verifier: expected None with beam_width"),
]  # fmt: skip


@pytest.mark.parametrize("options, error, message", PARAMS, ids=str)
def test_sampling_parameters(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize("name", ["temperature", "length_penalty"])
def test_a_number_that_no_float_holds(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a finite number, got 1000"):
        SamplingParams(**{name: 10**400})


@pytest.mark.parametrize("options, error, message", REQUESTS, ids=str)
def test_requests(engine: MakeEngine, options: dict[str, Any], error: type[Exception], message: str) -> None:
    one = engine(max_sequences=8)
    with pytest.raises(error, match=message):
        one.submit(**{"prompt": [1, 2, 3], **options})
    assert not one.step()


def test_text_without_a_tokenizer(engine: MakeEngine) -> None:
    one = engine(text=False)
    with pytest.raises(TypeError, match="prompt: expected token ids, for this engine has no tokenizer, got text"):
        one.submit("words")
    with pytest.raises(ValueError, match="stop: expected an engine with a tokenizer, got one without"):
        one.submit([1], SamplingParams(stop="x"))


def test_engines(small: GPT) -> None:
    with pytest.raises(ValueError, match="preemption: expected one of swap, recompute, got 'drop'"):
        Engine(small, preemption="drop")
    with pytest.raises(ValueError, match="max_sequences: expected 1 or more, got 0"):
        Engine(small, max_sequences=0)
    with pytest.raises(ValueError, match=r"token_budget: expected at least max_sequences \(64\), got 63"):
        Engine(small, token_budget=63)
    for eos, error, message in (
        ("<eos>", TypeError, "eos: expected an id, or ids, got str"),
        (b"<eos>", TypeError, "eos: expected an id, or ids, got bytes"),
        (1.5, TypeError, "eos: expected an id, or ids, got float"),
        ([1.5], TypeError, "eos: expected an id, or ids, got float"),
        (True, TypeError, "eos: expected an id, or ids, got bool"),
        (-1, ValueError, "eos: expected ids from 0 to 299, got -1"),
        ([3, 10**6], ValueError, "eos: expected ids from 0 to 299, got 1000000"),
    ):
        with pytest.raises(error, match=message):
            Engine(small, cache=cache_for(small, 8, 4), eos=eos)  # type: ignore[arg-type]
    ids: Any
    for ids, kept in (
        (5, {5}),
        (0, {0}),
        ((5, 6), {5, 6}),
        ({7}, {7}),
        (torch.tensor(8), {8}),
        ([], set()),
        (None, set()),
    ):
        assert Engine(small, cache=cache_for(small, 8, 4), eos=ids).eos == kept


def test_a_model_that_trains(small: GPT) -> None:
    with pytest.raises(ValueError, match=r"model: expected eval mode \(model.eval\(\)\), got training mode"):
        Engine(GPT(small.config), cache=cache_for(small, 8, 4))
    model = GPT(small.config).eval()
    engine = Engine(model, cache=cache_for(small, 8, 4))
    model.train()
    with pytest.raises(ValueError, match=r"model: expected eval mode \(model.eval\(\)\), got training mode"):
        engine.generate([[5]])


@pytest.mark.parametrize(
    "change", [{"num_layers": 3}, {"num_kv_heads": 2}, {"head_dim": 16}, {"head_dim_v": 16}], ids=str
)
def test_a_cache_of_another_model(small: GPT, change: dict[str, int]) -> None:
    shape = {"num_layers": 2, "num_pages": 8, "page_size": 4, "num_kv_heads": 4, "head_dim": 12, **change}
    with pytest.raises(
        ValueError, match=r"cache: expected the model's layers, heads_kv and head_dim \(2, 4, 12\), got"
    ):
        Engine(small, cache=PagedKVCache(**shape))
    with pytest.raises(TypeError, match="cache: expected a PagedKVCache or None, got int"):
        Engine(small, cache=8)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompts", ["hello", b"hello", 5, None])
def test_prompts_that_are_no_list(engine: MakeEngine, prompts: Any) -> None:
    one = engine()
    with pytest.raises(TypeError, match=f"prompts: expected a list of prompts, got {type(prompts).__name__}"):
        one.generate(prompts)
    assert not one.step()


def test_a_list_of_parameters_of_the_wrong_length(engine: MakeEngine) -> None:
    with pytest.raises(ValueError, match="params: expected one, or one for each of 2 prompts, got 1"):
        engine().generate([[1], [2]], [SamplingParams()])


def test_one_bad_prompt_takes_the_others_back(engine: MakeEngine) -> None:
    one = engine()
    with pytest.raises(ValueError, match="prompt: expected ids"):
        one.generate([[1], [300]])
    assert not one.step()
