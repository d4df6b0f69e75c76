"""Datasets that worker processes can import, and the fork server that all tests share."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import itertools
import os
import random
import signal
import threading
import types
from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info


class Augmented(Dataset):
    """Samples whose numbers are drawn from torch's, Python's and NumPy's global generators."""

    def __init__(self, count, *, draws=("torch",)):
        self.count, self.draws, self.offset = count, draws, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        sample = torch.full((6,), float(index + self.offset))
        if "torch" in self.draws:
            sample += torch.rand(6)
        if "python" in self.draws:
            sample += random.random() + random.gauss(0, 1)
        if "numpy" in self.draws:
            sample += float(np.random.rand()) + float(np.random.randn())
        if "reseed" in self.draws:
            with torch.random.fork_rng():
                torch.manual_seed(index)
                sample += torch.rand(6)
        if "dropout" in self.draws:
            sample = torch.nn.functional.dropout(sample, 0.3)
        return sample, index % 3


class Films(Dataset):
    """Samples of four dimensions whose channels lie last in memory: stacked by torch, they still do."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((2, 4, 4, 3), float(index)).permute(0, 3, 1, 2)


class Reducing(Dataset):
    """Samples that are sums of so many numbers that several threads share in them."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.rand(3, 224, 224).sum() + torch.rand(3, 224, 224).std()


class Deadly(Augmented):
    """A worker that makes a certain sample is killed; once, if there is a file to remember it by."""

    def __init__(self, count, *, index, memory=None, exit_code=None):
        super().__init__(count)
        self.index, self.memory, self.exit_code, self.home = index, memory, exit_code, os.getpid()

    def __getitem__(self, index):
        if index == self.index and os.getpid() != self.home and self._is_due():
            if self.exit_code is not None:
                os._exit(self.exit_code)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)

    def _is_due(self):
        return self.memory is None or _is_first(self.memory)


