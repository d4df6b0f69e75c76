"""What must not happen when a process imports what the script has: what it has written would be gone.

A module that empties a file or removes a folder as it is imported has done so once, for the script, which has
gone on writing there. So while a nursery imports, that is refused to the user's own code, before it happens.
"""

from __future__ import annotations

import os
import stat
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pipeline.errors import ConfigError

_TAKING = {
    "open": "empty",
    "os.truncate": "cut off",
    "os.remove": "remove",
    "os.rmdir": "remove",
    "os.rename": "rename",
    "shutil.rmtree": "remove",
    "shutil.move": "move",
}
_is_watching = _is_hooked = False


@contextmanager
def nothing_taken() -> Iterator[None]:
    """Refuse that the user's code empties or removes what there is, inside of the block.

    Raises:
        ConfigError: Where it tries to.

    Source:
        The table of audit events in Python's documentation. A hook cannot be taken away again.
    """
    global _is_watching, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_look)
        _is_hooked = True
    _is_watching = True
    try:
        yield
    finally:
        _is_watching = False


def _look(event: str, arguments: tuple[Any, ...]) -> None:
    if not _is_watching or event not in _TAKING:
        return
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & os.O_TRUNC):
        return
    if _has_something(arguments[0]) and (frame := _users_frame(sys._getframe(1))) is not None:
        raise ConfigError(
            f"a worker process must import {os.path.basename(frame.f_code.co_filename)}, and its line "
            f"{frame.f_lineno} would {_TAKING[event]} {os.fsdecode(arguments[0])} again. Put that under "
            'if __name__ == "__main__":, or in a function that the script calls, or set placement=thread.'
        )


def _has_something(path: Any) -> bool:
    """Say whether this is a folder, or a file with something in it."""
    try:
        found = os.stat(os.fspath(path))
    except (OSError, TypeError, ValueError):
        return False
    return stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_size > 0)


def _users_frame(frame: FrameType | None) -> FrameType | None:
    """Return the user's code that asks for it; None if a library or the import system does so for itself."""
    while frame is not None:
        file = frame.f_code.co_filename
        if "/site-packages/" in file or file.startswith((*_LIBRARIES, "<frozen importlib")):
            return None
        if not file.startswith(_PYTHONS) and not file.startswith("<frozen"):
            return frame
        frame = frame.f_back
    return None


_PATHS = sysconfig.get_paths()
_LIBRARIES = tuple({f"{_PATHS[name]}/" for name in ("purelib", "platlib")})
_PYTHONS = tuple({f"{_PATHS[name]}/" for name in ("stdlib", "platstdlib")})
