from __future__ import annotations

import pytest
import torch
from duplex_attn.modules import GPT, GPTConfig

SMALL = {"vocab_size": 97, "hidden": 48, "layers": 2, "heads": 4, "head_dim": 12, "inner": 70, "max_positions": 128}
CONFIGS = {
    "learned": GPTConfig(**SMALL, heads_kv=4),
    "rotary": GPTConfig.llama(**SMALL, heads_kv=2),
}


def seeded(config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).eval()
    for parameter in model.parameters():  # sharp enough for a wrong mask to show
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model


@pytest.fixture(scope="session", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> GPT:
    return seeded(CONFIGS[request.param])


@pytest.fixture(scope="session")
def small() -> GPT:
    return seeded(CONFIGS["learned"])
