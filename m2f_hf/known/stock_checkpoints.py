"""Translate the settings of `transformers`' own Mask2Former checkpoints into ours, and add what they lack.

Their files have neither the task nor the stuff labels, and those of the released ones stretch every image to 384x384.
Where name and labels are those of a known data set, the rest follows from it.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from .label_sets import are_placeholders, find_label_set, matching_label_sets, own_name, task_in_name


logger = logging.get_logger(__name__)

_DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")

# Names of the released checkpoints on the Hub.
_RELEASED_NAME = re.compile(
    r"mask2former-(?P<backbone>swin-(tiny|small|base|base-in21k|large)|resnet-(50|101))-"
    r"(coco|ade|cityscapes|mapillary-vistas)-(panoptic|instance|semantic)"
)

_TEST_SIZES = {"coco": (800, 1333), "ade20k": (640, 2560), "cityscapes": (1024, 2048), "mapillary": (2048, 2048)}

# Of a `size` of one number, in the versions of transformers that wrote such.
_DEFAULT_MAX_SIZE = 1333


def released_test_size(dataset: str, task: str, backbone: str) -> tuple[int, int]:
    """Return the shortest and longest edge, in pixels, at which a released image model was measured.

    Args:
        dataset, task: As in the names of label sets.
        backbone: As in the names of checkpoints, such as "swin-base-in21k".
    """
    if (dataset, task) == ("ade20k", "semantic") and not backbone.startswith(("swin-base", "swin-large")):
        return (512, 2048)
    return _TEST_SIZES[dataset]


def released_threshold(dataset: str) -> float:
    """Return the class probability above which queries of a released model take part in a panoptic map."""
    return 0.0 if dataset == "mapillary" else 0.8


def checkpoint_name(path: str | os.PathLike[str]) -> str:
    """Return a checkpoint's id, or its folder's absolute path; a file in the folder may be given too."""
    path = Path(path)
    if path.is_file():
        path = path.parent
    return str(path.resolve()) if path.is_dir() else path.as_posix()


def read_labels(path: str | os.PathLike[str], arguments: Mapping[str, Any]) -> dict[int, str]:
    """Return the labels in the `config.json` next to a processor's settings; none where there is no such file.

    Args:
        path: a checkpoint's id, its folder, or a file in it.
        arguments: of `from_pretrained`; those of the download are used.
    """
    checkpoint = Path(path).parent if Path(path).is_file() else path
    try:
        fields, _ = PreTrainedConfig.get_config_dict(
            checkpoint, **{name: arguments[name] for name in _DOWNLOAD_ARGUMENTS if name in arguments}
        )
    except OSError:  # there is none, or the Hub cannot be reached
        return {}
    return _labels_in(fields)


def _labels_in(fields: Mapping[str, Any]) -> dict[int, str]:
    labels = fields.get("id2label") or {i: f"LABEL_{i}" for i in range(fields.get("num_labels") or 0)}
    return {int(index): label for index, label in labels.items()}


def add_known_labels(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a stock configuration with the colours of its data set, and names for placeholders (`LABEL_0`)."""
    labels = _labels_in(fields)
    known = find_label_set(labels, name)
    if known is None:
        return dict(fields)
    added: dict[str, Any] = {"label_colors": known.colors}
    if are_placeholders(labels):
        added["id2label"] = known.id2label
        added["label2id"] = {label: index for index, label in known.id2label.items()}
    return {**fields, **added}


def translate_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate settings of `transformers`' Mask2Former image processor, of any version, into ours.

    Images are padded to a multiple of `size_divisor` rather than stretched, and 0 stands for the default. The number of
    classes is left out, since it is the model's: a fine-tuned one has others than the folder it came from.
    """
    translated = {name: value for name, value in settings.items() if value is not None}
    longest_edge = translated.pop("max_size", translated.get("_max_size", _DEFAULT_MAX_SIZE))
    if isinstance(translated.get("size"), int):
        translated["size"] = {"shortest_edge": translated["size"], "longest_edge": longest_edge}
    if "reduce_labels" in translated:
        translated.setdefault("do_reduce_labels", translated["reduce_labels"])
    if translated.get("size_divisor") == 0:
        del translated["size_divisor"]
    for name in ("_max_size", "num_labels", "reduce_labels", "size_divisibility"):
        translated.pop(name, None)
    return translated


def add_known_settings(
    settings: Mapping[str, Any], labels: Mapping[int, str], name: str, arguments: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Add task, stuff, threshold and test size to translated settings, from the checkpoint's name and labels.

    The task is that in the name, else that of the data set with these labels, else "panoptic". The test size replaces a
    fixed height and width for released checkpoints only: what was fine-tuned at a size is used at that size.

    Args:
        settings: the processor's; they stay as they are.
        labels: the model's.
        name: the checkpoint's id or folder.
        arguments: the settings that the caller passes; nothing is assumed, and no warning given, for these.
    """
    given = {**settings, **(arguments or {})}
    candidates, known = matching_label_sets(labels, name), find_label_set(labels, name)
    tasks = {candidate.task for candidate in candidates}
    task = given.get("task") or task_in_name(name) or (known.task if known is not None else "panoptic")
    added: dict[str, Any] = {"task": task}
    assumed = []
    if task_in_name(name) is None and len(tasks) != 1 and "task" not in given:
        assumed.append(f'that its task is {task} (pass `task="semantic"`, for example, where it is another)')
    if known is not None:
        added["ignore_index"] = known.ignore_value
        added["threshold"] = released_threshold(known.dataset)
        added["label_ids_to_fuse"] = known.stuff_ids
        released = _RELEASED_NAME.fullmatch(own_name(name))
        if released and "height" in (settings.get("size") or {}):
            shortest, longest = released_test_size(known.dataset, task, released["backbone"])
            settings = {**settings, "size": {"shortest_edge": shortest, "longest_edge": longest}}
    elif task == "panoptic" and "label_ids_to_fuse" not in given:
        assumed.append("that none of its labels is stuff (pass `label_ids_to_fuse=[...]`, the stuff labels, or `[]`)")
    if assumed:
        logger.warning(
            f"The settings of {name or 'this checkpoint'} are of transformers' image processor, which has neither task "
            f"nor stuff, and name and labels do not tell them. Assumed: {'; '.join(assumed)}. `save_pretrained` keeps "
            "what you pass."
        )
    return {**{field: value for field, value in added.items() if value is not None}, **settings}
