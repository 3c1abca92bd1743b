"""Random calls in random order against plain lists: what every sequence reads, and the whole bookkeeping."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from .simulation import Simulated, Simulation

SECONDS = 6.0  # of one driver at most
OPERATIONS = 1_000_000

DOCUMENTS = [random.Random(n).choices((0, 1), k=64) for n in range(3)]  # what prompts begin with
DOCUMENTS.append(DOCUMENTS[0][:20] + DOCUMENTS[1])

# Few tokens and few pages: prefixes meet, pages run out.
tokens = st.lists(st.integers(0, 1), max_size=12)
salts = st.sampled_from([None, "a", "b"])


class CacheMachine(RuleBasedStateMachine):
    """Finds a shortest sequence of calls that breaks something."""

    @initialize(num_pages=st.integers(1, 16), page_size=st.integers(1, 5), hash_bits=st.sampled_from([0, 1, 64]))
    def start(self, num_pages: int, page_size: int, hash_bits: int) -> None:
        self.simulation = Simulation(num_pages, page_size, hash_bits)

    def here(self, data: st.DataObject) -> Simulated:
        return data.draw(st.sampled_from([s for s in self.simulation.live if s.saved is None]))

    @rule(tokens=tokens, salt=salts, bidirectional=st.booleans(), data=st.data())
    def add(self, tokens: list[int], salt: str | None, bidirectional: bool, data: st.DataObject) -> None:
        prefix = data.draw(st.integers(0, len(tokens))) if bidirectional else 0
        self.simulation.add(tokens, prefix, salt)

    def some_are_here(self) -> bool:
        return any(s.saved is None for s in self.simulation.live)

    @precondition(some_are_here)
    @rule(data=st.data(), tokens=tokens, known=st.booleans())
    def extend(self, data: st.DataObject, tokens: list[int], known: bool) -> None:
        self.simulation.extend(self.here(data), tokens, known)

    @precondition(some_are_here)
    @rule(token=st.integers(0, 1))
    def append(self, token: int) -> None:
        chosen = [s for s in self.simulation.live if s.saved is None]
        self.simulation.append(chosen, [token] * len(chosen))

    @precondition(some_are_here)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        s = self.here(data)
        if s.committed == len(s.tokens):
            self.simulation.fork(s)
        else:
            with pytest.raises(ValueError, match="committed before it is forked"):
                self.simulation.fork(s)

    @precondition(some_are_here)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        s = self.here(data)
        self.simulation.truncate(s, data.draw(st.integers(s.prefix, len(s.tokens))))

    @precondition(some_are_here)
    @rule(commit=st.booleans())
    def step_all(self, commit: bool) -> None:
        self.simulation.step([s for s in self.simulation.live if s.saved is None], commit=commit)

    @precondition(some_are_here)
    @rule(data=st.data())
    def step_part(self, data: st.DataObject) -> None:
        s = self.here(data)
        fewest = max(s.prefix - s.committed, 0)
        self.simulation.step([s], [data.draw(st.integers(fewest, len(s.tokens) - s.committed))])

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.simulation.free(data.draw(st.sampled_from(self.simulation.live)))

    @precondition(some_are_here)
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        self.simulation.swap_out(self.here(data))

    @precondition(lambda self: any(s.saved is not None for s in self.simulation.live))
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        self.simulation.swap_in(data.draw(st.sampled_from([s for s in self.simulation.live if s.saved is not None])))

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize(
    "num_pages, page_size, hash_bits", [(48, 4, 64), (24, 1, 0), (32, 16, 2)], ids=["pages of 4", "of 1", "of 16"]
)
def test_many_operations(num_pages: int, page_size: int, hash_bits: int) -> None:
    simulation = Simulation(num_pages, page_size, hash_bits)
    rng = random.Random(num_pages)
    deadline = time.monotonic() + SECONDS
    for done in range(OPERATIONS):
        operate(simulation, rng)
        if done % 1000 == 0:
            simulation.check()
            if time.monotonic() > deadline:
                break
    simulation.check()
    for s in simulation.live[:]:
        simulation.free(s)
    simulation.check()
    assert simulation.cache.available_pages == num_pages
    assert done > OPERATIONS / 100


def operate(simulation: Simulation, rng: random.Random) -> None:
    """One call, of a kind and on sequences chosen at random; few live at once, so that pages run out now and then."""
    live, size = simulation.live, simulation.page_size
    kind = rng.random()
    if not live or (kind < 0.08 and len(live) < 12):
        tokens = rng.choice(DOCUMENTS)[: int(rng.random() * 4 * size)] + rng.choices((0, 1), k=rng.randrange(3))
        prefix = rng.randrange(len(tokens) + 1) if rng.random() < 0.2 else 0
        simulation.add(tokens, prefix, rng.choice((None, None, "a")))
        return
    s = live[int(rng.random() * len(live))]
    if s.saved is not None:
        if kind < 0.5:
            simulation.swap_in(s)
        elif kind < 0.55:
            simulation.free(s)
        return
    if kind < 0.45:
        simulation.extend(s, rng.choices((0, 1), k=1 + int(rng.random() * (2 if kind < 0.4 else size))), kind > 0.12)
    elif kind < 0.50:
        chosen = [x for x in live if x.saved is None][:4]
        simulation.append(chosen, [1] * len(chosen))
    elif kind < 0.75:
        simulation.step([s], commit=kind < 0.73)
        simulation.verify(s)
    elif kind < 0.80:
        while s.committed == len(s.tokens) and len(live) < 12:
            s = simulation.fork(s)
            if rng.random() < 0.5 and simulation.extend(s, [1]) and rng.random() < 0.5:
                simulation.truncate(s, s.committed)  # and is forked again, while its copy is pending
            if rng.random() < 0.5:
                break
    elif kind < 0.85:
        simulation.step([x for x in live if x.saved is None])
    elif kind < 0.91:
        back = s.committed if s.committed >= s.prefix and rng.random() < 0.5 else len(s.tokens)
        simulation.truncate(s, back if rng.random() < 0.4 else rng.randint(s.prefix, back))
    elif kind < 0.98:
        simulation.free(s)
    else:
        simulation.swap_out(s)
