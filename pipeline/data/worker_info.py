"""`torch.utils.data.get_worker_info` on a thread that reads a shard: what a DataLoader's worker is told.

torch keeps it in one global of the process, which is enough where a worker is a process. Here a prefetch
thread reads a shard while the loop thread may iterate over other data, which must not be told that it is a
shard of anything. So torch's function gets other code, once: it looks at the thread first. Code, and not
another function, for a user's module may have imported the function by its name before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.data
from torch.utils.data._utils import worker


class _ThreadInfo(threading.local):
    info: Any = None
    was_asked = False

    def __call__(self) -> Any:
        self.was_asked = True
        return self.info


_THREAD_INFO = _ThreadInfo()


@contextmanager
def told(info: Any) -> Iterator[_ThreadInfo]:
    """Have `get_worker_info` return something on this thread, inside the block; note whether it was asked.

    Args:
        info: A WorkerInfo; None leaves it as it is.
    """
    if info is not None:
        _look_at_the_thread()
    before, _THREAD_INFO.info = _THREAD_INFO.info, info
    _THREAD_INFO.was_asked = False
    try:
        yield _THREAD_INFO
    finally:
        _THREAD_INFO.info = before


def worker_info(shard: int, num_shards: int, seed: int, dataset: Any) -> Any:
    """Return what the worker of a DataLoader with as many workers as shards would be told."""
    return worker.WorkerInfo(id=shard, num_workers=num_shards, seed=seed, dataset=dataset)


def _look_at_the_thread() -> None:
    names = vars(worker)
    if "_thread_info" not in names:
        names["_thread_info"] = _THREAD_INFO
        torch.utils.data.get_worker_info.__code__ = _answer.__code__


def _answer() -> Any:
    # Runs with the names of torch's module. A worker of a DataLoader that was forked here is a worker first.
    return _worker_info or _thread_info()  # type: ignore[name-defined]  # noqa: F821
