"""The engine: many requests over one model and one pool of pages, a batch a step."""

from __future__ import annotations

import asyncio
import threading
from bisect import bisect_left
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ..cache import CacheStats, PagedKVCache
from ..checks import wrong_type, wrong_value
from ..modules.language_model import LanguageModel, Opening
from . import beams
from .params import SamplingParams
from .request import Chunk, Request, Sample, State, finish_reason
from .sampling import NO_TOKEN, TokenLogprob, choose, logprobs_of
from .scheduler import Scheduler, Work
from .verify import Accept, Reject, Replace, Verifier, Wait

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POOL_BYTES = 1 << 30  # of a cache that the engine makes itself
MAX_REJECTIONS = 1000  # of one sample: a verifier that takes nothing must come to an end
PREEMPTIONS = ("swap", "recompute")
BYTES = (bytes, bytearray, memoryview)  # sequences of ints, and no token ids


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done, and what it does now."""

    waiting: int
    running: int
    steps: int
    tokens_computed: int  # that the model was run over, of prompts and guesses too
    tokens_generated: int
    tokens_guessed: int
    guesses_right: int
    preemptions: int
    cache: CacheStats


class Engine:
    """Generates text for many requests at once.

        engine = Engine(model, tokenizer)
        request = engine.submit("Attention is", SamplingParams(max_tokens=64, temperature=0.8, seed=1))
        for chunk in engine.stream(request):
            print(chunk.text, end="")

    Requests come and go at any step. Each `step` runs one batch, of prompts, parts of prompts and next tokens; streams
    take steps as they need them, for everyone. The tokens of a request do not depend on the others; in the
    batch-invariant mode its logits do not in any bit. Calls may come from several threads: one waits for another.

    model: in eval mode, in float32, float16 or bfloat16. tokenizer: for text; without one, prompts are token ids.
    cache: None makes one of 1 GiB, or of what max_sequences can use at most. token_budget: tokens of a step at most,
        so that a long prompt does not stall the others; a bidirectional prefix, which is never split, may exceed it.
    preemption: what happens to the youngest request when pages run out: "swap" (to host memory) or "recompute"; several
        samples of a prompt, and beams, are swapped with either.
    eos: the id, or ids, that end a text.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        *,
        cache: PagedKVCache | None = None,
        eos: int | Collection[int] | None = None,
        max_sequences: int = 64,
        token_budget: int = 512,
        preemption: str = "swap",
        batch_invariant: bool = False,
    ):
        if preemption not in PREEMPTIONS:
            wrong_value("preemption", f"one of {', '.join(PREEMPTIONS)}", repr(preemption))
        if max_sequences < 1:
            wrong_value("max_sequences", "1 or more", max_sequences)
        if token_budget < max_sequences:
            wrong_value("token_budget", f"at least max_sequences ({max_sequences})", token_budget)
        if not callable(getattr(model, "opening", None)):
            wrong_type(
                "model", "one that generates (GPT, Seq2Seq, or PagedModel of one of transformers)", type(model).__name__
            )
        check_eval(model.modules())
        if batch_invariant and not model.can_be_invariant:
            wrong_value("batch_invariant", "False with a model of transformers", True)
        if cache is not None:
            check_cache(cache, model)
        self.eos = eos_ids(eos, model.vocab_size)
        self.model, self.tokenizer, self.batch_invariant = model, tokenizer, batch_invariant
        self.cache = cache_for(model, max_sequences=max_sequences) if cache is None else cache
        self._scheduler = Scheduler(self.cache, token_budget, max_sequences, preemption == "swap", self._fail)
        self._owner = object()
        self._lock = threading.RLock()
        self._steps_now = False
        self._ids = 0
        self._steps = self._computed = self._generated = self._guessed = self._right = 0

    def submit(
        self,
        prompt: str | Sequence[int] | Tensor,
        params: SamplingParams | None = None,
        *,
        bidirectional_prefix: int = 0,
        salt: str | bytes | None = None,
        verifier: Verifier | None = None,
        add_special_tokens: bool = True,
    ) -> Request:
        """A new request; it runs in the steps to come. Waits for a step that is running; raises ValueError or TypeError,
        naming what is wrong.

        prompt: what the text continues, or with an encoder its source. bidirectional_prefix: leading tokens of the prompt that
            all see each other. salt: pages are shared only between requests of the same one. verifier: see
            `duplex_attn.generate.verify`. add_special_tokens: of a prompt in text.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            wrong_type("params", "SamplingParams", type(params).__name__)
        tokens = self._tokens_of(prompt, add_special_tokens)
        if salt is not None and not isinstance(salt, (str, bytes)):
            wrong_type("salt", "str, bytes or None", type(salt).__name__)
        if verifier is not None and not callable(verifier):
            wrong_type("verifier", "a callable or None", type(verifier).__name__)
        if isinstance(bidirectional_prefix, bool) or not isinstance(bidirectional_prefix, int):
            wrong_type("bidirectional_prefix", "an int", type(bidirectional_prefix).__name__)
        if not 0 <= bidirectional_prefix <= len(tokens):
            wrong_value("bidirectional_prefix", f"0 to {len(tokens)} tokens", bidirectional_prefix)
        opening = self.model.opening(tokens, self.cache.page_size, bidirectional_prefix)
        room = self._room(opening)
        if room < 1 or not tokens:
            self._refuse(tokens)
        if params.sequences > self._scheduler.max_sequences:
            name = "beam_width" if params.beams else "n"
            wrong_value(name, f"at most max_sequences ({self._scheduler.max_sequences})", params.sequences)
        if params.stop and self.tokenizer is None:
            wrong_value("stop", "an engine with a tokenizer", "one without")
        if params.beams and verifier is not None:
            wrong_value("verifier", "None with beam_width", "one")
        seed = int(torch.randint(2**62, ())) if params.seed is None else params.seed
        stop_tokens = frozenset(params.stop_tokens) | (frozenset() if params.ignore_eos else self.eos)
        salt = salt.encode() if isinstance(salt, str) else salt
        with self._lock:
            self._ids += 1
            request = Request(
                self._ids, tokens, params, seed, self.tokenizer, opening, room, salt, verifier, stop_tokens,
                owner=self._owner,
            )  # fmt: skip
            self._scheduler.waiting.append(request)
        return request

    def step(self) -> bool:
        """Runs one batch. False where there was nothing to run.

        Where the model raises, or Ctrl-C comes, nothing is lost: the next step computes the same again. Raises RuntimeError
        in a verifier, which is called within a step: it may submit and cancel, or generate with an engine of its own.
        """
        with self._lock:
            if self._steps_now:
                raise RuntimeError("step: expected no other to run, got a call of a verifier within one")
            self._steps_now = True
            try:
                return self._step()
            finally:
                self._steps_now = False

    def _step(self) -> bool:
        check_eval([next(iter(self.model.modules()))])  # since the engine was made; all of them take too long
        work = self._scheduler.plan()
        if not work:
            return False
        rows, logits = self._compute(work)
        self._steps += 1
        for one, row in zip(tuple(work), tuple(rows), strict=True):
            if row >= 0:
                self._split(one.sample, row, work, rows)
        self._choose(work, rows, logits)
        return True

    def stream(self, request: Request) -> Iterator[Chunk]:
        """What is new of the request, as it comes, until it ends. Takes steps meanwhile.

        Leaving it early (an exception, Ctrl-C, `close`) cancels the request. Raises what made the request fail.
        """
        self._check_own(request)
        try:
            while True:
                while request.chunks:
                    yield request.chunks.popleft()
                if request.finished:
                    break
                self._step_for(request)
        finally:
            self.cancel(request)
        if request.error is not None:
            raise request.error

    async def astream(self, request: Request) -> AsyncIterator[Chunk]:
        """`stream` for asyncio: steps run in a thread, so that the loop goes on; many streams may run at once."""
        self._check_own(request)
        try:
            while True:
                while request.chunks:
                    yield request.chunks.popleft()
                if request.finished:
                    break
                await asyncio.to_thread(self._step_unless_shown, request)
        finally:
            if not request.finished:  # a step may be running, and cancel waits for it
                await asyncio.to_thread(self.cancel, request)
        if request.error is not None:
            raise request.error

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Tensor],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[Request]:
        """All prompts to their ends; options as in `submit`. Raises what made the first of them fail."""
        if isinstance(prompts, (str, *BYTES)) or not isinstance(prompts, (Sequence, Tensor)):
            wrong_type("prompts", "a list of prompts", type(prompts).__name__)
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            wrong_value("params", f"one, or one for each of {len(prompts)} prompts", len(each))
        requests: list[Request] = []
        try:
            for prompt, one in zip(prompts, each, strict=True):
                requests.append(self.submit(prompt, one, **options))
            while not all(request.finished for request in requests):
                self._step_for(*requests)
        finally:
            for request in requests:
                self.cancel(request)
        for request in requests:
            if request.error is not None:
                raise request.error
        return requests

    def cancel(self, request: Request) -> None:
        """Ends the request and gives its pages back at once. Nothing where it has ended."""
        self._check_own(request)
        with self._lock:
            self._end(request, "cancelled")

    def close(self) -> None:
        """Cancels all requests."""
        with self._lock:
            for request in (*self._scheduler.running, *self._scheduler.waiting):
                self.cancel(request)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def stats(self) -> EngineStats:
        """Counted since the engine was made; the cache's at this moment."""
        scheduler = self._scheduler
        with self._lock:
            return EngineStats(
                waiting=len(scheduler.waiting),
                running=len(scheduler.running),
                steps=self._steps,
                tokens_computed=self._computed,
                tokens_generated=self._generated,
                tokens_guessed=self._guessed,
                guesses_right=self._right,
                preemptions=scheduler.preemptions,
                cache=self.cache.stats(),
            )

    def _tokens_of(self, prompt: str | Sequence[int] | Tensor, add_special_tokens: bool) -> list[int]:
        tokens: list[Any]
        if isinstance(prompt, Tensor):
            if not prompt.dim():
                wrong_type("prompt", "text or a list of token ids", "a tensor without dimensions")
            tokens = prompt.tolist()
        elif not isinstance(prompt, Sequence) or isinstance(prompt, BYTES):
            wrong_type("prompt", "text or a list of token ids", type(prompt).__name__)
        elif not isinstance(prompt, str):
            tokens = list(prompt)
        elif self.tokenizer is None:
            wrong_type("prompt", "token ids, for this engine has no tokenizer", "text")
        else:
            tokens = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens).ids
        vocab_size = self.model.vocab_size
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int):
                wrong_type("prompt", "text or a list of token ids", f"one with {type(token).__name__}")
            if not 0 <= token < vocab_size:
                wrong_value("prompt", f"ids from 0 to {vocab_size - 1}", token)
        return tokens

    def _room(self, opening: Opening) -> int:
        """Tokens that may follow it."""
        capacity = self.cache.num_pages * self.cache.page_size
        most = capacity if opening.max_length is None else min(opening.max_length, capacity)
        return most - len(opening.tokens)

    def _refuse(self, prompt: list[int]) -> NoReturn:
        """Says how long a prompt may be."""
        page_size = self.cache.page_size

        def too_long(n: int) -> bool:
            return self._room(self.model.opening([0] * n, page_size)) < 1

        most = bisect_left(range(1, self.cache.num_pages * page_size + 1), True, key=too_long)
        if not most:
            wrong_value("cache", "pages for a prompt and a token", f"{self.cache.num_pages} of {page_size} slots")
        wrong_value("prompt", f"1 to {most} tokens", len(prompt))

    def _compute(self, work: list[Work]) -> tuple[list[int], Tensor]:
        """Runs the model over a step. Where each work's rows of logits begin (-1: it has none), and all of them."""
        seqs = [one.sample.seq for one in work]
        counts = [one.count for one in work]
        batch = self.cache.batch([seq for seq in seqs if seq is not None], counts)
        ids: list[int] = []
        rows: list[int] = []  # of logits, one for the last token and each guess
        begins: list[int] = []
        for one in work:
            committed = one.sample.seq.committed if one.sample.seq is not None else 0
            ids += (one.sample.all_tokens(committed) + one.guesses)[: one.count]
            begins.append(len(rows) if one.ready else -1)
            if one.ready:
                rows += range(len(ids) - 1 - len(one.guesses), len(ids))
        device = self.cache.device
        tokens, wanted = torch.tensor(ids, device=device), torch.tensor(rows, dtype=torch.int64, device=device)
        logits = self.model.step(tokens, self.cache, batch, wanted, self.batch_invariant)
        self.cache.commit_batch(batch)
        self._computed += len(ids)
        return begins, logits

    def _split(self, first: Sample, row: int, work: list[Work], rows: list[int]) -> None:
        """After the prompt, each of n samples goes its own way from the same logits."""
        request = first.request
        if first.tokens or first.seq is None or request.params.beams:
            return
        for index in range(len(request.samples), request.params.n):
            sample = request.sample(index)
            request.samples.append(sample)
            sample.seq = self.cache.fork(first.seq)
            work.append(Work(sample, 0))
            rows.append(row)

    def _choose(self, work: list[Work], begins: list[int], logits: Tensor) -> None:
        """The next tokens of all samples whose logits are there."""
        ready = [(one, begin) for one, begin in zip(work, begins, strict=True) if begin >= 0]
        plain = [(one, begin) for one, begin in ready if not one.sample.request.params.beams]
        rows = [begin + n for one, begin in plain for n in range(1 + len(one.guesses))]
        draws = [one.sample.draw(n) for one, _ in plain for n in range(1 + len(one.guesses))]
        chosen_logits = logits
        if rows != list(range(len(logits))):
            chosen_logits = logits[torch.tensor(rows, dtype=torch.int64, device=logits.device)]
        tokens = choose(chosen_logits, draws) if rows else []
        logprobs = logprobs_of(chosen_logits, tokens, [draw.params.logprobs for draw in draws])
        at = 0
        for one, _ in plain:
            end = at + 1 + len(one.guesses)
            self._guarded(one.sample.request, self._take, one, tokens[at:end], logprobs[at:end])
            at = end
        beams_of: dict[Request, list[tuple[Sample, int]]] = {}
        for one, begin in ready:
            if one.sample.request.params.beams:
                beams_of.setdefault(one.sample.request, []).append((one.sample, begin))
        for request, found in beams_of.items():
            self._guarded(request, self._search, request, found, logits)

    def _guarded(self, request: Request, call: Any, *arguments: Any) -> None:
        """What goes wrong with one request ends that one."""
        if request.finished:
            return
        try:
            call(*arguments)
        except Exception as error:
            self._fail(request, error)
            return
        if not request.live:
            self._end(request, None)

    def _take(self, work: Work, tokens: list[int], logprobs: list[TokenLogprob | None]) -> None:
        """The tokens chosen for a sample, up to the first that was guessed otherwise."""
        sample = work.sample
        self._guessed += len(work.guesses)
        rejections = sample.rejections
        for n, token in enumerate(tokens):
            if token == NO_TOKEN:
                raise ValueError("logits: expected a finite number to choose, got none (NaN, or every token is banned)")
            sample.push(token, logprobs[n])
            try:
                self._settle(sample)
            except KeyboardInterrupt:
                if sample.finish_reason is None and sample.rejections == rejections:
                    sample.cut(len(sample.tokens) - 1)  # nobody has looked at it: it is chosen again
                raise
            self._generated += 1
            right = n < len(work.guesses) and token == work.guesses[n]
            self._right += right
            if not right or sample.finish_reason is not None or sample.rejections > rejections:
                break
        self._scheduler.rewind(sample, sample.length - 1)

    def _settle(self, sample: Sample) -> None:
        """Whether the sample ends with its last token, whether its verifier takes it, and what may be shown."""
        reason = finish_reason(sample)
        verifier = sample.request.verifier
        if verifier is not None:
            reason = self._verify(sample, verifier, reason)
            if sample.request.finished:  # the verifier has cancelled it
                return
        if reason is not None:
            sample.finish_reason = reason
            self._scheduler.release(sample)
        sample.show()

    def _verify(self, sample: Sample, verifier: Verifier, reason: str | None) -> str | None:
        verdict = verifier(sample.draft(reason is not None))
        if isinstance(verdict, Accept):
            sample.accepted = len(sample.tokens)
            return reason
        if isinstance(verdict, Wait):
            return reason
        if not isinstance(verdict, (Reject, Replace)):
            wrong_type("verifier", "an answer of Accept, Wait, Reject or Replace", type(verdict).__name__)
        to, last = verdict.to, len(sample.tokens) - isinstance(verdict, Reject)
        if not sample.accepted <= to <= last:
            wrong_value("verifier", f"a token from the first not accepted ({sample.accepted}) to {last}", to)
        if sample.rejections == MAX_REJECTIONS:
            raise RuntimeError(f"verifier: expected an end after {MAX_REJECTIONS} rejections, got another")
        by = self._replacement(verdict) if isinstance(verdict, Replace) else []
        kept = len(sample.request.opening.tokens) + to
        self._scheduler.rewind(sample, kept - (not by))  # the last token is computed again
        rejected = sample.tokens[to:]
        sample.cut(to)
        sample.rejections += 1
        if isinstance(verdict, Reject):
            sample.banned.setdefault(to, set()).add(rejected[0])
            return None
        reason = None
        for token in by:
            sample.push(token, None)
            if reason := finish_reason(sample):
                break
        sample.accepted = len(sample.tokens)
        return reason

    def _replacement(self, verdict: Replace) -> list[int]:
        if isinstance(verdict.by, str):
            if self.tokenizer is None:
                wrong_type("verifier", "a replacement in tokens, for this engine has no tokenizer", "text")
            tokens = self.tokenizer.encode(verdict.by, add_special_tokens=False).ids
        else:
            tokens = list(verdict.by)
        vocab_size = self.model.vocab_size
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                wrong_value("verifier", f"a replacement of ids from 0 to {vocab_size - 1}", token)
        if not tokens:
            wrong_value("verifier", "a replacement of one token or more", "none")
        return tokens

    def _search(self, request: Request, found: list[tuple[Sample, int]], logits: Tensor) -> None:
        """One step of a beam search."""
        rows = torch.tensor([row for _, row in found], device=logits.device)
        beams.advance(request, [sample for sample, _ in found], logits[rows], self.cache, self._scheduler)
        self._generated += len(request.live)

    def _check_own(self, request: Any) -> None:
        if not isinstance(request, Request):
            wrong_type("request", "what submit returned", type(request).__name__)
        if request.owner is not self._owner:
            wrong_value("request", "one submitted to this engine", "one of another")

    def _step_for(self, *requests: Request) -> None:
        """A step for requests that have not all ended: one that nothing runs for would be waited for without end."""
        if not self.step() and not all(request.finished for request in requests):
            raise RuntimeError("step: expected work for a request that has not ended, got none")

    def _step_unless_shown(self, request: Request) -> None:
        """A step, unless another thread's has brought what the request waits for."""
        with self._lock:
            if not request.chunks and not request.finished:
                self._step_for(request)

    def _fail(self, request: Request, error: BaseException) -> None:
        request.error = error
        self._end(request, "error")

    def _end(self, request: Request, reason: str | None) -> None:
        before, request.state = request.state, State.FINISHED
        self._scheduler.leave(request)  # again where Ctrl-C came in the middle of it
        if before is State.FINISHED:
            return
        for sample in request.live:
            sample.finish_reason = reason
            sample.show()


