"""Real text as batches of tokens: read, tokenised (training a tokenizer in seconds where there is none), padded."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

LICENCES = Path("/usr/share/common-licenses")  # Debian's base-files
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Text:
    """`lines`: one sequence each, never empty. `name` says where they are from."""

    name: str
    lines: list[str]


@dataclass(frozen=True)
class Tokens:
    """A batch: ids int64 (B, S), padded on the right to the longest line; seqlens int32 (B,)."""

    ids: Tensor
    seqlens: Tensor

    @property
    def attention_mask(self) -> Tensor:
        """int64 (B, S), 1 for a token: the form Hugging Face models take."""
        return (torch.arange(self.ids.shape[1]) < self.seqlens[:, None]).long()

    @property
    def total(self) -> int:
        return int(self.seqlens.sum())


def read_text(path: str | Path, *, paragraphs: bool = False, most_bytes: int = 16 << 20) -> Text:
    """The lines of a text file, or of every text file below a directory in the order of their paths.

    paragraphs: joins the lines up to a blank one, for text wrapped at a column. most_bytes: where reading stops.
    Files that are not UTF-8, hidden files, and a file met again through a link are passed over. Raises
    FileNotFoundError where there is no such path, ValueError where it holds no text.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"path: expected a text file or a directory, got {root}")
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    seen: set[Path] = set()
    lines: list[str] = []
    room = most_bytes
    for file in files:
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if hidden or file.resolve() in seen:
            continue
        seen.add(file.resolve())
        content = decode(file, room)
        if content is not None:
            lines += split(content, paragraphs)
            room -= len(content)
        if room <= 0:
            break
    if not lines:
        raise ValueError(f"path: expected text in UTF-8, found none in {root}")
    return Text(str(path), lines)


def default_text() -> Text:
    """Real prose that the machine has: Python's language reference as pydoc carries it, else Debian's licences."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a minimal Python
        if not LICENCES.is_dir():
            raise FileNotFoundError("path: expected one, for this Python carries no documentation to read") from None
        return read_text(LICENCES, paragraphs=True)
    lines = [line for name in sorted(topics) for line in split(topics[name], paragraphs=True)]
    return Text(f"Python {platform.python_version()}'s language reference, by paragraph", lines)


def decode(file: Path, most_bytes: int) -> str | None:
    with file.open("rb") as opened:
        data = opened.read(max(most_bytes, 0))
    if b"\0" in data:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        cut = len(data) == most_bytes and error.start >= len(data) - 3  # a character that the limit split
        return data[: error.start].decode() if cut else None


def split(content: str, paragraphs: bool) -> list[str]:
    pieces = re.split(r"\n\s*\n", content) if paragraphs else content.splitlines()
    return [line for line in (" ".join(piece.split()) for piece in pieces) if line]


def load_tokenizer(checkpoint: str | Path) -> Tokenizer:
    """The tokenizer.json of a checkpoint directory."""
    file = Path(checkpoint) / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(f"{checkpoint}: expected a tokenizer.json, found none")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def train_tokenizer(lines: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most vocab_size tokens (>= 261) learnt from the lines: the same for the same lines.

    Encoding adds [CLS] and [SEP] as BERT has them; `add_special_tokens=False` leaves them out.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(SPECIAL):
        raise ValueError(f"vocab_size: expected at least {len(alphabet) + len(SPECIAL)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=marks)
    return tokenizer


def batches(
    lines: Sequence[str],
    tokenizer: Tokenizer,
    batch: int = 16,
    longest: int = 512,
    *,
    special: bool = True,
    vocab_size: int | None = None,
) -> Iterator[Tokens]:
    """Batches of lines in their order, each padded to its longest, the last one perhaps smaller.

    longest: tokens of a line at most; the rest is cut (a line's closing [SEP] stays). special: adds the tokenizer's
    own, as [CLS] and [SEP]. vocab_size: the model's; a tokenizer that exceeds it raises ValueError.
    """
    if vocab_size is not None and tokenizer.get_vocab_size() > vocab_size:
        size = tokenizer.get_vocab_size()
        raise ValueError(f"tokenizer: expected at most the model's vocab_size ({vocab_size}), got {size} tokens")
    tokenizer.enable_truncation(longest)
    pad = next((i for mark in ("[PAD]", "<pad>") if (i := tokenizer.token_to_id(mark)) is not None), 0)
    for start in range(0, len(lines), batch):
        encoded = tokenizer.encode_batch(list(lines[start : start + batch]), add_special_tokens=special)
        rows = [row for row in (torch.tensor(one.ids, dtype=torch.int64) for one in encoded) if len(row)]
        if rows:
            seqlens = torch.tensor([len(row) for row in rows], dtype=torch.int32)
            yield Tokens(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad), seqlens)


def mask_tokens(tokens: Tokens, mask_id: int, share: float = 0.15, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hides `share` of each line's inner tokens, at least one of a line of three or more, for masked-token prediction.

    Returns ids int64 (B, S) with mask_id in their place and the positions b * S + s, int64 (n,), in ascending order.
    """
    width = tokens.ids.shape[1]
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for row, length in enumerate(tokens.seqlens.tolist()):
        inner = max(length - 2, 0)
        count = min(inner, max(1, round(share * inner)))
        chosen.append(torch.randperm(inner, generator=generator)[:count].sort().values + row * width + 1)
    positions = torch.cat(chosen)
    ids = tokens.ids.flatten().index_fill(0, positions, mask_id).view_as(tokens.ids)
    return ids, positions
