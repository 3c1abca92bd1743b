from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from duplex_attn.generate import Engine, cache_for
from duplex_attn.modules import GPT, GPTConfig
from duplex_attn.text import default_text, train_tokenizer
from tokenizers import Tokenizer

VOCAB = 300
SMALL = {"vocab_size": VOCAB, "hidden": 48, "layers": 2, "heads": 4, "head_dim": 12, "inner": 70, "max_positions": 128}
CONFIGS = {
    "learned": GPTConfig(**SMALL, heads_kv=4),
    "rotary": GPTConfig.llama(**SMALL, heads_kv=2),
    "a window in one layer": GPTConfig.llama(  # and all else that Gemma has
        **SMALL, heads_kv=2, norm="rms_offset", post_norms=True, head_norms=True, windows=(6, None), window_rope_theta=30.0,
        scale=0.2, softcap=3.0, logit_softcap=20.0, embedding_scale=2.5,
    ),
}  # fmt: skip
PROMPTS = [random.Random(n).choices(range(VOCAB), k=length) for n, length in enumerate((23, 1, 40, 9, 17))]

MakeEngine = Callable[..., Engine]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors of this size a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(default_text().lines[:200], VOCAB)


@pytest.fixture
def engine(small: GPT, tokenizer: Tokenizer) -> Iterator[MakeEngine]:
    """engine(num_pages=..., model=..., **options): afterwards its pages are all back and its cache is consistent."""
    made: list[Engine] = []

    def make(num_pages: int = 200, model: GPT = small, text: bool = True, **options: Any) -> Engine:
        cache = cache_for(model, num_pages, 4)
        made.append(Engine(model, tokenizer if text else None, cache=cache, **options))
        return made[-1]

    yield make
    for one in made:
        one.cache.check()
        stats = one.stats()
        assert (stats.cache.pages_used, stats.cache.sequences, stats.waiting, stats.running) == (0, 0, 0, 0)
