import dataclasses

import duplex_attn as da
import pytest
import torch
import torch.nn.functional as F
from duplex_attn.checkpoint import load_checkpoint
from duplex_attn.generate import Engine, SamplingParams
from duplex_attn.modules import GPT, GPTConfig, KVCache, RopeScaling
from torch._subclasses.fake_tensor import FakeTensorMode

EXACT = {"atol": 2e-5, "rtol": 2e-5}
ATTENTIONS = ("duplex", "sdpa", "plain")
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 100.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
# Of 8 dimensions, half of a head.
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 5.0, 9.0]}
PARTIAL = {"head_dim": 16, "partial_rotary_factor": 0.5, "pad_token_id": 0}
MODELS = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2 untied relu": ("GPT2LMHeadModel", {"tie_word_embeddings": False, "activation_function": "relu"}),
    "llama": ("LlamaForCausalLM", {}),
    "llama biases tied": (
        "LlamaForCausalLM",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "llama3 rope": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "linear rope": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, "head_dim": 20},
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 5}),
    "mistral without a window": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2 windows": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 20}),
    "qwen3 biases": ("Qwen3ForCausalLM", {"head_dim": 20, "attention_bias": True}),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 5, "pad_token_id": 0}),
    "phi3 partial rotary": ("Phi3ForCausalLM", {**PARTIAL, "hidden_size": 96, "partial_rotary_factor": 0.75}),
    "phi3 longrope, short": (
        "Phi3ForCausalLM",
        {
            **PARTIAL,
            "hidden_size": 96,
            "original_max_position_embeddings": 40,
            "max_position_embeddings": 160,
            "rope_parameters": LONGROPE,
        },
    ),
    "yarn rope": ("Qwen2ForCausalLM", {"rope_parameters": YARN}),
    "yarn rope with all of its options": (
        "LlamaForCausalLM",
        {
            "rope_parameters": YARN
            | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "mscale": 2.0, "mscale_all_dim": 0.7}
        },
    ),
    "glm": ("GlmForCausalLM", {}),
    "glm without biases": ("GlmForCausalLM", {"attention_bias": False, "tie_word_embeddings": True}),
    "glm4": ("Glm4ForCausalLM", {}),
    "glm4 yarn": ("Glm4ForCausalLM", {"partial_rotary_factor": 0.75, "rope_parameters": YARN}),
    "gemma2": ("Gemma2ForCausalLM", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
            },
        },
    ),
}


@pytest.fixture(params=MODELS)
def pair(request, save):
    architecture, options = MODELS[request.param]
    theirs, folder = save(architecture, **options)
    return theirs, load_checkpoint(folder)


@pytest.fixture(params=ATTENTIONS)
def attention(request):
    return request.param


@pytest.fixture
def ours(pair, attention):
    """The loaded model, where `attention` computes it: sdpa has no softcap."""
    if attention == "sdpa" and pair[1].config.softcap:
        with pytest.raises(ValueError, match="attention: expected duplex or plain, which cap scores, got 'sdpa'"):
            pair[1](torch.zeros(1, 3, dtype=torch.int64), attention=attention)
        pytest.skip("scores are capped")
    return pair[1]


@pytest.fixture
def small():
    torch.manual_seed(0)
    config = {"vocab_size": 97, "hidden": 48, "layers": 2, "heads": 4, "heads_kv": 2, "head_dim": 12, "inner": 64}
    model = GPT(GPTConfig.llama(**config, max_positions=64)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)  # sharp enough for a wrong mask to show
    return model


def test_logits_are_those_of_transformers(pair, ours, ragged, attention):
    theirs, _ = pair
    ids, seqlens, attention_mask = ragged
    real = attention_mask.bool()
    expected = theirs(ids, attention_mask=attention_mask).logits
    logits = ours(ids, seqlens, attention=attention)
    torch.testing.assert_close(logits[real], expected[real], **EXACT)
    torch.testing.assert_close(ours(ids[:1, :7], attention=attention), expected[:1, :7], **EXACT)
    last = ours(ids, seqlens, attention=attention, last=True)
    rows = torch.arange(len(ids))
    torch.testing.assert_close(last, expected[rows, seqlens.long() - 1], **EXACT)


