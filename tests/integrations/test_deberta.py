"""DeBERTa of transformers, versions 1 to 3, after `swap` against itself before, same weights, same input."""

import copy

import duplex_attn as da
import pytest
import torch
import transformers
from duplex_attn.integrations import deberta
from duplex_attn.modules import disentangled
from torch import nn

from . import padded
from .padded import assert_same

SIZES = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, pad_token_id=0,
    max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False,
)  # fmt: skip
V3 = {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
MODELS = {
    "v1": (1, {}),
    "v1, near positions": (1, {"max_relative_positions": 5}),
    "v1, c2p alone": (1, {"pos_att_type": ["c2p"]}),
    "v1, of which one counts in the scale alone": (1, {"pos_att_type": ["c2p", "p2c", "p2p"]}),
    "v2": (2, {"position_buckets": 8, "conv_kernel_size": 3}),
    "v2, near positions, without buckets": (2, {"max_relative_positions": 5, "norm_rel_ebd": "layer_norm"}),
    "v2, no positions": (2, {"relative_attention": False, "position_biased_input": True}),
    "v3": (2, V3),
    "v3, p2c alone": (2, V3 | {"pos_att_type": ["p2c"]}),
}
BATCH, LENGTH = 3, 21
PADDING = {
    "none": ((0, 21), (0, 21), (0, 21)),
    "right": ((0, 21), (0, 15), (0, 4)),
    "left": ((0, 21), (6, 21), (20, 21)),
    "anywhere": ((0, 21), (2, 15), (7, 20)),
}


def build(name: str = "v3", **changes: object) -> nn.Module:
    version, sizes = MODELS[name]
    kind = "Deberta" if version == 1 else "DebertaV2"
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | sizes | changes)
    return getattr(transformers, f"{kind}ForMaskedLM")(config).eval()


def inputs(padding: str = "none") -> dict[str, torch.Tensor]:
    return padded.inputs(PADDING[padding], LENGTH)


def results(model: nn.Module, padding: str = "none") -> dict[str, torch.Tensor]:
    given = inputs(padding)
    return padded.results(model, given, given["attention_mask"].bool())


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_every_gradient(name: str, padding: str) -> None:
    model = build(name)
    expected = results(model, padding)
    report = da.swap(model)
    assert sum(report.swapped.values()) == 2 and not report.left
    assert_same(results(model, padding), expected)


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_few_sequences_at_a_time_and_no_longer_than_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    products = disentangled.products

    def spy(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        made.append((*x.shape[:2], len(positions)))
        return products(x, positions)

    model = build(name)
    expected = results(model, "right")
    monkeypatch.setattr(disentangled, "products", spy)
    monkeypatch.setitem(disentangled.LIMIT, "cpu", 1)
    da.swap(model)
    assert_same(results(model, "right"), expected)
    assert set(made) == {(1, n, 2 * n - 1) for n in (21, 15, 4)}
    made.clear()
    with torch.no_grad():
        model(**inputs("right"))
    assert len(made) == 2 * 2 * BATCH  # of layers and tables; nothing is made twice


def test_dropout_is_the_same_when_tables_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2).train()
    da.swap(model)

    def seeded() -> dict[str, torch.Tensor]:
        torch.manual_seed(5)
        return results(model, "right")

    found = seeded()
    monkeypatch.setattr(disentangled, "checkpoint", lambda function, *given, **how: function(*given))
    assert_same(found, seeded())


def test_a_mask_for_each_query() -> None:
    model, given = build(), inputs()
    given["attention_mask"] = torch.rand(BATCH, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5
    given["attention_mask"] |= torch.eye(LENGTH, dtype=torch.bool)
    embedded = {"hidden_states": torch.randn(BATCH, LENGTH, 32), "attention_mask": given["attention_mask"].long()}
    expected = model.deberta.encoder(**embedded).last_hidden_state
    da.swap(model)
    torch.testing.assert_close(model.deberta.encoder(**embedded).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["v1", "v3"])
def test_restore(name: str) -> None:
    model = build(name)
    before, kinds = model(**inputs()).logits, [type(part) for part in model.modules()]
    da.swap(model)
    assert kinds != [type(part) for part in model.modules()]
    with pytest.raises(ValueError, match="output_attentions: expected False"):
        model(**inputs(), output_attentions=True)
    assert copy.deepcopy(model)(**inputs()).logits.equal(model(**inputs()).logits)
    deberta.restore(model)
    assert kinds == [type(part) for part in model.modules()]
    assert model(**inputs(), output_attentions=True).logits.equal(before)


def test_heads_that_mix_are_left() -> None:
    model = build("v1", talking_head=True)
    before = model(**inputs()).logits
    report = da.swap(model)
    assert not report.swapped and "DisentangledSelfAttention" in report.left
    assert model(**inputs()).logits.equal(before)


class Changed(transformers.models.deberta_v2.modeling_deberta_v2.DisentangledSelfAttention):
    """Somebody's own."""


@pytest.mark.parametrize("case", ["a class of somebody's own", "a forward of its own", "too wide"])
def test_a_model_that_is_another_is_left(case: str) -> None:
    model = build(**({"hidden_size": 528, "num_attention_heads": 2} if case == "too wide" else {}))
    first = model.deberta.encoder.layer[0].attention.self
    if case.startswith("a class"):
        first.__class__ = Changed
    elif case.startswith("a forward"):
        first.forward = first.forward
    before = model(**inputs()).logits
    report = da.swap(model)
    assert not report.swapped and report.left
    assert model(**inputs()).logits.equal(before)


def test_a_layer_by_itself_takes_a_tensor() -> None:
    model = build("v1")
    layer, hidden = model.deberta.encoder.layer[0], torch.randn(BATCH, LENGTH, 32)
    mask = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.7
    positions, embeddings = model.deberta.encoder.get_rel_pos(hidden), model.deberta.encoder.get_rel_embedding()
    expected, _ = layer(hidden, mask, relative_pos=positions, rel_embeddings=embeddings)
    da.swap(model)
    found, _ = layer(hidden, mask, rel_embeddings=embeddings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_positions_of_another_kind_are_refused() -> None:
    model = build()
    da.swap(model)
    hidden, mask = torch.randn(BATCH, LENGTH, 32), torch.ones(BATCH, LENGTH)
    with pytest.raises(ValueError, match="relative_pos: expected None"):
        model.deberta.encoder(hidden, mask, relative_pos=torch.zeros(1, LENGTH, LENGTH, dtype=torch.long))


@pytest.mark.parametrize("padding", ["none", "right"])
def test_compiled(padding: str) -> None:
    model = build()
    da.swap(model)
    given = inputs(padding)
    tokens = given["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**given).logits
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(**given).logits
    torch.testing.assert_close(found[tokens], expected[tokens], rtol=1e-4, atol=1e-4)


def test_autocast() -> None:
    model = build()
    expected = model(**inputs("right")).logits
    da.swap(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**inputs("right")).logits
    tokens = inputs("right")["attention_mask"].bool()
    assert (found - expected)[tokens].abs().max() < 0.1 * expected[tokens].abs().max()