def eos_ids(eos: Any, vocab_size: int) -> frozenset[int]:
    if eos is None:
        return frozenset()
    if isinstance(eos, Tensor):
        eos = eos.tolist()
    if isinstance(eos, (str, *BYTES)) or not isinstance(eos, (int, Collection)):
        wrong_type("eos", "an id, or ids", type(eos).__name__)
    ids = (eos,) if isinstance(eos, int) else tuple(eos)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            wrong_type("eos", "an id, or ids", type(token).__name__)
        if not 0 <= token < vocab_size:
            wrong_value("eos", f"ids from 0 to {vocab_size - 1}", token)
    return frozenset(ids)


def check_eval(modules: Iterable[nn.Module]) -> None:
    if any(module.training for module in modules):
        wrong_value("model", "eval mode (model.eval())", "training mode, in which dropout changes tokens")


def check_cache(cache: Any, model: LanguageModel) -> None:
    """That the model's keys and values have the shape of the cache's slots."""
    if not isinstance(cache, PagedKVCache):
        wrong_type("cache", "a PagedKVCache or None", type(cache).__name__)
    layers, heads_kv, *head_dims = model.cache_shape[:4]
    for pages, head_dim in zip((cache.k_pages, cache.v_pages), head_dims, strict=True):
        expected, got = (layers, heads_kv, head_dim), (pages.shape[0], *pages.shape[3:])
        if got != expected:
            wrong_value("cache", f"the model's layers, heads_kv and head_dim {expected}", got)


def cache_for(
    model: LanguageModel, num_pages: int | None = None, page_size: int = 16, *, max_sequences: int = 64, **options: Any
) -> PagedKVCache:
    """A cache of the model's shape, dtype and device; by default of 1 GiB at most. options: as of `PagedKVCache`."""
    layers, heads_kv, head_dim, head_dim_v, dtype, device = model.cache_shape
    if num_pages is None:
        pages = POOL_BYTES // (layers * heads_kv * (head_dim + head_dim_v) * dtype.itemsize * page_size)
        each = model.most_pages(page_size)
        num_pages = max(1, pages if each is None else min(max_sequences * each, pages))
    shape = (layers, num_pages, page_size, heads_kv, head_dim)
    return PagedKVCache(*shape, head_dim_v=head_dim_v, dtype=dtype, device=device, **options)
