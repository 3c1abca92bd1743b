"""One case of the grid on one lane, against the oracle, with every byte around its inputs watched."""

from .cases import Case, in_little, problem
from .lanes import Lane, run
from .oracle import assert_accurate


def check(case: Case, lane: Lane, gradients: bool) -> None:
    made = problem(in_little(case) if lane.slow else case)
    exact, plain, floor = made.answers(gradients)
    wanted = (made.dout, made.dlse) if gradients else (None, None)
    got = run(made.call, lane, *wanted, deterministic=case.deterministic)
    for name, x in got.items():
        like = {"out": made.call.q, "lse": exact["lse"].float()}.get(name, getattr(made.call, name[1:], None))
        assert x.dtype == like.dtype, f"{name}: dtype {x.dtype}, expected {like.dtype}"
    assert_accurate(got, exact, plain, floor, f"{lane}: {made.case}")
    assert set(got) == set(exact)
    made.guard.assert_untouched()
