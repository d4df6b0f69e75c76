"""Can a dataset be taken to a process, and what must be imported there first?

A class that is defined in the script that was started must be imported from it in the process, and
importing a script runs it. That is done only where the dataset needs it and the script has a guard.
"""

from __future__ import annotations

import ast
import os
import pickle
import sys
from typing import Any

from pipeline.concurrency import is_nursery, preparation
from pipeline.errors import ConfigError
from pipeline.workers.packing import Arena, Packed, pack
from pipeline.workers.process_state import Applied, ProcessState

_GUARD = """Put what the script does under a guard, so that a process can import it:

    if __name__ == "__main__":
        main()

or move the dataset to a module of its own, or set placement=thread."""


def packed_for_process(fetcher: Any, state: ProcessState) -> tuple[Packed, dict[str, Any]]:
    """Pack what makes the batches, behind the globals of its code, and find what is needed to unpack it.

    Returns:
        What unpacks to a pair, of which the second is the fetcher; and what prepares a process for that.

    Raises:
        ConfigError: If it cannot be pickled, or the process could not import it.
    """
    try:
        packed = pack((Applied(state.globals), fetcher), Arena(None))
    except Exception as error:
        raise ConfigError(describe_unpicklable(fetcher, error)) from error
    try:
        skeleton = os.pread(packed.overflow, packed.nbytes, packed.offset)
        return packed, main_preparation(skeleton)
    except BaseException:
        os.close(packed.overflow)
        raise


def main_preparation(skeleton: bytes) -> dict[str, Any]:
    """Return what a process needs before it can unpickle something.

    Args:
        skeleton: The pickled bytes.

    Raises:
        ConfigError: If it needs what only the started script has, and that cannot be imported.
    """
    prepare = preparation()
    if b"__main__" not in skeleton:
        return prepare
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or not os.path.exists(path):
        raise ConfigError(
            "placement=process needs the dataset in a process, but its class or a function of it is "
            "defined in a notebook, an interactive session or a script read from standard input, which a "
            "process cannot import. Move it to a module, or set placement=thread."
        )
    if not _is_guarded(path):
        raise ConfigError(
            f"placement=process needs the dataset in a process, but its class or a function of it is "
            f"defined in {os.path.basename(path)}, which has no guard: to import it would train again.\n"
            + _GUARD
        )
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name not in (None, "", "__main__"):  # the last is that of a folder
        return {**prepare, "init_main_from_name": spec.name}
    return {**prepare, "init_main_from_path": os.path.abspath(path)}


def describe_unpicklable(fetcher: Any, error: Exception) -> str:
    """Say what keeps a dataset out of a process: which of its attributes, or the collate function."""
    (_, dataset), (_, collate_fn) = fetcher.roots("dataset")
    where = "the dataset"
    if not _is_picklable(collate_fn):
        return (
            f"placement=process needs collate_fn in a process, but it cannot be pickled: {error}. Define it "
            "at the top of a module, or set placement=thread."
        )
    for name, value in getattr(dataset, "__dict__", {}).items():
        if not _is_picklable(value):
            where = f"the dataset's attribute {name!r} ({type(value).__name__})"
            break
    return (
        f"placement=process needs the dataset in a process, but {where} cannot be pickled: {error}. Make it "
        "in __getitem__ when it is first needed, or set placement=thread."
    )


def _is_picklable(found: Any) -> bool:
    try:
        pickle.dumps(found)
    except Exception:
        return False
    return True


def refuse_in_nursery() -> None:
    """Refuse to train in a process that only imports the script.

    Raises:
        ConfigError: If this is such a process.
    """
    if is_nursery():
        raise ConfigError("the script trains when a worker process imports it.\n" + _GUARD)


def _is_guarded(path: str) -> bool:
    with open(path, encoding="utf-8", errors="replace") as file:
        try:
            tree = ast.parse(file.read())
        except SyntaxError:
            return False  # no Python that could be imported
    tests = [node.test for node in tree.body if isinstance(node, ast.If)]
    names = [name.id for test in tests for name in ast.walk(test) if isinstance(name, ast.Name)]
    return "__name__" in names
