"""Read a process's memory through an open ``/proc/self/mem``: a wrong address is no crash."""

from __future__ import annotations

import os
import struct

WORD_BYTES = 8


class Memory:
    """The memory of the process that opened the descriptor, which may be another than this one.

    Permission is checked when the file is opened, so a child that inherits the descriptor may read
    with no privilege of its own. Nothing is ever written.

    Args:
        fd: Of ``/proc/self/mem``, opened for reading.

    Source:
        proc(5), "/proc/pid/mem".
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def read(self, address: int, size: int) -> bytes:
        """Return the bytes at an address; none if it is not mapped."""
        try:
            return os.pread(self.fd, size, address)
        except (OSError, OverflowError):
            return b""

    def word(self, address: int) -> int:
        """Return the unsigned 64-bit word at an address; 0 if it is not mapped."""
        return int.from_bytes(self.read(address, WORD_BYTES), "little")

    def words(self, address: int, count: int) -> list[int]:
        """Return so many words from an address on, or as many as are mapped."""
        blob = self.read(address, count * WORD_BYTES)
        return list(struct.unpack_from(f"<{len(blob) // WORD_BYTES}Q", blob))
