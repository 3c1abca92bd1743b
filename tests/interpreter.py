"""Triton's interpreter without what it does over and over again: tests on the CPU take half as long. And with products that
treat all rows alike, as a card's do."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np


def hasten() -> None:
    """Once in a process, before a kernel runs. What this release of Triton does not have stays as it is."""
    if (interpreter := _interpreter()) is None:
        return
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    if hasattr(interpreter, "_LangPatchScope"):  # what a launch patches, it restores
        interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)


def treat_rows_alike() -> None:
    """Once in a process. Some of OpenBLAS's kernels (Haswell's, which Zen 5 gets) round a row by where it lies in its tile; there,
    sums in float64 hide their order."""
    if (interpreter := _interpreter()) is not None and not _rows_are_alike():
        builder = interpreter.InterpreterBuilder
        builder.create_dot = _in_float64(builder.create_dot, interpreter.TensorHandle)


def _interpreter() -> Any:
    """Triton's module, where it interprets."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return None
    from triton.runtime import interpreter

    return interpreter


def _rows_are_alike() -> bool:
    a, b = np.random.default_rng(0).standard_normal((2, 64, 64), dtype=np.float32)
    product = a @ b
    parts = all(np.array_equal(a[m : m + 16] @ b, product[m : m + 16]) for m in range(0, 64, 16))
    return parts and np.array_equal(np.roll(a, 5, 0) @ b, np.roll(product, 5, 0))


def _in_float64(create_dot: Any, handle: Any) -> Any:
    def dot(self: Any, a: Any, b: Any, c: Any, *options: Any) -> Any:
        if not {a.data.dtype, b.data.dtype} <= {np.dtype(np.float16), np.dtype(np.float32)}:
            return create_dot(self, a, b, c, *options)
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(c.data.dtype)
        return handle(product + c.data, c.dtype.scalar)

    return dot


def _by_name(dtype_of: Any) -> Any:
    """Numpy's type for one of Triton's or for a block of it, found once, not in a dictionary made at every question."""
    found: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = dtype_of(dtype)
        return found[name]

    return remembered


def _once_a_launch(patch: Any) -> Any:
    """A launch puts the interpreter's functions in the place of the language's, and so does every call of a jitted function
    within it, by looking through the whole language: for each module that a function may know the language by, the first
    time is enough."""
    patched: set[tuple[int, ...]] = set()
    languages: dict[Any, tuple[int, ...]] = {}

    def patched_once(function: Any) -> Any:
        from triton import language as tl

        if function not in languages:
            known = function.__globals__.values()
            languages[function] = tuple(sorted({id(x) for x in known if x is tl or x is tl.core}))
        if (seen := languages[function]) in patched:
            return None  # a launch is never within another; calls within one leave what they patch to it
        scope = patch(function)
        restore = scope.restore

        def restore_all() -> None:
            patched.clear()
            restore()

        scope.restore = restore_all
        patched.add(seen)
        return scope

    return patched_once
