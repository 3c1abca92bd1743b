"""Streams, sync and async: whoever leaves, however it leaves, gives its pages back and disturbs nobody."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncGenerator, Callable
from typing import Any

import duplex_attn as da
import pytest
import torch
from duplex_attn.generate import Accept, Chunk, Engine, Request, SamplingParams, cache_for
from duplex_attn.generate import engine as module
from duplex_attn.modules import GPT

from .conftest import PROMPTS, MakeEngine

LONG = SamplingParams(max_tokens=40, temperature=1.0, seed=3)


def expected(engine: MakeEngine, prompt: list[int], params: SamplingParams = LONG) -> list[int]:
    return engine().generate([prompt], params)[0].tokens


def used(engine: Engine, request: Request) -> bool:
    engine.cache.check()
    return any(sample.seq is not None for sample in request.samples)


@pytest.mark.parametrize("when", ["waiting", "half a prompt", "running", "swapped out"])
def test_cancel_frees_pages_at_once(engine: MakeEngine, when: str) -> None:
    one = engine(24, token_budget=8, max_sequences=4)
    other = one.submit(PROMPTS[3], LONG)
    if when == "swapped out":
        one.submit(PROMPTS[4], SamplingParams(max_tokens=60))
    request = one.submit(PROMPTS[2] if when == "half a prompt" else PROMPTS[0], LONG)
    until: dict[str, Callable[[], bool]] = {
        "waiting": lambda: True,
        "half a prompt": lambda: used(one, request),
        "running": lambda: len(request.tokens) > 3,
        "swapped out": lambda: request.preemptions > 0,
    }
    while not until[when]():
        assert one.step()
    assert request.state.value == ("running" if when in ("half a prompt", "running") else "waiting")
    one.cancel(request)
    assert request.finished and request.outputs[0].finish_reason == "cancelled" and not used(one, request)
    one.cancel(request)
    while one.step():
        pass
    assert other.tokens == expected(engine, PROMPTS[3])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_an_exception_between_chunks(engine: MakeEngine, error: type[BaseException]) -> None:
    one = engine()
    other, request = one.submit(PROMPTS[1], LONG), one.submit(PROMPTS[0], LONG)
    stream = one.stream(request)
    next(stream)
    with pytest.raises(error):
        stream.throw(error)
    assert request.finished and not used(one, request)
    assert [token for chunk in one.stream(other) for token in chunk.tokens] == expected(engine, PROMPTS[1])


def test_a_stream_that_is_closed(engine: MakeEngine) -> None:
    one = engine()
    request = one.submit(PROMPTS[0], LONG)
    for _ in one.stream(request):
        break
    assert request.outputs[0].finish_reason == "cancelled"


def test_a_request_of_another_engine(engine: MakeEngine) -> None:
    """It is refused at once, and goes on where it belongs."""
    one, other = engine(), engine()
    request = one.submit(PROMPTS[0], LONG)
    one.step()

    async def read() -> None:
        async for _ in other.astream(request):
            pass

    for call in (lambda: other.cancel(request), lambda: next(other.stream(request)), lambda: asyncio.run(read())):
        with pytest.raises(ValueError, match="request: expected one submitted to this engine, got one of another"):
            call()
    with pytest.raises(TypeError, match="request: expected what submit returned, got int"):
        one.cancel(request.id)  # type: ignore[arg-type]
    assert not request.finished
    assert [token for chunk in one.stream(request) for token in chunk.tokens] == expected(engine, PROMPTS[0])


def test_a_request_that_nothing_runs_for(engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost by the scheduler, which must not happen: whoever waits for it is told, not kept."""
    one = engine()
    request = one.submit(PROMPTS[0], LONG)
    one._scheduler.waiting.clear()
    step, left = one.step, iter(range(2))
    monkeypatch.setattr(one, "step", lambda: next(left) >= 0 and step())
    with pytest.raises(RuntimeError, match="step: expected work for a request that has not ended, got none"):
        next(one.stream(request))
    assert request.finished


def test_a_handle_does_not_keep_the_engine(small: GPT) -> None:
    one = Engine(small, cache=cache_for(small, 8, 4))
    request, gone = one.submit(PROMPTS[1]), weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None and request.prompt == PROMPTS[1]


INTERRUPTED = ["cache.extend", "cache.batch", "model.step", "cache.commit_batch", "cache.fork", "choose", "verifier"]


@pytest.mark.parametrize("where", INTERRUPTED)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("time", [1, 2, 5])
def test_a_step_that_is_interrupted(
    engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException], time: int
) -> None:
    """In the middle of a step: the stream that drove it ends, the others come to the tokens they would have."""
    if where == "verifier" and error is RuntimeError:
        return  # fails its own request only
    params = [LONG, SamplingParams(max_tokens=20, temperature=1.0, seed=5, n=3), SamplingParams(9, beam_width=3, n=2)]
    params += [SamplingParams(max_tokens=30, speculate=4)]
    whole = engine()
    wanted = [[out.tokens for out in r.outputs] for r in whole.generate(PROMPTS[:4], params)]
    one = engine(token_budget=30, max_sequences=20)
    others = [one.submit(p, q) for p, q in zip(PROMPTS, params, strict=False)]
    if where == "verifier":
        one.cancel(others[0])
        others[0] = one.submit(PROMPTS[0], LONG, verifier=lambda draft: verified())
    request = one.submit(PROMPTS[4], LONG)
    owner: Any = {"cache": one.cache, "model": one.model}.get(where.split(".")[0], module)
    name = where.split(".")[-1]
    calls = 0

    def interrupted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            made = None if where == "cache.fork" and calls == time else call(*arguments)
            if calls == time:
                raise error("now")
            return made

        return wrapped

    verified = interrupted(Accept)
    if where != "verifier":
        monkeypatch.setattr(owner, name, interrupted(getattr(owner, name)))
    try:
        with pytest.raises(error):
            for _ in one.stream(request):
                pass
    except pytest.fail.Exception:
        assert where == "cache.fork" and error is RuntimeError  # within a beam search: only that request fails
    assert request.finished and not used(one, request)
    while one.step():
        one.cache.check()
    for other, tokens in zip(others, wanted, strict=True):
        if other.error is None:
            assert [out.tokens for out in other.outputs] == tokens


