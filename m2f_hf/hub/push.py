"""To the Hub: the card, the code that lets a checkpoint run without this package, and the upload in one commit.

A repository pushed from here holds what `save_pretrained` writes and, beyond that, the files of this package that run
a model, named in `auto_map`, so that `trust_remote_code=True` is enough where the package is not installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import yaml_dump
from transformers import PreTrainedConfig

from ..model.configuration import Mask2FormerConfig, Mask2FormerVideoConfig
from ..model.modeling import Mask2FormerForUniversalSegmentation, Mask2FormerModel, Mask2FormerPreTrainedModel
from ..model.modeling_video import Mask2FormerForVideoSegmentation, Mask2FormerVideoModel
from ..processing.image_processor import M2FImageProcessor
from ..processing.video_processor import Mask2FormerVideoProcessor


CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
CARD = "README.md"
CODE = "code"  # folder of the published Python files
# What a settings file says of whose it is.
_TYPE_KEYS = {CONFIG: "model_type", PROCESSOR: "image_processor_type"}


@dataclass(frozen=True)
class Family:
    """The classes of images' models, or of clips'.

    Attributes:
        config, model, processor: who reads what a folder holds.
        auto_classes: settings file -> Auto class -> what that is to find, where this package is not installed.
    """

    config: type[Mask2FormerConfig]
    model: type[Mask2FormerForUniversalSegmentation]
    processor: type[M2FImageProcessor]
    auto_classes: Mapping[str, Mapping[str, type]]

    def type_in(self, file: str) -> str:
        """What `config.json` or `preprocessor_config.json` says of itself to be this family's."""
        return {CONFIG: self.config.model_type, PROCESSOR: self.processor.__name__}[file]


