"""A padded batch, and what a model makes of it: the same before and after `swap`."""

import torch
from torch import nn

Runs = tuple[tuple[int, int], ...]  # of tokens, first and end in each row


def inputs(runs: Runs, length: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (batch, length), 1 for tokens."""
    mask = torch.zeros(len(runs), length, dtype=torch.long)
    for row, (first, end) in zip(mask, runs, strict=True):
        row[first:end] = 1
    ids = torch.randint(2, 97, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": mask}


def results(model: nn.Module, given: dict[str, torch.Tensor], kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits where `kept` (batch, seqlen) says so, and the gradients of all parameters."""
    out = model(**given).logits[kept]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad(set_to_none=True)
    (out * weights).sum().backward()
    return {"logits": out.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = float(max(x.abs().max() for n, x in expected.items() if n != "logits"))
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}")
