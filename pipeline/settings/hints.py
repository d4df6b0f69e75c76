"""What a setting may be, and what to type instead of a wrong one."""

from __future__ import annotations

import difflib
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from pipeline.device import Backend


def fits(value: Any, hint: Any) -> bool:
    """Say whether a setting's value is of its type."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if origin is not None:
        return isinstance(value, origin)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is Backend:
        return hasattr(value, "streams")
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """Return a type as a user would say it."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(hint))
    if hint is type(None):
        return "null (None)"
    plain = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
    return plain.get(hint) or str(getattr(origin or hint, "__name__", hint))


def meant(value: Any, hint: Any) -> str:
    """Return what a text outside of a closed set was probably meant to be; empty for no idea."""
    choices = [each for each in typing.get_args(hint) if isinstance(each, str)]
    close = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    return f" Did you mean {close[0]}?" if close else ""


def suggested(name: str, known: Mapping[str, Any], arguments: Mapping[str, str]) -> str:
    """Return what to type instead of a name that is no setting.

    Args:
        name: As it was typed.
        known: All settings.
        arguments: Of methods of the Trainer: the method by name.
    """
    if name in arguments:
        return f"It is an argument of {arguments[name]}: trainer.{arguments[name]}(…, {name}=…)."
    close = difflib.get_close_matches(name, [*known, *arguments], n=1)
    if not close:
        return f"There are: {', '.join(sorted(known))}."
    of_method = f", an argument of {arguments[close[0]]}" if close[0] in arguments else ""
    return f"Did you mean {close[0]}{of_method}?"
