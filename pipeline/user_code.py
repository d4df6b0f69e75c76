"""Whose code is a module: the user's, or a library's?"""

from __future__ import annotations

import functools
import site
import sys
import sysconfig


@functools.cache
def is_users(module: str) -> bool:
    """Say whether a module is the user's own: neither installed, nor Python's, nor ours."""
    if module in ("__main__", "__mp_main__"):
        return True
    if not module or module.partition(".")[0] == "pipeline":
        return False
    path = getattr(sys.modules.get(module), "__file__", None)
    return isinstance(path, str) and not path.startswith(_INSTALLED)


def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    found = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return tuple(f"{path}/" for path in {*found, *site.getsitepackages(), site.getusersitepackages()})


_INSTALLED = _installed()
