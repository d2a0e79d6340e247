"""Open labelled data of any known form for training: recognise it, agree on classes, split it, check it.

To add a form:

1. write its reader in its own module, a `SegmentationDataset` (its docstring says what a subclass defines);
2. name it in `FORMS`;
3. return its splits in a branch of `_open_folder`, or of `_open` where a single file is enough. The first branch that
   recognises the data wins: put a strict test before a loose one, and leave label maps and tables last;
4. name it in the message at the end of `_open_folder`, and in `docs/data.md`.
"""

import contextlib
import itertools
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..known.label_sets import LABEL_SETS, TASKS, LabelSet, dataset_in_name, label_set
from . import hub_datasets, label_maps
from .base import SegmentationDataset, read_map
from .categories import Labels, find_name_file, from_label_set, make_categories, match_by_name, read_labels
from .coco import CocoInstanceDataset, CocoPanopticDataset
from .problems import DatasetError, FileProblem, Problems, named
from .report import DatasetReport, SplitReport, inspect_split, stream_report, warn_about_empty_classes
from .youtube_vis import YouTubeVISDataset, inspect_videos


FORMS = ("coco-panoptic", "coco-instance", "youtube-vis", "label-maps", "table")
"""What a data set can be taken for."""


class DataSplits(NamedTuple):
    """A data set that is ready for training: what was found, its classes and task ("video" for clips).

    `train` and `validation` are items as `SegmentationDataset` or `VideoDataset` describes them.
    """

    train: Any
    validation: Any
    categories: list[dict[str, Any]]
    task: str
    report: DatasetReport


_Opened = tuple[dict[str, Any], str, list[str]]
"""Splits by name ("train", "validation"; "" where there are none), what they were taken for, what was assumed."""


def open_dataset(
    source: Any,
    *,
    task: str | None = None,
    form: str | None = None,
    labels: Labels | None = None,
    validation: str | os.PathLike[str] | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    image_folder: str | os.PathLike[str] | None = None,
    reduce_labels: bool | None = None,
    ignore_index: int | None = None,
    max_opened: int | None = 500,
    streaming: bool = False,
    config_name: str | None = None,
) -> DataSplits:
    """Open images with segments, or videos with tracks, for training and validation, in the form they are in.

    Args:
        source: a folder; an annotation file in COCO's or YouTube-VIS' form; a folder of `save_to_disk` or of Parquet
            files; the name of a data set on the Hub; or a `datasets.Dataset`, `IterableDataset` or dict of them.
        task: "panoptic", "instance", "semantic" or "video"; what the annotations are made for if None. Panoptic
            annotations also work for instance and semantic segmentation, instances for semantic segmentation.
        form: one of `FORMS`, where the guess is wrong.
        labels: class names, where the data set does not name them: a known label set ("ade20k-semantic"), a file
            (JSON or one name a line), `{number: name}`, or a list.
        validation: another folder or file to validate on.
        held_out: share of the images that is validated on where there is no validation split, drawn with `seed`. 0
            validates on the training images themselves.
        image_folder: where the images of a COCO file are, if not where they usually are.
        reduce_labels: in label maps 0 is "other", and the first class is 1.
        ignore_index: number of pixels without a class in label maps (default 255).
        max_opened: number of images per split that are opened with their label map to check them; None: all. Names of
            files and entries of a JSON are all checked.
        streaming: read a Hub data set as a stream, without downloading it first.
        config_name: configuration of a Hub data set.

    Raises:
        FileNotFoundError: `source` is not there.
        DatasetError: the data set cannot be trained on; every problem is named, with the files it is in.
        ValueError: `source` is in no known form, splits have different classes, or an argument makes no sense.
        ImportError: `datasets` or `pycocotools` is needed and not installed.
    """
    if task not in (None, *TASKS, "video"):
        raise ValueError(f"task={task!r}: use one of {', '.join(TASKS)}, video.")
    if form is not None and form not in FORMS:
        raise ValueError(f"form={form!r}: use one of {', '.join(FORMS)}.")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out} is a share of the images: 0 or more, below 1.")
    name = str(source) if isinstance(source, (str, os.PathLike)) else "the data set"
    problems = Problems()
    options = (task, form, labels, image_folder, reduce_labels, ignore_index, streaming, config_name)
    arguments = _Arguments(*options, problems)
    splits, detected_format, notes = _open(source, arguments)
    if validation is not None:
        other = _open(validation, arguments)[0]
        splits = {"train": _first(splits, "train"), "validation": _first(other, "validation")}
    if any(isinstance(split, SegmentationDataset) and not len(split) for split in splits.values()):
        problems.error("The data set is empty: there is no image with an annotation.", name)
        problems.raise_errors(name)
    train_as_stored, validation_as_stored, more = _split(splits, held_out, seed)
    if train_as_stored.task != validation_as_stored.task:
        raise ValueError(
            f"The training data is for task {train_as_stored.task!r}, the validation data for "
            f"{validation_as_stored.task!r}."
        )
    validation_as_stored = _with_classes_of(train_as_stored, validation_as_stored)
    if task is not None and (task == "video") != (train_as_stored.task == "video"):
        raise ValueError(
            f"{name} was taken for {detected_format}, whose task is {train_as_stored.task!r}: that cannot be used for "
            f"task={task!r}, which needs YouTube-VIS' annotations of videos."
            if task == "video"
            else f"{name} has annotations of videos: no good for task={task!r}. Use task='video'."
        )
    is_same = validation_as_stored is train_as_stored
    train, held = train_as_stored, validation_as_stored
    if train.task != "video":
        task = task or train.task
        train = train.with_task(task)
        held = train if is_same else held.with_task(task)
    num_dropped = len(train_as_stored.categories) - len(train.categories)
    if num_dropped > 0:
        more.append(f"{num_dropped} stuff classes have no instances: left out")
    reports = [_report_on(train, train_as_stored, "train", problems, max_opened)]
    if is_same:
        reports.append(replace(reports[0], name="validation"))
    else:
        reports.append(_report_on(held, validation_as_stored, "validation", problems, max_opened))
    if not problems.errors and reports[0].counts_all and not reports[0].counts.any():
        problems.error("The training data is empty: no image has a segment that is not a crowd.", name)
    problems.raise_errors(name)
    warn_about_empty_classes(train.categories, reports, problems)
    report = DatasetReport(name, detected_format, train.task, train.categories, reports, notes + more, problems)
    return DataSplits(train, held, train.categories, train.task, report)


