"""How a kind of model is stored: what its config.json says as ours, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}

# Our module -> the stored modules whose weights, one below the other, make up its own. {} is the layer.
Modules = dict[str, tuple[str, ...]]
Stored = dict[str, Tensor]  # by names without the model's prefix


@dataclass(frozen=True)
class Plan:
    """What becomes of a checkpoint: the config of the model, and where its tensors come from."""

    config: Any
    modules: Modules


@dataclass(frozen=True)
class Family:
    """One model_type."""

    models: tuple[type[nn.Module], ...]  # that it can be loaded as
    prefix: str  # before the names of all but the heads, where the checkpoint has a head
    # Of config.json, the model wanted and what is stored, which it brings into the form that the plan names.
    plan: Callable[[Mapping[str, Any], type[nn.Module], Stored], Plan]
    transposed: bool = False  # linear weights of layers are (in, out)


def tie(stored: Stored, head: str, word: str) -> None:
    """Gives a head that is tied to the embedding its weight; raises ValueError where another is stored."""
    if word in stored and not stored.setdefault(head, stored[word]).equal(stored[word]):
        raise ValueError(f"tie_word_embeddings: config.json says true, but {head} differs from {word}")


def below(part: str, modules: Modules) -> Modules:
    """Modules of a part of a model."""
    return {f"{part}.{ours}": theirs for ours, theirs in modules.items()}


def drop(stored: Stored, *beginnings: str) -> None:
    for name in [name for name in stored if name.startswith(beginnings)]:
        del stored[name]


def need(raw: Mapping[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        raise ValueError(f"{name}: expected it in config.json, found nothing")
    return raw[name]


def refuse(raw: Mapping[str, Any], name: str, supported: Any) -> None:
    """Stops at an option that these models do not compute."""
    if raw.get(name) not in (None, supported):
        raise ValueError(f"{name}: expected {supported!r} in config.json, got {raw[name]!r}")


def activation(raw: Mapping[str, Any], name: str, default: str) -> str:
    given = raw.get(name) or default
    if given not in ACTIVATIONS:
        raise ValueError(f"{name}: expected one of {', '.join(ACTIVATIONS)} in config.json, got {given!r}")
    return ACTIVATIONS[given]
