"""Measure a model on a labelled data set: PQ, mask AP, mIoU or video AP, per class, with pictures of its worst.

    python examples/evaluate.py --model path/or/hub/id --dataset path/to/folder --output runs/evaluation
    python examples/evaluate.py --model m2f_hf/assets/shapes-panoptic --dataset shapes --output runs/shapes

`--model` is a checkpoint of this package or of transformers, of images or of clips. `--dataset` is what
`m2f_hf.data.open_dataset` opens, or "shapes" (for clips "moving_shapes"), generated scenes that no training has seen.
In the output folder: `results.json`, `results.md` (the same as tables), `per_class.png`, and `worst/`, the images with
the lowest figures: image, prediction and target side by side.

`--post_processing stock` measures the same weights with transformers' own image processor instead. Under `accelerate
launch` or `torchrun` each process takes a share of the images.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


try:
    from accelerate import Accelerator
    from accelerate.utils import gather_object
except ImportError as error:
    raise SystemExit("This script needs Accelerate: pip install 'm2f_hf[train]'") from error
from finetune_setup import GENERATED, classes_for, is_video_checkpoint
from huggingface_hub import EvalResult, ModelCard
from stock_processor import StockProcessor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from m2f_hf import M2FImageProcessor
from m2f_hf.data import CATEGORIES, MovingShapesDataset, ShapesDataset, open_dataset
from m2f_hf.data.loading import CollateItems
from m2f_hf.data.synthetic.shapes import TEST_SEED
from m2f_hf.hub import Figure, model_card
from m2f_hf.inference.test_time_augmentation import semantic_scores_with_augmentation
from m2f_hf.metrics import MAIN_FIGURE, MEASURES, Evaluation, Prediction
from m2f_hf.metrics.pictures import comparison_sheet, draw_comparison, draw_frames


SETTINGS = {
    "panoptic": ("threshold", "mask_threshold", "overlap_mask_area_threshold", "max_detections"),
    "instance": ("mask_threshold", "max_detections"),
    "semantic": (),
    "video": ("mask_threshold", "max_detections"),
}
"""What of the processor the figures of a task depend on."""
RESULTS_SECTION = re.compile(r"^## Results\n.*?(?=^## |^<!-- |\Z)", re.M | re.S)


# --- data ---


class Items(Dataset[dict[str, Any]]):
    """This process's share of a data set's items, with the model's labels for classes and with their position."""

    def __init__(self, dataset: Any, positions: Sequence[int], label_of: Mapping[int, int]) -> None:
        self.dataset, self.positions, self.label_of = dataset, positions, label_of

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[self.positions[index]]
        segments = [{**info, "category_id": self.label_of[info["category_id"]]} for info in item["segments_info"]]
        return {**item, "segments_info": segments, "position": self.positions[index]}


def open_data(args: argparse.Namespace, task: str) -> tuple[Any, list[dict[str, Any]], str]:
    """The items to measure on, their classes, and what they are called."""
    if args.dataset in GENERATED and (GENERATED[args.dataset] == "video") != (task == "video"):
        raise ValueError(f"{args.dataset} is for task {GENERATED[args.dataset]}, the model for {task}")
    if args.dataset == "moving_shapes":
        videos = MovingShapesDataset(args.limit or 60, seed=TEST_SEED)
        return videos, videos.categories, "generated videos"
    if args.dataset == "shapes":
        return ShapesDataset(args.limit or 200, seed=TEST_SEED), CATEGORIES, "generated scenes"
    splits = open_dataset(args.dataset, task=task, held_out=args.held_out)
    dataset = getattr(splits, args.split)
    split = "all images" if splits.train is splits.validation else args.split
    if not hasattr(dataset, "__len__"):
        if args.limit is None:
            raise ValueError(f"{args.dataset} is a stream, whose length is not known: give --limit")
        dataset = list(itertools.islice(dataset, args.limit))
    return dataset, splits.categories, split


