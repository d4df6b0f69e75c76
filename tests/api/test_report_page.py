"""The report's page in a real browser: it draws itself, and the console stays empty."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pipeline import Trainer
from pipeline.report.__main__ import main
from pipeline.report.page.render import to_html
from pipeline.report.record import Gain, RunReport, load, to_dict

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium: apt-get install chromium")


def fit(run_dir, **settings):
    data = torch.utils.data.TensorDataset(torch.randn(640, 8), torch.randint(0, 3, (640,)))
    model = torch.nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(run_dir=run_dir, enable_progress_bar=False, enable_checkpointing=False, **settings)
    trainer.fit(model, optimizer, data, loss_fn=F.cross_entropy, batch_size=8)


def drawn(page):
    """Return the page after its script has run, and what the console said."""
    profile = Path("profile").resolve()
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}", "--virtual-time-budget=2000",
        "--dump-dom", Path(page).resolve().as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console


@needs_browser
def test_the_page_of_a_run_draws_itself():
    """Lanes, stages, ceilings and the run over time are there; no error in the console."""
    fit("run", schedule="overlap")
    page, console = drawn("run/report.html")
    assert console == []
    assert 'data-drawn="yes"' in page
    assert page.count('class="segment') > 20
    assert {"loop", "prefetch", "writer"} <= set(re.findall(r">(\w+)</text>", page))
    assert page.count('class="bar"') >= 10
    assert page.count('class="line"') == 3
    for title in ("Where a step goes", "Ceilings", "Predicted by placement", "Lanes", "A step over the run"):
        assert f"<h2>{title}</h2>" in page


@needs_browser
def test_the_page_of_an_account_shades_who_holds_the_gil():
    """With a lane of its own for the GIL."""
    fit("run", schedule="overlap", gil="account", max_epochs=8)
    page, console = drawn("run/report.html")
    assert console == []
    assert 'class="segment held"' in page
    assert "GIL held by" in page


@needs_browser
def test_several_runs_are_one_page():
    """With a line for each, and the settings in which they differ."""
    fit("runs/a", schedule="textbook")
    fit("runs/b", schedule="overlap")
    main(["runs", "--html", "runs.html"])
    page, console = drawn("runs.html")
    assert console == []
    assert page.count('class="pick') == 2
    assert '<th class="text">schedule</th>' in page


@needs_browser
def test_a_measured_gain_has_a_chart():
    """With its interval."""
    fit("run", schedule="overlap")
    report = to_dict(load("run")) | {"gain": to_dict(with_gain())["gain"]}
    Path("gain.html").write_text(to_html([("run", report)]))
    page, console = drawn("gain.html")
    assert console == []
    assert "Gain, measured in this run" in page
    assert "1.50 × [1.40, 1.60]" in page


@needs_browser
def test_a_broken_page_is_noticed():
    """The check of the console can fail: a report without its fields does not draw."""
    Path("broken.html").write_text(to_html([("run", {"settings": {}})]))
    page, console = drawn("broken.html")
    assert console
    assert 'data-drawn="yes"' not in page


def with_gain():
    return RunReport({}, {}, {}, 1.0, 0.0, 1.0, gain=Gain(1.5, 1.4, 1.6, 3.0, 2.0, 1.5, 10, 8))


def test_the_page_loads_nothing():
    """No address in it but the namespace of SVG; what a user wrote cannot end its script."""
    report = to_dict(RunReport({}, {}, {}, 1.0, 0.0, 1.0, notes=("</script><b>",)))
    page = to_html([("a <run>", report)])
    assert set(re.findall(r"https?://[^\s\"'`]+", page)) == {"http://www.w3.org/2000/svg"}
    assert page.count("</script>") == 2
    assert "<title>a &lt;run&gt;</title>" in page
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?!data:)", page)
