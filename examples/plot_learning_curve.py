"""Draw the learning curve of a run of `examples/finetune.py`: loss terms, and quality on unseen data.

python examples/plot_learning_curve.py --log runs/shapes/training_log.jsonl --output docs/learning_curve.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt


LOSSES = {"loss_cross_entropy": "class", "loss_mask": "mask", "loss_dice": "dice"}
QUALITIES = {"pq_all": "PQ", "pq_things": "PQ, things", "pq_stuff": "PQ, stuff", "miou": "mean IoU"}


def read_stages(logs: list[Path]) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows of all logs with steps counted on from stage to stage, and the steps at which later stages begin."""
    rows: list[dict[str, Any]] = []
    starts = [0]
    for log in logs:
        stage = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        # The name of mean IoU in older logs.
        stage = [{"miou" if key == "mean_iou" else key: value for key, value in row.items()} for row in stage]
        rows += [{**row, "step": starts[-1] + row["step"]} for row in stage]
        starts.append(max(row["step"] for row in rows))
    return rows, starts[1:-1]


def plot(rows: list[dict[str, Any]], starts: list[int], output: Path) -> None:
    """Write the picture; a dashed line is drawn at each of `starts`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axes, columns, style in ((left, LOSSES, "-"), (right, QUALITIES, "o-")):
        for key, name in columns.items():
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=3, linewidth=1)
        for start in starts:
            axes.axvline(start, color="grey", linestyle="--", linewidth=1)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_title("loss terms of the last decoder layer, unweighted")
    left.set_ylim(bottom=0)
    right.set_title("unseen scenes")
    right.set_ylim(0, 1)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, nargs="+", required=True, help="training_log.jsonl of each stage")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    args = parser.parse_args(arguments)
    plot(*read_stages(args.log), args.output)


if __name__ == "__main__":
    main()