def test_greedy_decoding_is_that_of_transformers(pair, ours, ragged, attention):
    """Prompts of unequal lengths: transformers pads them on the left, we on the right or not at all."""
    theirs, _ = pair
    ids, seqlens, _ = ragged
    left = torch.stack([row.roll(row.shape[0] - length) for row, length in zip(ids, seqlens.tolist(), strict=True)])
    attention_mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - seqlens[:, None]).long()
    with torch.no_grad():
        theirs.generation_config.eos_token_id = None
        whole = theirs.generate(
            left, attention_mask=attention_mask, max_new_tokens=12, do_sample=False, pad_token_id=0, use_cache=True
        )
    assert ours.generate(ids, 12, seqlens, attention=attention).equal(whole[:, ids.shape[1] :])
    full_rows = seqlens == ids.shape[1]
    equal = ours.generate(ids[full_rows], 12, attention=attention)
    assert equal.equal(whole[full_rows, ids.shape[1] :])


def test_steps_over_pages_are_those_of_transformers(pair, ragged):
    """Prompts in two chunks, the shortest in one, and a token more of each."""
    theirs, ours = pair
    ids, seqlens, _ = ragged
    lines = [[*row[:length].tolist(), 5] for row, length in zip(ids, seqlens.tolist(), strict=True)]
    lengths = seqlens.tolist()
    cache = da.PagedKVCache(ours.config.layers, 64, 4, ours.config.heads_kv, ours.config.head_dim)
    seqs = [cache.add(line) for line in lines]
    for counts in ([max(n - 4, 1) for n in lengths], [min(4, n - 1) for n in lengths], [1] * len(lengths)):
        now = [(seq, line, count) for seq, line, count in zip(seqs, lines, counts, strict=True) if count]
        new = [token for seq, line, count in now for token in line[seq.committed : seq.committed + count]]
        batch = cache.batch([seq for seq, _, _ in now], [count for _, _, count in now])
        logits = ours.step(torch.tensor(new), cache, batch)
        cache.commit_batch(batch)
        for row, (seq, line, _) in zip(logits, now, strict=True):
            expected = theirs(torch.tensor([line[: seq.committed]])).logits[0, -1]
            torch.testing.assert_close(row, expected, **EXACT)
    assert [seq.committed for seq in seqs] == [len(line) for line in lines]


def test_greedy_decoding_by_the_engine(pair, ragged):
    theirs, ours = pair
    ids, seqlens, _ = ragged
    prompts = [row[:length].tolist() for row, length in zip(ids, seqlens.tolist(), strict=True)]
    cache = da.PagedKVCache(ours.config.layers, 64, 4, ours.config.heads_kv, ours.config.head_dim)
    answers = Engine(ours, cache=cache, max_sequences=8, token_budget=16).generate(
        prompts, SamplingParams(max_tokens=12)
    )
    theirs.generation_config.eos_token_id = None
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert answer.outputs[0].tokens == whole[0, len(prompt) :].tolist()


@pytest.fixture
def switching(save):
    """transformers' model and ours, to which 24 tokens are short and more are long."""
    options = {"hidden_size": 96, "original_max_position_embeddings": 24, "max_position_embeddings": 96}
    theirs, folder = save("Phi3ForCausalLM", **PARTIAL, **options, rope_parameters=LONGROPE)
    return theirs, load_checkpoint(folder)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_long_texts_have_the_long_factors(switching, attention):
    theirs, ours = switching
    torch.manual_seed(7)
    ids, seqlens = torch.randint(3, 97, (3, 30)), torch.tensor([30, 11, 25])
    real = torch.arange(30) < seqlens[:, None]
    logits = theirs(ids, attention_mask=real.long()).logits
    torch.testing.assert_close(ours(ids, seqlens, attention=attention)[real], logits[real], **EXACT)
    F.cross_entropy(logits[real], ids[real]).backward()
    F.cross_entropy(ours(ids, seqlens, attention=attention)[real], ids[real]).backward()
    for index in range(3):
        expected = theirs.model.layers[index].self_attn.qkv_proj.weight.grad
        torch.testing.assert_close(ours.layers[index].qkv.weight.grad, expected, **EXACT)
    assert not torch.allclose(ours(ids[:, :24])[0], logits[0, :24], atol=1e-2)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("seqlen", [20, 24, 25, 40])
