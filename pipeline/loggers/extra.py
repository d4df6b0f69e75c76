"""Backends that are packages of their own: imported when one is made, named when they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from pipeline.errors import ConfigError


def import_extra(module: str, *, extra: str, needed_by: str) -> Any:
    """Return a module of an optional package.

    Args:
        module: Its name.
        extra: The extra of the distribution that brings it.
        needed_by: Who asks.

    Raises:
        ConfigError: If it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{needed_by} needs the package {module.partition('.')[0]}, which cannot be imported ({error}). "
            f"Type: pip install 'beltloop[{extra}]'"
        ) from error
