"""How a run ends early: signals, memory that runs out, errors that a person can mend."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch


ADVICE = (
    "Halve --batch_size and double --gradient_accumulation_steps, which gives the same result; add "
    "--gradient_checkpointing; lower --input_size; or use --mixed_precision bf16."
)


class StopSignal:
    """Inside the `with` block, SIGTERM and Ctrl-C are noted, to end the run when its step is done.

    A second Ctrl-C interrupts at once.

    Attributes:
        received: the signal, None before there is one.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """The status that a shell gives a process that the signal ended."""
        return 128 + int(self.received or signal.SIGTERM)


@contextmanager
def advise_on_oom(advice: str = ADVICE) -> Iterator[None]:
    """End the program with advice where memory runs out, on a GPU or not.

    Raises:
        SystemExit: instead of the error.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise SystemExit(f"Out of memory: {str(error).splitlines()[0]}\n{advice}") from error


@contextmanager
def exit_with_message() -> Iterator[None]:
    """End the program without a traceback where data, model or options are wrong: the message says what to do.

    Raises:
        SystemExit: instead of a ValueError, OSError or ImportError.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from error