def test_a_text_that_becomes_long_is_computed_anew(switching, attention, seqlen):
    theirs, ours = switching
    torch.manual_seed(8)
    lengths = torch.tensor([seqlen, 9, 17])
    ids = torch.randint(3, 97, (3, seqlen)) * (torch.arange(seqlen) < lengths[:, None])
    left = torch.stack([row.roll(seqlen - int(length)) for row, length in zip(ids, lengths, strict=True)])
    attention_mask = (torch.arange(seqlen) >= seqlen - lengths[:, None]).long()
    theirs.generation_config.eos_token_id = None
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    whole = theirs.generate(left, attention_mask=attention_mask, **options)
    assert ours.generate(ids, 12, lengths, attention=attention).equal(whole[:, seqlen:])
    alone = theirs.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), **options)
    assert ours.generate(ids[:1], 12, attention=attention).equal(alone[:, seqlen:])


def test_short_keys_are_none_of_a_long_text(switching):
    """A cache that would have to be computed anew says so, and no paged one, which is of short texts, ever has to."""
    _, ours = switching
    ids = torch.randint(3, 97, (1, 30))
    cache = KVCache(ours.config, 1, 30, torch.float32, "cpu")
    ours(ids[:, :20], cache=cache)
    with pytest.raises(ValueError, match=r"ids: expected all 25 tokens of a text that is long .* at once, got 5"):
        ours(ids[:, 20:25], cache=cache)
    assert cache.longest == 20
    ours(ids[:, 20:24], cache=cache)
    assert ours.max_length == 24
    pages = da.PagedKVCache(ours.config.layers, 20, 4, ours.config.heads_kv, ours.config.head_dim)
    batch = pages.batch([pages.add(ids[0, :25])])
    with pytest.raises(ValueError, match=r"ids: expected at most original_max_positions \(24\) tokens, got 25"):
        ours.step(ids[0, :25], pages, batch)
    with pytest.raises(ValueError, match="prompt: expected 1 to 23 tokens, got 24"):
        Engine(ours, cache=pages).submit(ids[0, :24])
    (answer,) = Engine(ours, cache=pages).generate([ids[0, :20]], SamplingParams(max_tokens=9))
    assert answer.outputs[0].tokens == ours.generate(ids[:, :20], 9)[0, :4].tolist()


def test_generation_stops_writing_at_eos(small, ragged):
    ids, seqlens, _ = ragged
    free = small.generate(ids, 10, seqlens)
    eos = int(free[1, 3])
    first = int((free[1] == eos).nonzero()[0])
    stopped = small.generate(ids, 10, seqlens, eos=eos)
    assert stopped[1, : first + 1].equal(free[1, : first + 1])
    assert stopped[1, first:].eq(eos).all()
    for row in range(len(ids)):
        if eos not in free[row].tolist():
            assert stopped[row].equal(free[row])


