"""transformers' generate over a paged cache: the tokens of its own, and pages shared, taken back and given back."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from duplex_attn.cache import OutOfPages
from duplex_attn.integrations.paged_cache import PagedCache
from duplex_attn.integrations.paged_model import PagedModel
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

DECODERS = ("llama", "mistral", "gemma2", "gpt_oss", "gpt2", "bert_decoder", "deepseek_v3", "gemma3n")
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "in chunks": {"prefill_chunk_size": 5},
}
NEW = 12
ARGUMENT = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def prompts(padded: bool, rows: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(3, 97, (rows, 14))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
        mask[2, :9] = 0
    return ids, mask


def generate(model: Any, ids: Tensor, mask: Tensor, cache: PagedCache | None = None, **options: Any) -> Tensor:
    torch.manual_seed(1)  # of samples
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **{ARGUMENT: cache}, **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_gives_the_same_tokens(build, name: str, padded: bool, options: str) -> None:
    given = prompts(padded)
    expected = generate(build(name), *given, **OPTIONS[options])
    model = build(name)
    cache = PagedCache(model, num_pages=64, page_size=4)
    if padded and options == "in chunks":  # of which one is padding alone
        with pytest.raises(ValueError, match=r"attention_mask: expected"):
            generate(model, *given, cache, **OPTIONS[options])
        return
    assert torch.equal(generate(model, *given, cache, **OPTIONS[options]), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    stats = cache.pool.stats()
    assert (stats.pages_shared > 0) == (options == "beams")
    tokens = [seq.length + start for seq, start in zip(cache.seqs, cache.starts, strict=True)]
    assert tokens == [cache.columns] * cache.batch_size


def test_guesses_are_taken_back(build) -> None:
    ids, mask = (x[:1] for x in prompts(False))
    expected = generate(build("llama"), ids, mask)
    model = build("llama")
    cache = PagedCache(model, num_pages=20, page_size=4)
    assert torch.equal(generate(model, ids, mask, cache, prompt_lookup_num_tokens=3), expected)


def test_a_text_goes_on_where_it_was(build) -> None:
    """A second turn: only what is new of it is computed."""
    model, plain = build("mistral"), build("mistral")
    cache = PagedCache(model, num_pages=64, page_size=4)
    ids, mask = prompts(True)
    ids = torch.cat((generate(model, ids, mask, cache), torch.randint(3, 97, (3, 6))), 1)
    mask = torch.cat((mask, mask.new_ones(3, NEW + 6)), 1)
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[1]))
    assert torch.equal(generate(model, ids, mask, cache), generate(plain, ids, mask))
    assert seen == [7] + [1] * (NEW - 1)


def test_copies_of_a_prompts_cache_share_its_pages(build) -> None:
    model, plain = build("llama"), build("llama")
    served = PagedModel(model)
    cache = PagedCache(served, num_pages=40, page_size=4)
    shared = torch.randint(3, 97, (1, 16))
    with torch.no_grad():
        model(shared, **{ARGUMENT: cache})
    assert cache.pool.stats().pages_used == 4
    for _ in range(3):
        ids = torch.cat((shared, torch.randint(3, 97, (1, 5))), 1)
        own = copy.deepcopy(cache)
        assert torch.equal(generate(model, ids, torch.ones_like(ids), own), generate(plain, ids, torch.ones_like(ids)))
        stats = cache.pool.stats()
        assert (stats.pages_shared, stats.sequences) == (4, 2) and cache.columns == 16
        del own
    assert cache.pool.stats().sequences == 1 and cache.pool.stats().pages_used == 4


def test_rows_are_chosen_repeated_and_given_back(build) -> None:
    model = build("llama")
    cache = PagedCache(model, num_pages=40, page_size=4)
    ids, mask = prompts(True)
    step = torch.tensor([[5], [6], [7]])

    def logits(rows: list[int], cache: PagedCache) -> Tensor:
        place = mask.sum(1)[rows, None]
        whole = torch.cat((mask, mask.new_ones(3, 1)), 1)[rows]
        with torch.no_grad():
            return model(step[rows], attention_mask=whole, position_ids=place, **{ARGUMENT: cache}).logits[:, 0]

    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), **{ARGUMENT: cache})
    expected = logits([0, 1, 2], copy.deepcopy(cache))
    turned = copy.deepcopy(cache)
    turned.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(logits([2, 0, 0], turned), expected[[2, 0, 0]])
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    torch.testing.assert_close(logits([0, 0, 1, 1, 2, 2], repeated), expected.repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(logits([1], cache), expected[[1]])
    cache.crop(-1)
    torch.testing.assert_close(logits([1], cache), expected[[1]])
    for one in (cache, turned, repeated):
        one.reset()
    assert cache.pool.stats().sequences == 0 and cache.get_seq_length() == 0


def test_an_interrupted_forward_is_forgotten(build) -> None:
    """By whatever comes next: a copy, a reordering, tokens taken back."""
    model = build("llama")
    ids, _ = prompts(False)
    for then in (
        copy.deepcopy,
        copy.copy,
        lambda cache: cache.reorder_cache(torch.arange(3)),
        lambda cache: cache.crop(-1),
        lambda cache: cache.crop(0),
    ):
        cache = PagedCache(model, num_pages=40, page_size=4)
        with torch.no_grad():
            model(ids, **{ARGUMENT: cache})
            stop = model.model.layers[0].mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                model(ids[:, :1], **{ARGUMENT: cache})
            stop.remove()
            made = then(cache)
            kept = cache.columns
            del made
            model(ids[:, :1], **{ARGUMENT: cache})
        assert cache.columns == kept + 1 and cache.pool.stats().sequences == 3


@pytest.mark.parametrize("then", ["__deepcopy__", "reset", "crop"])
def test_nothing_is_done_to_a_cache_in_the_middle_of_a_forward(build, then: str) -> None:
    model = build("llama")
    cache = PagedCache(model, num_pages=40, page_size=4)
    ids, _ = prompts(False)
    with torch.no_grad():
        model(ids, **{ARGUMENT: cache})
        does = {"__deepcopy__": copy.deepcopy, "reset": PagedCache.reset, "crop": lambda cache: cache.crop(-1)}[then]
        hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: does(cache) and None)
        with pytest.raises(RuntimeError, match=r"none of its methods in the middle of a forward"):
            model(ids[:, :1], **{ARGUMENT: cache})
        hook.remove()
        assert cache.columns == {"__deepcopy__": 14, "reset": 0, "crop": 13}[then]
        assert (
            [seq.length for seq in cache.seqs] == [cache.columns] * cache.batch_size if cache.seqs else then == "reset"
        )


def test_rows_that_are_not_there(build) -> None:
    model = build("llama")
    cache = PagedCache(model, num_pages=40, page_size=4)
    with torch.no_grad():
        model(prompts(False)[0], **{ARGUMENT: cache})
    with pytest.raises(ValueError, match=r"beam_idx: expected rows from 0 to 2, got \[0, 0, 7\]"):
        cache.reorder_cache(torch.tensor([0, 0, 7]))
    assert cache.pool.stats().sequences == 3
    kept = [cache.seqs[0], cache.seqs[2]]
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert cache.seqs == kept and cache.pool.stats().sequences == 2


def test_quantised(build) -> None:
    model = build("llama")
    cache = PagedCache(model, num_pages=40, page_size=4, quantization="int8")
    found = generate(model, *prompts(True), cache)
    assert cache.pool.k_pages.dtype == torch.int8 and found.shape == (3, 14 + NEW)


def test_a_forward_that_fails_leaves_what_was_there(build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    cache = PagedCache(model, num_pages=17, page_size=4)
    ids, mask = prompts(True)
    expected = generate(model, ids, mask, PagedCache(model, num_pages=40, page_size=4))
    with pytest.raises(OutOfPages):
        generate(model, ids, mask, cache, max_new_tokens=30)
    held = cache.columns
    assert [seq.length for seq in cache.seqs] == [held - start for start in cache.starts]
    broken = model.model.layers[1].mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    cache.reset()
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, mask, cache)
    broken.remove()
    cache.reset()
    assert torch.equal(generate(model, ids, mask, cache), expected)
    early = model.model.layers[0].mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    cache.reset()
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, mask, cache)
    early.remove()
    assert cache.columns == 0
    assert torch.equal(generate(model, ids, mask, cache), expected)


def test_what_is_refused(build) -> None:
    model = build("llama")
    cache = PagedCache(model, num_pages=40, page_size=4)
    ids, mask = prompts(True)
    with torch.no_grad():
        for wrong in (mask.flip(1), torch.ones_like(mask).scatter(1, torch.tensor([[4]] * 3), 0)):
            with pytest.raises(ValueError, match=r"attention_mask: expected "):
                model(ids, attention_mask=wrong, **{ARGUMENT: cache})
        assert not cache.seqs and not cache.pool.stats().sequences
        model(ids, attention_mask=mask, **{ARGUMENT: cache})
        with pytest.raises(
            ValueError, match=r"the rows and the padding that the cache has, \[5, 0, 9\], got \[0, 0, 0\]"
        ):
            model(ids[:, :1], **{ARGUMENT: cache})
        with pytest.raises(ValueError, match=r"the rows and the padding that the cache has"):
            model(ids[:2, :1], **{ARGUMENT: cache})
        assert cache.columns == 14


def test_crop_is_that_of_a_dynamic_cache(build) -> None:
    """Into the padding, to nothing, and with numbers that this version of transformers refuses."""
    ids, mask = prompts(True)
    plain, paged = build("llama"), build("llama")
    served = PagedModel(paged)

    @torch.no_grad()
    def after(model: Any, cache: Any, tokens: int) -> Tensor | None:
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), **{ARGUMENT: cache})
        try:
            cache.crop(tokens)
        except ValueError:
            return None
        whole = torch.cat((mask[:, : cache.get_seq_length()], mask.new_ones(3, 2)), 1)
        places = (whole.cumsum(1) - 1).clamp(min=0)[:, -2:]
        return model(ids[:, :2], attention_mask=whole, position_ids=places, **{ARGUMENT: cache}).logits

    for tokens in (0, -1, -5, -6, -13, -14, -20, 4, 14, 20):
        cache = PagedCache(served, num_pages=40, page_size=4)
        expected, found = after(plain, DynamicCache(), tokens), after(paged, cache, tokens)
        assert (found is None) == (expected is None), tokens
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert cache.pool.stats().pages_used == sum(-(-seq.length // 4) for seq in cache.seqs)
    cache.crop(-20)
    assert cache.get_seq_length() == 0 and cache.batch_size == -1 and cache.pool.stats().pages_used == 0
    cache.crop(-1)
    assert torch.equal(generate(paged, ids, mask, cache), generate(plain, ids, mask))


@pytest.mark.parametrize("kept", [slice(1), slice(1, None)])
@pytest.mark.parametrize("used", [False, True])
def test_a_model_that_has_lost_layers_is_refused(build, kept: slice, used: bool) -> None:
    model = build("llama")
    cache = PagedCache(model, num_pages=40, page_size=4)
    ids = prompts(False)[0]
    lost = r"model: expected the layers that it had when its cache was made, got one without \[\d\]"
    with torch.no_grad():
        if used:
            model(ids, **{ARGUMENT: cache})
        model.model.layers = model.model.layers[kept]
        with pytest.raises(ValueError, match=lost):
            for _ in range(1 + used):  # whether a forward was cut short is known when the next begins
                model(ids[:, :1], **{ARGUMENT: cache})
        assert cache.columns == 14 * used == (cache.seqs[0].length if used else 0)


def test_a_model_of_more_layers_is_refused(build) -> None:
    cache = PagedCache(build("llama"), num_pages=40, page_size=4)
    other = PagedModel(build("llama", num_hidden_layers=3)).model
    with torch.no_grad(), pytest.raises(ValueError, match=r"layer_idx: expected one of the 2 layers .*, got 2"):
        other(prompts(False)[0], **{ARGUMENT: cache})


@pytest.mark.parametrize("name", (*DECODERS, "jetmoe"))
def test_layers_say_their_number(build, name: str) -> None:
    model = PagedModel(build(name))
    assert model.places.keys() <= model.layer_numbers()


def test_a_cache_is_printed_and_not_pickled(build) -> None:
    model = build("llama")
    cache = PagedCache(model, num_pages=40, page_size=4)
    assert repr(cache) == "PagedCache(texts=0, columns=0, pages=0 of 40, page_size=4)"
    with torch.no_grad():
        model(prompts(False)[0], **{ARGUMENT: cache})
    assert repr(cache) == "PagedCache(texts=3, columns=14, pages=12 of 40, page_size=4)"
    for write in (pickle.dumps, lambda cache: torch.save(cache, io.BytesIO())):
        with pytest.raises(TypeError, match=r"cache: expected its tokens to be pickled"):
            write(cache)


def test_the_argument_has_the_name_that_transformers_gives_it(build) -> None:
    """Of a model too whose forward names none."""
    model = build("llama")
    forward = model.forward
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        served = PagedModel(model)
        cache = PagedCache(served, num_pages=40, page_size=4)
        model.generate(prompts(False)[0], max_new_tokens=2, **{served.cache_argument: cache})
        model.forward = lambda input_ids, **options: forward(input_ids, **options)
        assert PagedModel(model).cache_argument == served.cache_argument == ARGUMENT
