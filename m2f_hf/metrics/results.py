"""What `m2f evaluate` writes: tables, bars of each class, pictures of the worst images, figures on the model's card."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..hub.card import CARD, Figure, model_card, put_figures
from .evaluation import CARD_FIGURES, MAIN_FIGURE, Evaluation, Prediction
from .pictures import comparison_sheet, draw_prediction


# --- pictures ---


def draw_worst(
    worst: Sequence[tuple[float, Mapping[str, Any], Prediction]], evaluation: Evaluation, config: Any, output: Path
) -> list[dict[str, Any]]:
    """Write image, prediction and target of each of the worst images into `worst/`; return a row for each.

    Args:
        worst: (figure, item, prediction), from the worst on.
        evaluation: says task and classes.
        config: the model's.
    """
    folder = output / "worst"
    folder.mkdir(exist_ok=True)
    for path in folder.glob("[0-9][0-9]_*.jpg"):  # an earlier evaluation's
        path.unlink()
    figure_name = MAIN_FIGURE[evaluation.task]
    rows = []
    for rank, (figure, item, prediction) in enumerate(worst, start=1):
        item_id = item["video_id"] if evaluation.task == "video" else item["image_id"]
        name = str(item.get("file_name", f"image {item_id}"))
        pictures, titles = draw_prediction(item, prediction, evaluation, config)
        sheet = comparison_sheet(pictures, [f"{title}: {figure_name} {100 * figure:.1f}" for title in titles])
        file = f"{rank:02d}_{re.sub(r'[^A-Za-z0-9_-]+', '_', Path(name).stem)}.jpg"
        sheet.save(folder / file, quality=90)
        rows.append({"image_id": item_id, "file_name": name, figure_name: figure, "picture": f"worst/{file}"})
    return rows


def draw_per_class(per_class: Mapping[str, Mapping[str, Any]], evaluation: Evaluation, title: str, path: Path) -> None:
    """Draw bars of each class's figure, the best on top; classes that never occurred are left out."""
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
    if True in kinds and False in kinds:
        handles = [plt.Rectangle((0, 0), 1, 1, color=colors[kind]) for kind in (True, False)]
        axes.legend(handles, ["things", "stuff"], loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --- tables ---


def units_of(task: str) -> str:
    """Return what a task's items are, in a word."""
    return "videos" if task == "video" else "images"


def in_percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the results as tables, in percent as the field writes them."""
    figures, per_class, units = result["figures"], result["per_class"], units_of(result["task"])
    lines = [
        f"# {result['model']} on {result['dataset']}",
        "",
        f"{units.capitalize()}: {result['num_images']} ({result['split']}), "
        f"task {result['task']}, {result['processing']}.",
        "",
    ]
    groups = [name for name in ("all", "things", "stuff") if figures.get(f"pq_{name}") is not None]
    if groups:
        rows = [[group, *(in_percent(figures[f"{key}_{group}"]) for key in ("pq", "sq", "rq"))] for group in groups]
        lines += [*_table(["", "PQ", "SQ", "RQ"], rows), ""]
    others = {name: value for name, value in figures.items() if not name.startswith(("pq_", "sq_", "rq_"))}
    if others:
        lines += [*_table(list(others), [list(map(in_percent, others.values()))]), ""]
    columns = [
        key
        for key in ("pq", "sq", "rq", "ap", "ap50", "ap75", "iou", "accuracy")
        if any(entry.get(key) is not None for entry in per_class.values())
    ]
    rows = [[name, *(in_percent(entry.get(key)) for key in columns)] for name, entry in per_class.items()]
    lines += _table(["class", *columns], rows)
    if result["worst"]:
        lines += ["", f"The worst {units}:", ""]
        lines += [f"- [{row['file_name']}]({row['picture']})" for row in result["worst"]]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def write_text(path: Path, text: str) -> None:
    """Write a file; it is whole or as it was."""
    work = path.with_name(f".{path.name}.tmp")
    work.write_text(text, encoding="utf-8")
    os.replace(work, path)


# --- the model's card ---


def dataset_on_card(dataset: str) -> tuple[str, str | None]:
    """Return a data set's name on cards, and its name on the Hub, or None where it is a local path."""
    path = Path(dataset).expanduser()
    return (path.resolve().name, None) if path.exists() else (dataset, dataset)


def card_figures(
    figures: Mapping[str, Any], dataset: str, split: str, source: str, dataset_id: str | None = None
) -> list[Figure]:
    """Return the defined figures that `CARD_FIGURES` names, in percent, for a model's card."""
    return [
        Figure(task, dataset, split, metric, round(100 * figures[key], 2), source, dataset_id)
        for key, (task, metric) in CARD_FIGURES.items()
        if figures.get(key) is not None
    ]


def put_on_card(folder: Path, model: Any, processor: Any, figures: Sequence[Figure]) -> None:
    """Write figures into the model's card (see `put_figures`); make the card if there is none."""
    path, name = folder / CARD, folder.resolve().name
    if path.exists():
        card = put_figures(ModelCard.load(path), figures, model.config, name)
    else:
        card = model_card(model.config, processor, repo_id=name, figures=figures)
    write_text(path, str(card))