def _is_first(memory):
    """Say whether nobody has asked before, in any process."""
    try:
        os.close(os.open(memory, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class Late(Augmented):
    """Draws from certain generators, but nothing but torch's numbers before a certain sample."""

    def __init__(self, count, *, index, draws):
        super().__init__(count, draws=draws)
        self.index = index

    def __getitem__(self, index):
        sample, target = Augmented(self.count, draws=self.draws and ("torch",))[index]
        return (sample + super().__getitem__(index)[0] if index >= self.index else sample), target


_TWO = threading.Barrier(2)
_MET: set[int] = set()


class Meeting(Late):
    """Two samples wait for each other, the first time a worker makes them: their batches are made at once.

    Each sample draws twice, and in between lets another thread draw from the same generator, if that may run.
    """

    def __init__(self, count, *, pair, index=0, draws=()):
        super().__init__(count, index=index, draws=draws)
        self.pair, self.home = pair, os.getpid()

    def __getitem__(self, index):
        if index in self.pair and os.getpid() != self.home and index not in _MET:
            _MET.add(index)
            _TWO.wait(60)
        first, target = super().__getitem__(index)
        hashlib.sha256(bytes(1 << 20))  # without the GIL
        return first + super().__getitem__(index)[0], target


class DeadlyBeside(Augmented):
    """A worker is killed by one sample while another thread makes a sample that would never be done.

    That is the first time; then the other one is made as usual. What kills does so again, unless told not to.
    """

    def __init__(self, count, *, index, beside, memory, is_once=False):
        super().__init__(count)
        self.index, self.beside, self.memory, self.is_once = index, beside, memory, is_once
        self.home = os.getpid()

    def __getitem__(self, index):
        if index in (self.index, self.beside) and os.getpid() != self.home:
            if is_first := _is_first(f"{self.memory}{index}"):
                _TWO.wait(60)
            if index == self.beside and is_first:
                threading.Event().wait()
            if index == self.index and (is_first or not self.is_once):
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Failing(Augmented):
    """Raises an exception of its own at one sample."""

    def __getitem__(self, index):
        if index == 5:
            raise UserError("mine", index)
        return super().__getitem__(index)


class UserError(Exception):
    """An exception with arguments of its own."""

    def __init__(self, text, index):
        super().__init__(text, index)
        self.index = index


class Hanging(Augmented):
    """Waits for ever at one sample, in a worker."""

    def __init__(self, count, *, index):
        super().__init__(count)
        self.index, self.home = index, os.getpid()

    def __getitem__(self, index):
        if index == self.index and os.getpid() != self.home:
            signal.pause()
        return super().__getitem__(index)


class Held(Augmented):
    """Waits at one sample, in a worker, until somebody opens a named pipe for writing."""

    def __init__(self, count, *, index, pipe):
        super().__init__(count)
        self.index, self.pipe, self.home = index, pipe, os.getpid()

    def __getitem__(self, index):
        if index == self.index and os.getpid() != self.home:
            with open(self.pipe) as file:
                file.read()
        return super().__getitem__(index)


class Pair(NamedTuple):
    """A batch with names."""

    inputs: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True)
class Parts:
    """A batch that only `map_tensors` knows how to go through."""

    inputs: torch.Tensor
    names: list[str]


class Ragged(Dataset):
    """Samples of a length that grows with their index: later batches fit no slot made before."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.arange(1 + index * 50, dtype=torch.float32)


def collate_ragged(samples):
    """Make a nested batch of parts that `default_collate` cannot make."""
    return {
        "values": samples,
        "padded": torch.nn.utils.rnn.pad_sequence(samples, batch_first=True),
        "columns": torch.nn.utils.rnn.pad_sequence(samples).t(),
        "array": np.arange(len(samples)),
        "names": [f"sample {len(each)}" for each in samples],
        "nothing": torch.empty(0, 3),
        "pair": Pair(samples[0].double(), torch.tensor(1)),
        "parts": Parts(samples[-1].to(torch.bfloat16), ["a", "b"]),
        "sparse": torch.eye(2).to_sparse(),
    }


class Surroundings(Augmented):
    """Samples that depend on the process they are made in: its environment and torch's default dtype."""

    def __init__(self, count):
        super().__init__(count)

    def __getitem__(self, index):
        return torch.tensor([float(os.environ["SURROUNDINGS"]) + index])


class Verbose(Augmented):
    """Every sample fails at length; with a note at length if told to."""

    def __init__(self, count, *, text, note=None):
        super().__init__(count)
        self.text, self.note = text, note

    def __getitem__(self, index):
        error = ValueError(self.text)
        if self.note is not None:
            error.add_note(self.note)
        raise error


class Stream(IterableDataset):
    """Files of so many samples, shared out among workers; their numbers depend on what was drawn before."""

    def __init__(self, sizes, *, draws=()):
        self.sizes, self.draws, self.noise = sizes, draws, torch.zeros(6)
        self.own = random.Random(5)  # a state of its own, which each shard has for itself

    def __iter__(self):
        info = get_worker_info()
        shard, num_shards = (0, 1) if info is None else (info.id, info.num_workers)
        past = torch.zeros(6)
        for file in range(shard, len(self.sizes), num_shards):
            for index in range(self.sizes[file]):
                sample, target = self.sample(file, index)
                past = past / 2 + sample
                yield past, target

    def sample(self, file, index):
        """Make a sample, to which those before it will be added."""
        sample = torch.full((6,), file + index / 100)
        if "own" in self.draws:
            sample += self.own.random()
        if "torch" in self.draws:
            sample += torch.rand(6)
        if "python" in self.draws:
            sample += random.random() + random.gauss(0, 1)
        if "numpy" in self.draws:
            sample += float(np.random.rand()) + float(np.random.randn())
        if "dropout" in self.draws:
            sample = torch.nn.functional.dropout(sample, 0.3)
        if "seldom" in self.draws and index == 4:
            sample += random.random()
        return sample, (file + index) % 3


class Endless(Stream):
    """Has no end."""

    def __init__(self, *, draws=()):
        super().__init__([], draws=draws)

    def __iter__(self):
        info = get_worker_info()
        for index in itertools.count():
            yield self.sample(0 if info is None else info.id, index)


class FailingStream(Stream):
    """Raises an exception of its own at one sample."""

    def __init__(self, sizes, *, file, index):
        super().__init__(sizes, draws=("torch",))
        self.where = file, index

    def sample(self, file, index):
        if (file, index) == self.where:
            self.fail()
        return super().sample(file, index)

    def fail(self):
        """Fail."""
        raise UserError("mine", self.where[1])


class DeadlyStream(FailingStream):
    """A worker that makes a certain sample is killed; once, if there is a file to remember it by."""

    def __init__(self, sizes, *, file, index, memory=None):
        super().__init__(sizes, file=file, index=index)
        self.memory, self.home = memory, os.getpid()

    def fail(self):
        """Kill."""
        if os.getpid() != self.home and Deadly._is_due(self):
            os.kill(os.getpid(), signal.SIGKILL)


class Logged(Stream):
    """Writes down which process has read what."""

    def __init__(self, sizes, *, log):
        super().__init__(sizes)
        self.log = log

    def sample(self, file, index):
        with open(self.log, "a") as log:
            log.write(f"{os.getpid()} {file} {index}\n")
        return super().sample(file, index)


class Whole(Stream):
    """Does not ask which shard it is."""

    def __iter__(self):
        return (self.sample(0, index) for index in range(self.sizes[0]))


class Counting(Stream):
    """Counts its epochs."""

    def __iter__(self):
        self.epoch = getattr(self, "epoch", 0) + 1
        for sample, target in super().__iter__():
            yield sample + self.epoch, target


class Encoding(UserDict):
    """Like a tokenizer's: keys are attributes too, and it knows more than its items."""

    def __init__(self, data=None, encodings=None):
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, name):
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device):
        """Move in place, as a tokenizer's does."""
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Graph:
    """A batch that is no container, and knows how to move."""

    def __init__(self, x):
        self.x = x

    def to(self, device, non_blocking=False):
        """Return it elsewhere."""
        return Graph(self.x.to(device, non_blocking=non_blocking))


