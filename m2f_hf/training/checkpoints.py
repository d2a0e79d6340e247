"""What a training run keeps on disk: checkpoints, models and its log, each written whole or left as it was."""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError


CHECKPOINT = "checkpoint-{:07d}"
STATE = "state.pt"
MARK = "written-by-m2f_hf"
"""File in each checkpoint: only folders that have it are removed later."""
_HIDDEN = re.compile(r"\.(?P<name>.+)\.m2f_hf-(?P<kind>tmp|old|parts)")
_WRITER_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error")
"""Words in the errors of `torch.save`'s writer."""


# --- atomic writes ---


def hidden_folder(target: Path, kind: str) -> Path:
    """Return where `target` is written ("tmp"), put aside ("old") or collected ("parts").

    The names are this package's own, so that clearing up removes no other program's folders.
    """
    return target.with_name(f".{target.name}.m2f_hf-{kind}")


def tidy(output: Path) -> None:
    """Clear up after a run that was killed while it wrote: remove unfinished folders, finish half-done replacements."""
    for path in output.glob(".*"):
        match = _HIDDEN.fullmatch(path.name)
        if match is None:
            continue
        target = output / match["name"]
        if match["kind"] == "old" and not target.exists():
            os.replace(path, target)
        else:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a folder to write into, which replaces `target` if the block ends well and is removed if it does not."""
    work, old = hidden_folder(target, "tmp"), hidden_folder(target, "old")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(work, target)
    shutil.rmtree(old, ignore_errors=True)


class WriteFailure(Exception):
    """Something could not be written, mostly because the disk is full; what was there before still is."""


@contextmanager
def as_write_failure(what: str) -> Iterator[None]:
    """Turn the many types of errors of writing into one.

    Raises:
        WriteFailure: instead of them.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WriteFailure(f"{what} could not be written: {error}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _WRITER_ERRORS):
            raise
        raise WriteFailure(f"{what} could not be written: {str(error).splitlines()[0]}") from error


# --- checkpoints ---


def find_checkpoint(output: Path) -> Path | None:
    """Return the last complete checkpoint of a run, None before the first.

    Other folders, such as `checkpoint-500` of `transformers.Trainer`, are ignored.
    """
    return max((path for path in _checkpoints(output) if (path / STATE).is_file()), default=None)


def _checkpoints(output: Path) -> list[Path]:
    return [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{7,}", path.name)]


def step_of(checkpoint: Path) -> int:
    """Return the number of steps done."""
    return int(checkpoint.name.rpartition("-")[2])


def save_checkpoint(
    output: Path, step: int, parts: Mapping[str, Any], save_more: Callable[[Path], Any] | None = None
) -> Path:
    """Write what a run needs to go on, then remove the earlier checkpoints that this function wrote.

    Args:
        parts: name -> object with a `state_dict` of tensors, numbers, texts, lists and dicts.
        save_more: writes further files into a folder.

    Raises:
        WriteFailure: the disk is full, or a folder of that name exists that this function did not write; older
            checkpoints are as they were.
    """
    target = output / CHECKPOINT.format(step)
    if target.exists() and not (target / MARK).exists():
        raise WriteFailure(f"{target} could not be written: another program's folder is there; move it away")
    with as_write_failure(f"The checkpoint of step {step}"), atomic_folder(target) as work:
        (work / MARK).write_text("A later checkpoint of this run replaces this folder.\n", encoding="utf-8")
        torch.save({name: part.state_dict() for name, part in parts.items()}, work / STATE)
        if save_more is not None:
            save_more(work)
    for older in _checkpoints(output):
        if older != target and (older / MARK).exists():
            shutil.rmtree(older, ignore_errors=True)
    return target


def load_checkpoint(checkpoint: Path, parts: Mapping[str, Any]) -> None:
    """Load what `save_checkpoint` wrote into the parts.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or was written by a run with other parts, such as without averaged weights.
    """
    states = _read_state(checkpoint / STATE)
    if states.keys() != parts.keys():
        differing = ", ".join(sorted(states.keys() ^ parts.keys()))
        raise ValueError(
            f"{checkpoint} was written with other settings: {differing}. Go on with those the run was started with "
            "(--ema, --mixed_precision), or start another run."
        )
    for name, part in parts.items():
        try:
            part.load_state_dict(states[name])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"The {name} of {checkpoint} does not fit ({reason}). Go on with the model, the frozen parameters and "
                "the settings that the run was started with, or start another run."
            ) from error


def _read_state(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch writes checksums and does not compare them
                raise zipfile.BadZipFile("a checksum is wrong")
        states = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(states, dict):
            raise zipfile.BadZipFile("it is no dictionary")
        return states
    except OSError:
        raise
    except Exception as error:  # damaged files raise almost anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"{path} is damaged or no checkpoint ({reason}): bring back a copy, or remove {path.parent} and start "
            "another run."
        ) from error


def save_model(model: Any, processor: Any, target: Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write a folder for `from_pretrained`; it is whole or as it was.

    Raises:
        WriteFailure: the disk is full or the like.
    """
    with as_write_failure(f"{target}"), atomic_folder(target) as work:
        model.save_pretrained(work, state_dict=state_dict)
        processor.save_pretrained(work)


# --- log ---


class Log:
    """A JSONL file of rows, each with its `step`.

    Args:
        path: the file.
        keep: decides which rows of an earlier part of the run are kept.
    """

    def __init__(self, path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        self.path = path
        kept = [row for row in read_log(path) if keep(row)] if path.exists() else []
        work = path.with_suffix(".tmp")
        work.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(work, path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row.

        Raises:
            WriteFailure: the disk is full or the like.
        """
        with as_write_failure(f"A row of {self.path}"), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the rows; one that was being written when its run was killed is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
