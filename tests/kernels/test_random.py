"""Random spans over random ragged batches, all terms of a score at once, against the oracle."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..cases import BIASES, LAYOUTS, Case, problem
from ..lanes import Lane, run
from ..oracle import assert_accurate

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")

distances = st.one_of(st.none(), st.integers(0, 8), st.integers(0, 80))
sizes = st.one_of(st.integers(0, 6), st.integers(0, 80))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch = draw(st.integers(1, 4))
    lens = st.lists(sizes, min_size=batch, max_size=batch).map(tuple)
    dim = draw(st.integers(1, 80))
    return Case(
        layout=draw(st.sampled_from(list(LAYOUTS))),
        lengths=(draw(lens), draw(lens)),
        heads=draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)])),
        head_dims=(dim, draw(st.sampled_from([dim, 8, 33]))),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16])),
        mask=(draw(st.sampled_from([0, 1, 17, "each"])), draw(distances), draw(distances)),
        top_left=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 1.0, -0.5, 0.0])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5])),
        distance_radius=draw(st.sampled_from([None, 1, 40])),
        alibi=draw(st.booleans()),
        bias=draw(st.sampled_from(["none", *BIASES])),
        sink=draw(st.sampled_from(["none", "float32"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.4])),
        lse_gradient=draw(st.booleans()),
        deterministic=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


def test_random_call(lane: Lane) -> None:
    @given(cases())
    @settings(
        max_examples=lane.examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    def check(case: Case) -> None:
        made = problem(case)
        exact, plain, floor = made.answers(gradients=True)
        got = run(made.call, lane, made.dout, made.dlse, deterministic=case.deterministic)
        # The contract speaks of largest errors; of a single number the plain formula's may happen to be none. Defects are far beyond this.
        assert_accurate(got, exact, plain, {name: 8 * x for name, x in floor.items()}, f"{lane}: {case}")
        made.guard.assert_untouched()

    check()
