"""A model of transformers from a directory, with what is wrong with it named."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..checkpoint.files import read_config


def load(directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model in eval mode, of the class that config.json's `architectures` names; safetensors only.

    Raises FileNotFoundError or ValueError where transformers is missing or does not know the model, or files are not right.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("--model: expected transformers to be installed: pip install 'duplex-attn[transformers]'")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    named = (read_config(directory).get("architectures") or ["AutoModel"])[0]
    architecture = getattr(transformers, str(named), None)
    if architecture is None or not hasattr(architecture, "from_pretrained"):
        raise ValueError(f"architectures: expected a model of transformers in {directory / 'config.json'}, got {named}")
    options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    try:
        return architecture.from_pretrained(directory, **options).eval().to(device)
    except SafetensorError as error:
        raise ValueError(f"{directory}: expected safetensors that can be read ({error})") from None
