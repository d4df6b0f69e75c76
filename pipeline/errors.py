"""What can go wrong, as one tree.

PipelineError
├── ConfigError (ValueError)   a wrong setting; every problem at once, each with its key
├── StageError                 a stage failed without an exception of the user's own
│   └── WorkerDiedError        a process that belongs to the run has gone
├── StallError (TimeoutError)  a stage that hangs: where, with its stack and its channel's statistics
├── NonFiniteError             loss, gradients, a buffer or an update became NaN or infinite
├── GilAccountError            the GIL cannot be sampled here, or no longer
└── CheckpointError            unreadable, incomplete, or from another model

An exception that the user's own code raised keeps its type and gains a note with stage, step and
sample (`add_stage_note`); a StageError stands in only where there is no such exception.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeAlias


class PipelineError(Exception):
    """Base of everything that this library raises on its own account."""


class ConfigError(PipelineError, ValueError):
    """One or more wrong settings, found before the first step.

    Args:
        problems: One message, or one for each setting; each says what is wrong, what was found and
            what to type.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class StageError(PipelineError):
    """A stage could not go on, and no exception of the user's own says why.

    Args:
        message: What is wrong, what was found, what to do.
        stage: The stage's name: ``fetch``, ``collate``, ``step``, ``validate``.
        step: Optimizer steps finished before it, or None where that is not known.
        index: The sample's index in the dataset, or None where no sample is to blame.
    """

    def __init__(
        self, message: str, *, stage: str, step: int | None = None, index: int | None = None
    ) -> None:
        self.message, self.stage, self.step, self.index = message, stage, step, index
        super().__init__(message)

    def __str__(self) -> str:
        return f"{describe_stage(self.stage, step=self.step, index=self.index)}: {self.message}"


class GilAccountError(PipelineError):
    """The GIL cannot be sampled here, or no longer; the message says why. What is measured goes on."""


class WorkerDiedError(StageError):
    """A process that belongs to the run has gone without saying why."""


class StallError(PipelineError, TimeoutError):
    """A stage gave nothing for so long that it must hang.

    Args:
        timeout_s: How long was waited: `Settings.stall_timeout_s`.
        waited_for: What did not come, in words.
        statistics: Of the channel that was waited on; None where there is none.

    Attributes:
        stage: Where it hangs; None where that is not known.
        index: The sample's index, or None.
        stack: The stack of the stuck thread or process, as text; None where it cannot be seen.
    """

    def __init__(self, timeout_s: float, waited_for: str = "batch", statistics: object = None) -> None:
        super().__init__(timeout_s)
        self.timeout_s, self.waited_for, self.statistics = timeout_s, waited_for, statistics
        self.stage: str | None = None
        self.index: int | None = None
        self.stack: str | None = None

    def __str__(self) -> str:
        where = "" if self.stage is None else f"{describe_stage(self.stage, index=self.index)}: "
        lines = [
            f"{where}no {self.waited_for} for {self.timeout_s:g} s, so it is taken to hang. If it is only "
            "slow, set stall_timeout_s higher, or to null (None) to wait for ever."
        ]
        if self.statistics is not None:
            lines.append(f"The channel: {self.statistics}.")
        if self.stack is not None:
            lines.append(f"It stands at:\n{self.stack.rstrip()}")
        return "\n".join(lines)


NonFiniteCause: TypeAlias = Literal["loss", "gradients", "size", "buffers", "update"]

_FOUND: dict[NonFiniteCause, str] = {
    "loss": "the loss became {loss}",
    "gradients": "the gradients became NaN or infinite (the loss is {loss})",
    "size": "a gradient became too large for the optimizer to square or add (the loss is {loss})",
    "buffers": "a buffer of the model became NaN, or infinite in a norm layer (the loss is {loss})",
    "update": "the optimizer made weights or its own state NaN or infinite (the loss is {loss})",
}

_BEFORE_ANY_UPDATE = (
    "No update had been made by then: look at the step's inputs, at the loss, and at the weights that the "
    "model begins with. on_nonfinite='skip' leaves such steps out."
)


