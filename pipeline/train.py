"""`python -m pipeline.train +recipe=resnet`: nothing but `main`, since workers import it too."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from pipeline.config import config_dir, train_from_config
from pipeline.errors import PipelineError


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def main(config: DictConfig) -> float:
    """Train what the config says and return its objective."""
    try:
        _, objective = train_from_config(config, Path(HydraConfig.get().runtime.output_dir))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return objective


if __name__ == "__main__":
    main()
