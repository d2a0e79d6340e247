"""What is wrong with a data set: collected over all files, reported once."""

from collections.abc import Sequence


_NUM_NAMED = 10
IS_MISSING = "are missing"
"""Part of every kind of problem with a file that is not there."""


class DatasetError(ValueError):
    """A data set that cannot be trained on as it is. The message names every kind of problem and its files."""


class FileProblem(ValueError):
    """An error in one file: `kind` as in `Problems.error`, and `where`."""

    def __init__(self, kind: str, where: str) -> None:
        super().__init__(f"{where}. {kind}")
        self.kind, self.where = kind, where

    def __reduce__(self) -> tuple[type["FileProblem"], tuple[str, str]]:
        return FileProblem, (self.kind, self.where)  # for the way out of a worker process


class Problems:
    """Problems by kind. An error forbids training; a warning is something a person should know."""

    def __init__(self) -> None:
        self.errors: dict[str, list[str]] = {}
        self.warnings: dict[str, list[str]] = {}

    def error(self, kind: str, where: str) -> None:
        """Add an error: `kind`, a sentence with the fix that holds for all of them, and the file or class it is in."""
        self.errors.setdefault(kind, []).append(where)

    def warn(self, kind: str, where: str) -> None:
        """Add a warning, as `error` does an error."""
        self.warnings.setdefault(kind, []).append(where)

    def raise_errors(self, name: str) -> None:
        """Raise a `DatasetError` with the errors found in the data set `name`, if there are any."""
        if self.errors:
            raise DatasetError(f"{name} cannot be used as it is.\n" + "\n".join(describe(self.errors)))


def describe(problems: dict[str, list[str]]) -> list[str]:
    """Return lines of text: each kind with its count and the first files it was found in."""
    lines = []
    for kind, places in problems.items():
        lines.append(f"- {kind} ({len(places)})" if len(places) > 1 else f"- {kind}")
        lines += [f"    {place}" for place in places[:_NUM_NAMED]]
        if len(places) > _NUM_NAMED:
            lines.append(f"    … and {len(places) - _NUM_NAMED} more")
    return lines


def named(names: Sequence[object]) -> str:
    """List the first names, and how many there are in all."""
    text = ", ".join(str(name) for name in names[:_NUM_NAMED])
    return text if len(names) <= _NUM_NAMED else f"{text}, … ({len(names)} in all)"
