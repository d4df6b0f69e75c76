"""Validation, evaluation and prediction: forward only, read once at the end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.batch import Batch, Progress, move_batch, num_samples
from pipeline.errors import StageError
from pipeline.every import Every
from pipeline.metrics import Mean, MetricSet, merge_over_ranks
from pipeline.protocols import Metrics
from pipeline.step.objective import Objective

_TELL_EVERY_S = 0.1


@dataclass(frozen=True)
class Evaluation:
    """Calling it with a model gives the mean loss and the metrics over all samples.

    Args:
        objective: From a batch to a loss.
        open_batches: Returns the batches, on the device.
        metrics: By name.
        count_samples: Returns the samples in a batch: the weight of its loss, and of a metric's one value.
        autocast: Makes the context in which the model runs.
        num_batches: How many there are, or None where nobody knows.
        merges_ranks: Whether every rank evaluates, and the numbers are over the samples of all.

    Runs on:
        Loop thread; reads from the device once, after the last batch.
    """

    objective: Objective
    open_batches: Callable[[], Generator[Batch]]
    metrics: Metrics
    autocast: Callable[[], Any]
    count_samples: Callable[[Batch], int] = num_samples
    merges_ranks: bool = False
    num_batches: int | None = None

    def __call__(
        self, model: torch.nn.Module, tell: Callable[[Progress], None] | None = None
    ) -> dict[str, float]:
        """Evaluate.

        Args:
            model: In evaluation mode for the length of the call.
            tell: Called with how far it is, some ten times a second; the last time when it is over.
        """
        means: dict[str, Mean] = {"loss": Mean()}
        further, num_done, every = MetricSet(self.metrics), 0, Every(seconds=_TELL_EVERY_S)
        with torch.no_grad(), evaluation_mode(model), closing(self.open_batches()) as batches:
            for batch in batches:
                with self.autocast():
                    computed = self.objective(model, batch)
                count = self.count_samples(batch)
                for name, value in {**computed.scalars, "loss": computed.loss}.items():
                    means[name] = means.get(name, Mean()).merge(Mean.of(value, count))
                further.update(*computed.metric_args, num_samples=count)
                num_done += 1
                if tell is not None and every.is_due(num_done):
                    tell(Progress("validate", num_done, self.num_batches, False))
        if tell is not None:
            tell(Progress("validate", num_done, self.num_batches, True))
        if not means["loss"].count:
            raise StageError(
                "the data gave no batch. An iterator can be read only once: pass a DataLoader, a list, or "
                "an object whose __iter__ starts anew.",
                stage="validate",
            )
        if self.merges_ranks:
            means = merge_over_ranks(means)
        values = {name: mean.compute() for name, mean in means.items()}
        return values | further.compute(merges_ranks=self.merges_ranks)


def predict_batches(
    model: torch.nn.Module,
    forward: Callable[[torch.nn.Module, Batch], Any],
    batches: Iterable[Batch],
    autocast: Callable[[], Any],
) -> list[Any]:
    """Return each batch's outputs, on the host."""
    with torch.no_grad(), evaluation_mode(model):
        outputs = []
        for batch in batches:
            with autocast():
                made = forward(model, batch)
            outputs.append(move_batch(made, torch.device("cpu"), torch.Tensor.cpu))
        return outputs


def put_together(outputs: list[Any]) -> Any:
    """Return batches' outputs as one tensor; the list, where they are not tensors of one kind and size."""
    is_plain = [isinstance(each, torch.Tensor) and not each.is_nested and each.ndim > 0 for each in outputs]
    if not outputs or not all(is_plain):
        return outputs
    return torch.cat(outputs) if len({(each.layout, each.shape[1:]) for each in outputs}) == 1 else outputs


def forward_inputs(model: torch.nn.Module, batch: Batch) -> Any:
    """Call the model on a batch's inputs.

    They are the first part of a pair, the one part of a tuple or a list of one, as a TensorDataset of the
    inputs alone yields it, and all of anything else: a tensor, a dict, a triple, an object.
    """
    is_pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    is_alone = type(batch) in (tuple, list) and len(batch) == 1
    return model(batch[0] if is_pair or is_alone else batch)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and afterwards each module back to the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()  # not only the flag: a module may do more on its way in and out
        for module, mode in modes:
            if module.training != mode:
                module.training = mode
