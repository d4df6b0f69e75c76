"""Every backend is run for real, in both schedules, and what it wrote is read back."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import TensorDataset

from pipeline import Callback, ConfigError, Row, SimulatedBackend, Trainer
from pipeline.errors import WorkerDiedError
from pipeline.loggers import CsvLogger, InProcess, JsonlLogger, MlflowLogger, TensorBoardLogger, WandbLogger
from pipeline.protocols import RunInfo
from pipeline.testing import InMemoryLogger
from tests.contract import backends
from tests.textbook import build_model

# MLflow's mappers use an option of SQLAlchemy that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*:DeprecationWarning")

IMAGE = (torch.arange(3 * 4 * 5) % 256).to(torch.uint8).reshape(3, 4, 5)
VALUES = torch.tensor([0.0, 1.0, 1.0, 4.0])


class Showing(Callback):
    """Logs an image, a histogram and a text, and changes them at once: what is logged is a copy."""

    def on_step_finished(self, event):
        if event.state.step == 3:
            image, values = IMAGE.clone(), VALUES.clone()
            event.log_image("sample", image)
            event.log_histogram("weights", values)
            event.log_text("note", "seen at three")
            image.zero_()
            values.zero_()


def fit(loggers, *, schedule="overlap", device="simulated", fails=False, run_dir="run", **settings):
    torch.manual_seed(0)
    model = build_model("linear")
    data = TensorDataset(torch.randn(16, 6), torch.arange(16) % 3)
    trainer = Trainer(
        max_epochs=2, schedule=schedule, device=SimulatedBackend() if device == "simulated" else device,
        run_dir=run_dir, enable_progress_bar=False, enable_checkpointing=False, **settings,
    )  # fmt: skip
    calls = []

    def loss_fn(outputs, target):
        calls.append(1)
        if fails and len(calls) == 4:
            raise UserError("mine")
        return F.cross_entropy(outputs, target)

    memory = InMemoryLogger()
    result = trainer.fit(
        model, torch.optim.SGD(model.parameters(), 0.1), data, loss_fn=loss_fn, batch_size=4, val_data=data,
        callbacks=[Showing()], loggers=[memory, *loggers], hparams={"optim": {"lr": 0.1}, "name": "test"},
    )  # fmt: skip
    assert len(memory.rows) == 10
    return memory.rows, result


class UserError(Exception):
    """What only the user's own code raises."""


def expected(rows):
    """Return every number that was logged: name to {step: value}."""
    found = {}
    for row in rows:
        for name, value in row.values.items():
            found.setdefault(name, {})[row.step] = value
    return found


