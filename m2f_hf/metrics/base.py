"""What all measures have in common: they see one image at a time, and their state can be sent to other processes."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar


Gather = Callable[[list[Any]], list[Any]]
"""Function that gathers the lists of all processes on every process, such as `accelerate.utils.gather_object`."""

M = TypeVar("M", bound="Metric")


class Metric(ABC):
    """A measure over images. Its state is a few numbers per class or per object, never a map.

    Each subclass has its own `update`, with the arguments that it needs for one image; `Evaluation.add` calls it. Keys
    of figures must differ from those of the other measures of a task, per class too.
    """

    @abstractmethod
    def merge(self: M, other: M) -> None:
        """Add what another instance with the same settings has seen."""

    @abstractmethod
    def compute(self) -> dict[str, Any]:
        """Return the result so far: figures in [0, 1], None where undefined, and `per_class`, `{name: figures}`."""


def merged(parts: Sequence[M]) -> M:
    """Merge measures into a new one."""
    total = copy.deepcopy(parts[0])
    for part in parts[1:]:
        total.merge(part)
    return total


def names_of(categories: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Map ids to names of classes in COCO's form; the id is added to a name that several have.

    Raises:
        ValueError: if two categories have one id.
    """
    names = [str(category["name"]) for category in categories]
    by_id = {
        int(category["id"]): name if names.count(name) == 1 else f"{name} ({category['id']})"
        for category, name in zip(categories, names, strict=True)
    }
    if len(by_id) != len(names):
        raise ValueError("Two categories have the same id: give each class its own.")
    return by_id
