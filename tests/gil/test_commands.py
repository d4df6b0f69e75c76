"""The commands: census, run, check."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.gil.census import Case, Census, cases, measure
from pipeline.gil.census.measure import call_many, statement_many, verdict_of
from pipeline.gil.command import main
from pipeline.gil.measuring.selftest import hold_gil as hold
from pipeline.gil.measuring.selftest import release_gil as release
from pipeline.gil.script import named_threads, split_arguments
from pipeline.gil.torch_stages import torch_stages

FIELDS = {
    "name",
    "held_ratio",
    "held_low",
    "held_high",
    "time_per_call_us",
    "handoffs_per_call",
    "neighbour_slowdown",
    "slowdown_beside_python",
    "verdict",
}
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def short_reference(monkeypatch):
    """Give the census a reference step that needs no torch."""
    from pipeline.gil.census import census_command as command

    monkeypatch.setattr(command, "reference_step", lambda: ("a hash", measure._hash_step))


@pytest.mark.parametrize(("call", "verdict"), [(hold, "holds"), (release, "releases")])
def test_the_census_tells_a_call_that_holds_from_one_that_releases(call, verdict):
    """With the share, its interval and the time of a call."""
    with Census(0.2, measure._hash_step) as census:
        row = census.measure("call", call_many(lambda: call(2000)))
    assert row.verdict == verdict
    assert row.held_low <= row.held_ratio <= row.held_high
    assert row.time_per_call_us > 2000
    assert row.neighbour_slowdown > 0


@pytest.mark.parametrize(
    ("held", "verdict"),
    [(1.0, "holds"), (0.9, "holds"), (0.89, "mixed"), (0.1, "mixed"), (0.09, "releases"), (None, "unknown")],
)
def test_verdicts(held, verdict):
    """From 90 % held on it holds, below 10 % it releases."""
    assert verdict_of(held) == verdict


def test_statements_mean_what_they_mean_to_timeit():
    """Setup runs once, names live on between calls, the statement runs as often as asked."""
    import builtins

    builtins._seen = seen = []
    try:
        run_many = statement_many("x += 1\nseen.append(x)", "import builtins\nx = 0\nseen = builtins._seen")
        run_many(2)
        run_many(1)
    finally:
        del builtins._seen
    assert seen == [1, 2, 3]


def test_json_alone_is_on_standard_output(capfd, short_reference):
    """Whatever the measured code prints goes to standard error, that of C code and children too."""
    statement = "print('noise'); os.write(1, b'raw'); time.sleep(0.01)"
    code = main(["census", "--json", "--seconds", "0.05", "--setup", "import os, time", "--stmt", statement])
    captured = capfd.readouterr()
    (row,) = json.loads(captured.out)
    assert code == 0
    assert set(row) == FIELDS
    assert "noise" in captured.err
    assert "raw" in captured.err


def test_the_table_has_a_row_for_each(capfd, short_reference):
    """Printed as they are found, under a head."""
    main(["census", "--seconds", "0.05", "--only", "sleep", "--only", "json.dumps"])
    out = capfd.readouterr().out
    assert "callable" in out
    assert "time.sleep(1 ms)" in out
    assert "json.dumps and loads" in out


def test_a_function_of_ones_own(capfd, short_reference):
    """MODULE:FUNCTION, with dots after the colon."""
    assert main(["census", "--json", "--seconds", "0.05", "datetime:datetime.now"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["name"] == "datetime:datetime.now"


def test_a_case_that_fails_is_named_and_the_others_go_on(capfd, short_reference):
    """The exit code says that not all were measured."""
    code = main(["census", "--json", "--seconds", "0.05", "--stmt", "1 / 0", "--stmt", "len('x')"])
    captured = capfd.readouterr()
    assert code == 1
    assert [row["name"] for row in json.loads(captured.out)] == ["len('x')"]
    assert "failed: 1 / 0: ZeroDivisionError" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing like it"], "no case has 'nothing like it'"),
        (["json"], "is no MODULE:FUNCTION"),
        (["json:nothing"], "json:nothing was not found"),
        (["nosuchmodule:f"], "was not found"),
        (["sys:path"], "must be callable"),
        (["--setup", "x = 1"], "--setup goes with --stmt"),
        (["--stmt", "x ="], "<stmt> does not compile"),
        (["--seconds", "0"], "--seconds must be above 0"),
    ],
)
def test_mistakes_on_the_command_line_are_said(arguments, message, capfd):
    """One line on standard error, exit code 2."""
    assert main(["census", *arguments]) == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_what_is_not_installed_is_listed(capfd, monkeypatch):
    """With the package that it needs."""
    monkeypatch.setattr(
        cases, "standard_cases", lambda: [Case("none", ("no_such_package",), contextlib.nullcontext)]
    )
    assert main(["census", "--list"]) == 0
    assert "none   needs no_such_package" in capfd.readouterr().out


def test_check_says_how_the_gil_is_sampled(capfd):
    """The back end, and that the self-test passed."""
    assert main(["check"]) == 0
    assert "back end: " in capfd.readouterr().out


@pytest.mark.parametrize(
    ("given", "options", "rest"),
    [
        (["a.py", "--json", "x"], ["a.py"], ["--json", "x"]),
        (["--json", "x", "a.py", "-v"], ["--json", "x", "a.py"], ["-v"]),
        (["-m", "mod", "--help"], ["-m", "mod"], ["--help"]),
        (["--trace", "t", "-m", "mod", "1"], ["--trace", "t", "-m", "mod"], ["1"]),
        (["--help"], ["--help"], []),
        ([], [], []),
    ],
)
def test_the_scripts_options_are_its_own(given, options, rest):
    """Everything behind the script, or behind -m MODULE."""
    assert split_arguments(given) == (options, rest)


def run_script(text, *arguments, options=()):
    Path("script.py").write_text(text)
    command = [sys.executable, "-m", "pipeline.gil", "run", *options, "script.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=own_environment())


def own_environment():
    import os

    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def test_a_script_runs_as_it_is():
    """Its arguments, its name, its standard output and its exit code are its own; torch is not imported."""
    done = run_script(
        "import sys\nprint(sys.argv, __name__, 'torch' in sys.modules, sys.path[0])\nraise SystemExit(7)",
        "--json",
        "-x",
    )
    assert done.returncode == 7
    assert done.stdout == f"['script.py', '--json', '-x'] __main__ False {Path.cwd()}\n"
    assert "GIL account of" in done.stderr


def test_a_script_that_fails_shows_its_own_traceback():
    """Without our frames, with exit code 1, and the report all the same."""
    done = run_script("def f():\n    raise ValueError('mine')\nf()")
    assert done.returncode == 1
    assert "ValueError: mine" in done.stderr
    assert "runpy" not in done.stderr.partition("GIL account of")[0]
    assert "GIL account of" in done.stderr


def test_a_script_that_forks_reports_once():
    """The child of a fork leaves without a report."""
    done = run_script("import os\nif os.fork():\n    os.wait()\n")
    assert done.stderr.count("GIL account of") == 1


def test_threads_of_a_script_are_listed_by_name_and_functions_by_place():
    """Those that have ended too; JSON and trace are written where they are asked for."""
    text = """
