"""`duplex-attn generate`: prompts from anywhere, their texts as they come, the same as JSON."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from duplex_attn.checkpoint import load_checkpoint
from duplex_attn.cli import main
from duplex_attn.generate import Engine, SamplingParams, cache_for, terminal
from duplex_attn.modules import GPT
from duplex_attn.text import load_tokenizer
from rich.console import Console

PROMPT = "The value of the expression"


def generate(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, ["generate", "--max-tokens", "6", *map(str, arguments)], input=stdin)


def found(checkpoints: Path, *arguments: object, stdin: str | None = None) -> dict[str, Any]:
    result = generate("--model", checkpoints / "gpt2", "--json", "-", *arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_text_and_json_are_the_models(checkpoints: Path, tmp_path: Path, name: str) -> None:
    result = generate("--model", checkpoints / name, PROMPT, "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / "found.json").read_text())
    model, tokenizer = load_checkpoint(checkpoints / name), load_tokenizer(checkpoints / name)
    (request,) = made["requests"]
    ids = tokenizer.encode(PROMPT).ids
    assert made["model"] == name and request["prompt_tokens"] == ids and request["prompt"] == PROMPT
    (output,) = request["outputs"]
    assert output["tokens"] == model.generate(torch.tensor([ids]), 6)[0].tolist()[: len(output["tokens"])]
    assert result.stdout == PROMPT + output["text"] + "\n"
    assert made["tokens"] == len(output["tokens"]) and made["most_pages"] >= 1
    assert re.search(r"6 tokens in .* s \| .* tokens/s \| at most \d+ of [\d,]+ pages in use", result.stderr)


def test_a_model_with_an_encoder_answers(checkpoints: Path, tmp_path: Path) -> None:
    arguments = ("--model", checkpoints / "t5", PROMPT)
    result = generate(*arguments, "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    (request,) = json.loads((tmp_path / "found.json").read_text())["requests"]
    model, tokenizer = load_checkpoint(checkpoints / "t5"), load_tokenizer(checkpoints / "t5")
    ids = tokenizer.encode(PROMPT).ids
    assert request["prompt_tokens"] == ids and request["prompt"] == PROMPT
    (output,) = request["outputs"]
    target = [0, *output["tokens"]]
    logits = model(torch.tensor([ids]), torch.tensor([target[:-1]]))
    assert logits[0].argmax(-1).tolist() == target[1:]
    assert result.stdout == f"{PROMPT}\n{output['text']}\n"
    result = generate(*arguments, "--bidirectional")
    assert result.exit_code == 2 and "bidirectional_prefix: expected 0" in result.stderr
    result = generate("--model", checkpoints / "bert", PROMPT)
    assert result.exit_code == 2 and "bert/config.json: expected a model that generates" in result.stderr


def test_a_model_of_another_family_runs_as_transformers_has_it(checkpoints: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    result = generate("--model", checkpoints / "olmo2", PROMPT, "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    (request,) = json.loads((tmp_path / "found.json").read_text())["requests"]
    (output,) = request["outputs"]
    model, ids = transformers.Olmo2ForCausalLM.from_pretrained(checkpoints / "olmo2"), request["prompt_tokens"]
    expected = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None)[0, len(ids) :]
    assert output["tokens"] == expected.tolist()
    result = generate("--model", checkpoints / "olmo2", PROMPT, "--batch-invariant")
    assert result.exit_code == 2 and "batch_invariant: expected False with a model of transformers" in result.stderr


ODD: list[tuple[dict[str, Any], str]] = [
    ({"model_type": ["olmo2"]}, "model_type: expected a name in {file}, got ['olmo2']"),
    ({"architectures": None}, "architectures: expected the class of a decoder in {file}, got none"),
    (
        {"architectures": "Olmo2ForCausalLM"},
        "architectures: expected a list of names in {file}, got 'Olmo2ForCausalLM'",
    ),
    (
        {"architectures": ["BertTokenizer"]},
        "architectures: expected a model of transformers in {file}, got BertTokenizer",
    ),
    ({"architectures": ["Olmo2Model"]}, "{file}: expected a model that generates (model: expected one that predicts"),
    (
        {"architectures": ["LlamaForCausalLM"]},
        "expected all weights of LlamaForCausalLM, which {file} names, missing model.",
    ),
    ({"num_hidden_layers": 3}, "expected all weights of Olmo2ForCausalLM, which {file} names, missing model.layers.2"),
    ({"hidden_size": "many"}, "{file}: expected a model that transformers can load from there ("),
    ({"num_attention_heads": 0}, "{file}: expected a model that transformers can load from there (ZeroDivisionError"),
]


@pytest.mark.parametrize("changes, message", ODD, ids=lambda value: str(value)[:40])
def test_an_odd_config(checkpoints: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    shutil.copytree(checkpoints / "olmo2", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    result = generate("--model", tmp_path, PROMPT)
    assert result.exit_code == 2 and message.format(file=file) in result.stderr, (result.output, result.exception)


@pytest.mark.parametrize(
    "text, message", [("[1]", "expected an object, got list"), ('{"eos_token_id": "x"}', "got 'x'")]
)
def test_an_odd_generation_config(checkpoints: Path, tmp_path: Path, text: str, message: str) -> None:
    shutil.copytree(checkpoints / "gpt2", tmp_path, dirs_exist_ok=True)
    config, file = tmp_path / "config.json", tmp_path / "generation_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"decoder_start_token_id": 0})
    )  # or it is read for that
    file.write_text(text)
    result = generate("--model", tmp_path, PROMPT)
    assert result.exit_code == 2 and str(file) in result.stderr and message in result.stderr


def test_a_config_without_a_model_type(checkpoints: Path, tmp_path: Path) -> None:
    """Its architectures say enough."""
    shutil.copytree(checkpoints / "olmo2", tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({name: x for name, x in json.loads(file.read_text()).items() if name != "model_type"}))
    found = [generate("--model", folder, PROMPT) for folder in (checkpoints / "olmo2", tmp_path)]
    assert found[0].exit_code == 0 and found[0].stdout == found[1].stdout


def test_prompts_from_arguments_file_and_stdin(checkpoints: Path, tmp_path: Path) -> None:
    lines = ["first prompt", "second", "third one"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n\n")
    wanted = [r["outputs"] for r in found(checkpoints, *lines)["requests"]]
    for made in (
        found(checkpoints, "--file", tmp_path / "prompts.txt"),
        found(checkpoints, "--file", "-", stdin="\n".join(lines)),
        found(checkpoints, stdin="\n".join(lines)),
        found(checkpoints, lines[0], "--file", "-", stdin="\n".join(lines[1:])),
    ):
        assert [r["prompt"] for r in made["requests"]] == lines
        assert [r["outputs"] for r in made["requests"]] == wanted


def test_every_option_reaches_the_sampler(checkpoints: Path) -> None:
    options = ["--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.001, "--seed", 5, "-n", 2]
    options += ["--speculate", 2, "--logprobs", 1, "--batch-invariant", "--bidirectional", "--pages", 64]
    made = [found(checkpoints, PROMPT, *options, "--page-size", size) for size in (4, 16)]
    assert made[0]["requests"] == made[1]["requests"]
    assert made[0]["stats"]["cache"]["pages_total"] == 64
    outputs = made[0]["requests"][0]["outputs"]
    assert len({tuple(out["tokens"]) for out in outputs}) == 2 and len(outputs[0]["logprobs"]) == 6
    beams = found(checkpoints, PROMPT, "--beam-width", 3)["requests"][0]["outputs"]
    greedy = found(checkpoints, PROMPT)["requests"][0]["outputs"]
    assert len(beams) == len(greedy) == 1 and beams[0]["cumulative_logprob"] < 0
    stop = greedy[0]["text"][2:4]
    assert found(checkpoints, PROMPT, "--stop", stop)["requests"][0]["outputs"][0]["text"] in greedy[0]["text"][:2]


def test_several_samples_are_printed_when_they_are_whole(checkpoints: Path) -> None:
    options = ("--temperature", 1, "--seed", 1, "-n", 3)
    result = generate("--model", checkpoints / "gpt2", PROMPT, *options)
    outputs = found(checkpoints, PROMPT, *options)["requests"][0]["outputs"]
    whole = "".join(PROMPT + out["text"] + "\n" for out in outputs)
    assert result.stdout == whole.replace("\r\n", "\n")  # as the runner has it


def test_without_a_checkpoint_it_says_so(checkpoints: Path) -> None:
    result = generate("--size", "tiny", "some words")
    assert result.exit_code == 0 and result.stdout.startswith("some words")
    assert "tiny shape with seeded weights" in result.stderr and "--model" in result.stderr


class TestTerminal:
    @pytest.fixture
    def engine(self, checkpoints: Path) -> Engine:
        model: GPT = load_checkpoint(checkpoints / "gpt2")
        return Engine(model, load_tokenizer(checkpoints / "gpt2"), cache=cache_for(model, 64, 4))

    def test_live(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(terminal, "REFRESH", 1e9)
        console = Console(file=io.StringIO(), force_terminal=True, width=200)
        requests = [engine.submit(text, SamplingParams(max_tokens=5)) for text in ("one", "two words")]
        shown = terminal.run(engine, requests, console, live=True)
        printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
        assert "0 of 2 done" in printed and "pages in use" in printed and "tokens/s" in printed
        for request in requests:
            assert terminal.heading(request) + request.text in printed.replace("\n", "")
        assert shown.tokens == 10 and shown.most_pages >= 4

    @pytest.mark.parametrize("live", [False, True])
    def test_ctrl_c_frees_all_and_shows_what_there_is(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, live: bool
    ) -> None:
        console = Console(file=io.StringIO(), force_terminal=live, width=200)
        request = engine.submit(PROMPT, SamplingParams(max_tokens=50))
        step, steps = engine.step, iter(range(4))

        def interrupted() -> bool:
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return step()

        monkeypatch.setattr(engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            terminal.run(engine, [request], console, live)
        assert PROMPT in console.file.getvalue() and len(request.tokens) == 4  # type: ignore[attr-defined]
        engine.cache.check()
        assert engine.stats().cache.pages_used == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "a prompt is needed"),
        (["--top-p", "2", "x"], "top_p: expected above 0, up to 1, got 2.0"),
        (["--temperature", "-1", "x"], "temperature: expected 0 or more"),
        (["--max-tokens", "0", "x"], "max_tokens: expected 1 or more"),
        (["-n", "4", "--beam-width", "2", "x"], "n: expected at most beam_width (2), got 4"),
        (["--page-size", "257", "x"], "257 is not in the range"),
        (["--file", "missing.txt"], "No such file"),
        (["--device", "quantum", "x"], "--device: expected"),
        (["--model", "missing", "x"], "does not exist"),
        (["x " * 3000], "prompt: expected 1 to 1023 tokens"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    result = generate("--size", "tiny", *arguments, stdin="")
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in " ".join(result.stderr.replace("│", " ").split()) and "Traceback" not in result.output


def test_input_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    result = generate("--size", "tiny", "--file", tmp_path / "binary")
    assert result.exit_code == 2 and "UTF-8" in result.stderr
