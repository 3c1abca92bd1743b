import json
import pickle
import subprocess
import sys

import pytest
import torch
from duplex_attn.checkpoint import load_checkpoint
from duplex_attn.modules import GPT, Bert, BertClassifier, BertMaskedLM
from safetensors.torch import load_file, save_file

EXACT = {"atol": 2e-5, "rtol": 2e-5}


def edit(folder, change):
    """Rewrites the stored tensors: change(tensors) edits the dictionary in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    """Changes config.json; a value of None removes the key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def pickle_weights(folder, name="pytorch_model.bin"):
    (folder / "model.safetensors").unlink()
    with (folder / name).open("wb") as file:
        pickle.dump({}, file)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_a_pickle_is_refused_unread(save, name):
    _, folder = save("BertModel")
    pickle_weights(folder, name)
    with pytest.raises(ValueError, match=rf"{name} is a pickle.*expected safetensors"):
        load_checkpoint(folder)
    with pytest.raises(ValueError, match="is a pickle"):
        load_checkpoint(folder / name)


def test_a_pickle_named_safetensors_is_not_run(save, tmp_path):
    _, folder = save("BertModel")
    mark = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (mark.touch, ())

    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file"):
        load_checkpoint(folder)
    assert not mark.exists()


def test_safetensors_win_where_both_are_there(save):
    _, folder = save("BertModel")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert isinstance(load_checkpoint(folder), Bert)


@pytest.mark.parametrize(
    "architecture", ["BertForMaskedLM", "RobertaForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM"]
)
def test_shards_load_as_one_file_does(save, architecture):
    theirs, folder = save(architecture)
    whole = load_checkpoint(folder).state_dict()
    sharded = folder / "sharded"
    theirs.save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert not (sharded / "model.safetensors").exists()
    for name, tensor in load_checkpoint(sharded).state_dict().items():
        assert tensor.equal(whole[name]), name


@pytest.mark.parametrize("shard", ["../outside.safetensors", "model.bin", "absent.safetensors"])
def test_an_index_names_files_of_its_own_directory(save, shard):
    _, folder = save("BertModel")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.bin").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"pooler.dense.weight": shard}}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"expected names of safetensors files|not there"):
        load_checkpoint(folder)


def test_missing_unexpected_and_misshapen_tensors_are_named(save):
    _, folder = save("BertModel")
    original = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.attention.self.key.weight"
    edit(folder, lambda t: t.pop(name))
    with pytest.raises(ValueError, match=rf"missing tensors in .*: {name}$"):
        load_checkpoint(folder)
    save_file({**original, "adapter.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected tensors in .*: adapter\.weight$"):
        load_checkpoint(folder)
    save_file({**original, "pooler.dense.weight": torch.zeros(48, 47)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"pooler\.dense\.weight: expected \(48, 48\) .* got \(48, 47\)"):
        load_checkpoint(folder)
    save_file({**original, name: torch.zeros(48, 47)}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"self\.key\.weight.*: expected shapes that stack to \(144, 48\) .*\(48, 47\)"
    ):
        load_checkpoint(folder)
    save_file({**original, "pooler.dense.bias": torch.zeros(48, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"pooler\.dense\.bias: expected a floating dtype .* got torch\.int8"):
        load_checkpoint(folder)
    save_file({}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing tensors .* and \d+ more"):
        load_checkpoint(folder)


def test_missing_files_are_named(save, tmp_path):
    _, folder = save("BertModel")
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint directory, got .*nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a config\.json"):
        load_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected JSON"):
        load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or model\.safetensors\.index\.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        (
            "BertModel",
            {"architectures": ["ElectraModel"]},
            "architectures: expected one of BertModel, .* got ElectraModel",
        ),
        (
            "BertModel",
            {"model_type": "electra"},
            "model_type: expected one of bert, roberta, .* got electra",
        ),
        ("BertModel", {"hidden_size": None}, "hidden_size: expected it in config.json"),
        ("BertModel", {"hidden_act": "mish"}, "hidden_act: expected one of gelu, .* got 'mish'"),
        ("BertModel", {"is_decoder": True}, "is_decoder: expected False in config.json, got True"),
        ("BertModel", {"position_embedding_type": "relative_key"}, "position_embedding_type: expected 'absolute'"),
        (
            "GPT2LMHeadModel",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx: expected False",
        ),
        ("GPT2LMHeadModel", {"scale_attn_weights": False}, "scale_attn_weights: expected True"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type: expected default, linear, llama3 or yarn in config.json, got 'dynamic'",
        ),
        (
            "Qwen2ForCausalLM",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
            "rope_type: expected default, linear, llama3 or yarn in config.json, got 'longrope'",
        ),
        (
            "Phi3ForCausalLM",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_type: expected default or longrope in config.json, got 'linear'",
        ),
        (
            "Phi3ForCausalLM",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4}},
            "long_factor: expected it in config.json",
        ),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
            "rope_type: expected default, linear or llama3 in config.json, got 'yarn'",
        ),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "yarn"}}, "factor: expected it in config.json"),
        ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear"}}, "factor: expected it in config.json"),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 3},
            "layer_types: expected",
        ),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar: expected it"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention: expected False"),
        (
            "Gemma3ForCausalLM",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type: expected 'default'",
        ),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor: expected 1.0",
        ),
    ],
)
def test_options_that_the_modules_do_not_compute_are_refused(save, architecture, changes, message):
    _, folder = save(architecture, pad_token_id=0) if architecture.startswith("Phi3") else save(architecture)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_the_encoder_alone_from_any_bert(save, family, ragged):
    ids, _, attention_mask = ragged
    theirs, folder = save(f"{family}ForMaskedLM")
    bert = load_checkpoint(folder, Bert)
    real = attention_mask.bool()
    expected = getattr(theirs, family.lower())(ids, attention_mask=attention_mask).last_hidden_state
    torch.testing.assert_close(bert(ids, attention_mask)[real], expected[real], **EXACT)
    assert bert.pooler is None
    whole = load_checkpoint(save(f"{family}ForSequenceClassification")[1], Bert)
    assert (whole.pooler is None) == (family == "Roberta")  # whose classifier has it in its head
    with pytest.raises(ValueError, match=r"missing tensors .*classifier"):
        load_checkpoint(folder, BertClassifier)
    with pytest.raises(ValueError, match=f"architecture: expected one of family {family.lower()}, got GPT"):
        load_checkpoint(folder, GPT)


