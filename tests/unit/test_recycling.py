"""Large batches lie in memory of former ones, and are those of torch's `default_collate` all the same."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from pipeline.data.collate import collate_samples
from pipeline.data.fetch import Fetcher
from pipeline.data.recycling import MAX_FREE, MIN_BYTES, RecycledMemory

MB = 1 << 20


def bytes_of(memory, value, nbytes=MB):
    """Return a tensor in the memory, filled with a value."""
    assert memory.takes(nbytes)
    return memory.tensor(torch.Size((nbytes,)), torch.uint8).fill_(value)


def test_memory_is_used_again_once_nobody_views_it():
    """Neither while the tensor lives nor while a view of it does; a small tensor is not worth it."""
    memory = RecycledMemory(MB)
    first = bytes_of(memory, 1)
    place, view = first.data_ptr(), first[10:20].view(2, 5)
    del first
    assert bytes_of(memory, 2).data_ptr() != place
    assert view.tolist() == [[1] * 5] * 2
    del view
    kept = [bytes_of(memory, 3), bytes_of(memory, 4)]
    assert place in [each.data_ptr() for each in kept]
    assert not memory.takes(MB - 1)


def test_memory_comes_back_whenever_garbage_was_collected():
    """A lease is nobody's garbage; and what outlives the memory's owner stays valid."""
    memory = RecycledMemory(MB)
    first, place = bytes_of(memory, 1), (kept := bytes_of(memory, 2)).data_ptr()
    del kept
    gc.collect()
    kept = bytes_of(memory, 3)
    assert kept.data_ptr() == place
    gc.collect()
    assert len(kept.untyped_storage()) == MB  # and no stale bytes behind it, for whoever saves it
    owner = weakref.ref(memory)
    del memory
    assert owner() is None, "without a collection"
    assert (first.unique().tolist(), kept.unique().tolist()) == ([1], [3])


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_has_memory_of_its_own():
    """What a forked process writes to a batch is not seen here."""
    memory = RecycledMemory(MB)
    tensor = bytes_of(memory, 1)
    if (child := os.fork()) == 0:
        try:
            tensor.numpy()[:] = 2
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert tensor.unique().tolist() == [1]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 8)), max_size=40))
def test_what_is_kept_keeps_its_values(steps):
    """Whatever is kept for how long, of whichever size, nobody writes into it."""
    memory, kept = RecycledMemory(MB), []
    for value, (size, num_kept) in enumerate(steps):
        kept.append((value, bytes_of(memory, value, size * MB)))
        kept = kept[max(0, len(kept) - num_kept) :]
        for expected, tensor in kept:
            assert tensor[0] == tensor[-1] == expected
    assert len(memory._free) <= MAX_FREE


def test_threads_share_it():
    """Several take and drop at once; each finds its own values."""
    memory, wrong = RecycledMemory(MB), []

    def work(value):
        for _ in range(200):
            tensor = bytes_of(memory, value)
            wrong.extend([value] * bool((tensor != value).any()))

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


LAYOUTS = {
    "rows": lambda: torch.rand(MB // 8),
    "pictures, their channels last": lambda: torch.rand(256, 256, 3).permute(2, 0, 1),
    "films, their channels last": lambda: torch.rand(4, 128, 128, 3).permute(0, 3, 1, 2),
    "volumes, their channels last": lambda: torch.rand(2, 8, 64, 64, 3).permute(0, 4, 1, 2, 3),
    "transposed": lambda: torch.rand(400, 500).t(),
    "one for all": lambda: torch.rand(1, 500).expand(500, 500),
    "doubles": lambda: torch.rand(400, 500, dtype=torch.float64),
    "with a gradient": lambda: torch.rand(MB // 8, requires_grad=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_batch_is_that_of_default_collate(layout):
    """In values, and in strides, which decide in which order a kernel sums."""
    samples = [(LAYOUTS[layout](), number) for number in range(4)]
    memory, expected = RecycledMemory(MB), default_collate(samples)
    for _ in range(2):
        found = collate_samples(samples, memory)
        assert torch.equal(found[0], expected[0])
        assert found[0].stride() == expected[0].stride()
        assert found[0].dtype == expected[0].dtype
        assert found[0].requires_grad == expected[0].requires_grad
        del found


SIZES = iter(range(100))
ODD = {
    "sparse, far too large to be dense": lambda: torch.sparse_coo_tensor(
        [[1], [2]], [3.0], (10**6, 10**7), check_invariants=False
    ),
    "nested": lambda: torch.nested.nested_tensor([torch.rand(MB), torch.rand(3)]),
    "complex, conjugated": lambda: torch.rand(MB, dtype=torch.complex64).conj(),
    "on no device": lambda: torch.empty(10**12, device="meta"),
    "of different sizes": lambda: torch.rand(MB + next(SIZES)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_batch_is_that_of_default_collate(kind):
    """Or fails as it does; nothing is allocated for what torch does not make dense."""
    samples, found = [ODD[kind]() for _ in range(2)], []
    for collate in (partial(collate_samples, memory=RecycledMemory(MB)), default_collate):
        try:
            found.append(repr(collate(samples)))
        except Exception as error:
            found.append(repr(error))
    assert found[0] == found[1]


def test_a_default_device_is_not_where_batches_lie():
    """They are the host's, as the samples are."""
    samples = [torch.rand(MB) for _ in range(2)]
    with torch.device("meta"):
        found = collate_samples(samples, RecycledMemory(MB))
    assert torch.equal(found, torch.stack(samples))


def test_what_a_user_made_of_default_collate_is_called(monkeypatch):
    """torch lets one put a function for tensors into its map."""
    monkeypatch.setitem(default_collate_fn_map, torch.Tensor, lambda batch, *, collate_fn_map: len(batch))
    assert collate_samples([(torch.rand(MB), 1)] * 3, RecycledMemory(MB))[0] == 3


def test_mixed_types_are_promoted_as_torch_does():
    """The first sample's type is not everybody's."""
    samples = [torch.zeros(MB, dtype=torch.int64), torch.rand(MB)]
    assert torch.equal(collate_samples(samples, RecycledMemory(MB)), default_collate(samples))


@pytest.mark.parametrize("order", [[0, 2, 1], [3, 3, -1], []])
def test_rows_of_a_tensor_dataset_are_those_of_indexing(order):
    """Whatever the order, and however the tensors lie."""
    count = MIN_BYTES // 8
    tensors = torch.rand(4, count), torch.rand(count, 4).t(), torch.arange(4)
    fetcher, indices = Fetcher(TensorDataset(*tensors), None), torch.tensor(order, dtype=torch.int64)
    for _ in range(2):
        batch = fetcher.fetch(indices, 0, 0, None)
        for found, tensor in zip(batch, tensors, strict=True):
            assert torch.equal(found, tensor[indices])
            assert found.stride() == tensor[indices].stride()
        del batch, found


def test_what_has_memory_can_be_taken_to_a_process():
    """The memory stays where it is."""
    fetcher = Fetcher(TensorDataset(torch.rand(4, MIN_BYTES // 16)), None)
    kept = fetcher.fetch(torch.arange(4), 0, 0, None)
    again = pickle.loads(pickle.dumps(fetcher)).fetch(torch.arange(4), 0, 0, None)
    assert torch.equal(again[0], kept[0])
