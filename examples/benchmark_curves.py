"""For `benchmark.py --curves`: what grows, a file of points that a second run continues, growth, and the picture."""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmark_setup import IMPLEMENTATIONS, SIZES, Setup, four_thirds
from benchmark_tables import write_file


LEAST_MEBIBYTES = 1.0
"""Less is the noise of the allocator: drawn, but no growth is fitted to it."""
COLORS = {"transformers": "tab:gray", "m2f_hf": "tab:blue"}


class Curve(NamedTuple):
    """One cost against one size.

    Args:
        title: what is run.
        axis: what grows, as on the picture's axis.
        case: key of `CASES`.
        change: the setup with the size at one of the values.
        x: what the axis says of a setup.
        values: which are measured,
        tiny_values: and with `--size tiny`.
    """

    title: str
    axis: str
    case: str
    change: Callable[[Setup, int], Setup]
    x: Callable[[Setup], int]
    values: tuple[int, ...]
    tiny_values: tuple[int, ...]


def _with_side(setup: Setup, side: int) -> Setup:
    return setup._replace(height=side, width=side)


def _area(setup: Setup) -> int:
    return setup.height * setup.width


def _with_queries(setup: Setup, queries: int) -> Setup:
    return setup._replace(queries=queries)


CURVES = {
    "area": Curve("forward", "pixels", "forward", _with_side, _area, (128, 192, 256, 384, 512), (32, 64, 128)),
    "batch": Curve(
        "forward",
        "images",
        "forward",
        lambda setup, batch: setup._replace(batch=batch),
        lambda setup: setup.batch,
        (1, 2, 4, 8),
        (1, 2, 4),
    ),
    "queries": Curve(
        "forward",
        "queries",
        "forward",
        _with_queries,
        lambda setup: setup.config().num_queries,
        (50, 100, 200, 400),
        (10, 20, 40),
    ),
    "training-area": Curve(
        "training step", "pixels", "training-10", _with_side, _area, (128, 192, 256, 384), (32, 64, 128)
    ),
    "training-targets": Curve(
        "training step",
        "targets",
        "training-10",
        lambda setup, targets: setup._replace(targets=targets),
        lambda setup: setup.targets,
        (3, 10, 30, 100, 300),
        (3, 10, 30),
    ),
    "training-queries": Curve(
        "training step",
        "queries",
        "training-10",
        _with_queries,
        lambda setup: setup.config().num_queries,
        (50, 100, 200, 400),
        (10, 20, 40),
    ),
    "result": Curve(
        "panoptic post-processing",
        "pixels of the result",
        "panoptic",
        lambda setup, height: setup._replace(result_height=height),
        lambda setup: setup.result_height * four_thirds(setup.result_height),
        (240, 480, 960, 1920),
        (48, 96, 192),
    ),
}


def curve_setups(name: str, arguments: argparse.Namespace) -> list[Setup]:
    """The setups of a curve, the smallest first, still without weights. What doesn't grow is small."""
    curve, side = CURVES[name], SIZES[arguments.size].curve_side
    queries = SIZES[arguments.size].config().num_queries
    base = Setup(arguments.size, side, side, 1, arguments.seed, weights="", queries=queries)
    return [curve.change(base, value) for value in (curve.tiny_values if arguments.size == "tiny" else curve.values)]


def point_key(case: str, setup: Setup, implementation: str = "") -> str:
    """What makes a point: curves that meet in one share it."""
    sizes = f"{setup.batch}x{setup.height}x{setup.width}, {setup.queries} queries, {setup.targets} targets"
    return ", ".join(filter(None, [case, sizes, f"result {setup.result_height} high", implementation]))


