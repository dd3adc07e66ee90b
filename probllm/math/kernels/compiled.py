"""``njit`` for kernels that call each other across files, with a cache on disk that sees when any of them changes.

numba caches a compiled function together with what it calls, but looks only at the file of the function itself: after a
change in another file it would go on running the old code, on arrays in the new layout. Here the cache's key holds a
digest of all kernel sources.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache


def digest(folder: Path) -> str:
    """A digest of the Python files of a folder."""
    sources = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        sources.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return sources.hexdigest()


SOURCES = digest(Path(__file__).parent)


class KernelCache(FunctionCache):  # type: ignore[misc]
    """numba's cache of one function, keyed by the sources of all kernels too."""

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), SOURCES)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: ``njit(nogil=True, **options)``, compiled when first called, cached if a folder can be written.

    Arithmetic is strict where ``fastmath`` is not given, and a division by zero is no error.
    """
    # numba lets a function inherit what it does not set from the caller that first compiles it, and caches that
    options = {"fastmath": False, "error_model": "numpy", **options}

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(nogil=True, **options)(function)
        with contextlib.suppress(RuntimeError):  # no folder to cache in: compiled once a process
            dispatcher._cache = KernelCache(function)
        return dispatcher

    return decorate
