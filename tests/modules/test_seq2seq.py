import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from duplex_attn.checkpoint import load_checkpoint
from duplex_attn.generate import Engine, SamplingParams, cache_for
from duplex_attn.modules import GPT, Encoder, Seq2Seq, Seq2SeqConfig
from safetensors.torch import load_file, save_file

EXACT = {"atol": 2e-5, "rtol": 2e-5}
ATTENTIONS = ("duplex", "sdpa", "plain")
MODELS = {
    "t5": ("T5ForConditionalGeneration", {}),
    "t5 gated untied": (
        "T5ForConditionalGeneration",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 3, "num_decoder_layers": 2},
    ),
    "mt5": ("MT5ForConditionalGeneration", {"feed_forward_proj": "gated-silu", "d_kv": 20}),
    "umt5": ("UMT5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", {}),
    "bart uneven": (
        "BartForConditionalGeneration",
        {"scale_embedding": True, "decoder_layers": 1, "decoder_ffn_dim": 40, "activation_function": "relu"},
    ),
}


@pytest.fixture(params=MODELS)
def pair(request, save):
    architecture, options = MODELS[request.param]
    theirs, folder = save(architecture, **options)
    return theirs, load_checkpoint(folder)


@pytest.fixture
def targets():
    """targets (B, N), the first of each its start, and their lengths."""
    torch.manual_seed(2)
    target_seqlens = torch.tensor([9, 1, 5, 9, 3], dtype=torch.int32)
    targets = torch.randint(3, 97, (5, 9)) * (torch.arange(9) < target_seqlens[:, None])
    targets[:, 0] = 2
    return targets, target_seqlens


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_logits_are_those_of_transformers(pair, ragged, targets, attention):
    theirs, ours = pair
    (ids, seqlens, attention_mask), (targets, target_seqlens) = ragged, targets
    expected = theirs(ids, attention_mask=attention_mask, decoder_input_ids=targets).logits
    real = torch.arange(9) < target_seqlens[:, None]
    both = ours(ids, targets, seqlens=seqlens, target_seqlens=target_seqlens, attention=attention)
    torch.testing.assert_close(both[real], expected[real], **EXACT)
    one = ours(ids, targets, attention_mask, attention=attention)
    torch.testing.assert_close(one, expected, **EXACT)
    whole = theirs(ids, decoder_input_ids=targets).logits
    torch.testing.assert_close(ours(ids, targets, attention=attention), whole, **EXACT)
    other = ours(ids, targets, target_seqlens=target_seqlens, attention=attention)
    torch.testing.assert_close(other[real], whole[real], **EXACT)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradients_of_a_loss(pair, ragged, targets, attention):
    theirs, ours = pair
    (ids, seqlens, attention_mask), (targets, target_seqlens) = ragged, targets
    labels = targets.roll(-1, 1).masked_fill(torch.arange(9) >= target_seqlens[:, None], -100)

    def loss(logits):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    loss(theirs(ids, attention_mask=attention_mask, decoder_input_ids=targets).logits).backward()
    loss(ours(ids, targets, seqlens=seqlens, target_seqlens=target_seqlens, attention=attention)).backward()
    stored = dict(theirs.named_parameters())
    word = stored["shared.weight" if "shared.weight" in stored else "model.shared.weight"].grad
    torch.testing.assert_close(ours.encoder.word.weight.grad, word, **EXACT)
    umt5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in stored
    for kind, stack in (("encoder", ours.encoder.stack), ("decoder", ours.decoder)):
        for layer, table in enumerate(stack.distances):
            name = f"{kind}.block.{layer}.layer.0.SelfAttention.relative_attention_bias.weight"
            torch.testing.assert_close(table.weight.grad, stored[name].grad, **EXACT)
        assert len(stack.distances) == (0 if stack.position is not None else len(stack.layers) if umt5 else 1)
    if ours.decoder.position is not None:
        at = stored["model.decoder.embed_positions.weight"].grad[2:]
        torch.testing.assert_close(ours.decoder.position.weight.grad, at, **EXACT)
    first = "decoder.block.0.layer.1.EncDecAttention.k.weight"
    first = first if first in stored else "model.decoder.layers.0.encoder_attn.k_proj.weight"
    half = len(stored[first])
    torch.testing.assert_close(ours.decoder.layers[0].source_kv.weight.grad[:half], stored[first].grad, **EXACT)


