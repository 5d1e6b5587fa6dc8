"""TypeErrors for the functions that torch has no counterpart of: its own parser reads the arguments of the others."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from types import NoneType
from typing import Any, TypeVar, cast

from torch import SymBool, SymInt, Tensor

# By annotation, what is taken; other annotations have readers of their own.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "Tensor": Tensor,
    "Tensor | None": (Tensor, NoneType),
    "bool": (int, SymBool),
    "int": (int, SymInt),
    "str": (str, bytes),
    "str | None": (str, bytes, NoneType),
}

_Function = TypeVar("_Function", bound=Callable)


def naming_wrong_types(function: _Function) -> _Function:
    """The function, with a TypeError that names an argument of a wrong type, as torch's functions raise it.

    Types are looked at when a call has failed: one that succeeds does not pay for it.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (AttributeError, IndexError, RuntimeError, TypeError):
            if message := _wrong_type(signature, args, kwargs):
                raise TypeError(message) from None
            raise

    return cast(_Function, call)


def _wrong_type(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> str | None:
    with contextlib.suppress(TypeError):  # arguments that are missing, or too many: the call has said so itself
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            wanted = signature.parameters[name].annotation
            # NumPy's numbers are taken for Python's.
            number = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
            if wanted in _KINDS and not isinstance(value.item() if number else value, _KINDS[wanted]):
                return f"{name} must be {wanted}, but is {type(value).__name__}"
    return None
