"""Datasets that are no plain functions of their index; worker processes can import them."""

from __future__ import annotations

import abc
import contextvars
import functools
import io
import itertools
import sqlite3
import types
import uuid
import weakref
from collections import OrderedDict, deque

import numpy as np
import torch
from torch.utils.data import Dataset

SCALE = [1.0]
TABLE = torch.rand(64)


class Stateful(Dataset):
    """Samples of two numbers; what a subclass keeps decides them."""

    def __init__(self, size=64):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.tensor([float(index), float(self.value(index))])

    def close(self):
        """Let go of what it holds."""


class Plain(Stateful):
    """A function of the index."""

    def value(self, index):
        return index * 3


class Lazy(Plain):
    """Loads its table with the first sample."""

    table = None

    def value(self, index):
        if self.table is None:
            self.table = np.arange(self.size) * 3
        return self.table[index]


class Cached(Plain):
    """Keeps what it has made."""

    def __init__(self, size=64):
        super().__init__(size)
        self.cache = {}

    def value(self, index):
        if index not in self.cache:
            self.cache[index] = (index * 3,)
        return self.cache[index][0]


class Recent(Plain):
    """Keeps the last samples that it has made, and lets go of others."""

    def __init__(self, size=64):
        super().__init__(size)
        self.cache = OrderedDict()

    def value(self, index):
        self.cache[index] = index * 3
        self.cache.move_to_end(index)
        if len(self.cache) > 3:
            self.cache.popitem(last=False)
        return self.cache[index]


class Reader(Stateful):
    """Seeks and reads in a file that it has open."""

    def __init__(self, size=64):
        super().__init__(size)
        self.file = io.BytesIO(bytes(index % 256 for index in range(size)))

    def value(self, index):
        self.file.seek(index)
        return self.file.read(1)[0]


class Rows(Stateful):
    """Opens its database with the first sample; another thread may not use it."""

    connection = None

    def value(self, index):
        if self.connection is None:
            self.connection = sqlite3.connect(":memory:")
        return self.connection.execute("select ?", (index * 3,)).fetchone()[0]

    def close(self):
        if self.connection is not None:
            self.connection.close()


class Drawing(Stateful):
    """Draws from a generator of its own."""

    def __init__(self, size=64, make=lambda: np.random.default_rng(0)):
        super().__init__(size)
        self.rng = make()

    def value(self, index):
        return self.rng.random()


class Counting(Stateful):
    """Counts its samples."""

    def __init__(self, size=64):
        super().__init__(size)
        self.count = 0

    def value(self, index):
        self.count += 1
        return self.count


class CountingInList(Stateful):
    """Keeps every index that it was asked for."""

    def __init__(self, size=64):
        super().__init__(size)
        self.log = []

    def value(self, index):
        self.log.append(index)
        return len(self.log)


class CountingInArray(Stateful):
    """Counts in an array."""

    def __init__(self, size=64):
        super().__init__(size)
        self.counts = np.zeros(4)

    def value(self, index):
        self.counts[index % 4] += 1
        return self.counts.sum()


class CountingInClosure(Stateful):
    """Counts in a variable that a function closes over."""

    def __init__(self, size=64):
        super().__init__(size)
        count = 0

        def following():
            nonlocal count
            count += 1
            return count

        self.following = following

    def value(self, index):
        return self.following()


class CountingInClass(Stateful):
    """Counts in its class."""

    num_asked = 0

    def value(self, index):
        CountingInClass.num_asked += 1
        return CountingInClass.num_asked


class CountingInGlobal(Stateful):
    """Counts in a global of its module."""

    def value(self, index):
        COUNTS["asked"] += 1
        return COUNTS["asked"]


COUNTS = {"asked": 0}


class Streaming(Stateful):
    """Takes its samples from an iterator."""

    def __init__(self, size=64):
        super().__init__(size)
        self.stream = itertools.count()

    def value(self, index):
        return next(self.stream)


class Popping(Stateful):
    """Takes its samples from a queue, which it fills again."""

    def __init__(self, size=64):
        super().__init__(size)
        self.queue = deque(range(1000))

    def value(self, index):
        self.queue.append(found := self.queue.popleft())
        return found


class Sharded(Stateful):
    """Has one shard at hand, and loads another if a sample lies in it."""

    def __init__(self, size=64):
        super().__init__(size)
        self.number, self.shard = -1, ()

    def value(self, index):
        if index // 8 != self.number:
            self.number, self.shard = index // 8, tuple(range(index // 8 * 8, index // 8 * 8 + 8))
        return self.shard[index % 8] * 3


class Unique(Stateful):
    """Makes another sample each time."""

    def value(self, index):
        return uuid.uuid4().int % 1000


class Tabled(Stateful):
    """Reads a table that was drawn when this module was imported: a process that imports it has another."""

    def value(self, index):
        return float(TABLE[index % 64])


class Scaled(Stateful):
    """Reads a global that a program may set."""

    def value(self, index):
        return index * SCALE[0]


class Tuned(Plain):
    """Has a setting that a callback changes."""

    level, table = 1.0, None

    def value(self, index):
        return index * self.level


class Visited(Stateful):
    """Counts how often it was asked for each sample, in a dict."""

    def __init__(self, size=64):
        super().__init__(size)
        self.visits = {}

    def value(self, index):
        self.visits[index] = self.visits.get(index, 0) + 1
        return self.visits[index]


