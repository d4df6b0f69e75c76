"""Who waits for the device: host reads of the loop thread, counted by the line that makes them.

Two detectors with one face. On CUDA it is torch's own: the sync debug mode warns of each operation
that waits, on the thread that waits. Elsewhere (the CPU, a simulated accelerator, MPS) a dispatch
mode of the loop thread follows what came from the device (`pipeline.device.taint`), so that a laptop
shows what would wait on an accelerator.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pipeline.batch import Batch
from pipeline.device.backend import Backend

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep  # or a neighbour `pipeline_x` would be ours
_LOOP = _PACKAGE + "loop" + os.sep
_TORCH = str(Path(torch.__file__).resolve().parent) + os.sep
_LIBRARIES = (_PACKAGE, _TORCH, "<")
# Frames between a read and the detector that was told of it: they made no read.
_DETECTORS = (
    __file__,
    str(Path(__file__).with_name("taint.py")),
    *(_TORCH + name for name in ("_dynamo" + os.sep, "_compile.py", "utils" + os.sep, "overrides.py")),
    warnings.__file__,
)
_SYNC_WARNING = "called a synchronizing CUDA operation"


@dataclass(frozen=True)
class HostRead:
    """A line that made the loop thread wait for the device.

    Args:
        file: Where; the user's own file if the read was made on its behalf.
        line: In that file.
        function: Around it.
        operation: What was read with, such as ``item``.
        num_reads: How often.
        first_step: Optimizer steps finished at the first of them.
    """

    file: str
    line: int
    function: str
    operation: str
    num_reads: int
    first_step: int

    def __str__(self) -> str:
        return (
            f"{self.file}:{self.line} in {self.function}: {self.operation}, {self.num_reads} times, "
            f"first after step {self.first_step}"
        )


class HostReads:
    """Counts reads while it is told to.

    Args:
        step: Returns the optimizer steps finished.
        ignores_own: Leave out what this library reads on a device that has finished anyway.

    Attributes:
        is_counting: Set between a batch's arrival and the request for the next one.
    """

    def __init__(self, step: Callable[[], int], *, ignores_own: bool) -> None:
        self._step, self._ignores_own = step, ignores_own
        self._found: dict[tuple[str, int, str, str], list[int]] = {}
        self.is_counting = False

    def note(self, operation: str) -> None:
        """Count a read under the line that asked for it; before the first update all is warm-up."""
        step = self._step()
        if not self.is_counting or step == 0:
            return
        file, line, function = _find_reader()
        if self._ignores_own and file.startswith(_PACKAGE):
            return
        self._found.setdefault((file, line, function, operation), [0, step])[0] += 1

    def watch(self, batches: Generator[Batch], receive: Callable[[Batch], None]) -> Generator[Batch]:
        """Yield an epoch's batches and count reads from each one's arrival to the next one's request."""
        with closing(batches):
            try:
                for batch in batches:
                    receive(batch)
                    self.is_counting = True
                    yield batch
                    self.is_counting = False
            finally:
                self.is_counting = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside the block: a validation is a log point, and may read."""
        was_counting, self.is_counting = self.is_counting, False
        try:
            yield
        finally:
            self.is_counting = was_counting

    def found(self) -> tuple[HostRead, ...]:
        """Return every line, those that read most often first."""
        reads = [HostRead(*place, count, first) for place, (count, first) in self._found.items()]
        return tuple(sorted(reads, key=lambda read: -read.num_reads))


class ReadDetector:
    """Finds the host reads of one run.

    Args:
        backend: Decides how they are found.
        module: Its parameters and buffers are on the device.
        step: Returns the optimizer steps finished.

    Runs on:
        The thread that enters `installed`. It costs some 10 µs an operation where torch has no
        detector of its own: it is for looking, not for every run.

    Source:
        PyTorch, `torch.cuda.set_sync_debug_mode`: a beta, which does not see every wait.
    """

    def __init__(self, backend: Backend, module: torch.nn.Module, step: Callable[[], int]) -> None:
        self._backend, self._module = backend, module
        self.reads = HostReads(step, ignores_own=backend.streams is None)
        self._receive: Callable[[Batch], None] = lambda batch: None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Look for reads inside the block; everything global is put back behind it."""
        with self._detector():
            yield

    def watch(self, batches: Generator[Batch]) -> Generator[Batch]:
        """Yield the batches; what is done with each is watched."""
        return self.reads.watch(batches, self._receive)

    def _detector(self) -> AbstractContextManager[None]:
        if self._backend.device.type == "cuda":
            return _cuda_sync_debug(self.reads)
        from pipeline.device.taint import TaintMode  # imports much of torch, for this alone

        mode = TaintMode(self.reads)
        mode.mark(self._module)
        self._receive = mode.mark
        return mode.installed()


@contextmanager
def _cuda_sync_debug(reads: HostReads) -> Iterator[None]:
    """Take the warnings of torch's sync debug mode that the loop thread causes.

    The mode, the filters and `showwarning` belong to the process. Waits of the other belts' threads
    are theirs to make and are dropped; a thread that Python does not know is autograd's, which runs a
    backward on CUDA while the loop waits for it.
    """
    loop_thread, before = threading.get_ident(), torch.cuda.get_sync_debug_mode()

    def take(message: Any, category: Any, *rest: Any, **named: Any) -> None:
        if _SYNC_WARNING not in str(message):
            show(message, category, *rest, **named)
        elif threading.get_ident() not in {each.ident for each in threading.enumerate()} - {loop_thread}:
            reads.note("synchronize")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f".*{_SYNC_WARNING}")
        show, warnings.showwarning = warnings.showwarning, take
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _find_reader() -> tuple[str, int, str]:
    """Return file, line and function of the innermost frame that is neither torch's nor ours.

    The walk ends at the loop; where only torch and this library stand in between, it is the innermost
    of their frames.
    """
    innermost: tuple[str, int, str] | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        place = frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        if not place[0].startswith((*_LIBRARIES, *_DETECTORS)):
            return place
        if innermost is None and not place[0].startswith(_DETECTORS):
            innermost = place
        if place[0].startswith(_LOOP):
            break
        frame = frame.f_back
    return innermost or ("?", 0, "?")
