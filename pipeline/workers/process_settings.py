"""What a script has set in its process, and a worker process is to find as it is there.

Each setting is read from one function (or place) and written with another. What belongs to a library is
carried only if this process has imported it, and imported in the worker only if it is not as it comes.
Torch's number of threads is taken by each worker for itself: the nursery forks, and must have one.
"""

from __future__ import annotations

import csv
import decimal
import importlib
import locale
import logging
import os
import pickle
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from pipeline.errors import ConfigError

try:
    import resource
except ImportError:  # Windows, where there are no worker processes
    _LIMITS: tuple[str, ...] = ()
else:
    _LIMITS = tuple(name for name in dir(resource) if name.startswith("RLIMIT_"))

_PLAIN = (bool, int, float, str, bytes, type(None))
# Modules whose flags are plain names that scripts set.
_FLAGS = (
    "PIL.Image",
    "PIL.ImageFile",
    "PIL.PngImagePlugin",
    "PIL.TiffImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
)
_FLAG_NAME = re.compile(r"[A-Z][A-Z0-9_]*")
# Libraries with functions for theirs: module, what reads a setting, what writes it.
_LIBRARY_SETTINGS = (
    ("cv2", "getNumThreads", "setNumThreads"),
    ("cv2", "useOptimized", "setUseOptimized"),
    ("torchvision", "get_image_backend", "set_image_backend"),
    ("torchvision", "get_video_backend", "set_video_backend"),
)


@dataclass(frozen=True)
class ProcessSettings:
    """The settings of a process.

    Args:
        values: By name, as `_SETTINGS` reads them.
        flags: Of libraries, by module; those that differ from how the library comes are not known here.
        library: By module and the name of the function that writes it.
        num_threads: Of torch's operations.

    Runs on:
        Loop thread; a capture takes about a millisecond.
    """

    values: dict[str, Any]
    flags: dict[str, dict[str, Any]]
    library: dict[tuple[str, str], Any]
    num_threads: int

    @classmethod
    def capture(cls) -> ProcessSettings:
        """Return those of this process.

        Raises:
            ConfigError: If torch makes tensors on another device than the CPU here unless told.
        """
        if (device := torch.get_default_device()).type != "cpu":
            raise ConfigError(
                f"torch.set_default_device({str(device)!r}) holds here, and worker processes have the CPU "
                "alone: their batches would be others. Name the device where tensors are made, or set "
                "placement=thread."
            )
        library = {
            (module, write): getattr(sys.modules[module], read)()
            for module, read, write in _LIBRARY_SETTINGS
            if hasattr(sys.modules.get(module), read)
        }
        flags = {name: _flags_of(sys.modules[name]) for name in _FLAGS if name in sys.modules}
        return cls(
            {name: read() for name, (read, _) in _SETTINGS.items()}, flags, library, torch.get_num_threads()
        )

    @property
    def has_changed(self) -> bool:
        """Whether something that a sample may depend on is set otherwise by now."""
        try:
            now = ProcessSettings.capture()
        except ConfigError:  # what holds by now, no worker can have
            return True
        mine, others = ({**each.values, **dict.fromkeys(_SPOKEN)} for each in (self, now))
        flags = all(now.flags.get(name, found) == found for name, found in self.flags.items())
        library = all(now.library.get(name, found) == found for name, found in self.library.items())
        return (mine, self.num_threads) != (others, now.num_threads) or not (flags and library)

    def apply(self) -> None:
        """Make them those of this process, but for what may start threads."""
        for name, (read, write) in _SETTINGS.items():
            if read() != self.values[name]:
                write(self.values[name])
        for name, flags in self.flags.items():
            _set_flags(importlib.import_module(name), flags)
        for module, _ in self.library:
            importlib.import_module(module)

    def apply_in_worker(self) -> None:
        """Set the numbers of threads too; in a process that does not fork."""
        torch.set_num_threads(self.num_threads)
        for (module, write), value in self.library.items():
            getattr(sys.modules[module], write)(value)


def _flags_of(module: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if _FLAG_NAME.fullmatch(name) and isinstance(value, _PLAIN)
    }


def _set_flags(module: Any, flags: dict[str, Any]) -> None:
    for name, value in flags.items():
        if getattr(module, name, value) != value:
            setattr(module, name, value)


