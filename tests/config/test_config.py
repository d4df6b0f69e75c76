"""The command line: recipes, data, errors on one screen, sweeps that leave nothing behind."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from PIL import Image

import pipeline.train
from pipeline import ConfigError, Datasets
from pipeline.config import check_config, check_overrides, config_dir, train_from_config
from pipeline.settings import Settings
from tests.conftest import alive

ROOT = Path(__file__).parents[2]
QUICK = ["+recipe=resnet", "trainer.enable_progress_bar=false", "trainer.max_epochs=1", "model.width=4",
         "trainer.limit_train_batches=3"]  # fmt: skip


def compose_config(*overrides):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def train(*overrides):
    shutil.rmtree("run", ignore_errors=True)
    return train_from_config(compose_config(*QUICK, *overrides), Path("run"))


def run_cli(*arguments, cwd, env=None):
    command = [sys.executable, "-W", "error::DeprecationWarning:pipeline", "-m", "pipeline.train", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=110)


def test_the_trainers_defaults_stand_in_its_config():
    """conf/trainer/default.yaml lists every setting with its default."""
    found = yaml.safe_load((ROOT / "conf/trainer/default.yaml").read_text())
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    for elsewhere in ("seed", "run_dir"):
        del defaults[elsewhere]
    del found["defaults"]
    assert found == {**defaults, "max_epochs": 1}


def test_a_recipe_trains_and_leaves_its_config():
    """The run folder holds the resolved config, the metrics and a checkpoint."""
    result, objective = train("seed=3")
    assert objective == result.metrics["val/accuracy"]
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (saved["seed"], saved["scheduler"]["T_max"]) == (3, 1)
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert list(Path("run/checkpoints").glob("step-*.safetensors"))


@pytest.mark.parametrize(("reason", "code"), [("max_time", 75), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_run_that_was_stopped_ends_with_a_code_of_its_own(monkeypatch, tmp_path, reason, code):
    """A cluster can tell a run that is to be resumed from one that is over."""
    stopped = types.SimpleNamespace(stop_reason=reason)
    monkeypatch.setattr("pipeline.train.train_from_config", lambda config, run_dir: (stopped, 1.0))
    monkeypatch.setattr("sys.argv", ["train", f"hydra.run.dir={tmp_path}/run"])
    with pytest.raises(SystemExit) as caught:
        pipeline.train.main()
    assert caught.value.code == code


def test_a_run_that_is_stopped_and_resumed_is_the_run(tmp_path):
    """The command line's max_time and resume=auto; what resume=auto needs is asked for."""
    whole, objective = train_from_config(compose_config(*QUICK), tmp_path / "whole")
    cut = compose_config(*QUICK, "trainer.max_time=1e-6")
    assert train_from_config(cut, tmp_path / "cut")[0].stop_reason == "max_time"
    again = compose_config(*QUICK, "trainer.resume=auto")
    result, found = train_from_config(again, tmp_path / "cut")
    assert result.resumed_from is not None
    assert (result.losses, found) == (whole.losses, objective)
    with pytest.raises(ConfigError, match=r"Name it as well: hydra\.run\.dir=runs/NAME"):
        check_overrides(["+recipe=resnet", "trainer.resume=auto"])


def test_loggers_are_chosen_by_name():
    """Several at once, with the config as hparams; what each is made of can be set."""
    train("+loggers=[csv,tensorboard]", "loggers.csv.path=mine.csv")
    assert len(Path("mine.csv").read_text().splitlines()) == 5
    (events,) = Path("run/tensorboard").iterdir()
    assert b'"batch_size": 64' in events.read_bytes()


@pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning")
@pytest.mark.parametrize(("name", "left"), [("wandb", "run/wandb"), ("mlflow", "mlflow.db")])
def test_loggers_of_other_packages_are_chosen_by_name(name, left):
    """Each leaves its files where its config says."""
    train(f"+loggers={name}")
    assert Path(left).exists()


@pytest.mark.parametrize("schedule", ["textbook", "overlap"])
def test_a_seed_makes_a_run_repeatable(schedule):
    """The same seed gives the same losses, in either schedule; another one gives others."""
    losses = train("seed=1", "trainer.schedule=textbook")[0].losses
    assert train("seed=1", f"trainer.schedule={schedule}")[0].losses == losses
    assert train("seed=2", f"trainer.schedule={schedule}")[0].losses != losses


def test_the_model_takes_its_shape_from_the_data():
    """Channels and classes come from the data, whatever they are."""
    result, _ = train(
        "data=synthetic", "data.input_shape=[2,8,8]", "data.num_classes=7", "data.num_samples=64"
    )
    assert result.num_steps == 1


