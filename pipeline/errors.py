"""What can go wrong, as one tree.

PipelineError
├── ConfigError (ValueError)   a wrong setting; every problem at once, each with its key
├── StageError                 a stage failed without an exception of the user's own
│   └── WorkerDiedError        a process that belongs to the run has gone
├── StallError (TimeoutError)  a stage that hangs: where, with its stack and its channel's statistics
├── NonFiniteError             the loss became NaN or infinite
├── GilAccountError            the GIL cannot be sampled here, or no longer
└── CheckpointError            unreadable, incomplete, or from another model

An exception that the user's own code raised keeps its type and gains a note with stage, step and
sample (`add_stage_note`); a StageError stands in only where there is no such exception.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress


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


class NonFiniteError(PipelineError):
    """The training loss or its gradients became NaN or infinite.

    Args:
        first_step: The first optimizer step (counted from 0) whose loss was not finite.
        last_step: The last step that had been started when the host learned of it.
        value: The loss found.
        is_gradient: Whether it was the gradients.
    """

    def __init__(self, first_step: int, last_step: int, value: float, *, is_gradient: bool = False) -> None:
        self.first_step, self.last_step = first_step, last_step
        what = (
            f"the gradients became NaN or infinite (the loss is {value})"
            if is_gradient
            else (f"the loss became {value}")
        )
        super().__init__(
            f"{what} at step {first_step}; training was stopped at step {last_step}. The weights are those "
            f"before step {first_step}; nonfinite.jsonl in the run folder has its samples. Lower the "
            "learning rate, set gradient_clip_val, or pass on_nonfinite='skip' to leave such steps out."
        )


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
