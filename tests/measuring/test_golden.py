"""What a card said of the primitives becomes one file a kind of card."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.gpu.golden import gather


def test_answers_are_gathered(tmp_path: Path) -> None:
    said = {"sm_80": {"probe_a_01": np.arange(3)}, "sm_90": {"probe_a_01": np.arange(4), "probe_b_02": np.ones((2, 2))}}
    for card, answers in said.items():
        (tmp_path / "found" / card).mkdir(parents=True)
        for key, answer in answers.items():
            np.save(tmp_path / "found" / card / f"{key}.npy", answer)
    gather(tmp_path / "found", tmp_path / "golden")
    for card, answers in said.items():
        kept = dict(np.load(tmp_path / "golden" / f"{card}.npz"))
        assert list(kept) == list(answers)
        for key, answer in answers.items():
            np.testing.assert_array_equal(kept[key], answer)
    assert {path.stem for path in (tmp_path / "golden").iterdir()} == set(said)

    for card in said:
        (tmp_path / "found" / card / "probe_a_01.npy").unlink()
    np.save(tmp_path / "found" / "sm_90" / "probe_b_02.npy", np.zeros(2))
    gather(tmp_path / "found", tmp_path / "golden")
    kept = dict(np.load(tmp_path / "golden" / "sm_90.npz"))
    assert set(kept) == set(said["sm_90"]), "of what did not run this time the answer is kept"
    np.testing.assert_array_equal(kept["probe_b_02"], np.zeros(2))
