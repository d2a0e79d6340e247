"""Segments in words, for terminals and captions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def describe(segments_info: Sequence[Mapping[str, Any]]) -> str:
    """Say what was found: `3 circles and 1 star on striped ground`; for a semantic result, shares of labelled area."""
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
    return " on ".join(_enumerate(words) for words in (things, stuff) if words)


def plural(label: str) -> str:
    """Return the English plural of a class name, by the common rules."""
    irregular = {"person": "people", "sheep": "sheep", "mouse": "mice", "knife": "knives"}
    head, space, last = label.rpartition(" ")
    if last in irregular:
        return head + space + irregular[last]
    if label.endswith(("ss", "us", "x", "ch", "sh")):
        return label + "es"
    return label + "s" if label[-1:].isalpha() and not label.endswith("s") else label


def _enumerate(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
