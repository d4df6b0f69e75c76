"""Random draws of a dataset: the same numbers inline, beside the loop, and in the textbook loop.

What is promised: while sample ``index`` is made, the global generators of torch, NumPy and Python
behave as if they had just been seeded from ``(seed, epoch, index)``, and afterwards they are as they
were. So unmodified augmentation gives the same sample wherever it runs, and the model's dropout,
which draws from torch's global generator, never notices.

How it is kept, cheapest first:

- **Watched** (loop thread). Most datasets draw nothing. The generators are left alone and compared
  after each batch; if one has moved, it is put back and the batch is made again, isolated.
- **Isolated** (loop thread). The generators that were seen to move are seeded for each sample and
  put back after the batch. This is the definition; the other two give the same numbers.
- **Hooked** (prefetch thread). The loop thread draws from the same global generators, so they cannot
  be seeded here. A torch function mode, which is thread-local, hands each torch draw a generator of
  the sample's own. Python's and NumPy's generators have no such hook, nor do draws that take no
  generator (`F.dropout`): these are noticed and raise `UnhookableDrawError` before their batch is
  used, upon which the belt goes on in the loop thread, isolated.

One case is not exact: a model and a dataset that both draw from Python's or NumPy's generator, the
dataset so seldom that its first batch does not show it. The samples are right even then; the model
may see a number twice, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from pipeline.data.generators import GlobalGenerator, TorchGenerator, Watch, global_generators

Made = TypeVar("Made")
Make = Callable[[Callable[[int], None]], Made]
"""Makes a batch; calls what it is given with a sample's seed before it makes that sample."""

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
    "fractional_max_pool2d fractional_max_pool3d gumbel_softmax multi_head_attention_forward rrelu"
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


class UnhookableDrawError(Exception):
    """A dataset drew from a generator that the prefetch thread cannot isolate; the belt catches it.

    Args:
        names: The generators, as a user knows them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(", ".join(names))


class GeneratorMode(TorchFunctionMode):
    """Give every torch draw of this thread one generator, and name the draws that take none.

    Attributes:
        generator: What is drawn from; None leaves the draws alone and only names those others.
        unhookable: The functions called that draw and take no generator.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self.generator = generator
        self.unhookable: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _HOOKABLE:
            is_free = self.generator is not None and kwargs.get("generator") is None
            if is_free and _is_on_cpu(args, kwargs):
                kwargs = {**kwargs, "generator": self.generator}
        elif func in _UNHOOKABLE:
            self.unhookable.append(f"torch.{func.__name__}")
        return func(*args, **kwargs)


def _is_on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    first = args[0] if args else None
    device = first.device if isinstance(first, torch.Tensor) else kwargs.get("device") or "cpu"
    return torch.device(device).type == "cpu"


class SampleRandomness:
    """Makes batches so that their samples draw from seeds of their own; see the module's text."""

    def __init__(self) -> None:
        generators = global_generators()
        self._drawn: list[GlobalGenerator] = []
        self._loop_watch = Watch(generators)
        self._thread_watch = Watch(each for each in generators if each.name != TorchGenerator.name)
        self._generator = torch.Generator()
        self._mode = GeneratorMode(self._generator)
        self._suspects: list[GlobalGenerator] = []

    def on_loop_thread(self, make: Make[Made]) -> Made:
        """Make a batch watched, or isolated once anything has been drawn.

        Runs on:
            Loop thread.
        """
        while True:
            self._loop_watch.start()
            try:
                made = make(self._seed_drawn)
            finally:
                moved = self._loop_watch.moved()
                self._loop_watch.restore(moved)
            unknown = [each for each in moved if each not in self._drawn]
            if not unknown:
                self._undo_in_thread()
                return made
            self._drawn.extend(unknown)  # seeded from now on, for this batch too

    def in_thread(self, make: Make[Made]) -> Made:
        """Make a batch hooked.

        Raises:
            UnhookableDrawError: If that could not be done; the batch must not be used.

        Runs on:
            Prefetch thread.
        """
        self._mode.unhookable.clear()
        self._thread_watch.start()
        with self._mode:
            made = make(self._seed_hook)
        # Not put back here: it may have been the model that drew, in the loop thread, meanwhile.
        self._suspects = self._thread_watch.moved()
        if self._suspects or self._mode.unhookable:
            raise UnhookableDrawError([*(each.name for each in self._suspects), *self._mode.unhookable])
        return made

    def probe(self, make: Make[Made]) -> Made:
        """Make a batch hooked on the loop thread, where torch's generator can be watched as well.

        So a draw is found that is in none of the tables above, before a thread makes one like it.

        Raises:
            UnhookableDrawError: As `in_thread`.

        Runs on:
            Loop thread.
        """
        self._loop_watch.start()
        try:
            made = self.in_thread(make)
        finally:
            moved = self._loop_watch.moved()
            self._loop_watch.restore(moved)
        if moved:
            raise UnhookableDrawError([each.name for each in moved])
        return made

    def _seed_drawn(self, seed: int) -> None:
        for generator in self._drawn:
            generator.seed(seed)

    def _seed_hook(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def _undo_in_thread(self) -> None:
        """Put back what the dataset drew in the prefetch thread, once it is seen that it does draw."""
        self._thread_watch.restore(each for each in self._suspects if each in self._drawn)
        self._suspects = []
