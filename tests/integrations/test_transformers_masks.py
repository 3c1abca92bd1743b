"""The mask entry shows the kernels exactly what transformers' own boolean mask shows, whatever the call."""

import itertools

import duplex_attn as da
import pytest
import torch
import transformers
from duplex_attn.integrations.transformers import SpanMask, attention, span_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import masking_utils as theirs

FUNCTIONS = {
    "causal": theirs.causal_mask_function,
    "bidirectional": theirs.bidirectional_mask_function,
    "window": theirs.sliding_window_causal_mask_function(4),
    "window_of_one": theirs.sliding_window_causal_mask_function(1),
    "symmetric_window": theirs.sliding_window_bidirectional_mask_function(2),
    "spelled_otherwise": lambda batch, head, q, kv: (q >= kv) & (q - kv < 3) & (kv >= 0),
    "strictly_past": lambda batch, head, q, kv: kv < q,
    "narrowest_of_some": theirs.and_masks(
        theirs.sliding_window_overlay(6),
        theirs.sliding_window_bidirectional_mask_function(2),
        theirs.sliding_window_overlay(4),
        theirs.causal_mask_function,
        theirs.sliding_window_bidirectional_overlay(5),
    ),
    "offset": theirs.add_offsets_to_mask_function(theirs.sliding_window_causal_mask_function(4), 0, 0),
}
NO_SPAN = {
    "chunked": lambda: theirs.chunked_causal_mask_function(3, torch.zeros(3, dtype=torch.int64)),
    "packed": lambda: theirs.and_masks(
        theirs.causal_mask_function, theirs.packed_sequence_mask_function(torch.arange(32).expand(3, -1) // 4)
    ),
    "or": lambda: theirs.or_masks(theirs.causal_mask_function, lambda batch, head, q, kv: kv < 2),
    "of_the_batch": lambda: lambda batch, head, q, kv: kv <= q + batch,
    "one_sequence_apart": lambda: lambda batch, head, q, kv: (kv <= q) & (batch == 1),
    "of_one_index": lambda: lambda batch, head, q, kv: (kv <= q) & (kv >= 2),
    "diagonal": lambda: lambda batch, head, q, kv: kv == q,
    "torch_in_it": lambda: lambda batch, head, q, kv: torch.logical_and(kv <= q, kv > q - 3),
    "sum_of_indices": lambda: lambda batch, head, q, kv: q + kv < 9,
}
# queries, keys, q_offset, kv_offset: a forward without a cache, decoding, a chunk, a window's cache, a static cache at
# its start, amid and at its end, with one token and with several, and queries past all keys
GEOMETRIES = [
    (6, 6, 0, 0),
    (1, 7, 6, 0),
    (3, 8, 5, 0),
    (1, 5, 9, 5),
    (3, 6, 9, 6),
    (5, 9, 0, 0),
    (1, 9, 4, 0),
    (3, 9, 4, 0),
    (3, 9, 6, 0),
    (2, 5, 4, 0),
]


def paddings(last: int) -> dict[str, torch.Tensor | None]:
    """Padding masks (3, last), of the tokens there are up to now."""
    lengths = torch.tensor([last, max(last - 3, 1), max(last // 2, 1)])[:, None]
    position = torch.arange(last)
    right = position < lengths
    return {
        "none": None,
        "whole": torch.ones(3, last, dtype=torch.bool),
        "right": right,
        "left": right.flip(1),
        "left_for_all": (position >= min(2, last - 1)).expand(3, -1),
        "both_sides": (position >= 1) & right if last > 1 else right,
        "holes": right.flip(1) & (position != last - 2),
        "all_of_one": right & torch.tensor([[True], [False], [True]]),
    }


def visible(mask, q_length: int, kv_length: int) -> torch.Tensor:
    """(3, queries, keys) what the attention entry lets each query see: all scores 0, a key's value its name."""
    query, key = torch.zeros(3, 2, q_length, 8), torch.zeros(3, 1, kv_length, 8)
    value = torch.eye(kv_length).expand(3, 1, -1, -1)
    out, weights = attention(torch.nn.Module(), query, key, value, mask)
    assert weights is None
    return (out > 0).all(2)


def their_mask(**call) -> torch.Tensor:
    call |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return theirs.sdpa_mask(**call).expand(3, 1, call["q_length"], call["kv_length"])


def arguments(geometry, function, padding, static: bool = False) -> dict:
    q_length, kv_length, q_offset, kv_offset = geometry
    return {
        "batch_size": 3,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": torch.tensor(q_offset) if static else q_offset,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": padding,
    }


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_every_padding_of_a_span(name, geometry):
    q_length, kv_length, q_offset, kv_offset = geometry
    holds_queries = q_offset + q_length <= kv_offset + kv_length  # as a static cache does
    caches = (False, True) if holds_queries else (False,)
    for (kind, padding), static in itertools.product(paddings(q_offset + q_length).items(), caches):
        call = arguments(geometry, FUNCTIONS[name], padding, static)
        expected = their_mask(**call)
        mask = span_mask(**call)
        if isinstance(mask, SpanMask):
            assert min(mask.span.left or 0, mask.span.right or 0) >= 0
        dense = mask.dense() if isinstance(mask, SpanMask) else mask
        torch.testing.assert_close(dense, expected, msg=f"{kind} padding, static={static}")
        torch.testing.assert_close(visible(mask, q_length, kv_length), expected[:, 0], msg=f"{kind}, static={static}")


@pytest.mark.parametrize("name", NO_SPAN)
@pytest.mark.parametrize("geometry", GEOMETRIES[:5], ids=str)
def test_what_is_no_span_is_a_bias(name, geometry):
    q_length, _, q_offset, _ = geometry
    for kind, padding in paddings(q_offset + q_length).items():
        call = arguments(geometry, NO_SPAN[name](), padding)
        mask = span_mask(**call)
        assert isinstance(mask, torch.Tensor), kind
        torch.testing.assert_close(mask.expand(3, 1, -1, -1), their_mask(**call), msg=kind)


@pytest.mark.parametrize(
    "function",
    [
        lambda batch, head, q, kv: kv < q if batch == 0 else kv <= q,
        lambda batch, head, q, kv: kv <= q if batch else kv < q,
        lambda batch, head, q, kv: kv <= q if kv < q else kv == q,
    ],
)
def test_a_branch_fails_as_it_does_in_transformers(function):
    with pytest.raises(RuntimeError, match="ambiguous"):
        their_mask(**arguments((6, 6, 0, 0), function, None))
    with pytest.raises(RuntimeError, match="ambiguous"):
        span_mask(**arguments((6, 6, 0, 0), function, None))


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(1, 9),
    symmetric=st.booleans(),
    past=st.integers(0, 6),
    q_length=st.integers(1, 6),
    room=st.integers(0, 3),
    ahead=st.integers(0, 3),
    static=st.booleans(),
    runs=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=3, max_size=3),
)
def test_any_run_of_keys(window, symmetric, past, q_length, room, ahead, static, runs):
    make = (
        theirs.sliding_window_bidirectional_mask_function if symmetric else theirs.sliding_window_causal_mask_function
    )
    position = torch.arange(past + q_length + ahead)  # a padding mask may run ahead of the tokens
    padding = torch.stack([(position >= min(run)) & (position < max(run)) for run in runs])
    call = arguments((q_length, past + q_length + room, past, 0), make(window), padding, static)
    seen = visible(span_mask(**call), q_length, past + q_length + room)
    torch.testing.assert_close(seen, their_mask(**call)[:, 0])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.BertConfig, torch.bool),
        (transformers.BloomConfig, torch.float32),
        (transformers.Gemma4TextConfig, torch.bool),
        (transformers.Gemma4AudioConfig, torch.float32),  # beside a text model that knows sdpa
        (type("MadeByHand", (transformers.BloomConfig,), {}), torch.float32),
        (type("MadeByHandFromNothing", (transformers.PreTrainedConfig,), {}), torch.bool),
        (type(None), torch.bool),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_is_added_to_scores_is_for_models_that_know_eager_alone(config, expected):
    transformers.BertModel, transformers.BloomModel, transformers.Gemma4Model  # noqa: B018, imports them
    assert span_mask(2, 4, 4, config=config()).dtype == expected


class TestForm:
    """Exact is not enough: what can be a span with lengths must be one."""

    def mask(self, geometry, function, padding, **more) -> SpanMask:
        mask = span_mask(
            **arguments(geometry, FUNCTIONS[function], paddings(geometry[0] + geometry[2])[padding]), **more
        )
        assert isinstance(mask, SpanMask)
        return mask

    @pytest.mark.parametrize("padding", ["none", "whole"])
    def test_no_padding_needs_no_tensor(self, padding):
        expected = {
            "causal": da.causal(),
            "bidirectional": da.full(),
            "window": da.sliding_window(3),
            "symmetric_window": da.sliding_window(2, 2),
        }
        for function, span in expected.items():
            for geometry in GEOMETRIES[:5]:
                if function == "bidirectional" or geometry[3] == 0:
                    mask = self.mask(geometry, function, padding)
                    assert mask.span == span
                    assert mask.starts_k is mask.seqlens_k is mask.keys is None

    def test_left_padding(self):
        for function in ("causal", "bidirectional", "window", "symmetric_window"):
            mask = self.mask((3, 8, 5, 0), function, "left")
            assert mask.starts_k.tolist() == [0, 3, 4] and mask.seqlens_k.tolist() == [8, 5, 4]
            assert mask.starts_k.dtype == mask.seqlens_k.dtype == torch.int32 and mask.keys is None

    def test_right_padding(self):
        for function in ("causal", "bidirectional", "window", "symmetric_window"):
            mask = self.mask((6, 6, 0, 0), function, "right")
            assert mask.seqlens_k.tolist() == [6, 3, 3] and mask.starts_k is mask.keys is None

    def test_static_cache_sees_what_it_holds(self):
        call = arguments((1, 9, 4, 0), FUNCTIONS["causal"], None, static=True)
        mask = span_mask(**call)
        assert mask.seqlens_k.tolist() == [5, 5, 5] and mask.span == da.causal()
        call["q_offset"] += 1  # the cache counts in place
        assert mask.seqlens_k.tolist() == [5, 5, 5]

    def test_holes_cost_one_row(self):
        mask = self.mask((6, 6, 0, 0), "causal", "holes")
        assert mask.span == da.causal() and mask.keys.shape == (3, 1, 1, 6)


class TestReading:
    """A model may read its mask as the boolean tensor it stands for."""

    @pytest.fixture
    def both(self):
        call = arguments((3, 8, 5, 0), FUNCTIONS["window"], paddings(8)["left"])
        return span_mask(**call), their_mask(**call)

    def test_describes_itself(self, both):
        mask, dense = both
        assert tuple(mask.shape) == tuple(dense.shape) == tuple(mask.size())
        assert (mask.size(-1), mask.dim(), mask.ndim, mask.dtype) == (8, 4, 4, torch.bool)
        assert mask.device == dense.device.type and "starts_k" in repr(mask)

    @pytest.mark.parametrize(
        "read",
        [
            lambda m: m[:, :, :, :5],
            lambda m: m[..., -2:],
            lambda m: ~m,
            lambda m: m == 0,
            lambda m: m & torch.ones(8, dtype=torch.bool),
            lambda m: torch.ones(8, dtype=torch.bool) & m,
            lambda m: torch.zeros(3, 1, 3, 8).masked_fill(m, -1.0),
            lambda m: torch.zeros(3, 1, 3, 8).masked_fill(m.logical_not(), -1.0),
            lambda m: torch.where(m, 0.0, -1.0),
            lambda m: torch.cat([m, m], dim=-1),
            lambda m: 1.0 - m.to(torch.float32),
            lambda m: m.float(),
            lambda m: m.expand(-1, 4, -1, -1),
            lambda m: m.any(-1),
        ],
    )
    def test_reads_as_the_boolean(self, both, read):
        mask, dense = both
        torch.testing.assert_close(read(mask), read(dense))

    def test_keeps_its_form_on_the_way(self, both):
        mask, _ = both
        assert mask.contiguous() is mask
        moved = mask.to("meta")
        assert isinstance(moved, SpanMask) and moved.seqlens_k.device.type == "meta"
        assert isinstance(mask.to(device="cpu", non_blocking=True), SpanMask)
        assert isinstance(mask.to(torch.bool), SpanMask)
        assert span_mask(3, 3, 8, attention_mask=mask) is mask  # prepared by generate before the forward

    @pytest.mark.parametrize("hides", [False, True])
    @pytest.mark.parametrize(
        "add",
        [
            lambda m, x: x + m,
            lambda m, x: m + x,
            lambda m, x: torch.add(x, m),
            lambda m, x: m.add(x),
            lambda m, x: x.add_(m),
        ],
    )
    def test_adds_nothing_where_it_hides_nothing(self, add, hides):
        """sdpa has no mask then, and BEiT adds what mask there is to its position bias."""
        bias = torch.randn(1, 4, 6, 6)
        mask = span_mask(**arguments((6, 6, 0, 0), FUNCTIONS["bidirectional"], paddings(6)["right"] if hides else None))
        if not hides:
            assert add(mask, bias) is bias
            return
        with pytest.raises(TypeError, match='adds its mask to scores itself; use attn_implementation="eager"'):
            add(mask, bias)

    @pytest.mark.parametrize(
        "change",
        [
            lambda m, x: x - m,
            lambda m, x: 1.0 - m,
            lambda m, x: m.sub(x),
            lambda m, x: torch.sub(x, m),
            lambda m, x: m + 1.0,
            lambda m, x: torch.add(m, x, alpha=2),
            lambda m, x: torch.add(x, other=m),
        ],
    )
    def test_refuses_other_sums(self, change):
        mask = span_mask(**arguments((6, 6, 0, 0), FUNCTIONS["bidirectional"], None))
        with pytest.raises(TypeError, match="attention_mask: expected a model that asks"):
            change(mask, torch.randn(1, 4, 6, 6))

    def test_refuses_a_change_in_place(self, both):
        mask, _ = both
        with pytest.raises(TypeError, match="attention_mask: expected no change in place"):
            mask[:, :, :, 0] = True
        with pytest.raises(TypeError, match="attention_mask: expected no change in place"):
            mask.masked_fill_(mask, False)


class TestAttentionEntry:
    def inputs(self, q_length=4, kv_length=4):
        torch.manual_seed(0)
        return (torch.randn(2, 4, q_length, 8), torch.randn(2, 2, kv_length, 8), torch.randn(2, 2, kv_length, 8))

    def test_no_copies(self, monkeypatch):
        received = {}

        def spy(q, k, v, mask, **kwargs):
            received.update(q=q, k=k, v=v)
            return q

        monkeypatch.setattr(da.functional, "attention", spy)
        query, key, value = self.inputs()
        attention(torch.nn.Module(), query, key, value, None)
        for passed, got in ((query, received["q"]), (key, received["k"]), (value, received["v"])):
            assert got.data_ptr() == passed.data_ptr() and got.shape == passed.transpose(1, 2).shape

    @pytest.mark.parametrize(("q_length", "kv_length"), [(4, 4), (4, 6), (1, 6)])
    @pytest.mark.parametrize("is_causal", [None, True, False])
    @pytest.mark.parametrize("of_module", [None, True, False])
    def test_without_a_mask_the_direction_is_that_of_sdpa(self, q_length, kv_length, is_causal, of_module):
        module = torch.nn.Module()
        if of_module is not None:
            module.is_causal = of_module
        module.num_key_value_groups = 2
        query, key, value = self.inputs(q_length, kv_length)
        theirs = transformers.AttentionInterface()["sdpa"]
        expected, _ = theirs(module, query, key, value, None, is_causal=is_causal)
        out, _ = attention(module, query, key, value, None, is_causal=is_causal)
        torch.testing.assert_close(out, expected)

    def test_without_a_mask_a_model_that_knows_eager_alone_has_no_direction(self):
        """The image layers of BridgeTower say is_causal, which its eager does not read."""
        module = transformers.models.bridgetower.modeling_bridgetower.BridgeTowerSelfAttention(
            transformers.BridgeTowerTextConfig(hidden_size=32, num_attention_heads=4), is_causal=True
        )
        query, key, value = self.inputs()
        full = attention(module, query, key, value, None, is_causal=False)[0]
        assert torch.equal(attention(module, query, key, value, None)[0], full)
        assert not torch.equal(attention(torch.nn.Module(), query, key, value, None)[0], full)

    @pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 4), (3, 1)])
    def test_a_mask_that_broadcasts(self, queries, keys):
        """One query or key stands for all, as in a tensor: T5 makes such a mask for a prompt that is read in chunks."""
        query, key, value = self.inputs(3, 4)
        padding = torch.tensor([[True] * keys, [False] + [True] * (keys - 1)])
        mask = span_mask(2, queries, keys, mask_function=theirs.bidirectional_mask_function, attention_mask=padding)
        expected, _ = attention(torch.nn.Module(), query, key, value, mask.dense())
        out, _ = attention(torch.nn.Module(), query, key, value, mask)
        assert torch.equal(out, expected)

    @pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 7)])
    def test_a_mask_that_hides_nothing_fits_all(self, queries, keys):
        query, key, value = self.inputs(3, 4)
        mask = span_mask(2, queries, keys, mask_function=theirs.bidirectional_mask_function)
        expected, _ = attention(torch.nn.Module(), query, key, value, None, is_causal=False)
        assert torch.equal(attention(torch.nn.Module(), query, key, value, mask)[0], expected)

    @pytest.mark.parametrize(("head_dim", "head_dim_v"), [(264, 8), (8, 264)])
    def test_a_head_dim_that_is_too_large(self, head_dim, head_dim_v):
        query, key = torch.randn(2, 4, 4, head_dim), torch.randn(2, 2, 4, head_dim)
        value = torch.randn(2, 2, 4, head_dim_v)
        module = torch.nn.Module()
        module.num_key_value_groups = 2
        padding = torch.tensor([[True, True, True, True], [True, True, True, False]])
        causal, padded = their_mask_for(torch.ones_like(padding)), their_mask_for(padding)
        for mask, keep in ((None, causal), (span_mask(2, 4, 4, attention_mask=padding), padded), (padded, padded)):
            expected = torch.nn.functional.scaled_dot_product_attention(
                query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), keep
            ).transpose(1, 2)
            with pytest.warns(UserWarning, match="^head_dim: expected at most 256, got 264; transformers' sdpa"):
                out, _ = attention(module, query, key, value, mask)
            torch.testing.assert_close(out, expected)
        for unknown_to_sdpa in ({"softcap": 2.0}, {"s_aux": torch.zeros(4)}):
            with pytest.raises(ValueError, match=r"expected head_dim 1 to 256, got 264"):
                attention(module, query, key, value, None, **unknown_to_sdpa)

    def test_dropout_is_for_training(self):
        query, key, value = self.inputs()
        module = torch.nn.Module()
        still, _ = attention(module.eval(), query, key, value, None, dropout=0.5)
        assert torch.equal(still, attention(module, query, key, value, None)[0])
        assert not torch.equal(still, attention(module.train(), query, key, value, None, dropout=0.5)[0])

    def test_bias_and_mask_together(self):
        query, key, value = self.inputs()
        bias = torch.randn(1, 4, 4, 4)
        padding = torch.tensor([[True, True, True, False], [True, False, True, True]])
        keep = their_mask_for(padding)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), bias.masked_fill(~keep, -torch.inf)
        ).transpose(1, 2)
        span = span_mask(2, 4, 4, attention_mask=padding)
        added = torch.zeros(2, 1, 4, 4).masked_fill(~keep, torch.finfo(torch.float32).min)
        for mask in (span, keep, added):
            out, _ = attention(torch.nn.Module(), query, key, value, mask, position_bias=bias)
            torch.testing.assert_close(out, expected)

    def test_refuses(self):
        query, key, value = self.inputs()
        with pytest.raises(ValueError, match=r"output_attentions: expected False"):
            attention(torch.nn.Module(), query, key, value, None, output_attentions=True)
        for name in ("cache", "indices", "block_indices", "sinks"):
            with pytest.raises(ValueError, match=rf"^{name}: expected None"):
                attention(torch.nn.Module(), query, key, value, None, **{name: torch.zeros(2)})
        with pytest.raises(ValueError, match=r"attention_mask: expected 4 dimensions .* got \(2, 4\)"):
            attention(torch.nn.Module(), query, key, value, torch.ones(2, 4, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"attention_mask: expected 2 dimensions .* got \(2, 4, 4\)"):
            span_mask(2, 4, 4, attention_mask=torch.ones(2, 4, 4, dtype=torch.bool))
        for q_length, kv_length in ((4, 5), (5, 4), (3, 1)):
            with pytest.raises(ValueError, match="attention_mask: expected one for 4 queries and 4 keys, got SpanMask"):
                attention(torch.nn.Module(), query, key, value, span_mask(2, q_length, kv_length))


def their_mask_for(padding: torch.Tensor) -> torch.Tensor:
    return theirs.sdpa_mask(2, 4, 4, attention_mask=padding, allow_is_causal_skip=False)
