"""A table of facts corrects a GPT while it speaks: what is wrong is taken back before anybody has read it.

    python examples/knowledge_check.py

Trains a small GPT for some seconds on sentences of which a third are wrong, then lets it generate twice from the same
seed: freely, and with a verifier that looks each sentence up in SQLite. A wrong sentence is replaced: the tokens go
from the cache by `truncate`, the right ones take their place, and the model goes on from there. Nothing is downloaded.
"""

from __future__ import annotations

import random
import re
import sqlite3
from typing import Any

import torch
import torch.nn.functional as F
from duplex_attn.generate import Accept, Draft, Engine, Replace, SamplingParams, Verdict, Wait
from duplex_attn.modules import GPT, GPTConfig
from duplex_attn.text import train_tokenizer

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Egypt": "Cairo", "Japan": "Tokyo",
    "Peru": "Lima", "Kenya": "Nairobi", "Cuba": "Havana", "Austria": "Vienna",
}  # fmt: skip
SENTENCE = re.compile(r"([A-Z]\w+) is the capital of ([A-Z]\w+)\.")


def facts() -> sqlite3.Connection:
    table = sqlite3.connect(":memory:")
    table.execute("CREATE TABLE capitals (country TEXT PRIMARY KEY, city TEXT NOT NULL)")
    table.executemany("INSERT INTO capitals VALUES (?, ?)", CAPITALS.items())
    return table


class KnowledgeCheck:
    """A verifier: waits for the end of a sentence, accepts it if the table agrees, replaces it by the fact if not."""

    def __init__(self, table: sqlite3.Connection):
        self.table = table
        self.corrections: list[tuple[str, str]] = []

    def __call__(self, draft: Draft) -> Verdict:
        begin = draft.ends[draft.accepted - 1] if draft.accepted else 0
        found = SENTENCE.search(draft.text, begin)
        if found is None:
            return Accept() if draft.finished else Wait()
        city, country = found.groups()
        row = self.table.execute("SELECT city FROM capitals WHERE country = ?", (country,)).fetchone()
        if row is None or row[0] == city:
            return Accept()
        token = draft.token_at(found.start())
        kept = draft.text[draft.ends[token - 1] if token else 0 : found.start()]  # what else came with that token
        fact = f"{row[0]} is the capital of {country}."
        self.corrections.append((found.group(), fact))
        return Replace(token, kept + fact)


def hearsay(count: int, rng: random.Random) -> list[str]:
    """Lines of eight sentences, a third of which name the wrong city."""
    cities = list(CAPITALS.values())

    def sentence() -> str:
        country, city = rng.choice(list(CAPITALS.items()))
        return f"{rng.choice(cities) if rng.random() < 1 / 3 else city} is the capital of {country}."

    return [" ".join(sentence() for _ in range(8)) for _ in range(count)]


def train(lines: list[str], tokenizer: Any, steps: int) -> GPT:
    torch.manual_seed(0)
    size = {"hidden": 64, "layers": 2, "heads": 4, "heads_kv": 4, "head_dim": 16, "inner": 128}
    model = GPT(GPTConfig(vocab_size=tokenizer.get_vocab_size(), max_positions=256, **size))
    rows = [tokenizer.encode(line, add_special_tokens=False).ids for line in lines]
    width = min(map(len, rows))
    ids = torch.tensor([row[:width] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        batch = ids[torch.randint(len(ids), (16,))]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"  step {step + 1}: loss {loss.item():.2f}")
    return model.eval()


def main(steps: int = 60) -> KnowledgeCheck:
    print("training a small GPT on hearsay")
    lines = hearsay(400, random.Random(0))
    tokenizer = train_tokenizer(lines, 420)
    engine = Engine(train(lines, tokenizer, steps), tokenizer)
    params = SamplingParams(max_tokens=49, temperature=1.0, seed=1)
    options = {"add_special_tokens": False}

    print("\nunchecked:\n ", engine.generate(["Paris is the capital of France."], params, **options)[0].text)
    check = KnowledgeCheck(facts())
    print("\nchecked:\n ", end="")
    for chunk in engine.stream(engine.submit("Paris is the capital of France.", params, verifier=check, **options)):
        print(chunk.text, end="", flush=True)
    print("\n")
    for wrong, fact in check.corrections:
        print(f"  taken back: {wrong}  put there: {fact}")
    engine.cache.check()
    print(f"\npages in use afterwards: {engine.stats().cache.pages_used}")
    return check


if __name__ == "__main__":
    main()
