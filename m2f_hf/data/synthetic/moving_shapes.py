"""Generated videos: the things of `shapes` move over a still ground, hide each other, leave and come back.

Every video is a function of `(seed, index)` alone, and a longer one begins with the shorter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from ..video import Frames, VideoDataset
from .shapes import (
    SHAPES,
    THING_TEXTURES,
    categories_of,
    distinct_color,
    draw_ground,
    fill_outline,
    outline,
    smooth_field,
    texture,
)


NUM_MOVING = (2, 5)
"""Fewest and most things in a video."""
MOVING_SIZE = (0.15, 0.4)
"""Smallest and largest diameter of a thing, as a share of the image's side."""
SPEED = (0.01, 0.05)
"""Slowest and fastest a thing moves along each axis, in sides of the image per frame."""
_BEYOND = 0.75
"""Distance, in diameters, beyond the image's edge where a thing's centre turns back: it is out of sight there."""


@dataclass(frozen=True)
class MovingThing:
    """A thing and its path.

    Attributes:
        category_id: its class.
        corners: (N, 2), its outline in the unit circle.
        diameter: of its circumscribed circle, in pixels.
        start, velocity: (2,), x and y of its centre in frame 0, in pixels, and its change in each frame.
        paint: (side, side, 3) float32, its colours, which move with it; a bit larger than the thing.
    """

    category_id: int
    corners: np.ndarray
    diameter: float
    start: np.ndarray
    velocity: np.ndarray
    paint: np.ndarray

    def center(self, frame: int, size: int) -> np.ndarray:
        """Return x and y of the centre, which turns back beyond the edges of an image of `size` pixels: (2,)."""
        beyond = _BEYOND * self.diameter
        span = size + 2 * beyond
        path = (self.start + frame * self.velocity + beyond) % (2 * span)
        return np.minimum(path, 2 * span - path) - beyond

    def coverage(self, frame: int, size: int) -> tuple[np.ndarray, tuple[slice, slice], tuple[slice, slice]]:
        """Return each pixel's coverage by the thing, (h, w) float32, and its place in the image and in `paint`."""
        center = self.center(frame, size)
        side = len(self.paint)
        left, top = (int(value) for value in np.floor(center - side / 2))
        alpha = fill_outline(self.corners, side, (center[0] - left, center[1] - top), self.diameter)
        rows, columns = (_visible(offset, side, size) for offset in (top, left))
        place = slice(rows.start + top, rows.stop + top), slice(columns.start + left, columns.stop + left)
        return alpha[rows, columns], place, (rows, columns)


def _visible(offset: int, side: int, size: int) -> slice:
    """Return which of `side` pixels from `offset` on are in an image of `size` pixels; maybe none."""
    first = max(0, -offset)
    return slice(first, max(first, min(side, size - offset)))


@dataclass(frozen=True)
class MovingScene:
    """A video before it is drawn.

    Attributes:
        key: seed of the noise of its frames.
        ground: (size, size, 3) float32, colours of the stuff.
        things: from the farthest to the nearest; a thing's instance id is its position + 1.
        light: (size, size, 1) float32, factor of all colours.
        noise: standard deviation of the noise, in steps of 8 bits.
    """

    key: tuple[int, ...]
    ground: np.ndarray
    things: Sequence[MovingThing]
    light: np.ndarray
    noise: float

    def ids(self, frame: int) -> np.ndarray:
        """Return the instance id of each pixel, 0 where there is no thing: (size, size) int32."""
        ids = np.zeros(self.ground.shape[:2], dtype=np.int32)
        for number, thing in enumerate(self.things, start=1):
            alpha, place, _ = thing.coverage(frame, len(ids))
            ids[place][alpha >= 0.5] = number
        return ids

    def frame(self, frame: int) -> Image.Image:
        """Draw one frame, RGB."""
        color = self.ground.copy()
        for thing in self.things:
            alpha, place, inside = thing.coverage(frame, len(color))
            color[place] += alpha[..., None] * (thing.paint[inside] - color[place])
        # From 1 on: a trailing 0 would give the generator that the scene was drawn from.
        rng = np.random.default_rng((*self.key, frame + 1))
        noise = rng.standard_normal(color.shape, dtype=np.float32) * np.float32(self.noise)
        return Image.fromarray(np.clip(color * self.light + noise, 0, 255).astype(np.uint8))


def draw_moving_thing(
    rng: Generator,
    size: int,
    shapes: Sequence[str],
    shape: str,
    diameter: float,
    start: Sequence[float] | np.ndarray,
    velocity: Sequence[float] | np.ndarray,
    bases: list[np.ndarray],
) -> MovingThing:
    """Draw a thing in a colour unlike the `bases` (3,), to which it is added; lengths are in pixels."""
    bases.append(distinct_color(rng, bases))
    side = math.ceil(diameter) + 2
    paint = texture(rng, size, str(rng.choice(THING_TEXTURES)), bases[-1])[:side, :side]
    corners = outline(rng, shape)
    return MovingThing(shapes.index(shape), corners, diameter, np.asarray(start), np.asarray(velocity), paint)


