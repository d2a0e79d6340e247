"""What `m2f evaluate` writes: tables, bars of each class, pictures of the worst images, figures on the model's card."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..hub.card import Figure, model_card
from .evaluation import MAIN_FIGURE, Evaluation, Prediction
from .pictures import comparison_sheet, draw_prediction


RESULTS_SECTION = re.compile(r"^## Results\n.*?(?=^## |^<!-- |\Z)", re.M | re.S)


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


def headline(task: str, figures: Mapping[str, Any], dataset: str, split: str) -> list[Figure]:
    """Return the figures that the paper's tables have, on their scale, for a model's card."""
    names = {"pq_all": "PQ", "ap": "AP", "miou": "mIoU"}
    card_task = "instance" if task == "video" else task  # the card knows from the model that they are of clips
    return [
        Figure(card_task, dataset, split, names[name], round(100 * figures[name], 2), source="m2f evaluate")
        for name in names
        if figures.get(name) is not None
    ]


def put_on_card(folder: Path, model: Any, processor: Any, figures: Sequence[Figure]) -> None:
    """Write the figures into the model's card, replacing older ones of the same data; other words stay."""
    path, name = folder / "README.md", folder.resolve().name
    if not path.exists():
        write_text(path, str(model_card(model.config, processor, repo_id=name, figures=figures)))
        return
    card: Any = ModelCard.load(path)
    new = {(figure.task, figure.dataset, figure.split, figure.metric) for figure in figures}
    kept = [
        figure
        for figure in map(_to_figure, card.data.eval_results or [])
        if (figure.task, figure.dataset, figure.split, figure.metric) not in new
    ]
    fresh: Any = model_card(model.config, processor, repo_id=name, figures=[*kept, *figures])
    card.data.eval_results = fresh.data.eval_results
    card.data.model_name = card.data.model_name or name
    section = RESULTS_SECTION.search(fresh.text)
    assert section is not None
    if RESULTS_SECTION.search(card.text):
        card.text = RESULTS_SECTION.sub(lambda _: section[0], card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section[0].rstrip()}\n"
    write_text(path, str(card))


def _to_figure(entry: EvalResult) -> Figure:
    """Return the figure that `model_card` made an entry of."""
    named = re.fullmatch(r"(?P<metric>.+) \((?P<task>\w+)\)", entry.metric_name or "")
    metric, task = (named["metric"], named["task"]) if named else (entry.metric_name or entry.metric_type, "")
    dataset_id = entry.dataset_type if "/" in entry.dataset_type else None
    value = float(entry.metric_value)
    split = entry.dataset_split or ""
    return Figure(task, entry.dataset_name, split, metric, value, source=entry.source_url, dataset_id=dataset_id)
