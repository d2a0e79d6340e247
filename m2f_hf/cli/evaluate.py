"""`m2f evaluate`: measure a model on a labelled data set."""

from __future__ import annotations

import argparse
from typing import Any

from .common import CommandError


DESCRIPTION = """Measure a model on a labelled data set: PQ, mask AP, mIoU or video AP, per class.

Writes results.json, results.md (the same as tables), per_class.png, and worst/, the images with the lowest figures."""


def add_parser(commands: Any) -> None:
    """Add the subcommand; its options are read by `run`, so that `m2f --help` imports nothing of the measures."""
    # Without a character that begins options, all that follows is taken as it is.
    command = commands.add_parser(
        "evaluate", help="measure a model on a labelled data set", add_help=False, prefix_chars="\0"
    )
    command.add_argument("arguments", nargs="*")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure as the options say."""
    from ..metrics.evaluate_dataset import EvaluationArguments, evaluate_dataset
    from ..metrics.options import parse_options

    try:
        evaluate_dataset(parse_options(EvaluationArguments, options.arguments, DESCRIPTION, prog="m2f evaluate"))
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(str(error)) from error
    return 0