IMAGES = Family(
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    M2FImageProcessor,
    {
        CONFIG: {
            "AutoConfig": Mask2FormerConfig,
            "AutoModel": Mask2FormerModel,
            "AutoModelForUniversalSegmentation": Mask2FormerForUniversalSegmentation,
            "AutoModelForImageSegmentation": Mask2FormerForUniversalSegmentation,  # the string pipeline's
        },
        PROCESSOR: {"AutoImageProcessor": M2FImageProcessor},
    },
)
VIDEOS = Family(
    Mask2FormerVideoConfig,
    Mask2FormerForVideoSegmentation,
    Mask2FormerVideoProcessor,
    {
        CONFIG: {
            "AutoConfig": Mask2FormerVideoConfig,
            "AutoModel": Mask2FormerVideoModel,
            "AutoModelForUniversalSegmentation": Mask2FormerForVideoSegmentation,
        },
        # Both, since `transformers` shows the one for videos only where torchvision is installed.
        PROCESSOR: {"AutoImageProcessor": Mask2FormerVideoProcessor, "AutoVideoProcessor": Mask2FormerVideoProcessor},
    },
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_WEIGHT_FILE = re.compile(r"model.*\.safetensors(\.index\.json)?")
# What a checkpoint's folder may hold beside code; anything else stays at home.
_PUBLISHED = (".json", ".safetensors", ".md", ".txt", ".png", ".jpg", ".jpeg", ".webp", ".yaml", ".yml")
_RESULTS = ".eval_results"
# The last line of a card from here. Where the rest has another digest, somebody wrote in it.
_MARK = re.compile(r"\n*<!-- m2f_hf: card of (?P<repo_id>\S+), (?P<digest>[0-9a-f]{16}) -->\s*$")
_TRUST = (
    "Without the package, once it is published with `m2f push` or `push_to_hub`. `trust_remote_code=True` runs the "
    'Python files of its repository: read them first, and pin what you read with `revision="<commit>"`.'
)
# Of a card for clips, what follows when model and processor are there.
_TRACKING = [
    "",
    "# A folder of frames, a list of images, or (with PyAV) a video file.",
    'inputs = processor("folder-of-frames", return_tensors="pt")',
    "with torch.inference_mode():",
    "    outputs = model(**inputs)",
    "tracks = processor.post_process_video_instance_segmentation(outputs)[0]",
    'for track, masks in zip(tracks["segments_info"], tracks["segmentation"]):  # masks: (frames, height, width)',
    '    print(model.config.id2label[track["label_id"]], round(track["score"], 2), track["areas"])',
]
_PAPER = ("2112.01527", "https://arxiv.org/abs/2112.01527")
_VIDEO_PAPER = ("2112.10764", "https://arxiv.org/abs/2112.10764")
_STOCK_CARD = "This model card has been automatically generated"


# --- the card ---


@dataclass(frozen=True)
class Figure:
    """One measured result.

    Args:
        task: "panoptic", "instance" or "semantic"; of clips, too.
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
    name = title or repo_id.split("/")[-1]
    task = processor.task if processor else None
    is_video = isinstance(config, Mask2FormerVideoConfig)
    data = ModelCardData(
        pipeline_tag=None if is_video else "image-segmentation",  # its pipeline takes no clips
        library_name="transformers",
        license=license,
        base_model=base_model,
        datasets=list(datasets) or None,
        tags=[
            "mask2former",
            "m2f",
            *(["video", "video-segmentation"] if is_video else []),
            *([f"{'video-' * is_video}{task}-segmentation"] if task else []),
        ],
        model_name=name if figures else None,
        eval_results=[_eval_result(figure, is_video) for figure in figures] or None,
    )
    parts = [f"# {name}", description or _description(config, processor)]
    if example_image:
        parts.append(f"![A picture with its segments drawn over it]({example_image})")
    parts += _usage_of_clips(repo_id) if is_video else _usage(processor, repo_id)
    parts += ["## Labels", *_labels(config, processor)]
    if figures:
        parts += ["## Results", _figure_table(figures)]
    if training:
        parts += ["## Training", _table(("setting", "value"), training.items())]
    parts += ["## Source and licence", _provenance(base_model, datasets, license, source_url, is_video)]
    return _marked(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts)), repo_id)


def label_names(config: Mask2FormerConfig) -> dict[int, str]:
    """The classes' names by id, in the order of the ids (files have them in the order of the ids' digits)."""
    return dict(sorted((int(label_id), str(label)) for label_id, label in (config.id2label or {}).items()))


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
        source_url=_url(figure.source),
    )


def _description(config: Mask2FormerConfig, processor: M2FImageProcessor | None) -> str:
    backbone: Any = config.backbone_config
    purpose = f"{processor.task} segmentation" if processor else "image segmentation"
    paper = _PAPER
    if isinstance(config, Mask2FormerVideoConfig):
        purpose = "video instance segmentation, which follows every object through a clip"
        paper = _VIDEO_PAPER
    return (
        f"A [Mask2Former]({paper[1]}) for {purpose}: {backbone.model_type} backbone, "
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
        f"{_TRUST} The pipeline of `transformers` does not know the task and the thresholds of a checkpoint, so they "
        "are passed:"
    )
    yield _python(
        "from transformers import pipeline",
        "",
        f'segmenter = pipeline("image-segmentation", model="{repo_id}", trust_remote_code=True)',
        *_pipeline_call(processor),
    )


def _usage_of_clips(repo_id: str) -> Iterator[str]:
    yield "## Use"
    yield "With the package `m2f_hf`:"
    yield _python(
        "import torch",
        "from m2f_hf import Mask2FormerForVideoSegmentation, Mask2FormerVideoProcessor",
        "",
        f'model = Mask2FormerForVideoSegmentation.from_pretrained("{repo_id}").eval()',
        f'processor = Mask2FormerVideoProcessor.from_pretrained("{repo_id}")',
        _TRACKING,
    )
    yield "On the command line, for a clip of any length, a folder of frames or a video file:"
    yield f"```bash\nm2f track folder-of-frames --model {repo_id}\n```"
    yield _TRUST
    yield _python(
        "import torch",
        "from transformers import AutoModelForUniversalSegmentation, AutoProcessor",
        "",
        f'name = "{repo_id}"',
        "model = AutoModelForUniversalSegmentation.from_pretrained(name, trust_remote_code=True).eval()",
        "processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)",
        _TRACKING,
    )


def _ours(processor: M2FImageProcessor | None, repo_id: str) -> list[str]:
    task = processor.task if processor else "panoptic"
    lines = [
        "import torch",
        "from PIL import Image",
        "from m2f_hf import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor",
    ]
    if task != "semantic":
        lines.append("from m2f_hf.draw.segments import draw_segments")
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
        "names, colors = model.config.id2label, model.config.label_colors",
        'picture = draw_segments(image, result["segmentation"], segments, names, colors)',
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
    labels = label_names(config)
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
    decimals = max(len(f"{f.value:.4f}".rstrip("0").partition(".")[2]) for f in figures)
    rows = [(f.task, f.dataset, f.split, f.metric, f"{f.value:.{decimals}f}", f.source or "") for f in figures]
    names = ("task", "data set", "split", "metric", "value", "source")
    if not any(row[-1] for row in rows):
        names, rows = names[:-1], [row[:-1] for row in rows]  # type: ignore[assignment, misc]
    return _table(names, rows)


def _provenance(
    base_model: str | None, datasets: Sequence[str], license: str | None, source_url: str | None, is_video: bool
) -> str:
    lines = []
    if source_url:
        lines.append(f"The weights come from <{source_url}>.")
    if base_model:
        lines.append(f"Base model: `{base_model}`.")
    if datasets:
        lines.append(f"Data: {', '.join(f'`{name}`' for name in datasets)}.")
    lines.append(f"Licence of the weights: {license}." if license else "The licence of the weights is not stated.")
    lines.append("The Python files that `m2f push` and `push_to_hub` publish with them are `m2f_hf`'s, Apache-2.0.")
    papers = [_PAPER, _VIDEO_PAPER] if is_video else [_PAPER]
    lines.append(f"Mask2Former: Cheng et al., {', '.join(f'[arXiv {name}]({url})' for name, url in papers)}.")
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


# --- whose card it is ---


def _marked(card: ModelCard, repo_id: str) -> ModelCard:
    card.text = f"{_MARK.sub('', card.text).rstrip()}\n\n<!-- m2f_hf: card of {repo_id}, {_digest(card)} -->\n"
    return card


def _digest(card: ModelCard) -> str:
    metadata = json.dumps(card.data.to_dict(), sort_keys=True, default=str)
    return hashlib.sha256((metadata + _MARK.sub("", card.text).strip()).encode()).hexdigest()[:16]


def is_untouched(card: ModelCard) -> bool:
    """Whether nobody wrote in the card since this package, or `transformers`, made it."""
    mark = _MARK.search(card.text)
    return _STOCK_CARD in card.text if mark is None else mark["digest"] == _digest(card)


def _readdressed(card: ModelCard, repo_id: str) -> ModelCard:
    """A card from here, made for another name, such as a folder's, with this one in its snippets."""
    mark = _MARK.search(card.text)
    if mark is not None:
        card.text = card.text.replace(f'"{mark["repo_id"]}"', f'"{repo_id}"')
    return _marked(card, repo_id)


