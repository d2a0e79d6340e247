"""Class lists: from annotation files, from files of names, from the known data sets; and whether two of them agree."""

import contextlib
import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..known.label_sets import LABEL_SETS, LabelSet, find_label_set, label_set
from .problems import named


NAME_FILES = (
    *("labels.json", "id2label.json", "label2id.json", "classes.json", "categories.json", "class_names.json"),
    *("config.json", "config_v1.2.json", "config_v2.0.json"),
    *("classes.txt", "labels.txt", "names.txt", "class_names.txt", "label_names.txt", "labelmap.txt"),
    *("objectInfo150.txt", "_classes.csv", "classes.csv", "class_dict.csv", "labels.csv"),
)
"""Files that class names are looked for in, the first that is there."""


def make_categories(entries: Iterable[Mapping[str, Any]], name: str = "") -> list[dict[str, Any]]:
    """Number classes from 0, in the order of the files' own ids.

    Args:
        entries: for each class `id` (the files' own), `name`, and where known `isthing` and `color`.
        name: of the data set, which helps to recognise a known one.

    Returns:
        A list of `{"id", "name", "isthing", "color", "dataset_id"}`; an unknown `isthing` is None, an unknown `color`
        is left out. Known data sets fill both in.

    Raises:
        ValueError: two classes have the same id or name, there is no class, or a colour is none.
    """
    ordered = sorted(entries, key=lambda entry: entry["id"])
    if not ordered:
        raise ValueError("The data set lists no classes.")
    for key in ("id", "name"):
        values = [entry[key] for entry in ordered]
        twice = sorted({value for value in values if values.count(value) > 1}, key=str)
        if twice:
            raise ValueError(f"Several classes have the same {key}: {named(twice)}. Rename or renumber them.")
    known = find_label_set({index: str(entry["name"]) for index, entry in enumerate(ordered)}, name)
    categories = []
    for index, entry in enumerate(ordered):
        label = known.labels[index] if known else None
        is_thing = entry.get("isthing", label.is_thing if label else None)
        color = entry.get("color", label.color if label else None)
        category: dict[str, Any] = {"id": index, "name": str(entry["name"])}
        category["isthing"] = None if is_thing is None else bool(is_thing)
        if color is not None:
            category["color"] = _as_color(color, category["name"])
        categories.append({**category, "dataset_id": int(entry["id"])})
    return categories


def _as_color(color: Any, name: str) -> list[int]:
    channels = list(color) if isinstance(color, Sequence) else []
    if len(channels) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in channels):
        raise ValueError(f"The class {name} has the colour {color!r}: expected red, green and blue from 0 to 255.")
    return channels


