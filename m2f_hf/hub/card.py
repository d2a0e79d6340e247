"""The model card: made from `card.md.jinja`, and recognised later as made here and not edited since."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from ..model.configuration import Mask2FormerConfig, Mask2FormerVideoConfig
from ..processing.image_processor import M2FImageProcessor
from .families import label_names


CARD = "README.md"
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
# The last line of a card made here. Where the rest has another digest, someone edited it.
_MARK = re.compile(r"\n*<!-- m2f_hf: card of (?P<repo_id>\S+), (?P<digest>[0-9a-f]{16}) -->\s*$")
_RESULTS = re.compile(r"^## Results\n.*?(?=^## |^<!-- |\Z)", re.M | re.S)
_AFTER_RESULTS = re.compile(r"^## Source and licence\n|^<!-- m2f_hf: card of |\Z", re.M)
_STOCK_CARD = "This model card has been automatically generated"


@dataclass(frozen=True)
class Figure:
    """One measured result.

    Args:
        task: "panoptic", "instance" or "semantic", for clips too.
        dataset: its name, as people write it.
        split: the part it was measured on.
        metric: "PQ", "AP", "mIoU" …
        value: on the scale the field uses (PQ 51.9).
        source: address or words: who measured it.
        dataset_id: the data set's name on the Hub, `owner/name`, where it has one.
    """

    task: str
    dataset: str
    split: str
    metric: str
    value: float
    source: str | None = None
    dataset_id: str | None = None


def model_card(
    config: Mask2FormerConfig,
    processor: M2FImageProcessor | None,
    *,
    repo_id: str,
    title: str | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    figures: Sequence[Figure] = (),
    training: Mapping[str, Any] | None = None,
    description: str = "",
    source_url: str | None = None,
    example_image: str | None = None,
) -> ModelCard:
    """Return the README.md of a checkpoint: metadata for the Hub, and what a person needs to use it.

    What is not given is not claimed.

    Args:
        processor: None before there is one; pushing it completes the card.
        repo_id: `owner/name`, for the snippets; [`HubFolder`] puts the name of the repository it pushes to.
        title: heading; default: the repository's name.
        base_model, datasets: names on the Hub.
        license: the Hub's identifier, such as "apache-2.0" or "cc-by-nc-4.0".
        figures: measured results.
        training: names and values of settings.
        description: a paragraph in place of the one made from the configuration.
        source_url: where the weights come from.
        example_image: name of a picture in the repository.
    """
    title = title or repo_id.split("/")[-1]
    task = processor.task if processor else None
    is_video = isinstance(config, Mask2FormerVideoConfig)
    data = ModelCardData(
        pipeline_tag=None if is_video else "image-segmentation",  # its pipeline takes no clips
        library_name="transformers",
        license=license,
        base_model=base_model,
        datasets=list(datasets) or None,
        tags=[
            *("mask2former", "m2f"),
            *(["video", "video-segmentation"] if is_video else []),
            *([f"{'video-' * is_video}{task}-segmentation"] if task else []),
        ],
        model_name=title if figures else None,
        eval_results=[_eval_result(figure, is_video) for figure in figures] or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        config=config,
        task=task,
        is_video=is_video,
        repo_id=repo_id,
        title=title,
        description=description,
        source_url=source_url,
        example_image=example_image,
        pipeline_arguments=_pipeline_arguments(processor),
        labels=_labels(config, processor),
        figures=_figure_table(figures),
        training=_table(("setting", "value"), training.items()) if training else "",
        count=_count_classes,
    )
    return mark_card(card, repo_id)


def result_files(figures: Sequence[Figure]) -> dict[str, str]:
    """Return the figures in the Hub's format for results, `.eval_results/*.yaml`: path in the repository -> text.

    That format names a data set on the Hub; figures without `dataset_id` are on the card alone. A task is named by the
    segmentation task and the metric, such as `panoptic_pq`.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for figure in figures:
        if figure.dataset_id is None:
            continue
        entry = EvalResultEntry(
            dataset_id=figure.dataset_id,
            task_id=f"{figure.task}_{_slug(figure.metric, '_')}",
            value=figure.value,
            source_url=_url(figure.source),
            notes=f"{figure.metric} on {figure.split}",
        )
        entries.setdefault(figure.dataset_id, []).append(entry)
    return {
        f".eval_results/{_slug(dataset_id)}.yaml": yaml_dump(eval_result_entries_to_yaml(found))
        for dataset_id, found in entries.items()
    }


