"""Several data sets where one is asked for: a list or a dict of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset

_LOOKED_AT = 8  # a list may be a dataset of a million samples


def several_sets_problem(data: Any, name: str, batch_size: int | None) -> str | None:
    """Say what is wrong with a list or a dict of data sets, and with a dict in the place of batches.

    Neither is found out by iterating it: a list of loaders looks like a list of batches, and a dict yields
    its keys.
    """
    if isinstance(data, Mapping):
        found, items = "dict", list(islice(data.values(), _LOOKED_AT))
    elif isinstance(data, (list, tuple)):
        found, items = type(data).__name__, list(data[:_LOOKED_AT])
    else:
        return None
    if kinds := sorted({type(each).__name__ for each in items if _is_data(each)}):
        return (
            f"{name} must be one data set, got a {found} of {len(data)} ({', '.join(kinds)}). {_advice(name)}"
        )
    if found == "dict" and batch_size is None:
        return (
            f"{name} is a dict ({type(data).__name__}), which yields its keys and not its values. Pass what "
            f"yields batches, such as list({name}.values())."
        )
    return None


def _advice(name: str) -> str:
    together = "Pass them as one, torch.utils.data.ConcatDataset([first, second]), with batch_size="
    if name == "train_data":
        return f"{together}, or a generator of batches that takes from each."
    if name == "val_data":
        return (
            f"{together}; or pass the one that decides, and in a callback's on_validated call "
            "trainer.evaluate(event.state.model, each, …) for the others."
        )
    return f"{together}; or make one call for each."


def _is_data(found: Any) -> bool:
    """Say whether something is no batch or sample, but yields them."""
    if isinstance(found, (DataLoader, Dataset)):
        return True
    is_of_ours = isinstance(found, Iterable) and hasattr(found, "_inbound")  # a Loader, a prefetch
    return is_of_ours or (hasattr(found, "column_names") and hasattr(found, "features"))  # Hugging Face's
