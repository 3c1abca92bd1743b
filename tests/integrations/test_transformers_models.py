"""Whole models of transformers on these kernels against attn_implementation="eager", same weights, same input."""

import duplex_attn as da
import pytest
import torch
import transformers
from duplex_attn.integrations.transformers import NAME, SpanMask, swap

REQUIRED = ["bert", "roberta", "gpt2", "llama", "mistral"]
MORE = ["bert_decoder", "modernbert", "gemma2", "gpt_oss", "t5"]
DECODERS = ["gpt2", "llama", "mistral", "gemma2", "bert_decoder"]
EAGER_ALONE = ["bloom", "mpt", "longformer", "canine", "bigbird_pegasus", "deepseek_v4", "git"]
TOKENS = 12


def tokens(batch: int = 3, length: int = TOKENS) -> torch.Tensor:
    return torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(kind: str, length: int = TOKENS) -> torch.Tensor | None:
    """(3, length), 1 for tokens; with a window of 5, no query is so far behind its sequence that it sees no token."""
    if kind == "none":
        return None
    right = (torch.arange(length) < torch.tensor([[length], [length - 3], [length - 4]])).long()
    mask = {"whole": torch.ones_like(right), "right": right, "left": right.flip(1)}.get(kind, right.clone())
    if kind == "holes":
        mask[:, 2:4] = 0
    if kind == "both_sides":
        mask[:, 0] = 0
    return mask


def logits(model, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **more) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = input_ids.flip(1)
    return model(input_ids=input_ids, attention_mask=attention_mask, **more).logits


def comparable(model, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """bool (3, length): the outputs to compare. Where a query sees no key, eager gives the average of the padding."""
    everywhere = torch.ones(3, TOKENS, dtype=torch.bool)
    if attention_mask is None or model.config.is_encoder_decoder:
        return everywhere
    return attention_mask.bool()


def gradients(model, input_ids, attention_mask) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    out = logits(model, input_ids, attention_mask)[comparable(model, attention_mask)]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values())
    for name, g in expected.items():
        torch.testing.assert_close(got[name], g, rtol=1e-4, atol=float(2e-6 * scale), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["none", "whole", "right", "left", "both_sides", "holes"])
