"""Datasets that are no plain functions of their index; worker processes can import them."""

from __future__ import annotations

import io
import itertools
import sqlite3
import uuid
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
]
