"""What a script does to its process holds where batches are made, and what is said there is heard here."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import as_source
from pipeline.errors import ConfigError
from pipeline.workers import Processes

ROOT = Path(__file__).parents[2]
_NUMBERS = itertools.count()

HEAD = """
import collections, functools, io, os, sqlite3, sys, threading, types
import numpy as np
import torch
from torch.utils.data import Dataset
class Base(Dataset):
    def __len__(self): return 16
"""


@pytest.fixture
def make_module(tmp_path, monkeypatch):
    """Return a function that writes a module, which a process can import too, and imports it."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def make(code, name=None):
        name = name or f"made_{os.getpid()}_{next(_NUMBERS)}"
        (folder / f"{name}.py").write_text(HEAD + code)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    return make


def opened(data, *, collate_fn=None, num_workers=1, num_threads=1):
    """Return a source and its processes."""
    source = as_source(data, name="data", batch_size=4, collate_fn=collate_fn, seed=0)
    return source, Processes(source, num_workers, 60, num_threads)


def made_by_processes(data, **arguments):
    """Return a source and the batches of its first epoch, made by worker processes."""
    source, processes = opened(data, **arguments)
    try:
        assert processes.wait_until_ready()
        return source, list(processes.batches(source.open(0), 4))
    finally:
        processes.close()


def assert_same_here(source, batches):
    """Compare with what the loop thread makes."""
    reader = source.open(0)
    assert len(batches) == reader.num_batches
    for batch in batches:
        torch.testing.assert_close(batch, reader.read(), rtol=0, atol=0)


GLOBALS = {
    "a number that is set": (
        "SCALE = 1.0\nclass Data(Base):\n    def __getitem__(self, i): return torch.tensor(i * SCALE)",
        lambda made: setattr(made, "SCALE", 2.5),
    ),
    "a name that is not there at import": (
        "class Data(Base):\n    def __getitem__(self, i): return torch.tensor(i * ARGS.scale)",
        lambda made: setattr(made, "ARGS", made.types.SimpleNamespace(scale=2.5)),
    ),
    "a table drawn at import": (
        "ROWS = torch.rand(16, 3)\nclass Data(Base):\n    def __getitem__(self, i): return ROWS[i]",
        lambda made: None,
    ),
    "an array drawn at import, in a dict": (
        "T = {'rows': np.random.default_rng().random(16)}\n"
        "class Data(Base):\n    def __getitem__(self, i): return T['rows'][i]",
        lambda made: None,
    ),
    "a table of the class": (
        "class Parent(Base):\n    ROWS = torch.rand(16, dtype=torch.bfloat16)\n"
        "class Data(Parent):\n    def __getitem__(self, i): return self.ROWS[i]",
        lambda made: None,
    ),
    "an attribute of the class that is set": (
        "class Data(Base):\n    scale = 1\n    def __getitem__(self, i): return i * self.scale",
        lambda made: setattr(made.Data, "scale", 3),
    ),
    "read by a function of a function": (
        "SIZES = [1, 2]\ndef inner(i): return [each * i for each in SIZES]\n"
        "def outer(i): return sum((lambda: inner(i))())\n"
        "class Data(Base):\n    def __getitem__(self, i): return outer(i)",
        lambda made: made.SIZES.append(7),
    ),
    "read by what the dataset holds": (
        "SCALE = 1.0\ndef scale(i): return i * SCALE\nclass Data(Base):\n"
        "    def __init__(self): self.parts = {'a': [functools.partial(scale)]}\n"
        "    def __getitem__(self, i): return self.parts['a'][0](i)",
        lambda made: setattr(made, "SCALE", 2.0),
    ),
    "read by a property and a static method": (
        "SCALE = 1.0\nclass Data(Base):\n    @property\n    def one(self): return SCALE\n"
        "    @staticmethod\n    def two(): return OTHER\n"
        "    def __getitem__(self, i): return i * self.one * self.two()\nOTHER = 1",
        lambda made: (setattr(made, "SCALE", 2.0), setattr(made, "OTHER", 5)),
    ),
    "read by a cached property and by what has slots": (
        "SCALE = 1.0\nOTHER = 1\nclass Part:\n    __slots__ = ('inner',)\n"
        "    def __init__(self, inner): self.inner = inner\nclass Deep:\n    def get(self): return OTHER\n"
        "class Items(list):\n    @functools.cached_property\n    def one(self): return SCALE\n"
        "class Data(Base):\n    def __init__(self): self.items, self.part = Items(), Part(Deep())\n"
        "    def __getitem__(self, i): return i * self.items.one * self.part.inner.get()",
        lambda made: (setattr(made, "SCALE", 2.0), setattr(made, "OTHER", 5)),
    ),
    "a function that is replaced": (
        "def load(i): return i\ndef double(i): return 2 * i\n"
        "class Data(Base):\n    def __getitem__(self, i): return load(i)",
        lambda made: setattr(made, "load", made.double),
    ),
    "a method that is replaced": (
        "def double(self, i): return 2 * i\nclass Data(Base):\n    def load(self, i): return i\n"
        "    def __getitem__(self, i): return self.load(i)",
        lambda made: setattr(made.Data, "load", made.double),
    ),
    "a default drawn at import, and a changed one": (
        "def row(i, rows=torch.rand(16), *, options={'scale': 1}): return rows[i] * options['scale']\n"
        "class Data(Base):\n    def __getitem__(self, i): return row(i)",
        lambda made: made.row.__kwdefaults__["options"].update(scale=3),
    ),
    "read by a default": (
        "SCALE = 1.0\ndef scale(i): return i * SCALE\nclass Data(Base):\n"
        "    def __getitem__(self, i, scale=scale): return scale(i)",
        lambda made: setattr(made, "SCALE", 2.0),
    ),
    "a function that is replaced by a library's": (
        "def load(i): return i\nclass Data(Base):\n"
        "    def __getitem__(self, i): return load(torch.ones(2) * i)",
        lambda made: setattr(made, "load", torch.nn.functional.relu6),
    ),
    "an object of a class of the module": (
        "class Config:\n    scale = 1\nCONFIG = Config()\n"
        "class Data(Base):\n    def __getitem__(self, i): return i * CONFIG.scale",
        lambda made: setattr(made.CONFIG, "scale", 4),
    ),
}


