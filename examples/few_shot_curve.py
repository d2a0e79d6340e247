"""Fine-tune a checkpoint to new classes with few images: panoptic quality against the number of images.

    python examples/few_shot_curve.py --output runs/few-shot --plot docs/few_shot.png

The checkpoint knows circles, rectangles, triangles and stars on three kinds of ground; the new classes are crosses,
rings, hexagons and crescents on the same. Scenes are written to disk in COCO's panoptic form; then
`examples/finetune.py` is run for each number of images, as on anybody's data. It validates once, at the end, on scenes
that no training has seen: nothing is chosen by them. Options that this script does not have are passed on to it.
A run that was interrupted goes on when the script is started again, and one that is done is not repeated.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt

from m2f_hf import BUNDLED_MODEL
from m2f_hf.data import ShapesDataset, write_coco_panoptic
from m2f_hf.data.synthetic.shapes import MORE_SHAPES, TEST_SEED
from m2f_hf.training.checkpoints import read_log


QUALITIES = {"pq_all": "PQ", "pq_things": "PQ things (new classes)", "pq_stuff": "PQ stuff (known classes)"}
SEED = 100
"""Of the training scenes. The first 10 of 50 are the 10."""


def write_data(folder: Path, image_size: int, numbers: list[int], num_test: int) -> None:
    """Training scenes, a folder for each number of them, and the scenes that are measured on."""
    splits = {f"train-{number}": (number, SEED) for number in numbers} | {"test": (num_test, TEST_SEED)}
    for name, (number, seed) in splits.items():
        if not (folder / name).exists():
            scenes = ShapesDataset(number, image_size, seed, shapes=MORE_SHAPES)
            write_coco_panoptic(scenes, folder / name, scenes.categories)


def measured(run: Path, steps: int) -> dict[str, Any] | None:
    """The figures at the end of a run; None before the end."""
    log = run / "training_log.jsonl"
    rows = read_log(log) if log.exists() else []
    return next((row for row in rows if row["step"] == steps and "pq_all" in row), None)


def fine_tune(args: argparse.Namespace, number: int, more: list[str]) -> dict[str, Any]:
    """Run `examples/finetune.py` on so many images, or read what it measured if it has.

    Raises:
        SystemExit: it failed.
    """
    run = args.output / f"{number}-images"
    if (row := measured(run, args.steps)) is not None:
        return row
    data, steps = args.output / "data", str(args.steps)
    command = [sys.executable, Path(__file__).with_name("finetune.py"), "--resume", "--output", run]
    command += ["--dataset", data / f"train-{number}", "--validation", data / "test", "--model", args.model]
    command += ["--steps", steps, "--eval_every", steps, "--save_every", str(min(args.steps, 50)), *more]
    print(" ".join(map(str, command)), file=sys.stderr)
    subprocess.run(command, check=False)
    if (row := measured(run, args.steps)) is None:
        raise SystemExit(f"Fine-tuning with {number} images did not come to its end: start this again to go on.")
    return row


def draw(figures: Mapping[int, Mapping[str, Any]], path: Path) -> None:
    """Quality against the number of images, on a logarithmic axis."""
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for key, name in QUALITIES.items():
        axes.plot(list(figures), [row[key] for row in figures.values()], "o-", label=name, markersize=4)
    axes.set_xscale("log")
    axes.set_xticks(list(figures), labels=list(map(str, figures)))
    axes.minorticks_off()
    axes.set_xlabel("training images")
    axes.set_title("unseen scenes")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of data and runs")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="default: curve.png in --output")
    parser.add_argument("--model", default=str(BUNDLED_MODEL), help="checkpoint to start from")
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--test_images", type=int, default=200)
    parser.add_argument("--image_size", type=int, default=160, help="side of the scenes")
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    args, more = parser.parse_known_args(arguments)
    write_data(args.output / "data", args.image_size, args.images, args.test_images)
    figures = {number: fine_tune(args, number, more) for number in args.images}
    draw(figures, args.plot or args.output / "curve.png")
    print(f"| images | {' | '.join(QUALITIES.values())} |\n|---|{'---|' * len(QUALITIES)}")
    for number, row in figures.items():
        print(f"| {number} | {' | '.join(f'{row[key]:.3f}' for key in QUALITIES)} |")


if __name__ == "__main__":
    main()
