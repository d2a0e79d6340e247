"""To the Hub: the card of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from .configuration_mask2former import Mask2FormerConfig
from .image_processing_mask2former import M2FImageProcessor


# --- the card ---


@dataclass(frozen=True)
class Figure:
    """One measured result.

    Args:
        task: "panoptic", "instance" or "semantic".
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
    """
    The README.md of a checkpoint: metadata the Hub reads, and what a person needs to use it.

    What is not given is not claimed.

    Args:
        processor: None before there is one; the card then says so in a comment, by which `push_to_hub` of the
            processor knows that it may complete it.
        repo_id: `owner/name`, for the snippets.
        title: heading; default: the repository's name.
        base_model, datasets: names on the Hub.
        license: the Hub's identifier, such as "apache-2.0" or "cc-by-nc-4.0".
        figures: measured results.
        training: names and values of settings.
        description: a paragraph in place of the one made from the configuration.
        source_url: where the weights come from.
        example_image: name of a picture in the repository.
    """
    name = title or repo_id.split("/")[-1]
    task = processor.task if processor else None
    data = ModelCardData(
        pipeline_tag="image-segmentation",
        library_name="transformers",
        license=license,
        base_model=base_model,
        datasets=list(datasets) or None,
        tags=["mask2former", "m2f", *([f"{task}-segmentation"] if task else [])],
        model_name=name if figures else None,
        eval_results=[_eval_result(figure) for figure in figures] or None,
    )
    parts = [f"# {name}", description or _description(config, processor)]
    if example_image:
        parts.append(f"![A picture with its segments drawn over it]({example_image})")
    parts += _usage(processor, repo_id)
    parts += ["## Labels", *_labels(config, processor)]
    if figures:
        parts += ["## Results", _figure_table(figures)]
    if training:
        parts += ["## Training", _table(("setting", "value"), training.items())]
    parts += ["## Source and licence", _provenance(base_model, datasets, license, source_url)]
    if processor is None:
        parts.append(_INCOMPLETE)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def result_files(figures: Sequence[Figure]) -> dict[str, str]:
    """
    The figures in the Hub's format for results, `.eval_results/*.yaml`: path in the repository -> text.

    That format names a data set on the Hub; figures without `dataset_id` stand on the card alone. A task is named by
    the segmentation task and the metric, such as `panoptic_pq`.
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


_INCOMPLETE = "<!-- m2f_hf: written before there was an image processor; replaced when that is pushed. -->"


def _eval_result(figure: Figure) -> EvalResult:
    return EvalResult(
        task_type="image-segmentation",
        task_name="Image Segmentation",
        dataset_type=figure.dataset_id or _slug(figure.dataset),
        dataset_name=figure.dataset,
        dataset_split=figure.split,
        metric_type=_slug(figure.metric, "_"),
        metric_name=f"{figure.metric} ({figure.task})",
        metric_value=figure.value,
        source_url=_url(figure.source),
    )


def _description(config: Mask2FormerConfig, processor: M2FImageProcessor | None) -> str:
    backbone: Any = config.backbone_config
    purpose = f"{processor.task} segmentation" if processor else "image segmentation"
    return (
        f"A [Mask2Former](https://arxiv.org/abs/2112.01527) for {purpose}: {backbone.model_type} backbone, "
        f"{config.num_queries} queries, {_count(len(config.id2label or {}), 'class', 'classes')}."
    )


def _usage(processor: M2FImageProcessor | None, repo_id: str) -> Iterator[str]:
    yield "## Use"
    yield "With the package `m2f_hf`:"
    yield _python(_ours(processor, repo_id))
    yield "In a pipeline, with the checkpoint's own task and thresholds:"
    yield _python(
        "import m2f_hf  # registers the model",
        "from transformers import pipeline",
        "",
        f'segmenter = pipeline("image-segmentation", model="{repo_id}")',
        'segments = segmenter("photo.jpg")  # a list of {"score", "label", "mask"}',
    )
    yield (
        "Without the package. `trust_remote_code=True` runs the Python files of this repository: read them first, and "
        'pin what you read with `revision="<commit>"`. The pipeline of `transformers` does not know the task and the '
        "thresholds of a checkpoint, so they are passed:"
    )
    yield _python(
        "from transformers import pipeline",
        "",
        f'segmenter = pipeline("image-segmentation", model="{repo_id}", trust_remote_code=True)',
        *_pipeline_call(processor),
    )


def _ours(processor: M2FImageProcessor | None, repo_id: str) -> list[str]:
    task = processor.task if processor else "panoptic"
    lines = [
        "import torch",
        "from PIL import Image",
        "from m2f_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor",
    ]
    if task != "semantic":
        lines.append("from m2f_hf.visualization import draw_segments")
    lines += [
        "",
        f'model = Mask2FormerForUniversalSegmentation.from_pretrained("{repo_id}").eval()',
        f'processor = Mask2FormerImageProcessor.from_pretrained("{repo_id}")',
        "",
        'image = Image.open("photo.jpg").convert("RGB")',
        "with torch.inference_mode():",
        '    outputs = model(**processor(image, return_tensors="pt"))',
        f"result = processor.post_process_{task}_segmentation(outputs, target_sizes=[(image.height, image.width)])[0]",
    ]
    if task == "semantic":
        return [*lines, "print(result.shape)  # (height, width) class ids; their names are in model.config.id2label"]
    return [
        *lines,
        'segments = result["segments_info"]',
        'picture = draw_segments(image, result["segmentation"], segments, id2label=model.config.id2label)',
        'picture.save("segments.png")',
    ]


def _pipeline_call(processor: M2FImageProcessor | None) -> list[str]:
    if processor is None:
        return ['segments = segmenter("photo.jpg")']
    arguments: dict[str, Any] = {"subtask": f'"{processor.task}"'}
    if processor.task == "panoptic":
        names = {name: name for name in ("threshold", "mask_threshold", "overlap_mask_area_threshold")}
    elif processor.task == "instance":  # instances may overlap
        names = {"threshold": "instance_threshold", "mask_threshold": "mask_threshold"}
    else:
        names = {}
    arguments |= {argument: getattr(processor, field) for argument, field in names.items()}
    return ["segments = segmenter(", '    "photo.jpg",', *(f"    {k}={v}," for k, v in arguments.items()), ")"]


def _labels(config: Mask2FormerConfig, processor: M2FImageProcessor | None) -> Iterator[str]:
    labels = {int(label_id): str(label) for label_id, label in (config.id2label or {}).items()}
    stuff_ids = processor.label_ids_to_fuse if processor else None
    if stuff_ids is None:
        yield f"{_count(len(labels), 'class', 'classes')}: {_label_list(labels, labels)}."
        return
    for kind, ids in (
        ("things", [label_id for label_id in labels if label_id not in stuff_ids]),
        ("stuff", [label_id for label_id in labels if label_id in stuff_ids]),
    ):
        if ids:
            yield f"{len(ids)} {kind}: {_label_list(labels, ids)}."


def _label_list(labels: Mapping[int, str], ids: Any) -> str:
    return ", ".join(f"{label_id} {_plain(labels[label_id])}" for label_id in ids)


def _figure_table(figures: Sequence[Figure]) -> str:
    rows = [(f.task, f.dataset, f.split, f.metric, f"{f.value:g}", f.source or "") for f in figures]
    names = ("task", "data set", "split", "metric", "value", "source")
    if not any(row[-1] for row in rows):
        names, rows = names[:-1], [row[:-1] for row in rows]  # type: ignore[assignment, misc]
    return _table(names, rows)


def _provenance(base_model: str | None, datasets: Sequence[str], license: str | None, source_url: str | None) -> str:
    lines = []
    if source_url:
        lines.append(f"The weights come from <{source_url}>.")
    if base_model:
        lines.append(f"Base model: `{base_model}`.")
    if datasets:
        lines.append(f"Data: {', '.join(f'`{name}`' for name in datasets)}.")
    lines.append(f"Licence of the weights: {license}." if license else "The licence of the weights is not stated.")
    lines.append("The Python files beside them are those of `m2f_hf`, Apache-2.0.")
    lines.append("Mask2Former: Cheng et al., [arXiv 2112.01527](https://arxiv.org/abs/2112.01527).")
    return " ".join(lines)


def _table(names: Sequence[str], rows: Any) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _python(*code: Any) -> str:
    lines = [line for part in code for line in (part if isinstance(part, list) else [part])]
    return "\n".join(["```python", *lines, "```"])


def _plain(text: Any) -> str:
    """One line in which Markdown finds nothing but words."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(str(text).split()))


def _slug(text: str, mark: str = "-") -> str:
    return re.sub(r"[^a-z0-9]+", mark, text.lower()).strip(mark)


def _url(source: str | None) -> str | None:
    return source if source and source.startswith(("https://", "http://")) else None


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
