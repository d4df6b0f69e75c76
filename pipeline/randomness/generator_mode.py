"""Every torch draw of one thread from a generator of its own, and the draws for which that cannot be done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from pipeline.errors import listed

Seed = Callable[[], int]
"""Returns a sample's seed, which takes 3 µs: most samples need none."""

_METHODS = "bernoulli bernoulli_ cauchy_ exponential_ geometric_ log_normal_ multinomial normal_"
_FUNCTIONS = "_sample_dirichlet _standard_gamma bernoulli binomial multinomial normal poisson rand"
_LIKE = "rand_like randint_like randn_like"  # they take a generator from torch 2.10 or so
_LIKE_NAMES = [name for name in _LIKE.split() if "generator" in getattr(torch.ops.aten, name).overloads()]
_HOOKABLE = frozenset(
    [getattr(torch.Tensor, name) for name in [*_METHODS.split(), "random_", "uniform_"]]
    + [getattr(torch, name) for name in [*_FUNCTIONS.split(), "randint", "randn", "randperm"]]
    + [getattr(torch, name) for name in _LIKE_NAMES]
)
_PYTHON_UNHOOKABLE = (
    "alpha_dropout dropout dropout1d dropout2d dropout3d feature_alpha_dropout "
    "fractional_max_pool2d fractional_max_pool3d gumbel_softmax multi_head_attention_forward rrelu "
    "scaled_dot_product_attention"
)
_TORCH_UNHOOKABLE = (
    "alpha_dropout alpha_dropout_ dropout dropout_ feature_alpha_dropout feature_alpha_dropout_ "
    "feature_dropout feature_dropout_ gru lobpcg lstm native_dropout pca_lowrank rnn_relu rnn_tanh "
    "rrelu rrelu_ svd_lowrank"
)
_UNHOOKABLE = frozenset(
    [getattr(F, name) for name in _PYTHON_UNHOOKABLE.split()]
    + [getattr(torch, name) for name in _TORCH_UNHOOKABLE.split()]
    + [getattr(torch, name) for name in _LIKE.split() if name not in _LIKE_NAMES]
)


class UnhookableDrawError(BaseException):
    """A dataset may have drawn from a generator that the prefetch thread cannot isolate.

    The belt catches it. Not an `Exception`, so that a dataset which tries again on errors does not.

    Args:
        names: The generators, as a user knows them.
        is_certain: Whether it was the dataset: a global generator that moved while the thread worked
            may as well have been drawn from by the model.
    """

    def __init__(self, names: Sequence[str], *, is_certain: bool) -> None:
        self.names, self.is_certain = tuple(names), is_certain
        super().__init__(listed(names))


class GeneratorMode(TorchFunctionMode):
    """Give every torch draw of this thread one generator, and watch for draws that take none.

    Args:
        generator: What is drawn from; None leaves the draws alone.
        refuses: Raise an UnhookableDrawError before such a draw; otherwise only name it.

    Attributes:
        unhookable: The functions called that draw and take no generator.
    """

    def __init__(self, generator: torch.Generator | None, *, refuses: bool = False) -> None:
        super().__init__()
        self._generator, self._refuses = generator, refuses
        self._seed: Seed | None = None
        self.unhookable: list[str] = []

    def seed_before_draw(self, seed: Seed | None) -> None:
        """Have the generator seeded if and when it is drawn from next."""
        self._seed = seed

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _HOOKABLE:
            is_global = kwargs.get("generator") in (None, torch.default_generator)
            if is_global and self._generator is not None and _is_on_cpu(args, kwargs):
                if self._seed is not None:
                    self._generator.manual_seed(self._seed())
                    self._seed = None
                kwargs = {**kwargs, "generator": self._generator}
        elif func in _UNHOOKABLE:
            self.unhookable.append(f"torch.{func.__name__}")
            if self._refuses:
                raise UnhookableDrawError(self.unhookable, is_certain=True)
        return func(*args, **kwargs)


def _is_on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    first = args[0] if args else None
    device = first.device if isinstance(first, torch.Tensor) else kwargs.get("device") or "cpu"
    return torch.device(device).type == "cpu"
