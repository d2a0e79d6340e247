"""A list that worker processes share instead of copying."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class PackedList(Sequence[Any]):
    """Read-only list of JSON values, kept as one array of bytes.

    A worker that reads a Python object writes its reference count, and so copies its memory page: a list of annotations
    ends up in memory once for each worker. Two NumPy arrays don't.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        parts = [json.dumps(value, separators=(",", ":")).encode() for value in values]
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        if not -len(self) <= index < len(self):
            raise IndexError(f"position {index} of {len(self)}")
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        return json.loads(self._bytes[start : self._ends[index]].tobytes())
