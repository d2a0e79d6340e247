"""The entry of the `m2f` command.

Exit status: 0, all done; 1, some pictures could not be read or written, the others are done; 2, nothing was done,
because the arguments, the model, the device, the output folder or the repository cannot be used.

Each subcommand is a module with `add_parser(commands)`. Torch and `transformers` are imported when one runs, so that
`m2f --help` and a mistyped option are answered at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from . import demo, evaluate, info, push, segment, track, train
from .common import CommandError


COMMANDS = (segment, track, train, evaluate, demo, info, push)
_READER_GONE = 141  # 128 + SIGPIPE, the shell's exit status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: the process's) and return its exit status."""
    try:
        try:
            return _run(arguments)
        finally:  # flush here, after --help too, so that a reader that has gone is noticed below
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # As in `m2f demo | head`: end without a message. Python would flush once more when it ends.
        if isinstance(sys.stdout, io.TextIOWrapper):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name the terminal cannot show must not raise
    try:
        status: int = options.run(options)
        return status
    except CommandError as error:
        print(f"m2f: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("m2f: stopped; what was finished so far is complete", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="m2f", description="Segment pictures, follow objects through clips, train, measure and publish models."
    )
    parser.add_argument("--version", action="version", version=f"m2f_hf {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
