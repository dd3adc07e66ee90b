"""Keeps ``torch.compile`` out of functions that run compiled kernels, at no cost where it is not in use."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(function: Function) -> Function:
    """The function, which ``torch.compile`` calls as it is: its graph breaks there.

    torch's own decorator imports the compiler, which takes seconds, at the first call; this one looks if it is loaded.
    """
    hidden: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if not hidden:
            compiler = sys.modules.get("torch._dynamo")
            if compiler is None or not hasattr(compiler, "disable"):
                return function(*arguments, **options)
            hidden.append(compiler.disable(function))
        return hidden[0](*arguments, **options)

    return cast(Function, call)
