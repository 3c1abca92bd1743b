"""The files of a checkpoint directory. Pickles are never opened: reading one can run code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

START = "decoder_start_token_id"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


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
    raw, generation = read_json(file), folder / "generation_config.json"
    if raw.get(START) is None and generation.exists():  # where newer versions keep it
        raw[START] = read_json(generation).get(START)
    return raw


def read_json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text())
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{file}: expected JSON ({error})") from None
    if not isinstance(read, dict):
        raise ValueError(f"{file}: expected an object, got {type(read).__name__}")
    return read
