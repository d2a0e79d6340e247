"""Generated panoptic scenes: things differ only in shape, stuff only in pattern.

Colours and textures of things come from one distribution for all classes, so a model needs the outline to name a thing.
Every scene is a function of `(seed, index)` alone.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw
from torch.utils.data import Dataset


CATEGORIES: list[dict[str, Any]] = [
    {"id": 0, "name": "circle", "isthing": 1, "color": [220, 20, 60]},
    {"id": 1, "name": "rectangle", "isthing": 1, "color": [0, 114, 189]},
    {"id": 2, "name": "triangle", "isthing": 1, "color": [237, 177, 32]},
    {"id": 3, "name": "star", "isthing": 1, "color": [126, 47, 142]},
    {"id": 4, "name": "striped ground", "isthing": 0, "color": [119, 172, 48]},
    {"id": 5, "name": "dotted ground", "isthing": 0, "color": [77, 190, 238]},
    {"id": 6, "name": "blotchy ground", "isthing": 0, "color": [162, 142, 120]},
]
"""The seven classes in COCO's form; `id` is contiguous and doubles as the model's label."""

SHAPES: tuple[str, ...] = tuple(category["name"] for category in CATEGORIES if category["isthing"])
MORE_SHAPES = ("cross", "ring", "hexagon", "crescent")
"""Shapes outside the seven classes: new ones to fine-tune to."""
NUM_THINGS = (3, 8)
"""Fewest and most things in a scene."""
THING_SIZE = (0.08, 0.50)
"""Smallest and largest diameter of a thing, as a share of the image's side."""
THING_TEXTURES = ("plain", "gradient", "striped", "dotted", "blotchy")
"""Textures of things, drawn with equal probability for every class; the three of the stuff classes are among them."""

VALIDATION_SEED = 1_000_001
TEST_SEED = 2_000_003
"""Seeds of scenes that training never sees: to choose a checkpoint and its thresholds, and to report."""

_COLORS = {category["name"]: category["color"] for category in CATEGORIES}
_COLORS |= dict(zip(MORE_SHAPES, ([214, 39, 160], [255, 127, 14], [60, 60, 200], [20, 160, 130]), strict=True))
_SUPERSAMPLING = 3
_MIN_VISIBLE_SHARE = 0.4
_PLACEMENT_TRIES = 12


