"""Text as it comes: whole characters, stop strings across token boundaries, never a piece that is taken back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from duplex_attn.generate import Engine, SamplingParams
from duplex_attn.generate.request import Request, finish_reason
from duplex_attn.generate.text import GrowingText
from duplex_attn.modules.language_model import Opening
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel

from .conftest import PROMPTS, MakeEngine


def streamed(engine: Engine, prompt: object, params: SamplingParams) -> tuple[str, list[int], str | None, list[str]]:
    chunks = list(engine.stream(engine.submit(prompt, params)))  # type: ignore[arg-type]
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    tokens = [token for chunk in chunks for token in chunk.tokens]
    pieces = [chunk.text for chunk in chunks]
    return "".join(pieces), tokens, chunks[-1].finish_reason, pieces


@pytest.mark.parametrize("text", ["plain words", "héllo wörld", "Ω€漢字🙂", " leading space", ""])
def test_pieces_are_whole_characters_and_sum_up(tokenizer: Tokenizer, text: str) -> None:
    growing = GrowingText(tokenizer, tokenizer.encode("some prompt,", add_special_tokens=False).ids, ())
    shown = ""
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        growing.push(token)
        assert growing.text.startswith(shown) and "�" not in growing.text
        shown = growing.text
    growing.finish()
    assert growing.text == text


def test_a_character_that_never_became_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab€", add_special_tokens=False).ids
    growing = GrowingText(tokenizer, [], ())
    for token in ids[:-1]:
        growing.push(token)
    assert growing.text == "ab"
    growing.finish()
    assert growing.text == tokenizer.decode(ids[:-1])


def test_cut_goes_back_also_within_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x€yz", add_special_tokens=False).ids
    for count in range(len(ids) + 1):
        growing = GrowingText(tokenizer, [], ())
        for token in ids:
            growing.push(token)
        growing.cut(count)
        for token in ids[count:]:
            growing.push(token)
        assert growing.text == "x€yz" and len(growing.ends) == len(ids)


def test_a_stream_is_the_whole_text(engine: MakeEngine, tokenizer: Tokenizer) -> None:
    one = engine()
    text, tokens, reason, pieces = streamed(one, "The value of", SamplingParams(max_tokens=30))
    request = one.generate(["The value of"], SamplingParams(max_tokens=30))[0]
    assert (text, tokens, reason) == (request.text, request.tokens, "length")
    assert len(pieces) > 10
    expected = tokenizer.decode([*request.prompt, *tokens])
    assert expected == tokenizer.decode(request.prompt) + text


def test_stop_strings_across_tokens(engine: MakeEngine) -> None:
    """Every substring of the text, as a stop string: the stream never shows any of it, nor more than comes before it."""
    one = engine()
    params = SamplingParams(max_tokens=24, temperature=1.5, seed=2)
    free, tokens, _, _ = streamed(one, PROMPTS[0], params)
    assert len(free) > 16
    for begin in range(0, len(free) - 1, 3):
        for size in (1, 2, 5, 9):
            stop = free[begin : begin + size]
            text, some, reason, _ = streamed(one, PROMPTS[0], replace(params, stop=["never", stop]))
            assert text == free[: free.index(stop)] and reason == "stop"
            assert some == tokens[: len(some)] and stop in one.tokenizer.decode(some)  # type: ignore[union-attr]


def test_what_may_become_a_stop_string_is_shown_at_the_end(engine: MakeEngine) -> None:
    one = engine()
    free, *_ = streamed(one, PROMPTS[0], SamplingParams(max_tokens=16))
    text, _, reason, _ = streamed(one, PROMPTS[0], SamplingParams(max_tokens=16, stop=free[-3:] + "\0"))
    assert (text, reason) == (free, "length")


def test_a_stop_string_in_a_token_that_ends_within_a_character() -> None:
    """As GPT-2's vocabulary has them: a space, or a new line, and the first two bytes of an emoji."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = {piece: n for n, piece in enumerate([*alphabet, "\u010a\u00f0\u0141"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=alphabet[0]))
    tokenizer.decoder = decoders.ByteLevel()
    prompt = [vocabulary["a"]]
    params = SamplingParams(max_tokens=2, stop="\n")
    request = Request(0, prompt, params, 0, tokenizer, Opening(prompt, 0, None, prompt), 9)
    sample = request.samples[0]
    sample.push(vocabulary["b"], None)
    assert finish_reason(sample) is None
    sample.push(len(alphabet), None)
    assert (finish_reason(sample), sample.text.text) == ("stop", "b")


def test_special_tokens_are_no_text(engine: MakeEngine, tokenizer: Tokenizer) -> None:
    one = engine()
    assert one.submit("abc").prompt[0] == tokenizer.token_to_id("[CLS]")
    assert one.submit("abc", add_special_tokens=False).prompt == tokenizer.encode("abc", add_special_tokens=False).ids
    growing = GrowingText(tokenizer, [], ())
    growing.push(tokenizer.token_to_id("[SEP]"))
    assert growing.text == ""
    one.close()


def test_without_a_tokenizer_there_are_tokens(engine: MakeEngine) -> None:
    text, tokens, reason, _ = streamed(engine(text=False), PROMPTS[0], SamplingParams(max_tokens=5))
    assert (text, len(tokens), reason) == ("", 5, "length")
