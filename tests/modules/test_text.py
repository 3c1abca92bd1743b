import subprocess
import sys

import pytest
import torch
from duplex_attn import text

LINES = ["the cat sat on the mat", "a dog", "every good boy deserves fruit and the cat does too", "one", "the end"]


def test_lines_of_a_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("first  line \n\n second\tline\nlast")
    assert text.read_text(file) == text.Text(str(file), ["first line", "second line", "last"])
    assert text.read_text(file, paragraphs=True).lines == ["first line", "second line last"]


def test_a_directory_is_read_in_order_without_what_is_no_text(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("two\n")
    (tmp_path / "sub" / "a.txt").write_text("three é\n")
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "nul").write_bytes(b"a\0b")
    (tmp_path / "latin1").write_bytes(b"caf\xe9\n")
    (tmp_path / ".hidden").write_text("no\n")
    assert text.read_text(tmp_path).lines == ["one", "two", "three é"]
    assert text.read_text(tmp_path, most_bytes=6).lines == ["one", "tw"]
    assert text.read_text(tmp_path / "sub", most_bytes=7).lines == ["three"]


def test_paths_without_text_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path: expected a text file or a directory, got .*nowhere"):
        text.read_text(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="path: expected text in UTF-8, found none"):
        text.read_text(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected a tokenizer\.json"):
        text.load_tokenizer(tmp_path)


def test_the_default_text_is_there_and_ragged():
    lines = text.default_text().lines
    assert len(lines) > 1000
    assert sum(map(len, lines)) > 200_000
    assert all(line == " ".join(line.split()) and line for line in lines)


def test_a_trained_tokenizer_is_the_same_in_another_process_and_on_one_thread():
    lines = text.default_text().lines
    ours = text.train_tokenizer(lines, 4000)
    assert ours.get_vocab_size() == 4000
    code = (
        "from duplex_attn import text; import sys;"
        "sys.stdout.buffer.write(text.train_tokenizer(text.default_text().lines, 4000).to_str().encode())"
    )
    environment = {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-P", "-c", code], check=True, capture_output=True, cwd="/", env=environment
    )
    assert other.stdout.decode() == ours.to_str()


def test_trained_tokens_give_the_text_back():
    tokenizer = text.train_tokenizer(LINES, 300)
    for line in [*LINES, "naïve 数学 🙂"]:
        ids = tokenizer.encode(line).ids
        assert tokenizer.decode(ids) == line
        assert (ids[0], ids[-1]) == (tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"))
        assert tokenizer.encode(line, add_special_tokens=False).ids == ids[1:-1]
    with pytest.raises(ValueError, match="vocab_size: expected at least 261, got 100"):
        text.train_tokenizer(LINES, 100)


def test_batches_hold_every_line_padded_to_the_longest():
    tokenizer = text.train_tokenizer(LINES, 300)
    expected = [tokenizer.encode(line).ids for line in LINES]
    got = list(text.batches(LINES, tokenizer, 2))
    assert [len(tokens.ids) for tokens in got] == [2, 2, 1]
    row = 0
    for tokens in got:
        assert tokens.ids.dtype == torch.int64
        assert tokens.seqlens.dtype == torch.int32
        assert tokens.ids.shape[1] == tokens.seqlens.max()
        assert tokens.attention_mask.sum(1).tolist() == tokens.seqlens.tolist()
        assert tokens.total == tokens.attention_mask.sum()
        for ids, length in zip(tokens.ids, tokens.seqlens.tolist(), strict=True):
            assert ids[:length].tolist() == expected[row]
            assert ids[length:].eq(tokenizer.token_to_id("[PAD]")).all()
            row += 1
    assert row == len(LINES)


def test_long_lines_are_cut_and_keep_their_end():
    tokenizer = text.train_tokenizer(LINES, 300)
    (tokens,) = text.batches([LINES[2]], tokenizer, longest=5)
    assert tokens.ids.shape == (1, 5)
    assert tokens.ids[0, -1] == tokenizer.token_to_id("[SEP]")
    (plain,) = text.batches([LINES[2]], tokenizer, longest=5, special=False)
    assert plain.ids[0].tolist() == tokenizer.encode(LINES[2], add_special_tokens=False).ids[:5]


def test_a_checkpoints_tokenizer_is_used_as_it_is(tmp_path):
    tokenizer = text.train_tokenizer(LINES, 300)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = text.load_tokenizer(tmp_path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    assert loaded.encode(LINES[0]).ids == tokenizer.encode(LINES[0]).ids
    with pytest.raises(ValueError, match=r"tokenizer: expected at most the model's vocab_size \(200\), got"):
        next(text.batches(LINES, loaded, vocab_size=200))


def test_masked_positions_are_inner_tokens_and_the_same_for_a_seed():
    tokenizer = text.train_tokenizer(LINES, 300)
    mask = tokenizer.token_to_id("[MASK]")
    (tokens,) = text.batches(LINES, tokenizer)
    ids, positions = text.mask_tokens(tokens, mask, share=0.3)
    again, same = text.mask_tokens(tokens, mask, share=0.3)
    assert ids.equal(again) and positions.equal(same)
    assert not positions.equal(text.mask_tokens(tokens, mask, share=0.3, seed=1)[1])
    hidden = (ids == mask) & (tokens.ids != mask)
    assert hidden.flatten().nonzero().squeeze(1).equal(positions)
    assert ids[~hidden].equal(tokens.ids[~hidden])
    width = tokens.ids.shape[1]
    rows, columns = positions // width, positions % width
    assert (columns >= 1).all() and (columns < tokens.seqlens[rows] - 1).all()
    wanted = ((tokens.seqlens - 2).float() * 0.3).round().clamp(min=1).long()
    assert rows.bincount(minlength=len(LINES)).equal(wanted)
