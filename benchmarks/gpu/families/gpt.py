"""GPT-2 small end to end over whole prompts: our attention against SDPA's in the same model."""

from __future__ import annotations

import torch
from duplex_attn.modules import GPT, GPTConfig
from torch import Tensor

from ..check import Check, against
from ..workload import Peer, Problem, Workload

TINY = {
    "hidden": 64,
    "layers": 2,
    "heads": 2,
    "heads_kv": 2,
    "head_dim": 32,
    "inner": 128,
    "vocab_size": 100,
    "max_positions": 64,
}


def build(w: Workload, device: torch.device) -> Problem:
    config = GPTConfig(**TINY) if w.queries < 64 else GPTConfig.gpt2()
    model = GPT(config).to(device, w.dtype).eval()
    ids = torch.randint(config.vocab_size, (w.batch, w.queries), device=device)

    def logits(attention: str) -> Tensor:
        with torch.inference_mode():
            return model(ids, attention=attention, last=True)

    @torch.inference_mode()
    def formula(dtype: torch.dtype) -> Tensor:
        found = model.to(dtype)(ids[:1], attention="plain", last=True)
        model.to(w.dtype)
        return found

    def check(found: Tensor) -> Check:
        return against(found[:1], formula(torch.float64), formula(w.dtype), None)

    weights = sum(x.numel() for layer in model.layers for x in layer.parameters())
    tokens = w.batch * w.queries
    flops = 2.0 * weights * tokens + 2.0 * config.layers * config.hidden * tokens * w.queries
    peers = {"sdpa": lambda: Peer(lambda: logits("sdpa"))}
    return Problem(lambda backend: lambda: logits("duplex"), peers, check, flops, as_chosen=True)