def test_many_streams_at_once(engine: MakeEngine) -> None:
    one = engine(40, token_budget=12, max_sequences=6)
    requests = [one.submit(prompt, LONG) for prompt in PROMPTS]
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    streams = [one.stream(request) for request in requests]
    while any(not request.finished for request in requests):
        for n, stream in enumerate(streams):
            for chunk in stream:
                tokens[n] += chunk.tokens
                break
    for n, stream in enumerate(streams):
        tokens[n] += [token for chunk in stream for token in chunk.tokens]
    assert tokens == [expected(engine, prompt) for prompt in PROMPTS]


def test_async_streams(engine: MakeEngine) -> None:
    one = engine(60, token_budget=12, max_sequences=6)

    async def read(prompt: list[int], most: int = 1000) -> list[int]:
        request, tokens = one.submit(prompt, LONG), list[int]()
        async for chunk in one.astream(request):
            tokens += chunk.tokens
            if len(tokens) >= most:
                break
        return tokens

    async def main() -> list[list[int]]:
        reads = [asyncio.ensure_future(read(prompt)) for prompt in PROMPTS]
        leaving = asyncio.ensure_future(read(PROMPTS[0], most=1000))
        while one.stats().tokens_generated < 20:
            await asyncio.sleep(0)
        leaving.cancel()
        found = await asyncio.gather(*reads)
        with pytest.raises(asyncio.CancelledError):
            await leaving
        return found

    assert asyncio.run(main()) == [expected(engine, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("leaves", [False, True])
def test_the_loop_goes_on_while_a_step_runs(engine: MakeEngine, leaves: bool) -> None:
    """Whether a stream ends or is left: nothing on the loop waits for a step, here one that waits for the loop."""
    one = engine()
    request = one.submit(PROMPTS[0], SamplingParams(max_tokens=4))
    while not (request.chunks if leaves else request.finished):
        one.step()
    begun, goes_on = threading.Event(), threading.Event()

    def long_step() -> bool:
        with one._lock:
            begun.set()
            return goes_on.wait(20)

    async def read_on(stream: AsyncGenerator[Chunk]) -> None:
        async for _ in stream:
            pass

    async def main() -> bool:
        step = asyncio.ensure_future(asyncio.to_thread(long_step))
        await asyncio.to_thread(begun.wait)
        stream = one.astream(request)
        await anext(stream)
        reading = asyncio.ensure_future(stream.aclose() if leaves else read_on(stream))
        await asyncio.sleep(0.01)
        goes_on.set()
        await reading
        return await step

    assert asyncio.run(main())
    assert request.finished and not used(one, request)


def test_threads(engine: MakeEngine) -> None:
    one = engine(60, token_budget=12, max_sequences=6)
    found: dict[int, list[int]] = {}

    def read(n: int) -> None:
        found[n] = [token for chunk in one.stream(one.submit(PROMPTS[n], LONG)) for token in chunk.tokens]

    threads = [threading.Thread(target=read, args=(n,)) for n in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(PROMPTS))] == [expected(engine, prompt) for prompt in PROMPTS]


def test_a_pool_too_small_for_one_ends_that_one(engine: MakeEngine) -> None:
    one = engine(6)
    request, other = one.submit(PROMPTS[4], SamplingParams(max_tokens=60)), one.submit(PROMPTS[3])
    request.room = 10**6  # as if the pool had so many
    with pytest.raises(da.OutOfPages):
        for _ in one.stream(request):
            pass
    assert request.outputs[0].finish_reason == "error"
    one.cancel(other)
    with pytest.raises(ValueError, match="prompt: expected 1 to 23 tokens, got 40"):
        engine(6).submit(PROMPTS[2])


@pytest.mark.parametrize("params", [LONG, SamplingParams(max_tokens=4, beam_width=2), SamplingParams()], ids=str)
def test_logits_that_are_no_numbers(engine: MakeEngine, small: GPT, params: SamplingParams) -> None:
    """A model gone wrong for one request: that one fails."""
    one = engine()
    good, bad = one.submit(PROMPTS[0], LONG), one.submit(PROMPTS[1], params)
    step = small.step

    class Model:
        config, word, modules = small.config, small.word, small.modules

        def step(self, ids: Any, cache: Any, batch: Any, *options: Any) -> torch.Tensor:
            logits = step(ids, cache, batch, *options)
            return torch.where(torch.isin(batch.seqlens_k, torch.tensor([4]))[:, None], float("nan"), logits)

    one.model = Model()  # type: ignore[assignment]
    while one.step():
        pass
    assert isinstance(bad.error, ValueError) and "logits: expected a finite number" in str(bad.error)
    assert good.tokens == expected(engine, PROMPTS[0])
