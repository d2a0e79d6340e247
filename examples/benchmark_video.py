"""Peak memory of clips by their length: in windows, and all frames at once. Each figure is of a fresh process.

    python examples/benchmark_video.py --output runs/benchmark-video

Random weights of the ResNet-50 model and random frames: memory depends on sizes alone. In the output folder:
`results.json` and `results.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from benchmark_measure import measure_memory, processor_name
from transformers import ResNetConfig

from m2f_hf import (
    ClipTracker,
    Mask2FormerForVideoSegmentation,
    Mask2FormerVideoConfig,
    Mask2FormerVideoProcessor,
)


WAYS = ("windows", "at once")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[10, 50, 200, 500], help="frames of the clips")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 224], metavar=("HEIGHT", "WIDTH"), help="of a frame")
    parser.add_argument("--window", type=int, default=8, help="frames of a window")
    parser.add_argument("--overlap", type=int, default=4, help="frames that windows share")
    parser.add_argument("--threads", type=int, default=1, help="of the processor")
    parser.add_argument("--tiny", action="store_true", help="a model of few parameters, to try the script")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-video"), help="folder for the results")
    # What each of the fresh processes is told to do.
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FRAMES"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def build(tiny: bool) -> tuple[Mask2FormerForVideoSegmentation, Mask2FormerVideoProcessor]:
    """The ResNet-50 model with 100 queries, or a tiny one, of random weights; frames stay at their size."""
    torch.manual_seed(0)
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    if tiny:
        backbone = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, layer_type="basic", **stages
        )
        width = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_queries": 10}
    else:
        backbone, width = ResNetConfig(**stages), {}
    config = Mask2FormerVideoConfig(backbone_config=backbone, num_labels=40, **width)
    return Mask2FormerForVideoSegmentation(config).eval(), Mask2FormerVideoProcessor(do_resize=False)


def random_frames(number: int, size: tuple[int, int]) -> Iterator[np.ndarray]:
    for index in range(number):
        yield np.random.default_rng(index).integers(0, 255, (*size, 3), dtype=np.uint8)


def measure(way: str, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Memory of this process in bytes, and processor seconds, from frames to the masks of ten tracks."""
    torch.set_num_threads(options.threads)
    model, processor = build(options.tiny)
    frames = random_frames(number, tuple(options.size))

    def in_windows() -> None:
        tracker = ClipTracker(model, processor, window=options.window, overlap=options.overlap, threshold=0.0)
        assert sum(1 for _ in tracker(frames)) == number

    def at_once() -> None:
        with torch.inference_mode():
            outputs = model(**processor(list(frames), return_tensors="pt"))
            (tracks,) = processor.post_process_video_instance_segmentation(outputs)
        assert tracks["segmentation"].shape[1] == number

    start = time.process_time()
    memory = measure_memory(in_windows if way == "windows" else at_once)
    return {
        "way": way,
        "frames": number,
        "idle": memory.idle,
        "peak": memory.peak,
        "cpu_seconds": time.process_time() - start,
    }


def measure_apart(way: str, number: int, arguments: list[str]) -> dict[str, Any]:
    """`measure` in a process of its own; where that fails, `error` with its last words, such as of memory's end."""
    command = [sys.executable, __file__, *arguments, "--measure", way, str(number)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {
            "way": way,
            "frames": number,
            "error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1],
        }
    return json.loads(done.stdout.splitlines()[-1])


def table(results: list[dict[str, Any]], lengths: list[int]) -> str:
    """Peak memory in MiB and processor seconds, a column for each length."""
    found = {(result["way"], result["frames"]): result for result in results}
    lines = ["| frames | " + " | ".join(map(str, lengths)) + " |", "|---|" + "---|" * len(lengths)]
    for way in WAYS:
        of_way = [found[way, number] for number in lengths]
        for name, text in (
            ("MiB", lambda result: f"{result['peak'] / 2**20:,.0f}"),
            ("CPU s", lambda result: f"{result['cpu_seconds']:.1f}"),
        ):
            cells = ["failed" if "error" in result else text(result) for result in of_way]
            lines.append(f"| {way}, {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]), options)))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    results = []
    for number in options.lengths:
        for way in WAYS:
            results.append(measure_apart(way, number, arguments))
            print(results[-1], flush=True)
    machine = {"processor": processor_name(), "torch": torch.__version__, "transformers": transformers.__version__}
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "measure")}
    record = {**machine, "python": platform.python_version(), **settings, "results": results}
    (options.output / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (options.output / "results.md").write_text(table(results, options.lengths), encoding="utf-8")
    print(table(results, options.lengths))


if __name__ == "__main__":
    main()
