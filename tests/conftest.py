"""What every test gets: one intra-op thread, its own folder, and a check that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from pipeline.concurrency import fork_server
from pipeline.data.processes import MODULES

settings.register_profile("ci", deadline=None, max_examples=25, print_blob=True, derandomize=True)
settings.load_profile("ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and what needs an idle machine unless asked for."""
    for item in items:
        if "quiet" in item.keywords and "quiet" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="needs an idle machine: pytest -m quiet"))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def one_intra_op_thread() -> Iterator[None]:
    """Use one thread inside operations: tests run beside others, and two cores saturate quickly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """Begin each test with torch seeded with 0, and so the data, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def warm_fork_server() -> Iterator[None]:
    """Share one fork server, which `auto` may start in any test: it imports torch for seconds."""
    fork_server(MODULES)
    yield
    fork_server(MODULES).close()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder of the test's own, where run folders may go."""
    monkeypatch.chdir(tmp_path)


def alive() -> dict[str, set[str]]:
    """Return the threads, processes, shared memory and open files of this process."""
    processes: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the thread has ended meanwhile
            processes |= set((task / "children").read_text().split())
    files = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the handle that listed the folder
        if not target.startswith(("/dev/", "/proc/")) and "site-packages" not in target:
            files.add(f"{name} {target}")
    return {
        "threads": {f"{thread.name} {thread.ident}" for thread in threading.enumerate()},
        "processes": processes,
        "shared memory": set(os.listdir("/dev/shm")),
        "files": files,
    }


def left_behind(before: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return what is alive and was not before, by kind; shared memory of other programs left out."""
    after = alive()
    left = {kind: after[kind] - before[kind] for kind in after}
    if left["shared memory"]:
        foreign = set(map(int, filter(str.isdigit, os.listdir("/proc")))) - own_processes()
        left["shared memory"] = {name for name in left["shared memory"] if is_left(name, foreign)}
    return {kind: found for kind, found in left.items() if found}


def own_processes() -> set[int]:
    """Return the numbers of this process and of all below it."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    own, count = {os.getpid()}, 0
    while count < len(own):
        count = len(own)
        own |= {process for process, parent in parents.items() if parent in own}
    return own


def is_left(name: str, foreign: set[int]) -> bool:
    """Say whether a block of shared memory may be ours: it is this user's, and no foreign process has it.

    All programs of a machine share the folder. Their semaphores appear in it at any time, and are gone at a
    second look or mapped by whoever made them.
    """
    path = Path("/dev/shm") / name
    try:
        if path.stat().st_uid != os.geteuid():
            return False
    except FileNotFoundError:
        return False
    for process in foreign:
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if f"{path}\n" in Path(f"/proc/{process}/maps").read_text():
                return False
    return True


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread, a process, a shared-memory block or an open file."""
    fork_server(MODULES)  # a test may have ended the one that all share
    before = alive()
    yield
    if left := left_behind(before):
        gc.collect()  # 0.1 s in a process with torch; what garbage holds is no leak
        left = left_behind(before)
    assert not left, f"left behind: {str(left)[:2000]}"
