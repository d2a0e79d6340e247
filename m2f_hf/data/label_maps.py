"""Images with label maps: one number, or colour, for each pixel.

ADE20K, Cityscapes, Mapillary Vistas, PASCAL VOC, and any folder of images with a folder of masks.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from ..known.label_sets import LabelSet, label_set
from ..processing.segment_ids import rgb_to_id
from .base import ImageFile, SegmentationDataset, read_map, semantic_segments
from .categories import from_label_set, make_categories
from .packed import PackedList
from .problems import FileProblem, Problems, named


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
MAP_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm")
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages", "leftImg8bit", "photos", "rgb")
MAP_FOLDERS = (
    *("masks", "mask", "labels", "label", "annotations", "annotation", "SegmentationClass", "gtFine", "gt"),
    *("segmentation", "segmentations", "targets", "v1.2/labels", "v2.0/labels"),
)
SPLITS = {
    "train": ("train", "training", "train2017", "trn"),
    "validation": ("validation", "val", "valid", "val2017", "dev"),
    "test": ("test", "testing", "test2017"),
}
"""Names of splits, and what folders and files call them."""

_VOID_NAMES = ("void", "ignore", "ignored", "unlabeled", "unlabelled")
# Endings that tools add to file names: for maps (`_mask`, `_gtFine_…`) and for the camera (`_leftImg8bit`).
_ADDED = re.compile(r"(_leftImg8bit|_gt(Fine|Coarse)_\w+|[-_.](masks?|labels?|seg|gt|annotation|L|jpe?g|png))$")
_MAX_UNNAMED = 1000


# --- what the numbers mean ---


class LabelCoding(NamedTuple):
    """What the numbers of label maps mean, with notes on what was assumed.

    Attributes:
        categories: the classes; `dataset_id` is a class's number, or in colour maps its position in the class list.
        void: numbers of pixels without a class; in colour maps R + 256 G + 65536 B.
        is_color: maps hold the classes' colours instead of numbers.
    """

    categories: list[dict[str, Any]]
    void: frozenset[int]
    is_color: bool
    notes: tuple[str, ...]

    def table(self) -> np.ndarray:
        """Return the lookup table (numbers,) int16: class + 1, 0 for void, -1 for a number that no class has."""
        numbers = [_number(category, "dataset_id", self.is_color) for category in self.categories]
        table = np.full(max([*numbers, *self.void, 255]) + 1, -1, dtype=np.int16)
        table[list(self.void)] = 0
        table[numbers] = np.arange(1, len(numbers) + 1)
        return table


def _number(entry: Mapping[str, Any], key: str, is_color: bool) -> int:
    """Return the number that marks a class in the maps."""
    return int(rgb_to_id(np.array(entry["color"]))) if is_color else entry[key]


def choose_coding(
    entries: Sequence[Mapping[str, Any]] | None,
    known: LabelSet | None,
    numbers: Callable[[], set[int]],
    is_color: bool = False,
    reduce_labels: bool | None = None,
    ignore_index: int | None = None,
    name: str = "",
) -> LabelCoding:
    """Decide what the numbers of label maps mean, from the class list where there is one.

    Args:
        entries: the classes (see `make_categories`); their ids are the numbers in the maps.
        known: the data set that the maps are of; used where there are no entries.
        numbers: returns the numbers that occur in the maps; called only if needed, as it opens files.
        is_color: maps hold colours.
        reduce_labels: 0 stands for "other" and 1 for the first class. None: only where that is known.
        ignore_index: the number of void. A class with this number is dropped. In colour maps it is a position in the
            class list. None: the known data set's value, else 255 if no class uses it.
        name: of the data set.

    Raises:
        ValueError: there are no classes, or too many numbers to be classes.
    """
    notes: list[str] = []
    # Files hold no negative numbers, so a negative ignore_index says that nothing is void.
    void = {255} if ignore_index is None else {ignore_index} - {-1}
    if entries is None and known is not None:
        entries = from_label_set(known, range(len(known.labels)))
        void = void if ignore_index is not None else {known.ignore_value, 255}
        if reduce_labels is None and known.dataset == "ade20k":
            # Maps with 0 for "other" run up to 150 and never need 255.
            reduce_labels = 255 not in numbers()
    if entries is None:
        return _coding_of_numbers(numbers(), is_color, bool(reduce_labels), ignore_index)
    entries = [dict(entry) for entry in entries]
    if is_color and any(entry.get("color") is None for entry in entries):
        raise ValueError(
            f"The label maps of {name} are coloured, and the class list has no colours: give one with colours "
            "(`name:r,g,b::` a line), or maps with class numbers."
        )
    if is_color:
        void = set()
    elif reduce_labels:
        entries = [{**entry, "id": entry["id"] + 1} for entry in entries]
        void |= {0}
        notes.append("label maps hold class + 1; 0 is 'other', and void")
    ignored = [e for e in entries if str(e["name"]).lower() in _VOID_NAMES or e["id"] == ignore_index]
    if ignored:
        void |= {_number(entry, "id", is_color) for entry in ignored}
        notes.append(f"treated as void, not as a class: {named([entry['name'] for entry in ignored])}")
        entries = [entry for entry in entries if entry not in ignored]
    ids = {entry["id"] for entry in entries}
    if min(ids, default=0) < 0:
        raise ValueError(f"The class list of {name} has the number {min(ids)}: label maps hold 0 and above.")
    if not is_color:
        if 0 not in ids | void:
            notes.append("0 in label maps is none of the classes listed, and taken as void")
        void = (void | {0}) - ids
    return LabelCoding(make_categories(entries, name), frozenset(void), is_color, tuple(notes))


def _coding_of_numbers(numbers: set[int], is_color: bool, reduce_labels: bool, ignore_index: int | None) -> LabelCoding:
    if is_color:
        raise ValueError(
            "The label maps are coloured and there is no list of classes with their colours: give one (labelmap.txt "
            "with `name:r,g,b::` a line, or labels=…), or maps with class numbers."
        )
    if numbers == {0, 255} and ignore_index is None and not reduce_labels:
        entries = [{"id": 0, "name": "background"}, {"id": 255, "name": "foreground"}]
        note = "masks hold 0 and 255 alone: taken as background and foreground (ignore_index=255 makes 255 void)"
        return LabelCoding(make_categories(entries), frozenset(), False, (note,))
    void = {255 if ignore_index is None else ignore_index} | ({0} if reduce_labels else set())
    values = sorted(numbers - void)
    if not values:
        raise ValueError("The label maps hold no class: every pixel is void.")
    if len(values) > _MAX_UNNAMED:
        raise ValueError(
            f"The label maps hold {len(values)} different numbers, up to {values[-1]}: too many for classes. Are they "
            "instance ids or photos? Give the class names with labels=… if they are not."
        )
    note = "no list of class names was found: classes are named after their number (labels=… names them)"
    return LabelCoding(
        make_categories({"id": value, "name": f"class {value}"} for value in values), frozenset(void), False, (note,)
    )


def used_numbers(maps: Iterable[np.ndarray], count: int) -> set[int]:
    """Return the numbers that occur in maps (grey colours count as their grey)."""
    found: set[int] = set()
    for values in tqdm(maps, "Looking for class numbers", total=count, unit="map", disable=count < 200):
        found.update(np.unique(values[..., 0] if values.ndim == 3 else values).tolist())
    return found


def is_colored(values: np.ndarray) -> bool:
    """Whether a map as `read_map` gives it holds colours that are not all grey."""
    return values.ndim == 3 and bool((values != values[..., :1]).any())


def decode_labels(values: np.ndarray, coding: LabelCoding, table: np.ndarray, name: str) -> np.ndarray:
    """Decode a map to class + 1 of each pixel, 0 for void: (height, width) int32.

    Args:
        values: a map as `read_map` gives it.
        table: `coding.table()`.
        name: of the file, for the message.

    Raises:
        FileProblem: the map holds numbers or colours that no class has.
    """
    if coding.is_color:
        numbers = rgb_to_id(values if values.ndim == 3 else np.repeat(values[..., None].astype(np.uint8), 3, axis=-1))
    elif is_colored(values):
        raise FileProblem("Label maps are coloured where class numbers are expected.", name)
    else:
        numbers = values[..., 0] if values.ndim == 3 else values
    inside = (numbers >= 0) & (numbers < len(table))
    labels = np.where(inside, table[np.where(inside, numbers, 0)], -1).astype(np.int32)
    if labels.min(initial=0) < 0:
        unknown = np.unique(numbers[labels < 0])
        if coding.is_color:
            raise FileProblem(
                "Label maps hold colours that no class has: add them to the class list; put colours that mean "
                "nothing under a class named `void`.",
                f"{name}: {named([(n & 255, n >> 8 & 255, n >> 16) for n in unknown.tolist()])}",
            )
        raise FileProblem(_unlisted(coding), f"{name}: {named(unknown.tolist())}")
    return labels


def _unlisted(coding: LabelCoding) -> str:
    ids = [category["dataset_id"] for category in coding.categories]
    span = f"{ids[0]} to {ids[-1]}" if ids == list(range(ids[0], ids[-1] + 1)) else named(ids)
    void = f"; void: {named(sorted(coding.void))}" if coding.void else ""
    return (
        f"Label maps hold numbers that no class has ({len(ids)} classes: {span}{void}): list the classes, name the "
        "number of void (ignore_index=…), or, if 0 is 'other' and the first class 1, set reduce_labels=True."
    )


# --- data sets ---


class _MapDataset(SegmentationDataset):
    """Images and maps in files, by pairs of paths relative to `folder`."""

    def __init__(self, folder: Path, pairs: Sequence[tuple[str, str]], categories: list[dict[str, Any]]) -> None:
        self.folder = folder
        self.categories = categories
        self._packed = PackedList(pairs)
        self._positions = np.arange(len(pairs))

    def _load(self, position: int) -> tuple[ImageFile, dict[str, Any]]:
        image, file = (self.folder / name for name in self._packed[position])
        segmentation_map, segments = self._decode(read_map(file, str(file)), str(file))
        image_id = image.relative_to(self.folder).with_suffix("").as_posix()
        item = {"image_id": image_id, "file_name": str(image)}
        return image, {**item, "segmentation_map": segmentation_map, "segments_info": segments}

    def _decode(self, values: np.ndarray, name: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Return the segment ids (height, width) int32 and the segments of a map as `read_map` gives it."""
        raise NotImplementedError


