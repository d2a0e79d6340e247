"""What the commands share: errors in one line, options, checks before anything is started."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..known.errors import first_line


# What `m2f track` writes: files, and folders of numbered pictures.
TRACK_FILES = ("results.json", "overlay.mp4", "overlay.gif")
TRACK_FOLDERS = ("ids", "overlay")


class CommandError(Exception):
    """What was asked for cannot be started; the message says why and what to do, in one line."""


# --- options that commands share ---


def add_model_options(command: argparse.ArgumentParser, bundled: Path, tasks: Sequence[str]) -> None:
    """Add the options that choose a model, by default the bundled one, and one of its tasks."""
    command.add_argument(
        "--model",
        default=str(bundled),
        metavar="ID_OR_FOLDER",
        help="a model on the Hugging Face Hub or a folder; default: the bundled model, which knows generated shapes",
    )
    add_revision(command)
    command.add_argument("--task", choices=tasks, help="default: what the model was made for")


def add_revision(command: argparse.ArgumentParser) -> None:
    command.add_argument("--revision", metavar="BRANCH_OR_COMMIT", help="of a model on the Hub; default: main")


def add_run_options(command: argparse.ArgumentParser) -> None:
    """Add the options that say where and how a model runs, and where results go."""
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps, …; default: a CUDA GPU where there is one, else cpu")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add_output(command)


def add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="default: out")


def probability(text: str) -> float:
    """Read a number from 0 to 1, as the type of an option."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value


# --- checks before anything is started ---


def check_output(folder: Path) -> None:
    """Try to write where the output folder is or will be, before minutes are spent on results that cannot be saved."""
    with _output_errors(folder):
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass


def make_output(folder: Path) -> None:
    with _output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _output_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise CommandError(f"--output {folder}: a file is in the way; name a folder") from error
    except OSError as error:
        raise CommandError(f"--output {folder} cannot be written ({error.strerror}); name another folder") from error


@contextmanager
def write_errors(place: Path) -> Iterator[None]:
    """Turn the errors of a full disk and the like into a CommandError."""
    try:
        yield
    except OSError as error:
        raise CommandError(f"cannot write to {place} ({first_line(error)}); free space or name another") from error


@contextmanager
def command_errors(*more: type[Exception]) -> Iterator[None]:
    """Turn the library's errors, OSError, ValueError and `more`, into a CommandError."""
    errors: tuple[type[Exception], ...] = (OSError, ValueError, *more)
    try:
        yield
    except errors as error:
        raise CommandError(first_line(error)) from error


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Load without progress bars, and turn the many errors of damaged or incomplete checkpoints into a CommandError."""
    from transformers.utils import logging

    from ..inference.loading import explain_load_errors

    logging.disable_progress_bar()
    with command_errors(), explain_load_errors(model):
        yield