def _report_on(split: Any, as_stored: Any, name: str, problems: Problems, max_opened: int | None) -> SplitReport:
    if isinstance(split, hub_datasets.StreamingDataset):
        return stream_report(split, name)
    if isinstance(split, YouTubeVISDataset):  # a video has many images
        return inspect_videos(split, name, problems, None if max_opened is None else max_opened // 10)
    return inspect_split(split, as_stored, name, problems, max_opened)


class _Arguments(NamedTuple):
    """The options of `open_dataset`, and where problems are collected."""

    task: str | None
    form: str | None
    labels: Labels | None
    image_folder: str | os.PathLike[str] | None
    reduce_labels: bool | None
    ignore_index: int | None
    streaming: bool
    config_name: str | None
    problems: Problems


def _open(source: Any, arguments: _Arguments) -> _Opened:
    if not isinstance(source, (str, os.PathLike)):
        return _open_table(source, "the data set", arguments)
    path = Path(source).expanduser()
    if path.is_file():
        return _open_coco({"": path}, arguments, _coco_kind(path))
    if path.is_dir():
        return _open_folder(path, arguments)
    if isinstance(source, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and path.suffix != ".json":
        return _open_table(source, source, arguments)
    raise FileNotFoundError(f"{source} is neither a folder or file nor the name of a data set on the Hub.")


def _open_folder(folder: Path, arguments: _Arguments) -> _Opened:
    form = arguments.form
    if form == "table" or (form is None and _is_saved_table(folder)):
        return _open_table(folder, str(folder), arguments)
    if form in (None, "coco-panoptic", "coco-instance", "youtube-vis"):
        kind, files = _find_coco(folder, arguments)
        if files:
            return _open_coco(files, arguments, kind)
    if form in (None, "label-maps"):
        pairs = label_maps.find_pairs(folder)
        if pairs:
            return _open_maps(folder, pairs, arguments)
    tables = [depth + ending for depth in ("", "*/") for ending in ("*.parquet", "*.arrow", "metadata.*")]
    if form is None and any(next(folder.glob(pattern), None) for pattern in tables):
        return _open_table(folder, str(folder), arguments)
    lossy = next((path for name in label_maps.MAP_FOLDERS for path in (folder / name).glob("**/*.jp*g")), None)
    if lossy is not None:
        raise ValueError(f"Label maps in JPEG have lost their numbers ({lossy}): store them as PNG.")
    names = sorted(path.name for path in folder.iterdir())
    raise ValueError(
        f"{folder} has no {'data set' if form is None else form} in a layout that is known (it has: "
        f"{named(names) or 'nothing'}). Known are COCO's and YouTube-VIS' annotation files (in the folder, in "
        "annotations/ or in train/ and valid/), images/ with masks/ (each with or without training/ and validation/), "
        "Cityscapes, Mapillary, Parquet files, and what save_to_disk writes. YOLO's text files are not read: convert "
        "them to COCO's."
    )


def _is_saved_table(folder: Path) -> bool:
    has = {name: (folder / f"{name}.json").is_file() for name in ("dataset_dict", "state", "dataset_info")}
    return has["dataset_dict"] or (has["state"] and has["dataset_info"])


# --- COCO's files, and YouTube-VIS' ---


def _coco_kind(path: Path) -> str | None:
    """Return "panoptic", "instance" (COCO's) or "video" (YouTube-VIS') without parsing the file; None for another."""
    if path.stat().st_size == 0:
        return None  # cannot be mapped into memory
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        has = {key: text.find(f'"{key}"'.encode()) >= 0 for key in ("images", "annotations", "categories")}
        if not has["images"] and has["categories"] and text.find(b'"videos"') >= 0:
            return "video"
        if not all(has.values()):
            return None
        return "panoptic" if text.find(b'"segments_info"') >= 0 else "instance"


def _split_of(text: str) -> str:
    """Return the split that a word of a file's or folder's name stands for; "" if none does."""
    words = re.split(r"[^a-z]+", text.lower())
    return next((split for split, names in label_maps.SPLITS.items() if set(words) & set(names)), "")


def _find_coco(folder: Path, arguments: _Arguments) -> tuple[str, dict[str, Path]]:
    """Return the annotation files of a folder by split, of the kind that fits the task best."""
    inside = [child for child in sorted(folder.iterdir()) if child.is_dir() and _split_of(child.name)]
    found: dict[str, dict[str, list[Path]]] = {"panoptic": {}, "instance": {}, "video": {}}
    for place in (folder, folder / "annotations", *inside):
        for path in sorted(place.glob("*.json")):
            # COCO's keypoint files repeat the people of its instance files.
            kind = None if "keypoints" in path.stem else _coco_kind(path)
            if kind is not None:
                split = _split_of(place.name if place in inside else path.stem)
                found[kind].setdefault(split, []).append(path)
    by_form = {"coco-panoptic": ["panoptic"], "coco-instance": ["instance"], "youtube-vis": ["video"]}
    by_task = {"instance": ["instance", "panoptic", "video"], "video": ["video", "panoptic", "instance"]}
    kinds = by_form.get(arguments.form or "") or by_task.get(arguments.task or "", ["panoptic", "instance", "video"])
    kind = next((kind for kind in kinds if found[kind]), kinds[0])
    for split, paths in found[kind].items():
        if len(paths) > 1:
            raise ValueError(
                f"{folder} has several {kind} annotation files for {split or 'the whole data set'}: "
                f"{named([str(path.relative_to(folder)) for path in paths])}. Give the one you mean as the data set."
            )
    files = {split: paths[0] for split, paths in found[kind].items()}
    if len(files) > 1:
        files.pop("", None)
    return kind, files


def _open_coco(files: dict[str, Path], arguments: _Arguments, kind: str | None) -> _Opened:
    listed = named([str(path) for path in files.values()])
    if kind is None:
        raise ValueError(f"{listed} is not in COCO's form: it lacks images, annotations or categories.")
    readers = {"panoptic": CocoPanopticDataset, "instance": CocoInstanceDataset, "video": YouTubeVISDataset}
    splits: dict[str, Any] = {
        split: readers[kind](path, arguments.image_folder, problems=arguments.problems)
        for split, path in files.items()
        if split != "test" or len(files) == 1
    }
    if kind == "video":
        annotated = {split: dataset for split, dataset in splits.items() if dataset.is_annotated}
        if not annotated:
            raise DatasetError(f"{listed} has no annotations: it is for prediction only.")
        notes = [f"{split}: no annotations, left out" for split in splits if split not in annotated]
        return (annotated, f"YouTube-VIS' annotations in {listed}", notes)
    other = "coco-instance" if kind == "panoptic" else "coco-panoptic"
    return (splits, f"COCO {kind} annotations in {listed} (override in Python: form={other!r})", [])


# --- label maps ---


def _open_maps(folder: Path, found: dict[str, label_maps.Pairs], arguments: _Arguments) -> _Opened:
    """Open images with label maps; of Cityscapes and Mapillary, instance maps where the task needs them."""
    if len(found) > 1:
        found.pop("test", None)
    first = next(iter(found.values()))
    known = label_maps.recognise(first)
    layout = "; ".join(pairs.layout for pairs in found.values())
    what = f"{known.dataset} " if known.dataset else ""
    if arguments.task in ("panoptic", "instance"):
        if known.dataset not in ("cityscapes", "mapillary"):
            raise ValueError(
                f"{folder} has label maps ({layout}), which do not tell the objects of a class apart: no good "
                f"for task={arguments.task!r}. Use task='semantic', or COCO annotations."
            )
        splits = _instance_maps(folder, found, known.dataset, arguments)
        return (splits, f"{what}instance maps: {layout} (override: task='semantic')", [])
    problems, ending = arguments.problems, known.map_ending
    matched = {split: label_maps.match_files(pairs, folder, ending, problems) for split, pairs in found.items()}
    maps = [folder / path for pairs in matched.values() for _, path in pairs]
    if not maps:
        problems.raise_errors(str(folder))
        raise DatasetError(f"{folder} is empty: no image has a label map ({layout}).")
    coding = label_maps.known_coding(known)
    notes: list[str] = []
    label_set_used = label_set(f"{known.dataset}-semantic") if known.dataset else None
    entries = None
    if arguments.labels is not None:
        entries, label_set_used, coding = *_named_classes(arguments.labels), None
    elif coding is None:
        file = find_name_file([folder, *(p for pairs in found.values() for p in (pairs.maps, pairs.images.parent))])
        if file is not None:
            listed = read_labels(file)
            # ADE20K's own list has other spellings than its checkpoints.
            if label_set_used is None or known.dataset != "ade20k" or len(listed) != len(label_set_used.labels):
                entries = listed
                notes.append(f"class names from {file}")
    if coding is None:
        coding = label_maps.choose_coding(
            entries,
            label_set_used,
            lambda: label_maps.used_numbers(_read_sample(maps, None if label_set_used is None else 50), len(maps)),
            any(label_maps.is_colored(values) for values in _read_sample(maps, 3)),
            arguments.reduce_labels,
            arguments.ignore_index,
            str(folder),
        )
    datasets = {split: label_maps.LabelMapDataset(folder, pairs, coding) for split, pairs in matched.items()}
    form = (
        f"{what}label maps for semantic segmentation: {layout} (override in Python: form=…, labels=…, reduce_labels=…)"
    )
    return (dict(datasets), form, [*notes, *coding.notes])


def _named_classes(labels: Labels) -> tuple[list[dict[str, Any]] | None, LabelSet | None]:
    """Return the classes given: entries with their numbers, or a known label set (whose numbers are 0, 1, …)."""
    if isinstance(labels, str) and labels in LABEL_SETS:
        return None, label_set(labels)
    return read_labels(labels), None


def _read_sample(maps: Sequence[Path], count: int | None) -> Iterator[np.ndarray]:
    """Read `count` maps spread evenly over all; skip damaged ones, which are reported when all are checked."""
    step = 1 if count is None else max(1, len(maps) // count)
    for path in maps[::step]:
        with contextlib.suppress(FileProblem):
            yield read_map(path, str(path))


def _instance_maps(
    folder: Path, found: dict[str, label_maps.Pairs], dataset: str, arguments: _Arguments
) -> dict[str, Any]:
    known = label_set(f"{dataset}-panoptic")
    ids = None if dataset == "cityscapes" else range(len(known.labels))
    splits: dict[str, Any] = {}
    for split, pairs in found.items():
        if dataset == "cityscapes":
            ending, divisor = "_instanceIds", 1000
        else:
            pairs, ending, divisor = pairs._replace(maps=pairs.maps.parent / "instances"), "", 256
        splits[split] = label_maps.InstanceMapDataset(
            folder,
            label_maps.match_files(pairs, folder, ending, arguments.problems),
            make_categories(from_label_set(known, ids)),
            divisor,
            has_groups=dataset == "cityscapes",
        )
    return splits


# --- the datasets library ---


def _open_table(source: Any, name: str, arguments: _Arguments) -> _Opened:
    """Open rows of the `datasets` library: loaded already, on disk, or on the Hub."""
    rows = _load_rows(source, arguments)
    tables = dict(rows) if isinstance(rows, Mapping) else {"": rows}
    splits = {_split_of(split): table for split, table in reversed(tables.items())}
    if len(tables) == 1:
        splits = {"": next(iter(tables.values()))}
    elif len(splits) > 1:
        splits.pop("test", None)
    splits = {split: _undecoded(table) for split, table in splits.items()}
    is_stream = not hasattr(next(iter(splits.values())), "__len__")
    if not is_stream and not all(len(table) for table in splits.values()):
        raise DatasetError(f"{name} is empty: {', '.join(split or 'it' for split in splits)} must have rows.")
    first = splits.get("train", next(iter(splits.values())))
    columns = hub_datasets.find_columns(next(iter(first)), name, arguments.task)
    categories, coding, notes = _table_classes(first, splits, columns, name, isinstance(source, str), arguments)
    if columns.task == "panoptic" and any(category["isthing"] is None for category in categories):
        raise ValueError(
            f"{name} does not say which classes are things. Name them: "
            'labels=[{"id": 0, "name": …, "isthing": True}, …], or a file of that.'
        )
    datasets: dict[str, Any] = {}
    for split, table in splits.items():
        where = f"{name}/{split}" if split else name
        reader = hub_datasets.TableDataset(() if is_stream else table, columns, categories, coding, where)
        datasets[split] = hub_datasets.StreamingDataset(table, reader) if is_stream else reader
    used = ", ".join(f"{key} in `{value}`" for key, value in columns._asdict().items() if value is not None)
    kind = "stream" if is_stream else "table"
    form = f"{kind} for {columns.task} segmentation: {used} (override: rename columns, or task=…)"
    return (datasets, form, notes)


def _load_rows(source: Any, arguments: _Arguments) -> Any:
    if not isinstance(source, (str, os.PathLike)):
        parts = source.values() if isinstance(source, Mapping) else [source]
        if not parts or not all(hasattr(part, "select_columns") for part in parts):
            raise ValueError(
                f"{type(source).__name__} is no data set: give a folder, a file, a name on the Hub, or a Dataset of "
                "the datasets library (or a dict of them)."
            )
        return source
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{source} is read by the datasets library: pip install 'm2f_hf[train]'. (If it should be a folder: there "
            "is none of that name.)"
        ) from error
    if isinstance(source, Path) and _is_saved_table(source):
        return datasets.load_from_disk(str(source))
    try:
        return datasets.load_dataset(str(source), arguments.config_name, streaming=arguments.streaming)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source} is no folder here, and loading it from the Hub failed: {type(error).__name__}: {error}"
            if isinstance(source, str)
            else f"{source} could not be loaded: {error}"
        ) from error


def _undecoded(table: Any) -> Any:
    """Leave a table's images as bytes, so that annotations can be read without decoding them."""
    if not hasattr(table, "__len__") or not getattr(table, "features", None):
        return table
    import datasets

    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _table_classes(
    first: Any,
    splits: Mapping[str, Any],
    columns: hub_datasets.Columns,
    name: str,
    is_on_hub: bool,
    arguments: _Arguments,
) -> tuple[list[dict[str, Any]], label_maps.LabelCoding | None, list[str]]:
    """Find a table's classes, what the numbers of its label maps mean (semantic data), and what was assumed."""
    entries: list[dict[str, Any]] | None = None
    known: LabelSet | None = None
    notes: list[str] = []
    names = hub_datasets.class_names(first.features, columns)
    if arguments.labels is not None:
        entries, known = _named_classes(arguments.labels)
    elif columns.instances is not None:
        ids_by_name = next(iter(first)).get("semantic_class_to_id")  # as `transformers`' instance example has it
        if not isinstance(ids_by_name, Mapping):
            raise ValueError(f"{name} does not name its classes: give labels={{number: name, …}}.")
        # 0 is the background.
        entries = [{"id": n, "name": label, "isthing": True} for label, n in ids_by_name.items() if n]
    elif names is not None:
        entries = [{"id": index, "name": label} for index, label in enumerate(names)]
    else:
        entries = hub_datasets.names_on_hub(name) if is_on_hub else None
        dataset = "ade20k" if "scene_parse" in name else dataset_in_name(name)
        if entries is None and dataset is not None and f"{dataset}-{columns.task}" in LABEL_SETS:
            known = label_set(f"{dataset}-{columns.task}")
            notes.append(f"classes of the label set {known.name}, going by the name")
    if columns.task == "semantic":
        coding = label_maps.choose_coding(
            entries,
            known,
            lambda: _table_numbers(splits, columns, known is not None),
            label_maps.is_colored(next(_table_maps([first], columns, 1))),
            arguments.reduce_labels,
            arguments.ignore_index,
            name,
        )
        return coding.categories, coding, [*notes, *coding.notes]
    if entries is None:
        ids: set[Any] = set()
        if hasattr(first, "__len__"):
            ids = ids.union(*(hub_datasets.category_ids(table, columns) for table in splits.values()))
        elif known is None:
            raise ValueError(f"{name} does not name its classes, and a stream cannot be searched: give labels=….")
        entries, more = _entries_of_ids(ids, known)
        notes += more
    return make_categories(entries, name), None, notes


def _entries_of_ids(ids: set[Any], known: LabelSet | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Make the classes of a table that does not name them from the categories in its rows."""
    if known is not None:
        # Some keep the data set's own ids, some count from 0.
        own = {label.dataset_id for label in known.labels}
        has_own_ids = any(isinstance(value, int) and value >= len(own) for value in ids) and ids <= own
        return from_label_set(known, None if has_own_ids else range(len(own))), []
    if all(isinstance(value, str) for value in ids):
        return [{"id": index, "name": name} for index, name in enumerate(sorted(ids))], []
    note = "classes have no names and are named after their number (labels=… names them)"
    return [{"id": value, "name": f"class {value}"} for value in sorted(ids)], [note]


def _table_maps(tables: Iterable[Any], columns: hub_datasets.Columns, count: int | None) -> Iterator[np.ndarray]:
    for table in tables:
        for row in itertools.islice(table.select_columns([columns.label]), count):
            yield hub_datasets.read_cell(row[columns.label])


def _table_numbers(splits: Mapping[str, Any], columns: hub_datasets.Columns, is_known: bool) -> set[int]:
    if not is_known and not all(hasattr(table, "__len__") for table in splits.values()):
        raise ValueError("The stream does not name its classes, and cannot be searched for them: give labels=….")
    count = 50 if is_known else None
    return label_maps.used_numbers(
        _table_maps(splits.values(), columns, count), count or sum(map(len, splits.values()))
    )


# --- splits ---


_NUM_STREAMED_FOR_VALIDATION = 100


def _first(splits: Mapping[str, Any], wanted: str) -> Any:
    return splits[wanted] if wanted in splits else next(iter(splits.values()))


def _split(splits: Mapping[str, Any], held_out: float, seed: int) -> tuple[Any, Any, list[str]]:
    """Return training and validation data, and notes on how they were split."""
    if "train" in splits and "validation" in splits:
        return splits["train"], splits["validation"], []
    whole = _first(splits, "train")
    if held_out == 0:
        return whole, whole, ["no validation split: validated on the training images themselves (held_out=0)"]
    if isinstance(whole, hub_datasets.StreamingDataset):
        count = _NUM_STREAMED_FOR_VALIDATION
        stream = partial(hub_datasets.StreamingDataset, reader=whole.reader)
        rest, first = stream(whole.rows.skip(count)), stream(whole.rows.take(count))
        return rest, first, [f"no validation split: the first {count} rows of the stream are held out for validation"]
    if len(whole) == 1:
        return whole, whole, [f"one {'video' if whole.task == 'video' else 'image'} only: validated on it, too"]
    count = min(max(1, round(held_out * len(whole))), len(whole) - 1)
    order = np.random.default_rng(seed).permutation(len(whole))
    unit = "videos" if whole.task == "video" else "images"
    note = f"no validation split: {count} of {len(whole)} {unit} held out for it (held_out={held_out}, seed={seed})"
    return whole.select(np.sort(order[count:])), whole.select(np.sort(order[:count])), [note]


def _with_classes_of(train: Any, validation: Any) -> Any:
    """Give the validation data the training data's class ids.

    Raises:
        ValueError: they have different classes.
    """
    if train.categories == validation.categories:
        return validation
    mapping = match_by_name(train.categories, validation.categories, ("the training data", "the validation data"))
    return validation.with_categories(train.categories, mapping)