def test_folders_of_images_are_decoded_and_augmented(tmp_path):
    """JPEGs in root/train/<class> and root/val/<class>, with the same losses in either schedule."""
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(3):
                pixels = torch.randint(0, 256, (40, 30, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / part / name / f"{number}.jpg")
    arguments = ["data=imagefolder", f"data.root={tmp_path}", "data.image_size=16", "batch_size=2"]
    losses = [train(*arguments, f"trainer.schedule={name}")[0].losses for name in ("textbook", "overlap")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=cifar10"], "data.root is missing. Type data.root="),
        (["data=cifar10", "data.root=/nowhere"], "CIFAR10('/nowhere', download=True)"),
        (["data=imagefolder", "data.root=/nowhere"], "but /nowhere/train is not such a folder"),
        (["+trainer.seed=3"], "trainer.seed is set elsewhere. Type seed="),
        (["+colour=red"], "colour is not a key of the config"),
        (["model._target_=nonsense.build"], "model cannot be built"),
        (["scheduler_interval=day"], "scheduler_interval must be step or epoch, got 'day'"),
        (["trainer.max_steps=5"], "trainer.max_epochs=1 and max_steps=5 contradict"),
        (["trainer.max_steps=5", "trainer.max_epochs=null"], "scheduler.T_max is null"),
        (["objective=val/f1"], "objective must be one of"),
    ],
)
def test_a_mistake_is_an_error_on_one_screen(arguments, message):
    """What is wrong, and what to type."""
    with pytest.raises(ConfigError) as caught:
        train(*arguments)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) < 5


def test_a_seed_that_cannot_be_is_named_as_it_is_typed():
    """It is a key of its own, and not one of the trainer's."""
    with pytest.raises(ConfigError, match=r"^seed must be between 0 and"):
        train("seed=-1")


def test_every_mistake_is_named_at_once():
    """Unknown keys and wrong types, with the keys that a user types."""
    with pytest.raises(ConfigError) as caught:
        check_config(
            compose_config(
                "+recipe=resnet", "trainer.max_epoch=3", "trainer.precision=half", "batch_size=big"
            )
        )
    assert caught.value.problems == (
        "batch_size must be an integer, got 'big'.",
        "trainer.precision must be 32-true, bf16-mixed, 16-mixed, got 'half'.",
        "trainer.max_epoch is not a setting. Did you mean max_epochs?",
    )


def test_no_recipe_is_an_error_that_lists_them():
    """Without a recipe there is nothing to train."""
    with pytest.raises(ConfigError, match=r"Type \+recipe=NAME; there are: resnet"):
        check_config(compose_config())


