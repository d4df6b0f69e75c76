"""The checkpoint's file: exact, atomic, checked, read without running code, and readable by others."""

from __future__ import annotations

import collections
import json
import math
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import CheckpointError
from pipeline.checkpoint import CheckpointFolder, load_checkpoint, load_model, pack, save_checkpoint
from pipeline.checkpoint import __main__ as command
from pipeline.state import TrainState

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    | st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]).map(
        lambda dtype: torch.arange(6).reshape(2, 3).to(dtype)
    )
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda each: (
        st.lists(each, max_size=4) | st.lists(each, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), each, max_size=4)
    ),
    max_leaves=12,
)  # fmt: skip


def make_state():
    model = torch.nn.Linear(2, 2)
    return TrainState(model, torch.optim.AdamW(model.parameters()))


def same(left, right):
    """Compare two trees bit for bit, types included."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.stride() == right.stride() and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (isinstance(left, float) and math.isnan(left) and math.isnan(right))


@given(TREES)
def test_whatever_is_saved_comes_back(tmp_path_factory, tree):
    """Numbers, texts, bytes, tensors, and containers of them: the same values of the same types."""
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    save_checkpoint(path, {"model": {}, "tree": tree})
    assert same(load_checkpoint(path)["tree"], tree)


def test_what_json_does_not_have_comes_back_too(tmp_path):
    """Counters, arrays, strides, empty and scalar tensors, NumPy's numbers."""
    image = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    tree = {
        "counter": collections.Counter({3: 1}), "array": np.arange(4, dtype=np.uint32), "image": image,
        "turned": torch.randn(3, 4).t(), "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "$": 1,
    }  # fmt: skip
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"model": {}, **tree, "number": np.float32(0.5)})
    found = load_checkpoint(path)
    assert all(same(found[name], each) for name, each in tree.items())
    assert same(found["number"], 0.5)


def test_names_that_would_be_the_same_are_kept_apart(tmp_path):
    """Keys with dots, and keys that differ in their type alone."""
    tree = {
        "a": {"b.c": torch.tensor(1)},
        "a.b": {"c": torch.tensor(2)},
        "d": {0: torch.tensor(3), "0": torch.tensor(4)},
    }
    save_checkpoint(tmp_path / "a.safetensors", {"model": {}, **tree})
    found = load_checkpoint(tmp_path / "a.safetensors")
    assert all(same(found[name], each) for name, each in tree.items())


def test_what_would_need_code_is_refused_by_name():
    """The message has the path of the value, and what to do."""
    with pytest.raises(CheckpointError, match=r"a\.b\.1 is a Path.*state_dict return tensors"):
        pack({"a": {"b": [1, os_path()]}}, {})
    with pytest.raises(CheckpointError, match="sparse"):
        pack({"a": torch.eye(2).to_sparse()}, {})


def os_path():
    from pathlib import Path

    class Path(type(Path())):
        pass

    return Path()


def test_the_library_of_the_format_reads_it(tmp_path):
    """The tensors are there under their names, and an export has the model's own names."""
    safetensors = pytest.importorskip("safetensors.torch")
    state = make_state()
    path, weights = tmp_path / "a.safetensors", tmp_path / "weights.safetensors"
    save_checkpoint(path, state.state_dict())
    assert torch.equal(safetensors.load_file(path)["model.weight"], state.model.weight)
    assert command.main(["export", str(path), str(weights)]) == 0
    assert safetensors.load_file(weights).keys() == state.model.state_dict().keys()
    assert command.main(["export", str(weights), str(path)]) == 2


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch, call):
    """Whatever fails on the way, the older checkpoint is still there and no half-written file is left."""
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, make_state().state_dict())
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    class Full:
        def __init__(self, handle):
            self.handle = handle

        def __enter__(self):
            return self

        def __exit__(self, *error):
            os.close(self.handle)

        write = fail

    if call == "write":
        monkeypatch.setattr(os, "fdopen", lambda handle, mode: Full(handle))
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, make_state().state_dict())
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_everything_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    """File, rename, folder: in this order."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    save_checkpoint(tmp_path / "a.safetensors", make_state().state_dict())
    assert calls == ["fsync", "replace", "fsync"]


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    """One bit anywhere, header or data, or any number of bytes missing: refused, with the file's name."""
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, make_state().state_dict())
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        altered = bytearray(whole)
        altered[place] ^= 1 << (place % 8)
        path.write_bytes(altered)
        with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be read"):
            load_checkpoint(path)
    for length in range(0, len(whole), 101):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be read"):
            load_checkpoint(path)


def test_a_foreign_file_is_named_and_runs_no_code(tmp_path):
    """A pickle, another library's file, a text: each refused with the reason."""

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "harmed"), "w"))

    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*a\.safetensors"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="something else"):
        load_checkpoint(path)
    torch.save({"model": Evil()}, path)
    with pytest.raises(CheckpointError, match="something else"):
        load_checkpoint(path)
    assert not (tmp_path / "harmed").exists()
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"1")
    with pytest.raises(CheckpointError, match="bare tensors of something else"):
        load_checkpoint(path)
    save_checkpoint(path, make_state().state_dict())
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_model(path, torch.nn.Linear(3, 3))


def save(folder, step, value=None):
    tensors = {}
    structure = pack({"model": {"w": torch.tensor([step])}, "step": step}, tensors)
    is_best = value is not None and folder.offer(step, value)
    folder.save(step, tensors, structure)
    if is_best:
        folder.keep_as_best(step)


def names(folder):
    return sorted(each.name.removesuffix(".safetensors") for each in folder.iterdir())


def test_the_newest_and_the_best_are_kept(tmp_path):
    """So many of each, whatever the others are; NaN is never best."""
    folder = CheckpointFolder(tmp_path, "max", keep_last=2, keep_best=2)
    for step, value in enumerate([1.0, 5.0, math.nan, 3.0, 2.0, None]):
        save(folder, step, value)
    assert names(tmp_path) == ["best-00000001", "best-00000003", "step-00000004", "step-00000005"]
    assert load_checkpoint(folder.best_path)["step"] == 1
    again = CheckpointFolder(tmp_path, "max", keep_last=2, keep_best=1)
    again.take_best(folder.best[:1])
    assert names(tmp_path) == ["best-00000001", "step-00000004", "step-00000005"]


def test_one_that_cannot_be_used_is_named_and_the_one_before_it_taken(tmp_path):
    """Cut off, altered or foreign; what a killed run left half-written is removed."""
    folder = CheckpointFolder(tmp_path, "min", keep_last=3)
    assert folder.newest() is None
    for step in (1, 2, 3):
        save(folder, step)
    newest = tmp_path / "step-00000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-4])
    (tmp_path / "step-00000002.safetensors").write_text("no checkpoint")
    (tmp_path / ".step-00000004.safetensors.abc.tmp").write_bytes(b"half")
    folder = CheckpointFolder(tmp_path, "min")
    with pytest.warns(UserWarning, match=r"step-0000000[23].safetensors cannot be read.*step-00000001"):
        path, found = folder.newest()
    assert (path.name, found["step"]) == ("step-00000001.safetensors", 1)
    assert names(tmp_path) == [
        "step-00000001", "step-00000002.safetensors.unusable", "step-00000003.safetensors.unusable"
    ]  # fmt: skip
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint can be used:.*00000001.*it was cut off"):
        folder.newest()
