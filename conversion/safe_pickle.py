"""Read checkpoint files without running anything that is in them.

A pickle is a program: whatever it names is imported and called. Here it can name NumPy's array constructors and the
ordered dictionary, nothing else, and the constructors are stand-ins in this module, so neither NumPy's unpickling code
nor its module names (`numpy.core` became `numpy._core` in 2.0) matter. Files in torch's formats are left to
`torch.load`, whose `weights_only` reader follows the same rule.

Plain data can do harm as well: a tuple nested a million times overflows the C stack when it is hashed, a memo number
of a billion reserves gigabytes. So the instructions of every pickle are checked before any is executed.
"""

from __future__ import annotations

import logging
import pickle
import pickletools
import re
import reprlib
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch


logger = logging.getLogger(__name__)

_ADVICE = "Nothing of it was run. If you trust where it came from, save its state dict alone with torch.save."

# Where files keep the parameters, in the order of preference; a file may also be the dictionary itself.
_ENTRIES = ("model", "state_dict", "ema_state", "model_ema", "ema_model", "ema")
_AVERAGED = _ENTRIES[2:]

_ZIP, _TAR, _TAR_OFFSET = b"PK\x03\x04", b"ustar", 257
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch before 1.6 wrote first, pickled
_LEGACY_PICKLES = 5  # that number, a version, the machine, the contents, the names of the storages


class UnsafeCheckpointError(ValueError):
    """The file names something other than arrays, tensors, containers, strings and numbers."""


