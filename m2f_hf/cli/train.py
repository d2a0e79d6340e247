"""`m2f train`: fine-tune a model on labelled images or videos."""

from __future__ import annotations

import argparse
from typing import Any

from .common import CommandError


DESCRIPTION = """Fine-tune a model on labelled images or videos: `m2f train my-data` alone is a sensible run.

What is not given is chosen from the data and the checkpoint, and printed with the reason. For several GPUs:
`accelerate launch -m m2f_hf.cli train my-data ...`."""


def add_parser(commands: Any) -> None:
    """Add the subcommand; its options are read by `run`, so that `m2f --help` imports nothing of training."""
    # Without a character that begins options, all that follows is taken as it is.
    command = commands.add_parser(
        "train", help="fine-tune a model on labelled images or videos", add_help=False, prefix_chars="\0"
    )
    command.add_argument("arguments", nargs="*")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train as the options say."""
    try:
        from ..training import FinetuningArguments, finetune, parse_options
    except ImportError as error:
        raise CommandError(str(error)) from error
    finetune(parse_options(FinetuningArguments, options.arguments, DESCRIPTION, prog="m2f train"))
    return 0
