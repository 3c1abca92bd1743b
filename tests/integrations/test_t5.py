"""T5, mT5 and UMT5 of transformers after `swap`: their bias by distance is a table wherever distances allow it."""

import duplex_attn as da
import pytest
import torch
import transformers
from duplex_attn.integrations import transformers as integration
from torch import nn

from . import padded
from .padded import assert_same

SIZES = dict(
    vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, pad_token_id=0,
    relative_attention_num_buckets=8, relative_attention_max_distance=6, decoder_start_token_id=0,
    eos_token_id=None, initializer_factor=1.0,
)  # fmt: skip
BATCH, LENGTH = 3, 19
PADDING = {
    "none": ((0, 19), (0, 19), (0, 19)),
    "right": ((0, 19), (0, 11), (0, 4)),
    "left": ((0, 19), (6, 19), (15, 19)),
    "both sides": ((0, 19), (2, 15), (7, 18)),
}
Terms = list[tuple[torch.Size | None, torch.Size | None]]  # of distance_bias and bias, a pair a call


def build(kind: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()


def inputs(padding: str = "none") -> dict[str, torch.Tensor]:
    given = padded.inputs(PADDING[padding], LENGTH)
    return given | {"decoder_input_ids": given["input_ids"].flip(1)[:, :13]}


def results(model: nn.Module, padding: str = "none") -> dict[str, torch.Tensor]:
    given = inputs(padding)
    return padded.results(model, given, torch.ones_like(given["decoder_input_ids"]).bool())


@pytest.fixture
def terms(monkeypatch: pytest.MonkeyPatch) -> Terms:
    seen: Terms = []
    attention = integration.functional.attention

    def spy(*args: torch.Tensor, **options: torch.Tensor | None) -> torch.Tensor:
        of = [options[name] for name in ("distance_bias", "bias")]
        seen.append(tuple(None if x is None else x.shape for x in of))  # type: ignore[arg-type]
        return attention(*args, **options)

    monkeypatch.setattr(integration.functional, "attention", spy)
    return seen


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5"])
def test_forward_and_every_gradient(kind: str, padding: str, terms: Terms) -> None:
    model = build(kind)
    expected = results(model, padding)
    report = da.swap(model)
    assert report.swapped == {f"{kind}Attention": 6} and not report.left
    terms.clear()
    assert_same(results(model, padding), expected)

    table = (4, 2 * 8 + 1)
    encoder, decoder, across = terms[:2], terms[2::2], terms[3::2]
    of_pairs = (1, 4, LENGTH, LENGTH)
    assert encoder == [(table, None) if padding != "both sides" else (None, of_pairs)] * 2
    assert decoder == [(table, None)] * 2
    assert across == [(None, None if kind != "UMT5" else (1, 4, 13, LENGTH))] * 2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("kind", ["T5", "UMT5"])
def test_generate(kind: str, padding: str, cache: str) -> None:
    model, given = build(kind), inputs(padding)
    del given["decoder_input_ids"]
    options = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(**given, **options)
    da.swap(model)
    assert torch.equal(model.generate(**given, **options), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = build("T5").train()
    expected = results(model)
    da.swap(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(results(model), expected)


def test_masks_given_by_the_user(terms: Terms) -> None:
    model, given = build("T5"), inputs()
    keep = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5
    keep |= torch.eye(LENGTH, dtype=torch.bool)
    given["attention_mask"] = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    states = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    expected = model.encoder(**states).last_hidden_state
    da.swap(model)
    found = model.encoder(**states | {"attention_mask": keep}).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert terms == [((4, 17), keep.shape)] * 2


@pytest.mark.filterwarnings("ignore:head_dim")
def test_heads_that_are_too_wide() -> None:
    model = build("T5", d_kv=264)
    expected = results(model, "right")
    report = da.swap(model)
    assert "264" in report.left["T5Attention"]
    assert_same(results(model, "right"), expected)


def test_a_bias_of_fewer_dimensions_is_no_table() -> None:
    q = torch.randn(2, 5, 5, 8, generator=torch.Generator().manual_seed(4))  # as many heads as queries and keys
    bias = torch.randn(5, 5, generator=torch.Generator().manual_seed(5))
    for given in (bias, bias[None]):
        found, _ = integration.attention(nn.Module(), q, q, q, None, is_causal=False, position_bias=given)
        expected, _ = integration.attention(nn.Module(), q, q, q, None, is_causal=False, position_bias=bias[None, None])
        assert torch.equal(found, expected)


def test_another_implementation_again() -> None:
    model = build("T5")
    expected = results(model, "right")
    previous = da.swap(model).previous
    for part in (model, model.encoder, model.decoder):
        part.set_attn_implementation(previous[type(model).__name__])
    assert model.config._attn_implementation != integration.NAME
    assert_same(results(model, "right"), expected)


def test_compiled() -> None:
    model = build("T5")
    da.swap(model)
    with torch.no_grad():
        expected = model(**inputs()).logits
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs(), use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
