"""The same five metrics at every step in other trainers, each as its own documentation shows it.

pip install 'beltloop[bench]'
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.overhead import ready, start
from pipeline.metrics import accuracy, top_k_accuracy


def stderr() -> Any:
    """Return where bars go at the moment."""
    return sys.stderr


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what peers say at their start out of the figures."""
    logging.getLogger("lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def measure(
    model: torch.nn.Module, outputs: torch.Tensor, target: torch.Tensor, loss: torch.Tensor, rate: float
) -> dict[str, Any]:
    """Return the five metrics of a step whose gradients are there, none of them read."""
    with torch.no_grad():
        norm = torch.nn.utils.get_total_norm([each.grad for each in model.parameters()])
        return {
            "loss": loss.detach(),
            "accuracy": accuracy(outputs, target).float().mean(),
            "top2": top_k_accuracy(outputs, target, k=2).float().mean(),
            "grad_norm": norm,
            "lr": rate,
        }


def compute(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, target: torch.Tensor
) -> dict[str, Any]:
    """Make one step and return its metrics."""
    outputs = model(inputs)
    loss = F.cross_entropy(outputs, target)
    loss.backward()
    found = measure(model, outputs, target, loss, optimizer.param_groups[0]["lr"])
    optimizer.step()
    optimizer.zero_grad()
    return found


def accelerate(num_steps: int) -> float:
    """Time a loop of Accelerate with `.item()`, JSON and tqdm."""
    from accelerate import Accelerator

    engine = Accelerator(cpu=True)
    model, optimizer = engine.prepare(*start())
    batches = ready(num_steps)
    with tempfile.TemporaryDirectory() as folder, Path(folder, "m.jsonl").open("w") as file:
        started_s = time.perf_counter()
        for step, (inputs, target) in enumerate(bar := tqdm(batches)):
            with engine.accumulate(model):
                outputs = model(inputs)
                loss = F.cross_entropy(outputs, target)
                engine.backward(loss)
                found = measure(model, outputs, target, loss, optimizer.param_groups[0]["lr"])
                optimizer.step()
                optimizer.zero_grad()
            values = {name: float(value) for name, value in found.items()}
            file.write(json.dumps({"step": step, **values}) + "\n")
            bar.set_postfix(loss=values["loss"], refresh=False)
        return time.perf_counter() - started_s


def ignite(num_steps: int) -> float:
    """Time an engine of Ignite with its bar, and JSON in a handler."""
    from ignite.engine import Engine, Events
    from ignite.handlers import ProgressBar

    model, optimizer = start()

    def update(engine: Any, batch: Any) -> dict[str, float]:
        return {name: float(value) for name, value in compute(model, optimizer, *batch).items()}

    trainer = Engine(update)
    ProgressBar().attach(trainer, output_transform=lambda output: {"loss": output["loss"]})
    batches = ready(num_steps)
    with tempfile.TemporaryDirectory() as folder, Path(folder, "m.jsonl").open("w") as file:

        @trainer.on(Events.ITERATION_COMPLETED)
        def write(engine: Any) -> None:
            file.write(json.dumps({"step": engine.state.iteration, **engine.state.output}) + "\n")

        started_s = time.perf_counter()
        trainer.run(batches, max_epochs=1)
        return time.perf_counter() - started_s


class Batches:
    """Batches that are ready; Lightning takes a list for several loaders."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def lightning(num_steps: int) -> float:
    """Time a Trainer of Lightning with `self.log` of five metrics, its CSV logger and its bar."""
    import lightning as pl
    from lightning.pytorch.loggers import CSVLogger

    model, optimizer = start()

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            outputs = self.model(batch[0])
            loss = F.cross_entropy(outputs, batch[1])
            self.log("loss", loss.detach(), prog_bar=True)
            self.log("accuracy", accuracy(outputs, batch[1]).float().mean())
            self.log("top2", top_k_accuracy(outputs, batch[1], k=2).float().mean())
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log(
                "grad_norm", torch.nn.utils.get_total_norm([each.grad for each in self.model.parameters()])
            )
            self.log("lr", optimizer.param_groups[0]["lr"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer

    batches = ready(num_steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=CSVLogger(folder), log_every_n_steps=1,
            enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        started_s = time.perf_counter()
        trainer.fit(Module(), Batches(batches))
        return time.perf_counter() - started_s