@pytest.mark.parametrize("architecture", ["T5EncoderModel", "UMT5EncoderModel"])
def test_an_encoder_alone(save, ragged, architecture):
    theirs, folder = save(architecture)
    ids, seqlens, attention_mask = ragged
    ours = load_checkpoint(folder)
    assert isinstance(ours, Encoder)
    real = attention_mask.bool()
    expected = theirs(ids, attention_mask=attention_mask).last_hidden_state
    found = ours(ids, seqlens=seqlens)
    torch.testing.assert_close(found[real], expected[real], **EXACT)
    assert not found[~real].any()


def test_an_encoder_out_of_a_whole_checkpoint(pair, ragged, tmp_path):
    theirs, ours = pair
    theirs.save_pretrained(tmp_path / "whole")
    encoder = load_checkpoint(tmp_path / "whole", Encoder)
    ids, seqlens, _ = ragged
    torch.testing.assert_close(encoder(ids, seqlens=seqlens), ours.encoder(ids, seqlens=seqlens), **EXACT)


def test_a_head_of_its_own_and_a_start_from_generation_config(save, ragged, targets):
    """Newer versions of transformers tie every T5; checkpoints of older ones hold another matrix."""
    theirs, folder = save("T5ForConditionalGeneration", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    head = torch.randn_like(tensors["shared.weight"])
    copies = {f"{kind}.embed_tokens.weight": tensors["shared.weight"].clone() for kind in ("encoder", "decoder")}
    older = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(8, 4)}
    save_file({**tensors, **copies, **older, "lm_head.weight": head}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": None}))
    (folder / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 7}))
    ours = load_checkpoint(folder, (GPT, Seq2Seq))
    assert ours.head.weight.equal(head) and ours.config.start_token == 7
    ids, _, attention_mask = ragged
    states = theirs(ids, attention_mask=attention_mask, decoder_input_ids=targets[0], output_hidden_states=True)
    expected = states.decoder_hidden_states[-1] @ head.T
    torch.testing.assert_close(ours(ids, targets[0], attention_mask), expected, **EXACT)
    copies["decoder.embed_tokens.weight"] += 1
    save_file({**tensors, **copies}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.embed_tokens\.weight: expected shared\.weight, got another in"):
        load_checkpoint(folder)
    with pytest.raises(ValueError, match="architecture: expected one of family t5, got GPT"):
        load_checkpoint(folder, GPT)


@pytest.mark.parametrize("named", ["BartModel", "T5Model", "T5WithLMHeadModel", None])
def test_names_of_older_checkpoints(save, named):
    _, folder = save(("Bart" if named == "BartModel" else "T5") + "ForConditionalGeneration")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": named and [named]}))
    assert isinstance(load_checkpoint(folder), Seq2Seq)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["T5ForTokenClassification"]},
            "architectures: expected one of T5ForConditionalGeneration, .* got T5",
        ),
        ({"feed_forward_proj": "gated-foo"}, "feed_forward_proj: expected one of .* got 'foo'"),
        ({"decoder_start_token_id": 500}, "decoder_start_token_id: expected an id below vocab_size .* got 500"),
        ({"decoder_start_token_id": [0]}, "decoder_start_token_id: expected an id"),
    ],
)
def test_what_a_config_may_not_say(save, changes, message):
    _, folder = save("T5ForConditionalGeneration")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def greedy(theirs, ids, seqlens, count):
    """Of each source alone: transformers' position biases of padded batches are checked above."""
    theirs.generation_config.eos_token_id = theirs.generation_config.forced_eos_token_id = None
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    start = theirs.config.decoder_start_token_id or 0
    rows = zip(ids, seqlens.tolist(), strict=True)
    return [theirs.generate(row[None, :n], decoder_start_token_id=start, **options)[0, 1:].tolist() for row, n in rows]


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_the_engine_generates_what_transformers_does(pair, ragged, page_size):
    """Sources that end within pages and at their ends, all in one batch."""
    theirs, ours = pair
    ids, seqlens, _ = ragged
    sources = [row[:n].tolist() for row, n in zip(ids, seqlens.tolist(), strict=True)]
    engine = Engine(ours, cache=cache_for(ours, 200, page_size))
    with torch.no_grad():
        expected = greedy(theirs, ids, seqlens, 12)
    requests = engine.generate(sources, SamplingParams(max_tokens=12))
    assert [request.tokens for request in requests] == expected
    assert [request.prompt for request in requests] == sources
    engine.cache.check()


