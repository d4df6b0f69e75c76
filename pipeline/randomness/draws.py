"""Random draws of a dataset: the same numbers inline, beside the loop, and in the textbook loop.

While sample ``index`` is made, the global generators of torch, NumPy and Python behave as if they had just
been seeded from ``(seed, epoch, index)``; afterwards they are as they were. So augmentation gives the same
sample wherever it runs, and the model's dropout, which draws from torch's global generator, never notices.

How it is kept, cheapest first:

- **Isolated** (loop thread). Generators are seeded for each sample and put back after the batch. This is the
  definition; the other two give the same numbers. The first samples are made so, with all three generators,
  to see which of them the dataset draws from; later those alone are seeded.
- **Watched** (loop thread). Most datasets draw nothing. The generators are left alone and compared
  after each batch; if one has moved all the same, it is put back and the batch is made again, isolated. Where
  making a batch moves a state of the dataset's own, all generators are isolated, and nothing is made twice.
- **Hooked** (prefetch threads; several threads of a worker process, see `worker_threads.py`). The loop thread
  draws from the same global generators, so they cannot be seeded here. A torch function mode, which is
  thread-local, hands each torch draw a generator of the sample's own. Python's and NumPy's generators have
  no such hook, nor do draws that take no generator (`F.dropout`): these are noticed and raise
  `UnhookableDrawError` before their batch is used, upon which the belt goes on in the loop thread, isolated.

Not exact, because the first batch of an epoch (of a worker with several threads) does not show it: a dataset
that only later reseeds torch (`torch.manual_seed`, `fork_rng`) or draws in a traced function; and one that
only later draws from Python's or NumPy's generator while the model draws from the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from pipeline.randomness.generator_mode import GeneratorMode, Seed, UnhookableDrawError
from pipeline.randomness.generators import GlobalGenerator, TorchGenerator, Watch, global_generators, standing
from pipeline.randomness.seeds import take_generators

_NUM_ISOLATED = 64  # samples that show what a dataset draws from; to seed all three takes 20 µs

Made = TypeVar("Made")
Make = Callable[[Callable[[Seed], None] | None], Made]
"""Makes a batch; calls what it is given with a sample's seed before it makes that sample."""


class _TouchedGenerator:
    """Stands in for torch's global generator and notes that somebody took it in hand.

    `torch.manual_seed`, `fork_rng` and their like go past torch's functions, and may put back what
    they changed, so that a watch sees nothing.
    """

    def __init__(self) -> None:
        self.is_touched = False

    def __getattr__(self, name: str) -> Any:
        self.is_touched = True
        return getattr(torch.default_generator, name)


@contextmanager
def _watching_hands() -> Iterator[_TouchedGenerator]:
    standing_in, functions = _TouchedGenerator(), vars(torch.random)
    before = functions["default_generator"]
    functions["default_generator"] = standing_in
    try:
        yield standing_in
    finally:
        functions["default_generator"] = before


class _SeedingAll:
    """Seeds all generators before each of the first samples, and sees which of them the samples draw from.

    Attributes:
        is_late: Whether one was first drawn from after it was no longer seeded.
    """

    def __init__(self, generators: list[GlobalGenerator]) -> None:
        self._generators, self._num_left = generators, _NUM_ISOLATED
        self._drawn: list[GlobalGenerator] = []
        self._seen = [each.fingerprint() for each in generators]
        self.is_late = False

    def seed(self, seed: Seed) -> None:
        self._look()
        self._num_left -= 1
        value = seed() if self._num_left >= 0 or self._drawn else 0
        for number, generator in enumerate(self._generators):
            if self._num_left >= 0 or generator in self._drawn:
                generator.seed(value)
                self._seen[number] = generator.fingerprint()

    def drawn(self) -> list[GlobalGenerator]:
        """Return those that were drawn from."""
        self._look()
        return self._drawn

    def _look(self) -> None:
        for generator, seen in zip(self._generators, self._seen, strict=True):
            if generator not in self._drawn and generator.fingerprint() != seen:
                self._drawn.append(generator)
                self.is_late |= self._num_left < 0