# --- parts of the template ---


def _eval_result(figure: Figure, is_video: bool) -> EvalResult:
    task = f"video {figure.task} segmentation" if is_video else "image segmentation"
    return EvalResult(
        task_type=_slug(task),
        task_name=task.title(),
        dataset_type=figure.dataset_id or _slug(figure.dataset),
        dataset_name=figure.dataset,
        dataset_split=figure.split,
        metric_type=_slug(figure.metric, "_"),
        metric_name=f"{figure.metric} ({figure.task})",
        metric_value=figure.value,
        # The Hub has one source for all metrics of a data set, and only as an address.
        metric_args={"source": figure.source} if figure.source else None,
        source_url=_url(figure.source),
    )


def _to_figure(entry: EvalResult) -> Figure:
    """Return the figure that `_eval_result` made an entry of."""
    named = re.fullmatch(r"(?P<metric>.+) \((?P<task>\w+)\)", entry.metric_name or "")
    metric, task = (named["metric"], named["task"]) if named else (entry.metric_name or entry.metric_type, "")
    return Figure(
        task,
        entry.dataset_name,
        entry.dataset_split or "",
        metric,
        float(entry.metric_value),
        source=(entry.metric_args or {}).get("source") or entry.source_url,
        dataset_id=entry.dataset_type if "/" in entry.dataset_type else None,
    )


def _pipeline_arguments(processor: M2FImageProcessor | None) -> dict[str, Any]:
    """Return what the stock pipeline has to be given to work like the checkpoint, as code."""
    if processor is None:
        return {}
    fields = {
        "panoptic": {name: name for name in ("threshold", "mask_threshold", "overlap_mask_area_threshold")},
        "instance": {"threshold": "instance_threshold", "mask_threshold": "mask_threshold"},  # they may overlap
    }.get(processor.task, {})
    thresholds = {argument: getattr(processor, field) for argument, field in fields.items()}
    return {"subtask": f'"{processor.task}"', **thresholds}


def _labels(config: Mask2FormerConfig, processor: M2FImageProcessor | None) -> list[tuple[str, list[str]]]:
    """Return the classes in groups, things and stuff where the processor tells them apart: (title, names)."""
    names = {label_id: f"{label_id} {_plain(label)}" for label_id, label in label_names(config).items()}
    stuff_ids = processor.label_ids_to_fuse if processor else None
    if stuff_ids is None:
        return [(_count_classes(len(names)), list(names.values()))]
    things = [name for label_id, name in names.items() if label_id not in stuff_ids]
    stuff = [name for label_id, name in names.items() if label_id in stuff_ids]
    return [(f"{len(group)} {kind}", group) for kind, group in (("things", things), ("stuff", stuff)) if group]


