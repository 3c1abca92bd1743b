"""Operators as the package calls them: past torch's dispatcher where it would do nothing on the way to the kernel.

It turns each of some 28 arguments into its own form and back, a third of what the smallest call costs. It has nothing else to
do when every tensor is an ordinary one on the CPU or on a CUDA card and nothing on this thread asks to be told of operators:
no mode, transform, autocast, trace or profile, and no compiler.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import contains
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

_OPTIONAL = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor, torch.nn.Parameter),
    "int": (int,),
    "SymInt": (int,),
    "float": (float,),
    "bool": (bool,),
    "str": (str,),
    "List[bool]": (list,),  # output_mask, which the package itself makes
}

_keys_of = torch._C._dispatch_keys
_included = torch._C._dispatch_tls_local_include_set
_excluded = torch._C._dispatch_tls_local_exclude_set
_function_mode_is_on = torch._C._is_torch_function_mode_enabled
_profiler_is_on = torch.autograd._profiler_enabled
_is_compiling = torch.compiler.is_compiling


def _keys_of_device(name: str) -> DispatchKeySet:
    keys = DispatchKeySet(getattr(DispatchKey, name))
    for functionality in ("ADInplaceOrView", f"Autograd{name}", f"Autocast{name}"):
        keys = keys | DispatchKeySet(getattr(DispatchKey, functionality))
    return keys


_ORDINARY = (_keys_of_device("CPU"), _keys_of_device("CUDA"))
with ThreadPoolExecutor(1) as _fresh_thread:  # on which nothing is going on, whatever is on the one that imports this
    _NOTHING_INCLUDED, _NOTHING_EXCLUDED = _fresh_thread.submit(lambda: (_included(), _excluded())).result()


class Operator:
    """Calls `overload`, or `kernel` itself: what the dispatcher would call first, with the same arguments."""

    def __init__(self, overload: Any, kernel: Callable[..., Any]) -> None:
        self.overload, self.kernel = overload, kernel
        self._kinds = [_kinds_of(argument.type) for argument in overload._schema.arguments]
        self._tensors = [n for n, kinds in enumerate(self._kinds) if Tensor in kinds]
        self._fitting: dict[tuple[type, ...], bool] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Raises TypeError for an argument of a kind that the schema does not have."""
        if not _is_compiling() and self.is_direct(arguments):
            return self.kernel(*arguments)
        try:
            return self.overload(*arguments)
        except RuntimeError as error:
            _raise_as_ours(error)

    def is_direct(self, arguments: Sequence[Any]) -> bool:
        """Whether the dispatcher would change nothing, so that the kernel may be called without it."""
        return (
            self._fits(tuple(map(type, arguments)))
            and _included() == _NOTHING_INCLUDED
            and _excluded() == _NOTHING_EXCLUDED
            and not _function_mode_is_on()
            and not _profiler_is_on()
            and all(arguments[n] is None or _keys_of(arguments[n]) in _ORDINARY for n in self._tensors)
        )

    def _fits(self, kinds: tuple[type, ...]) -> bool:
        """Whether these are the very kinds of the schema, with nothing to convert."""
        fits = self._fitting.get(kinds)
        if fits is None:
            fits = len(kinds) == len(self._kinds) and all(map(contains, self._kinds, kinds))
            self._fitting[kinds] = fits
        return fits


def _kinds_of(schema_type: Any) -> tuple[type, ...]:
    name = str(schema_type)
    inner = re.fullmatch(r"Optional\[(.*)\]", name)
    if inner is not None:
        return (*_KINDS.get(inner[1], ()), _OPTIONAL)
    return _KINDS.get(name, ())


def _raise_as_ours(error: RuntimeError) -> NoReturn:
    """The dispatcher's complaint about an argument that its schema does not take, in this package's form."""
    found = re.search(r"type '(.*?)' for argument '(\w+)' but instead found type '(.*?)'", str(error))
    if found is not None:
        expected, name, got = found.groups()
        raise TypeError(f"{name}: expected {expected}, got {got}") from None
    raise error
