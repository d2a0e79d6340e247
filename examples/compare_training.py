"""Train this package's Mask2Former and transformers' from one start by one loop; compare their quality and CPU time.

    python examples/compare_training.py --output runs/comparison --implementation transformers --seed 0
    python examples/compare_training.py --output runs/comparison --implementation m2f_hf --seed 0
    ... (other seeds)
    python examples/compare_training.py --output runs/comparison --plot docs/training_comparison.png

Both get the same initial weights (drawn by transformers' model, from random numbers alone), the same generated scenes,
optimizer, schedule and number of steps; only the model differs, with the loss that belongs to it. A run is one process
of one thread, and leaves `log.jsonl` in its folder. It can be started again at any time: an interrupted run goes on
from its last checkpoint, one that is done does nothing. Data and evaluation are timed by themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from m2f_hf import M2FImageProcessor, Mask2FormerForUniversalSegmentation
from m2f_hf.data import CATEGORIES, ShapesDataset
from m2f_hf.data.loading import evaluation_loader
from m2f_hf.data.synthetic.shapes import TEST_SEED
from m2f_hf.metrics import Evaluation, evaluate_model
from m2f_hf.metrics.stock_processor import StockProcessor
from m2f_hf.training.checkpoints import (
    Log,
    find_checkpoint,
    load_checkpoint,
    read_log,
    save_checkpoint,
    tidy,
)
from m2f_hf.training.interruptions import StopSignal
from m2f_hf.training.optimization import get_parameter_groups, get_schedule


IMPLEMENTATIONS: dict[str, Any] = {
    "transformers": transformers.Mask2FormerForUniversalSegmentation,
    "m2f_hf": Mask2FormerForUniversalSegmentation,
}
LOSSES = ("loss_cross_entropy", "loss_mask", "loss_dice")
QUALITIES = {"pq_all": "PQ", "pq_things": "PQ things", "pq_stuff": "PQ stuff"}
SETTINGS = ("image_size", "batch_size", "steps", "learning_rate", "backbone_multiplier", "weight_decay")
SETTINGS += ("max_grad_norm", "warmup_steps", "evaluate_every", "scenes")


# --- what both get ---


def processor_for(size: int) -> M2FImageProcessor:
    """Images at the size they have; the thresholds that transformers' post-processing has as defaults."""
    stuff = [category["id"] for category in CATEGORIES if not category["isthing"]]
    return M2FImageProcessor(size={"shortest_edge": size, "longest_edge": size}, threshold=0.5, label_ids_to_fuse=stuff)


def initial_weights(output: Path, config: Path, seed: int) -> Path:
    """The folder with a seed's initial weights, which transformers' model draws; written by the first run to come."""
    target = output / f"start-seed{seed}"
    if target.exists():
        return target
    names = {category["id"]: category["name"] for category in CATEGORIES}
    settings = json.loads(config.read_text(encoding="utf-8"))
    torch.manual_seed(seed)
    model = transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(
            **settings, id2label=names, label2id={name: label for label, name in names.items()}
        )
    )
    output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".start.", dir=output))
    model.save_pretrained(work)
    try:
        os.replace(work, target)
    except OSError:  # a run beside this one was faster, with the same weights
        shutil.rmtree(work)
    return target


def make_batch(scenes: ShapesDataset, step: int, batch_size: int, processor: M2FImageProcessor) -> dict[str, Any]:
    """The scenes of a step, which are seen in no other, as transformers' processor would give them: masks in float."""
    items = [scenes[step * batch_size + place] for place in range(batch_size)]
    inputs = processor(
        [item["image"] for item in items],
        mask_labels=[
            np.stack([item["segmentation_map"] == info["id"] for info in item["segments_info"]]) for item in items
        ],
        class_labels=[[info["category_id"] for info in item["segments_info"]] for item in items],
        return_tensors="pt",
    )
    return {**inputs, "mask_labels": [masks.float() for masks in inputs["mask_labels"]]}


# --- training ---


class Progress:
    """What a checkpoint holds beside the weights: the step, CPU seconds by what they went into, sums for the log."""

    def __init__(self) -> None:
        self.step = 0
        self.seconds = dict.fromkeys(("training", "data", "evaluation"), 0.0)
        self.sums: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds, "sums": self.sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.seconds, self.sums = state["step"], dict(state["seconds"]), dict(state["sums"])

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the block's CPU time, of all threads, as that of `part`."""
        start = time.process_time()
        yield
        self.seconds[part] += time.process_time() - start


