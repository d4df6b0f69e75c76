"""Which Python function a thread is in: three reads of its innermost frame."""

from __future__ import annotations

import struct
from typing import Any

from pipeline.gil.measuring.process_memory import Memory

TYPE_OFFSET = 8  # of an object's type, and of a text's length, in every 64-bit CPython since 3.11
LENGTH_OFFSET = 16
TAG_BITS = 7  # 3.14 tags its references
MAX_ENTRY_FRAMES = 4


class Functions:
    """Finds and names code objects.

    The measured thread is not paused, so what is read may be half changed; a code object counts
    only if it is one by its type.

    Args:
        memory: Of the measured process.
        offsets: From `pipeline.gil.measuring.calibrate.find_frames`.
    """

    def __init__(self, memory: Memory, offsets: dict[str, Any]) -> None:
        self._memory, self._offsets = memory, offsets
        self.names: dict[int, tuple[str, str, int]] = {}  # function, file, first line

    def top_code(self, tstate: int) -> int:
        """Return the code object of the innermost Python function; 0 if none could be read."""
        address = tstate
        for offset in self._offsets["hops"]:
            address = self._memory.word(address + offset)
        for _ in range(MAX_ENTRY_FRAMES):
            code = self._memory.word(address + self._offsets["code"]) & ~TAG_BITS if address else 0
            if code not in self.names and not self._name(code):
                return 0
            if not self.names[code][1].startswith("<interpreter"):
                return code
            address = self._memory.word(address + self._offsets["previous"])
        return 0

    def _name(self, code: int) -> bool:
        memory, offsets = self._memory, self._offsets
        if not code or memory.word(code + TYPE_OFFSET) != offsets["code_type"]:
            return False
        function = self._text(memory.word(code + offsets["qualname"]))
        file = self._text(memory.word(code + offsets["filename"]))
        line = struct.unpack("<i", memory.read(code + offsets["firstlineno"], 4) or bytes(4))[0]
        self.names[code] = (function, file, line)
        return True

    def _text(self, address: int) -> str:
        if self._memory.word(address + TYPE_OFFSET) != self._offsets["str_type"]:
            return "?"
        length = min(self._memory.word(address + LENGTH_OFFSET), 400)
        return self._memory.read(address + self._offsets["text"], length).decode("utf-8", "replace")
