"""Measure a checkpoint on a labelled data set: PQ, mask AP, mIoU or video AP, per class, and its worst images."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..data import open_dataset
from ..data.loading import CollateItems
from ..data.synthetic.by_name import GENERATED, NUM_UNSEEN, open_generated
from ..data.synthetic.shapes import TEST_SEED
from ..hub.families import VIDEOS
from ..inference.loading import checkpoint_family
from ..inference.test_time_augmentation import semantic_scores_with_augmentation
from .evaluation import MAIN_FIGURE, MEASURES, Evaluation, Prediction
from .options import check_options, option
from .results import (
    card_figures,
    dataset_on_card,
    draw_per_class,
    draw_worst,
    in_percent,
    put_on_card,
    to_markdown,
    units_of,
    write_text,
)
from .stock_processor import StockProcessor


SETTINGS = {
    "panoptic": ("threshold", "mask_threshold", "overlap_mask_area_threshold", "max_detections"),
    "instance": ("mask_threshold", "max_detections"),
    "semantic": (),
    "video": ("mask_threshold", "max_detections"),
}
"""Settings of the processor that the figures of a task depend on."""


@dataclass
class EvaluationArguments:
    """What is measured, and on what.

    Raises:
        ValueError: options that contradict each other or are out of range.
    """

    dataset: str = option(help='"shapes", "moving_shapes", or what open_dataset opens')
    model: str = option(help="folder or Hub id of a checkpoint")
    output: Path = option(help="folder for the results")
    task: str | None = option(None, "default: the checkpoint's own", choices=list(MEASURES))
    split: str = option("validation", "default: validation", choices=["validation", "train"])
    held_out: float = option(0.0, "share to measure on where there are no splits; 0: all")
    post_processing: str = option("ours", "stock: transformers' own", choices=["ours", "stock"])
    tta: bool = option(False, "semantic: average over sizes and mirror images")
    limit: int | None = option(None, "measure on the first so many images, or videos")
    worst: int = option(8, "how many of the worst images, or videos, are drawn")
    card: bool = option(False, "put the figures on the card in --model's folder")
    batch_size: int = option(4, "images that are read at once; videos come alone")
    num_workers: int = option(0, "processes that read images")

    def __post_init__(self) -> None:
        self.output = Path(self.output)
        check_options(self)
        if self.card and not Path(self.model).is_dir():
            raise ValueError("--card needs --model to be a folder; push the folder afterwards")
        if self.output.is_file():
            raise ValueError(f"--output {self.output} is a file: name a folder")
        if self.tta and self.post_processing == "stock":
            raise ValueError("--tta averages the scores of our post-processing: leave out --post_processing stock")
        if self.batch_size < 1 or self.worst < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError("--batch_size and --limit are at least 1, --worst at least 0")


def evaluate_dataset(args: EvaluationArguments) -> dict[str, Any]:
    """Measure a checkpoint; write `results.json`, tables, bars of each class and pictures of the worst images.

    Under `accelerate launch` or `torchrun` each process takes a share of the images.

    Returns:
        What `results.json` has; in other processes than the main one the figures alone.

    Raises:
        ValueError, OSError, ImportError: model and data cannot be measured as they are; the message says why.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import gather_object
    except ImportError as error:
        raise ImportError("Evaluation needs Accelerate: pip install 'm2f_hf[train]'") from error
    accelerator = Accelerator()
    model, processor, task = _load(args)
    model = model.to(accelerator.device).eval()
    used = StockProcessor(processor) if args.post_processing == "stock" else processor
    dataset, dataset_categories, split = _open_data(args, task)
    label_of = match_labels(dataset_categories, model.config.id2label)
    num_images = min(len(dataset), args.limit or len(dataset))
    if num_images == 0:
        raise ValueError(f"{args.dataset} has no {units_of(task)} in its {args.split} part")

    evaluation = Evaluation(task, used, _label_categories(dataset_categories, label_of, model, processor))
    positions = range(accelerator.process_index, num_images, accelerator.num_processes)
    share = Items(dataset, positions, label_of)
    measured = _measure(model, evaluation, share, args, accelerator.is_main_process)
    figures = evaluation.compute(gather_object)
    worst = sorted(gather_object(measured))[: args.worst]
    if not accelerator.is_main_process:
        return figures

    per_class = figures.pop("per_class")
    processing = f"{'transformers' if args.post_processing == 'stock' else 'm2f_hf'} post-processing"
    result: dict[str, Any] = {
        "model": str(args.model),
        "dataset": str(args.dataset),
        "split": split,
        "task": task,
        "processing": f"{processing}{', sizes and mirror images averaged' if args.tta else ''}",
        "num_images": num_images,
        "settings": {name: getattr(processor, name) for name in SETTINGS[task]},
        "figures": figures,
        "per_class": {name: entry for name, entry in per_class.items() if _occurred(entry)},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    items = Items(dataset, range(num_images), label_of)
    predicted = []
    for figure, position in tqdm(worst, desc="Drawing", unit="image"):
        inputs, batch = CollateItems(used)([items[position]])
        predicted.append((figure, batch[0], _predict(model, evaluation, inputs, batch, args.tta)[0]))
    result["worst"] = draw_worst(predicted, evaluation, model.config, args.output)
    title = f"{Path(args.model).name} on {args.dataset}"
    draw_per_class(result["per_class"], evaluation, title, args.output / "per_class.png")
    write_text(args.output / "results.json", json.dumps(result, indent=2) + "\n")
    write_text(args.output / "results.md", to_markdown(result))
    if args.card:
        name, hub_id = (args.dataset, None) if args.dataset in GENERATED else dataset_on_card(args.dataset)
        measured_here = card_figures(figures, name, split, "m2f evaluate", hub_id)
        put_on_card(Path(args.model), model, processor, measured_here)
    figure = in_percent(figures[MAIN_FIGURE[task]])
    units = f"{num_images} {units_of(task)} ({split})"
    print(f"{MAIN_FIGURE[task]} {figure} on {units}; see {args.output / 'results.md'}")
    return result


def _load(args: EvaluationArguments) -> tuple[Any, Any, str]:
    """Return model, processor and task."""
    try:
        family = checkpoint_family(args.model)
    except OSError as error:
        raise ValueError(
            f"--model {args.model} is neither a folder with a checkpoint nor on the Hub: {error}"
        ) from error
    is_video = family is VIDEOS
    if (args.task == "video") > is_video or (is_video and args.task not in (None, "video")):
        raise ValueError(f"{args.model} is a model of {'clips' if is_video else 'images'}: not for --task {args.task}")
    if is_video and args.post_processing == "stock":
        raise ValueError("transformers has no post-processing of videos: leave out --post_processing stock")
    processor = family.processor.from_pretrained(args.model)
    task = args.task or ("video" if is_video else processor.task)
    if args.tta and task != "semantic":
        raise ValueError(f"--tta is for task semantic, not {task}")
    return family.model.from_pretrained(args.model), processor, task


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


def _open_data(args: EvaluationArguments, task: str) -> tuple[Any, list[dict[str, Any]], str]:
    """Return the items to measure on, their classes, and the name of the part they are."""
    if args.dataset in GENERATED:
        if (GENERATED[args.dataset] == "video") != (task == "video"):
            raise ValueError(f"{args.dataset} is for task {GENERATED[args.dataset]}, the model for {task}")
        unseen = open_generated(args.dataset, args.limit or NUM_UNSEEN[args.dataset], TEST_SEED)
        return unseen, unseen.categories, "generated videos" if task == "video" else "generated scenes"
    splits = open_dataset(args.dataset, task=task, held_out=args.held_out)
    dataset = getattr(splits, args.split)
    split = "all images" if splits.train is splits.validation else args.split
    if not hasattr(dataset, "__len__"):
        if args.limit is None:
            raise ValueError(f"{args.dataset} is a stream, whose length is not known: give --limit")
        dataset = list(itertools.islice(dataset, args.limit))
    return dataset, splits.categories, split


def match_labels(categories: Sequence[Mapping[str, Any]], id2label: Mapping[int, str]) -> dict[int, int]:
    """Return the model's label of each class of a data set: by name; by position if the model has no names.

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


def _label_categories(
    categories: Sequence[Mapping[str, Any]], label_of: Mapping[int, int], model: Any, processor: Any
) -> list[dict[str, Any]]:
    """Return the model's labels as COCO classes; the data set says which are things, or else the processor."""
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


@torch.no_grad()
def _predict(
    model: Any, evaluation: Evaluation, inputs: Any, items: Sequence[Mapping[str, Any]], tta: bool
) -> list[Prediction]:
    """Return the model's predictions for a batch, as the measures compare them with the items."""
    if tta:
        views = (semantic_scores_with_augmentation(model, evaluation.processor, item["image"]) for item in items)
        return [{"semantic": scores.argmax(0)} for scores in views]
    device = next(model.parameters()).device
    outputs = model(**{name: values.to(device) for name, values in inputs.items()})
    return evaluation.predict(outputs, items)


def _measure(
    model: Any, evaluation: Evaluation, items: Items, args: EvaluationArguments, show_progress: bool
) -> list[tuple[float, int]]:
    """Add the items to the evaluation, image by image; return the figure and the position of each that has one."""
    comes_alone = args.post_processing == "stock" or evaluation.task == "video"
    loader = DataLoader(
        items,
        batch_size=1 if comes_alone else args.batch_size,
        collate_fn=CollateItems(evaluation.processor),
        num_workers=args.num_workers,
    )
    main_measure, main_figure = MEASURES[evaluation.task][0], MAIN_FIGURE[evaluation.task]
    measured = []
    for inputs, batch in tqdm(loader, desc="Evaluating", unit="batch", disable=not show_progress):
        for prediction, item in zip(_predict(model, evaluation, inputs, batch, args.tta), batch, strict=True):
            single = evaluation.empty()
            single.add(prediction, item)
            evaluation.merge(single)
            figure = single.metrics[main_measure].compute()[main_figure]
            if figure is not None:
                measured.append((figure, item["position"]))
    return measured


def _occurred(entry: Mapping[str, Any]) -> bool:
    """Return whether a class occurred in predictions or targets."""
    return any(value is not None for name, value in entry.items() if name not in ("tp", "fp", "fn"))
