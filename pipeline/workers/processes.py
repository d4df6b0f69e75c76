"""Batches of a dataset from worker processes, in order, on whichever thread asks for them."""

from __future__ import annotations

import os
import pickle
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.batch import Batch
from pipeline.concurrency import Answer, NurseryDiedError, Pinning, Slot, SlotFile, WorkerPool
from pipeline.data.map_style import MapSource
from pipeline.data.reader import END, Repeated, TurnReader
from pipeline.data.shards import ShardedSource
from pipeline.errors import ConfigError, StageError, StallError
from pipeline.workers.dataset_pickle import packed_for_process
from pipeline.workers.death_messages import death_error, death_warning, nursery_error
from pipeline.workers.packing import Packed, reaches_all, unpack
from pipeline.workers.process_state import ProcessState
from pipeline.workers.worker import ANSWER, JOB
from pipeline.workers.worker_logs import hear

MODULES = ("numpy", "torch", "torch.utils.data", "pipeline.workers.worker")


@dataclass(slots=True, eq=False)
class _Asker:
    """Who iterates over an epoch, and what was answered and is not yet taken, by turn."""

    reader: TurnReader
    ready: dict[Any, tuple[Answer, Slot]] = field(default_factory=dict)
    is_gone: bool = False


class Processes:
    """Worker processes that make batches of one source.

    Args:
        source: The dataset is packed at once, and given to the processes once.
        num_workers: How many.
        stall_timeout_s: Longest wait for a batch; None waits for ever.
        num_threads: Of each; it makes as many batches at once.
        pinning: Of the device that the batches are copied to from where they lie, if there is one.
        make_look: Returns, in a worker, what is called after each batch; it raises if that must not be used.

    Attributes:
        in_order: Whether the batches of an epoch are handed over in its order, or as they are answered.

    Raises:
        ConfigError: If the dataset cannot be taken to a process; it says why.

    Runs on:
        One thread, but for `close`.
    """

    def __init__(
        self,
        source: MapSource | ShardedSource,
        num_workers: int,
        stall_timeout_s: float | None = None,
        num_threads: int = 1,
        pinning: Pinning | None = None,
        make_look: Callable[[Any], Callable[[], None]] | None = None,
    ) -> None:
        self._stall_timeout_s, self._batch_bytes = stall_timeout_s, 0
        self._tickets: dict[int, tuple[Any, Slot, _Asker]] = {}
        self._is_closed, self.in_order = False, True
        self._warned: dict[Any, Any] = {}
        self._state = ProcessState.capture(source.fetcher)
        payload, prepare = packed_for_process(source.fetcher, self._state)
        self._slots, self._stacks = SlotFile(pinning), os.memfd_create("stacks")
        self._payload = payload.overflow  # for the pool, which may need it again
        try:
            self._pool = WorkerPool(
                ("pipeline.workers.worker", "open_worker"),
                (self._payload, self._slots.file, self._stacks),
                (payload.offset, payload.nbytes, self._state.settings, make_look),
                num_workers,
                MODULES,
                prepare,
                num_threads,
            )
        except BaseException:
            self._close_files()
            raise

    @property
    def num_slots(self) -> int:
        """Slots of shared memory made so far; they are used again."""
        return self._slots.num_slots

    def is_ready(self, num_workers: int, num_threads: int = 1) -> bool:
        """Say, without waiting, whether so many workers are there; it takes two seconds the first time.

        Args:
            num_workers: How many.
            num_threads: Of each.

        Raises:
            PipelineError: If they never will be; it says why.
        """
        with self._explained():
            return self._pool.is_ready() and self._pool.resize(num_workers, num_threads)

    def is_stale(self) -> bool:
        """Say whether a setting or a global of the dataset's code is no longer what workers were given."""
        return self._state.globals.has_changed or self._state.settings.has_changed

    def wait_until_ready(self) -> bool:
        """Wait until the workers are there; False after the time-out. Raises as `is_ready` does."""
        with self._explained():
            return self._pool.wait_until_ready(self._stall_timeout_s)

    def close(self) -> None:
        """Kill the workers, and wait until they are gone. Batches that somebody has stay valid."""
        if not self._is_closed:
            self._is_closed = True
            self._pool.close()
            self._close_files()

    def _close_files(self) -> None:
        os.close(self._payload)
        os.close(self._stacks)
        self._slots.close()

    def batches(
        self,
        reader: TurnReader,
        depth: int,
        goes_on: Callable[[], bool] = lambda: True,
        repeated: Repeated | None = None,
    ) -> Generator[Batch]:
        """Yield the batches of an epoch from the reader's position on, and move it.

        Args:
            reader: The epoch; its position counts the batches that were handed over.
            depth: Batches that are asked for ahead.
            goes_on: Asked before each further batch is; once not, those asked for are the last.
            repeated: Batches to ask for first, that are not yielded.

        Raises:
            WorkerDiedError: If workers died of a batch, again when it was tried again; or the process that
                has the dataset, again.
            StallError: If there was no batch for too long.
            Exception: The dataset's own.
        """
        asker, asked, ahead = _Asker(reader), deque[Any](), reader.ahead()
        again = [] if repeated is None else repeated.turns
        try:
            for turn in again:
                self._ask(asker, turn)
            for turn in again:
                while turn not in asker.ready:
                    self._collect(asker)
                repeated.take(turn, partial(self._open, asker, turn, *asker.ready.pop(turn)))  # type: ignore[union-attr]
            while True:
                while len(asked) < min(depth, reader.num_left) and goes_on():
                    if (turn := next(ahead, None)) is None:
                        break
                    self._ask(asker, turn)
                    asked.append(turn)
                if not asked:
                    return
                while not asker.ready or (self.in_order and asked[0] not in asker.ready):
                    self._collect(asker)
                turn = asked[0] if self.in_order else next(iter(asker.ready))
                asked.remove(turn)
                batch = self._open(asker, turn, *asker.ready.pop(turn))
                if reader.take(turn, batch):
                    yield batch
        except NurseryDiedError as error:
            raise nursery_error(error) from error
        finally:
            asker.is_gone = True
            for answer, slot in asker.ready.values():
                self._drop(answer, slot)

    def _ask(self, asker: _Asker, turn: Any) -> None:
        self._check_open()
        position, indices = asker.reader.job(turn)
        slot = self._slots.acquire(indices.nbytes + self._batch_bytes)
        self._slots.write(slot, indices.numpy().tobytes())
        job = JOB.pack(*asker.reader.epoch, position, len(indices), slot.offset, slot.nbytes)
        ticket = self._pool.submit(job, asker.reader.worker(turn))
        self._tickets[ticket] = turn, slot, asker

    def _collect(self, asker: _Asker) -> None:
        self._check_open()
        answers = self._pool.answers(self._stall_timeout_s)
        if not answers and not self._pool.died:
            raise self._stalled(asker)
        self._warn_of_deaths()
        for answer in map(self._heard, answers):
            answered, slot, whose = self._tickets.pop(answer.ticket)
            if whose.is_gone:
                self._drop(answer, slot)
            else:
                whose.ready[answered] = answer, slot

    def _heard(self, answer: Answer) -> Answer:
        """Give on what a worker said meanwhile."""
        if answer.message[1:2] != b"\1":
            return answer
        *files, talk = answer.files
        hear(talk, self._warned)
        return answer._replace(files=files)

    def _open(self, asker: _Asker, turn: Any, answer: Answer, slot: Slot) -> Batch:
        if answer.exit_code is not None:
            self._slots.release(slot)
            raise death_error(asker.reader.describe(turn), answer.exit_code)
        is_batch, _, offset, nbytes, wanted_bytes = ANSWER.unpack_from(answer.message)
        if not is_batch:
            self._slots.release(slot)
            if len(answer.message) == ANSWER.size:
                return END
            raise _error_in(answer.message[ANSWER.size :])
        file = answer.files[0] if answer.files else -1
        if file >= 0:
            # It came by a file of its own, and a copy: make the next slots large enough.
            self._batch_bytes = max(self._batch_bytes, wanted_bytes + wanted_bytes // 8)
        packed, buffer = Packed(offset, nbytes, file, 0), self._slots.lend(slot)
        if file >= 0 or not self._slots.can_pin:
            return unpack(packed, buffer)
        views: list[Any] = []
        batch = unpack(packed, buffer, views=views)
        if reaches_all(batch, views):
            self._slots.pin(slot)
        else:
            self._slots.stop_pinning()
        return batch

    def _drop(self, answer: Answer, slot: Slot) -> None:
        """Take back what nobody wants any more."""
        self._slots.release(slot)
        for file in answer.files:
            os.close(file)

    def _check_open(self) -> None:
        if self._is_closed:
            raise StageError(
                "the worker processes were closed in the middle of an epoch. Close them after the loop.",
                stage="fetch",
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except NurseryDiedError as error:
            raise nursery_error(error) from error
        except ConfigError:
            raise  # it says itself what a process cannot have
        except Exception as error:
            raise ConfigError(
                f"the dataset cannot be unpickled in a process: {type(error).__name__}: {error}. Set "
                "placement=thread, or see why with pickle.loads(pickle.dumps(dataset))."
            ) from error
        self._warn_of_deaths()

    def _warn_of_deaths(self) -> None:
        for tickets, exit_code in self._pool.died:
            suspects = [self._tickets[each] for each in tickets]
            batches = [asker.reader.describe(turn) for turn, _, asker in suspects]
            warnings.warn(death_warning(batches, exit_code), RuntimeWarning, stacklevel=3)
        self._pool.died.clear()

    def _stalled(self, asker: _Asker) -> StallError:
        ticket, turn = next((each, job[0]) for each, job in self._tickets.items() if job[2] is asker)
        assert self._stall_timeout_s is not None
        error = StallError(self._stall_timeout_s, asker.reader.describe(turn))
        error.stage = "fetch"
        if (pid := self._pool.pid_of(ticket)) is not None:
            error.stack = self._stack_of(pid)
        return error

    def _stack_of(self, pid: int) -> str | None:
        """Have a worker write where it stands, which it does even if it never comes back from C."""
        written = os.fstat(self._stacks).st_size
        os.kill(pid, signal.SIGUSR1)
        for _ in range(100):
            if os.fstat(self._stacks).st_size > written:
                return os.pread(self._stacks, 1 << 16, written).decode(errors="replace")
            time.sleep(0.02)  # what hangs has been waited for much longer than this
        return None


def _error_in(message: bytes) -> BaseException:
    return pickle.loads(message)  # type: ignore[no-any-return]