def categories_of(shapes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the classes of scenes with these things, as `CATEGORIES` are those of scenes with `SHAPES`.

    Raises:
        ValueError: if a shape is unknown or there twice, or there is none.
    """
    for shape in shapes:
        if shape not in SHAPES + MORE_SHAPES:
            raise ValueError(f"Unknown shape {shape!r}: use some of {', '.join(SHAPES + MORE_SHAPES)}.")
    if not shapes or len(set(shapes)) < len(shapes):
        raise ValueError(f"Scenes have one shape or more, each once; got {', '.join(shapes) or 'none'}.")
    stuff = [category["name"] for category in CATEGORIES if not category["isthing"]]
    return [
        {"id": index, "name": name, "isthing": int(index < len(shapes)), "color": _COLORS[name]}
        for index, name in enumerate([*shapes, *stuff])
    ]


def smooth_field(rng: Generator, size: int, cells: int) -> np.ndarray:
    """Draw a smooth random field with about `cells` bumps along a side: (size, size) float32, variance about 1."""
    coarse = Image.fromarray(rng.standard_normal((cells + 1, cells + 1)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def pattern(rng: Generator, size: int, kind: str) -> np.ndarray:
    """Draw the weight of a texture's second colour, for a kind of `THING_TEXTURES`: (size, size) float32 in [0, 1].

    Periods are in pixels of a 160-pixel image and scale with `size`.
    """
    if kind == "plain":
        return np.zeros((size, size), dtype=np.float32)
    if kind == "blotchy":
        return np.clip(0.5 + 0.6 * smooth_field(rng, size, int(rng.integers(14, 24))), 0.0, 1.0)

    angle = rng.uniform(0.0, math.pi)
    axis = np.arange(size, dtype=np.float32)
    along = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]
    if kind == "gradient":
        return (along - along.min()) / (along.max() - along.min())
    period = rng.uniform(7.0, 13.0) * size / 160
    first = np.sin(2 * math.pi / period * along + rng.uniform(0.0, 2 * math.pi))
    if kind == "striped":
        return np.clip(0.5 + 1.5 * first, 0.0, 1.0)
    if kind == "dotted":
        across = math.cos(angle) * axis[:, None] - math.sin(angle) * axis[None, :]
        second = np.sin(2 * math.pi / period * across + rng.uniform(0.0, 2 * math.pi))
        return np.clip(2.0 * (first + second) - 1.0, 0.0, 1.0)
    raise ValueError(f"Unknown texture {kind!r}: use one of {', '.join(THING_TEXTURES)}.")


def texture(rng: Generator, size: int, kind: str, base: np.ndarray) -> np.ndarray:
    """Paint `kind` with the colour `base` (3,) and a second one not far from it: (size, size, 3) float32."""
    direction = rng.standard_normal(3)
    second = base + rng.uniform(50.0, 90.0) * direction / np.linalg.norm(direction)
    first, second = base.astype(np.float32), np.clip(second, 0.0, 255.0).astype(np.float32)
    weight = pattern(rng, size, kind).astype(np.float32)[..., None]
    return first + weight * (second - first)


def distinct_color(rng: Generator, others: Sequence[np.ndarray]) -> np.ndarray:
    """Draw a colour (3,) in [0, 255]: of six draws the one farthest from all `others`, so that edges can be seen."""
    draws = rng.uniform(20.0, 235.0, (6, 3))
    if not others:
        return draws[0]
    distance = np.linalg.norm(draws[:, None] - np.stack(others)[None], axis=-1).min(axis=1)  # (6, N, 3) -> (6,)
    return draws[int(distance.argmax())]


def outline(rng: Generator, shape: str) -> np.ndarray:
    """Draw the corners of a randomly turned `shape` in the unit circle: (N, 2) float64; the circle is a 48-gon."""
    if shape == "circle":
        angles = np.arange(48) * 2 * math.pi / 48
        radii = np.ones(48)
    elif shape == "rectangle":
        half = math.atan(rng.uniform(0.5, 1.0))
        angles = np.array([half, math.pi - half, math.pi + half, -half])
        radii = np.ones(4)
    elif shape == "triangle":
        angles = math.pi / 2 + np.arange(3) * 2 * math.pi / 3 + rng.uniform(-0.25, 0.25, 3)
        radii = np.ones(3)
    elif shape == "star":
        angles = np.arange(10) * math.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.38, 0.5))
    elif shape == "cross":
        half = math.asin(rng.uniform(0.22, 0.32))  # half the angle covered by an arm's end
        inner = math.sqrt(2) * math.sin(half)
        quarters = np.arange(4)[:, None] * math.pi / 2
        angles = (quarters + np.array([-half, half, math.pi / 4])).ravel()
        radii = np.tile([1.0, 1.0, inner], 4)
    elif shape == "ring":  # around, in, around the hole and back
        around = np.linspace(0.0, 2 * math.pi, 49)
        angles = np.concatenate([around, around[::-1]])
        radii = np.repeat([1.0, rng.uniform(0.45, 0.6)], 49)
    elif shape == "hexagon":
        angles = np.arange(6) * math.pi / 3
        radii = np.ones(6)
    elif shape == "crescent":
        angles, radii = crescent(tip=rng.uniform(0.8, 1.0), depth=rng.uniform(0.1, 0.3))
    else:
        raise ValueError(f"Unknown shape {shape!r}: use one of {', '.join(SHAPES + MORE_SHAPES)}.")
    angles = angles + rng.uniform(0.0, 2 * math.pi)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=-1)


def crescent(tip: float, depth: float) -> tuple[np.ndarray, np.ndarray]:
    """Return angles and radii (N,) of the unit circle without a disc, which meets it at the angles `tip` and -`tip`
    (radians) and reaches `depth` beyond the centre.
    """
    center = (1 - depth**2) / (2 * (math.cos(tip) + depth))  # as far from both tips as from (-depth, 0)
    end = math.atan2(math.sin(tip), math.cos(tip) - center)
    outer = np.exp(1j * np.linspace(tip, 2 * math.pi - tip, 40))
    inner = center + (center + depth) * np.exp(1j * np.linspace(2 * math.pi - end, end, 30))
    corners = np.concatenate([outer, inner])
    return np.angle(corners), np.abs(corners)


def fill_outline(corners: np.ndarray, size: int, center: tuple[float, float], diameter: float) -> np.ndarray:
    """Fill an outline (N, 2) of the unit circle at `center` (x, y): each pixel's coverage, (size, size) float32."""
    corners = (corners * diameter / 2 + np.asarray(center)) * _SUPERSAMPLING
    canvas = Image.new("L", (size * _SUPERSAMPLING, size * _SUPERSAMPLING))
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in corners], fill=255)
    return np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float32) / 255


