"""Loads a Hugging Face checkpoint directory (config.json and safetensors) into the reference models.

    model = load_checkpoint("path/to/bert-base-uncased")         # as config.json's architectures say
    bert = load_checkpoint("path/to/bert-base-uncased", Bert)    # the encoder alone, whatever head is stored

Pickles are never opened: reading one can run code. Nothing here imports transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modules import GPT, BertMaskedLM, Seq2Seq
from .families import ARCHITECTURES, FAMILIES
from .family import Family, Modules
from .files import read_config, read_tensors, weight_files

# Stored, but no weight of ours: buffers of older versions, and next-sentence prediction, which no head here computes.
UNUSED = re.compile(
    r"embeddings\.position_ids|cls\.seq_relationship\..*|h\.\d+\.attn\.(bias|masked_bias)|.*rotary_emb\.inv_freq"
    r"|(en|de)coder\.version|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # of a layer


def load_checkpoint(
    directory: str | Path,
    architecture: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """The model in `directory`, in eval mode.

    directory: holds config.json and model.safetensors, or model.safetensors.index.json and its shards.
    architecture: Bert, BertMaskedLM, BertClassifier, GPT, Seq2Seq or Encoder, of several the first that the kind of model can
        be; by default what config.json's `architectures` names, or the first of its kind.
    dtype: of the weights; by default as stored.
    Raises FileNotFoundError where a file is missing, ValueError for a pickle, an unknown architecture or option, and
    missing, unexpected or wrongly shaped tensors.
    """
    folder = Path(directory)
    files, config = weight_files(folder), read_config(folder)
    tensors = dict(named for file in files for named in read_tensors(file).items())
    return from_tensors(config, tensors, architecture, dtype=dtype, device=device, where=str(folder))


def from_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    architecture: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    where: str = "these",
) -> Any:
    """The same of what is in memory: `from_tensors(theirs.config.to_dict(), theirs.state_dict(), GPT)`.

    config: as config.json has it. Weights that need no conversion share their memory with `tensors`. where: for messages.
    """
    made, family = model_of(config, architecture, where)
    stored = {plain_name(name, family): tensor for name, tensor in tensors.items()}
    try:
        plan = family.plan(config, made, stored)
    except ValueError as error:
        raise ValueError(f"{error} in {where}") from None
    with torch.device("meta"):
        model = made(plan.config)
    weights = assemble(model.state_dict(), stored, plan.modules, family.transposed, where)
    converted = {id(tensor): tensor.to(device=device, dtype=dtype or tensor.dtype) for tensor in weights.values()}
    weights = {name: converted[id(tensor)] for name, tensor in weights.items()}  # tied ones once
    model.load_state_dict(weights, assign=True)
    if isinstance(model, (BertMaskedLM, GPT, Seq2Seq)):
        model.tie_weights()  # assignment parted them
    return model.eval()


def model_of(
    config: Mapping[str, Any], architecture: type[nn.Module] | tuple[type[nn.Module], ...] | None, where: str
) -> tuple[type[nn.Module], Family]:
    """Which model a config stands for, and how it is stored."""
    named, model_type = (config.get("architectures") or [None])[0], config.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model_type: expected one of {known} in the config.json of {where}, got {model_type}")
    family = FAMILIES[model_type]
    if architecture is None and named is not None and ARCHITECTURES.get(named) not in family.models:
        known = ", ".join(name for name, made in ARCHITECTURES.items() if made in family.models)
        raise ValueError(f"architectures: expected one of {known} in the config.json of {where}, got {named}")
    wanted = architecture or (family.models[0] if named is None else ARCHITECTURES[named])
    several = wanted if isinstance(wanted, tuple) else (wanted,)
    for made in several:
        if made in family.models:
            return made, family
    names = " or ".join(made.__name__ for made in several)
    raise ValueError(f"architecture: expected one of family {model_type}, got {names}")


def assemble(
    wanted: Mapping[str, Tensor],
    stored: dict[str, Tensor],
    modules: Modules,
    transposed: bool,
    where: str,
) -> dict[str, Tensor]:
    """Our state dict of the stored tensors; raises ValueError unless each fits and none is missing or left over."""
    weights, missing, unused = {}, [], {name for name in stored if not UNUSED.fullmatch(name)}
    for name, parameter in wanted.items():
        module, leaf = name.rsplit(".", 1)
        number = NUMBER.search(module)
        sources = [f"{source.format(number and number[0])}.{leaf}" for source in modules[NUMBER.sub("{}", module)]]
        absent = [source for source in sources if source not in stored]
        if absent:
            missing += absent
            continue
        unused -= set(sources)
        parts = [stored[source] for source in sources]
        if transposed and number is not None and parts[0].dim() == 2:
            parts = [part.t().contiguous() for part in parts]
        shapes = [tuple(part.shape) for part in parts]
        rows = sum(shape[0] for shape in shapes if shape)
        if any(shape[1:] != tuple(parameter.shape[1:]) for shape in shapes) or rows != parameter.shape[0]:
            expected = "shapes that stack to " * (len(parts) > 1) + str(tuple(parameter.shape))
            got = ", ".join(map(str, shapes))
            raise ValueError(f"{' + '.join(sources)}: expected {expected} for {name} in {where}, got {got}")
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if not whole.is_floating_point():
            raise ValueError(f"{' + '.join(sources)}: expected a floating dtype in {where}, got {whole.dtype}")
        weights[name] = whole
    if missing:
        raise ValueError(f"missing tensors in {where}: {listed(missing)}")
    if unused:
        raise ValueError(f"unexpected tensors in {where}: {listed(sorted(unused))}")
    return weights


def listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def plain_name(name: str, family: Family) -> str:
    """A stored name without its model's prefix; a norm's gamma and beta by today's names."""
    name = name.removeprefix(family.prefix)
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