def test_gradients_of_a_language_model_loss(pair, ours, ragged, attention):
    theirs, _ = pair
    ids, seqlens, attention_mask = ragged
    real = attention_mask.bool()[:, 1:]
    targets = ids[:, 1:][real]
    F.cross_entropy(theirs(ids, attention_mask=attention_mask).logits[:, :-1][real], targets).backward()
    F.cross_entropy(ours(ids, seqlens, attention=attention)[:, :-1][real], targets).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    gpt2 = ours.config.positions == "learned"
    if gpt2:
        names = {"word": ["transformer.wte"], "position": ["transformer.wpe"], "norm": ["transformer.ln_f"]}
        layer = {"attention_norm": ["ln_1"], "qkv": ["attn.c_attn"], "out": ["attn.c_proj"], "norm": ["ln_2"]}
        layer |= {"up": ["mlp.c_fc"], "down": ["mlp.c_proj"]}
    else:
        names = {"word": ["model.embed_tokens"], "norm": ["model.norm"]}
        layer = {"attention_norm": ["input_layernorm"], "qkv": [f"self_attn.{x}_proj" for x in "qkv"]}
        layer |= {"out": ["self_attn.o_proj"], "norm": ["post_attention_layernorm"]}
        layer |= {"up": ["mlp.gate_proj", "mlp.up_proj"], "down": ["mlp.down_proj"]}
        if type(theirs).__name__.startswith("Phi3"):
            layer |= {"qkv": ["self_attn.qkv_proj"]}
        if type(theirs).__name__.startswith(("Phi3", "Glm")):
            layer |= {"up": ["mlp.gate_up_proj"]}
        if ours.config.head_norms:
            layer |= {f"{x}_norm": [f"self_attn.{x}_norm"] for x in "qk"}
        if type(theirs).__name__.startswith("Glm4"):
            layer |= {"attention_post_norm": ["post_self_attn_layernorm"], "post_norm": ["post_mlp_layernorm"]}
        elif ours.config.post_norms:
            layer |= {"attention_post_norm": layer["norm"], "norm": ["pre_feedforward_layernorm"]}
            layer |= {"post_norm": ["post_feedforward_layernorm"]}
    for index in range(3):
        stem = f"transformer.h.{index}." if gpt2 else f"model.layers.{index}."
        names |= {f"layers.{index}.{ours_}": [stem + name for name in stored] for ours_, stored in layer.items()}
    if not ours.config.tied:
        names["head"] = ["lm_head"]
    grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert {name.rsplit(".", 1)[0] for name in grads} == set(names)
    for name, grad in grads.items():
        module, leaf = name.rsplit(".", 1)
        parts = [expected[f"{stored}.{leaf}"] for stored in names[module]]
        if gpt2 and module.startswith("layers") and parts[0].dim() == 2:
            parts = [part.t() for part in parts]
        torch.testing.assert_close(grad, torch.cat(parts), **EXACT, msg=name)


MASKS = {
    "bidirectional": da.full(),
    "prefix": da.prefix_lm(3),
    "a prefix for each": da.prefix_lm(torch.tensor([7, 0, 1, 5, 19], dtype=torch.int32)),
    "window": da.sliding_window(4),
    "window over first tokens": da.Mask(prefix=2, left=3, right=1),
    "top left": da.Mask(right=2, align="top_left"),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_mask_is_data(small, ragged, mask):
    """The three attentions agree on any span, and each sequence is what it is alone."""
    ids, seqlens, attention_mask = ragged
    real = attention_mask.bool()
    plain = small(ids, seqlens, mask, attention="plain")
    for attention in ("duplex", "sdpa"):
        torch.testing.assert_close(small(ids, seqlens, mask, attention=attention)[real], plain[real], **EXACT)
    assert (small(ids, seqlens)[real] - plain[real]).abs().max() > 1e-4
    for row, length in enumerate(seqlens.tolist()):
        own = mask._replace(prefix=mask.prefix[row : row + 1]) if isinstance(mask.prefix, torch.Tensor) else mask
        alone = small(ids[row : row + 1, :length], mask=own)
        torch.testing.assert_close(alone[0], plain[row, :length], **EXACT)


def test_a_bidirectional_prefix_lets_early_tokens_see_late_ones(small):
    ids = torch.randint(3, 97, (1, 10))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 97
    for mask, sees in ((da.causal(), False), (da.prefix_lm(5), False), (da.prefix_lm(6), True)):
        assert small(ids, mask=mask)[0, :5].equal(small(changed, mask=mask)[0, :5]) is not sees


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "mask", [da.causal(), da.sliding_window(6), da.prefix_lm(3)], ids=["causal", "window", "prefix"]
)
@pytest.mark.parametrize("uneven", [False, True])
def test_tokens_through_the_cache_in_any_chunks(small, ragged, attention, mask, uneven):
    """A prompt, then chunks of 3 and 1 tokens: the logits are those of the whole at once."""
    torch.manual_seed(3)
    lengths = torch.tensor([5, 8, 3], dtype=torch.int32) if uneven else torch.full((3,), 8, dtype=torch.int32)
    whole = torch.randint(3, 97, (3, 12))
    prompt = torch.where(torch.arange(8) < lengths[:, None], whole[:, :8], 0)
    cache = KVCache(small.config, 3, 12, torch.float32, "cpu")
    got = [small(prompt, lengths if uneven else None, mask, cache, attention, last=True)]
    at = lengths.long()
    for size in (3, 1):
        chunk = whole.gather(1, at[:, None] + torch.arange(size))
        got.append(small(chunk, None, mask, cache, attention)[:, -1])
        at = at + size
    assert cache.longest == 12
    for row in range(3):
        length = int(lengths[row])
        expected = small(whole[row : row + 1, : length + 4], mask=mask, attention="plain")[0]
        for step, end in enumerate((length, length + 3, length + 4)):
            torch.testing.assert_close(got[step][row], expected[end - 1], **EXACT)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("mask", [da.causal(), da.sliding_window(1)], ids=["causal", "window"])
