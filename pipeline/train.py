"""`python -m pipeline.train +recipe=resnet`: nothing but `main`, since workers import it too."""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pipeline.config import EXIT_CODES, check_overrides, config_dir, train_from_config
from pipeline.errors import PipelineError


def main() -> None:
    """Run the command line; an error of ours ends it with its message and exit code 2.

    A run that was stopped and can be resumed ends with 143 after SIGTERM, 130 after Ctrl-C, and 75 when
    ``trainer.max_time`` is up. Output that nobody reads any more is dropped without a word.
    """
    try:
        check_overrides(sys.argv[1:])
        run()
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except BrokenPipeError:
        if not _has_lost_its_reader(sys.stdout.fileno()):
            raise  # another pipe than ours
        raise SystemExit(128 + signal.SIGPIPE) from None
    finally:
        _flush_output()


def _has_lost_its_reader(file: int) -> bool:
    poller = select.poll()
    poller.register(file, 0)
    return any(event & select.POLLERR for _, event in poller.poll(0))


def _flush_output() -> None:
    """Write what was printed; if its reader has gone (``… --help | head``), drop it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or the interpreter complains at its end


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def run(config: DictConfig) -> float:
    """Train what a config says and return its objective, for a sweeper."""
    try:
        result, objective = train_from_config(config, Path(HydraConfig.get().runtime.output_dir))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error  # Hydra would print a traceback
    if result.stop_reason in EXIT_CODES:
        raise SystemExit(EXIT_CODES[result.stop_reason])
    return objective


if __name__ == "__main__":
    main()