def match_labels(categories: Sequence[Mapping[str, Any]], id2label: Mapping[int, str]) -> dict[int, int]:
    """Which label of the model each class of a data set is: by name; by position if the model has no names.

    Raises:
        ValueError: for classes that the model does not have.
    """
    if all(re.fullmatch(r"LABEL_\d+", name) for name in id2label.values()) and len(id2label) == len(categories):
        return {int(category["id"]): int(category["id"]) for category in categories}
    label_of_name = {_plain(name): int(label) for label, name in id2label.items()}
    missing = [str(category["name"]) for category in categories if _plain(category["name"]) not in label_of_name]
    if missing:
        raise ValueError(
            f"The model has no label for {len(missing)} of the data set's {len(categories)} classes: "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}. Rename the classes as in its id2label, or "
            "fine-tune it on them."
        )
    return {int(category["id"]): label_of_name[_plain(category["name"])] for category in categories}


def _plain(name: object) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def label_categories(
    categories: Sequence[Mapping[str, Any]], label_of: Mapping[int, int], model: Any, processor: Any
) -> list[dict[str, Any]]:
    """The model's labels as classes in COCO's form; which are things, the data set says, or else the processor."""
    known = {label_of[int(category["id"])]: category for category in categories}
    stuff = processor.label_ids_to_fuse
    result = []
    for label, name in sorted((int(label), name) for label, name in model.config.id2label.items()):
        isthing = known.get(label, {}).get("isthing")
        if isthing is None and stuff is not None:
            isthing = label not in stuff
        result.append({"id": label, "name": name, "isthing": isthing})
    return result


# --- measuring ---


class Worst:
    """The `number` images of lowest figures that were offered, as (figure, position)."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._heap: list[tuple[float, int]] = []  # of negated figures, so that the best of the worst is on top

    def offer(self, figure: float | None, position: int) -> None:
        if figure is not None and self.number:
            heapq.heappush(self._heap, (-figure, position))
            if len(self._heap) > self.number:
                heapq.heappop(self._heap)

    def ranked(self) -> list[tuple[float, int]]:
        """From the worst on."""
        return sorted((-negated, position) for negated, position in self._heap)


@torch.no_grad()
def predict(
    model: Any, evaluation: Evaluation, inputs: Any, items: Sequence[Mapping[str, Any]], tta: bool
) -> list[Prediction]:
    """What the model says of a batch, as the measures compare it with the items."""
    if tta:
        views = (semantic_scores_with_augmentation(model, evaluation.processor, item["image"]) for item in items)
        return [{"semantic": scores.argmax(0)} for scores in views]
    device = next(model.parameters()).device
    outputs = model(**{name: values.to(device) for name, values in inputs.items()})
    return evaluation.predict(outputs, items)


def measure(model: Any, evaluation: Evaluation, items: Items, args: argparse.Namespace, show_progress: bool) -> Worst:
    """Add the items to the evaluation, image by image, and say which were worst."""
    worst = Worst(args.worst)
    loader = DataLoader(
        items,
        batch_size=1 if args.post_processing == "stock" or evaluation.task == "video" else args.batch_size,
        collate_fn=CollateItems(evaluation.processor),
        num_workers=args.num_workers,
    )
    main_measure, main_figure = MEASURES[evaluation.task][0], MAIN_FIGURE[evaluation.task]
    for inputs, batch in tqdm(loader, desc="Evaluating", unit="batch", disable=not show_progress):
        for prediction, item in zip(predict(model, evaluation, inputs, batch, args.tta), batch, strict=True):
            single = evaluation.empty()
            single.add(prediction, item)
            worst.offer(single.metrics[main_measure].compute()[main_figure], item["position"])
            evaluation.merge(single)
    return worst


# --- pictures ---


def draw_worst(
    model: Any, evaluation: Evaluation, items: Items, worst: Sequence[tuple[float, int]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Write image, prediction and target of each of the worst images side by side into `worst/`; say what they are."""
    folder = args.output / "worst"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = model.config
    id2label = {int(label): name for label, name in config.id2label.items()}
    colors = dict(enumerate(config.label_colors)) if config.label_colors else None
    figure_name = MAIN_FIGURE[evaluation.task]
    rows = []
    for rank, (figure, position) in enumerate(tqdm(worst, desc="Drawing", unit="image"), start=1):
        item = items[position]
        inputs, _ = CollateItems(evaluation.processor)([item])
        prediction = predict(model, evaluation, inputs, [item], args.tta)[0]
        item_id = item["video_id"] if evaluation.task == "video" else item["image_id"]
        name = str(item.get("file_name", f"image {item_id}"))
        drawn_in = (item, prediction, evaluation, id2label, colors)
        if evaluation.task == "video":
            pictures, titles = draw_frames(*drawn_in)
        else:
            pictures, titles = [draw_comparison(*drawn_in)], [name]
        sheet = comparison_sheet(pictures, [f"{title}: {figure_name} {100 * figure:.1f}" for title in titles])
        file = f"{rank:02d}_{re.sub(r'[^A-Za-z0-9_-]+', '_', Path(name).stem)}.jpg"
        sheet.save(folder / file, quality=90)
        rows.append({"image_id": item_id, "file_name": name, figure_name: figure, "picture": f"worst/{file}"})
    return rows