class Settings(OrderedDict):
    """A dict of a class of its own, which takes attributes."""


def odd_values(samples=None):
    """Return values of every kind that a collate function may return, by name."""
    base, settings = torch.arange(12.0).reshape(3, 4), Settings(a=torch.ones(2))
    settings.tag, tagged = 1, torch.ones(2)
    tagged.tag = 1
    kinds = ["bool", "uint16", "uint32", "uint64", "bfloat16", "float8_e4m3fn", "complex64", "complex32"]
    fields = [("a", "i4"), ("b", "f8")]
    return {
        **{kind: base.to(getattr(torch, kind)) for kind in kinds},
        "conjugate": base.to(torch.complex64).conj(),
        "negative": torch._neg_view(base),
        "expanded": base[:, :1].expand(3, 9),
        "column": base[:, 1],
        "transposed": base.t(),
        "one channel": torch.empty(2, 1, 3, 3).to(memory_format=torch.channels_last).zero_(),
        "empty": base[:0].t(),
        "scalar": torch.tensor(3),
        "tagged": tagged,
        "leaf": torch.ones(2, requires_grad=True),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "sparse": torch.eye(3).to_sparse().requires_grad_(),
        "by rows": torch.eye(3).to_sparse_csr(),
        "in blocks": torch.eye(4).to_sparse_bsc((2, 2)),
        "ragged": torch.nested.nested_tensor([torch.arange(6.0).view(2, 3), torch.ones(3, 3)]),
        "quantized": torch.quantize_per_tensor(base, 0.1, 0, torch.qint8),
        "packed": torch.nn.utils.rnn.pack_sequence([torch.ones(1), torch.ones(2)], enforce_sorted=False),
        "object": np.array([{"a": 1}, None], dtype=object),
        "text": np.array(["a", "bcd"]),
        "date": np.array(["2020-01-01"], dtype="datetime64[D]"),
        "records": np.array([(1, 2.5)], dtype=fields),
        "one field": np.array([(1, 2.5), (2, 0.5)], dtype=fields)["b"],
        "masked": np.ma.masked_array([1, 2], mask=[0, 1]),
        "big-endian": np.array([1.5, 2], dtype=">f8"),
        "by columns": np.asfortranarray(np.ones((2, 3))),
        "backwards": np.arange(24).reshape(2, 3, 4)[::-1, :, ::-2].transpose(2, 0, 1),
        "repeated": np.broadcast_to(np.arange(3)[:, None], (3, 2)),
        "read-only": np.frombuffer(b"abcd", dtype=np.uint8),
        "none of them": np.empty((0, 3)),
        "number": np.float32(1.5),
        "bytes": b"x",
        "money": decimal.Decimal("1.5"),
        "when": datetime.datetime(2020, 1, 1),
        "set": {1, 2},
        "default": defaultdict(list, a=[1]),
        "encoding": Encoding({"ids": torch.ones(2, 3)}, ["tokens"]),
        "settings": settings,
        "namespace": types.SimpleNamespace(x=torch.ones(2)),
        "parts": Parts(torch.ones(2), ["a"]),
        "object of a class": Graph(torch.ones(2)),
        "largest": torch.max(torch.eye(2), 0),
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "nothing": None,
    }


def collate_packed(samples):
    """Return a pair of sequences and their targets."""
    sequences, targets = zip(*samples, strict=True)
    return torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False), torch.stack(targets)


def collate_encoded(samples):
    """Return what a tokenizer would."""
    inputs, targets = zip(*samples, strict=True)
    return Encoding({"inputs": torch.stack(inputs), "labels": torch.tensor(targets)}, ["tokens"])


def collate_graph(samples):
    """Return an object that remembers a parameter: it cannot leave its process."""
    return [torch.stack([inputs for inputs, _ in samples]) * torch.ones(1, requires_grad=True)]


def collate_views(samples):
    """Return what lies in one memory: rows of tokens as inputs and as targets, an array over both."""
    rows, names = torch.stack([inputs for inputs, _ in samples]), ["a"]
    views = {"inputs": rows[:, :-1], "target": rows[:, 1:], "all": rows, "again": rows}
    return {**views, "array": rows.numpy()[::-1], "names": names, "same": names}