@pytest.fixture
def small():
    torch.manual_seed(0)
    config = Seq2SeqConfig.t5(vocab_size=97, hidden=48, layers=2, decoder_layers=2, heads=4, head_dim=12, inner=64)
    model = Seq2Seq(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.config = dataclasses.replace(config, logit_scale=1.0)  # sharp enough for a wrong key to show
    return model


SOURCES = [list(range(3, 3 + n)) for n in (7, 16, 21, 1)]


def test_the_paths_of_the_engine_agree(small):
    """Chunks, preemption, samples, prompts that repeat, guesses and small pools change no token."""
    plain = Engine(small, cache=cache_for(small, 200, 4))
    expected = [request.tokens for request in plain.generate(SOURCES, SamplingParams(max_tokens=20))]
    assert len({tuple(tokens) for tokens in expected}) > 1
    again = plain.generate(SOURCES, SamplingParams(max_tokens=20))
    assert [request.tokens for request in again] == expected
    assert plain.stats().cache.hit_tokens >= sum(len(source) // 4 * 4 for source in SOURCES)
    for options in ({"token_budget": 8, "max_sequences": 8}, {"preemption": "recompute"}, {"preemption": "swap"}):
        engine = Engine(small, cache=cache_for(small, 20, 4), **options)
        requests = engine.generate(SOURCES, SamplingParams(max_tokens=20))
        assert [request.tokens for request in requests] == expected, options
        engine.cache.check()
        assert options.get("preemption") is None or engine.stats().preemptions > 0
    guessed = plain.generate(SOURCES, SamplingParams(max_tokens=20, speculate=4))
    assert [request.tokens for request in guessed] == expected
    samples = plain.submit(SOURCES[2], SamplingParams(max_tokens=20, n=3))
    list(plain.stream(samples))
    assert [output.tokens for output in samples.outputs] == [expected[2]] * 3


def test_beams_fork_the_target_and_share_the_source(save, ragged):
    theirs, folder = save("T5ForConditionalGeneration")
    ours = load_checkpoint(folder)
    ids, _, _ = ragged
    source = ids[1:2]
    theirs.generation_config.eos_token_id = None
    with torch.no_grad():
        options = {"num_beams": 4, "max_new_tokens": 8, "do_sample": False, "length_penalty": 1.0}
        expected = theirs.generate(source, decoder_start_token_id=0, **options)
    engine = Engine(ours, cache=cache_for(ours, 200, 4))
    (request,) = engine.generate(source.tolist(), SamplingParams(max_tokens=8, beam_width=4))
    assert request.tokens == expected[0, 1:].tolist()


def logits_of(model, sources, batch_invariant, budget=None):
    """The logits of the first three tokens of each source, over a cache, `budget` sources a step."""
    cache = cache_for(model, 100, 4)
    seqs, found = [], []
    for source in sources:
        opening = model.opening(source, 4)
        seqs.append(cache.add([*opening.tokens, 5, 6], opening.bidirectional_prefix))
    for begin in range(0, len(seqs), budget or len(seqs)):
        some = seqs[begin : begin + (budget or len(seqs))]
        batch = cache.batch(some)
        ids = torch.tensor([token for seq in some for token in seq.tokens[seq.committed :]])
        ends = batch.cu_seqlens_q[1:].long()
        rows = torch.stack([ends - 3, ends - 2, ends - 1], 1).flatten()
        found.append(model.step(ids, cache, batch, rows, batch_invariant))
        cache.commit_batch(batch)
    return torch.cat(found)


def test_batch_invariance(small):
    together = logits_of(small, SOURCES, True)
    alone = logits_of(small, SOURCES, True, budget=1)
    assert together.equal(alone)
    torch.testing.assert_close(logits_of(small, SOURCES, False), together, **EXACT)


def test_steps_compute_what_the_whole_model_does(small):
    logits = logits_of(small, SOURCES, False).unflatten(0, (len(SOURCES), 3))
    for source, found in zip(SOURCES, logits, strict=True):
        whole = small(torch.tensor([source]), torch.tensor([[0, 5, 6]]))
        torch.testing.assert_close(found, whole[0], **EXACT)


@pytest.mark.parametrize("quantization", ["int8", "float8_e4m3fn"])
def test_quantised_pages(small, quantization):
    cache = cache_for(small, 200, 4, quantization=quantization)
    requests = Engine(small, cache=cache).generate(SOURCES, SamplingParams(max_tokens=6))
    assert all(len(request.tokens) == 6 for request in requests)


def test_a_new_model_has_weights():
    """Small ones, and biases that favour no distance."""
    for config in (Seq2SeqConfig.t5(vocab_size=97, hidden=48), Seq2SeqConfig.bart(vocab_size=97, hidden=48)):
        for name, parameter in Seq2Seq(config).named_parameters():
            assert parameter.abs().max() <= 1, name
            assert bool(parameter.any()) == (not name.endswith("bias") and "distances" not in name), name


def test_dropout_is_drawn_in_training_alone(small):
    ids, targets = torch.tensor(SOURCES[2:3]), torch.tensor([[0, 5, 6]])
    assert small(ids, targets).equal(small(ids, targets))
    small.train()
    assert not small(ids, targets).equal(small(ids, targets))


def test_what_is_refused(small):
    ids, targets = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="targets: expected the batch of ids \\(2\\), got 3"):
        small(ids, targets)
    engine = Engine(small, cache=cache_for(small, 6, 4))
    with pytest.raises(ValueError, match="bidirectional_prefix: expected 0, for an encoder sees all"):
        engine.submit([4, 5], bidirectional_prefix=1)
    for length in (21, 22, 24, 40):
        with pytest.raises(ValueError, match=f"prompt: expected 1 to 20 tokens, got {length}"):
            engine.submit([5] * length)
    engine.submit([5] * 20)
    with pytest.raises(ValueError, match="cache: expected pages for a prompt and a token, got 1 of 16 slots"):
        Engine(small, cache=cache_for(small, 1, 16), max_sequences=1).submit([5])
    with pytest.raises(
        TypeError, match=r"model: expected one that generates \(GPT, Seq2Seq, or PagedModel .*\), got Encoder"
    ):
        Engine(small.encoder)
    with pytest.raises(ValueError, match="targets: expected shape"):
        small(ids, ids[0])
    with pytest.raises(ValueError, match="target_seqlens: expected 0 to 5, got 6"):
        small(ids, ids, target_seqlens=torch.tensor([5, 6]))
    with pytest.raises(ValueError, match="prompt: expected 1 token or more, got 0"):
        engine.submit([])
    config = Seq2SeqConfig.bart(vocab_size=97, hidden=48, layers=1, decoder_layers=1, heads=4, head_dim=12, inner=64)
    bart = Seq2Seq(dataclasses.replace(config, max_positions=8)).eval()
    with pytest.raises(ValueError, match="prompt: expected 1 to 8 tokens, got 9"):
        Engine(bart).submit(list(range(9)))
    with pytest.raises(ValueError, match=r"targets: expected at most max_positions \(8\) tokens, got 9"):
        bart(ids, torch.zeros(2, 9, dtype=torch.int64))
    (request,) = Engine(bart).generate([[4, 5, 6]], SamplingParams(max_tokens=50))
    assert len(request.tokens) == 7 and request.outputs[0].finish_reason == "length"
    cache = cache_for(small, 20, 4)
    seq = cache.add(small.opening([4, 5, 6], 4).tokens, 3)
    buffers = cache.buffers(2, 4, 8)
    with pytest.raises(ValueError, match="batch: expected one with tensors of its own, got one in fixed buffers"):
        small.step(torch.zeros(8, dtype=torch.int64), cache, cache.batch([seq], out=buffers))
    with pytest.raises(ValueError, match="rows: expected the rows wanted, where a target has no new token"):
        small.step(torch.tensor([4, 5, 6]), cache, cache.batch([seq], [3]))
    with pytest.raises(ValueError, match=r"rows: expected tokens of targets, got \[2\]"):
        small.step(torch.tensor([4, 5, 6, 0, 0]), cache, cache.batch([seq]), torch.tensor([2]))
    with pytest.raises(ValueError, match="batch: expected sequences with a source"):
        small.step(torch.tensor([4, 5]), cache, cache.batch([cache.add([4, 5])]))
    for wrong in (
        {"buckets": 3},
        {"max_distance": 16},
        {"positions": "rotary"},
        {"biased_layers": "all"},
        {"norm": "batch"},
        {"activation": "tanh"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            Seq2Seq(Seq2SeqConfig.t5(**wrong))
    with pytest.raises(ValueError, match="max_positions: expected a number with learned positions"):
        Seq2Seq(Seq2SeqConfig.t5(positions="learned"))


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_sources_longer_than_a_step(small, batch_invariant):
    """The step ends with the source, or within what fills its last page."""
    expected = Engine(small, cache=cache_for(small, 40, 4)).generate([[5, 6, 7] * 7], SamplingParams(max_tokens=5))
    for budget in (1, 8, 21, 22):
        options = {"token_budget": budget, "max_sequences": 1, "batch_invariant": batch_invariant}
        engine = Engine(small, cache=cache_for(small, 40, 4), **options)
        found = engine.generate([[5, 6, 7] * 7], SamplingParams(max_tokens=5))
        assert found[0].tokens == expected[0].tokens, budget


def test_the_default_cache_has_room_for_the_longest_pair():
    config = Seq2SeqConfig.bart(vocab_size=97, hidden=48, layers=1, decoder_layers=1, heads=4, head_dim=12, inner=64)
    bart = Seq2Seq(dataclasses.replace(config, max_positions=10)).eval()
    for page_size in (1, 4, 16, 100):
        cache = cache_for(bart, page_size=page_size, max_sequences=1)
        (request,) = Engine(bart, cache=cache, max_sequences=1).generate([[5] * 10], SamplingParams(max_tokens=99))
        assert len(request.tokens) == 9 and cache.num_pages == 2 * -(-10 // page_size)


def test_what_is_beyond_float16_in_a_t5(save, ragged):
    """MLPs that add so much are usual in large T5s; transformers computes their second product in float32 too."""
    theirs, folder = save("T5ForConditionalGeneration", feed_forward_proj="gated-gelu")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n: t * 30000 if n.endswith("wo.weight") else t for n, t in tensors.items()}, folder / "model.safetensors"
    )
    ids, _, attention_mask = ragged
    exact, half = load_checkpoint(folder).encoder, load_checkpoint(folder, dtype=torch.float16)
    states = exact.stack.layers[-1].register_forward_hook(lambda *call: wide.append(call[2].abs().max().item()))
    wide = []
    expected = exact(ids, attention_mask)
    states.remove()
    assert max(wide) > 65504
    found = half.encoder(ids, attention_mask)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
    engine = Engine(half, cache=cache_for(half, 40, 4))
    (request,) = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=3))
    assert request.error is None and len(request.tokens) == 3


