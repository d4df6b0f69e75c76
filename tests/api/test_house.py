"""The promises of the house: public names, docstrings, the README's example, sizes of files."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import mmap
import os
import re
import typing
from pathlib import Path

import pytest

import pipeline
from pipeline.settings import Settings
from pipeline.settings.hints import describe
from tests.conftest import alive, left_behind

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("recipes/*.py")])
TESTS = sorted(ROOT.glob("tests/**/test_*.py"))


def test_public_names_are_sorted_and_documented():
    """Everything in `__all__` is there, in order, with a docstring."""
    assert pipeline.__all__ == sorted(pipeline.__all__)
    assert all(inspect.getdoc(getattr(pipeline, name)) for name in pipeline.__all__)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_file_fits_in_a_reader(path):
    """Files stay under 300 lines."""
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_every_test_says_what_it_shows(path):
    """Each test has a docstring, and none sleeps."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "time.sleep"


def test_shared_memory_that_is_left_behind_is_seen():
    """Closed and by nobody mapped, or closed and mapped; what another program makes meanwhile is its own."""
    before = alive()
    ours, theirs = (Path(f"/dev/shm/left-by-{number}") for number in (os.getpid(), os.getppid()))
    try:
        theirs.write_bytes(bytes(16))
        assert left_behind(before) == {}
        ours.write_bytes(bytes(16))
        assert left_behind(before) == {"shared memory": {ours.name}}
    finally:
        ours.unlink(missing_ok=True)
        theirs.unlink()
    file = os.memfd_create("left")
    os.truncate(file, 16)
    with mmap.mmap(file, 16):
        os.close(file)
        assert left_behind(before).keys() == {"shared memory", "files"}  # mmap keeps a handle of its own
    assert left_behind(before) == {}


def python_blocks():
    """Return the Python examples of the README and the documents: where each is, and its code."""
    return [
        (f"{path.name}, example {number}", code)
        for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
    ]


@pytest.mark.parametrize(("name", "code"), python_blocks(), ids=[name for name, _ in python_blocks()])
def test_the_examples_run(name, code, capsys):
    """What the README and the documents show can be pasted into an empty file and run."""
    exec(compile(code, name, "exec"), {"__name__": "example"})
    assert capsys.readouterr().out


def test_every_document_of_the_loop_has_its_example():
    """The Trainer, the belts in a loop of one's own, resuming; the account, loggers, shards, callbacks."""
    names = [name.partition(",")[0] for name, _ in python_blocks()]
    assert names == [*["README.md"] * 3, "gil.md", "logging.md", "placement.md", "trainer.md"]
    assert len(python_blocks()[0][1].strip().splitlines()) <= 15


def test_links_lead_somewhere():
    """Each relative link of the documents is a file that is there."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / link).exists(), (path.name, link)


def settings_table():
    """Return the lines of the table of all settings: its text is the first sentence of each in `Settings`."""
    doc = inspect.getdoc(Settings).partition("Args:\n")[2].partition("\nRaises:")[0]
    texts = dict(re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", doc, re.DOTALL | re.MULTILINE))
    hints = typing.get_type_hints(Settings)
    lines = ["| setting | default | may be | what it does |", "|---|---|---|---|"]
    for field in dataclasses.fields(Settings):
        text = re.split(r"(?<=[.?])\s", " ".join(texts[field.name].split()), maxsplit=1)[0]
        text = text.rstrip(".").replace("``", "`")
        lines.append(f"| `{field.name}` | `{field.default!r}` | {describe(hints[field.name])} | {text} |")
    return lines


def test_the_documents_have_every_setting():
    """With its default, what it may be, and its first sentence."""
    table = "\n".join(settings_table())
    assert table in (ROOT / "docs/trainer.md").read_text(), f"docs/trainer.md should have:\n{table}"
