"""What every test gets: one intra-op thread, its own folder, and a check that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from pipeline.concurrency import fork_server
from pipeline.workers.processes import MODULES

settings.register_profile("ci", deadline=None, max_examples=25, print_blob=True, derandomize=True)
settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """Let a DataLoader have two workers on one core, and Ctrl-C arrive in the background job of a shell."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "ignore:This DataLoader will create:UserWarning")


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
        "shared memory": shared_memory(),
        "files": files,
    }


def shared_memory() -> set[str]:
    """Return the shared memory that this process has mapped, and the blocks named after its number.

    All programs of a machine share the folder of named blocks, another run of these tests among them. What
    the library shares has no name: it is there as long as somebody has it open, which is a file, or mapped.
    """
    found = {name for name in os.listdir("/dev/shm") if str(os.getpid()) in re.findall(r"\d+", name)}
    for line in Path("/proc/self/maps").read_text().splitlines():
        _, _, _, _, inode, *path = line.split(maxsplit=5)
        if path and path[0].startswith(("/memfd:", "/dev/shm/")):
            found.add(f"{inode} {path[0]}")
    return found


def left_behind(before: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return what is alive and was not before, by kind."""
    after = alive()
    return {kind: left for kind in after if (left := after[kind] - before[kind])}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread, a process, a shared-memory block or an open file."""
    fork_server(MODULES)  # a test may have ended the one that all share
    before = alive()
    yield
    if left := left_behind(before):
        gc.collect()  # 0.1 s in a process with torch; what garbage holds is no leak
        for thread in threading.enumerate():  # after it: garbage may be what is to close them
            if thread.name.startswith("QueueFeederThread"):  # of a closed DataLoader: it ends by itself
                thread.join(10)
        left = left_behind(before)
    assert not left, f"left behind: {str(left)[:2000]}"