@pytest.mark.parametrize("kind", GLOBALS)
def test_globals_are_as_the_script_has_them(make_module, kind):
    """Whatever they are, and whoever reads them: batches of processes are those of the loop thread."""
    code, change = GLOBALS[kind]
    made = make_module(code)
    change(made)
    assert_same_here(*made_by_processes(made.Data()))


def test_globals_of_another_module_and_of_a_collate_function(make_module):
    """Read by its name, from a package, inside of a function; and by what makes samples a batch."""
    make_module("SCALE = 1\nROOT = 'a'\nSHIFT = 0\n", "settings_of_mine")
    made = make_module(
        "import settings_of_mine\nclass Data(Base):\n    def __getitem__(self, i):\n"
        "        from settings_of_mine import SCALE\n        return i * SCALE + len(settings_of_mine.ROOT)\n"
        "def collate(samples): return torch.tensor(samples) + settings_of_mine.SHIFT"
    )
    mine = sys.modules["settings_of_mine"]
    mine.SCALE, mine.ROOT, mine.SHIFT = 3, "longer", 100
    assert_same_here(*made_by_processes(made.Data(), collate_fn=made.collate))


MAIN = """
import argparse, torch
from torch.utils.data import Dataset
from pipeline.data import as_source
from pipeline.workers import Processes
ROWS = torch.rand(16)
SCALE = 1.0
class Data(Dataset):
    def __len__(self): return 16
    def __getitem__(self, index): return torch.stack([ROWS[index], torch.tensor(args.scale * SCALE)])
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=float)
    args = parser.parse_args()
    SCALE = 2.0
    source = as_source(Data(), name="data", batch_size=16, collate_fn=None, seed=0)
    processes = Processes(source, 1, 60)
    assert processes.wait_until_ready()
    (found,) = processes.batches(source.open(0), 1)
    print(torch.equal(found, torch.stack([Data()[index] for index in range(16)])), found[0, 1].item())
    processes.close()
"""


