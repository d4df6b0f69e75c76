"""The checkpoint's file: exact, atomic, checked, read without running code, and readable by others."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import io
import json
import math
import os
import pathlib
import pickle
import signal
import typing
import uuid
import zoneinfo

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import CheckpointError, SimulatedBackend
from pipeline.checkpoint import (
    CheckpointFolder,
    load_checkpoint,
    load_model,
    pack,
    save_checkpoint,
    write_file,
)
from pipeline.checkpoint import __main__ as command
from pipeline.device import Snapshotter
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
    assert same(found["number"], np.float32(0.5))


class Enough(str, enum.Enum):  # noqa: UP042  (as users write it)
    YES = "yes"


VALUES = {
    "frozenset": frozenset([1, 2]),
    "deque": collections.deque([1, (2,)], maxlen=3),
    "range": range(1, 9, 2),
    "ordered": collections.OrderedDict(b=1, a=torch.ones(2)),
    "default": collections.defaultdict(list, a=[1]),
    "no default": collections.defaultdict(None, {(1, "a"): 2}),
    "date": datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
    "zone": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "day": datetime.date(2026, 1, 2),
    "time": datetime.time(1, 2, 3),
    "span": datetime.timedelta(-1, microseconds=3),
    "path": pathlib.Path("a/b"),
    "decimal": decimal.Decimal("0.1"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=7),
    "bytearray": bytearray(b"ab"),
    "size": torch.Size([2, 3]),
    "dtype": torch.bfloat16,
    "big": -(1 << 2000),
    "device": torch.device("cpu"),
    "complex": complex(1, math.inf),
    "none": {None: 1, 2.5: (), True: frozenset()},
    "texts": np.array(["a", "bcd"]),
    "days": np.array(["2026-01-02"], dtype="datetime64[D]"),
    "records": np.array([(1, 2.5)], dtype=[("a", ">i4"), ("b", "f8")]),
    "swapped": np.arange(3, dtype=">f4"),
    "wide": np.arange(3, dtype=np.longdouble),
    "complex array": np.arange(3) * 1j,
    "zero": np.array(3.5),
    "turned array": np.arange(6).reshape(2, 3).T[::-1],
    "of NumPy": np.datetime64("2026-01-02"),
    "half of NumPy": np.float16(0.1),
    "float of NumPy": np.float64(0.1),
    "byte of NumPy": np.uint8(250),
    "complex of NumPy": np.complex64(1 - 2j),
    "truth of NumPy": np.bool_(True),
    "record of NumPy": np.array([(1, 2.5)], dtype=[("a", ">i4"), ("b", "f8")])[0],
    "number as a key": {np.int64(3): 1},
}


@pytest.mark.parametrize("name", VALUES)
def test_what_a_callback_or_a_scheduler_may_keep_comes_back(tmp_path, name):
    """With its type; made again by nobody's code."""
    save_checkpoint(tmp_path / "a.safetensors", {"model": {}, "value": [VALUES[name]]})
    (found,) = load_checkpoint(tmp_path / "a.safetensors")["value"]
    assert type(found) is type(VALUES[name])
    if isinstance(found, np.ndarray):
        assert same(found, VALUES[name])
    else:
        assert repr(found) == repr(VALUES[name])
    if isinstance(found, collections.deque):
        assert found.maxlen == 3


def test_numbers_and_texts_of_other_types_are_pythons(tmp_path):
    """NumPy's texts, and what an enum has; a file like an open one keeps its bytes."""
    values = [np.bytes_(b"x"), np.str_("y"), Enough.YES, signal.SIGTERM]
    save_checkpoint(tmp_path / "a.safetensors", {"model": {}, "value": values, "file": io.BytesIO(b"abc")})
    found = load_checkpoint(tmp_path / "a.safetensors")
    assert all(map(same, found["value"], [b"x", "y", "yes", 15]))
    assert found["file"].getvalue() == b"abc"


class Place(typing.NamedTuple):
    step: int
    values: torch.Tensor


