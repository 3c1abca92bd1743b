"""examples/knowledge_check.py runs, and what it shows agrees with its table."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "knowledge_check.py"


def test_no_wrong_sentence_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("knowledge_check", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    check = example.main(steps=60)
    printed = capsys.readouterr().out
    shown = printed.split("checked:\n")[2].split("taken back")[0]
    sentences = example.SENTENCE.findall(shown)
    assert len(sentences) >= 4 and check.corrections
    for city, country in sentences:
        assert example.CAPITALS[country] == city
    assert "pages in use afterwards: 0" in printed
