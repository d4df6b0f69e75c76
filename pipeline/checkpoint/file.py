"""One file in the safetensors layout: a JSON header, then the tensors' bytes; written whole or not at all.

    8 bytes   the header's length, little-endian
    header    {"__metadata__": {…texts…}, "model.weight": {"dtype": "F32", "shape": […], "data_offsets": […]}}
    data      each tensor's values, in order, without gaps

Any reader of safetensors gets the tensors. The metadata, which the layout leaves to its users, holds the
rest of the state as JSON, and the manifest: SHA-256 of each part (the first word of a tensor's name), and
of the header itself with that one digest blanked.

Source:
    The description of the format in the README of huggingface/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.tensors import DTYPES
from pipeline.checkpoint.tree import unpack
from pipeline.errors import CheckpointError

FORMAT = "pipeline checkpoint 2"
SUFFIX = ".safetensors"
_BLANK = "0" * 64
_MAX_HEADER_BYTES = 1 << 30
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_file(path: Path, tensors: Mapping[str, torch.Tensor], structure: Any = None) -> int:
    """Write tensors and a packed structure so that `path` holds the old file or the new one, never half.

    The data goes to a temporary file of the same folder, is flushed to the disk, and takes the name;
    then the folder, which holds the names, is flushed too.

    Args:
        path: Where it goes; its folder exists.
        tensors: On the host, by name.
        structure: What `pack` returned; None writes bare tensors, for others.

    Returns:
        The file's size in bytes.

    Raises:
        OSError: If the disk is full or the folder cannot be written; `path` is as it was.

    Runs on:
        Any thread. Digests and writes release the GIL; what holds it is the header, some 2 µs a tensor.
    """
    named = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each is aligned
    views = [(name, _bytes_of(tensor)) for name, tensor in named]
    header = _header(named, views, structure)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(header)
            for _, view in views:
                file.write(view)
            file.flush()
            os.fsync(file.fileno())
            num_bytes = file.tell()
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return num_bytes


def read_file(path: str | Path) -> Any:
    """Return the state that `write_file` was given, every checksum compared.

    Raises:
        CheckpointError: If there is none, or it is truncated, altered, or something else.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint at {path}.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    try:
        return _parse(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from error


def sync_folder(folder: Path) -> None:
    """Have the disk hold the folder's names as they are now."""
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened, and a rename is durable by itself
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(array)


def _header(
    named: list[tuple[str, torch.Tensor]], views: list[tuple[str, memoryview]], structure: Any
) -> bytes:
    entries: dict[str, Any] = {}
    if structure is not None:
        entries["__metadata__"] = {
            "format": FORMAT,
            "header_sha256": _BLANK,
            "parts_sha256": json.dumps(_digests(iter(views))),
            "state": json.dumps(structure),
        }
    end = 0
    for (name, tensor), (_, view) in zip(named, views, strict=True):
        if tensor.dtype not in _NAMES:
            raise CheckpointError(f"{name} has dtype {tensor.dtype}, which a checkpoint cannot hold.")
        start, end = end, end + view.nbytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if structure is not None:  # its first blank: nothing before it is the user's
        text = text.replace(_BLANK.encode(), hashlib.sha256(text).hexdigest().encode(), 1)
    return struct.pack("<Q", len(text)) + text


def _digests(views: Iterator[tuple[str, memoryview]]) -> dict[str, str]:
    parts: dict[str, Any] = {}
    for name, view in views:
        parts.setdefault(name.partition(".")[0], hashlib.sha256()).update(view)
    return {part: digest.hexdigest() for part, digest in parts.items()}


def _parse(data: bytes) -> Any:
    if len(data) < 8:
        raise CheckpointError(f"it has {len(data)} bytes, so it was cut off.")
    length = struct.unpack("<Q", data[:8])[0]
    if length > _MAX_HEADER_BYTES or data[8:9] != b"{":
        raise CheckpointError("it is something else, not a safetensors file.")
    if 8 + length > len(data):
        raise CheckpointError(f"it was cut off in its header, after {len(data)} bytes.")
    text = data[8 : 8 + length]
    entries = _parse_header(text)
    metadata = entries.pop("__metadata__")
    body = memoryview(data)[8 + length :]
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if len(body) != end:
        raise CheckpointError(f"it was cut off: it has {len(body):,} of {end:,} bytes of data.")
    views = {name: body[slice(*entry["data_offsets"])] for name, entry in entries.items()}
    for part, digest in _digests(iter(views.items())).items():
        if json.loads(metadata["parts_sha256"]).get(part) != digest:
            raise CheckpointError(f"the checksum of its part '{part}' does not fit: it was altered.")
    tensors = {name: _tensor(entry, views[name]) for name, entry in entries.items()}
    return unpack(json.loads(metadata["state"]), tensors)


def _parse_header(text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text)
    except ValueError:
        raise CheckpointError("its header is no JSON: it was altered, or is something else.") from None
    metadata = entries.get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        found = metadata.get("format")
        raise CheckpointError(
            f"it is not a checkpoint of this library ({FORMAT}), but "
            + (f"one of format {found!r}." if found else "bare tensors of something else.")
        )
    digest = metadata["header_sha256"]
    if hashlib.sha256(text.replace(digest.encode(), _BLANK.encode(), 1)).hexdigest() != digest:
        raise CheckpointError("the checksum of its header does not fit: it was altered.")
    return entries  # type: ignore[no-any-return]


def _tensor(entry: dict[str, Any], view: memoryview) -> torch.Tensor:
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    if not len(view):
        return torch.empty(shape, dtype=dtype)
    # A copy each, so that one that lives on does not keep the whole file in memory.
    return torch.frombuffer(bytearray(view), dtype=dtype).reshape(shape)