def load_state_dict(path: str | Path) -> dict[str, np.ndarray | torch.Tensor]:
    """Read the parameters of a checkpoint of the original.

    The content decides how a file is read, not its name.

    Args:
        path: A pickle of NumPy arrays (as released: `{"model": {name: array}, ...}`, or the inner dictionary alone), or
            a file that `torch.save` wrote, laid out alike. Where there is no `model`, the parameters may be called
            `state_dict` or be averaged ones (`ema_state` and the like); a warning says what was taken.

    Returns:
        Every parameter by name. What else the file holds (optimizer, iteration, author) is dropped.

    Raises:
        FileNotFoundError: There is no such file.
        UnsafeCheckpointError: The file names something that is not plain data, or is made to exhaust memory or stack;
            the message says what.
        ValueError: The file is damaged, holds no parameters, or some that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    with path.open("rb") as file:
        head = file.read(_TAR_OFFSET + len(_TAR))
    if head[_TAR_OFFSET:] == _TAR:
        raise ValueError(
            f"{path} is a tar archive, as torch wrote before 0.1.10; it can't be read safely. Load it where you trust "
            "it and save it again with torch.save."
        )
    try:
        if head.startswith(_ZIP):
            contents = _load_archive(path)
        elif head.startswith(_TORCH_LEGACY):
            contents = _load_legacy(path)
        else:
            contents = _load_pickle(path)
    except UnsafeCheckpointError:
        raise
    except Exception as error:  # a damaged file fails with whatever the place raises where the damage is met
        raise ValueError(
            f"{path} is damaged or no checkpoint ({_shorten(str(error) or type(error).__name__)})."
        ) from error
    return _parameters(contents, path)


def _load_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        _check_instructions(file, path)
        file.seek(0)
        return _DataUnpickler(file, path).load()


def _load_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len({member.filename for member in members}) < len(members) or any(
            member.compress_type != zipfile.ZIP_STORED for member in members
        ):
            raise UnsafeCheckpointError(
                f"{path} was refused: it is a zip file with compressed or repeated members, which torch never writes."
            )
        pickles = [member for member in members if member.filename.endswith(".pkl")]
        for member in pickles:
            with archive.open(member) as file:
                _check_instructions(file, path, _TORCH_INSTRUCTIONS)
    return _load_torch(path, mmap=True)  # the optimizer's state, which is not used, is not read


def _load_legacy(path: Path) -> Any:
    with path.open("rb") as file:
        for _ in range(_LEGACY_PICKLES):
            _check_instructions(file, path, _TORCH_INSTRUCTIONS)
    return _load_torch(path, mmap=False)


def _load_torch(path: Path, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(_ALLOWED_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise
        raise UnsafeCheckpointError(
            f"{path} was refused: it asks for {asked[1]}, and only tensors and containers are read. {_ADVICE}"
        ) from None


def _parameters(contents: Any, path: Path) -> dict[str, np.ndarray | torch.Tensor]:
    # Methods are called as dict's own: a pickle may have given its ordered dictionary attributes of their names.
    if isinstance(contents, dict):
        entries = [name for name in _ENTRIES if isinstance(dict.get(contents, name), dict)]
        if entries:
            _warn_of_averages(entries, path)
            contents = dict.get(contents, entries[0])
    if not isinstance(contents, dict) or not contents:
        raise ValueError(f"{path} holds no parameters: expected a dictionary, or one under 'model'.")
    parameters = {}
    for name, value in dict.items(contents):
        if isinstance(value, _Array):
            value = value.array
        if not isinstance(name, str):
            raise ValueError(f"{path}: the name of a parameter is a {type(name).__name__}, not text.")
        if not isinstance(value, np.ndarray | torch.Tensor):
            raise ValueError(f"{path}: {_shorten(repr(name))} is a {type(value).__name__}, not an array or tensor.")
        parameters[name] = value
    _check_values(parameters, path)
    return parameters


def _warn_of_averages(entries: list[str], path: Path) -> None:
    taken, *others = entries
    if taken not in ("model", "state_dict"):
        logger.warning("%s has no 'model': the averaged weights under %r are taken.", path, taken)
    for other in others:
        if other in _AVERAGED:
            logger.warning(
                "%s has averaged weights under %r and others under %r, which are taken. To convert the averaged ones "
                "save them alone: torch.save(torch.load(FILE, weights_only=True)[%r], OTHER_FILE).",
                *(path, other, taken, other),
            )


def _check_values(parameters: dict[str, np.ndarray | torch.Tensor], path: Path) -> None:
    for name, value in parameters.items():
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
                raise ValueError(f"{path}: {name!r} is no plain tensor, but {value.layout}, {value.dtype}.")
            # A stride of zero would make a tensor of any size out of a few bytes.
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UnsafeCheckpointError(
                    f"{path} was refused: {name!r} claims the shape {tuple(value.shape)} with "
                    f"{value.untyped_storage().nbytes()} bytes of data. {_ADVICE}"
                )
            finite = bool(value.isfinite().all())
        else:
            finite = bool(np.isfinite(value).all())
        if not finite:
            raise ValueError(
                f"{path}: {name!r} has values that are not finite; the training diverged. Take an earlier checkpoint."
            )


def _shorten(text: str, most: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + "…"


# --- before a pickle is followed ---


# All that ordinary pickles consist of. Left out: names by number (EXT), text for persistent ids, buffers outside the
# file, and the instructions with which only a tuple that contains itself is made.
_ORDINARY = """
PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS
EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET
PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
GLOBAL STACK_GLOBAL REDUCE BUILD INST OBJ NEWOBJ NEWOBJ_EX BINPERSID
"""
_INSTRUCTIONS = frozenset(_ORDINARY.split())
_TORCH_INSTRUCTIONS = _INSTRUCTIONS - {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX"}  # the rest its reader knows
_PUT = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_GET = ("GET", "BINGET", "LONG_BINGET")
_MARK = -1
_MOST_NESTED = 100


def _check_instructions(file: IO[bytes], path: Path, allowed: frozenset[str] = _INSTRUCTIONS) -> None:
    """Check the instructions of one pickle, from the position of `file` to its end, without executing them.

    A stack like the reader's holds, for each value, how deep tuples are nested in it.

    Raises:
        UnsafeCheckpointError: An instruction that ordinary pickles don't have, a memo number beyond all that were put
            there, or tuples nested without end.
        ValueError, LookupError, EOFError: It is damaged.
    """
    stack: list[int] = []
    memo: dict[int, int] = {}
    opcode: pickletools.OpcodeInfo
    argument: Any
    for opcode, argument, position in pickletools.genops(file):
        name = opcode.name
        if name not in allowed:
            what = f"{name} {_shorten(argument)}" if isinstance(argument, str) else name
            raise UnsafeCheckpointError(
                f"{path} was refused: it has the pickle instruction {what}, which data doesn't need. {_ADVICE}"
            )
        if name == "FRAME":
            _check_frame(file, argument)
        elif name in _PUT:
            key = len(memo) if name == "MEMOIZE" else argument
            if key > (position or 0):  # each number was put there by an instruction of its own
                raise UnsafeCheckpointError(f"{path} was refused: its memo number {key} would exhaust the memory.")
            memo[key] = stack[-1]
        elif name in _GET:
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        else:
            taken = _take(stack, opcode.stack_before)
            depth = 1 + max(taken, default=0) if name.startswith("TUPLE") else 0
            if depth > _MOST_NESTED:
                raise UnsafeCheckpointError(f"{path} was refused: it nests tuples more than {_MOST_NESTED} deep.")
            stack.extend([depth] * len(opcode.stack_after))


def _take(stack: list[int], wanted: list[pickletools.StackObject]) -> list[int]:
    """Pop what an instruction takes off the stack, and return it."""
    count = len(wanted)
    if pickletools.markobject in wanted:
        above_mark = 0
        while stack[-1 - above_mark] != _MARK:
            above_mark += 1
        count = wanted.index(pickletools.markobject) + 1 + above_mark
    if count > len(stack):
        raise IndexError("an instruction takes more values than there are")
    taken = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return taken


def _check_frame(file: IO[bytes], length: int) -> None:
    here = file.tell()
    if length > file.seek(0, 2) - here:
        raise EOFError("a frame is longer than the file")
    file.seek(here)


# --- what a pickle can make ---


class _DataUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: Path):
        super().__init__(file, encoding="latin1")  # Python 2 wrote array bytes as text
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module.replace("numpy._core.", "numpy.core."), name))
        if allowed is None:
            raise UnsafeCheckpointError(
                f"{self._path} was refused: it asks for {_shorten(f'{module}.{name}')}, and only arrays and "
                f"containers are read. {_ADVICE}"
            )
        return allowed

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafeCheckpointError(
            f"{self._path} was refused: it refers to data outside itself ({reprlib.repr(pid)})."
        )


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
    """Stands for a pickled `numpy.dtype` of numbers: made from a code such as `f4`, then given its byte order."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: Any):
        if not isinstance(code, str) or not re.fullmatch(r"[<>=|]?[biuf]\d", code):
            raise UnsafeCheckpointError(
                f"The checkpoint was refused: {reprlib.repr(code)} is not an array type of plain numbers."
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for a pickled `numpy.ndarray`: made empty, then given shape, type and bytes."""

    __slots__ = ("array",)

    def __init__(self, *_: Any):
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran_order, raw = state
        self.array = _from_bytes(raw, dtype, shape, "F" if fortran_order else "C")


def _from_bytes(raw: bytes | bytearray | str, dtype: _DType, shape: tuple[int, ...], order: str) -> np.ndarray:
    if isinstance(raw, str):
        raw = raw.encode("latin1")
    # No shape is taken on trust: it must be that of the bytes that are there.
    array = np.frombuffer(raw, dtype=dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _array_from_buffer(raw: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.array = _from_bytes(raw, dtype, shape, order)
    return array


def _scalar(dtype: _DType, raw: bytes) -> _Array:
    return _array_from_buffer(raw, dtype, (), "C")


def _no_bytes() -> bytes:
    """Return empty bytes, as protocols 0 to 2 write them."""
    return b""


def _encode(text: str, encoding: str) -> bytes:
    """Return other bytes, as protocols 0 to 2 write them."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes are encoded as latin1, not {reprlib.repr(encoding)}")
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

# torch's reader knows tensors and containers; arrays in its files (a scheduler's numbers, say) are read by the
# stand-ins above. It sets the state of what it was given the class of.
_ALLOWED_NUMPY: list[Any] = [
    (_Array, "numpy.ndarray"),
    (_DType, "numpy.dtype"),
    *(
        (_ALLOWED[f"numpy.core.{module}", name], f"numpy.{core}.{module}.{name}")
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    ),
]