def draw_per_class(per_class: Mapping[str, Mapping[str, Any]], evaluation: Evaluation, title: str, path: Path) -> None:
    """Bars of each class's figure, the best on top; classes that never occurred are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    key = {"panoptic": "pq", "instance": "ap", "semantic": "iou", "video": "ap"}[evaluation.task]
    isthing = {str(category["name"]): category["isthing"] for category in evaluation.categories}
    bars = sorted(
        ((entry[key], name) for name, entry in per_class.items() if entry.get(key) is not None), key=lambda bar: bar[0]
    )
    colors = {True: "#3b75af", False: "#c58c3a", None: "#7a7a7a"}
    kinds = [None if isthing.get(name) is None else bool(isthing[name]) for _, name in bars]
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.26 * len(bars)), layout="constrained")
    axes.barh([name for _, name in bars], [100 * value for value, _ in bars], color=[colors[kind] for kind in kinds])
    for row, (value, _) in enumerate(bars):
        axes.text(100 * value + 0.8, row, f"{100 * value:.1f}", va="center", fontsize=8)
    axes.set(xlim=(0, 108), ylim=(-0.6, len(bars) - 0.4), xlabel=f"{key.upper()} (%)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    names = {True: "things", False: "stuff"}
    shown = [kind for kind in (True, False) if kind in kinds]
    if len(shown) == 2:
        handles = [plt.Rectangle((0, 0), 1, 1, color=colors[kind]) for kind in shown]
        axes.legend(handles, [names[kind] for kind in shown], loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --- results ---


def units_of(task: str) -> str:
    """What a task's items are, in a word."""
    return "videos" if task == "video" else "images"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def markdown(result: Mapping[str, Any]) -> str:
    """The results as tables, in percent as the field writes them."""
    figures, per_class = result["figures"], result["per_class"]
    units = units_of(result["task"])
    lines = [
        f"# {result['model']} on {result['dataset']}",
        "",
        f"{units.capitalize()}: {result['num_images']} ({result['split']}), "
        f"task {result['task']}, {result['processing']}.",
        "",
    ]
    groups = [name for name in ("all", "things", "stuff") if figures.get(f"pq_{name}") is not None]
    if groups:
        lines += ["| | PQ | SQ | RQ |", "|---|---|---|---|"]
        lines += [
            f"| {group} | " + " | ".join(percent(figures[f"{key}_{group}"]) for key in ("pq", "sq", "rq")) + " |"
            for group in groups
        ]
        lines.append("")
    others = {name: value for name, value in figures.items() if not name.startswith(("pq_", "sq_", "rq_"))}
    if others:
        lines += ["| " + " | ".join(others) + " |", "|" + "---|" * len(others)]
        lines += ["| " + " | ".join(percent(value) for value in others.values()) + " |", ""]
    columns = [
        key
        for key in ("pq", "sq", "rq", "ap", "ap50", "ap75", "iou", "accuracy")
        if any(entry.get(key) is not None for entry in per_class.values())
    ]
    lines += ["| class | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [
        f"| {name} | " + " | ".join(percent(entry.get(key)) for key in columns) + " |"
        for name, entry in per_class.items()
    ]
    if result["worst"]:
        lines += ["", f"The worst {units}:", ""]
        lines += [f"- [{row['file_name']}]({row['picture']})" for row in result["worst"]]
    return "\n".join(lines) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file; it is whole or as it was."""
    work = path.with_name(f".{path.name}.tmp")
    work.write_text(text, encoding="utf-8")
    os.replace(work, path)


def headline(task: str, figures: Mapping[str, Any], dataset: str, split: str) -> list[Figure]:
    """The figures that the paper's tables have, on their scale, for a model's card."""
    names = {"pq_all": "PQ", "ap": "AP", "miou": "mIoU"}
    of_card = "instance" if task == "video" else task  # that the instances are of clips, the card knows from the model
    return [
        Figure(
            of_card, dataset, split, names[name], round(100 * figures[name], 2), source="examples/evaluate.py of m2f_hf"
        )
        for name in names
        if figures.get(name) is not None
    ]


def put_on_card(folder: Path, model: Any, processor: M2FImageProcessor, figures: Sequence[Figure]) -> None:
    """Write the figures into the model's card, in the place of older ones of the same data; other words stay."""
    path = folder / "README.md"
    if not path.exists():
        write_text(path, str(model_card(model.config, processor, repo_id=folder.resolve().name, figures=figures)))
        return
    card = ModelCard.load(path)
    new = {(figure.task, figure.dataset, figure.split, figure.metric) for figure in figures}
    kept = [
        figure
        for figure in map(to_figure, card.data.eval_results or [])
        if (figure.task, figure.dataset, figure.split, figure.metric) not in new
    ]
    fresh = model_card(model.config, processor, repo_id=folder.resolve().name, figures=[*kept, *figures])
    card.data.eval_results = fresh.data.eval_results
    card.data.model_name = card.data.model_name or folder.resolve().name
    section = RESULTS_SECTION.search(fresh.text)
    assert section is not None
    if RESULTS_SECTION.search(card.text):
        card.text = RESULTS_SECTION.sub(lambda _: section[0], card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section[0].rstrip()}\n"
    write_text(path, str(card))