def draw_ground(
    rng: Generator, size: int, categories: Sequence[dict[str, Any]]
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Cover the image with one to three of the stuff classes in `categories`, with irregular borders.

    Returns the colours (size, size, 3) float32, the category id of each pixel (size, size) int64 and the main colours.
    """
    stuff = np.array([category["id"] for category in categories if not category["isthing"]])
    chosen = rng.permutation(stuff)[: int(rng.integers(1, len(stuff) + 1))]
    relief = np.stack([smooth_field(rng, size, 2) + 0.25 * smooth_field(rng, size, 9) for _ in chosen])  # (S, H, W)
    # A strip a few pixels wide would be a segment that no one can name.
    large_enough = np.bincount(relief.argmax(axis=0).ravel(), minlength=len(chosen)) >= 0.08 * size**2
    chosen, relief = chosen[large_enough], relief[large_enough]
    owner = relief.argmax(axis=0)  # (S, H, W) -> (H, W)

    color = np.empty((size, size, 3), dtype=np.float32)
    bases: list[np.ndarray] = []
    for index, category_id in enumerate(chosen):
        bases.append(distinct_color(rng, bases))
        region = owner == index
        kind = categories[category_id]["name"].split()[0]
        color[region] = texture(rng, size, kind, bases[-1])[region]
    return color, chosen[owner], bases


def place_thing(
    rng: Generator, size: int, ids: np.ndarray, areas: Sequence[int], shapes: Sequence[str]
) -> tuple[np.ndarray, str]:
    """Place one more thing on top of those in `ids` ((H, W), 0 = none) of these full areas: coverage (H, W) and shape.

    Overlap is wanted, but a place that would hide most of an earlier thing is drawn again a few times.
    """
    shape = str(rng.choice(shapes))
    diameter = rng.uniform(*THING_SIZE) * size
    for _ in range(_PLACEMENT_TRIES):
        margin = 0.35 * diameter
        center = rng.uniform(margin, size - margin, 2)
        alpha = fill_outline(outline(rng, shape), size, (center[0], center[1]), diameter)
        remaining = np.bincount(ids[alpha < 0.5], minlength=len(areas) + 1)[1:]
        if all(left >= _MIN_VISIBLE_SHARE * area for left, area in zip(remaining, areas, strict=True)):
            break
    return alpha, shape


def render_scene(
    rng: Generator, size: int, categories: Sequence[dict[str, Any]]
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Draw one scene of the classes of `categories_of`: image (size, size, 3) uint8, segment ids (size, size) int32,
    category ids of the segments. Segment ids count from 1 in that order, stuff first; hidden things have no pixel.
    """
    shapes = [category["name"] for category in categories if category["isthing"]]
    color, category_map, bases = draw_ground(rng, size, categories)
    stuff = np.unique(category_map)
    segment_ids = (np.searchsorted(stuff, category_map) + 1).astype(np.int32)
    category_ids = stuff.tolist()

    thing_ids = np.zeros((size, size), dtype=np.int64)
    areas: list[int] = []
    for number in range(1, int(rng.integers(NUM_THINGS[0], NUM_THINGS[1], endpoint=True)) + 1):
        alpha, shape = place_thing(rng, size, thing_ids, areas, shapes)
        base = distinct_color(rng, bases)
        bases.append(base)
        thing_color = texture(rng, size, str(rng.choice(THING_TEXTURES)), base)
        touched = alpha > 0
        color[touched] += alpha[touched, None] * (thing_color[touched] - color[touched])
        covered = alpha >= 0.5
        thing_ids[covered] = number
        segment_ids[covered] = len(stuff) + number
        category_ids.append(shapes.index(shape))
        areas.append(int(covered.sum()))

    light = np.clip(1.0 + 0.18 * smooth_field(rng, size, 2), 0.55, 1.35)[..., None]
    noise = rng.standard_normal(color.shape, dtype=np.float32) * rng.uniform(2.0, 10.0)
    return np.clip(color * light + noise, 0, 255).astype(np.uint8), segment_ids, category_ids


def describe_segments(
    segment_ids: np.ndarray, category_of: dict[int, int], categories: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return COCO's `segments_info` of a panoptic map (H, W): one entry for each id in it, without 0 (void).

    `category_of` maps a segment id to its category id, a position in `categories`.
    """
    segments = []
    for segment_id in np.unique(segment_ids[segment_ids > 0]).tolist():
        mask = segment_ids == segment_id
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        category_id = int(category_of[segment_id])
        segments.append(
            {
                "id": segment_id,
                "category_id": category_id,
                "isthing": categories[category_id]["isthing"],
                "iscrowd": 0,
                "area": int(mask.sum()),
                "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
            }
        )
    return segments


class ShapesDataset(Dataset[dict[str, Any]]):
    """`num_scenes` generated scenes of `image_size` x `image_size` pixels.

    Scene `index` depends on `(seed, index, image_size)` only. An item has

    - `image`: `PIL.Image.Image`, RGB; `image_id`: int, the index;
    - `segmentation_map`: (H, W) int32 of segment ids, every pixel >= 1;
    - `segments_info`: a list of dicts in COCO's form: `id`, `category_id` (see `categories`), `isthing`, `iscrowd`,
      `area` in pixels, `bbox` as x, y, width, height in pixels; things that others hide completely are left out.

    Args:
        num_scenes, image_size, seed: see above.
        shapes: the classes of things, some of `SHAPES` and `MORE_SHAPES`.

    Attributes:
        categories: the classes of things and stuff in COCO's form; with `SHAPES` they are `CATEGORIES`.

    Raises:
        ValueError: if `num_scenes` is negative, `image_size` is below 32 (the smallest thing would have no shape), or
            `shapes` has none, unknown ones or one twice.
    """

    def __init__(self, num_scenes: int, image_size: int = 160, seed: int = 0, shapes: Sequence[str] = SHAPES) -> None:
        if num_scenes < 0:
            raise ValueError(f"num_scenes must be 0 or more, got {num_scenes}.")
        if image_size < 32:
            raise ValueError(f"image_size must be at least 32 pixels for shapes to be seen, got {image_size}.")
        self.num_scenes, self.image_size, self.seed = num_scenes, image_size, seed
        self.categories = categories_of(shapes)

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_scenes:
            raise IndexError(f"Scene {index} of {self.num_scenes}: indices run from 0 to {self.num_scenes - 1}.")
        rng = np.random.default_rng((self.seed, index))
        pixels, segment_ids, category_ids = render_scene(rng, self.image_size, self.categories)
        category_of = dict(enumerate(category_ids, start=1))
        return {
            "image": Image.fromarray(pixels),
            "segmentation_map": segment_ids,
            "segments_info": describe_segments(segment_ids, category_of, self.categories),
            "image_id": index,
        }