def _read_card(file: Path) -> ModelCard:
    """
    Raises:
        ValueError: the file is no text, or its metadata are no YAML mapping.
    """
    try:
        return ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    except OSError:
        raise
    except Exception as error:  # of the reader of YAML, too, which is not ours to import
        raise ValueError(
            f"{file} is no model card ({' '.join(str(error).split())}): mend the metadata between its `---` lines, or "
            "remove it to have one made"
        ) from error


def _published_card(api: HfApi, repo_id: str, revision: str | None) -> ModelCard | None:
    """The repository's card, None where it has none. Where it cannot be read, one that nobody here has made."""
    file = _download(api, repo_id, CARD, revision)
    try:
        return _read_card(file) if file else None
    except ValueError:
        return ModelCard("")


def _renewed_card(
    published: ModelCard | None, config: Mask2FormerConfig, processor: M2FImageProcessor | None, repo_id: str
) -> ModelCard:
    """A card in the place of one from here: names and licence stay, figures go with the weights they belong to."""
    kept = published.data.to_dict() if published is not None and _MARK.search(published.text) else {}
    return model_card(
        config,
        processor,
        repo_id=repo_id,
        base_model=kept.get("base_model"),
        datasets=kept.get("datasets") or (),
        license=kept.get("license"),
    )


# --- the code ---


def code_files(family: Family = IMAGES) -> dict[str, str]:
    """Return the code that runs a model without this package: path in the repository -> text.

    `transformers` copies the file of a class and what it reaches by `from .x import y` within one folder. So the
    modules of the Auto classes and all that they import from this package are written into the folder `code/`, each
    under its path joined by `_`: `kernels/pieces.py` becomes `code/kernels_pieces.py`, and `from ..kernels.pieces
    import` becomes `from .kernels_pieces import`.

    Raises:
        ImportError: a module imports a package instead of names of a module, which could not be followed.
    """
    files: dict[str, str] = {}
    modules = [cls.__module__ for by_name in family.auto_classes.values() for cls in by_name.values()]
    while modules:
        module = modules.pop()
        name = f"{CODE}/{_flat_name(module)}.py"
        if name not in files:
            text = Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")
            files[name], imported = _flatten_imports(text, module)
            modules += imported
    return dict(sorted(files.items()))


