"""Names of parameters as the user's own modules have them, whatever wraps these.

`torch.compile` and DistributedDataParallel put a module of theirs around a user's, and ``_orig_mod.`` or
``module.`` into the name of everything in it. A file has the names without: it is for the plain model, and
for any wrapping of it. What is a wrapper is decided by its type; an attribute of the user's own that is
called ``module`` is a name like any other.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

_PREFIXES = ("_orig_mod", "module")
# Modules whose state leaves them out of its names by itself.
_UNNAMED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_names(model: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return each name of something in a model, by the name that it has without the wrappers."""
    names = list(names)
    if not any(_wrapped_by(module) for module in model.modules()):
        return {name: name for name in names}
    return {_plain_name(model, name): name for name in names}


def with_plain_names(model: torch.nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model has by name, such as its state, under plain names."""
    plain = {plain: state[name] for plain, name in plain_names(model, state).items()}
    return with_notes(plain, with_plain_names(model, notes) if (notes := notes_of(state)) else None)


def with_names_of(model: torch.nn.Module, names: Iterable[str], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file has by name, under the names that it has in a model.

    Args:
        model: Plain, or wrapped in any way.
        names: Of the same kind of thing in the model.
        found: Under plain names; in an older file, under those of a model that was wrapped in some way.
    """
    own = plain_names(model, names)
    others = [name for name in found if name not in own]
    left = {plain: name for plain, name in own.items() if plain not in found}
    bare_left, bare_found = Counter(map(_bare, left)), Counter(map(_bare, others))
    by_bare = {_bare(plain): name for plain, name in left.items() if bare_left[_bare(plain)] == 1}
    renamed = {name: by_bare.get(_bare(name), name) for name in others if bare_found[_bare(name)] == 1}
    state = {own.get(name) or renamed.get(name, name): value for name, value in found.items()}
    known, notes = notes_of(names), notes_of(found)
    return with_notes(state, with_names_of(model, known, notes) if known and notes else None)


def notes_of(state: Any) -> dict[str, Any] | None:
    """Return what torch notes beside a model's state: each module's version, by which old ones are read."""
    return getattr(state, "_metadata", None)


def with_notes(state: Mapping[str, Any], notes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a state with such notes; as it is if there are none."""
    if notes is None:
        return dict(state)
    noted: Any = OrderedDict(state)
    noted._metadata = {name: dict(each) for name, each in notes.items()}  # torch writes to them
    return noted  # type: ignore[no-any-return]


def named_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return a model's parameters by their plain names, each once."""
    found = dict(model.named_parameters())
    return {plain: found[name] for plain, name in plain_names(model, found).items()}


def _plain_name(model: torch.nn.Module, name: str) -> str:
    module: torch.nn.Module | None = model
    kept = []
    for part in name.split("."):
        while module is not None and (inner := _unnamed(module)) is not None and part not in module._modules:
            module = inner
        if module is None or part != _wrapped_by(module):
            kept.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(kept)


def _wrapped_by(module: torch.nn.Module) -> str | None:
    """Return the name under which a wrapper holds what it wraps; None for any other module."""
    if isinstance(module, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
        return "module"
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not there unless something was compiled
    if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        return "_orig_mod"
    return None


def _unnamed(module: torch.nn.Module) -> torch.nn.Module | None:
    return next((each for name in _UNNAMED if (each := module._modules.get(name)) is not None), None)


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _PREFIXES)