class VisitedInList(Visited):
    """The same in a long list."""

    def __init__(self, size=64):
        super().__init__(size)
        self.visits = dict.fromkeys(range(5000), 0)


class Worn(Stateful):
    """Changes each sample's array as it is made."""

    def __init__(self, size=64):
        super().__init__(size)
        self.rows = [np.zeros(3) for _ in range(5000)]

    def value(self, index):
        self.rows[index] += 1
        return self.rows[index].sum()


class CountingInFunction(Stateful):
    """Counts in an attribute of a function."""

    def value(self, index):
        following.count += 1
        return following.count


def following():
    """Have an attribute."""


following.count = 0


class CountingInAbstract(Stateful, abc.ABC):
    """Counts in its class, which is made by another metaclass."""

    num_asked = 0

    def value(self, index):
        CountingInAbstract.num_asked += 1
        return CountingInAbstract.num_asked


class Counter:
    """Counts."""

    count = 0


class CountingBehindReference(Stateful):
    """Counts in an object that it has a weak reference to."""

    def __init__(self, size=64):
        super().__init__(size)
        counter = Counter()
        self.keep, self.counter = lambda: counter, weakref.ref(counter)

    def value(self, index):
        self.counter().count += 1
        return self.counter().count


class CountingInContext(Stateful):
    """Counts in a variable of the context."""

    def value(self, index):
        COUNT.set(COUNT.get() + 1)
        return COUNT.get()


COUNT = contextvars.ContextVar("COUNT", default=0)


class DrawnOnce(Stateful):
    """Keeps what it has drawn for a sample."""

    def __init__(self, size=64):
        super().__init__(size)
        self.cache = {}

    def value(self, index):
        if index not in self.cache:
            self.cache[index] = (float(torch.rand(())),)
        return self.cache[index][0]


class DrawnOfRecent(Stateful):
    """Keeps what it has drawn for some samples, in a cache that forgets."""

    def value(self, index):
        return drawn(index)


@functools.lru_cache(maxsize=40)
def drawn(index):
    """Draw a number."""
    return float(torch.rand(()))


class Augmenting(Plain):
    """Keeps what it has loaded, and adds to it what it draws each time."""

    def __init__(self, size=64):
        super().__init__(size)
        self.cache = {}

    def value(self, index):
        if index not in self.cache:
            self.cache[index] = (index * 3,)
        return self.cache[index][0] + float(torch.rand(()))


class Switched(Stateful):
    """Makes its samples with a module that does something else in training."""

    def __init__(self, size=48):
        super().__init__(size)
        self.transform = torch.nn.Dropout(1.0)

    def value(self, index):
        return 0.0 if self.transform.training else 1.0


class Late(Plain):
    """Is a function of the index at first."""

    late = 30

    def value(self, index):
        return index * 3 if index < self.late else self.late_value(index)


class LateCounting(Late):
    """Counts, from a certain sample on."""

    count = 0

    def late_value(self, index):
        self.count += 1
        return self.count


class LateLog(Late):
    """Keeps a list, from a certain sample on."""

    def __init__(self, size=64):
        super().__init__(size)
        self.log = []

    def late_value(self, index):
        self.log.append(index)
        return len(self.log)


class LateStreaming(Late):
    """Opens a file at a certain sample, and reads on in it."""

    file = None

    def late_value(self, index):
        if self.file is None:
            self.file = io.BytesIO(bytes(range(256)))
        return self.file.read(1)[0]


class LateDrawing(Late):
    """Makes a generator of its own at a certain sample."""

    rng = None

    def late_value(self, index):
        if self.rng is None:
            self.rng = np.random.default_rng(0)
        return self.rng.random()


class LateConnecting(Late):
    """Opens a database at a certain sample; another thread may not use it."""

    connection = None

    def late_value(self, index):
        if self.connection is None:
            self.connection = sqlite3.connect(":memory:")
        return self.connection.execute("select ?", (index * 3,)).fetchone()[0]

    def close(self):
        if self.connection is not None:
            self.connection.close()


class LateReaders(Late):
    """Opens files as their samples come, each behind an object of its own in a dict."""

    def __init__(self, size=64):
        super().__init__(size)
        self.readers = {}

    def late_value(self, index):
        if index // 4 not in self.readers:
            data = io.BytesIO(bytes(number % 256 for number in range(self.size)))
            self.readers[index // 4] = types.SimpleNamespace(file=data)
        return self.readers[index // 4].file.read(1)[0]


FUNCTIONS_OF_INDEX = [Plain, Lazy, Cached, Recent, Reader, Rows, Sharded, Tabled, Scaled]
IN_ORDER = [
    Drawing,
    Counting,
    CountingInList,
    CountingInArray,
    CountingInClosure,
    CountingInClass,
    CountingInGlobal,
    Streaming,
    Popping,
    Visited,
    VisitedInList,
    Worn,
    CountingInFunction,
    CountingInAbstract,
    CountingBehindReference,
    CountingInContext,
]
LATE = [LateCounting, LateLog, LateStreaming, LateDrawing, LateConnecting, LateReaders]
KEPT_DRAWS = [DrawnOnce, DrawnOfRecent]
