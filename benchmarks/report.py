"""The result as Markdown and as JSON."""

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from equality import Check
from measuring import Memory


class Line(NamedTuple):
    """What was measured of one case, by implementation. The last one measured is what the others are compared with.

    Args:
        name, title: for programs and for readers.
        seconds: of each repetition; CPU time, or a GPU's own time.
        wall: seconds on the clock; empty on a GPU.
        memory: before and at the height of a run.
        missing: why an implementation was not measured, or "" as its name for all of them.
        notes: what else there is to say.
    """

    name: str
    title: str
    seconds: Mapping[str, Sequence[float]] = {}
    wall: Mapping[str, Sequence[float]] = {}
    memory: Mapping[str, Memory] = {}
    missing: Mapping[str, str] = {}
    notes: Sequence[str] = ()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def line_rows(line: Line, baseline: str) -> list[list[str]]:
    """Return a row for each implementation: title, name, seconds, ratio, wall seconds, MiB at peak, above idle, ratio.

    Ratios are to the baseline: of the medians, with the range of single repetitions, which took turns; of memory above
    idle.
    """
    rows = []
    for name in dict.fromkeys([*line.missing, *line.memory, *line.seconds]):
        seconds, wall, memory = line.seconds.get(name), line.wall.get(name), line.memory.get(name)
        row = [line.title, name or "all", line.missing.get(name, "–"), *["–"] * 5]
        if seconds:
            row[2] = f"{statistics.median(seconds):.3g}"
        if seconds and name != baseline and line.seconds.get(baseline):
            ratios = [a / b for a, b in zip(seconds, line.seconds[baseline], strict=True)]
            ratio = statistics.median(seconds) / statistics.median(line.seconds[baseline])
            row[3] = f"**{ratio:.2f}×** ({min(ratios):.2f}–{max(ratios):.2f})"
        if wall:
            row[4] = f"{statistics.median(wall):.3g}"
        if memory:
            row[5:7] = [f"{number / 2**20:,.0f}" for number in (memory.peak, memory.peak - memory.idle)]
        base = line.memory.get(baseline)
        if memory and base and name != baseline and base.peak - base.idle >= 2**20:
            row[7] = f"{(memory.peak - memory.idle) / (base.peak - base.idle):.2f}×"
        rows.append(row)
    return rows


def check_row(check: Check) -> list[str]:
    verdict = "equal" if check.passed else "**DIFFERS**"
    return [check.what, verdict, f"{check.difference:.1e}", f"{check.tolerance:.1e}", check.note]


def render(facts: Mapping[str, str], lines: Sequence[Line], checks: Sequence[Check], baseline: str) -> str:
    """Return the whole result as Markdown: machine, time and memory, outputs, notes."""
    parts = ["".join(f"- {name}: {value}\n" for name, value in facts.items())] if facts else []
    if lines:
        header = ["median of repetitions", "implementation", "seconds", f"of {baseline}'s (range)", "wall seconds"]
        header += ["MiB at peak", "above idle", f"of {baseline}'s"]
        parts.append(markdown_table(header, [row for line in lines for row in line_rows(line, baseline)]))
    if checks:
        header = ["output", "verdict", "largest difference", "allowed", "note"]
        parts.append(markdown_table(header, [check_row(check) for check in checks]))
    notes = [f"- {line.title}: {note}\n" for line in lines for note in line.notes]
    return "\n".join([*parts, *(["".join(notes)] if notes else [])])


def as_json(facts: Mapping[str, str], lines: Sequence[Line], checks: Sequence[Check]) -> str:
    """Return the same with every repetition's time; memory in bytes."""
    document = {"facts": facts, "lines": list(map(line_fields, lines)), "checks": list(map(check_fields, checks))}
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def line_fields(line: Line) -> dict[str, Any]:
    return line._asdict() | {"memory": {name: memory._asdict() for name, memory in line.memory.items()}}


def check_fields(check: Check) -> dict[str, Any]:
    # JSON has no word for infinity.
    difference = check.difference if math.isfinite(check.difference) else str(check.difference)
    return check._asdict() | {"difference": difference, "passed": check.passed}


def read_check(fields: Mapping[str, Any]) -> Check:
    return Check(fields["what"], float(fields["difference"]), fields["tolerance"], fields["note"])


def read_line(fields: Mapping[str, Any]) -> Line:
    memory = {name: Memory(**value) for name, value in fields["memory"].items()}
    return Line(**(dict(fields) | {"memory": memory}))


def write_file(path: Path, text: str) -> None:
    """Write a file all at once or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