class SampleRandomness:
    """Makes batches so that their samples draw from seeds of their own; see the module's text.

    Attributes:
        suspects: The threads that met a draw of which it is not known yet whether the dataset made it;
            `on_loop_thread` finds out.
        cleared: Batches of this epoch that were made, by whomever, and it is known whether they drew.
        innocent: Names of generators that the model draws from: they move at any time.
    """

    def __init__(self) -> None:
        self._drawn: list[GlobalGenerator] = []
        self._has_begun = False
        self._watch = Watch(global_generators())
        self.suspects: list[ThreadRandomness] = []
        self.cleared: set[Hashable] = set()
        self.innocent: set[str] = set()
        self._marks: list[Any] | None = None

    @property
    def drawn(self) -> tuple[str, ...]:
        """The global generators that the dataset was seen to draw from."""
        return tuple(each.name for each in self._drawn)

    def on_loop_thread(self, make: Make[Made], batch: Hashable = None) -> Made:
        """Make a batch watched, or isolated once anything has been drawn.

        Args:
            make: Makes it; called again if it was seen to draw from something new.
            batch: Which one it is, in its epoch.

        Runs on:
            Loop thread, or a thread of a worker process while no other makes a batch.
        """
        take_generators()
        if not self._has_begun:
            return self._begin(make, batch)
        while True:
            self._watch.start(self._drawn)
            (self._marks or []).clear()
            try:
                made = make(self._seed_drawn if self._drawn else None)
                self._mark()
            finally:
                moved = self._watch.moved()
                self._watch.restore(moved)
            unknown = [each for each in moved if each not in self._drawn]
            if not unknown:
                if self.suspects:
                    self._settle(batch)
                return made
            self._drawn.extend(unknown)  # seeded from now on, for this batch too

    def _begin(self, make: Make[Made], batch: Hashable) -> Made:
        """Make the first batch: all generators are seeded for its first samples, and watched."""
        generators = global_generators()
        self._watch.start(generators)
        seeding = _SeedingAll(generators)
        try:
            made = make(seeding.seed)
        finally:
            drawn = seeding.drawn()
            self._watch.restore(generators)
        self._has_begun = True
        self._drawn.extend(each for each in drawn if each not in self._drawn)
        if seeding.is_late:  # a generator that was no longer seeded was drawn from
            return self.on_loop_thread(make, batch)
        if self.suspects:
            self._settle(batch)
        return made

    def isolate_all(self) -> None:
        """Seed every generator for each sample from now on, so that no batch has to be made again."""
        self._has_begun = True
        self._drawn.extend(each for each in global_generators() if each not in self._drawn)

    def probe(self, make: Make[Made], batch: Hashable = None) -> Made:
        """Make a batch hooked on the loop thread, where torch's generator can be watched as well.

        So a draw is found that is in none of the tables above, before a thread makes one like it.

        Raises:
            UnhookableDrawError: As in a thread; here it is certain.

        Runs on:
            Loop thread.
        """
        take_generators()
        self._watch.start(self._drawn)
        hook = ThreadRandomness(self)
        try:
            with _watching_hands() as hands:
                made = hook.hooked(make)
        finally:
            moved = self._watch.moved()
            self._watch.restore(moved)
        names = [each.name for each in moved] or ["torch.random"] * hands.is_touched
        if names:
            raise UnhookableDrawError(names, is_certain=True)
        return made

    @contextmanager
    def marked(self) -> Iterator[list[Any]]:
        """Have it noted, inside the block, how far each sample draws; the last batch made is what counts."""
        self._marks = marks = list[Any]()
        try:
            yield marks
        finally:
            self._marks = None

    def _mark(self) -> None:
        if self._marks is not None:
            self._marks.append([standing(each) for each in self._drawn])

    def _seed_drawn(self, seed: Seed) -> None:
        self._mark()
        value = seed()
        for generator in self._drawn:
            generator.seed(value)

    def drop_suspicions(self) -> None:
        """Forget who is suspected: their batches will not be made again, so nothing is known of them."""
        self.suspects.clear()
        self.cleared.clear()

    def _settle(self, batch: Hashable) -> None:
        """Say of the suspects whether the dataset drew, once each of their batches was made again here.

        If it did, what it drew in the threads is put back to where it was before the first of them. If it
        did not, the model draws from that generator: watching it tells nothing any more.
        """
        self.cleared.add(batch)
        if not all(thread.batch in self.cleared for thread in self.suspects):
            return  # one of the others may have drawn what this one saw
        for thread in reversed(self.suspects):
            thread.restore(self._drawn)
            self.innocent.update(each.name for each in thread.moved if each not in self._drawn)
        self.drop_suspicions()


class ThreadRandomness:
    """Makes batches hooked, on one thread that is not the loop thread.

    Args:
        shared: Of the dataset.
        watches_torch: Whether nobody but the dataset draws from torch's global generator, as in a worker
            process: then it is watched too.

    Attributes:
        moved: The global generators that moved while the last batch was made.
        batch: Which one that was.
    """

    def __init__(self, shared: SampleRandomness, *, watches_torch: bool = False) -> None:
        self._shared = shared
        generators = global_generators()
        self._watch = Watch(each for each in generators if watches_torch or each.name != TorchGenerator.name)
        self._mode = GeneratorMode(torch.Generator(), refuses=True)
        self.moved: list[GlobalGenerator] = []
        self.batch: Hashable = None

    def make(self, make: Make[Made], batch: Hashable = None) -> Made:
        """Make a batch hooked.

        Args:
            make: Makes it.
            batch: Which one it is, in its epoch.

        Raises:
            UnhookableDrawError: If that could not be done; the batch must not be used.

        Runs on:
            A prefetch thread, or a thread of a worker process.
        """
        self._watch.forget(self._shared.innocent)
        self._watch.start()
        made = self.hooked(make)
        # Not put back here: it may have been the model that drew, in the loop thread, meanwhile.
        self.moved = self._watch.moved()
        if self.moved:
            self.batch = batch
            self._shared.suspects.append(self)
            raise UnhookableDrawError([each.name for each in self.moved], is_certain=False)
        if self._shared.suspects:
            self._shared.cleared.add(batch)
        return made

    def hooked(self, make: Make[Made]) -> Made:
        """Make a batch whose torch draws come from each sample's own generator."""
        self._mode.unhookable.clear()
        with self._mode:
            return make(self._mode.seed_before_draw)

    def restore(self, drawn: Container[GlobalGenerator]) -> None:
        """Put back those that moved and that the dataset draws from."""
        self._watch.restore(each for each in self.moved if each in drawn)
