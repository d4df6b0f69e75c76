"""Fakes and tools for tests of code that uses this library: no test needs to sleep."""

from pipeline.testing.gate import Gate
from pipeline.testing.logger import InMemoryLogger

__all__ = ["Gate", "InMemoryLogger"]