import threading, time

def tokenize():
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        sum(range(1000))

thread = threading.Thread(target=tokenize, name="tokenizer")
thread.start()
thread.join()
"""
    done = run_script(text, options=["--json", "report.json", "--trace", "trace.json"])
    report = json.loads(Path("report.json").read_text())
    held = {share["thread"]: share["held_ratio"] for share in report["stages"]}
    assert held["tokenizer"] > 0.5
    assert report["functions"][0]["function"] == "tokenize"
    assert "tokenize (" in done.stderr
    assert json.loads(Path("trace.json").read_text())["traceEvents"]


def test_a_missing_script_is_said():
    """Before anything is started."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.gil", "run", "nothing.py"],
        capture_output=True,
        text=True,
        env=own_environment(),
    )
    assert done.returncode == 2
    assert done.stderr == "error: nothing.py is no file.\n"


TRAINING = """
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
optimizer = torch.optim.AdamW(model.parameters())
data = TensorDataset(torch.randn(4096, 256), torch.randint(0, 10, (4096,)))
for _ in range(4):
    loader = DataLoader(data, batch_size=32, num_workers=2, pin_memory=torch.cuda.is_available())
    for inputs, target in loader:
        torch.nn.functional.cross_entropy(model(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
"""


def test_the_stages_of_torch_are_recognised():
    """In a plain loop with a DataLoader of two processes, which marks nothing itself."""
    done = run_script(TRAINING, options=["--json", "report.json"])
    assert done.returncode == 0, done.stderr
    stages = {share["stage"] for share in json.loads(Path("report.json").read_text())["stages"]}
    assert {"import torch", "dataloader", "forward", "backward", "optimizer"} <= stages


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # torch's, of Python 3.13.0
def test_stages_of_torch_leave_nothing_behind():
    """What was wrapped is as it was; compiled models, nested calls and errors go through."""
    import torch

    before = (torch.nn.Module.__call__, torch.autograd.backward)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    with torch_stages():
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(torch.ones(2, 4)), model(torch.ones(2, 4)))
        model(torch.ones(2, 4)).sum().backward()
        torch.optim.SGD(model.parameters()).step()
        with pytest.raises(RuntimeError):
            model(torch.ones(2, 5))
    assert (torch.nn.Module.__call__, torch.autograd.backward) == before


def test_named_threads_put_the_profile_hook_back():
    """It is the script's to use."""
    before = threading.getprofile()
    with named_threads():
        assert threading.getprofile() is not before
    assert threading.getprofile() is before
