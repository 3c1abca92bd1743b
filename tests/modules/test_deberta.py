import json

import pytest
import torch
import torch.nn.functional as F
from duplex_attn.checkpoint import load_checkpoint
from duplex_attn.modules import Bert, BertConfig, disentangled
from duplex_attn.modules.disentangled import Disentangled

EXACT = {"atol": 5e-5, "rtol": 5e-5}
ATTENTIONS = ("duplex", "sdpa", "plain")
V3 = {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
MODELS = {
    "v1": ("Deberta", {}),
    "v1, near positions": ("Deberta", {"max_relative_positions": 5, "type_vocab_size": 2}),
    "v1, c2p alone": ("Deberta", {"pos_att_type": ["c2p"]}),
    "v2": ("DebertaV2", {"position_buckets": 8}),
    "v2, near positions, without buckets": ("DebertaV2", {"max_relative_positions": 5, "norm_rel_ebd": "layer_norm"}),
    "v2, no distances": (
        "DebertaV2",
        {"relative_attention": False, "pos_att_type": None, "position_biased_input": True},
    ),
    "v3": ("DebertaV2", V3),
    "v3, p2c alone": ("DebertaV2", V3 | {"pos_att_type": "p2c", "type_vocab_size": 2}),
}


@pytest.fixture(params=MODELS)
def variant(request):
    return MODELS[request.param]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_hidden_states_are_those_of_transformers(save, variant, ragged, attention, side):
    family, options = variant
    theirs, folder = save(f"{family}Model", **options)
    ours = load_checkpoint(folder)
    ids, seqlens, attention_mask = ragged
    if side == "left":
        ids, attention_mask = ids.flip(1), attention_mask.flip(1)
    segments = torch.randint(0, 2, ids.shape) if options.get("type_vocab_size") else None
    expected = theirs(ids, attention_mask=attention_mask, token_type_ids=segments).last_hidden_state
    real = attention_mask.bool()
    hidden = ours(ids, attention_mask, segments=segments, attention=attention)
    torch.testing.assert_close(hidden[real], expected[real], **EXACT)
    if side == "right":
        again = ours(ids, seqlens=seqlens, segments=segments, attention=attention)
        torch.testing.assert_close(again[real], expected[real], **EXACT)
        whole = ours(ids, segments=segments, attention=attention)
        torch.testing.assert_close(whole, theirs(ids, token_type_ids=segments).last_hidden_state, **EXACT)


def test_heads(save, variant, ragged):
    family, options = variant
    ids, _, attention_mask = ragged
    theirs, folder = save(f"{family}ForSequenceClassification", **options, num_labels=3)
    expected = theirs(ids, attention_mask=attention_mask).logits
    torch.testing.assert_close(load_checkpoint(folder)(ids, attention_mask), expected, **EXACT)
    assert isinstance(load_checkpoint(folder, Bert), Bert)
    theirs, folder = save(f"{family}ForMaskedLM", **options)
    real = attention_mask.bool()
    expected = theirs(ids, attention_mask=attention_mask).logits
    torch.testing.assert_close(load_checkpoint(folder)(ids, attention_mask)[real], expected[real], **EXACT)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradients(save, variant, ragged, attention):
    family, options = variant
    theirs, folder = save(f"{family}ForMaskedLM", **options)
    ours = load_checkpoint(folder)
    ids, _, attention_mask = ragged
    masked = attention_mask.bool() & (torch.rand(ids.shape) < 0.5)
    labels = torch.randint(0, 97, (int(masked.sum()),))
    F.cross_entropy(theirs(ids, attention_mask=attention_mask).logits[masked], labels).backward()
    F.cross_entropy(ours(ids, attention_mask, masked=masked, attention=attention), labels).backward()
    stored = {name: parameter.grad for name, parameter in theirs.deberta.named_parameters()}
    pairs = [(ours.bert.embedding.word.weight, "embeddings.word_embeddings.weight")]
    layer, place = ours.bert.layers[0], "encoder.layer.0.attention.self."
    if ours.bert.distances is not None:
        pairs.append((ours.bert.distances.embedding.weight, "encoder.rel_embeddings.weight"))
        own = {"Deberta": ("pos_proj", "pos_q_proj")}.get(family, ("pos_key_proj", "pos_query_proj"))
        projections = zip((layer.distances.key, layer.distances.query), own, strict=True)
        pairs += [(ours_.weight, f"{place}{theirs_}.weight") for ours_, theirs_ in projections if ours_ is not None]
    if family == "DebertaV2":
        key = layer.qkv.weight.grad[48:96]
        torch.testing.assert_close(key, stored[f"{place}key_proj.weight"], **EXACT)
    for parameter, name in pairs:
        torch.testing.assert_close(parameter.grad, stored[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_few_sequences_at_a_time(save, ragged, monkeypatch):
    _, folder = save("DebertaV2Model", **V3)
    ours = load_checkpoint(folder)
    ids, seqlens, _ = ragged
    expected = ours(ids, seqlens=seqlens)
    monkeypatch.setitem(disentangled.LIMIT, "cpu", 1)
    torch.testing.assert_close(ours(ids, seqlens=seqlens), expected, **EXACT)


def test_what_lies_in_padded_rows_reaches_no_gradient(save, ragged):
    _, folder = save("DebertaV2Model", **V3)
    ours = load_checkpoint(folder)
    ids, seqlens, _ = ragged
    alone = []
    for row, length in zip(ids, seqlens.tolist(), strict=True):
        ours(row[None, :length]).square().sum().backward()
        alone.append(ours.distances.embedding.weight.grad.clone())
    ours.zero_grad()
    ours(ids, seqlens=seqlens).square().sum().backward()
    torch.testing.assert_close(ours.distances.embedding.weight.grad, alone[-1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("lengths", [[0, 5, 0], [0, 0, 0]])
def test_empty_sequences(lengths):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden=16, layers=2, heads=2, inner=32, disentangled=Disentangled(8, 4))
    ours = Bert(config).eval()
    hidden = ours(torch.randint(0, 50, (3, 5)), seqlens=torch.tensor(lengths))
    assert hidden.isfinite().all() and hidden.abs().sum((1, 2)).ne(0).tolist() == [length > 0 for length in lengths]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_kernel_size": 3}, "conv_kernel_size: expected 0 in config.json, got 3"),
        ({"embedding_size": 20}, "embedding_size: expected 48"),
        ({"relative_attention": False}, "relative_attention: expected True in config.json, got False"),
        ({"pos_att_type": ["p2p"]}, r"pos_att_type: expected c2p and p2c in config\.json, got \['p2p'\]"),
        ({"pooler_dropout": 0.5}, "pooler_dropout: expected 0.0"),
    ],
)
def test_what_is_not_computed_is_refused(save, changes, message):
    _, folder = save("DebertaV2ForMaskedLM", **V3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_a_head_that_is_not_computed_is_refused(save):
    _, folder = save("DebertaV2ForMaskedLM", **V3, legacy=False)
    with pytest.raises(ValueError, match=r"legacy: expected True in config\.json, got False"):
        load_checkpoint(folder)
    assert isinstance(load_checkpoint(folder, Bert), Bert)