def test_a_step_that_computes_sources_alone(small):
    cache = cache_for(small, 20, 4)
    opening = small.opening([4, 5, 6], 4)
    seq = cache.add(opening.tokens, opening.bidirectional_prefix)
    none = torch.zeros(0, dtype=torch.int64)
    batch = cache.batch([seq], [3])
    assert small.step(torch.tensor([4, 5, 6]), cache, batch, none).shape == (0, 97)
    cache.commit_batch(batch)
    batch = cache.batch([seq])
    found = small.step(torch.tensor(opening.tokens[3:]), cache, batch)
    torch.testing.assert_close(found, small(torch.tensor([[4, 5, 6]]), torch.tensor([[0]]))[:, -1], **EXACT)


def test_distances_are_read_from_the_table_of_the_paper():
    """Near distances have buckets of their own; the last one begins where log-spaced ones end."""
    from duplex_attn.modules.distances import bucket_of

    both = bucket_of(torch.tensor([0, -1, 1, -7, -8, -127, -128, -5000, 5000]), 32, 128, True)
    assert both.tolist() == [0, 1, 17, 7, 8, 15, 15, 15, 31]
    past = bucket_of(torch.tensor([0, 3, -15, -16, -127, -128, -5000]), 32, 128, False)
    assert past.tolist() == [0, 0, 15, 16, 31, 31, 31]


def test_compiled_without_graph_breaks(small):
    ids, targets = torch.tensor(SOURCES[2:3]), torch.tensor([[0, 5, 6]])
    compiled = torch.compile(small, fullgraph=True)
    torch.testing.assert_close(compiled(ids, targets), small(ids, targets), **EXACT)