@pytest.mark.parametrize("command", [["script.py"], ["-m", "script"]])
def test_globals_of_the_script_itself(tmp_path, command):
    """Set under its guard, parsed from its arguments, drawn when it is imported again."""
    (tmp_path / "script.py").write_text(MAIN)
    done = subprocess.run(
        [sys.executable, *command, "--scale", "3"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["True", "6.0"], done.stderr


REFUSED = {
    "a connection that the script opened": (
        "DB = None\nclass Data(Base):\n"
        "    def __getitem__(self, i): return DB.execute('select ?', [i]).fetchone()[0]",
        lambda made: setattr(made, "DB", made.sqlite3.connect(":memory:")),
        "DB, which is a sqlite3.Connection here.*it is .*NoneType",
    ),
    "a large table drawn at import": (
        "ROWS = torch.rand(5_000_000)\nclass Data(Base):\n    def __getitem__(self, i): return ROWS[i]",
        lambda made: None,
        r"ROWS, which is another torch\.Tensor where a process.*too large",
    ),
    "a function that nobody can import": (
        "def load(i): return i\nclass Data(Base):\n    def __getitem__(self, i): return load(i)",
        lambda made: setattr(made, "load", lambda i: 2 * i),
        "load, which",
    ),
    "a function that has the name of another": (
        "def load(i): return i\nclass Data(Base):\n    def __getitem__(self, i): return load(i)",
        lambda made: setattr(made, "load", made.functools.wraps(made.load)(lambda i: 2 * i)),
        r"load, which is <lambda>\(\) here, and where a process imports .* it is load\(\)",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_carried_is_refused_by_name(make_module, kind):
    """If a process would find something else: what it is, where, and what to do."""
    code, change, message = REFUSED[kind]
    made = make_module(code)
    change(made)
    source, processes = opened(made.Data())
    try:
        with pytest.raises(ConfigError, match=message + ".*placement=thread"):
            processes.wait_until_ready()
    finally:
        processes.close()
        if hasattr(getattr(made, "DB", None), "close"):
            made.DB.close()


ALLOWED = {
    "the same large table": (
        "ROWS = torch.arange(5e6)\nclass Data(Base):\n    def __getitem__(self, i): return ROWS[i]"
    ),
    "a lock": (
        "LOCK = threading.Lock()\nclass Data(Base):\n"
        "    def __getitem__(self, i):\n        with LOCK: return i"
    ),
    "a connection that each process opens for itself": (
        "DB = None\ndef db():\n    global DB\n"
        "    DB = DB or sqlite3.connect(':memory:', check_same_thread=False)\n    return DB\n"
        "class Data(Base):\n    def __getitem__(self, i): return db().execute('select ?', [i]).fetchone()[0]"
    ),
    "a cache that has become large": (
        "CACHE = {}\nclass Data(Base):\n    def __getitem__(self, i):\n"
        "        if i not in CACHE: CACHE[i] = b'x' * 2_000_000\n        return len(CACHE[i])"
    ),
    "an object that stands for nothing": (
        "class Nothing: pass\nNOTHING, BARE = Nothing(), object()\ndef pick(i, one=NOTHING, two=BARE):\n"
        "    return int(one is NOTHING and two is BARE) + i\n"
        "class Data(Base):\n    def __getitem__(self, i): return pick(i)"
    ),
}


@pytest.mark.parametrize("kind", ALLOWED)
def test_what_importing_gives_anyway_is_left_alone(make_module, kind):
    """It is neither refused nor replaced: other names may stand for the same object."""
    made = make_module(ALLOWED[kind])
    data = made.Data()
    data[0]
    assert_same_here(*made_by_processes(data))
    if getattr(made, "DB", None) is not None:
        made.DB.close()


def test_a_global_that_is_set_later_is_seen_by_the_next_epoch(make_module):
    """A number, as a callback may set it: the processes are then started anew."""
    made = make_module("SCALE = 1\nclass Data(Base):\n    def __getitem__(self, i): return i * SCALE")
    _, processes = opened(made.Data())
    try:
        assert not processes.is_stale()
        made.SCALE = 2
        assert processes.is_stale()
    finally:
        processes.close()


SETTINGS = """
import csv, decimal, locale, logging, socket, time, warnings
from PIL import Image, ImageFile
class Data(Base):
    def __getitem__(self, i):
        numbers = np.geterr()["divide"], np.get_printoptions()["precision"], decimal.getcontext().prec
        python = sys.getrecursionlimit(), csv.field_size_limit(), socket.getdefaulttimeout(), os.getcwd()
        mask = os.umask(0o22)
        os.umask(mask)
        images = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        logs = [logging.getLogger(each).getEffectiveLevel() for each in (None, "mine.data", "other")]
        torchs = torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision()
        rest = os.environ["SURROUNDINGS"], time.strftime("%Z"), locale.setlocale(locale.LC_ALL)
        return repr((numbers, python, mask, images, logs, torchs, rest, warnings.filters))
"""


def test_settings_of_the_process_hold_in_workers(make_module, monkeypatch, tmp_path):
    """Python's, the system's, and those of libraries that are known: a sample sees the same of them."""
    made = make_module(SETTINGS)
    monkeypatch.setattr(made.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(made.Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setenv("SURROUNDINGS", "mine")
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    before = (
        os.umask(0o077), sys.getrecursionlimit(), made.csv.field_size_limit(123_456),
        torch.get_default_dtype(), np.seterr(divide="raise"), np.get_printoptions()["precision"],
        made.decimal.getcontext().prec,
    )  # fmt: skip
    try:
        made.time.tzset()
        sys.setrecursionlimit(12_345)
        made.socket.setdefaulttimeout(7.5)
        torch.set_default_dtype(torch.float64)
        np.set_printoptions(precision=3)
        made.decimal.getcontext().prec = 7
        logging.getLogger("mine").setLevel(logging.DEBUG)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="of mine")
            source, batches = made_by_processes(made.Data())
            here = made.Data()[0]
    finally:
        os.umask(before[0])
        sys.setrecursionlimit(before[1])
        made.csv.field_size_limit(before[2])
        torch.set_default_dtype(before[3])
        np.seterr(**before[4])
        np.set_printoptions(precision=before[5])
        made.decimal.getcontext().prec = before[6]
        made.socket.setdefaulttimeout(None)
        logging.getLogger("mine").setLevel(logging.NOTSET)
        monkeypatch.delenv("TZ")
        made.time.tzset()
    assert {each for batch in batches for each in batch} == {here}


def test_another_default_device_is_refused():
    """Workers have the CPU alone."""
    torch.set_default_device("meta")
    try:
        with pytest.raises(ConfigError, match=r"set_default_device\('meta'\).*placement=thread"):
            opened(torch.utils.data.TensorDataset(torch.zeros(4, device="cpu")))
    finally:
        torch.set_default_device(None)


TALK = """
import logging, warnings
logger = logging.getLogger("mine.data")
class Data(Base):
    def __getitem__(self, i):
        logger.debug("not wanted")
        logger.info("sample %d of %s %s", i, self, "x" * 9_000)
        warnings.warn("known and silenced", UserWarning)
        warnings.warn("not known", UserWarning)
        if i == 3:
            try:
                1 / 0
            except ZeroDivisionError:
                logger.exception("cannot read", extra={"path": "a.jpg", "lock": threading.Lock()})
        return i
"""


class Kept(logging.Handler):
    """Keeps records, as no handler of another process could for this one."""

    def __init__(self):
        super().__init__()
        self.records = []

    def emit(self, record):
        self.records.append(record)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_what_is_logged_in_workers_reaches_the_scripts_handlers(make_module, tmp_path, num_threads):
    """All of it, once, filtered and formatted by them; a file is not opened again, and so not cut."""
    made, kept = make_module(TALK), Kept()
    file = logging.FileHandler(tmp_path / "mine.log", mode="w")
    file.addFilter(lambda record: "sample 5" not in record.getMessage())
    logger = logging.getLogger("mine")
    logger.setLevel(logging.INFO)
    logger.addHandler(kept)
    logger.addHandler(file)
    try:
        logger.info("before")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made_by_processes(made.Data(), num_workers=2, num_threads=num_threads)
    finally:
        logger.removeHandler(kept)
        logger.removeHandler(file)
        logger.setLevel(logging.NOTSET)
        file.close()
    records = kept.records[1:]
    assert sorted(int(each.getMessage().split()[1]) for each in records if each.levelno == 20) == [*range(16)]
    (error,) = [each for each in records if each.levelno == 40]
    assert (error.getMessage(), error.path) == ("cannot read", "a.jpg")
    assert "ZeroDivisionError" in error.exc_text
    assert {each.process for each in records}.isdisjoint({os.getpid()})
    lines = (tmp_path / "mine.log").read_text().splitlines()
    assert lines[0] == "before"
    assert sum(line.startswith("sample") for line in lines) == 15


def test_a_log_file_that_a_module_opens_is_not_cut_off(make_module, tmp_path):
    """It is imported in a process too, where nobody writes to it."""
    path = tmp_path / "mine.log"
    made = make_module(
        f"import logging\nhandler = logging.FileHandler({str(path)!r}, mode='w')\n"
        "logger = logging.getLogger('cut')\nlogger.addHandler(handler)\n"
        "class Data(Base):\n    def __getitem__(self, i):\n"
        "        logger.error('sample %d', i)\n        return i"
    )
    try:
        made.logger.error("before")
        made_by_processes(made.Data())
    finally:
        made.logger.removeHandler(made.handler)
        made.handler.close()
    assert path.read_text().splitlines() == ["before", *(f"sample {index}" for index in range(16))]


def test_what_a_worker_warns_of_is_shown_once_and_filtered_by_the_script(make_module):
    """By this process's own `showwarning`, however many workers give it."""
    made = make_module(TALK)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        warnings.filterwarnings("ignore", message="known and silenced")
        made_by_processes(made.Data(), num_workers=2)
    assert [str(each.message) for each in caught] == ["not known"]
    assert caught[0].filename == made.__file__


def test_a_warning_that_the_script_makes_an_error_is_one_in_workers(make_module):
    """It is raised where it is warned of, and reaches the loop as the dataset's own exception."""
    made = make_module(TALK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="not known")
        with pytest.raises(UserWarning, match="not known"):
            made_by_processes(made.Data())


CONTEXT = """
import decimal
HOME, TWO = os.getpid(), threading.Barrier(2)
class Data(Base):
    def __getitem__(self, i):
        if os.getpid() != HOME and i in (4, 8):
            TWO.wait(60)  # two threads of a worker make the second and the third batch
        return f"{decimal.Decimal(1) / 3} {np.geterr()['divide']} {i}"
"""


def test_settings_of_a_context_hold_on_each_thread_of_a_worker(make_module):
    """Those of decimals and of NumPy's errors, which a new thread does not have by itself."""
    made = make_module(CONTEXT)
    with made.decimal.localcontext() as context, np.errstate(divide="raise"):
        context.prec = 7
        source, batches = made_by_processes(made.Data(), num_threads=2)
        here = [made.Data()[index] for index in range(16)]
    assert [each for batch in batches for each in batch] == here


KEPT = """
import multiprocessing
class Data(Base):
    def __getitem__(self, i):
        method = multiprocessing.get_start_method()
        strategy = torch.multiprocessing.get_sharing_strategy()
        return f"{method} {strategy} {float(np.float64(sys.float_info.min) / 2)}"
"""


def test_how_processes_are_started_and_tiny_numbers_are_kept(make_module):
    """`multiprocessing`'s start method, torch's strategy, and whether denormal numbers are zero."""
    made = make_module(KEPT)
    before = torch.multiprocessing.get_sharing_strategy()
    flushes = torch.set_flush_denormal(True)
    made.multiprocessing.set_start_method("spawn", force=True)
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        _, batches = made_by_processes(made.Data())
    finally:
        made.multiprocessing.set_start_method(None, force=True)
        torch.multiprocessing.set_sharing_strategy(before)
        torch.set_flush_denormal(False)
    tiny = 0.0 if flushes else sys.float_info.min / 2
    assert {each for batch in batches for each in batch} == {f"spawn file_system {tiny}"}


def test_a_setting_that_is_changed_later_is_seen_by_the_next_epoch(make_module):
    """As a callback may do; what is imported or logged meanwhile starts no process anew."""
    made = make_module("import decimal\nclass Data(Base):\n    def __getitem__(self, i): return i")
    _, processes = opened(made.Data())
    try:
        logging.getLogger("mine").setLevel(logging.DEBUG)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert not processes.is_stale()
        with np.errstate(divide="raise"):
            assert processes.is_stale()
        assert not processes.is_stale()
    finally:
        logging.getLogger("mine").setLevel(logging.NOTSET)
        processes.close()


def test_a_level_has_the_name_that_the_script_gave_it(make_module):
    """Whoever made the record."""
    made = make_module(
        "import logging\nclass Data(Base):\n    def __getitem__(self, i):\n"
        "        logging.getLogger('mine').log(37, 'sample')\n        return i"
    )
    kept, before = Kept(), logging.getLevelName(37)
    logging.addLevelName(37, "NOTED")
    logging.getLogger("mine").addHandler(kept)
    try:
        made_by_processes(made.Data())
    finally:
        logging.getLogger("mine").removeHandler(kept)
        logging.addLevelName(37, before)
    assert {each.levelname for each in kept.records} == {"NOTED"}


TAKING = {
    "empties a file": "FILE = open({path!r}, 'w')",
    "empties it by a library": "import pathlib\npathlib.Path({path!r}).write_text('anew')",
    "removes it": "os.path.exists({path!r}) and os.remove({path!r})",
    "removes its folder": "import shutil\nshutil.rmtree(os.path.dirname({path!r}), ignore_errors=True)",
}


@pytest.mark.parametrize("kind", TAKING)
def test_what_an_import_would_take_from_the_script_is_refused(make_module, tmp_path, kind):
    """By the line that would; what the script has written is there still."""
    path = tmp_path / "results" / "mine.csv"
    path.parent.mkdir()
    code = TAKING[kind].format(path=str(path))
    made = make_module(f"{code}\nclass Data(Base):\n    def __getitem__(self, i): return i")
    path.parent.mkdir(exist_ok=True)
    path.write_text("written since")
    source, processes = opened(made.Data())
    try:
        with pytest.raises(ConfigError, match=r"its line \d+ would (empty|remove) .*placement=thread"):
            processes.wait_until_ready()
    finally:
        processes.close()
        if hasattr(made, "FILE"):
            made.FILE.close()
    assert path.read_text() == "written since"


def run_main(folder, *command):
    """Run a program in a folder."""
    return subprocess.run(
        [sys.executable, *command, "--scale", "3"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_a_package_that_is_run_is_imported_like_a_script(tmp_path):
    """`python -m` of a package, and a folder that is run."""
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__main__.py").write_text(MAIN)
    for command in (["-m", "mine"], ["mine"]):
        done = run_main(tmp_path, *command)
        assert done.stdout.split() == ["True", "6.0"], done.stderr


def test_a_module_without_a_guard_is_not_run_a_second_time(tmp_path):
    """It is refused before, however it was started: what it does at its top would be done again."""
    code = MAIN.replace('if __name__ == "__main__":', "print('begun')\nif True:")
    (tmp_path / "script.py").write_text(code)
    for command in (["script.py"], ["-m", "script"]):
        done = run_main(tmp_path, *command)
        assert done.stdout.split() == ["begun"]
        assert "which has no guard" in done.stderr


def test_a_collate_function_that_does_not_pickle_is_named():
    """And not the dataset, which does."""
    with pytest.raises(ConfigError, match="needs collate_fn in a process, but it cannot be pickled"):
        opened(torch.utils.data.TensorDataset(torch.zeros(4)), collate_fn=lambda samples: samples)


def test_a_log_call_that_is_wrong_ends_no_worker(make_module, capsys):
    """As in the script: it is said on the standard error, and the sample is made."""
    made = make_module(
        "import logging\nclass Data(Base):\n    def __getitem__(self, i):\n"
        "        logging.getLogger('mine').warning('%d', 'no number')\n        return i"
    )
    handler, logger = logging.StreamHandler(), logging.getLogger("mine")
    logger.propagate = False  # the handler of these tests raises
    logger.addHandler(handler)
    try:
        _, batches = made_by_processes(made.Data())
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    assert len(batches) == 4
    assert "Logging error" in capsys.readouterr().err