def _flat_name(module: str) -> str:
    """`m2f_hf.kernels.pieces` -> `kernels_pieces`."""
    return "_".join(module.split(".")[1:])


def _flatten_imports(text: str, module: str) -> tuple[str, list[str]]:
    """A module's text with its relative imports as they are in `code/`, and the modules that they name."""
    imported: list[str] = []

    def flatten(statement: re.Match[str]) -> str:
        absolute = importlib.util.resolve_name(statement["source"], module.rpartition(".")[0])
        if hasattr(sys.modules.get(absolute), "__path__") or "." not in absolute:
            raise ImportError(f"{module} imports from the package {absolute}: name the module, to have it published")
        imported.append(absolute)
        return f"{statement['start']}.{_flat_name(absolute)} import"

    return re.sub(r"^(?P<start>\s*from )(?P<source>\.[.\w]*) import", flatten, text, flags=re.MULTILINE), imported


def with_auto_map(file: Path, family: Family = IMAGES) -> str:
    """The text of a `config.json` or `preprocessor_config.json` that says where its classes are."""
    settings = _read_settings(file)
    settings["auto_map"] = {
        auto_class: f"{CODE}/{_flat_name(cls.__module__)}.{cls.__name__}"
        for auto_class, cls in family.auto_classes[file.name].items()
    }
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


def family_of(settings: Mapping[str, Any], file: str = CONFIG) -> Family | None:
    """Whose settings, of `file`, these are; None where they are not ours."""
    found = settings.get(_TYPE_KEYS[file])
    return next((family for family in (IMAGES, VIDEOS) if family.type_in(file) == found), None)


# --- to and from a repository ---


def load_whole(
    checkpoint: str | os.PathLike, family: Family = IMAGES, **arguments: Any
) -> tuple[Mask2FormerForUniversalSegmentation, set[str]]:
    """
    A model whose every weight is the checkpoint's, and the names of what else the checkpoint has.

    Args:
        family: whose model it is.
        arguments: of `from_pretrained`.

    Raises:
        ValueError: weights are missing, of another shape than the configuration asks for, or not finite.
    """
    loaded: Any = family.model.from_pretrained(
        checkpoint, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
    )
    model, report = loaded
    if missing := report["missing_keys"]:
        raise ValueError(
            f"{checkpoint} lacks {len(missing)} of the model's weights, such as {min(missing)}, and would predict "
            "noise: save it anew with save_pretrained"
        )
    if others := report["mismatched_keys"]:
        name, found, wanted = min(others)
        raise ValueError(
            f"{checkpoint} has {len(others)} weights of other shapes than its {CONFIG} asks for, such as {name}, "
            f"{tuple(found)} in place of {tuple(wanted)}: save configuration and weights together, with save_pretrained"
        )
    broken = [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]
    if broken:
        raise ValueError(
            f"{checkpoint} has NaN or infinity in {len(broken)} of its weights, such as {min(broken)}: take an earlier "
            "checkpoint of the training"
        )
    return model, report["unexpected_keys"]


def _read_settings(file: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: the file holds no JSON object.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}): save it anew with save_pretrained") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no JSON object: save it anew with save_pretrained")
    return settings


def _download(api: HfApi, repo_id: str, name: str, revision: str | None) -> Path | None:
    """A file of the repository, None where it has no such file."""
    try:
        return Path(api.hf_hub_download(repo_id, name, revision=revision))
    except EntryNotFoundError:
        return None


def _published(api: HfApi, repo_id: str, name: str, revision: str | None) -> Any:
    """The repository's configuration or processor, None where it has none of ours."""
    file = _download(api, repo_id, name, revision)
    try:
        family = family_of(_read_settings(file), name) if file else None
        if family is None or file is None:
            return None
        return (family.config if name == CONFIG else family.processor).from_pretrained(file.parent)
    except ValueError:
        return None


def _make_branch(api: HfApi, repo_id: str, revision: str | None) -> None:
    if revision is not None and not revision.startswith("refs/"):  # a pull request is there, or is not
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _commit(
    api: HfApi, repo_id: str, files: Mapping[str, Path | str], *, revision: str | None, **arguments: Any
) -> CommitInfo:
    """All files in one commit. New weights take the old ones' place, in however many files those were."""
    operations: list[Any] = [
        CommitOperationAdd(name, content.encode() if isinstance(content, str) else content)
        for name, content in files.items()
    ]
    if any(map(_WEIGHT_FILE.fullmatch, files)):
        # A single file left from before would be loaded in the place of several new ones.
        old = filter(_WEIGHT_FILE.fullmatch, api.list_repo_files(repo_id, revision=revision))
        operations += [CommitOperationDelete(name) for name in old if name not in files]
    return api.create_commit(repo_id, operations, revision=revision, **arguments)


