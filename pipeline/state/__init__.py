"""What training changes, and the names that it has in a checkpoint."""

from pipeline.state.state import TrainState

__all__ = ["TrainState"]
