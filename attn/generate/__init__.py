"""Streaming generation for many requests at once, over a paged KV cache.

engine      `Engine`: submit, step, stream, cancel        scheduler   which tokens a step computes; preemption
params      what a request asks of the sampler            sampling    from logits to tokens
request     a request's samples, what may be shown        text        tokens to text, stop strings
verify      what a verifier sees and answers              speculate   guesses ahead, by prompt lookup
beams       beam search by fork                        terminal    the work behind `duplex-attn generate`
"""

from .engine import Engine, EngineStats, cache_for
from .params import SamplingParams
from .request import Chunk, Output, Request, State
from .sampling import TokenLogprob
from .verify import Accept, Draft, Reject, Replace, Verdict, Verifier, Wait

__all__ = [
    "Accept", "Chunk", "Draft", "Engine", "EngineStats", "Output", "Reject", "Replace", "Request", "SamplingParams",
    "State", "TokenLogprob", "Verdict", "Verifier", "Wait", "cache_for",
]  # fmt: skip