def test_a_ragged_chunk_after_a_prompt(small, attention, mask):
    torch.manual_seed(4)
    whole = torch.randint(3, 97, (3, 11))
    prompt, chunk = torch.tensor([5, 7, 2], dtype=torch.int32), torch.tensor([4, 1, 3], dtype=torch.int32)
    cache = KVCache(small.config, 3, 11, torch.float32, "cpu")
    small(whole[:, :7], prompt, mask, cache, attention)
    more = whole.gather(1, (prompt.long()[:, None] + torch.arange(4)).clamp(max=10))
    got = small(more, chunk, mask, cache, attention, last=True)
    for row in range(3):
        end = int(prompt[row] + chunk[row])
        torch.testing.assert_close(got[row], small(whole[row : row + 1, :end], mask=mask)[0, -1], **EXACT)


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0)])
def test_the_llama_preset_has_the_shape_it_names(scaling):
    config = GPTConfig.llama(rope_scaling=scaling)
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008  # SmolLM2-135M's own count
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(GPTConfig.gpt2()).parameters()) == 124_439_808


def in_a_fake_mode(model, ids):
    with FakeTensorMode():
        fake = GPT(model.config).eval()
        assert fake(torch.zeros(2, 6, dtype=torch.int64)).shape == (2, 6, 97)
        assert fake.generate(torch.zeros(2, 6, dtype=torch.int64), 3).shape == (2, 3)


RUNS = {
    "eager": lambda model, ids: model(ids),
    "export": lambda model, ids: torch.export.export(model, (ids,)),
    "strict export": lambda model, ids: torch.export.export(model, (ids,), strict=True),
    "fake mode": in_a_fake_mode,
    "functionalize": lambda model, ids: torch.func.functionalize(lambda ids: model(ids, attention="plain"))(ids),
    "compile": lambda model, ids: torch.compile(model, fullgraph=True, backend="aot_eager")(ids),
}


