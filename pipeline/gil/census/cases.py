"""What the census measures unless told otherwise: the standard library and what else is installed."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import pickle
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Something to measure.

    Args:
        name: As it is listed, and as ``--only`` finds it.
        needs: The packages without which it is left out.
        open: Enters a context whose value is the callable.
    """

    name: str
    needs: tuple[str, ...]
    open: Callable[[], AbstractContextManager[Call]]

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for package in self.needs if importlib.util.find_spec(package) is None]


def plain(make: Callable[[], Call]) -> Callable[[], AbstractContextManager[Call]]:
    """Return the context of a callable that has nothing to close."""

    @contextmanager
    def open_case() -> Iterator[Call]:
        yield make()

    return open_case


def all_cases() -> list[Case]:
    """Return every case, whether its packages are installed or not."""
    from pipeline.gil.census import engines, tensors

    return [*standard_cases(), *array_cases(), *tensors.cases(), *engines.cases()]


def standard_cases() -> list[Case]:
    """Return the cases of the standard library."""
    return [
        Case("pure Python loop", (), plain(lambda: _python_loop)),
        Case("time.sleep(1 ms)", (), plain(lambda: lambda: time.sleep(0.001))),
        Case("file: write and read 1 MB", (), _file),
        Case("socket: send and receive 64 KB", (), _socket),
        Case("hashlib.sha256, 1 MB", (), plain(_sha256)),
        Case("zlib.compress, 256 KB", (), plain(_zlib)),
        Case("json.dumps and loads, 60 KB", (), plain(_json)),
        Case("pickle.dumps and loads, 10,000 numbers", (), plain(_pickle)),
        Case("print, to /dev/null", (), _print),
        Case("tqdm.update", ("tqdm",), _tqdm),
    ]


def array_cases() -> list[Case]:
    """Return the cases of NumPy and Pillow."""
    return [
        Case("numpy: sqrt of 1,000,000", ("numpy",), plain(_numpy_sqrt)),
        Case("numpy: a + b of 16", ("numpy",), plain(_numpy_small)),
        Case("numpy: sort of 100,000", ("numpy",), plain(_numpy_sort)),
        Case("Pillow: decode a JPEG of 500x400", ("PIL", "numpy"), plain(_pillow_decode)),
        Case("Pillow: resize to 224x224", ("PIL", "numpy"), plain(_pillow_resize)),
        Case("numpy.asarray(Pillow image)", ("PIL", "numpy"), plain(_pillow_asarray)),
    ]


def _python_loop() -> int:
    total = 0
    for number in range(1000):
        total += number
    return total


@contextmanager
def _file() -> Iterator[Call]:
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(buffering=0) as file:

        def call() -> None:
            file.seek(0)
            file.write(data)
            file.seek(0)
            file.read()

        yield call


@contextmanager
def _socket() -> Iterator[Call]:
    left, right = socket.socketpair()
    data = bytes(1 << 16)

    def call() -> None:
        left.sendall(data)
        missing = len(data)
        while missing:
            missing -= len(right.recv(missing))

    with left, right:
        yield call


@contextmanager
def _print() -> Iterator[Call]:
    with open(os.devnull, "w") as nowhere:
        yield lambda: print("epoch", 3, "loss", 0.25, file=nowhere, flush=True)


@contextmanager
def _tqdm() -> Iterator[Call]:
    from tqdm import tqdm

    with open(os.devnull, "w") as nowhere, tqdm(file=nowhere, total=10**9) as bar:
        yield bar.update


def _sha256() -> Call:
    data = os.urandom(1 << 20)
    return lambda: hashlib.sha256(data).digest()


def _zlib() -> Call:
    data = os.urandom(1 << 17) + bytes(1 << 17)
    return lambda: zlib.compress(data)


def _json() -> Call:
    value = [{"id": i, "text": f"word {i}", "scores": [0.5, 1.5]} for i in range(1000)]
    return lambda: json.loads(json.dumps(value))


def _pickle() -> Call:
    value = [float(i) for i in range(10_000)]
    return lambda: pickle.loads(pickle.dumps(value))


def _numpy_sqrt() -> Call:
    import numpy as np

    values = np.ones(1_000_000)
    return lambda: np.sqrt(values)


def _numpy_small() -> Call:
    import numpy as np

    left, right = np.ones(16), np.ones(16)
    return lambda: left + right


def _numpy_sort() -> Call:
    import numpy as np

    values = np.random.default_rng(0).random(100_000)
    return lambda: np.sort(values)


def jpeg() -> bytes:
    """Return a JPEG of 500x400 with some structure and some noise."""
    import numpy as np
    from PIL import Image

    rng, wave = np.random.default_rng(0), np.linspace(0, 20, 500)
    pixels = 127 + 80 * np.sin(wave)[None, :, None] + rng.normal(0, 15, (400, 500, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _image() -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(jpeg())).convert("RGB")


def _pillow_decode() -> Call:
    from PIL import Image

    data = jpeg()
    return lambda: Image.open(io.BytesIO(data)).convert("RGB")


def _pillow_resize() -> Call:
    image = _image()
    return lambda: image.resize((224, 224))


def _pillow_asarray() -> Call:
    import numpy as np

    image = _image()
    return lambda: np.asarray(image)