def knobs():
    found = alive()
    del found["shared memory"]  # other programs' too; what this one leaves is looked for after each test
    return {
        **found, "switch interval": sys.getswitchinterval(), "gc": (gc.isenabled(), gc.get_threshold()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "intra-op threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }  # fmt: skip


@pytest.mark.parametrize("schedule", ["textbook", "overlap"])
def test_ten_jobs_in_one_process_leak_nothing(schedule, monkeypatch, capsys):
    """After each job of a sweep everything is as before: threads, files, switch interval, GC, signals."""
    seen, before = [], knobs()
    original = pipeline.train.train_from_config

    def watched(config, run_dir):
        found = original(config, run_dir)
        seen.append((config.optim.lr, config.seed, found[1], knobs()))
        return found

    monkeypatch.setattr(pipeline.train, "train_from_config", watched)
    arguments = ["train", "-m", *QUICK, f"trainer.schedule={schedule}", "trainer.deterministic=true",
                 "optim.lr=0.1,0.01", "seed=1,2,3,4,5", "hydra.sweep.dir=sweep"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    pipeline.train.main()
    assert [(lr, seed) for lr, seed, _, _ in seen] == [
        (lr, seed) for lr in (0.1, 0.01) for seed in range(1, 6)
    ]
    assert all(math.isfinite(objective) for _, _, objective, _ in seen)
    for *_, after in seen:
        assert after == before
    assert len(list(Path("sweep").glob("*/metrics.jsonl"))) == 10
    assert capsys.readouterr().out.count("images/s") == 10


def test_help_says_what_can_be_typed(tmp_path):
    """--help shows examples, groups and settings; nothing is written."""
    done = run_cli("--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("python -m pipeline.train +recipe=resnet", "max_epochs: 1", "data.root="):
        assert words in done.stdout


@pytest.mark.parametrize("buffering", ["", "1"])
def test_help_that_nobody_reads_to_its_end_is_no_error(tmp_path, buffering):
    """As with ``--help | head -3``: nothing on standard error, whether it is met in `print` or at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.train", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": buffering},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    _, said = process.communicate(timeout=100)
    assert (said, process.returncode) in ((b"", 0), (b"", 141))
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_group_and_option():
    """The list of choices is that of the folder of configs."""
    shown = yaml.safe_load((ROOT / "conf/hydra/help/pipeline.yaml").read_text())["template"]
    for group in ("recipe", "data", "model", "optim", "scheduler"):
        (line,) = [line for line in shown.splitlines() if line.strip(" +").startswith(f"{group}=")]
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert path.stem in line


def test_overrides_of_unknown_keys_are_named_at_once():
    """What was probably meant is said, before Hydra stops at the first."""
    check_overrides(
        [
            "+recipe=resnet",
            "-m",
            "~scheduler",
            "optim.lr=1,2",
            "hydra.run.dir=x",
            "data=digits",
            "--config-dir",
            "mine",
            "--config-dir=mine",
        ]
    )
    with pytest.raises(ConfigError) as caught:
        check_overrides(["max_epochs=3", "batchsize=8", "recipe=resnet", "colour=red"])
    assert caught.value.problems[:3] == (
        "max_epochs is not a key of the config. Did you mean trainer.max_epochs?",
        "batchsize is not a key of the config. Did you mean batch_size?",
        "recipe is not a key of the config. Did you mean +recipe?",
    )
    assert caught.value.problems[3].startswith("colour is not a key of the config. There are: seed, ")


def test_a_scheduler_can_be_left_out():
    """With ~scheduler a recipe trains at the optimizer's learning rate, for a number of steps."""
    result, _ = train("~scheduler", "trainer.max_steps=2", "trainer.max_epochs=null")
    assert (result.num_steps, result.metrics["train/lr"]) == (2, 0.1)


def test_an_error_ends_the_process_with_code_two(tmp_path):
    """The message goes to standard error, without a traceback."""
    done = run_cli("+recipe=resnet", "trainer.max_epoch=1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: trainer.max_epoch is not a setting. Did you mean max_epochs?\n"


class Pictures(torch.utils.data.IterableDataset):
    """Twenty small ones, which split themselves."""

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        shard, num_shards = (0, 1) if info is None else (info.id, info.num_workers)
        for number in range(shard, 20, num_shards):
            yield torch.full((1, 8, 8), number / 20), number % 10


def pictures(**_):
    """Return them as a recipe's data."""
    return Datasets(Pictures(), None, (1, 8, 8), 10)


@pytest.mark.parametrize(("num_shards", "num_batches"), [(1, 5), (2, 6)])
def test_a_recipes_iterable_data_may_have_shards(num_shards, num_batches, tmp_path, monkeypatch):
    """Ten samples each make three batches of four; twenty make five."""
    monkeypatch.chdir(tmp_path)
    result, _ = train(
        f"data._target_={__name__}.pictures", "shuffle=false", "batch_size=4", f"num_shards={num_shards}",
        "trainer.limit_train_batches=null", "objective=train/epoch_loss",
    )  # fmt: skip
    assert result.num_steps == num_batches


MINE = """
import torch
from torch.utils.data import TensorDataset
from pipeline import Datasets

def data(num_samples):
    inputs = torch.randn(num_samples, 5)
    return Datasets(TensorDataset(inputs, (inputs[:, 0] > 0).long()), None, (5,), 2)

def build(input_shape, num_classes, hidden):
    return torch.nn.Sequential(
        torch.nn.Linear(input_shape[0], hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, num_classes)
    )
"""
RECIPE = """
# @package _global_
defaults:
  - override /optim: adamw
data: {_target_: my_package.data, num_samples: 64}
model: {_target_: my_package.build, _partial_: true, hidden: 8}
objective: train/epoch_loss
vars: {note: mine}
"""


def test_an_installed_wheel_works_in_an_empty_folder(tmp_path):
    """The wheel carries configs, recipes and digits; a recipe of one's own works beside it."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, timeout=110)
    (wheel,) = (tmp_path / "dist").glob("beltloop-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = set(archive.namelist())
    assert {"pipeline/py.typed", "pipeline/conf/config.yaml", "recipes/assets/digits.npz"} <= names
    ends = (".html", ".css", ".js", "_time.js", "_run.js")
    assert {f"pipeline/report/page/page{end}" for end in ends} <= names
    empty = tmp_path / "empty"
    (empty / "mine" / "recipe").mkdir(parents=True)
    (empty / "my_package.py").write_text(MINE)
    (empty / "mine" / "recipe" / "mine.yaml").write_text(RECIPE.lstrip())
    env = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"}
    done = run_cli(*QUICK, cwd=empty, env=env)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout
    assert len(list(empty.glob("runs/*/metrics.jsonl"))) == 1
    assert len(list(empty.glob("runs/*/report.html"))) == 1
    done = run_cli("--config-dir", "mine", "+recipe=mine", cwd=empty, env=env)
    assert done.returncode == 0, done.stderr
    assert "samples/s" in done.stdout
    done = run_cli("--info", "searchpath", cwd=empty, env=env)
    assert str(tmp_path / "site" / "pipeline" / "conf") in done.stdout