class LabelMapDataset(_MapDataset):
    """Images with label maps, for semantic segmentation: segment ids are the class + 1, 0 is void.

    Args:
        folder: what the paths are relative to.
        pairs: path of an image and of its label map.
        coding: what the numbers of the maps mean.
    """

    def __init__(self, folder: Path, pairs: Sequence[tuple[str, str]], coding: LabelCoding) -> None:
        super().__init__(folder, pairs, coding.categories)
        self.task = "semantic"
        self.coding = coding
        self._table = coding.table()

    def _decode(self, values: np.ndarray, name: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
        labels = decode_labels(values, self.coding, self._table, name)
        return labels, semantic_segments(labels)


class InstanceMapDataset(_MapDataset):
    """Images with maps where number = class * divisor + instance, for panoptic segmentation.

    Cityscapes (`instanceIds`, divisor 1000; a number below it is a class without instances, and a crowd if that is a
    thing) and Mapillary Vistas (`instances`, divisor 256).

    Args:
        folder, pairs: as `LabelMapDataset`'s.
        categories: the classes with things and stuff; `dataset_id` is the class in the number. Other classes are void.
        divisor: how many numbers a class has.
        has_groups: numbers below `divisor` are classes.
    """

    def __init__(
        self,
        folder: Path,
        pairs: Sequence[tuple[str, str]],
        categories: list[dict[str, Any]],
        divisor: int,
        has_groups: bool,
    ) -> None:
        super().__init__(folder, pairs, categories)
        self.task = "panoptic"
        self.divisor, self.has_groups = divisor, has_groups
        self._own = {category["dataset_id"]: (category["id"], bool(category["isthing"])) for category in categories}

    def _decode(self, values: np.ndarray, name: str) -> tuple[np.ndarray, list[dict[str, Any]]]:
        if values.ndim == 3:
            raise FileProblem("Instance maps must hold one 16-bit number a pixel.", f"{name}: it is coloured")
        numbers, areas = np.unique(values, return_counts=True)
        segments = []
        for number, area in zip(numbers.tolist(), areas.tolist(), strict=True):
            is_group = self.has_groups and number < self.divisor
            category, is_thing = self._own.get(number if is_group else number // self.divisor, (None, False))
            if category is not None:
                iscrowd = int(is_group and is_thing)
                segments.append({"id": number + 1, "category_id": category, "iscrowd": iscrowd, "area": area})
        return values.astype(np.int32) + 1, segments


# --- finding them ---


class Pairs(NamedTuple):
    """Folders of images and maps of one split, the layout in words, maybe a file that lists the split's images."""

    images: Path
    maps: Path
    layout: str
    list_file: Path | None = None


def find_pairs(root: Path) -> dict[str, Pairs]:
    """Find folders of images and label maps by split ("train", "validation", "test"; "" where there are no splits)."""
    images, maps = _first_folder(root, IMAGE_FOLDERS), _first_folder(root, MAP_FOLDERS)
    found: dict[str, Pairs] = {}
    for split, names in SPLITS.items():
        pairs = next((pairs for name in names if (pairs := _split_pairs(root, images, maps, name))), None)
        if pairs is not None:
            found[split] = pairs
    # Folders of these names may hold other labels: YOLO's labels/ has text files.
    if any(list_files(pairs.maps, MAP_SUFFIXES, first=True) for pairs in found.values()):
        return found
    lists = root / "ImageSets" / "Segmentation"
    if images is not None and maps is not None and (lists / "train.txt").is_file():  # PASCAL VOC
        layouts = {"train": lists / "train.txt", "validation": lists / "val.txt"}
        return {
            split: Pairs(images, maps, f"{images.name}/ and {maps.name}/ by {file.name}", file)
            for split, file in layouts.items()
            if file.is_file()
        }
    pair = _pairs_inside(root)
    return {} if pair is None else {"": pair}


def _split_pairs(root: Path, images: Path | None, maps: Path | None, name: str) -> Pairs | None:
    if images is not None and maps is not None and (images / name).is_dir() and (maps / name).is_dir():
        return Pairs(images / name, maps / name, f"{images.name}/{name} and {maps.name}/{name}")
    inside = _pairs_inside(root / name) if (root / name).is_dir() else None
    if inside is not None:
        return inside
    for image_kind in ("", *(f"_{kind}" for kind in IMAGE_FOLDERS)):
        for map_kind in MAP_FOLDERS:
            own, other = root / f"{name}{image_kind}", root / f"{name}_{map_kind}"
            if own != other and own.is_dir() and other.is_dir():
                return Pairs(own, other, f"{own.name}/ and {other.name}/")
    return None


def _pairs_inside(folder: Path) -> Pairs | None:
    images, maps = _first_folder(folder, IMAGE_FOLDERS), _first_folder(folder, MAP_FOLDERS)
    if maps is not None and list_files(maps, MAP_SUFFIXES, first=True):
        if images is not None:
            return Pairs(images, maps, f"{images.name}/ and {maps.relative_to(folder).as_posix()}/")
        if any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir()):
            return Pairs(folder, maps, f"images next to {maps.name}/")
    if any(_is_marked(path) for path in folder.glob("*.png")):
        return Pairs(folder, folder, "images with maps next to them (…_mask.png)")
    return None


def _first_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _is_marked(path: Path) -> bool:
    return re.search(r"[-_.](masks?|labels?|seg)$", path.stem) is not None


def list_files(folder: Path, suffixes: Collection[str], first: bool = False) -> list[Path]:
    """List files with these suffixes in a folder and those below, sorted, without hidden ones; or any `first` one."""
    found = (
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return [path for path in (next(found, None),) if path] if first else sorted(found)


def match_files(pairs: Pairs, root: Path, map_ending: str, problems: Problems) -> list[tuple[str, str]]:
    """Match each image with the map of the same name; paths are relative to `root`.

    Images and maps without a match are reported. `map_ending` is how names of maps end where a folder has
    several kinds (Cityscapes), "" for all.
    """
    images = list_files(pairs.images, IMAGE_SUFFIXES)
    maps = [path for path in list_files(pairs.maps, MAP_SUFFIXES) if path.stem.endswith(map_ending)]
    if pairs.images == pairs.maps:
        maps = [path for path in maps if _is_marked(path)]
        images = [path for path in images if not _is_marked(path)]
    elif pairs.images in pairs.maps.parents:
        images = [path for path in images if pairs.maps not in path.parents]
    if pairs.list_file is not None:
        listed = set(pairs.list_file.read_text(encoding="utf-8").split())
        for name in sorted(listed - {path.stem for path in images}):
            problems.error(f"Images listed in {pairs.list_file} are missing in {pairs.images}.", name)
        images, maps = ([path for path in paths if path.stem in listed] for paths in (images, maps))
    by_image, by_map = _by_name(images, pairs.images, problems), _by_name(maps, pairs.maps, problems)
    # Files still unmatched are compared again without those endings, then without their folders.
    for simplify in (lambda name: _ADDED.sub("", name), lambda name: _ADDED.sub("", Path(name).name)):
        rest_of_images = _unique(simplify, by_image.keys() - by_map.keys())
        rest_of_maps = _unique(simplify, by_map.keys() - by_image.keys())
        for name in rest_of_images.keys() & rest_of_maps.keys():
            by_map[rest_of_images[name]] = by_map.pop(rest_of_maps[name])
    no_map = f"Images have no label map of their name in {pairs.maps}: add it, or remove the image."
    no_image = f"Label maps have no image of their name in {pairs.images}: add it, or remove the map."
    for kind, own, other in ((no_map, by_image, by_map), (no_image, by_map, by_image)):
        for name in sorted(own.keys() - other.keys()):
            problems.error(kind, str(own[name]))
    return [
        (by_image[name].relative_to(root).as_posix(), by_map[name].relative_to(root).as_posix())
        for name in sorted(by_image.keys() & by_map.keys())
    ]


def _unique(simplify: Callable[[str], str], names: Collection[str]) -> dict[str, str]:
    """Return names by what they simplify to, where no other one simplifies to the same."""
    counts = Counter(simplify(name) for name in names)
    return {simplify(name): name for name in names if counts[simplify(name)] == 1}


def _by_name(paths: Sequence[Path], folder: Path, problems: Problems) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            problems.error("Files differ in their ending alone, and so are the same image: remove one.", str(path))
        found[name] = path
    return found


# --- known data sets ---


class KnownMaps(NamedTuple):
    """A known data set ("ade20k", "cityscapes" or "mapillary"; None for another) and how it stores its maps.

    Attributes:
        map_ending: how the names of its label maps end.
        ids: the numbers in label maps are the data set's own ids rather than 0, 1, ….
    """

    dataset: str | None
    map_ending: str = ""
    ids: bool = False


def recognise(pairs: Pairs) -> KnownMaps:
    """Recognise the known data set that a folder of maps is of."""
    first = next(iter(list_files(pairs.maps, MAP_SUFFIXES, first=True)), Path())
    if re.search(r"_gt(Fine|Coarse)_", first.name):
        has_train_ids = any(path.name.endswith("_labelTrainIds.png") for path in first.parent.iterdir())
        return KnownMaps("cityscapes", "_labelTrainIds" if has_train_ids else "_labelIds", ids=not has_train_ids)
    if re.match(r"ADE_(train|val)_\d{8}$", first.stem) or "ADEChallengeData" in str(pairs.maps):
        return KnownMaps("ade20k")
    if pairs.maps.parent.name in ("v1.2",) or "mapillary" in str(pairs.maps).lower():
        return KnownMaps("mapillary")
    return KnownMaps(None)


def known_coding(known: KnownMaps) -> LabelCoding | None:
    """Return the coding of a known data set's own ids, other numbers void; None where numbers are 0, 1, …."""
    if not known.ids:
        return None
    entries = from_label_set(label_set(f"{known.dataset}-semantic"))
    void = frozenset([*range(34), 255]) - {entry["id"] for entry in entries}
    return LabelCoding(make_categories(entries), void, False, ())
