"""BERT end to end on texts of many lengths: our packed rows against SDPA on padded ones, with the same weights."""

from __future__ import annotations

import torch
from duplex_attn.modules import Bert, BertConfig
from torch import Tensor

from ..check import Check, against
from ..workload import Peer, Problem, Workload
from . import lengths

CHECKED = 2  # texts
TINY = {"hidden": 64, "layers": 2, "heads": 2, "inner": 128, "vocab_size": 100, "max_positions": 64}


def build(w: Workload, device: torch.device) -> Problem:
    config = BertConfig.base(**(TINY if w.queries < 64 else {}), pooler=False)
    model = Bert(config).to(device, w.dtype).eval()
    lens = torch.tensor(lengths(w))
    ids = torch.randint(config.vocab_size, (w.batch, w.queries)).to(device)
    keep = torch.arange(w.queries) < lens[:, None]  # on the host: unpadding then waits for nothing
    there = keep.to(device)

    def hidden(attention: str) -> Tensor:
        with torch.inference_mode():
            return model(ids, attention_mask=keep if attention == "duplex" else there, attention=attention)

    def check(found: Tensor) -> Check:
        kept = there[:CHECKED]
        truth, plain = (formula(model, ids[:CHECKED], kept, t) for t in (torch.float64, w.dtype))
        return against(found[:CHECKED][kept], truth[kept], plain[kept], None)

    weights = sum(x.numel() for layer in model.layers for x in layer.parameters())
    flops = 2.0 * weights * int(lens.sum()) + 4.0 * config.layers * config.hidden * int((lens**2).sum())
    peers = {"padded sdpa": lambda: Peer(lambda: hidden("sdpa"))}
    return Problem(lambda backend: lambda: hidden("duplex"), peers, check, flops, as_chosen=True)


@torch.inference_mode()
def formula(model: Bert, ids: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """By the softmax formula, in `dtype`, from the weights as they are; the model is as before afterwards."""
    before = next(model.parameters()).dtype
    found = model.to(dtype)(ids, attention_mask=keep, attention="plain")
    model.to(before)
    return found
