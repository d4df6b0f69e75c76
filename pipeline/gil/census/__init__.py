"""The census: does X hold the GIL, and what does it do to its neighbour? Imports what it measures."""

from pipeline.gil.census.cases import Case, all_cases
from pipeline.gil.census.measure import Census, CensusRow

__all__ = ["Case", "Census", "CensusRow", "all_cases"]