class Run:
    """One implementation with one seed."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = args.output / f"{args.implementation}-seed{args.seed}"
        self.processor = processor_for(args.image_size)
        self.scenes = ShapesDataset(args.steps * args.batch_size, args.image_size, args.seed)
        self.unseen = ShapesDataset(args.scenes, args.image_size, TEST_SEED)
        start = initial_weights(args.output, args.config, args.seed)
        self.model = IMPLEMENTATIONS[args.implementation].from_pretrained(start, dtype=torch.float32).train()
        groups = get_parameter_groups(self.model, args.learning_rate, args.weight_decay, args.backbone_multiplier)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.schedule = get_schedule(self.optimizer, "cosine", args.steps, args.warmup_steps)
        self.progress = Progress()
        self.parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        self.parts["progress"] = self.progress
        self.terms: dict[str, Tensor] = {}
        self.model.criterion.register_forward_hook(self.note_terms)

    def note_terms(self, criterion: Any, inputs: Any, losses: Mapping[str, Tensor]) -> None:
        """Keep the loss terms as the criterion gives them; transformers' model multiplies them in place after that."""
        self.terms = {name: losses[name].detach().clone() for name in LOSSES}

    def go_on(self) -> None:
        """From the last checkpoint, if there is one, to the end or until told to stop."""
        args, progress = self.args, self.progress
        self.folder.mkdir(exist_ok=True)
        tidy(self.folder)
        check_settings(self.folder, args)
        checkpoint = find_checkpoint(self.folder)
        if checkpoint is not None:
            load_checkpoint(checkpoint, self.parts)
        log = Log(self.folder / "log.jsonl", lambda row: row["step"] <= progress.step)
        name = f"{args.implementation}, seed {args.seed}"
        bar = tqdm(total=args.steps, initial=progress.step, desc=name, unit="step", mininterval=5)
        with StopSignal() as stop, bar:
            while progress.step < args.steps:
                self.train_step()
                bar.update()
                if self.is_due(args.log_every):
                    row = self.training_row()
                    log.write(row)
                    bar.set_postfix(loss=f"{row['loss']:.2f}", minutes=f"{row['training_seconds'] / 60:.1f}")
                if self.is_due(args.evaluate_every):
                    row = self.evaluation_row()
                    log.write(row)
                    tqdm.write(f"{name}, step {progress.step}: {in_words(row)}", file=sys.stderr)
                if self.is_due(args.evaluate_every) or self.is_due(args.save_every) or stop.received:
                    save_checkpoint(self.folder, progress.step, self.parts)
                if stop.received:
                    raise SystemExit(stop.exit_code)

    def is_due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.args.steps

    def train_step(self) -> None:
        """One step; what it draws depends on the seed and the step alone."""
        progress, args = self.progress, self.args
        with progress.timed("data"):
            inputs = make_batch(self.scenes, progress.step, args.batch_size, self.processor)
        torch.manual_seed(args.seed * 1_000_003 + progress.step + 1)
        with progress.timed("training"):
            self.optimizer.zero_grad()
            loss = self.model(**inputs).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
            self.optimizer.step()
            self.schedule.step()
            values = {"loss": loss.item(), "gradient_norm": norm.item()}
        progress.step += 1
        values |= {name: value.item() for name, value in self.terms.items()} | {"steps": 1.0}
        progress.sums = {name: progress.sums.get(name, 0.0) + value for name, value in values.items()}

    def training_row(self) -> dict[str, float]:
        """Means since the last row."""
        sums, self.progress.sums = self.progress.sums, {}
        steps = sums.pop("steps")
        return {"step": self.progress.step, **{name: value / steps for name, value in sums.items()}, **self.times()}

    def times(self) -> dict[str, float]:
        return {f"{part}_seconds": round(seconds, 3) for part, seconds in self.progress.seconds.items()}

    def evaluation_row(self) -> dict[str, Any]:
        """PQ on unseen scenes, after transformers' post-processing and after ours."""
        with self.progress.timed("evaluation"):
            processors = {"transformers": StockProcessor(self.processor), "m2f_hf": self.processor}
            evaluations = {
                name: Evaluation("panoptic", processor, CATEGORIES, ["pq"]) for name, processor in processors.items()
            }

            def update(outputs: Any, items: Sequence[Mapping[str, Any]]) -> None:
                for evaluation in evaluations.values():
                    evaluation.update(outputs, items)

            evaluate_model(self.model, evaluation_loader(self.unseen, self.processor, self.args.batch_size), update)
            figures = {name: evaluation.compute() for name, evaluation in evaluations.items()}
        row = {"step": self.progress.step, **self.times()}
        return row | {name: {key: result[key] or 0.0 for key in QUALITIES} for name, result in figures.items()}


def in_words(row: Mapping[str, Any]) -> str:
    """The figures of an evaluation."""
    return "; ".join(
        f"{name}' post-processing: " + ", ".join(f"{word} {row[name][key]:.3f}" for key, word in QUALITIES.items())
        for name in IMPLEMENTATIONS
    )


def check_settings(folder: Path, args: argparse.Namespace) -> None:
    """Write down what a run is made with, or compare it with what the run was begun with.

    Raises:
        SystemExit: they differ.
    """
    now = {name: getattr(args, name) for name in SETTINGS}
    now |= {"model": json.loads(args.config.read_text(encoding="utf-8"))}
    path = folder / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        raise SystemExit(f"{folder} was begun with other settings ({', '.join(differing)}): give another --output.")


# --- comparing ---


