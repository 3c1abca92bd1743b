"""`duplex-attn profile`: one table, the same as JSON, and differences from float64 that show a wrong attention."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from duplex_attn.cli import main
from duplex_attn.modules import rows

SMALL = ["--size", "tiny", "--batch", "4", "--max-length", "48", "--new-tokens", "3", "--rounds", "2"]
SYSTEMS = ["plain", "sdpa", "duplex-attn"]


def profile(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["profile", *SMALL, *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def test_table_and_json_agree(text_file: Path, tmp_path: Path) -> None:
    printed = profile(text_file, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["schema"], found["dtype"], found["device"], found["rounds"]) == (1, "float32", "cpu", 2)
    assert [comparison["workload"] for comparison in found["comparisons"]] == ["BERT encoding", "GPT generation"]
    for comparison in found["comparisons"]:
        assert "seeded weights" in comparison["detail"]
        assert [measurement["system"] for measurement in comparison["measurements"]] == SYSTEMS
        for measurement in comparison["measurements"]:
            assert 0 <= measurement["difference"] < 1e-5
            seconds = measurement["seconds"]
            assert 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"]
            assert measurement["tokens_per_second"] == pytest.approx(comparison["tokens"] / seconds["median"])
            assert set(measurement["speed"]) == set(SYSTEMS) - {measurement["system"]}
            row = [measurement["system"], f"{measurement['difference']:.1e}"]
            assert any(line.split()[:2] == row for line in printed.stdout.splitlines())
    assert max(map(len, printed.stdout.split("\n\n")[0].splitlines())) <= 120


def test_ratio_is_the_median_of_the_rounds_ratios(text_file: Path, tmp_path: Path) -> None:
    profile(text_file, "--rounds", "1", "--json", tmp_path / "found.json")
    for comparison in json.loads((tmp_path / "found.json").read_text())["comparisons"]:
        plain, sdpa, ours = (measurement["seconds"]["median"] for measurement in comparison["measurements"])
        speed = comparison["measurements"][2]["speed"]
        assert speed["plain"]["median"] == pytest.approx(plain / ours)
        assert speed["sdpa"]["median"] == pytest.approx(sdpa / ours)


def test_a_wrong_attention_shows(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rows.varlen_attention
    monkeypatch.setattr(rows, "varlen_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    result = profile(text_file, "--json", "-")
    for comparison in json.loads(result.stdout)["comparisons"]:
        plain, sdpa, ours = (measurement["difference"] for measurement in comparison["measurements"])
        assert ours > 100 * max(plain, sdpa)


def test_json_on_stdout_leaves_the_table_to_stderr(text_file: Path) -> None:
    result = profile(text_file.parent, "--json", "-", "--dtype", "bfloat16")
    found = json.loads(result.stdout)
    assert found["dtype"] == "bfloat16"
    assert "BERT encoding" in result.stderr
    for comparison in found["comparisons"]:
        differences = [measurement["difference"] for measurement in comparison["measurements"]]
        assert min(differences) > 1e-4 and max(differences) < 0.2  # rounding of 8 bits, no more


def test_progress_is_silent_where_stderr_is_no_terminal(text_file: Path) -> None:
    assert profile(text_file).stderr == ""


def test_checkpoints(text_file: Path, checkpoints: Path) -> None:
    result = profile(text_file, "--bert", checkpoints / "bert", "--gpt", checkpoints / "llama", "--json", "-")
    bert, gpt = json.loads(result.stdout)["comparisons"]
    assert bert["detail"].startswith("bert,") and gpt["detail"].startswith("llama,")
    for comparison in (bert, gpt):
        assert max(measurement["difference"] for measurement in comparison["measurements"]) < 1e-4


SWAPPED = ["before", "after swap"]


@pytest.mark.parametrize(
    ("name", "workload", "systems"),
    [
        ("bert", "BertModel", SWAPPED),
        ("gpt2", "GPT2LMHeadModel.generate", [*SWAPPED, "over pages"]),
        ("t5", "T5ForConditionalGeneration.generate", SWAPPED),
    ],
)
def test_model_before_and_after_swap(
    text_file: Path, checkpoints: Path, name: str, workload: str, systems: list[str]
) -> None:
    result = profile(text_file, "--model", checkpoints / name, "--json", "-")
    found = json.loads(result.stdout)
    (comparison,) = found["comparisons"]
    assert comparison["workload"] == workload
    assert [measurement["system"] for measurement in comparison["measurements"]] == systems
    assert all(measurement["difference"] < 1e-4 for measurement in comparison["measurements"])
    assert any(re.search(r"\d modules now run duplex_attn", note) for note in found["notes"])


def test_a_decoder_that_pages_do_not_serve(text_file: Path, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duplex_attn.integrations.paged_trial.EXACT", -1.0)
    result = profile(text_file, "--model", checkpoints / "gpt2", "--json", "-")
    found = json.loads(result.stdout)
    assert [measurement["system"] for measurement in found["comparisons"][0]["measurements"]] == SWAPPED
    assert any(note.startswith("not over pages: model: expected position_ids") for note in found["notes"])


def test_the_machines_own_text() -> None:
    assert "\n" in profile().stdout
