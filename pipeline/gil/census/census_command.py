"""``python -m pipeline.gil census``: the table, or one's own callables and statements."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from pipeline.errors import ConfigError
from pipeline.gil.census.cases import Case, all_cases
from pipeline.gil.census.measure import (
    Census,
    CensusRow,
    RunMany,
    call_many,
    check_statement,
    describe,
    reference_step,
    statement_many,
    table_head,
    warn,
)

Subject = tuple[str, Callable[[], AbstractContextManager[RunMany]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("function", nargs="*", metavar="MODULE:FUNCTION", help="measure these instead")
    parser.add_argument(
        "--stmt",
        action="append",
        default=[],
        help="measure a statement, as timeit does; may be repeated",
    )
    parser.add_argument("--setup", "-s", action="append", default=[], help="run once before --stmt")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="cases whose name has TEXT"
    )
    parser.add_argument("--list", action="store_true", help="list the cases and what they need, and end")
    parser.add_argument("--json", action="store_true", help="print a list of rows as JSON, and nothing else")
    parser.add_argument("--seconds", type=float, default=0.3, help="how long each is sampled (0.3)")


def run(arguments: argparse.Namespace) -> int:
    """Measure what the arguments say and print it; return the exit code."""
    if arguments.seconds <= 0:
        raise ConfigError(f"--seconds must be above 0, got {arguments.seconds}.")
    if arguments.list:
        for case in all_cases():
            needs = f"   needs {', '.join(case.missing)}" if case.missing else ""
            print(f"{case.name}{needs}")
        return 0
    with clean_output(arguments.json) as emit:
        subjects = find_subjects(arguments)
        rows = measure_all(subjects, arguments.seconds, None if arguments.json else emit)
        if arguments.json:
            emit(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    return 0 if len(rows) == len(subjects) else 1


def find_subjects(arguments: argparse.Namespace) -> list[Subject]:
    """Return what is to be measured.

    Raises:
        ConfigError: If nothing has that name.
    """
    own = [*map(_function_subject, arguments.function)]
    own += [_statement_subject(each, "\n".join(arguments.setup)) for each in arguments.stmt]
    if own:
        return own
    if arguments.setup:
        raise ConfigError("--setup goes with --stmt, which is not given.")
    wanted = [text.lower() for text in arguments.only]
    cases = [case for case in all_cases() if not wanted or any(text in case.name.lower() for text in wanted)]
    if not cases:
        raise ConfigError(f"no case has {' or '.join(map(repr, arguments.only))} in its name. See --list.")
    for case in cases:
        if case.missing:
            warn(f"left out: {case.name} (needs {', '.join(case.missing)})")
    return [(case.name, _opener(case)) for case in cases if not case.missing]


def measure_all(
    subjects: list[Subject], seconds: float, emit: Callable[[str], None] | None
) -> list[CensusRow]:
    """Measure one after the other, with each row printed as it is found."""
    width = max(len(name) for name, _ in subjects)
    what, step = reference_step()
    rows = []
    with Census(seconds, step) as census:
        if census.why_not:
            warn(census.why_not)
        if emit is not None:
            emit(f"A step is {what}. Each callable runs alone, beside plain Python, and beside the step.")
            emit(table_head(width))
        for number, (name, open_subject) in enumerate(subjects):
            if emit is None:
                warn(f"{number + 1} of {len(subjects)}: {name}")
            try:
                with open_subject() as run_many:
                    rows.append(census.measure(name, run_many))
            except Exception as error:
                warn(f"failed: {name}: {type(error).__name__}: {error}")
                continue
            if emit is not None:
                emit(describe(rows[-1], width))
    return rows


@contextlib.contextmanager
def clean_output(is_json: bool) -> Iterator[Callable[[str], None]]:
    """Yield what prints to standard output; with JSON whatever else prints goes to standard error."""
    if not is_json:
        yield lambda text: print(text, flush=True)
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)  # the descriptor, so that C code and child processes are caught too
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield lambda text: _write_all(kept, text + "\n")
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _write_all(fd: int, text: str) -> None:
    data = text.encode()
    while data:
        data = data[os.write(fd, data) :]


def _opener(case: Case) -> Callable[[], AbstractContextManager[RunMany]]:
    @contextlib.contextmanager
    def open_subject() -> Iterator[RunMany]:
        with case.open() as function:
            yield call_many(function)

    return open_subject


def _function_subject(text: str) -> Subject:
    module_name, _, path = text.partition(":")
    if not path:
        raise ConfigError(f"{text!r} is no MODULE:FUNCTION. To measure a statement, use --stmt.")
    try:
        found = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the module does when it is imported
        raise ConfigError(f"{text} was not found: {type(error).__name__}: {error}.") from error
    if not callable(found):
        raise ConfigError(f"{text} must be callable without arguments, and is a {type(found).__name__}.")
    return text, lambda: contextlib.nullcontext(call_many(found))


def _statement_subject(statement: str, setup: str) -> Subject:
    try:
        check_statement(statement, setup)
    except SyntaxError as error:
        raise ConfigError(f"{error.filename} does not compile: {error.msg}: {error.text}") from error
    name = " ".join(statement.split())[:60]
    return name, lambda: contextlib.nullcontext(statement_many(statement, setup))
