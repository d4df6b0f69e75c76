"""The Trainer: wires the belts to the loop, and owns the one `with` that ends what it started."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.batch import Batch, num_samples
from pipeline.callbacks.callback_list import CallbackList
from pipeline.callbacks.events import Callback
from pipeline.checkpoint import load_model
from pipeline.concurrency import Scope
from pipeline.data import EVALUATION_EPOCH, Source, as_source, own_generators
from pipeline.device import select_backend
from pipeline.inbound.shared_data import check_ranks, seed_of_run, watch_ranks
from pipeline.loop import setup, wiring
from pipeline.loop.check import check_listeners, check_model, check_targets, resolve_limit, split_batching
from pipeline.loop.loop import fit
from pipeline.loop.resume import resumed_seed
from pipeline.loop.run import Run
from pipeline.loop.run_dir import open_run_dir
from pipeline.loop.schedule import Belts
from pipeline.loop.signals import handling_signals
from pipeline.loop.summary import make_result
from pipeline.protocols import Logger, LossFn, Metrics, Scheduler, Step
from pipeline.ranks import has_ranks, ranks
from pipeline.result import FitResult
from pipeline.settings import Settings
from pipeline.step.evaluate import forward_inputs, predict_batches, put_together
from pipeline.watch.clock import StepClock
from pipeline.watch.gil_watch import GilWatch
from pipeline.workers import refuse_in_nursery


class Trainer(Settings):
    """Trains, evaluates and predicts; its arguments are those of `Settings`.

    trainer = Trainer(max_epochs=5)
    result = trainer.fit(model, optimizer, dataset, loss_fn=F.cross_entropy, batch_size=64)
    """

    def fit(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        train_data: Any,
        *,
        loss_fn: LossFn | None = None,
        step: Step | None = None,
        batch_size: int | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        num_shards: int = 1,
        val_data: Any = None,
        scheduler: Scheduler | None = None,
        scheduler_interval: Literal["step", "epoch"] = "epoch",
        metrics: Metrics | None = None,
        train_metrics: Metrics | None = None,
        count_samples: Callable[[Batch], int] = num_samples,
        count_tokens: Callable[[Batch], int] | None = None,
        callbacks: Sequence[Callback] = (),
        loggers: Sequence[Logger] = (),
        hparams: Mapping[str, Any] | None = None,
    ) -> FitResult:
        """Train the model in place.

        Args:
            model: Moved to the device; its parameters stay the same objects. In evaluation mode it is
                put in training mode; modules of a model in training mode keep the mode they have.
            optimizer: Any of torch's, over the model's parameters.
            train_data: A map-style or iterable dataset (with `batch_size`), a DataLoader, or any iterable
                of batches: tensors, objects that move themselves with ``to(device)``, containers of these.
            loss_fn: Called with ``(outputs, target)`` for batches of ``(inputs, target)``.
            step: Instead of `loss_fn`: called with ``(model, batch)``, returns the loss, or a dict
                with ``loss`` and further scalars to log.
            batch_size: Samples per batch on each rank, which share a dataset out; for `val_data` too.
            shuffle: Draw a new order of the dataset for each epoch.
            drop_last: Leave out a last batch that is not full.
            collate_fn: Makes a batch of a list of samples; torch's `default_collate` unless told.
            num_shards: Into which an iterable dataset splits itself; `val_data` too if it is iterable.
            val_data: Like `train_data`; never shuffled.
            scheduler: Any of torch's, over `optimizer`. A ReduceLROnPlateau sees `monitor`.
            scheduler_interval: Whether it moves with each optimizer ``step`` or each ``epoch``.
            metrics: Validation metrics by name, reported as ``val/<name>``. A function of
                ``(outputs, target)`` that returns one value per sample, such as
                `pipeline.metrics.accuracy`, or one for the batch; with `step`, a function of the one
                thing that it returned, which may hold tensors of any shape. Or an object with
                update, compute and reset.
            train_metrics: The same of the training batches: functions as ``train/<name>`` in every row,
                and all of them as ``train/epoch_<name>``.
            count_samples: Returns the samples in a batch, from its shape alone, where that cannot be seen
                (`pipeline.batch.num_samples` says how it is): the batch's weight in means over samples.
            count_tokens: Returns the tokens in a batch, from its shape alone: a value of the batch would
                have to be waited for. With it, rows have ``rate/tokens_per_s``.
            callbacks: Told of events, each on the thread that its method names.
            loggers: Told of each `Row`, besides the run folder's ``metrics.jsonl`` and the bar; they
                are closed when the run ends.
            hparams: What describes the run besides the settings, for the loggers that keep it.

        Raises:
            ConfigError: For settings that do not fit each other or the data, before the first step.
            StageError: If a batch, a loss or the data is not what it should be.
            CheckpointError: If the run cannot be resumed, or has something that no checkpoint can hold.
            NonFiniteError: If the loss, a gradient or a buffer becomes NaN or infinite, unless
                ``on_nonfinite`` says otherwise.
            Exception: The user's own, from any stage, with a note that says where.
            KeyboardInterrupt: At the second Ctrl-C or SIGTERM. After the first one the step is finished
                and saved, and `FitResult.stop_reason` says which it was.

        Runs on:
            The calling thread is the loop thread. When this returns or raises, every thread that it
            started has ended.
        """
        refuse_in_nursery()
        objective = setup.make_objective(loss_fn, step, has_metrics=bool(metrics or train_metrics))
        check_model(model, optimizer, scheduler, val_data, self)
        metrics, train_metrics, hparams = metrics or {}, train_metrics or {}, hparams or {}
        check_listeners(callbacks, loggers, (metrics, train_metrics), val_data)
        setup.check_counters(count_samples, count_tokens)
        check_targets(self, loss_fn, train_data, val_data, batch_size, metrics, scheduler_interval)
        batching, val_batching = split_batching(train_data, val_data, batch_size, collate_fn, num_shards)
        seed = seed_of_run(self, train_data, batching["batch_size"])
        make_source = partial(as_source, seed=seed, ranks=ranks())
        source = make_source(train_data, name="train_data", shuffle=shuffle, drop_last=drop_last, **batching)
        max_batches = resolve_limit("limit_train_batches", self.limit_train_batches, source.num_batches)
        evaluation, belts, sources = None, self.with_seed(seed)._belts(), [source]
        if val_data is not None:
            sources.append(val_source := make_source(val_data, name="val_data", **val_batching))
            evaluation = wiring.make_evaluation(
                self, belts, objective, val_source, metrics, count_samples, merges_ranks=True
            )
        data = {"train_data": (train_data, batching), "val_data": (val_data, val_batching)}
        check_ranks({"shuffle": shuffle, "drop_last": drop_last}, metrics, belts.device, **data)
        setup.place(self, belts.device, model, loss_fn, *metrics.values(), *train_metrics.values())
        if not model.training:
            model.train()  # a model that was evaluated; single modules put in eval mode stay so
        called_model = setup.compile_model(model, self.compile)
        state = setup.make_state(self, model, optimizer, scheduler, belts.device)
        with ExitStack() as stack:
            stack.enter_context(closing(belts))
            stack.enter_context(setup.deterministic_algorithms(self.deterministic))
            inbound = belts.inbound(source, is_training=True)
            inbound.checks.trained.append(model)
            opened = open_run_dir(self)
            settings = self.with_seed(resumed_seed(self.seed, seed, opened.checkpoint, sources))
            run_dir, rows = opened.run_dir, wiring.make_rows(opened.run_dir)
            num_batches = setup.at_most(source.num_batches, max_batches)
            group = wiring.make_logger_group(
                settings, loggers, run_dir, num_batches, hparams, belts.schedule, rows, opened.resumed_step
            )
            stack.enter_context(group.closing())
            stack.callback((clock := StepClock()).leave)
            told = CallbackList(callbacks)
            train_step = wiring.make_step(
                self, state, called_model, objective, belts.backend, scheduler_interval, clock, train_metrics,
                keeps_tensors=told.has_step_listeners, count_samples=count_samples, user_code=(loss_fn, step),
            )  # fmt: skip
            journal = wiring.make_journal(self, state, group, belts.device, train_step)
            detector = wiring.make_detector(self, belts.backend, state)
            collector = wiring.make_collector(self)
            stack.enter_context(wiring.installed(collector))
            scope = stack.enter_context(Scope(self.stall_timeout_s))
            outbound = belts.outbound(scope, journal)
            inbound.num_pauses = lambda: clock.num_pauses
            watch = stack.enter_context(
                GilWatch(self.gil, clock, outbound.put_row, run_dir, belts.why_no_process)
            )
            run = Run(
                settings=settings,
                state=state,
                step=train_step,
                inbound=wiring.watch_batches(watch_ranks(inbound.batches, source, belts.device), detector),
                outbound=outbound,
                journal=journal,
                limiter=belts.limiter(self.max_steps_in_flight),
                callbacks=told,
                saver=wiring.make_saver(self, opened.folder, belts.backend, rows, belts.schedule),
                checkpoint=opened.checkpoint,
                run_dir=run_dir,
                has_ranks=has_ranks(),
                is_seed_given=self.seed is not None,
                data=inbound,
                generators=own_generators(train_data, val_data),
                ends_at_s=wiring.deadline_s(self, clock),
                validate=None
                if evaluation is None
                else partial(evaluation, state.ema.module if state.ema else called_model),
                max_batches=max_batches,
                scheduler_interval=scheduler_interval,
                clock=clock,
                gil=watch,
                detector=detector,
                collector=collector,
                count_samples=count_samples,
                count_tokens=count_tokens,
            )
            stack.enter_context(wiring.installed(detector))
            stack.enter_context(handling_signals(run))
            fit(run)
        return make_result(run, belts, run_dir, train_data, opened.path)

    def evaluate(
        self,
        model: torch.nn.Module,
        data: Any,
        *,
        loss_fn: LossFn | None = None,
        step: Step | None = None,
        batch_size: int | None = None,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        num_shards: int = 1,
        metrics: Metrics | None = None,
        count_samples: Callable[[Batch], int] = num_samples,
        checkpoint: str | Path | None = None,
    ) -> dict[str, float]:
        """Return the mean loss and the metrics over all samples, by name (without ``val/``); on each rank.

        Args:
            model: In evaluation mode for the length of the call.
            data: Like `val_data` of `fit`.
            loss_fn: As for `fit`.
            step: As for `fit`.
            batch_size: As for `fit`.
            collate_fn: As for `fit`.
            num_shards: As for `fit`.
            metrics: As for `fit`.
            count_samples: As for `fit`.
            checkpoint: Load the model's weights from this file first: the averaged ones if it has
                any.

        Raises:
            ConfigError: For settings that do not fit the data.
            CheckpointError: If the checkpoint cannot be read or belongs to another model.
        """
        source = self._evaluation_source(data, batch_size, collate_fn, num_shards)
        belts = self._belts()
        setup.check_counters(count_samples)
        objective = setup.make_objective(loss_fn, step, has_metrics=bool(metrics))
        if checkpoint is not None:
            load_model(checkpoint, model)
        setup.place(self, belts.device, model, loss_fn, *(metrics or {}).values())
        with closing(belts):
            evaluate = wiring.make_evaluation(self, belts, objective, source, metrics, count_samples)
            return evaluate(model)

    def predict(
        self,
        model: torch.nn.Module,
        data: Any,
        *,
        forward: Callable[[torch.nn.Module, Batch], Any] = forward_inputs,
        batch_size: int | None = None,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        num_shards: int = 1,
        checkpoint: str | Path | None = None,
    ) -> Any:
        """Return the model's outputs for all samples, on the host; on each rank that calls it.

        Args:
            model: In evaluation mode for the length of the call.
            data: Like `val_data` of `fit`; of a pair, or a tuple of one, the first part is what is used.
            forward: Called with ``(model, batch)`` instead of calling the model on the inputs.
            batch_size: As for `fit`.
            collate_fn: As for `fit`.
            num_shards: As for `fit`.
            checkpoint: As for `evaluate`.

        Returns:
            One tensor, the batches' outputs put together along their first dimension; or the list of
            the batches' outputs, where they are not tensors, or not of one size.
        """
        source = self._evaluation_source(data, batch_size, collate_fn, num_shards)
        belts = self._belts()
        if checkpoint is not None:
            load_model(checkpoint, model)
        setup.place(self, belts.device, model)
        limit = resolve_limit("limit_val_batches", self.limit_val_batches, source.num_batches)
        with closing(belts), closing(belts.inbound(source).batches(EVALUATION_EPOCH, limit)) as batches:
            outputs = predict_batches(
                model, forward, batches, setup.make_autocast(self.precision, belts.device)
            )
        return put_together(outputs)

    def _belts(self) -> Belts:
        prepare = setup.to_channels_last if self.channels_last else None
        return Belts(self, select_backend(self.device), prepare)

    def _evaluation_source(
        self, data: Any, batch_size: int | None, collate_fn: Any, num_shards: int
    ) -> Source:
        batching: Any = {"batch_size": batch_size, "collate_fn": collate_fn, "num_shards": num_shards}
        return as_source(data, name="data", seed=self.seed, **batching)