@pytest.mark.parametrize("name", REQUIRED + MORE)
def test_forward_and_every_gradient(build, masks_seen, name, kind):
    model, input_ids, mask = build(name), tokens(), padding(kind)
    expected, expected_gradients = gradients(model, input_ids, mask)
    assert not masks_seen
    report = swap(model)
    out, got = gradients(model, input_ids, mask)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert_same_gradients(got, expected_gradients)

    assert len(masks_seen) == sum(report.swapped.values()) and not report.left
    assert all(isinstance(seen, SpanMask) or seen is None for seen in masks_seen)
    if kind in ("none", "whole", "right", "left"):
        assert all(seen is None or seen.keys is None for seen in masks_seen)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_right_padding_is_exact_in_the_padding_too(build, name):
    """Padding after the tokens sees the tokens; generate of a right-padded batch reads its logits there."""
    model, input_ids, mask = build(name), tokens(), padding("right")
    expected = logits(model, input_ids, mask)
    swap(model)
    torch.testing.assert_close(logits(model, input_ids, mask), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama", "mistral"])
def test_masks_given_by_the_user(build, masks_seen, name):
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(3, 1, TOKENS, TOKENS, generator=generator) < 0.5
    keep |= torch.eye(TOKENS, dtype=torch.bool)
    added = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    slopes = torch.randn(3, 4, TOKENS, TOKENS, generator=generator)
    model, input_ids = build(name), tokens()
    for mask, for_eager in ((keep, added), (added, added), (slopes, slopes), (keep[:1], added[:1])):
        model.set_attn_implementation("eager")
        expected = logits(model, input_ids, for_eager)
        swap(model)
        torch.testing.assert_close(logits(model, input_ids, mask), expected, rtol=1e-4, atol=1e-4)
    assert all(seen.ndim == 4 and isinstance(seen, torch.Tensor) for seen in masks_seen)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_packed_position_ids(build, name):
    """Several sequences in one row, told apart by positions that start again."""
    model, input_ids = build(name), tokens(batch=1)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1]])
    expected = model(input_ids, position_ids=position_ids, use_cache=False).logits
    apart = [model(input_ids[:, a:b], use_cache=False).logits for a, b in ((0, 4), (4, 10), (10, 12))]
    torch.testing.assert_close(expected, torch.cat(apart, 1), rtol=1e-4, atol=1e-4)
    swap(model)
    out = model(input_ids, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", "whole", "right", "left", "holes"])
@pytest.mark.parametrize("name", EAGER_ALONE)
def test_a_model_that_knows_eager_alone(build, name, kind):
    """It adds its mask to scores, compares it with 0 or inverts it, whatever it is."""
    input_ids, mask = tokens(), padding(kind)
    expected, expected_gradients = gradients(build(name), input_ids, mask)
    model = build(name) if name == "git" else build(name, implementation=NAME)  # GIT cannot be built with it
    swap(model)
    out, got = gradients(model, input_ids, mask)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert_same_gradients(got, expected_gradients)


def test_packed_position_ids_beside_keys_without_a_position(build):
    """DeepSeek-V4 lengthens its mask by that of its compressed keys, whose elements are added."""
    model, input_ids = build("deepseek_v4"), tokens(batch=1)
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1]])
    expected = model(input_ids, position_ids=position_ids, use_cache=False).logits
    swap(model)
    out = model(input_ids, position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:head_dim. expected at most 256, got 264:UserWarning")
@pytest.mark.parametrize("kind", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_head_dim_that_is_too_large(build, name, kind):
    model, input_ids, mask = build(name, head_dim=264), tokens(), padding(kind)
    expected, expected_gradients = gradients(model, input_ids, mask)
    swap(model)
    out, got = gradients(model, input_ids, mask)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert_same_gradients(got, expected_gradients)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_decoder_without_causality(build, name):
    """transformers runs a decoder in both directions with is_causal=False; its sdpa would do so too."""
    model, input_ids, mask = build(name), tokens(), padding("right")
    causal = logits(model, input_ids, mask)
    expected = logits(model, input_ids, mask, is_causal=False)
    assert not torch.allclose(causal, expected, atol=1e-2)
    swap(model)
    out = logits(model, input_ids, mask, is_causal=False)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", [7, TOKENS])
@pytest.mark.parametrize("name", ["bert_decoder", "gpt2"])
def test_cross_attention(build, name, keys):
    """As many keys as queries, too: the padding of a cross attention is of its keys alone."""
    model = build(name, add_cross_attention=True)
    states = torch.randn(3, keys, 32, generator=torch.Generator().manual_seed(4))
    input_ids, encoder_mask = tokens(), (torch.arange(keys) < torch.tensor([[keys], [3], [5]])).long()
    for mask in (None, encoder_mask, encoder_mask.flip(1)):
        call = dict(encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False)
        model.set_attn_implementation("eager")
        expected = logits(model, input_ids, None, **call)
        swap(model)
        torch.testing.assert_close(logits(model, input_ids, None, **call), expected, rtol=1e-4, atol=1e-4)


RELATIVE = ["use_relative_position_bias", "use_shared_relative_position_bias"]


def beit(kind: str) -> transformers.BeitModel:
    """A model that adds its mask to the bias of its layers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    config = transformers.BeitConfig(
        **sizes, image_size=16, patch_size=4, initializer_range=0.3, attn_implementation="eager", **{kind: True}
    )
    model = transformers.BeitModel(config).eval()
    for name, x in model.named_parameters():
        if name.endswith("relative_position_bias_table"):  # zeros at first
            torch.nn.init.normal_(x)
    return model


def images_through(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    out = model(torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(6))).last_hidden_state
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", RELATIVE)
def test_a_bias_with_a_mask_that_hides_nothing(kind):
    model = beit(kind)
    expected, expected_gradients = images_through(model)
    assert swap(model).swapped == {"BeitAttention": 2}
    out, got = images_through(model)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert_same_gradients(got, expected_gradients)


class TestCache:
    @pytest.mark.parametrize("kind", ["none", "left", "holes"])
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("name", DECODERS)
    def test_in_chunks(self, build, masks_seen, name, cache, kind):
        """Seven tokens, then three, then one at a time, past the window, give the logits of one forward."""
        model, input_ids, mask = build(name), tokens(), padding(kind)
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        expected = logits(model, input_ids, mask, position_ids=positions, use_cache=False)
        swap(model)
        kinds = {"dynamic": transformers.DynamicCache, "static": transformers.StaticCache}
        past = kinds[cache](config=model.config, **({"max_cache_len": TOKENS + 4} if cache == "static" else {}))
        outs = []
        with torch.no_grad():
            for start, end in ((0, 7), (7, 10), (10, 11), (11, 12)):
                outs.append(
                    logits(
                        model,
                        input_ids[:, start:end],
                        None if mask is None else mask[:, :end],
                        position_ids=torch.arange(start, end)[None] if positions is None else positions[:, start:end],
                        past_key_values=past,
                        use_cache=True,
                    )
                )
        real = comparable(model, mask)
        torch.testing.assert_close(torch.cat(outs, 1)[real], expected[real], rtol=1e-4, atol=1e-4)
        assert all(isinstance(seen, SpanMask) for seen in masks_seen)

    @pytest.mark.filterwarnings("ignore:.*right-padding")
    @pytest.mark.parametrize("kind", ["none", "left", "right"])
    @pytest.mark.parametrize("cache", [None, "static"])
    @pytest.mark.parametrize("name", [*DECODERS, "bert_both_ways"])
    def test_generate(self, build, name, cache, kind):
        model, prompt, mask = build(name), tokens(), padding(kind)
        mask = torch.ones_like(prompt) if mask is None else mask
        prompt = prompt.masked_fill(mask == 0, model.config.pad_token_id)
        call = dict(
            attention_mask=mask, do_sample=False, max_new_tokens=8, cache_implementation=cache, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        expected = model.generate(prompt, **call)
        swap(model)
        out = model.generate(prompt, **call)
        assert out.sequences.tolist() == expected.sequences.tolist()
        torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)

    def test_beam_search(self, build):
        model, prompt, mask = build("mistral"), tokens(), padding("left")
        call = dict(attention_mask=mask, num_beams=3, do_sample=False, max_new_tokens=6)
        expected = model.generate(prompt, **call)
        swap(model)
        assert model.generate(prompt, **call).tolist() == expected.tolist()


class TestTraining:
    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("name", ["bert", "mistral"])
    def test_gradient_checkpointing(self, build, name, use_reentrant):
        model, input_ids, mask = build(name), tokens(), padding("right")
        model.train()  # dropout is 0
        expected, expected_gradients = gradients(model, input_ids, mask)
        swap(model)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        out, got = gradients(model, input_ids, mask)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        assert_same_gradients(got, expected_gradients)

    @pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
    def test_checkpointing_drops_the_same_again(self, build):
        model, input_ids, mask = build("llama", implementation=NAME, attention_dropout=0.3), tokens(), padding("left")
        model.train()
        torch.manual_seed(0)
        expected, expected_gradients = gradients(model, input_ids, mask)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        out, got = gradients(model, input_ids, mask)
        torch.testing.assert_close(out, expected)
        assert_same_gradients(got, expected_gradients)

    def test_dropout(self, build):
        """Off in eval mode; in training another draw each time, its mean the attention without it."""
        model, input_ids, mask = build("bert", attention_probs_dropout_prob=0.3), tokens(), padding("right")
        layer = model.bert.encoder.layer[0].attention.self
        swap(model)
        keys = torch.randn(3, TOKENS, 32, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            still = layer(keys)[0]
            torch.testing.assert_close(layer(keys)[0], still)
            layer.train()
            torch.manual_seed(0)
            draws = torch.stack([layer(keys)[0] for _ in range(400)])
        assert not torch.equal(draws[0], draws[1])
        error = (draws.mean(0) - still).abs() / (draws.std(0) / 20).clamp(min=1e-6)  # in standard errors of the mean
        assert error.max() < 5 and error.mean() < 1
        torch.manual_seed(0)
        model.train()
        out = logits(model, input_ids, mask)
        out[mask.bool()].sum().backward()
        assert out.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", ["bert", "mistral"])
    def test_half_precision(self, build, name, dtype):
        """No further from the float32 model than eager is, up to a factor of two."""
        model, input_ids, mask = build(name), tokens(), padding("left")
        exact = logits(model, input_ids, mask)[mask.bool()]
        model = model.to(dtype)
        eager = logits(model, input_ids, mask)[mask.bool()].float()
        swap(model)
        out = logits(model, input_ids, mask)[mask.bool()].float()
        assert (out - exact).abs().max() <= 2 * (eager - exact).abs().max()


class TestCompiled:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("kind", ["none", "left"])
    @pytest.mark.parametrize("name", ["bert", "llama", "mistral"])
    def test_whole_model_without_graph_breaks(self, build, name, kind):
        model, input_ids, mask = build(name), tokens(), padding(kind)
        expected, expected_gradients = gradients(model, input_ids, mask)
        swap(model)
        call = dict(attention_mask=mask, use_cache=False) if name != "bert" else dict(attention_mask=mask)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        out = compiled(input_ids, **call).logits[comparable(model, mask)]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        model.zero_grad(set_to_none=True)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_same_gradients(got, expected_gradients)

    @pytest.mark.parametrize("kind", RELATIVE)
    def test_a_bias_with_a_mask_that_hides_nothing(self, kind):
        model = beit(kind)
        swap(model)
        expected, _ = images_through(model)
        out, _ = images_through(torch.compile(model, backend="aot_eager", fullgraph=True))
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)

    def test_a_model_that_knows_eager_alone(self, build):
        model, input_ids, mask = build("bloom", implementation=NAME), tokens(), padding("left")
        expected = logits(build("bloom"), input_ids, mask, use_cache=False)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        out = compiled(input_ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)

    def test_a_head_dim_that_is_too_large(self, build):
        model, input_ids, mask = build("llama", head_dim=264), tokens(), padding("left")
        expected = logits(model, input_ids, mask, use_cache=False)[mask.bool()]
        swap(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        out = compiled(input_ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("name", "graphs"), [("llama", 1), ("mistral", 2)])
    def test_generate_with_a_static_cache(self, build, name, graphs):
        """One graph for all steps, as eager has (and one for a window that is not yet full)."""
        compiled = []

        def backend(graph, inputs, **options):
            compiled.append(graph)
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        model, prompt, mask = build(name), tokens(), padding("left")
        expected = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=8)
        swap(model)
        config = transformers.CompileConfig(fullgraph=True, backend=backend, mode=None)
        config._compile_all_devices = True  # the CPU too
        call = dict(do_sample=False, max_new_tokens=8, cache_implementation="static", compile_config=config)
        assert model.generate(prompt, attention_mask=mask, **call).tolist() == expected.tolist()
        assert len(compiled) == graphs

    def test_layers_one_by_one(self, build):
        """The mask made outside of the graph; another length does not make a graph for each."""
        model = build("mistral")
        swap(model)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        expected, out = [], []
        batches = [(tokens(length=n), padding("left", n)) for n in range(9, 15)]
        with torch.no_grad():
            expected = [logits(model, ids, mask, use_cache=False) for ids, mask in batches]
            for layer in model.model.layers:
                layer.compile(backend=counter, fullgraph=True)
            out = [logits(model, ids, mask, use_cache=False) for ids, mask in batches]
        for got, want in zip(out, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert counter.frame_count <= 3


class TestSwap:
    @pytest.mark.parametrize("name", REQUIRED)
    def test_report(self, build, name):
        model = build(name)
        layer = {"bert": "BertSelfAttention", "roberta": "RobertaSelfAttention", "gpt2": "GPT2Attention"}
        kind = layer.get(name, f"{name.capitalize()}Attention")
        report = da.swap(model)
        assert report.swapped == {kind: 2} and report.left == {}
        assert report.previous == {type(part).__name__: "eager" for part in (model, model.base_model)}
        assert str(report) == f"{kind}: 2 modules now run duplex_attn"
        assert model.config._attn_implementation == NAME

    def test_undone(self, build):
        model, input_ids = build("llama"), tokens()
        expected = logits(model, input_ids, None)
        previous = swap(model).previous["LlamaForCausalLM"]
        model.set_attn_implementation(previous)
        assert torch.equal(logits(model, input_ids, None), expected)

    def test_module_that_holds_models(self, build):
        both = torch.nn.ModuleDict({"a": build("bert"), "b": torch.nn.Sequential(build("llama"))})
        both["c"] = torch.nn.MultiheadAttention(32, 4)
        report = swap(both)
        assert report.swapped == {"BertSelfAttention": 2, "LlamaAttention": 2}
        assert report.left == {
            "MultiheadAttention": "it computes attention itself instead of asking transformers' AttentionInterface"
        }

    def test_model_that_cannot(self):
        config = transformers.XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=48)
        report = swap(transformers.XLNetModel(config))
        assert report.swapped == {} and list(report.left) == ["XLNetRelativeAttention"]
        assert "left as it was" in str(report)

    def test_layers_of_a_head_dim_that_is_too_large(self, build):
        report = swap(build("llama", head_dim=264))
        assert report.swapped == {}
        assert report.left == {"LlamaAttention": "its head_dim of 264 is over 256"}

    def test_nothing_to_swap(self):
        with pytest.raises(
            TypeError, match="model: expected a transformers model or a module that holds one, got Linear"
        ):
            swap(torch.nn.Linear(2, 2))

    def test_loaded_with_it(self, build, tmp_path):
        build("gpt2").save_pretrained(tmp_path)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
        expected = logits(build("gpt2"), tokens(), None)
        torch.testing.assert_close(logits(model, tokens(), None), expected, rtol=1e-4, atol=1e-4)

    def test_attention_weights_are_refused(self, build):
        model = build("llama", implementation=NAME)
        with pytest.raises(ValueError, match=r"output_attentions: expected False"):
            model(tokens(), output_attentions=True)

    @pytest.mark.parametrize("implementation", ["sdpa", NAME])
    def test_attention_weights_of_a_model_that_does_not_pass_the_wish_on(self, build, implementation):
        assert build("gpt2", implementation=implementation)(tokens(), output_attentions=True).attentions == ()
