"""A model of transformers from a directory, with what is wrong with it named."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..checkpoint.files import read_config
from ..checkpoint.load import listed


def load(directory: Path, dtype: torch.dtype, device: torch.device, whole: bool = False) -> Any:
    """The model in eval mode, of the class that config.json's `architectures` names; safetensors only.

    whole: refuses a directory that lacks weights, which would be random. Raises FileNotFoundError or ValueError where transformers
    is missing or does not know the model, or files are not right.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("--model: expected transformers to be installed: pip install 'duplex-attn[transformers]'")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    named, file = read_config(directory).get("architectures") or ["AutoModel"], directory / "config.json"
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise ValueError(f"architectures: expected a list of names in {file}, got {named!r}")
    architecture: Any = getattr(transformers, named[0], None)
    models = (transformers.PreTrainedModel, transformers.AutoModel)
    known = isinstance(architecture, type) and issubclass(architecture, models)
    if not known:
        raise ValueError(f"architectures: expected a model of transformers in {file}, got {named[0]}")
    options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    try:
        model, found = architecture.from_pretrained(directory, **options, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"{directory}: expected safetensors that can be read ({error})") from None
    except Exception as error:  # of any kind, for each model reads its config as it likes
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: expected a model that transformers can load from there ({why})") from error
    missing = sorted(found["missing_keys"])
    if whole and missing:
        raise ValueError(
            f"{directory}: expected all weights of {named[0]}, which {file} names, missing {listed(missing)}"
        )
    return model.eval().to(device)
