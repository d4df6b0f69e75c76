"""What the table of faults is made of: places, data and parts that fail, in modules a worker can import."""

from __future__ import annotations

import os
import signal
import sys
import threading

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, default_collate

from pipeline import SimulatedBackend, Trainer
from pipeline.testing import InMemoryLogger

PLACES = {
    "textbook": {"schedule": "textbook"},
    "overlap-inline": {"schedule": "overlap", "placement": "inline", "prefetch_depth": 2},
    "overlap-thread": {"schedule": "overlap", "placement": "thread", "num_workers": 2, "prefetch_depth": 2},
    "overlap-process": {"schedule": "overlap", "placement": "process", "num_workers": 1, "prefetch_depth": 2},
}
BAD_SAMPLE, BAD_STEP = 17, 4  # sample 17 is in the batch of step 8 of 10; the other faults come at step 4


class UserError(Exception):
    """What only the user's own code raises."""


class Samples(Dataset):
    """Twenty samples, the 18th of which may be made to fail; only in the process named, if one is."""

    def __init__(self, fault=None, only_in=None):
        self.fault, self.only_in = fault, only_in
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(20, 4, generator=generator)

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == BAD_SAMPLE and self.fault is not None:
            found = FAULTS[self.fault]()
            if found is not None:
                return found
        return self.inputs[index], index % 2


def raise_error():
    raise UserError("mine")


def hang():
    HANGING.wait()


HANGING = threading.Event()


FAULTS = {
    "raises": raise_error,
    "wrong type": object,
    "hangs": hang,
    "is slow": lambda: threading.Event().wait(0.15) or None,
    "exits": lambda: sys.exit(3),
    "exits at once": lambda: os._exit(3),
    "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "out of memory": lambda: [][:0] or _raise(MemoryError("host")),
}


def _raise(error):
    raise error


def failing_collate(samples):
    if any(torch.equal(inputs, Samples().inputs[BAD_SAMPLE]) for inputs, _ in samples):
        raise UserError("mine")
    return default_collate(samples)


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise UserError("mine")


class At:
    """Calls a function with what it is called with, and at its so-manieth call something else."""

    def __init__(self, function, number, fault):
        self.function, self.left, self.fault = function, number, fault

    def __call__(self, *arguments, **keywords):
        self.left -= 1
        if self.left == 0:
            return self.fault(*arguments, **keywords)
        return self.function(*arguments, **keywords)


def fail(*arguments, **keywords):
    raise UserError("mine")


def out_of_memory(*arguments, **keywords):
    raise torch.OutOfMemoryError("CUDA out of memory")


class Logger(InMemoryLogger):
    """Does something else than logging at its third row."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def log(self, row):
        super().log(row)
        if len(self.rows) == 3:
            self.fault()


def fit(place, run_dir, *, dataset=None, loss_fn=F.cross_entropy, prepare=None, device="cpu", **arguments):
    """Train ten steps, each with a checkpoint, in a place."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    if prepare is not None:
        prepare(model, optimizer)
    names = ("stall_timeout_s", "on_nonfinite", "on_checkpoint_error", "resume")
    settings = {name: arguments.pop(name) for name in names if name in arguments}
    trainer = Trainer(
        **{
            "run_dir": run_dir, "enable_progress_bar": False, "device": device, "gil": "off",
            "checkpoint_every_n_steps": 1, **PLACES[place], **settings,
        }
    )  # fmt: skip
    dataset = Samples() if dataset is None else dataset
    return trainer.fit(model, optimizer, dataset, loss_fn=loss_fn, batch_size=2, **arguments)


def simulated(method, number=BAD_STEP):
    """Return a device of which a method fails at its so-manieth call."""
    backend = SimulatedBackend()
    setattr(backend, method, At(getattr(backend, method), number, fail))
    return backend
