"""Random numbers of the data: seeds, draws that are the same on every thread, the global generators."""

from pipeline.randomness.generator_mode import UnhookableDrawError

__all__ = ["UnhookableDrawError"]