def test_a_pooler_left_over_in_a_classifier(save, ragged):
    ids, _, attention_mask = ragged
    _, folder = save("RobertaForSequenceClassification")
    expected = load_checkpoint(folder)(ids, attention_mask)
    more = {
        f"roberta.pooler.dense.{leaf}": torch.zeros(shape) for leaf, shape in (("weight", (48, 48)), ("bias", (48,)))
    }
    edit(folder, lambda tensors: tensors.update(more))
    assert load_checkpoint(folder)(ids, attention_mask).equal(expected)


LEFT_OUT = {  # what transformers takes then
    "MistralForCausalLM": {"sliding_window": 4096},
    "Phi3ForCausalLM": {"sliding_window": None, "pad_token_id": 0, "rms_norm_eps": 1e-5, "resid_pdrop": 0.0},
    "GlmForCausalLM": {
        "head_dim": 128, "num_key_value_heads": 2, "attention_bias": True, "rms_norm_eps": 1.5625e-7,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
    },
    "Qwen3ForCausalLM": {"head_dim": 128},
    "Gemma2ForCausalLM": {
        "sliding_window": 4096, "head_dim": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "Gemma3ForCausalLM": {
        "sliding_window": 4096, "head_dim": 256, "attn_logit_softcapping": None, "final_logit_softcapping": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("architecture", LEFT_OUT)
def test_what_a_config_leaves_out(save, architecture):
    _, folder = save(architecture, **LEFT_OUT[architecture])
    whole, file = load_checkpoint(folder).config, folder / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({name: x for name, x in raw.items() if name not in LEFT_OUT[architecture]}))
    assert load_checkpoint(folder).config == whole


def test_dropout_of_phi3(save):
    _, folder = save("Phi3ForCausalLM", pad_token_id=0, resid_pdrop=0.3, attention_dropout=0.2, embd_pdrop=0.1)
    config = load_checkpoint(folder).config  # whose embedding transformers drops nothing of
    assert (config.dropout, config.attention_dropout, config.embedding_dropout) == (0.3, 0.2, 0.0)


def test_names_of_older_checkpoints(save, ragged):
    """gamma and beta, a stored tied decoder, next-sentence prediction, position_ids: as the first BERTs have them."""
    ids, _, attention_mask = ragged
    _, folder = save("BertForMaskedLM")
    whole = load_checkpoint(folder)(ids, attention_mask)

    def age(tensors):
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        tensors["cls.seq_relationship.weight"] = torch.zeros(2, 48)
        tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]

    edit(folder, age)
    edit_config(folder, architectures=["BertForPreTraining"])
    aged = load_checkpoint(folder)
    assert isinstance(aged, BertMaskedLM)
    assert aged(ids, attention_mask).equal(whole)


def test_gpt2_without_prefix_and_with_its_old_buffers(save):
    theirs, folder = save("GPT2Model")
    edit(
        folder, lambda t: t.update({"h.0.attn.bias": torch.ones(1, 1, 40, 40), "h.0.attn.masked_bias": torch.zeros(())})
    )
    ours = load_checkpoint(folder)
    ids = torch.randint(0, 97, (2, 11))
    torch.testing.assert_close(ours.encode(ids)[0], theirs(ids).last_hidden_state, **EXACT)


def test_a_tied_head_that_differs_is_not_dropped(save):
    _, folder = save("GPT2LMHeadModel")
    edit(folder, lambda t: t.update({"lm_head.weight": torch.zeros(97, 48)}))
    with pytest.raises(ValueError, match=r"tie_word_embeddings: .* lm_head\.weight differs from wte\.weight"):
        load_checkpoint(folder)
    edit_config(folder, tie_word_embeddings=False)
    assert load_checkpoint(folder)(torch.zeros(1, 3, dtype=torch.int64)).eq(0).all()


SHORT_AND_LONG = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 5.0, 9.0]}