# --- push_to_hub of a model, a configuration, a processor ---


def register_push_to_hub() -> None:
    """Let `push_to_hub` and `save_pretrained(push_to_hub=True)` of our classes send the code and the card too.

    Done from outside, since the files of these classes must run alone on the Hub; in the one place that both pass
    through.
    """
    for cls in (Mask2FormerConfig, Mask2FormerPreTrainedModel, M2FImageProcessor):
        cls._upload_modified_files = _upload_saved_files  # type: ignore[method-assign, assignment]


_OF_CLIPS = (Mask2FormerVideoConfig, Mask2FormerVideoProcessor, Mask2FormerVideoModel, Mask2FormerForVideoSegmentation)


def _upload_saved_files(
    self: Any,
    working_dir: str | os.PathLike,
    repo_id: str,
    files_timestamps: Mapping[str, float],
    commit_message: str | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **commit: Any,
) -> CommitInfo:
    """The last step of the stock `push_to_hub`: what was just saved, with the code and the card, in one commit.

    Args:
        files_timestamps: when the files that were in the folder before had last been written.
    """
    api = HfApi(token=token)
    saved = [file for file in sorted(Path(working_dir).iterdir()) if file.is_file()]
    saved = [file for file in saved if file.stat().st_mtime > files_timestamps.get(file.name, -math.inf)]
    family = VIDEOS if isinstance(self, _OF_CLIPS) else IMAGES
    files: dict[str, Path | str] = {
        file.name: with_auto_map(file, family) if file.name in family.auto_classes else file for file in saved
    }
    files |= code_files(family)
    if not create_pr:
        _make_branch(api, repo_id, revision)
    published = _published_card(api, repo_id, revision)
    if published is None or is_untouched(published):
        stock_card = files.get(CARD)
        card = _card_of_part(
            self, api, repo_id, revision, published, stock_card if isinstance(stock_card, Path) else None
        )
        files |= {CARD: str(card)} if card else {}
    part = (
        "processor"
        if isinstance(self, M2FImageProcessor)
        else "config"
        if isinstance(self, PreTrainedConfig)
        else "model"
    )
    message = commit_message or f"Upload {part}, card and code"
    return _commit(api, repo_id, files, revision=revision, commit_message=message, create_pr=create_pr, **commit)


def _card_of_part(
    part: Any, api: HfApi, repo_id: str, revision: str | None, published: ModelCard | None, stock_card: Path | None
) -> ModelCard | None:
    """The card of what is pushed and of what the repository has already; none where the model is yet to come."""
    config = part if isinstance(part, Mask2FormerConfig) else getattr(part, "config", None)
    config = config or _published(api, repo_id, CONFIG, revision)
    if config is None:
        return None
    processor = part if isinstance(part, M2FImageProcessor) else _published(api, repo_id, PROCESSOR, revision)
    card = _renewed_card(published, config, processor, repo_id)
    if stock_card is not None:  # with the tags of the caller
        tags = [*card.data.to_dict()["tags"], *(_read_card(stock_card).data.to_dict().get("tags") or [])]
        card.data["tags"] = list(dict.fromkeys(tags))
    return _marked(card, repo_id)


# --- a whole folder ---