def _describe(scene: MovingScene, num_frames: int, video_id: int) -> dict[str, Any]:
    """Return a scene as an item of a `VideoDataset`."""
    size = len(scene.ground)
    maps = np.stack([scene.ids(frame) for frame in range(num_frames)])
    visible = np.flatnonzero(np.bincount(maps.ravel(), minlength=1 + len(scene.things))[1:]).tolist()
    segments = [{"id": i + 1, "category_id": scene.things[i].category_id, "isthing": 1, "iscrowd": 0} for i in visible]
    return {
        "frames": Frames(scene.frame, num_frames),
        "segmentation_maps": maps,
        "segments_info": segments,
        "video_id": video_id,
        "file_name": f"moving shapes {video_id}",
        "height": size,
        "width": size,
    }


def _light(rng: Generator, size: int) -> np.ndarray:
    return np.clip(1.0 + 0.18 * smooth_field(rng, size, 2), 0.55, 1.35)[..., None]


class MovingShapesDataset(VideoDataset):
    """Videos of `num_frames` frames of `image_size` x `image_size` pixels, with things that move.

    Video `index` depends on `(seed, index, image_size)` only; longer videos have more of its frames. Things keep their
    velocity and their order from back to front, and turn back out of sight, so that they hide each other, leave and
    come back. Items have `segmentation_maps`; `segments_info` lists the things seen in some frame. Frames are drawn
    when they are accessed.

    Args:
        num_videos, num_frames, image_size, seed: see above.
        shapes: the classes of things, some of `m2f_hf.data.synthetic.shapes.SHAPES` and `MORE_SHAPES`.

    Attributes:
        categories: the classes of things in COCO's form. The ground has none: it is background.

    Raises:
        ValueError: if `num_videos` is negative, `num_frames` below 1, `image_size` below 32, or `shapes` has none,
            unknown ones or one twice.
    """

    def __init__(
        self,
        num_videos: int,
        num_frames: int = 16,
        image_size: int = 160,
        seed: int = 0,
        shapes: Sequence[str] = SHAPES,
    ) -> None:
        if num_videos < 0:
            raise ValueError(f"num_videos must be 0 or more, got {num_videos}.")
        _check_size(num_frames, image_size)
        self.num_videos, self.num_frames, self.image_size, self.seed = num_videos, num_frames, image_size, seed
        self._shapes = tuple(shapes)
        self._all_categories = categories_of(shapes)
        self.categories = self._all_categories[: len(shapes)]

    def __len__(self) -> int:
        return self.num_videos

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._check_index(index)
        return _describe(self._scene(index), self.num_frames, index)

    def _scene(self, index: int) -> MovingScene:
        size = self.image_size
        key = (self.seed, index)
        rng = np.random.default_rng(key)
        ground, _, bases = draw_ground(rng, size, self._all_categories)
        things = []
        for _ in range(int(rng.integers(*NUM_MOVING, endpoint=True))):
            shape = str(rng.choice(self._shapes))
            diameter = float(rng.uniform(*MOVING_SIZE)) * size
            start = rng.uniform(0, size, 2)
            velocity = rng.uniform(*SPEED, 2) * rng.choice([-1, 1], 2) * size
            things.append(draw_moving_thing(rng, size, self._shapes, shape, diameter, start, velocity, bases))
        return MovingScene(key, ground, things, _light(rng, size), float(rng.uniform(2.0, 10.0)))


def occlusion_clip(num_frames: int = 16, image_size: int = 160, seed: int = 0) -> dict[str, Any]:
    """Return one video to test identity with: a star goes from left to right, on the way completely behind a circle.

    A second star goes the other way below, in full view, where it may be taken for the first. The ids are 1 (the star
    that is hidden), 2 (the circle) and 3 (the other star); classes are those of `MovingShapesDataset`.

    Args:
        num_frames: the star is hidden in about a third of them, in the middle; 5 or more.
        image_size, seed: of the ground and the colours, as in `MovingShapesDataset`.

    Raises:
        ValueError: for fewer than 5 frames, or less than 32 pixels.
    """
    _check_size(num_frames, image_size)
    if num_frames < 5:
        raise ValueError(f"num_frames must be 5 or more for a star to be hidden and seen again, got {num_frames}.")
    size = image_size
    rng = np.random.default_rng(seed)
    ground, _, bases = draw_ground(rng, size, categories_of(SHAPES))
    step = 0.76 * size / (num_frames - 1)
    paths = [
        ("star", 0.2, (0.12, 0.4), (step, 0.0)),
        ("circle", 0.5, (0.5, 0.4), (0.0, 0.0)),
        ("star", 0.2, (0.88, 0.85), (-step, 0.0)),
    ]
    things = [
        draw_moving_thing(rng, size, SHAPES, shape, diameter * size, np.array(start) * size, velocity, bases)
        for shape, diameter, start, velocity in paths
    ]
    return _describe(MovingScene((seed,), ground, things, _light(rng, size), 4.0), num_frames, 0)


def _check_size(num_frames: int, image_size: int) -> None:
    if num_frames < 1:
        raise ValueError(f"num_frames must be 1 or more, got {num_frames}.")
    if image_size < 32:
        raise ValueError(f"image_size must be at least 32 pixels for shapes to be seen, got {image_size}.")