@pytest.mark.parametrize(
    ("architecture", "old", "new"),
    [
        ("LlamaForCausalLM", {"rope_theta": 300.0}, {"rope_theta": 300.0, "rope_type": "default"}),
        (
            "LlamaForCausalLM",
            {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": 300.0, "rope_type": "linear", "factor": 2.0},
        ),
        (
            "Qwen2ForCausalLM",
            {
                "rope_theta": 300.0,
                "rope_scaling": {"type": "yarn", "factor": 3.0},
                "original_max_position_embeddings": 16,
            },
            {"rope_theta": 300.0, "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16},
        ),
        (
            "GlmForCausalLM",
            {"rope_theta": 300.0, "partial_rotary_factor": 0.25},
            {"rope_theta": 300.0, "rope_type": "default", "partial_rotary_factor": 0.25},
        ),
        (
            "Phi3ForCausalLM",
            {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "su", **SHORT_AND_LONG}},
            {"rope_type": "yarn", "partial_rotary_factor": 0.5, **SHORT_AND_LONG},
        ),
        (
            "Phi3ForCausalLM",
            {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "longrope", "factor": 9.0, **SHORT_AND_LONG}},
            {"rope_type": "longrope", "partial_rotary_factor": 0.5, "factor": 9.0, **SHORT_AND_LONG},
        ),
        (
            "Phi3ForCausalLM",
            {
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"type": "longrope", "attention_factor": 1.7, **SHORT_AND_LONG},
            },
            {"rope_type": "longrope", "partial_rotary_factor": 0.5, "attention_factor": 1.7, **SHORT_AND_LONG},
        ),
    ],
)
def test_both_forms_of_rotary_options(save, architecture, old, new):
    options = {"hidden_size": 96, "pad_token_id": 0}
    if architecture.startswith("Phi3"):
        options["original_max_position_embeddings"] = 20
    theirs, folder = save(architecture, rope_parameters=new, **options)
    ids = torch.randint(0, 97, (2, 30))
    expected = theirs(ids).logits
    torch.testing.assert_close(load_checkpoint(folder)(ids), expected, **EXACT)
    edit_config(folder, rope_parameters=None, **old)
    torch.testing.assert_close(load_checkpoint(folder)(ids), expected, **EXACT)
    edit_config(folder, rope_scaling=None, rope_theta=10000.0, partial_rotary_factor=None)
    assert not torch.allclose(load_checkpoint(folder)(ids), expected, atol=1e-3)


@pytest.mark.parametrize("architecture", ["Gemma2ForCausalLM", "Gemma3ForCausalLM", "Qwen2ForCausalLM"])
def test_windows_of_older_checkpoints(save, architecture):
    """Which layers have one follows from their place, and Gemma 3's two bases have names of their own."""
    options = {"num_hidden_layers": 5}
    if architecture.startswith("Qwen"):
        options |= {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 6}
    if architecture.startswith("Gemma3"):
        bases = {"sliding_attention": 20.0, "full_attention": 300.0}
        options["rope_parameters"] = {
            name: {"rope_theta": base, "rope_type": "default"} for name, base in bases.items()
        }
        options["layer_types"] = [f"{'sliding' if (n + 1) % 3 else 'full'}_attention" for n in range(5)]
    theirs, folder = save(architecture, **options)
    ids = torch.randint(0, 97, (2, 30))
    expected = theirs(ids).logits
    new = load_checkpoint(folder)
    torch.testing.assert_close(new(ids), expected, atol=1e-4, rtol=1e-4)
    old = {"layer_types": None, "rope_parameters": None}
    if architecture.startswith("Gemma3"):
        old |= {
            "rope_theta": 300.0,
            "rope_local_base_freq": 20.0,
            "sliding_window_pattern": 3,
            "_sliding_window_pattern": None,
        }
    edit_config(folder, **old)
    assert load_checkpoint(folder).config == new.config
    assert {6, None} == set(new.config.windows)


def test_dtype_is_the_stored_one_or_the_asked_one(save):
    _, folder = save("LlamaForCausalLM", torch.bfloat16)
    assert {p.dtype for p in load_checkpoint(folder).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_checkpoint(folder, dtype=torch.float32).parameters()} == {torch.float32}


def test_a_loaded_model_is_in_eval_mode_tied_and_trainable(save):
    _, folder = save("GPT2LMHeadModel")
    ours = load_checkpoint(folder)
    assert not ours.training
    assert ours.head.weight is ours.word.weight
    assert all(p.requires_grad and p.is_leaf for p in ours.parameters())


def test_nothing_at_run_time_imports_transformers(save):
    _, folder = save("BertModel")
    code = (
        f"import sys, duplex_attn.checkpoint as c; c.load_checkpoint({str(folder)!r});"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd="/")
