import pytest
import torch
import torch.nn.functional as F
from duplex_attn.checkpoint import load_checkpoint
from duplex_attn.modules import Bert, BertClassifier, BertConfig, BertMaskedLM

EXACT = {"atol": 2e-5, "rtol": 2e-5}
ATTENTIONS = ("duplex", "sdpa", "plain")


@pytest.fixture(params=["Bert", "Roberta", "XLMRoberta"])
def family(request):
    return request.param


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_hidden_states_and_pooler_are_those_of_transformers(save, family, ragged, attention):
    theirs, folder = save(f"{family}Model")
    ours = load_checkpoint(folder)
    ids, seqlens, attention_mask = ragged
    segments = torch.randint(0, 2, ids.shape)
    expected = theirs(ids, attention_mask=attention_mask, token_type_ids=segments)
    hidden = ours(ids, attention_mask, segments=segments, attention=attention)
    real = attention_mask.bool()
    torch.testing.assert_close(hidden[real], expected.last_hidden_state[real], **EXACT)
    x, rows = ours.encode(ids, seqlens=seqlens, segments=segments, attention=attention)
    torch.testing.assert_close(ours.pool(x, rows), expected.pooler_output, **EXACT)


def test_an_unpadded_batch_and_default_segments(save, family):
    theirs, folder = save(f"{family}Model")
    ours = load_checkpoint(folder)
    ids = torch.randint(3, 97, (2, 9))
    torch.testing.assert_close(ours(ids), theirs(ids).last_hidden_state, **EXACT)


@pytest.mark.parametrize("hole", ["left", "inside"])
def test_tokens_stand_at_their_place_wherever_the_padding_is(save, family, ragged, hole):
    theirs, folder = save(f"{family}Model")
    ours = load_checkpoint(folder)
    ids, _, attention_mask = ragged
    if hole == "left":
        ids, attention_mask = ids.flip(1), attention_mask.flip(1)
    else:
        attention_mask[1, 4:9] = 0
        attention_mask[4, 0] = 0
        ids = ids * attention_mask  # RoBERTa of transformers tells padding by its id
    expected = theirs(ids, attention_mask=attention_mask).last_hidden_state
    for attention in ATTENTIONS:
        real = attention_mask.bool()
        torch.testing.assert_close(ours(ids, attention_mask, attention=attention)[real], expected[real], **EXACT)


def test_packed_rows_equal_each_sequence_alone_and_padding_is_zero(save, ragged):
    _, folder = save("BertModel")
    ours = load_checkpoint(folder)
    ids, seqlens, attention_mask = ragged
    hidden = ours(ids, seqlens=seqlens)
    assert hidden[~attention_mask.bool()].eq(0).all()
    packed, rows = ours.encode(ids, attention_mask)
    assert packed.shape == (int(seqlens.sum()), 48)
    torch.testing.assert_close(rows.unpack(packed), hidden, atol=0, rtol=0)
    for row, length in enumerate(seqlens.tolist()):
        torch.testing.assert_close(hidden[row, :length], ours(ids[row : row + 1, :length])[0], **EXACT)


def test_what_the_padding_holds_changes_nothing(save, ragged):
    _, folder = save("BertModel")
    ours = load_checkpoint(folder)
    ids, seqlens, attention_mask = ragged
    other = torch.where(attention_mask.bool(), ids, 96)
    assert ours(ids, seqlens=seqlens).equal(ours(other, seqlens=seqlens))


def test_mean_and_first_pooling(save, ragged):
    _, folder = save("BertModel")
    ours = load_checkpoint(folder)
    ids, seqlens, attention_mask = ragged
    for attention in ATTENTIONS:
        x, rows = ours.encode(ids, attention_mask, attention=attention)
        hidden = rows.unpack(x)
        for row, length in enumerate(seqlens.tolist()):
            torch.testing.assert_close(ours.pool(x, rows, "mean")[row], hidden[row, :length].mean(0), **EXACT)
            torch.testing.assert_close(ours.pool(x, rows, "first")[row], hidden[row, 0], atol=0, rtol=0)
    whole, rows = ours.encode(ids)
    torch.testing.assert_close(ours.pool(whole, rows, "mean"), whole.mean(1), **EXACT)


@pytest.mark.parametrize("lengths", [[0, 5, 0], [5, 0, 0], [0, 0, 0]])
def test_empty_sequences_pool_to_zero(lengths):
    torch.manual_seed(0)
    ours = Bert(BertConfig(vocab_size=50, hidden=16, layers=1, heads=2, inner=32)).eval()
    ids, seqlens = torch.randint(0, 50, (3, 5)), torch.tensor(lengths)
    x, rows = ours.encode(ids, seqlens=seqlens)
    for kind in ("first", "mean"):
        pooled = ours.pool(x, rows, kind)
        assert pooled.isfinite().all()
        assert pooled.abs().sum(1).eq(0).tolist() == [length == 0 for length in lengths]


def test_masked_lm_computes_only_the_positions_asked_for(save, family, ragged):
    theirs, folder = save(f"{family}ForMaskedLM")
    ours = load_checkpoint(folder)
    ids, _, attention_mask = ragged
    expected = theirs(ids, attention_mask=attention_mask).logits
    real = attention_mask.bool()
    torch.testing.assert_close(ours(ids, attention_mask)[real], expected[real], **EXACT)
    masked = real & (torch.rand(ids.shape) < 0.3)
    positions = masked.flatten().nonzero().squeeze(1)
    shuffled = positions[torch.randperm(len(positions))]
    seen = []
    ours.decoder.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    for attention in ATTENTIONS:
        some = ours(ids, attention_mask, masked=masked, attention=attention)
        torch.testing.assert_close(some, expected[masked], **EXACT)
        same = ours(ids, attention_mask, masked=shuffled, attention=attention)
        torch.testing.assert_close(same, expected.flatten(0, 1)[shuffled], **EXACT)
    assert set(seen) == {(int(masked.sum()), 48)}


