"""For the benchmarks: the result as Markdown and as JSON."""

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmark_checks import Check
from benchmark_measure import Memory, OutOfMemory, Products, Times
from benchmark_setup import IMPLEMENTATIONS


class Row(NamedTuple):
    """What was measured of a case, by implementation.

    Args:
        name: of the case.
        title: as the reader sees it.
        memory, times, products: by implementation; what was not measured is missing.
        floor: CPU seconds of the fewest products any implementation needs.
        missing: why nothing was measured.
        notes: what else there is to say.
    """

    name: str
    title: str
    memory: Mapping[str, Memory | OutOfMemory] = {}
    times: Mapping[str, Times] = {}
    products: Mapping[str, Products] = {}
    floor: float | None = None
    missing: str = ""
    notes: Sequence[str] = ()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def time_cells(row: Row) -> list[str]:
    cells = [row.title]
    if row.missing:
        return [row.title, "–", row.missing, *["–"] * 4]
    for kind in Times._fields:
        medians = [
            statistics.median(getattr(row.times[name], kind)) if name in row.times else None for name in IMPLEMENTATIONS
        ]
        for name, median in zip(IMPLEMENTATIONS, medians, strict=True):
            cells.append(f"{median:.3g}" if median is not None else str(row.memory[name]))
        if None in medians:
            cells.append("–")
            continue
        ratio = f"{medians[0] / medians[1]:.2f}×"
        if kind == "cpu":
            pairs = [a / b for a, b in zip(*(row.times[name].cpu for name in IMPLEMENTATIONS), strict=True)]
            ratio = f"**{ratio}** ({min(pairs):.2f}–{max(pairs):.2f})"
        cells.append(ratio)
    return cells


def memory_cells(row: Row) -> list[str]:
    if row.missing:
        return [row.title, "–", row.missing, *["–"] * 4]
    measured = [row.memory[name] for name in IMPLEMENTATIONS]
    cells = [row.title]
    for value in (lambda memory: memory.peak, lambda memory: memory.peak - memory.idle):
        mebibytes = [value(memory) / 2**20 if isinstance(memory, Memory) else None for memory in measured]
        for number, memory in zip(mebibytes, measured, strict=True):
            cells.append(f"{number:,.0f}" if number is not None else str(memory))
        if None in mebibytes or min(mebibytes) < 1:
            cells.append("–")
        else:
            cells.append(f"**{mebibytes[0] / mebibytes[1]:.2f}×** ({mebibytes[1] / mebibytes[0]:.2f})")
    return cells


def floor_cells(row: Row) -> list[str]:
    above = [
        statistics.median(row.times[name].cpu) / row.floor if row.floor and name in row.times else None
        for name in IMPLEMENTATIONS
    ]
    return [
        row.title,
        *(f"{row.products[name].operations / 1e9:,.4g}" if name in row.products else "–" for name in IMPLEMENTATIONS),
        f"{row.floor:.3g}" if row.floor is not None else "–",
        *(f"{times:.2f}×" if times is not None else "–" for times in above),
    ]


def check_cells(check: Check) -> list[str]:
    verdict = "equal" if check.passed else "**DIFFERS**"
    return [check.what, f"{check.difference:.1e}", f"{check.tolerance:.1e}", verdict, check.note]


def render(facts: Mapping[str, str], rows: Sequence[Row], checks: Sequence[Check]) -> str:
    """The whole result as Markdown: machine, times, products, memory, outputs."""
    theirs, ours = IMPLEMENTATIONS
    parts = ["".join(f"- {name}: {value}\n" for name, value in facts.items())]
    timed = [row for row in rows if row.times or row.missing]
    if timed:
        header = ["median seconds", f"CPU, {theirs}", f"CPU, {ours}", "faster (range)"]
        header += [f"wall, {theirs}", f"wall, {ours}", "faster"]
        parts.append(markdown_table(header, [time_cells(row) for row in timed]))
    with_products = [row for row in rows if row.products]
    if with_products:
        header = ["matrix products alone", f"GFLOP, {theirs}", f"GFLOP, {ours}", "CPU seconds of the fewer"]
        header += [f"times above, {theirs}", f"times above, {ours}"]
        parts.append(markdown_table(header, [floor_cells(row) for row in with_products]))
    header = ["MiB", f"peak, {theirs}", f"peak, {ours}", "less", f"above idle, {theirs}", f"above idle, {ours}", "less"]
    parts.append(markdown_table(header, [memory_cells(row) for row in rows]))
    header = ["output", "largest difference", "allowed", "verdict", "note"]
    parts.append(
        markdown_table(header, [check_cells(check) for check in checks])
        if checks
        else "No outputs were compared: none of these should be equal.\n"
    )
    notes = [f"- {row.title}: {note}\n" for row in rows for note in row.notes]
    if notes:
        parts.append("".join(notes))
    parts.append(
        "Post-processing is compared for speed and memory alone: `transformers` decides on masks of 384×384 pixels and "
        "enlarges the result, `m2f_hf` decides at the target's size as the original does, so the results differ.\n"
    )
    return "\n".join(parts)


def as_json(facts: Mapping[str, str], rows: Sequence[Row], checks: Sequence[Check]) -> str:
    """The same, every repetition's time included; memory in bytes, or words where there was not enough."""
    lines = []
    for row in rows:
        memory = {name: m._asdict() if isinstance(m, Memory) else str(m) for name, m in row.memory.items()}
        times = {name: value._asdict() for name, value in row.times.items()}
        products = {name: value._asdict() for name, value in row.products.items()}
        lines.append(row._asdict() | {"memory": memory, "times": times, "products": products})
    document = {"facts": facts, "lines": lines, "checks": [check_fields(check) for check in checks]}
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def check_fields(check: Check) -> dict[str, Any]:
    # JSON has no word for infinity.
    difference = check.difference if math.isfinite(check.difference) else str(check.difference)
    return check._asdict() | {"difference": difference, "passed": check.passed}


def write_file(path: Path, text: str) -> None:
    """All of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
