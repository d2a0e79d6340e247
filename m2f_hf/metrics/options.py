"""Options as a dataclass, read from a command line or from a YAML or JSON file."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers import HfArgumentParser


Options = TypeVar("Options")


class _Parser(HfArgumentParser):
    """A parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def option(default: Any = dataclasses.MISSING, help: str = "", **settings: Any) -> Any:
    """Return a dataclass field that `parse_options` reads; `settings` as of `ArgumentParser.add_argument`."""
    return dataclasses.field(default=default, metadata={"help": help, **settings})


def parse_options(
    kind: type[Options], arguments: Sequence[str] | None = None, description: str | None = None, prog: str | None = None
) -> Options:
    """Return the options on a command line as a dataclass; what is wrong ends the program with a message.

    The first argument may be a data set without `--dataset`, or a YAML or JSON file with options, which those after it
    override.

    Args:
        kind: a dataclass of `option` fields, `dataset` among them, whose `__post_init__` raises a ValueError for values
            that cannot be.
        arguments: default: the program's.
        description: for `--help`.
        prog: what is typed, for `--help`; default: the program's name.
    """
    parser = _Parser(
        kind,  # type: ignore[arg-type]
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s DATASET_OR_OPTIONS_FILE [--option value …]",
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and not words[0].startswith("-"):
            names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
            read = read_options_file(Path(words[0]), names)
            words[:1] = ["--dataset", words[0]] if read is None else read
        options, unknown = parser.parse_args_into_dataclasses(words, True, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def read_options_file(path: Path, names: Collection[str]) -> list[str] | None:
    """Return what a YAML or JSON file says as command line arguments; None for other files, such as a data set's.

    Raises:
        ValueError: it is neither YAML nor JSON.
    """
    if path.suffix not in (".yaml", ".yml", ".json") or not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, Mapping) or not names & values.keys():
        return None
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def check_options(options: Any, at_least_one: Sequence[str] = ()) -> None:
    """Check what every option's field says: that values are among its choices, and whole numbers 1 or more.

    Raises:
        ValueError: naming the option.
    """
    for field in dataclasses.fields(options):
        value, choices = getattr(options, field.name), field.metadata.get("choices")
        if value is not None and choices is not None and value not in choices:
            raise ValueError(f"--{field.name} {value}: choose from {', '.join(choices)}")
        if value is not None and field.name in at_least_one and value < 1:
            raise ValueError(f"--{field.name} is 1 or more")
