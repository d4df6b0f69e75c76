"""What can go wrong, as one tree.

PipelineError
├── ConfigError (ValueError)   a wrong setting; every problem at once, each with its key
├── StageError                 a stage failed without an exception of the user's own
├── NonFiniteError             the loss became NaN or infinite
└── CheckpointError            unreadable, incomplete, or from another model

An exception that the user's own code raised keeps its type and gains a note with stage, step and
sample (`add_stage_note`); a StageError stands in only where there is no such exception.
"""

from __future__ import annotations

from collections.abc import Sequence


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
        step: The optimizer step (counted from 0) in which it happened, or None outside of one.
        index: The sample's index in the dataset, or None where no sample is to blame.
    """

    def __init__(
        self, message: str, *, stage: str, step: int | None = None, index: int | None = None
    ) -> None:
        self.message, self.stage, self.step, self.index = message, stage, step, index
        super().__init__(message)

    def __str__(self) -> str:
        return f"{describe_stage(self.stage, step=self.step, index=self.index)}: {self.message}"


class NonFiniteError(PipelineError):
    """The training loss became NaN or infinite.

    Args:
        first_step: The first optimizer step (counted from 0) whose loss was not finite.
        last_step: The last step that had been started when the host learned of it.
        value: The loss found.
    """

    def __init__(self, first_step: int, last_step: int, value: float) -> None:
        self.first_step, self.last_step = first_step, last_step
        super().__init__(
            f"the loss became {value} at step {first_step}; training was stopped at step "
            f"{last_step}. Lower the learning rate, set gradient_clip_val, or pass "
            "on_nonfinite='ignore' to go on regardless."
        )


class CheckpointError(PipelineError):
    """A checkpoint cannot be read, is incomplete, or belongs to another model."""


def describe_stage(stage: str, *, step: int | None = None, index: int | None = None) -> str:
    """Say where in the flow something happened: ``stage 'fetch', sample 1281, step 45``."""
    words = [f"stage '{stage}'"]
    if index is not None:
        words.append(f"sample {index}")
    if step is not None:
        words.append(f"step {step}")
    return ", ".join(words)


def add_stage_note(
    error: BaseException, stage: str, *, step: int | None = None, index: int | None = None
) -> None:
    """Write on a user's exception where in the flow it was raised; the first stage to say so wins.

    A StageError knows its stage, and is told the step if whoever raised it did not.
    """
    if isinstance(error, StageError):
        error.step = step if error.step is None else error.step
        return
    notes = getattr(error, "__notes__", ())
    if not any(note.startswith("stage '") for note in notes):
        error.add_note(describe_stage(stage, step=step, index=index))
