"""Datasets with state: in every place the batches of the plain loop, or a refusal before a wrong one is used."""

from __future__ import annotations

import random
import warnings
from contextlib import closing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import Callback, Loader, PipelineError, StageError, Trainer
from tests import stateful
from tests.stateful import COUNTS, FUNCTIONS_OF_INDEX, IN_ORDER, CountingInClass, Drawing, Tabled, Tuned

PLACES = ["auto", "inline", "thread", "process"]


def reset():
    """Put back what the datasets of a module share."""
    COUNTS["asked"], CountingInClass.num_asked, stateful.SCALE[0] = 0, 0, 1.0


def promised(data, epochs=1, batch_size=4):
    """Return what a plain loop gets, sample after sample."""
    return [
        torch.stack([data[index] for index in range(start, min(start + batch_size, len(data)))])
        for _ in range(epochs)
        for start in range(0, len(data), batch_size)
    ]


def same(left, right):
    """Say whether two lists of batches are equal bit for bit."""
    return len(left) == len(right) and all(map(torch.equal, left, right))


def batches_of(data, placement, epochs=1, **arguments):
    """Return what the Trainer trains on, cloned, with what was warned of."""
    seen, model = [], torch.nn.Linear(2, 1)

    def step(model, batch):
        seen.append(batch.clone())
        return model(batch).square().mean() * 1e-6

    trainer = Trainer(
        max_epochs=epochs, run_dir=None, enable_progress_bar=False, device="cpu", placement=placement, **arguments
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        result = trainer.fit(model, optimizer, data, step=step, batch_size=4)
    return seen, [str(each.message) for each in caught], result.placement


@pytest.mark.parametrize("placement", ["auto", "inline", "thread"])
@pytest.mark.parametrize("kind", [*FUNCTIONS_OF_INDEX, *IN_ORDER])
def test_state_gives_the_batches_of_a_plain_loop(kind, placement):
    """Whatever a dataset keeps, each place trains on what a plain loop would have."""
    reset()
    with closing(kind()) as data:
        expected = promised(data, epochs=3)
    reset()
    with closing(kind()) as data:
        found, _, _ = batches_of(data, placement, epochs=3, num_workers=3)
    assert same(found, expected)


@pytest.mark.parametrize("kind", [*FUNCTIONS_OF_INDEX, *IN_ORDER])
def test_state_in_processes_is_that_of_a_plain_loop_or_refused(kind):
    """Processes get a copy: what moves stays in the loop, with a warning, and another table ends the run."""
    reset()
    with closing(kind(256)) as data:
        expected = promised(data)
    reset()
    found = []
    with warnings.catch_warnings(record=True) as caught, closing(kind(256)) as data:
        warnings.simplefilter("always")
        try:
            with Loader(data, batch_size=4, placement="process", num_workers=2) as loader:
                loader._inbound.start_processes(2)
                loader._inbound._processes.wait_until_ready()
                for batch in loader:
                    found.append(batch.clone())
        except PipelineError as error:
            refusal = str(error)
        else:
            refusal = ""
    assert same(found, expected[: len(found)])
    assert len(found) == len(expected) or refusal
    if kind in IN_ORDER:
        assert refusal or any("with the same numbers" in str(each.message) for each in caught)
    else:
        assert not refusal or kind is Tabled
