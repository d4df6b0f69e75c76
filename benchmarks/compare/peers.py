"""Other people's loaders and trainers, each as its own documentation shows it.

pip install 'beltloop[bench]'

SPDL and torchdata.nodes are handed whole batches: with a stage per sample both are slower on all of these.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import default_collate

from benchmarks.compare.job import Job, Log
from benchmarks.compare.loops import READ_EVERY, loader, train
from benchmarks.compare.workloads import Workload


class MakeBatch:
    """Makes the batch of these indices."""

    def __init__(self, workload: Workload) -> None:
        self._dataset, self._collate = workload.dataset(), workload.collate_fn or default_collate

    def __call__(self, indices: list[int]) -> Any:
        return self._collate([self._dataset[index] for index in indices])


def plan(workload: Workload) -> list[list[int]]:
    """Return the indices of each batch of an epoch."""
    size = workload.batch_size
    return [list(range(size * number, size * (number + 1))) for number in range(workload.num_batches)]


class SpdlThreads:
    """An SPDL pipeline, built anew for each epoch as its documentation does."""

    def __init__(self, workload: Workload, num_threads: int) -> None:
        self._workload, self._num_threads = workload, num_threads

    def __iter__(self) -> Iterator[Any]:
        pipeline = spdl_builder(self._workload, self._num_threads).build(num_threads=self._num_threads)
        with pipeline.auto_stop():
            yield from pipeline.get_iterator()


def spdl_builder(workload: Workload, num_threads: int) -> Any:
    """Return the stages of a pipeline, in order."""
    from spdl.pipeline import PipelineBuilder

    builder: Any = PipelineBuilder().add_source(plan(workload))
    return builder.pipe(MakeBatch(workload), concurrency=num_threads, output_order="input").add_sink(3)


def spdl_threads(job: Job, num_threads: int) -> None:
    """SPDL, its threads in this process."""
    train(job, SpdlThreads(job.workload, num_threads), READ_EVERY)


def spdl_process(job: Job, num_threads: int) -> None:
    """SPDL, its threads in one process of their own."""
    from spdl.pipeline import run_pipeline_in_subprocess

    config = spdl_builder(job.workload, num_threads).get_config()
    train(
        job,
        run_pipeline_in_subprocess(config, num_threads=num_threads, mp_context="forkserver"),
        READ_EVERY,
    )


def nodes(job: Job, num_threads: int) -> None:
    """torchdata.nodes with its threads, and a prefetcher behind them."""
    from torchdata.nodes import IterableWrapper, Loader, ParallelMapper, Prefetcher

    source: Any = IterableWrapper(plan(job.workload))
    mapped: Any = ParallelMapper(source, MakeBatch(job.workload), num_workers=num_threads, method="thread")
    train(job, Loader(Prefetcher(mapped, prefetch_factor=3)), READ_EVERY)


def accelerate(job: Job, num_workers: int) -> None:
    """Accelerate, its loader with workers, the loss read every 50 steps."""
    from accelerate import Accelerator

    engine = Accelerator(cpu=True)
    model, optimizer, batches = engine.prepare(job.model, job.optimizer, loader(job.workload, num_workers))
    log, step = Log(), 0
    for _ in range(job.workload.num_epochs):
        for batch in batches:
            with engine.accumulate(model):
                loss = job.forward(model, job.move(batch))
                engine.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if step % READ_EVERY == 0:
                log.write(job, step, loss)
    log.close()
    engine.free_memory()


def lightning(job: Job, num_workers: int) -> None:
    """Lightning with its loop alone: no bar, no checkpoint; the loss logged every 50 steps."""
    import lightning as pl
    from lightning.pytorch.loggers import CSVLogger

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = job.forward(self.model, job.move(batch))
            if (index + 1) % READ_EVERY == 0:
                job.read(loss)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return job.optimizer

    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            max_epochs=job.workload.num_epochs, accelerator="cpu", logger=CSVLogger(folder),
            log_every_n_steps=READ_EVERY, enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False, default_root_dir=folder,
        ).fit(Module(), loader(job.workload, num_workers))  # fmt: skip


def be_quiet() -> None:
    """Keep what peers say at their start out of the table."""
    import lightning.pytorch  # it sets up its own logger

    logging.getLogger(lightning.pytorch.__name__).handlers.clear()
    for name in (
        "lightning",
        "lightning.pytorch",
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric",
        "spdl",
        "spdl.pipeline",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