class PointFile:
    """Measured points in a JSON file, written after each, so that nothing is lost when a run is stopped.

    Args:
        path: read if it exists.
        settings: what all points have in common.

    Raises:
        ValueError: the file's settings are others, or it is no such file.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.document: dict[str, Any] = {"settings": dict(settings), "points": {}, "checks": {}}
        if not path.exists():
            return
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            found = document["settings"]
            assert {"points", "checks"} <= document.keys()
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise ValueError(f"{path} was not written by --curves; give another name") from error
        different = [
            f"{name} {found.get(name)!r} (now {value!r})"
            for name, value in settings.items()
            if found.get(name) != value
        ]
        if different:
            raise ValueError(f"{path} was measured with {', '.join(different)}; remove it or give another name")
        self.document = document

    def has(self, kind: str, key: str) -> bool:
        return key in self.document[kind]

    def add(self, kind: str, key: str, value: Any) -> None:
        """`kind` is "points" or "checks"."""
        self.document[kind][key] = value
        write_file(self.path, json.dumps(self.document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def get(self, kind: str, key: str) -> Any:
        return self.document[kind][key]


class Panel(NamedTuple):
    """One column of the picture.

    Args:
        title: what was run.
        axis: what grew.
        seconds, mebibytes: for each implementation the (x, y) that were measured.
    """

    title: str
    axis: str
    seconds: Mapping[str, Sequence[tuple[float, float]]]
    mebibytes: Mapping[str, Sequence[tuple[float, float]]]


def curve_panel(name: str, arguments: argparse.Namespace, points: PointFile) -> Panel:
    curve = CURVES[name]
    seconds: dict[str, list[tuple[float, float]]] = {implementation: [] for implementation in IMPLEMENTATIONS}
    mebibytes: dict[str, list[tuple[float, float]]] = {implementation: [] for implementation in IMPLEMENTATIONS}
    for setup in curve_setups(name, arguments):
        for implementation in IMPLEMENTATIONS:
            point = points.get("points", point_key(curve.case, setup, implementation))
            if "missing" not in point:
                seconds[implementation].append((curve.x(setup), statistics.median(point["cpu"])))
                mebibytes[implementation].append((curve.x(setup), (point["peak"] - point["idle"]) / 2**20))
    return Panel(curve.title, curve.axis, seconds, mebibytes)


def growth(points: Sequence[tuple[float, float]], least: float = 0.0) -> float | None:
    """The power of x with which y grows: slope of the least-squares line through the logarithms.

    Args:
        points: (x, y), x above 0.
        least: smaller y are left out.

    Returns:
        None with fewer than two x left.
    """
    logarithms = [(math.log(x), math.log(y)) for x, y in points if y > 0 and y >= least]
    if len({x for x, _ in logarithms}) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(logarithms) for values in zip(*logarithms, strict=True))
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in logarithms)
    return covariance / sum((x - mean_x) ** 2 for x, _ in logarithms)


def growth_table(panels: Sequence[Panel]) -> str:
    """Markdown: with which power of what each cost grows, and what the largest point costs."""
    names = list(panels[0].seconds)
    kinds = [(kind, name) for kind in ("CPU time", "memory above idle") for name in names]
    lines = ["| grows with the power | " + " | ".join(f"{kind}, {name}" for kind, name in kinds) + " |"]
    lines.append("| --- |" + " ---: |" * len(kinds))
    for panel in panels:
        powers = [growth(panel.seconds[name]) for name in names]
        powers += [growth(panel.mebibytes[name], LEAST_MEBIBYTES) for name in names]
        cells = [f"{power:.2f}" if power is not None else "–" for power in powers]
        lines.append(f"| {panel.title}, of {panel.axis} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_curves(panels: Sequence[Panel], output: Path) -> None:
    """Write a PNG: a column for each panel, time above memory, both axes logarithmic, the growth in the legends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [("CPU seconds", 0.0), ("MiB above idle", LEAST_MEBIBYTES)]
    figure, axes = plt.subplots(
        len(rows), len(panels), figsize=(2.6 * len(panels), 5.2), sharex="col", squeeze=False, layout="constrained"
    )
    for column, panel in enumerate(panels):
        axes[0, column].set_title(panel.title, fontsize=9)
        axes[-1, column].set_xlabel(panel.axis, fontsize=8)
        for row, curves in enumerate((panel.seconds, panel.mebibytes)):
            name, least = rows[row]
            _draw_panel(axes[row, column], curves, least)
            if column == 0:
                axes[row, column].set_ylabel(name, fontsize=8)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def _draw_panel(axes: Any, curves: Mapping[str, Sequence[tuple[float, float]]], least: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    for name, points in curves.items():
        power = growth(points, least)
        label = name if power is None else f"{name}: $x^{{{power:.2f}}}$"
        drawn = [(x, max(y, least / 10)) for x, y in points]
        axes.loglog(*zip(*drawn, strict=True), "o-", color=COLORS.get(name), label=label, markersize=3, linewidth=1)
    places = sorted({x for points in curves.values() for x, _ in points})
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_number(x)))
    bottom, top = axes.get_ylim()
    # A decade at least, or noise would look like growth.
    margin = max(1.0, 10 * bottom / top) ** 0.5
    axes.set_ylim(bottom / margin, top * margin)
    if top < 50 * bottom:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # powers of ten alone would be one tick or two
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def short_number(number: float) -> str:
    """16384 as "16k": at most three digits."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"