@pytest.mark.parametrize("first", RUNS)
def test_rotary_angles_are_not_those_of_another_kind_of_tensor(small, first):
    """Whatever ran a configuration first, every other run after it finds what it needs."""
    torch.manual_seed(5)
    ids = torch.randint(3, 97, (2, 6))
    config = dataclasses.replace(small.config, rope_theta=300.0 + list(RUNS).index(first))  # that nothing has run yet
    model = GPT(config).eval()
    model.load_state_dict(small.state_dict())
    for name in (first, *(name for name in RUNS if name != first)):
        RUNS[name](model, ids)
        logits = model(ids)
        assert type(logits) is torch.Tensor
        assert model.generate(ids, 1)[:, 0].equal(logits[:, -1].argmax(-1))
        cache = da.PagedKVCache(2, 4, 4, 2, 12)
        stepped = model.step(ids[0], cache, cache.batch([cache.add(ids[0])]))  # by the tables of all positions
        torch.testing.assert_close(stepped[0], logits[0, -1], **EXACT)
    exported = torch.export.export(model, (ids,)).module()
    torch.testing.assert_close(exported(ids), model(ids), **EXACT)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_generation_under_autocast(small, attention, positions):
    """The cache keeps the weights' dtype: tokens are those of whole texts under the same autocast."""
    torch.manual_seed(6)
    model = GPT(dataclasses.replace(small.config, positions=positions)).eval()
    ids = torch.randint(3, 97, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        whole = ids
        for _ in range(5):
            token = model(whole, attention=attention, last=True).argmax(-1)
            whole = torch.cat((whole, token[:, None]), 1)
        assert model.generate(ids, 5, attention=attention).equal(whole[:, 6:])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("lengths", [[3, 0], [0, 3]])
def test_no_last_token_where_there_is_none(small, attention, lengths):
    ids, seqlens = torch.randint(3, 97, (2, 6)), torch.tensor(lengths)
    cache = KVCache(small.config, 2, 12, torch.float32, "cpu")
    with pytest.raises(ValueError, match="seqlens: expected 1 to 6, got 0"):
        small(ids, seqlens, attention=attention, last=True)
    with pytest.raises(ValueError, match="seqlens: expected 1 to 6, got 0"):
        small.generate(ids, 3, seqlens, attention=attention)
    small(ids, cache=cache)
    with pytest.raises(ValueError, match="seqlens: expected 1 to 6, got 0"):
        small(ids, seqlens, cache=cache, attention=attention, last=True)
    assert cache.longest == 6
    assert small(ids, seqlens, attention=attention).shape == (2, 6, 97)
    with pytest.raises(ValueError, match="ids: expected a token of each sequence, for its last one is wanted"):
        small(ids[:, :0], attention=attention, last=True)


def test_bad_input_is_named(small):
    ids = torch.randint(3, 97, (2, 6))
    cache = KVCache(small.config, 2, 8, torch.float32, "cpu")
    small(ids, cache=cache)
    with pytest.raises(ValueError, match=r"ids: expected at most 2 more tokens in a cache of 8, got 3"):
        small(ids[:, :3], cache=cache)
    with pytest.raises(ValueError, match=r"ids: expected the cache's batch \(2\), got 1"):
        small(ids[:1], cache=cache)
    with pytest.raises(ValueError, match=r"seqlens: expected shape \(2,\), got \(1,\)"):
        small(ids[:, :2], torch.tensor([1]), cache=cache)
    for seqlens, message in (
        (torch.tensor([2.0, 3.0]), "seqlens: expected integers, got torch.float32"),
        (torch.tensor([True, True]), "seqlens: expected integers, got torch.bool"),
        ([2, 3], "seqlens: expected a tensor, got list"),
    ):
        with pytest.raises(TypeError, match=message):
            small(ids, seqlens)
    with pytest.raises(ValueError, match="new_tokens: expected 0 or more, got -1"):
        small.generate(ids, -1)
    with pytest.raises(TypeError, match="new_tokens: expected an int, got float"):
        small.generate(ids, 2.0)
    with pytest.raises(ValueError, match=r"ids: expected shape \(batch, seqlen\), got \(6,\)"):
        small.generate(ids[0], 2)
    learned = GPT(GPTConfig(vocab_size=97, hidden=12, layers=1, heads=1, heads_kv=1, head_dim=12, max_positions=5))
    with pytest.raises(ValueError, match=r"ids: expected at most max_positions \(5\) tokens, got 6"):
        learned(ids)
    for option, message in (
        ({"heads": 4, "heads_kv": 3}, r"heads: expected a multiple of heads_kv \(3\), got 4"),
        ({"positions": "none"}, "positions: expected learned or rotary, got 'none'"),
        ({"norm": "batch"}, "norm: expected one of layer, rms, rms_offset, got 'batch'"),
        ({"windows": (4, 4)}, "windows: expected one for each of 1 layers, got 2"),
        ({"positions": "rotary", "heads": 1, "heads_kv": 1, "head_dim": 7}, "head_dim: expected an even number"),
        ({"positions": "rotary", "rotary_dim": 7}, "rotary_dim: expected an even number with rotary positions, got 7"),
        ({"positions": "rotary", "rotary_dim": 66}, r"rotary_dim: expected 2 to head_dim \(64\), got 66"),
        ({"positions": "rotary", "rotary_dim": 0}, r"rotary_dim: expected 2 to head_dim \(64\), got 0"),
        (
            {"positions": "rotary", "rope_scaling": RopeScaling("dynamic", 2.0)},
            "rope_scaling: expected one of linear, llama3, yarn, longrope, got 'dynamic'",
        ),
        (
            {"positions": "rotary", "rope_scaling": RopeScaling("longrope", 2.0, short_factors=(1.0,) * 32)},
            "long_factors: expected one for each of 32 frequencies, got 0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            GPT(GPTConfig(vocab_size=97, hidden=12, layers=1, **option))
    with pytest.raises(ValueError, match="activation: expected gelu, gelu_tanh, silu or relu, got 'mish'"):
        GPT(GPTConfig(vocab_size=97, hidden=12, heads=1, heads_kv=1, layers=1, activation="mish"))
