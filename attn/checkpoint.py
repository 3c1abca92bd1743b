"""Loads a Hugging Face checkpoint directory (config.json and safetensors) into the reference models.

    model = load_checkpoint("path/to/bert-base-uncased")         # as config.json's architectures say
    bert = load_checkpoint("path/to/bert-base-uncased", Bert)    # the encoder alone, whatever head is stored

Pickles are never opened: reading one can run code. Nothing here imports transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .families import ARCHITECTURES, BERT, FAMILIES, POSITIONS, UNUSED, Family, Modules
from .modules.bert import Bert, BertClassifier, BertConfig, BertMaskedLM
from .modules.gpt import GPT

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def load_checkpoint(
    directory: str | Path,
    architecture: type[nn.Module] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """The model in `directory`, in eval mode.

    directory: holds config.json and model.safetensors, or model.safetensors.index.json and its shards.
    architecture: Bert, BertMaskedLM, BertClassifier or GPT; by default what config.json's `architectures` names.
    dtype: of the weights; by default as stored.
    Raises FileNotFoundError where a file is missing, ValueError for a pickle, an unknown architecture or option, and
    missing, unexpected or wrongly shaped tensors.
    """
    folder = Path(directory)
    files = weight_files(folder)
    raw = read_config(folder)
    named = (raw.get("architectures") or ["?"])[0]
    made = architecture or ARCHITECTURES.get(named)
    if made is None:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"architectures: expected one of {known} in {folder / 'config.json'}, got {named}")
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model_type: expected one of {known} in {folder / 'config.json'}, got {model_type}")
    family = FAMILIES[model_type]
    if (made is GPT) == bool(family.heads):
        raise ValueError(f"architecture: expected one of family {model_type}, got {made.__name__}")

    stored = {plain_name(name, family): tensor for file in files for name, tensor in read_tensors(file).items()}
    config, modules = family.config(raw), family.modules
    if isinstance(config, BertConfig):
        if made is not BertClassifier:
            config = replace(config, pooler="pooler.dense.weight" in stored)
        if made is Bert:
            stored = {name: t for name, t in stored.items() if not name.startswith(("cls.", "classifier.", "lm_head."))}
        else:
            modules = {f"bert.{ours}": theirs for ours, theirs in BERT.items()} | family.heads
            if made is BertClassifier and modules["bert.pooler"] != BERT["pooler"]:  # a head with a layer in its place
                stored = {name: t for name, t in stored.items() if not name.startswith("pooler.")}
        if (skipped := family.unused_positions(raw)) and POSITIONS in stored:
            stored[POSITIONS] = stored[POSITIONS][skipped:]
    if config.tied and family.word in stored and made in (BertMaskedLM, GPT):
        word = stored[family.word]
        if not torch.equal(stored.setdefault(family.head, word), word):
            names = f"{family.head} differs from {family.word}"
            raise ValueError(f"tie_word_embeddings: config.json says true, but {names} in {folder}")

    with torch.device("meta"):
        model = made(config)
    weights = assemble(model.state_dict(), stored, modules, family.transposed, folder)
    weights = {name: tensor.to(device=device, dtype=dtype or tensor.dtype) for name, tensor in weights.items()}
    model.load_state_dict(weights, assign=True)
    if isinstance(model, (BertMaskedLM, GPT)):
        model.tie_weights()  # assignment parted them
    return model.eval()


def assemble(
    wanted: Mapping[str, Tensor],
    stored: dict[str, Tensor],
    modules: Modules,
    transposed: bool,
    folder: Path,
) -> dict[str, Tensor]:
    """Our state dict of the stored tensors; raises ValueError unless each fits and none is missing or left over."""
    weights, missing, unused = {}, [], {name for name in stored if not UNUSED.fullmatch(name)}
    for name, parameter in wanted.items():
        module, leaf = name.rsplit(".", 1)
        layer = re.search(r"layers\.(\d+)\.", module)
        key = module if layer is None else module.replace(layer[0], "layers.{}.", 1)
        sources = [f"{source.format(layer and layer[1])}.{leaf}" for source in modules[key]]
        absent = [source for source in sources if source not in stored]
        if absent:
            missing += absent
            continue
        unused -= set(sources)
        parts = [stored[source] for source in sources]
        if transposed and key.startswith("layers.") and parts[0].dim() == 2:
            parts = [part.t().contiguous() for part in parts]
        shapes = [tuple(part.shape) for part in parts]
        rows = sum(shape[0] for shape in shapes if shape)
        if any(shape[1:] != tuple(parameter.shape[1:]) for shape in shapes) or rows != parameter.shape[0]:
            expected = "shapes that stack to " * (len(parts) > 1) + str(tuple(parameter.shape))
            got = ", ".join(map(str, shapes))
            raise ValueError(f"{' + '.join(sources)}: expected {expected} for {name} in {folder}, got {got}")
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if not whole.is_floating_point():
            raise ValueError(f"{' + '.join(sources)}: expected a floating dtype in {folder}, got {whole.dtype}")
        weights[name] = whole
    if missing:
        raise ValueError(f"missing tensors in {folder}: {listed(missing)}")
    if unused:
        raise ValueError(f"unexpected tensors in {folder}: {listed(sorted(unused))}")
    return weights


def listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, shards in the order of their names."""
    if folder.suffix in PICKLES:
        raise ValueError(pickle_refusal(folder))
    if not folder.is_dir():
        raise FileNotFoundError(f"directory: expected a checkpoint directory, got {folder}")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for shard in shards:
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ValueError(f"weight_map: expected names of safetensors files in {index}, got {shard!r}")
            if not (folder / shard).exists():
                raise FileNotFoundError(f"{index} names {shard}, which is not there")
        return [folder / shard for shard in shards]
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLES:
            raise ValueError(pickle_refusal(file))
    raise FileNotFoundError(f"{folder}: expected model.safetensors or model.safetensors.index.json, found neither")


def pickle_refusal(file: Path) -> str:
    return (
        f"{file} is a pickle, and reading one can run any code: expected safetensors. Convert it where you trust it, "
        "for example with transformers: Model.from_pretrained(...).save_pretrained(...)"
    )


def read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, got one that cannot be read ({error})") from None


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{folder}: expected a config.json, found none")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected JSON ({error})") from None


def plain_name(name: str, family: Family) -> str:
    """A stored name without its model's prefix; a norm's gamma and beta and the decoder's bias by today's names."""
    name = name.removeprefix(family.prefix)
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
    return {"cls.predictions.bias": "cls.predictions.decoder.bias", "lm_head.bias": "lm_head.decoder.bias"}.get(
        name, name
    )