class HubFolder:
    """A folder that `save_pretrained` wrote, checked and ready to be published.

    Attributes:
        files: what would be sent: name in the repository -> the file, or its text where that differs from the file's.
        left_out: names in the folder that stay at home: pickles, code of others, subfolders, hidden files.
        config, processor: those of the folder.
        family: whether they are of images or of clips.

    Raises:
        FileNotFoundError: no such folder, or it lacks the configuration, the processor or the weights.
        ValueError: another model's configuration or processor, stuff that is none of the model's labels, weights that
            are not this model's or not finite, a card that the Hub would not read.
        OSError, RuntimeError, SafetensorError: files that cannot be read.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self._check_files()
        self.family = self._check_types()
        self.config = self.family.config.from_pretrained(self.folder)
        self.processor = self.family.processor.from_pretrained(self.folder)
        self._check_stuff()
        _, unexpected = load_whole(self.folder, self.family)
        if unexpected:
            raise ValueError(
                f"{self.folder} has {len(unexpected)} weights that its model has not, such as {min(unexpected)}: save "
                "it anew with save_pretrained"
            )
        own_card = self.folder / CARD
        self._own_card = _read_card(own_card) if own_card.is_file() else None
        self.files, self.left_out = self._contents()

    def push(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        replace_card: bool = False,
        token: str | bool | None = None,
    ) -> CommitInfo:
        """
        Send everything in one commit, so that the repository never shows half of it. What an interrupted upload has
        sent is not sent again.

        The card is the folder's `README.md`, or one made here. One that somebody wrote or edited on the Hub stays.

        Args:
            repo_id: `owner/name`, or `name` for one's own account; made if need be.
            private: for a new repository; None is the account's default.
            revision: branch, made if need be; default: main.
            replace_card: whether to replace a card that somebody wrote or edited, too.
            token: default: that of `hf auth login`.

        Raises:
            LocalTokenNotFoundError: nobody is logged in (`huggingface_hub.errors`).
            ValueError: `private` for a repository that is public.
            HfHubHTTPError: what the Hub refuses.
        """
        api = HfApi(token=token)
        api.whoami()  # before anything is made
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public: make it private on its page, or name another")
        _make_branch(api, repo_id, revision)
        files = {name: content for name, content in self.files.items() if name != CARD}
        published = _published_card(api, repo_id, revision)
        if published is None or replace_card or is_untouched(published):
            files[CARD] = self._card(published, repo_id)
        message = commit_message or "Upload model, processor, card and code"
        return _commit(api, repo_id, files, revision=revision, commit_message=message)

    def _check_files(self) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is no folder")
        for name, needed in ((CONFIG, (CONFIG,)), (PROCESSOR, (PROCESSOR,)), (_WEIGHTS[0], _WEIGHTS)):
            if not any((self.folder / file).is_file() for file in needed):
                raise FileNotFoundError(
                    f"{self.folder} has no {name}: save the model and the processor there with save_pretrained"
                )
        if all((self.folder / file).is_file() for file in _WEIGHTS):
            raise ValueError(
                f"{self.folder} has {' and '.join(_WEIGHTS)}: one is left from an earlier save, and the first is what "
                "would be loaded; remove the older"
            )

    def _check_types(self) -> Family:
        family = family_of(_read_settings(self.folder / CONFIG))
        for name, key in _TYPE_KEYS.items():
            found = _read_settings(self.folder / name).get(key)
            if family is None or found != family.type_in(name):
                ours = [each.type_in(name) for each in ([family] if family else (IMAGES, VIDEOS))]
                raise ValueError(
                    f"{self.folder} has {key} {found!r} in {name}, not {' or '.join(map(repr, ours))}: load it with "
                    "m2f_hf and save_pretrained it, model and processor, into another folder"
                )
        assert family is not None
        return family

    def _check_stuff(self) -> None:
        num_labels = len(self.config.id2label or {})
        strays = [i for i in self.processor.label_ids_to_fuse or () if not 0 <= i < num_labels]
        if strays:
            raise ValueError(
                f"{self.folder} has {strays[0]} among label_ids_to_fuse in {PROCESSOR}, but the model's labels are 0 "
                f"to {num_labels - 1}: set `processor.label_ids_to_fuse = [...]`, the ids of the stuff classes, and "
                "save_pretrained the processor anew"
            )

    def _contents(self) -> tuple[dict[str, Path | str], list[str]]:
        code = code_files(self.family)
        files: dict[str, Path | str] = {}
        left_out = []
        results = (self.folder / _RESULTS).glob("*.yaml")
        for path in [*sorted(self.folder.iterdir()), *sorted(results)]:
            name = path.relative_to(self.folder).as_posix()
            known = path.suffix.lower() in _PUBLISHED or path.name in ("LICENSE", "NOTICE")
            if path.is_file() and known and not path.name.startswith("."):
                files[name] = with_auto_map(path, self.family) if name in _TYPE_KEYS else path
            elif f"{CODE}/{name}" not in code and name not in (CODE, _RESULTS):
                left_out.append(name + "/" * path.is_dir())
        return files | code, left_out

    def _card(self, published: ModelCard | None, repo_id: str) -> str:
        if self._own_card is None:
            return str(_renewed_card(published, self.config, self.processor, repo_id))
        if _MARK.search(self._own_card.text) and is_untouched(self._own_card):
            return str(_readdressed(self._own_card, repo_id))
        return (self.folder / CARD).read_text(encoding="utf-8")  # to the letter, as it was written
