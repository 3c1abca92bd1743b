"""What a user may get wrong: a clear message and exit status 2, before any work."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from click.testing import CliRunner
from duplex_attn.cli import main


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["profile", "--size", "tiny", *map(str, arguments)])
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    return " ".join(result.stderr.replace("│", " ").split())


def test_no_such_text(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "missing.txt")


def test_empty_directory(tmp_path: Path) -> None:
    assert "expected text" in refused(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "expected text" in refused(tmp_path / "empty.txt")


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "image.bin").write_bytes(bytes(range(256)))
    assert "expected text" in refused(tmp_path / "image.bin")


@pytest.mark.parametrize("option", ["--bert", "--gpt", "--model"])
def test_pickled_checkpoint(tmp_path: Path, text_file: Path, option: str) -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 600}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))
    message = refused(text_file, option, tmp_path)
    assert "safetensors" in message


def test_checkpoint_of_the_other_kind(text_file: Path, checkpoints: Path) -> None:
    assert "architecture" in refused(text_file, "--bert", checkpoints / "gpt2")


def test_checkpoint_without_config(tmp_path: Path, text_file: Path) -> None:
    assert "config.json" in refused(text_file, "--model", tmp_path)


def test_truncated_weights(tmp_path: Path, text_file: Path, checkpoints: Path) -> None:
    for file in (checkpoints / "bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    assert "safetensors" in refused(text_file, "--bert", tmp_path)
    assert "safetensors" in refused(text_file, "--model", tmp_path)


def test_output_that_cannot_be_written(tmp_path: Path, text_file: Path) -> None:
    assert "does not exist" in refused(text_file, "--json", tmp_path / "nowhere" / "found.json")


def test_output_that_turns_out_unwritable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(self: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    result = CliRunner().invoke(main, ["doctor", "--json", str(tmp_path / "found.json")])
    assert result.exit_code == 2 and "--json: expected a file that can be written" in result.stderr


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"architectures": ["logging"]}', '{"architectures": [3]}', '{"architectures": 3}']
)
def test_a_config_that_is_none(tmp_path: Path, text_file: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in refused(text_file, "--model", tmp_path)


def test_a_prompt_that_is_no_text() -> None:
    """The byte 0xff: Python hands it on as half of a pair of surrogates."""
    result = CliRunner().invoke(main, ["generate", "--size", "tiny", "\udcff"])
    assert result.exit_code == 2 and "prompt: expected text in UTF-8" in result.stderr


@pytest.mark.parametrize("device", ["cuda:99", "quantum", "mps"])
def test_device(text_file: Path, device: str) -> None:
    message = refused(text_file, "--device", device)
    assert "--device: expected" in message and device in message


def test_model_with_other_checkpoints(text_file: Path, checkpoints: Path) -> None:
    assert "--model" in refused(text_file, "--model", checkpoints / "bert", "--bert", checkpoints / "bert")


@pytest.mark.parametrize("option", ["--batch", "--rounds", "--new-tokens"])
def test_counts(text_file: Path, option: str) -> None:
    assert "0 is not in the range" in refused(text_file, option, "0")