class NonFiniteError(PipelineError):
    """The loss, a gradient, a buffer or what an update would have made became NaN or infinite.

    Args:
        first_step: The first optimizer step (counted from 0) that was not finite.
        last_step: The last step that had been started when the host learned of it.
        value: The loss found.
        cause: What became NaN or infinite.

    Attributes:
        was_left_out: Whether the step's update was not made, or had no effect.
        spoiled_part: What was found not to be finite when the run ended: ``weights``, ``optimizer's state``
            or ``buffers``, with names behind a colon; nothing if all were, None if nobody looked.
        samples_path: The file with the samples of the step; None if there is none.
    """

    was_left_out: bool = False
    spoiled_part: str | None = None
    samples_path: Path | None = None

    def __init__(
        self, first_step: int, last_step: int, value: float, *, cause: NonFiniteCause = "loss"
    ) -> None:
        super().__init__(first_step, last_step, value)
        self.first_step, self.last_step, self.value, self.cause = first_step, last_step, value, cause

    def __str__(self) -> str:
        found = _FOUND[self.cause].format(loss=self.value)
        return " ".join(
            part
            for part in (
                f"{found} at step {self.first_step}; training was stopped at step {self.last_step}.",
                self._weights(),
                "" if self.samples_path is None else f"{self.samples_path} has its samples.",
                self._advice(),
            )
            if part
        )

    def _weights(self) -> str:
        if self.spoiled_part is None:
            return ""
        if self.spoiled_part:
            part, _, names = self.spoiled_part.partition(": ")
            held, where = f"The {part} held NaN or infinity before", f" ({names})" if names else ""
            if not self.first_step:
                return f"{held} the first step{where}: look at how they were made and what was loaded."
            return (
                f"{held} that step already{where}, which no loss and no gradient had shown: go on from the "
                "newest checkpoint that is clean."
            )
        if self.was_left_out:
            return f"The weights are those before step {self.first_step}."
        return "Its update was made, since its gradients are finite; the weights are finite."

    def _advice(self) -> str:
        if not self.first_step and self.spoiled_part:
            return ""
        if not self.first_step and self.cause in ("loss", "gradients", "buffers"):
            return _BEFORE_ANY_UPDATE
        remedy = "Lower the learning rate, set gradient_clip_val"
        if self.spoiled_part:
            return f"{remedy}, or look at what else changes the weights."
        return f"{remedy}, or pass on_nonfinite='skip' to leave such steps out."


class CheckpointError(PipelineError):
    """A checkpoint cannot be read, is incomplete, or belongs to another model."""


def describe_stage(
    stage: str,
    *,
    index: int | None = None,
    step: int | None = None,
    batch: int | None = None,
    epoch: int | None = None,
    shard: int | None = None,
) -> str:
    """Say where in the flow something happened: ``stage 'fetch', sample 128, batch 4 of epoch 2``.

    Args:
        stage: Its name.
        index: The sample's index in the dataset.
        step: Optimizer steps finished before it.
        batch: The batch's place in its epoch, counted from 0.
        epoch: The epoch, counted from 0; negative where nothing is trained.
        shard: The shard of an iterable dataset in which the batch has its place.
    """
    words = [f"stage '{stage}'"]
    if index is not None:
        words.append(f"sample {index}")
    if batch is not None:
        where = "" if epoch is None else " of the evaluation" if epoch < 0 else f" of epoch {epoch}"
        of_shard = "" if shard is None else f" of shard {shard}"
        words.append(f"batch {batch}{of_shard}{where}")
    if step is not None:
        words.append(f"step {step}")
    return ", ".join(words)


def listed(names: Iterable[object], most: int = 8) -> str:
    """Return names for a message: each once, in order, of a long list the first and how many more."""
    each = list(dict.fromkeys(map(str, names)))
    more = f" and {len(each) - most} more" if len(each) > most else ""
    return ", ".join(each[:most]) + more


def counted(number: int, unit: str, units: str = "") -> str:
    """Return a number with its unit, in the plural unless it is one: ``1 step``, ``2,000 steps``."""
    return f"{number:,} {unit if number == 1 else units or unit + 's'}"


def add_stage_note(
    error: BaseException,
    stage: str,
    *,
    index: int | None = None,
    step: int | None = None,
    batch: int | None = None,
    epoch: int | None = None,
    shard: int | None = None,
) -> None:
    """Write on a user's exception where in the flow it was raised.

    The first stage to say so wins; one further out adds the step, which a prefetch thread does not
    know. A StageError knows its stage, and is told the step if whoever raised it did not.
    """
    if isinstance(error, StageError):
        error.step = step if error.step is None else error.step
        return
    notes = getattr(error, "__notes__", [])
    for place, note in enumerate(notes):
        if note.startswith("stage '"):
            if step is not None and ", step " not in note:
                notes[place] = f"{note}, step {step}"
            return
    _add_note(error, describe_stage(stage, index=index, step=step, batch=batch, epoch=epoch, shard=shard))


@contextmanager
def noting_on(error: BaseException) -> Iterator[None]:
    """Write what goes wrong inside the block on an error that is already on its way, and go on."""
    try:
        yield
    except Exception as further:
        note_further(error, further)


def note_further(error: BaseException, further: BaseException) -> None:
    """Write on an error that is on its way what else went wrong meanwhile."""
    if further is not error:
        _add_note(error, f"while this error was handled: {type(further).__name__}: {further}")


def _add_note(error: BaseException, note: str) -> None:
    # An exception that does not take notes (a frozen dataclass) must still travel as itself.
    with suppress(Exception):
        error.add_note(note)


def warn_harmlessly(message: str) -> None:
    """Warn, but where warnings are errors only print: what is no more than said ends no training."""
    try:
        warnings.warn(message, stacklevel=3)
    except UserWarning:
        print(f"warning: {message}", file=sys.stderr)
