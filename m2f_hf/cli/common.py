"""What the commands share: errors in one line, checks before anything is started, words for what was found."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging

from ..hub.push import IMAGES, Family, family_of
from ..known.lookup import find_config


class CommandError(Exception):
    """What was asked for cannot be started; the message says why and what to do, in one line."""


class ImageError(Exception):
    """One picture cannot be segmented or its results not written; the message says why, in one line."""


# --- words ---


def describe(segments_info: Sequence[Mapping[str, Any]]) -> str:
    """What was found: `3 circles and 1 star on striped ground`; for a semantic result, shares of the labelled area."""
    if not segments_info:
        return "nothing found"
    if segments_info[0]["score"] is None:
        total = sum(info["area"] for info in segments_info)
        by_area = sorted(segments_info, key=lambda info: -info["area"])
        return ", ".join(f"{info['label']} {info['area'] / total:.0%}" for info in by_area)
    # Where a checkpoint does not tell things from stuff, every segment is counted.
    counts = Counter(info["label"] for info in segments_info if info["isthing"] is not False)
    things = [f"{number} {label if number == 1 else plural(label)}" for label, number in counts.most_common()]
    stuff = [info["label"] for info in segments_info if info["isthing"] is False]
    return " on ".join(_join(words) for words in (things, stuff) if words)


def plural(label: str) -> str:
    """English plural of a class name, by the common rules."""
    irregular = {"person": "people", "sheep": "sheep", "mouse": "mice", "knife": "knives"}
    head, space, last = label.rpartition(" ")
    if last in irregular:
        return head + space + irregular[last]
    if label.endswith(("ss", "us", "x", "ch", "sh")):
        return label + "es"
    return label + "s" if label[-1:].isalpha() and not label.endswith("s") else label


def _join(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


# --- options that commands share ---


def add_model_options(command: argparse.ArgumentParser, bundled: Path, tasks: Sequence[str]) -> None:
    """Which model, and for which of its tasks."""
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
    """Where and how a model runs, and where results go."""
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps, …; default: a CUDA GPU where there is one, else cpu")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add_output(command)


def add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="default: out")


# --- checks before anything is started ---


def check_output(folder: Path) -> None:
    """Try to write where the output folder is or will be, before minutes are spent on results that nothing can hold."""
    with _writing(folder):
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass


def make_output(folder: Path) -> None:
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise CommandError(f"--output {folder}: a file is in the way; name a folder") from error
    except OSError as error:
        raise CommandError(f"--output {folder} cannot be written ({error.strerror}); name another folder") from error


def choose_device(device: str | None) -> str:
    """The device asked for, or else a GPU where there is one.

    Raises:
        CommandError: it cannot be used here.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise CommandError(f"--device {device} cannot be used here ({reason}); try --device cpu") from error
    return device


def check_model(model: str, revision: str | None) -> Family:
    """Whose model it is, of images or of clips; says in one line what `from_pretrained` would say late and at length.

    Raises:
        CommandError: there is no such model, or it is another kind of model.
    """
    if revision is not None and Path(model).is_dir():
        raise CommandError(f"{model} is a folder, and --revision is of a model on the Hub: leave it out")
    try:
        config_file = find_config(model, revision=revision)
    except OSError as error:
        raise CommandError(str(error)) from error
    try:
        settings = json.loads(config_file.read_text(encoding="utf-8"))
        model_type = settings.get("model_type")
    except (ValueError, AttributeError) as error:
        raise CommandError(f"the config.json of {model} is no JSON object ({first_line(error)})") from error
    family = IMAGES if model_type == "mask2former" else family_of(settings)
    if family is None:
        raise CommandError(f"{model} has model_type {model_type!r}; m2f reads 'm2f', 'm2f_video' and 'mask2former'")
    return family


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Turn the many errors of damaged or incomplete checkpoints into one line."""
    logging.disable_progress_bar()
    try:
        yield
    except (
        *(OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError),
        *(AttributeError, KeyError, TypeError),  # JSON of another form
    ) as error:
        reason = _reason(error)
        # Some name it already, or a file in it.
        raise CommandError(reason if reason.startswith(model) else f"{model} cannot be loaded: {reason}") from error


def _reason(error: BaseException) -> str:
    """What is wrong, in one line; a configuration's error names the field in the first line and the fault below."""
    if isinstance(error, StrictDataclassError):
        return " ".join(str(error).split())
    return first_line(error)


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value
