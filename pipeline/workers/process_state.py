"""The one home of what a script's process is more than its modules: captured here, taken over in the nursery.

`process_settings` is what is set of Python, torch and the libraries that are known; `script_globals` what the
dataset's code reads from its own modules. What is said in a worker comes back by `worker_logs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.workers.process_settings import ProcessSettings
from pipeline.workers.script_globals import ScriptGlobals


@dataclass(frozen=True)
class ProcessState:
    """What a process is to take over: its settings first, then globals, then the dataset."""

    settings: ProcessSettings
    globals: ScriptGlobals

    @classmethod
    def capture(cls, fetcher: Any) -> ProcessState:
        """Return that of this process, for whoever makes the batches.

        Raises:
            ConfigError: If something cannot be taken over; it says what.

        Runs on:
            Loop thread; some milliseconds, before processes are started.
        """
        return cls(ProcessSettings.capture(), ScriptGlobals.capture(fetcher))


class Applied:
    """Sets globals where it is unpickled: what is pickled behind it finds them there.

    Args:
        globals: Of the script's process.
    """

    def __init__(self, globals: ScriptGlobals) -> None:
        self._globals = globals

    def __reduce__(self) -> Any:
        return _apply, (self._globals,)


def _apply(found: ScriptGlobals) -> None:
    found.apply()