def to_figure(entry: EvalResult) -> Figure:
    """What `model_card` made an entry of."""
    named = re.fullmatch(r"(?P<metric>.+) \((?P<task>\w+)\)", entry.metric_name or "")
    metric, task = (named["metric"], named["task"]) if named else (entry.metric_name or entry.metric_type, "")
    dataset_id = entry.dataset_type if "/" in entry.dataset_type else None
    value = float(entry.metric_value)
    split = entry.dataset_split or ""
    return Figure(task, entry.dataset_name, split, metric, value, source=entry.source_url, dataset_id=dataset_id)


# --- the script ---


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a checkpoint")
    parser.add_argument("--dataset", required=True, help='"shapes", "moving_shapes", or what open_dataset opens')
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--task", choices=list(MEASURES), help="default: the checkpoint's own")
    parser.add_argument("--split", choices=["validation", "train"], default="validation")
    parser.add_argument(
        "--held_out",
        type=float,
        default=0.0,
        help="share to measure on where there are no splits; 0: all",
    )
    parser.add_argument("--post_processing", choices=["ours", "stock"], default="ours", help="stock: transformers' own")
    parser.add_argument("--tta", action="store_true", help="semantic: average over sizes and mirror images")
    parser.add_argument("--limit", type=int, help="measure on the first so many images, or videos")
    parser.add_argument("--worst", type=int, default=8, help="how many of the worst images, or videos, are drawn")
    parser.add_argument("--card", action="store_true", help="put the figures on the card in --model's folder")
    parser.add_argument("--batch_size", type=int, default=4, help="images that are read at once; videos come alone")
    parser.add_argument("--num_workers", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.card and not Path(args.model).is_dir():
        parser.error("--card needs --model to be a folder; push the folder afterwards")
    if args.output.is_file():
        parser.error(f"--output {args.output} is a file: name a folder")
    if args.tta and args.post_processing == "stock":
        parser.error("--tta averages the scores of our post-processing: leave out --post_processing stock")
    if args.batch_size < 1 or args.worst < 0 or (args.limit is not None and args.limit < 1):
        parser.error("--batch_size and --limit are at least 1, --worst at least 0")
    return args


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse_arguments(arguments)
    accelerator = Accelerator()
    try:
        is_video = is_video_checkpoint(args.model)
    except OSError as error:
        raise SystemExit(
            f"--model {args.model} is neither a folder with a checkpoint nor on the Hub: {error}"
        ) from error
    if (args.task == "video") > is_video or (is_video and args.task not in (None, "video")):
        raise SystemExit(
            f"{args.model} is a model of {'clips' if is_video else 'images'}: no good for --task {args.task}"
        )
    if is_video and args.post_processing == "stock":
        raise SystemExit("transformers has no post-processing of videos: leave out --post_processing stock")
    model_class, processor_class = classes_for("video" if is_video else "image")
    model = model_class.from_pretrained(args.model).to(accelerator.device).eval()
    processor = processor_class.from_pretrained(args.model)
    task = args.task or ("video" if is_video else processor.task)
    if args.tta and task != "semantic":
        raise SystemExit(f"--tta is for task semantic, not {task}")
    try:
        dataset, dataset_categories, split = open_data(args, task)
        label_of = match_labels(dataset_categories, model.config.id2label)
        used = StockProcessor(processor) if args.post_processing == "stock" else processor
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    categories = label_categories(dataset_categories, label_of, model, processor)
    num_images = min(len(dataset), args.limit or len(dataset))
    if num_images == 0:
        raise SystemExit(f"{args.dataset} has no {units_of(task)} in its {args.split} part")

    evaluation = Evaluation(task, used, categories)
    positions = range(accelerator.process_index, num_images, accelerator.num_processes)
    share = Items(dataset, positions, label_of)
    worst = measure(model, evaluation, share, args, accelerator.is_main_process)
    figures = evaluation.compute(gather_object)
    ranked = heapq.nsmallest(args.worst, gather_object(worst.ranked()))
    if not accelerator.is_main_process:
        return figures

    args.output.mkdir(parents=True, exist_ok=True)
    per_class = figures.pop("per_class")
    settings = {name: getattr(processor, name) for name in SETTINGS[task]}
    processing = f"{'transformers' if args.post_processing == 'stock' else 'm2f_hf'} post-processing"
    result = {
        "model": str(args.model),
        "dataset": str(args.dataset),
        "split": split,
        "task": task,
        "processing": f"{processing}{', sizes and mirror images averaged' if args.tta else ''}",
        "num_images": num_images,
        "settings": settings,
        "figures": figures,
        "per_class": {name: entry for name, entry in per_class.items() if is_known(entry)},
    }
    result["worst"] = draw_worst(model, evaluation, Items(dataset, range(num_images), label_of), ranked, args)
    draw_per_class(
        result["per_class"], evaluation, f"{Path(args.model).name} on {args.dataset}", args.output / "per_class.png"
    )
    write_text(args.output / "results.json", json.dumps(result, indent=2) + "\n")
    write_text(args.output / "results.md", markdown(result))
    if args.card:
        put_on_card(Path(args.model), model, processor, headline(task, figures, Path(args.dataset).name, split))
    main_figure = MAIN_FIGURE[task]
    figure = percent(figures[main_figure])
    print(f"{main_figure} {figure} on {num_images} {units_of(task)} ({split}); see {args.output / 'results.md'}")
    return result


def is_known(entry: Mapping[str, Any]) -> bool:
    """Whether a class occurred in predictions or targets."""
    return any(value is not None for name, value in entry.items() if name not in ("tp", "fp", "fn"))


if __name__ == "__main__":
    main()
