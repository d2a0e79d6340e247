"""What a training run keeps on disk and how it ends: checkpoints, log, signals, classes of a new head."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn


CHECKPOINT = "checkpoint-{:07d}"
STATE = "state.pt"
_WRITER_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error")
"""Words by which errors of `torch.save`'s writer are known."""


# --- folders that are whole or absent ---


def replace_folder(work: Path, target: Path) -> None:
    """Give a finished folder its name, in the place of an older one."""
    old = _put_aside(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(work, target)
    shutil.rmtree(old, ignore_errors=True)


def _put_aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def tidy(output: Path) -> None:
    """Clear up after a run that was killed while it wrote: folders half written, one of two names half changed."""
    for old in output.glob(".*.old"):
        target = output / old.name.removeprefix(".").removesuffix(".old")
        if not target.exists():
            os.replace(old, target)
    for work in [path for ending in ("tmp", "old", "parts") for path in output.glob(f".*.{ending}")]:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` if the block ends well, and is removed if it does not."""
    work = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    replace_folder(work, target)


class WriteFailure(Exception):
    """Something could not be written, for want of space mostly; what was there before still is."""


@contextmanager
def telling_of_failure(what: str) -> Iterator[None]:
    """Errors of writing, which have many types, as one.

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
    """The last complete checkpoint of a run, None before the first."""
    return max((path for path in output.glob("checkpoint-*") if (path / STATE).is_file()), default=None)


def step_of(checkpoint: Path) -> int:
    """How many steps had been done."""
    return int(checkpoint.name.rpartition("-")[2])


def save_checkpoint(
    output: Path, step: int, parts: Mapping[str, Any], save_more: Callable[[Path], Any] | None = None
) -> Path:
    """Write what a run needs to go on, then remove the checkpoints before it.

    Args:
        parts: name -> what has a `state_dict` of tensors, numbers, texts, lists and dicts.
        save_more: writes further files into a folder.

    Raises:
        WriteFailure: the disk is full or the like; older checkpoints are as they were.
    """
    target = output / CHECKPOINT.format(step)
    with telling_of_failure(f"The checkpoint of step {step}"), written_whole(target) as work:
        torch.save({name: part.state_dict() for name, part in parts.items()}, work / STATE)
        if save_more is not None:
            save_more(work)
    remove_older(output, target)
    return target


def remove_older(output: Path, newest: Path) -> None:
    """Remove all checkpoints but this one."""
    for older in output.glob("checkpoint-*"):
        if older != newest:
            shutil.rmtree(older, ignore_errors=True)


def load_checkpoint(checkpoint: Path, parts: Mapping[str, Any]) -> None:
    """Put what `save_checkpoint` wrote into the parts.

    Raises:
        ValueError: it was written by a run with other parts, such as without averaged weights.
    """
    states = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    if states.keys() != parts.keys():
        differing = ", ".join(sorted(states.keys() ^ parts.keys()))
        raise ValueError(
            f"{checkpoint} was written with other settings: {differing}. Go on with those the run was started with "
            "(--ema, --mixed_precision), or start another run."
        )
    for name, part in parts.items():
        part.load_state_dict(states[name])


def save_model(model: Any, processor: Any, target: Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write a folder for `from_pretrained`; it is whole or as it was.

    Raises:
        WriteFailure: the disk is full or the like.
    """
    with telling_of_failure(f"{target}"), written_whole(target) as work:
        model.save_pretrained(work, state_dict=state_dict)
        processor.save_pretrained(work)


# --- log ---


class Log:
    """A JSONL file of rows, each with its `step`.

    Args:
        path: the file.
        keep: rows of an earlier part of the run are kept where this says so.
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
        with telling_of_failure(f"A row of {self.path}"), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows; one that was being written when its run was killed is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


# --- how a run ends ---


class StopSignal:
    """Inside the `with` block, SIGTERM and Ctrl-C are taken note of, to be heeded when the step is done.

    A second Ctrl-C interrupts at once.

    Attributes:
        received: the signal, None before there is one.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """What a shell gives a process that the signal ended."""
        return 128 + int(self.received or signal.SIGTERM)


@contextmanager
def saying_what_to_lower(advice: str) -> Iterator[None]:
    """Running out of memory, on a GPU or not, ends the program with advice.

    Raises:
        SystemExit: in the place of the error.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise SystemExit(f"Out of memory: {str(error).splitlines()[0]}\n{advice}") from error


# --- classes ---


def set_classes(model: Any, categories: Sequence[Mapping[str, Any]]) -> str:
    """Give a model the classes of a data set. What its class head knows of classes of the same name stays, and of "no
    object"; the rest of the head starts anew.

    Args:
        model: a `Mask2FormerForUniversalSegmentation`.
        categories: `id` (contiguous from 0), `name` and maybe `color` of each class.

    Returns:
        What was done, in words.
    """
    config = model.config
    own = {str(name): int(label) for label, name in config.id2label.items()}
    names = [str(category["name"]) for category in categories]
    colors = [category.get("color") for category in categories]
    known_colors = [list(color) for color in colors if color] if colors and all(colors) else None
    if names == [str(name) for _, name in sorted((int(label), name) for label, name in config.id2label.items())]:
        config.label_colors = config.label_colors or known_colors
        return f"its {len(names)} classes are the data set's"
    old = model.class_predictor
    head = nn.Linear(old.in_features, len(names) + 1, device=old.weight.device, dtype=old.weight.dtype)
    rows = [(new, own[name]) for new, name in enumerate(names) if name in own] + [(len(names), old.out_features - 1)]
    with torch.no_grad():
        for new, row in rows:
            head.weight[new], head.bias[new] = old.weight[row], old.bias[row]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: label for label, name in enumerate(names)}
    config.label_colors = known_colors
    model.class_predictor = head
    model.criterion = type(model.criterion)(config, model.weight_dict).to(old.weight.device)
    kept = [name for name in names if name in own]
    known = f"{', '.join(kept[:8])}{' …' if len(kept) > 8 else ''}" if kept else "none"
    return (
        f"a new class head for {len(names)} classes instead of {old.out_features - 1}; taken over by name: {known} "
        f"({len(kept)}); {len(names) - len(kept)} start anew"
    )


def has_batch_norm(model: nn.Module) -> bool:
    """Whether some batch norm of the model would learn, or count, in training."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