def read_runs(output: Path) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Implementation -> seed -> rows of its log."""
    runs: dict[str, dict[int, list[dict[str, Any]]]] = {name: {} for name in IMPLEMENTATIONS}
    for name, by_seed in runs.items():
        for log in sorted(output.glob(f"{name}-seed*/log.jsonl")):
            rows = read_log(log)
            if any(name in row for row in rows):
                by_seed[int(log.parent.name.removeprefix(f"{name}-seed"))] = rows
    if not all(runs.values()):
        raise SystemExit(f"{output} holds no evaluated run of one of {', '.join(runs)}: train first.")
    return runs


def evaluated(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if "m2f_hf" in row]


def draw(runs: Mapping[str, Mapping[int, list[dict[str, Any]]]], path: Path) -> None:
    """PQ against steps and against CPU minutes: each run thin, the mean of an implementation's runs thick."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    places: tuple[tuple[str, Callable[[Mapping[str, Any]], float]], ...] = (
        ("step", lambda row: row["step"]),
        ("CPU minutes of training, one core", lambda row: row["training_seconds"] / 60),
    )
    for axes, (label, place) in zip(panes, places, strict=True):
        for color, (name, by_seed) in zip(("C1", "C0"), runs.items(), strict=True):
            curves = [[(place(row), row[name]["pq_all"]) for row in evaluated(rows)] for rows in by_seed.values()]
            for curve in curves:
                axes.plot(*zip(*curve, strict=True), color=color, linewidth=0.8, alpha=0.5)
            points = [tuple(map(mean, zip(*points, strict=True))) for points in zip(*curves, strict=False)]
            of_seeds = f"mean of {len(curves)} seeds" if len(curves) > 1 else "1 seed"
            axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, label=f"{name}, {of_seeds}")
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panes[0].set_ylabel("PQ on unseen scenes")
    panes[1].legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def table(runs: Mapping[str, Mapping[int, list[dict[str, Any]]]]) -> str:
    """Figures at the end of each run and their means, in Markdown; then the ratio of the CPU times."""
    lines = [
        "| | seed | steps | PQ | PQ things | PQ stuff | PQ, m2f_hf's post-processing | CPU minutes | s per step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    minutes: dict[str, dict[int, float]] = {}
    for name, by_seed in runs.items():
        last = {seed: evaluated(rows)[-1] for seed, rows in by_seed.items()}
        minutes[name] = {seed: row["training_seconds"] / 60 for seed, row in last.items()}
        columns = []
        for seed, row in last.items():
            qualities = [*(row[name][key] for key in QUALITIES), row["m2f_hf"]["pq_all"]]
            columns.append([*qualities, minutes[name][seed], row["training_seconds"] / row["step"]])
            lines.append(table_line(name, str(seed), str(row["step"]), columns[-1]))
        steps = "/".join(sorted({str(row["step"]) for row in last.values()}))
        lines.append(table_line(f"**{name}**", "mean", steps, [mean(values) for values in zip(*columns, strict=True)]))
    shared = sorted(set.intersection(*map(set, minutes.values())))
    ratios = [minutes["m2f_hf"][seed] / minutes["transformers"][seed] for seed in shared]
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    overall = mean(minutes["m2f_hf"].values()) / mean(minutes["transformers"].values())
    return "\n".join([*lines, "", f"CPU time, m2f_hf / transformers: {overall:.2f} of the means; by seed: {each}"])


def table_line(name: str, seed: str, steps: str, values: Sequence[float]) -> str:
    *qualities, minutes, per_step = values
    numbers = [*(f"{quality:.3f}" for quality in qualities), f"{minutes:.1f}", f"{per_step:.2f}"]
    return f"| {' | '.join([name, seed, steps, *numbers])} |"


# --- the script ---


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of all runs")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--implementation", choices=list(IMPLEMENTATIONS), help="train this one")
    what.add_argument("--plot", type=Path, metavar="PNG", help="draw the runs there are, and print a table of them")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights, scenes and points")
    config = Path(__file__).with_suffix(".json")
    parser.add_argument("--config", type=Path, default=config, help="JSON of `Mask2FormerConfig`'s fields")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--backbone_multiplier", type=float, default=1.0, help="of the learning rate")
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--max_grad_norm", type=float, default=5.0)
    parser.add_argument("--warmup_steps", type=int, default=40)
    parser.add_argument("--scenes", type=int, default=200, help="unseen scenes of an evaluation")
    parser.add_argument("--evaluate_every", type=int, default=250)
    parser.add_argument("--log_every", type=int, default=10)
    parser.add_argument("--save_every", type=int, default=100)
    args = parser.parse_args(arguments)
    if args.seed == TEST_SEED:
        parser.error(f"--seed {TEST_SEED} is that of the unseen scenes: take another")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.plot is not None:
        runs = read_runs(args.output)
        draw(runs, args.plot)
        print(table(runs))
        return
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # transformers warns of every backbone that is not Swin
    Run(args).go_on()


if __name__ == "__main__":
    main()