def _logging_levels() -> dict[str, tuple[int, bool]]:
    """Return the level of each logger, and whether it is off; ``""`` is the root."""
    found = {"": (logging.root.level, logging.root.disabled)}
    for name, each in [*logging.root.manager.loggerDict.items()]:
        if isinstance(each, logging.Logger) and (each.level or each.disabled):
            found[name] = each.level, each.disabled
    return found


def _set_logging_levels(levels: dict[str, tuple[int, bool]]) -> None:
    for name, (level, disabled) in levels.items():
        found = logging.getLogger(name or None)
        found.setLevel(level)
        found.disabled = disabled


def _filters() -> list[Any]:
    return [each for each in warnings.filters if _is_picklable(each)]


def _is_picklable(found: Any) -> bool:
    try:
        pickle.dumps(found)
    except Exception:  # such as a category that is defined in a function
        return False
    return True


def _set_filters(filters: list[Any]) -> None:
    warnings.filters[:] = filters  # type: ignore[index]
    with suppress(AttributeError):  # what was decided before is decided anew
        warnings._filters_mutated()  # type: ignore[attr-defined]


def _limits() -> dict[str, tuple[int, int]]:
    return {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS}


def _set_limits(limits: dict[str, tuple[int, int]]) -> None:
    for name, limit in limits.items():
        if resource.getrlimit(getattr(resource, name)) != limit:
            with suppress(ValueError, OSError):  # it was lowered for good
                resource.setrlimit(getattr(resource, name), limit)


def _umask() -> int:
    # There is no call that only reads it.
    found = re.search(r"^Umask:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1], 8) if found else 0o022


def _set_deterministic(found: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(found[0], warn_only=found[1])  # imports for a second


def _print_options() -> dict[str, Any]:
    return {name: each for name, each in numpy.get_printoptions().items() if isinstance(each, _PLAIN)}


def _set_locale(found: str) -> None:
    with suppress(locale.Error):
        locale.setlocale(locale.LC_ALL, found)


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _set_affinity(cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)


def _set_mkldnn(is_enabled: bool) -> None:
    torch.backends.mkldnn.set_flags(is_enabled)  # type: ignore[no-untyped-call]


def _context() -> tuple[Any, ...]:
    found = decimal.getcontext()
    traps = tuple(each for each, is_on in found.traps.items() if is_on)
    return found.prec, found.rounding, found.Emin, found.Emax, found.capitals, found.clamp, traps


def _set_context(found: tuple[Any, ...]) -> None:
    precision, rounding, low, high, capitals, clamp, traps = found
    decimal.setcontext(decimal.Context(precision, rounding, low, high, capitals, clamp, [], list(traps)))


def _flushes_denormals() -> bool:
    smallest = sys.float_info.min
    return smallest / 2 == 0  # there is no call that reads it


def _set_zone(names: tuple[str, str]) -> None:
    time.tzset()  # the environment has it already


# Name → what reads it, what writes it. The environment, the folder and the import path come before them.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic": (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _set_deterministic,
    ),
    "mkldnn": (lambda: torch.backends.mkldnn.enabled, _set_mkldnn),
    "denormals": (_flushes_denormals, torch.set_flush_denormal),
    "sharing": (torch.multiprocessing.get_sharing_strategy, torch.multiprocessing.set_sharing_strategy),
    "numpy errors": (numpy.geterr, lambda found: numpy.seterr(**found)),
    "numpy print": (_print_options, lambda found: numpy.set_printoptions(**found)),
    "warnings": (_filters, _set_filters),
    "logging levels": (_logging_levels, _set_logging_levels),
    "logging off": (lambda: logging.root.manager.disable, logging.disable),
    "recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "digits": (sys.get_int_max_str_digits, sys.set_int_max_str_digits),
    "csv": (csv.field_size_limit, csv.field_size_limit),
    "socket": (socket.getdefaulttimeout, socket.setdefaulttimeout),
    "decimal": (_context, _set_context),
    "locale": (lambda: locale.setlocale(locale.LC_ALL), _set_locale),
    "time zone": (lambda: time.tzname, _set_zone),
    "umask": (_umask, os.umask),
    "limits": (_limits, _set_limits),
    "cores": (_affinity, _set_affinity),
}
# What is heard by the script's own loggers and filters in any case, and changes with what is imported.
_SPOKEN = ("warnings", "logging levels", "logging off")
