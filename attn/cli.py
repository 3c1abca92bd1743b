"""The command `duplex-attn`. Models and tables are imported by the command that needs them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    import torch
    from rich.console import Console, RenderableType
    from rich.progress import Progress

WIDE = 120  # columns, where the output is no terminal
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


class OutputFile(click.Path):
    """A file that can be written, or - for stdout; known before the work, not after it."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, allow_dash=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        name = str(super().convert(value, param, ctx))
        if name != "-" and not Path(name).absolute().parent.is_dir():
            self.fail(f"Directory '{Path(name).parent}' does not exist.", param, ctx)
        if name != "-" and not os.access(Path(name).absolute().parent, os.W_OK):
            self.fail(f"Directory '{Path(name).parent}' is not writable.", param, ctx)
        return name


class BadInput(click.ClickException):
    """Something about what the user gave: exit status 2, as click has it for a wrong option."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="duplex-attn", prog_name="duplex-attn")
def main() -> None:
    """Fused attention for PyTorch in which the direction is data."""


@main.command()
@click.argument("text", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--bert", type=FOLDER, help="A BERT checkpoint; else bert-base's shape, seeded weights.")
@click.option("--gpt", type=FOLDER, help="A checkpoint of GPT-2, Llama or their relatives; else gpt2-small's shape.")
@click.option("--model", type=FOLDER, help="Instead, any transformers model: before and after duplex_attn.swap.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option(
    "--device", default=None, metavar="DEVICE", help="cpu, cuda or cuda:N; by default a card if there is any."
)
@click.option(
    "--size", type=click.Choice(["base", "tiny"]), default="base", show_default=True, help="Without checkpoints."
)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Lines, or prompts.")
@click.option("--max-length", type=click.IntRange(4), default=128, show_default=True, help="Tokens of a line at most.")
@click.option("--new-tokens", type=click.IntRange(1), default=16, show_default=True, help="After each prompt.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Each runs every system once.")
@click.option("--json", "output", type=OutputFile(), help="Where to write the same as JSON; - is stdout.")
def profile(
    text: Path | None,
    bert: Path | None,
    gpt: Path | None,
    model: Path | None,
    dtype: str,
    device: str | None,
    size: str,
    batch: int,
    max_length: int,
    new_tokens: int,
    rounds: int,
    output: str | None,
) -> None:
    """Compares attentions on real text: plain PyTorch, F.scaled_dot_product_attention and duplex-attn.

    TEXT is a text file, or a directory of them; by default a text that comes with the machine. BERT encodes a batch of
    its lines and GPT continues them, on the same weights with each attention.
    """
    if model is not None and (bert is not None or gpt is not None):
        raise click.UsageError("--model stands instead of --bert and --gpt")
    import torch

    from . import text as texts
    from .doctor import machine
    from .profile.memory import meaning
    from .profile.report import Report, render
    from .profile.run import measure, steps_of
    from .profile.swapped import swapped_workload
    from .profile.workloads import Settings, bert_workload, gpt_workload

    with progress() as shown:
        task = shown.add_task("reading text and weights", total=None)
        try:
            where = pick_device(device)
            read = texts.default_text() if text is None else texts.read_text(text)
            settings = Settings(read, where, getattr(torch, dtype), size, batch, max_length, new_tokens)
            if model is None:
                workloads = [bert_workload(settings, bert), gpt_workload(settings, gpt)]
                peers = [
                    "plain: the softmax formula in PyTorch; sdpa: F.scaled_dot_product_attention; both on padded rows"
                ]
            else:
                workload, peers = swapped_workload(settings, model)
                workloads = [workload]
        except (OSError, ValueError) as error:
            raise BadInput(str(error)) from error
        shown.update(task, total=sum(steps_of(workload, rounds) for workload in workloads))
        comparisons = measure(
            workloads, rounds, where, step=lambda what: shown.update(task, advance=1, description=what)
        )
    notes = [
        *peers,
        "largest difference: of the hidden states or logits of a few lines, from the same weights in float64",
        "spread: half the distance between the quartiles of the rounds",
        meaning(where),
        "speed: how many times as fast as that peer, median over the rounds",
    ]
    report = Report(read.name, dtype, str(where), rounds, notes, machine(), comparisons)
    write(render(report), report.as_json(), output)


@main.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--file",
    type=click.File(encoding="utf-8"),
    help="Prompts, one a line; - is stdin, which is read too where no prompt is given.",
)
@click.option(
    "--model",
    type=FOLDER,
    help="A checkpoint of GPT-2, Llama, T5, BART or their relatives; else gpt2-small's shape, seeded weights.",
)
@click.option("--max-tokens", type=int, default=64, show_default=True, help="New tokens of each at most.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: always the likeliest token.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Among the k likeliest; 0: all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Among those that reach it together.")
@click.option("--min-p", type=float, default=0.0, show_default=True, help="At least so much of the likeliest one's.")
@click.option("--seed", type=int, default=None, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, help="Text that ends it; may be given several times.")
@click.option("-n", "samples", type=int, default=1, show_default=True, help="Samples of each prompt.")
@click.option("--beam-width", type=int, default=1, show_default=True, help="Above 1: beam search.")
@click.option("--speculate", type=int, default=0, show_default=True, help="Tokens guessed ahead by prompt lookup.")
@click.option("--logprobs", type=int, default=None, help="In the JSON: of each token and so many likeliest ones.")
@click.option("--bidirectional", is_flag=True, help="All tokens of a prompt see each other (prefix-LM).")
@click.option("--batch-invariant", is_flag=True, help="No bit of the logits depends on the other prompts.")
@click.option("--pages", type=click.IntRange(1), default=None, help="Of the cache; by default 1 GiB of them.")
@click.option("--page-size", type=click.IntRange(1, 256), default=16, show_default=True, help="Tokens of a page.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option(
    "--device", default=None, metavar="DEVICE", help="cpu, cuda or cuda:N; by default a card if there is any."
)
@click.option(
    "--size", type=click.Choice(["base", "tiny"]), default="base", show_default=True, help="Without a checkpoint."
)
@click.option("--json", "output", type=OutputFile(), help="Where to write the same as JSON; - is stdout.")
def generate(
    prompts: tuple[str, ...],
    file: TextIO | None,
    model: Path | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int | None,
    stop: tuple[str, ...],
    samples: int,
    beam_width: int,
    speculate: int,
    logprobs: int | None,
    bidirectional: bool,
    batch_invariant: bool,
    pages: int | None,
    page_size: int,
    dtype: str,
    device: str | None,
    size: str,
    output: str | None,
) -> None:
    """Continues PROMPTs, all at once from one pool of pages, and shows their texts as they come. Models with an encoder (T5,
    BART) answer them instead.

    Without PROMPT and --file, prompts are the lines of stdin.
    """
    lines = [*prompts, *read_prompts(file, bool(prompts))]
    for line in lines:
        if any("\ud800" <= c <= "\udfff" for c in line):  # what Python makes of bytes that are none
            raise BadInput(f"prompt: expected text in UTF-8, got {line!r}")
    if not lines:
        raise click.UsageError("a prompt is needed: as an argument, in --file, or on stdin")
    import torch

    from .generate import Engine, SamplingParams, cache_for
    from .generate.terminal import as_json, load_model, run

    try:
        params = SamplingParams(
            max_tokens, temperature, top_k, top_p, min_p, seed, stop, logprobs=logprobs, n=samples,
            beam_width=beam_width, speculate=speculate,
        )  # fmt: skip
        where = pick_device(device)
        with progress() as shown:
            shown.add_task("reading weights and tokenizer", total=None)
            loaded = load_model(model, size, getattr(torch, dtype), where)
        widest = max(64, params.sequences)
        cache = cache_for(loaded.model, pages, page_size, max_sequences=widest)
        engine = Engine(
            loaded.model,
            loaded.tokenizer,
            cache=cache,
            eos=loaded.eos,
            max_sequences=widest,
            token_budget=max(512, widest),
            batch_invariant=batch_invariant,
        )
        requests = []
        for line in lines:
            encoded = loaded.tokenizer.encode(line, add_special_tokens=loaded.trained).ids
            prefix = len(encoded) if bidirectional else 0
            requests.append(engine.submit(encoded, params, bidirectional_prefix=prefix))
    except (OSError, ValueError) as error:
        raise BadInput(str(error)) from error
    told = console(sys.stderr)
    if not loaded.trained:
        told.print(f"{loaded.name}: the speed is a trained model's, the words are not; --model takes a checkpoint")
    printed = told if output == "-" else console(sys.stdout)
    try:
        found = run(engine, requests, printed, live=printed.is_terminal)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell has it
    told.print(found.summary(), style="dim")
    if output is not None:
        save(as_json(loaded, found, dtype=dtype, device=str(where)), output)
    failed = [request for request in requests if request.error is not None]
    if failed:
        raise click.ClickException(f"{len(failed)} of {len(requests)} prompts: {failed[0].error}")


def read_prompts(file: TextIO | None, given: bool) -> list[str]:
    """Lines that are not blank; of stdin where there is nothing else and it is no terminal."""
    if file is None:
        if given or sys.stdin.isatty():
            return []
        file = sys.stdin
    try:
        return [line.rstrip("\n") for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise BadInput(f"--file: expected text in UTF-8 ({error})") from error


@main.command()
@click.option("--json", "output", type=OutputFile(), help="Where to write the same as JSON; - is stdout.")
def doctor(output: str | None) -> None:
    """Tells what this machine has, each backend, and why a missing one is missing."""
    from .doctor import diagnose, render

    diagnosis = diagnose()
    write(render(diagnosis), diagnosis, output)


def pick_device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: expected one of the {torch.cuda.device_count()} CUDA cards here, got {name!r}")
    return device


def progress() -> Progress:
    """A bar on stderr that leaves nothing behind; silent where stderr is no terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = console(sys.stderr)
    return Progress(*columns, console=shown, transient=True, refresh_per_second=2, disable=not shown.is_terminal)


def write(printed: RenderableType, data: dict[str, Any], output: str | None) -> None:
    """Prints on stdout and writes the data to `output`; where that is stdout, prints on stderr."""
    console(sys.stderr if output == "-" else sys.stdout).print(printed)
    if output is not None:
        save(data, output)


def save(data: dict[str, Any], output: str) -> None:
    text = json.dumps(data, indent=2)
    if output == "-":
        print(text)
    else:
        try:
            Path(output).write_text(text + "\n")
        except OSError as error:
            raise BadInput(f"--json: expected a file that can be written ({error})") from error


def console(stream: Any) -> Console:
    from rich.console import Console

    return Console(file=stream, highlight=False, width=None if stream.isatty() else WIDE)
