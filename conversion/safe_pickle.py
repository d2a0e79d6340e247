"""Read checkpoint files without running anything that is in them.

A pickle is a program: whatever it names is imported and called. Here it can name NumPy's array constructors and the
ordered dictionary, nothing else, and the constructors are stand-ins of this module, so neither NumPy's unpickling code
nor its module names (`numpy.core` became `numpy._core` in 2.0) matter. Files in torch's format are left to
`torch.load`, whose `weights_only` reader follows the same rule.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch


_HOW_TO_TRUST = "Nothing of it was run. If you trust where it came from, save its state dict alone with torch.save."


class UnsafeCheckpointError(ValueError):
    """The file asks for something else than arrays, tensors, containers, strings and numbers."""


def load_state_dict(path: str | Path) -> dict[str, np.ndarray | torch.Tensor]:
    """Read the parameters of a checkpoint of the original.

    Args:
        path: A pickle (`.pkl`: `{"model": {name: array}, ...}`, or the inner dictionary alone), or a file that
            `torch.save` wrote (any other name), laid out alike.

    Returns:
        Every parameter by name. What else the file holds (optimizer, iteration, author) is dropped.

    Raises:
        FileNotFoundError: There is no such file.
        UnsafeCheckpointError: The file names something that is not plain data; the message says what.
        ValueError: The file is damaged, or holds no parameters.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    # Some releases are torch archives under a pickle's name; the content decides.
    contents = _load_pickle(path) if path.suffix == ".pkl" and not zipfile.is_zipfile(path) else _load_torch(path)
    return _parameters(contents, path)


def _load_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise ValueError(f"{path} is damaged or no torch checkpoint.") from error
        raise UnsafeCheckpointError(
            f"{path} was refused: it asks for {asked[1]}, and only tensors and containers are read. {_HOW_TO_TRUST}"
        ) from None
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no torch checkpoint ({error}).") from error


def _load_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        try:
            return _DataUnpickler(file, path).load()
        except UnsafeCheckpointError:
            raise
        # A damaged stream fails wherever the damage is met.
        except (pickle.UnpicklingError, EOFError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is damaged or no pickle ({error}).") from error


def _parameters(contents: Any, path: Path) -> dict[str, np.ndarray | torch.Tensor]:
    if isinstance(contents, dict) and isinstance(dict.get(contents, "model"), dict):
        contents = contents["model"]
    if not isinstance(contents, dict) or not contents:
        raise ValueError(f"{path} holds no parameters: expected a dictionary, or one under 'model'.")
    parameters = {}
    for name, value in dict.items(contents):
        if isinstance(value, _Array):
            value = value.array
        if not isinstance(name, str) or not isinstance(value, np.ndarray | torch.Tensor):
            raise ValueError(f"{path}: {name!r} is a {type(value).__name__}, not an array or tensor.")
        parameters[name] = value
    return parameters


class _DataUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path):
        super().__init__(file, encoding="latin1")  # Python 2 wrote array bytes as text
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module.replace("numpy._core.", "numpy.core."), name))
        if allowed is None:
            raise UnsafeCheckpointError(
                f"{self._path} was refused: it asks for {module}.{name}, and only arrays and containers are read. "
                f"{_HOW_TO_TRUST}"
            )
        return allowed

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafeCheckpointError(f"{self._path} was refused: it refers to data outside itself ({pid!r}).")


class _Constructor:
    """A function a pickle may call, and can do nothing else with.

    `__setstate__` keeps a pickle from setting attributes on it, which plain functions and classes would allow.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a constructor has no state")


class _DType:
    """Stands for a pickled `numpy.dtype` of numbers: made from a code such as `f4`, then told its byte order."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: Any):
        dtype = np.dtype(code) if isinstance(code, str) else None
        if dtype is None or dtype.kind not in "biuf":
            raise UnsafeCheckpointError(f"The checkpoint was refused: {code!r} is not an array type of plain numbers.")
        self.dtype = dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for a pickled `numpy.ndarray`: made empty, then told shape, type and bytes."""

    __slots__ = ("array",)

    def __init__(self, *_: Any):
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran_order, raw = state
        self.array = _from_bytes(raw, dtype, shape, "F" if fortran_order else "C")


def _from_bytes(raw: bytes | bytearray | str, dtype: _DType, shape: tuple[int, ...], order: str) -> np.ndarray:
    if isinstance(raw, str):
        raw = raw.encode("latin1")
    array = np.frombuffer(raw, dtype=dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    return array.astype(array.dtype.newbyteorder("="))


def _array_from_buffer(raw: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.array = _from_bytes(raw, dtype, shape, order)
    return array


def _scalar(dtype: _DType, raw: bytes) -> _Array:
    return _array_from_buffer(raw, dtype, (), "C")


def _no_bytes() -> bytes:
    """How protocols 0 to 2 write empty bytes."""
    return b""


def _encode(text: str, encoding: str) -> bytes:
    """How protocols 0 to 2 write other bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes are encoded as latin1, not {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], _Constructor] = {
    ("collections", "OrderedDict"): _Constructor(OrderedDict),
    ("numpy", "ndarray"): _Constructor(_Array),
    ("numpy", "dtype"): _Constructor(_DType),
    ("numpy.core.multiarray", "_reconstruct"): _Constructor(_Array),
    ("numpy.core.multiarray", "scalar"): _Constructor(_scalar),
    ("numpy.core.numeric", "_frombuffer"): _Constructor(_array_from_buffer),
    ("_codecs", "encode"): _Constructor(_encode),
    ("__builtin__", "bytes"): _Constructor(_no_bytes),
}