def test_classification(save, family, ragged):
    theirs, folder = save(f"{family}ForSequenceClassification", num_labels=5)
    ours = load_checkpoint(folder)
    assert isinstance(ours, BertClassifier)
    ids, _, attention_mask = ragged
    expected = theirs(ids, attention_mask=attention_mask).logits
    for attention in ATTENTIONS:
        torch.testing.assert_close(ours(ids, attention_mask, attention=attention), expected, **EXACT)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradients_of_a_masked_lm_loss(save, family, ragged, attention):
    theirs, folder = save(f"{family}ForMaskedLM")
    ours = load_checkpoint(folder)
    ids, _, attention_mask = ragged
    masked = attention_mask.bool() & (torch.rand(ids.shape) < 0.5)
    targets = torch.randint(0, 97, (int(masked.sum()),))
    F.cross_entropy(theirs(ids, attention_mask=attention_mask).logits[masked], targets).backward()
    F.cross_entropy(ours(ids, attention_mask, masked=masked, attention=attention), targets).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters(remove_duplicate=False)}
    body, dense, bias = "bert", "cls.predictions.transform.dense", "cls.predictions.bias"
    position = expected.get("bert.embeddings.position_embeddings.weight")
    if family != "Bert":
        body, dense, bias = "roberta", "lm_head.dense", "lm_head.bias"
        position = expected["roberta.embeddings.position_embeddings.weight"][1:]
    torch.testing.assert_close(ours.bert.embedding.position.weight.grad, position, **EXACT)
    pairs = [(ours.bert.embedding.word, f"{body}.embeddings.word_embeddings"), (ours.dense, dense)]
    for layer, module in enumerate(ours.bert.layers):
        stem = f"{body}.encoder.layer.{layer}."
        pairs += [
            (module.out, stem + "attention.output.dense"),
            (module.attention_norm, stem + "attention.output.LayerNorm"),
        ]
        pairs += [(module.up, stem + "intermediate.dense"), (module.down, stem + "output.dense")]
        names = [f"{stem}attention.self.{name}" for name in ("query", "key", "value")]
        for leaf in ("weight", "bias"):
            fused = torch.cat([expected[f"{name}.{leaf}"] for name in names])
            torch.testing.assert_close(getattr(module.qkv, leaf).grad, fused, **EXACT)
    for module, name in pairs:
        torch.testing.assert_close(module.weight.grad, expected[name + ".weight"], **EXACT)
    torch.testing.assert_close(ours.decoder.bias.grad, expected[bias], **EXACT)
    assert ours.decoder.weight is ours.bert.embedding.word.weight


def test_bfloat16_is_as_near_to_float64_as_transformers(save, ragged):
    theirs, folder = save("BertModel")
    ids, _, attention_mask = ragged
    real = attention_mask.bool()
    exact = load_checkpoint(folder, dtype=torch.float64)(ids, attention_mask, attention="plain")[real]
    rounded = theirs.to(torch.bfloat16)(ids, attention_mask=attention_mask).last_hidden_state[real]
    ours = load_checkpoint(folder, dtype=torch.bfloat16)
    error = (ours(ids, attention_mask)[real] - exact).abs().max()
    assert error <= 1.5 * (rounded - exact).abs().max()
    assert error > 1e-4  # bfloat16 did run


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden=16, layers=1, heads=2, inner=32, dropout=0.0, attention_dropout=0.5)
    ours, ids = Bert(config), torch.randint(0, 50, (2, 9))
    lengths = torch.tensor([9, 4])
    assert not ours.train()(ids, seqlens=lengths).equal(ours(ids, seqlens=lengths))
    assert ours.eval()(ids, seqlens=lengths).equal(ours(ids, seqlens=lengths))


def test_bad_input_is_named():
    ours = BertMaskedLM(
        BertConfig(vocab_size=50, hidden=16, layers=1, heads=2, inner=32, max_positions=8, pooler=False)
    )
    ids = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"attention: expected one of duplex, sdpa, plain, got 'flash'"):
        ours(ids, attention="flash")
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(2, 6\), got \(2, 5\)"):
        ours(ids, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"seqlens: expected shape \(2,\), got \(3,\)"):
        ours(ids, seqlens=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="attention_mask: expected it or seqlens, got both"):
        ours(ids, torch.ones(2, 6), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"seqlens: expected 0 to 6, got 7"):
        ours(ids, seqlens=torch.tensor([1, 7]))
    with pytest.raises(ValueError, match=r"max_positions \(8\) columns, got 9"):
        ours(torch.zeros(2, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"masked: expected shape \(2, 6\), got \(2, 7\)"):
        ours(ids, masked=torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="no pooler"):
        ours.bert.pool(*ours.bert.encode(ids))
    with pytest.raises(ValueError, match="kind: expected first, pooler or mean, got 'max'"):
        ours.bert.pool(*ours.bert.encode(ids), "max")
    with pytest.raises(ValueError, match=r"hidden: expected a multiple of heads \(5\), got 16"):
        Bert(BertConfig(hidden=16, heads=5))