def _figure_table(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    decimals = max(len(f"{figure.value:.4f}".rstrip("0").partition(".")[2]) for figure in figures)
    rows = [[f.task, f.dataset, f.split, f.metric, f"{f.value:.{decimals}f}", f.source or ""] for f in figures]
    num_columns = 6 if any(row[-1] for row in rows) else 5
    names = ("task", "data set", "split", "metric", "value", "source")
    return _table(names[:num_columns], [row[:num_columns] for row in rows])


def _table(names: Sequence[str], rows: Any) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _count_classes(number: int) -> str:
    return f"{number} class" if number == 1 else f"{number} classes"


def _plain(text: Any) -> str:
    """Return text on one line, with Markdown's marks escaped."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(str(text).split()))


def _slug(text: str, mark: str = "-") -> str:
    return re.sub(r"[^a-z0-9]+", mark, text.lower()).strip(mark)


def _url(source: str | None) -> str | None:
    return source if source and source.startswith(("https://", "http://")) else None


# --- figures measured later ---


def put_figures(card: ModelCard, figures: Sequence[Figure], config: Mask2FormerConfig, name: str) -> ModelCard:
    """Put figures into the metadata and the Results section of a card, in place, and return the card.

    Those of the same task, data set, split and metric are replaced; everything else stays. A card made here and not
    edited since still counts as such.

    Args:
        config: the model's.
        name: of the model, where the card has none.
    """
    mark = _MARK.search(card.text) if is_untouched(card) else None
    data: Any = card.data
    new = {_key(figure) for figure in figures}
    kept = [entry for entry in data.eval_results or [] if _key(_to_figure(entry)) not in new]
    is_video = isinstance(config, Mask2FormerVideoConfig)
    data.eval_results = [*kept, *(_eval_result(figure, is_video) for figure in figures)]
    data.model_name = data.model_name or name
    section = f"## Results\n\n{_figure_table([*map(_to_figure, kept), *figures])}\n\n"
    if _RESULTS.search(card.text):
        text = _RESULTS.sub(lambda _: section, card.text, count=1)
    else:
        place = next(_AFTER_RESULTS.finditer(card.text)).start()
        text = f"{card.text[:place].rstrip()}\n\n{section}{card.text[place:]}"
    card.text = text.rstrip() + "\n"
    return card if mark is None else mark_card(card, mark["repo_id"])


def _key(figure: Figure) -> tuple[str, str, str, str]:
    return figure.task, figure.dataset, figure.split, figure.metric


# --- who wrote a card ---


def mark_card(card: ModelCard, repo_id: str) -> ModelCard:
    """Write the digest of a card into its last line, in place, and return the card."""
    card.text = f"{_MARK.sub('', card.text).rstrip()}\n\n<!-- m2f_hf: card of {repo_id}, {_digest(card)} -->\n"
    return card


def _digest(card: ModelCard) -> str:
    metadata = json.dumps(card.data.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256((metadata + _MARK.sub("", card.text).strip()).encode()).hexdigest()[:16]


def is_made_here(card: ModelCard) -> bool:
    """Return whether this package made the card, edited or not."""
    return _MARK.search(card.text) is not None


def is_untouched(card: ModelCard) -> bool:
    """Return whether no one edited the card since this package, or `transformers`, made it."""
    mark = _MARK.search(card.text)
    return _STOCK_CARD in card.text if mark is None else mark["digest"] == _digest(card)


def change_repository(card: ModelCard, repo_id: str) -> ModelCard:
    """Put the name of another repository into the snippets of a card made here, in place, and return the card."""
    mark = _MARK.search(card.text)
    if mark is not None:
        card.text = card.text.replace(f'"{mark["repo_id"]}"', f'"{repo_id}"')
    return mark_card(card, repo_id)


def read_card(file: Path) -> ModelCard:
    """Read a card from a file.

    Raises:
        ValueError: the file is no text, or its metadata are no YAML mapping.
    """
    try:
        return ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except OSError:
        raise
    except Exception as error:  # the YAML reader has errors of its own, without a base in the standard library
        raise ValueError(
            f"{file} is no model card ({' '.join(str(error).split())}): mend the metadata between its `---` lines, or "
            "remove it to have one made"
        ) from error


def renew_card(
    published: ModelCard | None, config: Mask2FormerConfig, processor: M2FImageProcessor | None, repo_id: str
) -> ModelCard:
    """Return a new card that keeps names and licence of a published one made here.

    Its figures are left out, since they belong to the weights they were measured of.
    """
    kept = published.data.to_dict() if published is not None and is_made_here(published) else {}
    return model_card(
        config,
        processor,
        repo_id=repo_id,
        base_model=kept.get("base_model"),
        datasets=kept.get("datasets") or (),
        license=kept.get("license"),
    )
