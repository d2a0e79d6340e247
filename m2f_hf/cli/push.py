"""`m2f push`: a folder to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..known.errors import first_line
from .common import CommandError, loading


def add_parser(commands: Any) -> None:
    """Add `push` to the subparsers of `m2f`."""
    push = commands.add_parser(
        "push",
        help="publish a model on the Hugging Face Hub",
        description="Sends a folder that save_pretrained wrote, model and processor, to the Hub in one commit, with a "
        "model card and the code that runs it where this package is not installed.",
    )
    push.add_argument("folder", type=Path, metavar="FOLDER", help="what save_pretrained wrote")
    push.add_argument("repo_id", metavar="OWNER/NAME", help="the repository; made if need be")
    push.add_argument("--private", action="store_true", help="a new repository that others do not see")
    push.add_argument("--revision", metavar="BRANCH", help="made if need be; default: main")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--replace-card", action="store_true", help="also a card on the Hub that someone edited")
    push.add_argument("--yes", action="store_true", help="do not ask")
    push.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run `m2f push` with its parsed options and return the exit status."""
    from huggingface_hub import HfApi

    from ..hub.push import HubFolder

    with loading(str(options.folder)):
        folder = HubFolder(options.folder)
    with _publishing(options.repo_id):
        HfApi().whoami()  # before anything is shown or asked
    place = f"{options.repo_id}{f', branch {options.revision}' if options.revision else ''}"
    print(f"To {place}{' (private)' if options.private else ''}:")
    for name, content in sorted(folder.files.items()):
        print(f"  {_size(len(content) if isinstance(content, str) else content.stat().st_size):>8}  {name}")
    if folder.left_out:
        print(f"Not sent: {', '.join(folder.left_out)}")
    if not options.yes and sys.stdin.isatty() and not _agrees("Publish?"):
        print("nothing was sent")
        return 0
    with _publishing(options.repo_id):
        commit = folder.push(
            options.repo_id,
            private=options.private or None,
            revision=options.revision,
            commit_message=options.message,
            replace_card=options.replace_card,
        )
    print(f"{commit.repo_url} is at {commit.oid[:8]}")
    return 0


def _agrees(question: str) -> bool:
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"


@contextmanager
def _publishing(repo_id: str) -> Iterator[None]:
    """Turn the errors of the Hub and the network into a CommandError that says what to do and what was sent."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    from ..known.lookup import NETWORK_ERRORS

    # For whatever is wrong with a large file, the client raises a RuntimeError.
    upload_errors: tuple[type[Exception], ...] = (RuntimeError, *NETWORK_ERRORS)
    # A connection may also break after the Hub has done its work.
    outcome = "the repository has everything of it or nothing"
    again = f"{outcome}. Run the same command again: what has been sent is not sent twice"
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise CommandError("no one is logged in: run `hf auth login`, then this again") from error
    except HFValidationError as error:
        raise CommandError(f"{repo_id} cannot be a repository's name: give owner/name") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise CommandError("the Hub does not accept the token: run `hf auth login` again") from error
        if status == 403:
            raise CommandError(
                f"this account may not write to {repo_id}: name a repository of your own, or log in with a token that "
                "has the right to write (`hf auth login`)"
            ) from error
        is_temporary = status >= 500 or status in (408, 409, 412, 429)
        raise CommandError(
            f"the Hub refuses ({first_line(error)}); {again if is_temporary else 'no file was published'}"
        ) from error
    except ValueError as error:
        raise CommandError(first_line(error)) from error
    except upload_errors as error:
        raise CommandError(f"the upload broke off ({first_line(error.__cause__ or error)}); {again}") from error