def read_csv(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    found = {}
    for line in lines:
        assert None not in line.values()  # as many cells as names
        for name, cell in line.items():
            if cell and name not in ("step", "epoch"):
                found.setdefault(name, {})[int(line["step"])] = float(cell)
    return found


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return events


def read_tensorboard(folder):
    events = events_of(folder)
    return {
        name: {each.step: each.value for each in events.Scalars(name)} for name in events.Tags()["scalars"]
    }


def wandb_records(folder):
    """Yield what an offline run holds: the package ships its messages, but no reader for their file.

    The file is LevelDB's log format behind seven bytes: blocks of 32 KiB, in them records with
    checksum, length and type (whole, first, middle, last).
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place < len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15  # no header fits: padding
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def read_wandb(folder):
    """Return the scalars; of an image and a text, wandb logs the size as further ones."""
    found = {}
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") != "history":
            continue
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for name, value in items.items():
            if isinstance(value, (int, float)) and not name.startswith(("_", "sample/", "note/", "epoch")):
                found.setdefault(name, {})[items["_step"]] = value
    return found


@contextlib.contextmanager
def mlflow_run():
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{Path('mlflow.db').resolve()}")
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    yield client, run
    client._tracking_client.store.engine.dispose()


def read_mlflow(folder):
    with mlflow_run() as (client, run):
        return {
            name: {each.step: each.value for each in client.get_metric_history(run.info.run_id, name)}
            for name in run.data.metrics
        }


BACKENDS = {
    "csv": (CsvLogger, read_csv),
    "tensorboard": (TensorBoardLogger, read_tensorboard),
    "wandb": (lambda: WandbLogger("tests"), read_wandb),
    "mlflow": (lambda: MlflowLogger("tests"), read_mlflow),
    "csv in a process": (lambda: InProcess(CsvLogger), read_csv),
    "mlflow in a process": (lambda: InProcess(MlflowLogger, experiment="tests"), read_mlflow),
}


@pytest.mark.parametrize("schedule", ["textbook", "overlap"])
@pytest.mark.parametrize("name", BACKENDS)
def test_what_a_backend_wrote_is_what_was_logged(name, schedule):
    """Every number of every step, epoch and validation is there once, under its name and step."""
    make, read = BACKENDS[name]
    rows, _ = fit([make()], schedule=schedule)
    found, wanted = read(Path("run")), expected(rows)
    assert found.keys() == wanted.keys()
    for metric, values in wanted.items():
        assert found[metric] == pytest.approx(values, rel=1e-6, abs=1e-6), metric


def test_several_backends_at_once():
    """All of them hear the same run, and none of them makes the loop thread read."""
    names = ["csv", "tensorboard", "wandb", "mlflow"]
    rows, result = fit([BACKENDS[name][0]() for name in names], detect_host_reads=True)
    assert result.outbound.host_reads == ()
    for name in names:
        assert BACKENDS[name][1](Path("run")).keys() == expected(rows).keys()
    assert [(each.name, each.num_rows) for each in result.outbound.loggers] == [
        (name, 10)
        for name in ("JsonlLogger", "InMemoryLogger", "CsvLogger", "TensorBoardLogger", "WandbLogger",
                     "MlflowLogger")
    ]  # fmt: skip


def test_a_number_that_is_missing_is_noticed():
    """The comparison can fail: a backend that was not told of one row differs."""

    class Forgetful(CsvLogger):
        def log(self, row):
            if row.step != 5:
                super().log(row)

    rows, _ = fit([Forgetful()])
    assert read_csv(Path("run")) != expected(rows)


@pytest.mark.parametrize("schedule", ["textbook", "overlap"])
def test_tensorboard_keeps_images_histograms_texts_and_hparams(schedule):
    """Each is read back by TensorBoard, as it was when it was logged; the settings stand beside it."""
    fit([TensorBoardLogger()], schedule=schedule)
    events = events_of(Path("run"))
    (image,) = events.Images("sample")
    assert image.step == 3
    assert np.array_equal(
        np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), IMAGE.permute(1, 2, 0)
    )
    (histogram,) = events.Histograms("weights")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.sum) == (3, 4, 6.0)
    (text,) = events.Tensors("note/text_summary")
    assert text.tensor_proto.string_val == [b"seen at three"]
    (config,) = events.Tensors("config/text_summary")
    assert b'"lr": 0.1' in config.tensor_proto.string_val[0]
    assert b'"max_epochs": 2' in config.tensor_proto.string_val[0]
    plugins = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    given = HParamsPluginData.FromString(plugins.content).session_start_info.hparams
    assert (given["optim.lr"].number_value, given["trainer.max_epochs"].number_value) == (0.1, 2)
    experiment = events.SummaryMetadata("_hparams_/experiment").plugin_data
    infos = HParamsPluginData.FromString(experiment.content).experiment.metric_infos
    assert {each.name.tag for each in infos} == {"train/epoch_loss", "val/loss"}


@pytest.mark.parametrize("schedule", ["textbook", "overlap"])
def test_wandb_keeps_media_and_the_settings(schedule):
    """The image and the histogram are in the offline run, and so are the settings."""
    fit([WandbLogger("tests")], schedule=schedule)
    history, config = {}, {}
    for record in wandb_records(Path("run")):
        for item in record.history.item:
            history["/".join(item.nested_key) or item.key] = item.value_json
        for item in (*record.run.config.update, *record.config.update):
            config["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    assert config["optim"] == {"lr": 0.1}
    assert config["trainer"]["max_epochs"] == 2
    (png,) = Path("run").glob("wandb/offline-run-*/files/media/images/sample_3_*.png")
    assert np.array_equal(np.asarray(Image.open(png)), IMAGE.permute(1, 2, 0))
    assert any("weights" in name for name in history)


def test_mlflow_keeps_the_settings_and_how_the_run_ended():
    """Parameters under names with dots; FINISHED after a run that ended, FAILED after an exception."""
    fit([MlflowLogger("tests")])
    with mlflow_run() as (_, run):
        pass
    assert (run.data.params["optim.lr"], run.data.params["trainer.max_epochs"]) == ("0.1", "2")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")


@pytest.mark.parametrize("make", ["mlflow", "mlflow in a process"])
def test_mlflow_knows_that_a_run_failed(make):
    """After an exception the run is marked, and has the rows before it."""
    with pytest.raises(UserError):
        fit([BACKENDS[make][0]()], fails=True)
    with mlflow_run() as (_, run):
        assert run.info.status == "FAILED"
    assert sorted(read_mlflow(None)["train/loss"]) == [1, 2, 3]


def test_wandb_knows_that_a_run_failed():
    """After an exception the run ends with another exit code, and has the rows before it."""
    with pytest.raises(UserError):
        fit([WandbLogger("tests")], fails=True)
    codes = [r.exit.exit_code for r in wandb_records(Path("run")) if r.WhichOneof("record_type") == "exit"]
    assert codes == [1]
    assert sorted(read_wandb(Path("run"))["train/loss"]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("logger", "module", "extra"),
    [
        (TensorBoardLogger, "tensorboard", "tensorboard"),
        (WandbLogger, "wandb", "wandb"),
        (MlflowLogger, "mlflow", "mlflow"),
        (MlflowLogger, "sqlalchemy", "mlflow"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(logger, module, extra, monkeypatch):
    """The error comes when the logger is made, and says what to type."""
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{logger.__name__} needs .*{module}.*'beltloop\[{extra}\]'"):
        logger()


@pytest.mark.parametrize("method", ["make", "log", "close"])
def test_an_error_in_the_process_reaches_the_user(method):
    """It keeps its type and its text, and has the process's own traceback in a note."""
    with pytest.raises(ValueError, match=f"{method} failed") as caught:
        fit([InProcess(backends.Failing, method)])
    assert "backends.py" in "".join(caught.value.__notes__)


def test_an_error_that_cannot_travel_is_told_in_words():
    """An exception that cannot be pickled arrives as a RuntimeError with its name and text."""
    with pytest.raises(RuntimeError, match="NoTravelError: cannot travel"):
        fit([InProcess(backends.Unpicklable)])


def test_a_process_that_dies_is_named():
    """A backend that takes its process down is an error with its name and exit code."""
    with pytest.raises(WorkerDiedError, match="process of Dying ended with exit code 7"):
        fit([InProcess(backends.Dying)])


def test_what_a_process_prints_does_no_harm(capfd):
    """Its standard output is not where the answers go."""
    fit([InProcess(backends.Chatty)])
    assert "row 8" in capfd.readouterr().err


def test_a_factory_that_no_process_can_import_is_refused():
    """The class of a script, or one made inside a function, is named with the way out."""

    class Local(InMemoryLogger):
        pass

    with pytest.raises(ConfigError, match=r"another process can import, got .*Local"):
        InProcess(Local)


def test_several_rows_wait_for_one_message():
    """Without a flush, rows go in groups, and all of them arrive."""
    logger = InProcess(CsvLogger, "many.csv")
    logger.open(RunInfo(None, {}))
    for step in range(1000):
        logger.log(Row(step, 0, {"a": float(step)}))
    logger.close()
    assert [line.split(",")[0] for line in Path("many.csv").read_text().splitlines()[1:]] == [
        str(step) for step in range(1000)
    ]
    assert threading.active_count() == 1


def test_a_table_grows_to_the_right():
    """A new name is a new column; older lines get empty cells; odd names and numbers are read back."""
    logger = CsvLogger("t.csv")
    logger.open(RunInfo(None, {}))
    logger.log(Row(1, 0, {"a": 0.1}))
    logger.log(Row(2, 0, {'odd, "name"\n': math.inf}))
    logger.log(Row(3, 1, {"a": math.nan, "b": 1e-300}))
    logger.close()
    with open("t.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["step", "epoch", "a", 'odd, "name"\n', "b"],
            ["1", "0", "0.1", "", ""],
            ["2", "0", "", "inf", ""],
            ["3", "1", "nan", "", "1e-300"],
        ]
    with pytest.raises(FileExistsError):
        CsvLogger("t.csv").open(RunInfo(None, {}))
    assert [each.name for each in Path().iterdir()] == ["t.csv"]


def test_jsonl_passes_over_media():
    """A logger without a place for images is not asked to keep them."""
    assert not hasattr(JsonlLogger, "log_media")
    fit([])
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 10