def from_label_set(known: LabelSet, ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Return entries for `make_categories` of a known data set; `ids` replace its own ids."""
    entries = []
    for label, number in zip(known.labels, ids or [label.dataset_id for label in known.labels], strict=True):
        color = {} if label.color is None else {"color": label.color}
        entries.append({"id": number, "name": label.name, "isthing": label.is_thing, **color})
    return entries


def match_by_name(
    categories: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], names: tuple[str, str]
) -> dict[int, int]:
    """Map the contiguous ids of `others` to those of `categories`, by name.

    Raises:
        ValueError: one has classes that the other lacks; the message has the `names` of the two data sets.
    """
    ids, other_ids = ({category["name"]: category["id"] for category in listed} for listed in (categories, others))
    if ids.keys() != other_ids.keys():
        lists = [
            f"only in {name}: {named(sorted(mine.keys() - theirs.keys())) or 'none'}"
            for name, mine, theirs in ((names[0], ids, other_ids), (names[1], other_ids, ids))
        ]
        raise ValueError(
            f"{names[0]} and {names[1]} have different classes ({'; '.join(lists)}). "
            "Give both the same list of classes, also where a split has no example of one."
        )
    return {other_ids[name]: index for name, index in ids.items()}


# --- names of classes ---


Labels = str | Path | Mapping[Any, Any] | Sequence[Any]
"""Class names as people give them: a known label set, a file, `{id: name}`, or a list of names."""


def read_labels(labels: Labels) -> list[dict[str, Any]]:
    """Read entries for `make_categories`.

    Raises:
        ValueError: neither a label set nor a file, or a file in a form that is not known.
    """
    if isinstance(labels, (str, Path)):
        if str(labels) in LABEL_SETS:
            return from_label_set(label_set(str(labels)))
        path = Path(labels)
        if not path.is_file():
            raise ValueError(
                f"labels={str(labels)!r} is neither a file nor a known label set ({', '.join(LABEL_SETS)})."
            )
        return _read_file(path)
    return _entries(labels, "labels")


def find_name_file(folders: Iterable[Path]) -> Path | None:
    """Return the first file of class names in the folders."""
    paths = (folder / name for folder in folders for name in NAME_FILES)
    return next((path for path in paths if path.is_file() and _is_name_file(path)), None)


def _is_name_file(path: Path) -> bool:
    if not path.name.startswith("config"):
        return True
    # A config may be about anything: Mapillary's has `labels`, a model's `id2label`.
    with contextlib.suppress(ValueError):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        return isinstance(content, dict) and bool({"labels", "id2label"} & set(content))
    return False


def _read_file(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        try:
            return _entries(json.loads(text), str(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from error
    if path.suffix == ".csv":
        return _entries_of_csv(text, path)
    lines = [line.strip() for line in text.splitlines()]
    return _entries_of_lines([line for line in lines if line and not line.startswith("#")], path)


def _entries(content: Any, where: str) -> list[dict[str, Any]]:
    """Return the classes of an id2label, a label2id, a list of names, or a list of dicts; also one level down."""
    if isinstance(content, Mapping):
        for key in ("categories", "labels", "classes", "id2label", "label2id", "names"):
            if isinstance(content.get(key), (Mapping, list)):
                return _entries(content[key], where)
        if content and all(str(key).lstrip("-").isdigit() and isinstance(value, str) for key, value in content.items()):
            return [{"id": int(key), "name": value} for key, value in content.items()]
        if content and all(isinstance(value, int) for value in content.values()):
            return [{"id": value, "name": str(key)} for key, value in content.items()]
    elif content and all(isinstance(name, str) for name in content):
        return [{"id": index, "name": name} for index, name in enumerate(content)]
    elif content and all(isinstance(entry, Mapping) and {"name", "readable"} & set(entry) for entry in content):
        return [_entry(entry, index) for index, entry in enumerate(content)]
    raise ValueError(
        f"{where}: no class names in a form that is known: {{id: name}}, {{name: id}}, a list of names, or a list of "
        '{"id": …, "name": …}.'
    )


def _entry(entry: Mapping[str, Any], index: int) -> dict[str, Any]:
    # Mapillary's config: `name` is a path such as "human--person", `readable` the name, `instances` says thing.
    result = {"id": int(entry.get("id", index)), "name": str(entry.get("readable", entry.get("name")))}
    is_thing = entry.get("isthing", entry.get("instances"))
    if is_thing is not None:
        result["isthing"] = bool(is_thing)
    if entry.get("color") is not None:
        result["color"] = list(entry["color"])[:3]
    return result


def _entries_of_csv(text: str, path: Path) -> list[dict[str, Any]]:
    """Read rows with a class's name and its number or colour, by columns such as "Pixel Value", "Class", r, g, b."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    header = [cell.lower() for cell in rows[0]] if rows else []
    name = next((i for i, cell in enumerate(header) if cell in ("class", "name", "label", "class_name")), None)
    number = next((i for i, cell in enumerate(header) if cell in ("pixel value", "id", "value", "index")), None)
    if name is None:
        raise ValueError(f"{path}: expected a column `name` or `Class` and one `id` or `Pixel Value`, got {header}.")
    channels = [header.index(channel) for channel in "rgb" if channel in header]
    entries: list[dict[str, Any]] = []
    try:
        for index, row in enumerate(rows[1:]):
            entries.append({"id": index if number is None else int(row[number]), "name": row[name]})
            if len(channels) == 3:
                entries[-1]["color"] = [int(row[channel]) for channel in channels]
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: a row without a number or name: {error}.") from error
    return entries


def _entries_of_lines(lines: Sequence[str], path: Path) -> list[dict[str, Any]]:
    """Read one class a line: `name`, `3 name`, `3: name`, CVAT's `name:r,g,b::`, or ADE20K's table with a header."""
    if lines and lines[0].split()[:2] == ["Idx", "Ratio"]:
        rows = [re.split(r"\t+| {2,}", line) for line in lines[1:]]
        return [{"id": int(row[0]), "name": row[-1].strip()} for row in rows]
    colored = [re.fullmatch(r"([^:]+):(\d+),(\d+),(\d+):.*", line) for line in lines]
    if lines and all(colored):
        return [
            {"id": index, "name": match[1].strip(), "color": [int(match[k]) for k in (2, 3, 4)]}
            for index, match in enumerate(colored)
            if match
        ]
    numbered = [re.fullmatch(r"(\d+)\s*[:,\t ]\s*(.+)", line) for line in lines]
    if lines and all(numbered):
        return [{"id": int(match[1]), "name": match[2].strip()} for match in numbered if match]
    if not lines:
        raise ValueError(f"{path} is empty: write one class name a line.")
    return [{"id": index, "name": line} for index, line in enumerate(lines)]