def test_a_named_tuple_keeps_its_names(tmp_path):
    """Not its class, for which code would have to be run."""
    place = Place(3, torch.ones(2))
    save_checkpoint(tmp_path / "a.safetensors", {"model": {}, "value": [place]})
    (found,) = load_checkpoint(tmp_path / "a.safetensors")["value"]
    assert (type(found).__name__, found._fields) == ("Place", ("step", "values"))
    assert found.step == 3
    assert torch.equal(found.values, place.values)


VIEWS = {
    "expanded": lambda: torch.arange(3.0).expand(4, 3),
    "overlapping": lambda: torch.arange(10.0).unfold(0, 4, 1),
    "a column": lambda: torch.randn(300, 300)[:, 7],
    "every third": lambda: torch.arange(20.0)[::3],
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_takes_the_memory_of_its_own_elements(tmp_path, name):
    """It comes back with its values; neither with gaps nor with elements that share a place."""
    value = VIEWS[name]()
    save_checkpoint(tmp_path / "a.safetensors", {"model": {}, "value": value})
    found = load_checkpoint(tmp_path / "a.safetensors")["value"]
    assert torch.equal(found, value)
    assert found.is_contiguous()
    assert found.untyped_storage().nbytes() == 4 * value.numel()


def test_a_time_whose_zone_would_be_lost_is_refused():
    """As a date and time is; what has an offset of its own is kept."""
    zone = zoneinfo.ZoneInfo("UTC")
    for value in (datetime.time(1, tzinfo=zone), datetime.datetime(2026, 1, 2, tzinfo=zone)):
        with pytest.raises(CheckpointError, match=r"a is a (date)?time"):
            pack({"a": value}, {})
    assert pack({"a": datetime.time(1, tzinfo=datetime.UTC)}, {})


def quantized(kind):
    if kind == "tensor":
        return torch.quantize_per_tensor(torch.randn(3, 2), 0.1, 2, torch.quint8)
    scales, points = torch.tensor([0.1, 0.2]), torch.tensor([0, 3])
    return torch.quantize_per_channel(torch.randn(3, 2), scales, points, 1, torch.qint8)


def uncoalesced():
    return torch.sparse_coo_tensor([[0, 2, 0]], torch.randn(3, 2), (4, 2))


ODD = {
    "coo": uncoalesced,
    "coalesced": lambda: uncoalesced().coalesce(),
    "empty coo": lambda: torch.zeros(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "csc": lambda: torch.eye(3).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "bsc": lambda: torch.eye(4).to_sparse_bsc((2, 2)),
    "quantized": lambda: quantized("tensor"),
    "by channel": lambda: quantized("channel"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)], layout=torch.jagged),
    "conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(3)._neg_view(),
    "turned complex": lambda: torch.randn(3, 4, dtype=torch.complex128).t(),
    "half": lambda: torch.tensor(True),
    "empty odd": lambda: torch.empty(0, 2, dtype=torch.complex128),
    "sparse complex": lambda: torch.eye(3, dtype=torch.complex128).to_sparse(),
    **{
        str(dtype): lambda dtype=dtype: torch.randn(2, 3).mul(50).abs().to(dtype)
        for dtype in (
            torch.uint16,
            torch.uint32,
            torch.uint64,
            torch.float16,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.float8_e4m3fnuz,
            torch.float8_e5m2fnuz,
            torch.complex32,
            torch.complex64,
            torch.complex128,
        )
    },
    "float8_e8m0fnu": lambda: torch.arange(4, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    "float4": lambda: torch.arange(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    **{
        f"0-dim {dtype}": lambda dtype=dtype: torch.tensor(1.5).to(dtype)
        for dtype in (torch.float8_e5m2, torch.uint16, torch.complex128)
    },
}


def bits(tensor):
    """Return a tensor's values as bytes, for those that nothing can be compared with."""
    if tensor.is_nested:
        return [bits(each) for each in tensor.unbind()]
    if tensor.layout is not torch.strided:
        parts = (
            [tensor._indices(), tensor._values()] if tensor.layout is torch.sparse_coo else [tensor.values()]
        )
        return [bits(each) for each in parts]
    if tensor.is_quantized:
        return [bits(tensor.int_repr()), tensor.qscheme(), tensor.dequantize().tolist()]
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).tolist()


@pytest.mark.filterwarnings(
    "ignore:Sparse", "ignore:The PyTorch API of nested", "ignore:.*are deprecated", "ignore:ComplexHalf"
)
@pytest.mark.parametrize("is_off_loop", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_tensors_of_every_kind_come_back(tmp_path, name, is_off_loop):
    """Sparse, quantized, nested, of odd dtypes: bit for bit, with their layout."""
    tensor, tensors = ODD[name](), {}
    structure = pack({"model": {}, "value": tensor}, tensors)
    if is_off_loop:
        tensors = Snapshotter(SimulatedBackend()).copy(tensors).resolve()
    write_file(tmp_path / "a.safetensors", tensors, structure)
    found = load_checkpoint(tmp_path / "a.safetensors")["value"]
    assert (found.dtype, found.layout, found.is_nested) == (tensor.dtype, tensor.layout, tensor.is_nested)
    assert bits(found) == bits(tensor)
    if not tensor.is_nested and tensor.layout is torch.strided:
        assert (found.shape, found.stride()) == (tensor.shape, tensor.stride())
    if tensor.layout is torch.sparse_coo:
        assert (found.shape, found.is_coalesced()) == (tensor.shape, tensor.is_coalesced())


def test_a_module_that_has_seen_no_batch_is_held_too(tmp_path):
    """Its parameters have no values yet, before and after."""
    save_checkpoint(tmp_path / "a.safetensors", {"model": torch.nn.LazyLinear(3).state_dict()})
    model = torch.nn.LazyLinear(3)
    load_model(tmp_path / "a.safetensors", model)
    assert isinstance(model.weight, torch.nn.UninitializedParameter)
    model(torch.ones(2, 4))


def test_indices_of_a_sparse_tensor_are_checked(tmp_path):
    """Those of a file that somebody made up may point anywhere."""
    tensors = {}
    structure = pack({"model": {}, "value": uncoalesced()}, tensors)
    tensors["value.indices"] = tensors["value.indices"] + 7
    write_file(tmp_path / "a.safetensors", tensors, structure)
    with pytest.raises(CheckpointError, match=r"size is inconsistent with indices|out of bounds|larger than"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_an_export_leaves_out_what_is_no_tensor(tmp_path, capsys):
    """Such as the extra state of a module."""
    safetensors = pytest.importorskip("safetensors.torch")
    path, out = tmp_path / "a.safetensors", tmp_path / "weights.safetensors"
    save_checkpoint(path, {"model": {"weight": torch.ones(2), "_extra_state": {"seen": 3}}})
    assert command.main(["export", str(path), str(out)]) == 0
    assert list(safetensors.load_file(out)) == ["weight"]
    assert "left out, as it is no tensor: _extra_state" in capsys.readouterr().err


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
    around: list = []
    around.append(around)
    rank = collections.defaultdict(lambda: 0)
    for value, message in {
        "class": (object(), "a is a object.*state_dict return tensors"),
        "function": (print, "a is a builtin_function_or_method.*leave it out"),
        "generator": (torch.Generator(), r"a is a Generator.*get_state\(\)"),
        "stateful": (
            torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)]), 1),
            r"its own state_dict\(\)",
        ),
        "objects": (np.array([None, {}]), "a is a ndarray"),
        "masked": (np.ma.masked_array([1, 2], [0, 1]), "a is a MaskedArray"),
        "meta": (torch.empty(2, device="meta"), "meta device"),
        "mkldnn": (torch.ones(2).to_mkldnn(), "a is a tensor of the layout torch._mkldnn"),
        "tensor as a key": ({torch.ones(1): 1}, "a has a tensor as a key"),
        "default": (rank, r"a is a defaultdict.*dict\(…\)"),
        "itself": (around, "does it contain itself"),
    }.values():
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            pack({"a": value}, {})


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
