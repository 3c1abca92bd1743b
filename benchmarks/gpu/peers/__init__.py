"""The other systems, each made when its turn comes: what is not installed, or does not take the call, says so and why."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..workload import Unavailable

# Package, module of it, and the function that dense calls need.
FLASH_ATTENTION = {
    "flash-attn 2": "flash_attn",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 4": "flash_attn.cute",
}


def module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from None


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Unavailable(reason)
