"""The original's training recipe for each data set (augmentation, schedule, steps), and a default for other data."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


Size = tuple[int, int]

SIZE_MULTIPLE = 32
"""Sides of training crops are multiples of this, the coarsest stride of the model."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How images become training samples, for how many steps a model trains, and at which learning rate.

    Images are resized in one of two ways. *Large-scale jitter* (`scale_range`; arXiv 2012.07177) fits an image into
    `crop_size` times a random factor. Otherwise the shortest side becomes one of `shortest_edges`, unless the longest
    would exceed `longest_edge`. A window of at most `crop_size` is then cut out.

    Attributes:
        crop_size: Height and width of a sample, in pixels.
        scale_range: Smallest and largest factor of the large-scale jitter, or None.
        shortest_edges: Lengths of the shortest side to choose from; empty with large-scale jitter.
        longest_edge: Greatest length of the longest side; None for no limit.
        max_category_share: Windows in which one class covers this share (0 to 1) of the labelled pixels or more are
            drawn again, up to ten times; 1.0 takes the first.
        is_padded: Whether smaller samples are padded to `crop_size`, with grey 128, at the bottom and right.
        color_jitter: Whether brightness, contrast, saturation and hue vary (as in SSD, arXiv 1512.02325).
        flip_probability: Probability of mirroring left and right.
        evaluation_size: Shortest and longest edge that images are resized to at evaluation.
        steps: Number of optimizer steps; None leaves it to the size of the data set.
        schedule, milestones, warmup_steps, warmup_factor: See `m2f_hf.training.optimization.get_schedule`; milestones
            are shares of `steps`.
        batch_size: Images per step, over all processes.
        learning_rate, backbone_multiplier, weight_decay: See `m2f_hf.training.optimization.get_parameter_groups`.
        max_grad_norm: Greatest norm of the gradient of all parameters together.

    Raises:
        ValueError: no or two ways of resizing are given, or a range is impossible.
    """

    crop_size: Size
    scale_range: tuple[float, float] | None = None
    shortest_edges: tuple[int, ...] = ()
    longest_edge: int | None = None
    max_category_share: float = 1.0
    is_padded: bool = True
    color_jitter: bool = True
    flip_probability: float = 0.5
    evaluation_size: Size
    steps: int | None = None
    schedule: str = "poly"
    milestones: tuple[float, ...] = ()
    warmup_steps: int = 0
    warmup_factor: float = 1.0
    batch_size: int = 16
    learning_rate: float = 1e-4
    backbone_multiplier: float = 0.1
    weight_decay: float = 0.05
    max_grad_norm: float = 0.01

    def __post_init__(self) -> None:
        if (self.scale_range is None) == (not self.shortest_edges):
            raise ValueError("A recipe has either `scale_range` or `shortest_edges`: give one of them.")
        if self.scale_range is not None and not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"scale_range is a smallest and a largest factor above 0, got {self.scale_range}.")
        lengths = (*self.crop_size, *self.shortest_edges, *(() if self.longest_edge is None else (self.longest_edge,)))
        if min(lengths) < 1:
            raise ValueError(f"Sizes are 1 pixel or more; crop_size, shortest_edges and longest_edge give {lengths}.")
        if not 0 < self.max_category_share <= 1 or not 0 <= self.flip_probability <= 1:
            raise ValueError(
                "max_category_share is in (0, 1] and flip_probability in [0, 1], got "
                f"{self.max_category_share} and {self.flip_probability}."
            )

    def at_size(self, size: int) -> "Recipe":
        """Return this recipe with crops whose shorter side is `size`, and every other length in proportion."""
        scale = size / min(self.crop_size)
        height, width = (max(1, round(side * scale / SIZE_MULTIPLE)) * SIZE_MULTIPLE for side in self.crop_size)
        return replace(
            self,
            crop_size=(height, width),
            shortest_edges=tuple(max(1, round(edge * scale)) for edge in self.shortest_edges),
            longest_edge=None if self.longest_edge is None else max(1, round(self.longest_edge * scale)),
        )


def half_to_double(size: int) -> tuple[int, ...]:
    """Return the original's sixteen shortest edges, from half of `size` to twice."""
    return tuple(int(tenths * 0.1 * size) for tenths in range(5, 21))


def cropped(size: int, **settings: Any) -> Recipe:
    """Return the original's recipe of crops: squares of `size`, cut out of images at half to double `size`."""
    values: dict[str, Any] = {
        "crop_size": (size, size),
        "shortest_edges": half_to_double(size),
        "longest_edge": 4 * size,
        "evaluation_size": (size, 4 * size),
    }
    return Recipe(**(values | settings))


_COCO = Recipe(
    crop_size=(1024, 1024),
    scale_range=(0.1, 2.0),
    color_jitter=False,
    evaluation_size=(800, 1333),
    steps=368_750,
    schedule="multistep",
    milestones=(327_778 / 368_750, 355_092 / 368_750),
    warmup_steps=10,
)
_COCO_100_EPOCHS = replace(_COCO, steps=737_500, milestones=(655_556 / 737_500, 710_184 / 737_500))
_CITYSCAPES = cropped(1024, crop_size=(512, 1024), is_padded=False, evaluation_size=(1024, 2048), steps=90_000)
_MAPILLARY = cropped(2048, crop_size=(1024, 1024), evaluation_size=(2048, 2048), steps=300_000)
_ADE20K = cropped(640, steps=160_000)

RECIPES: Mapping[str, Recipe] = {
    "coco-panoptic": _COCO,
    "coco-panoptic-100ep": _COCO_100_EPOCHS,
    "coco-instance": _COCO,
    "coco-instance-100ep": _COCO_100_EPOCHS,
    "ade20k-panoptic": _ADE20K,
    "ade20k-instance": _ADE20K,
    "ade20k-semantic": cropped(512, steps=160_000),
    "ade20k-semantic-res640": _ADE20K,
    "cityscapes-panoptic": _CITYSCAPES,
    "cityscapes-instance": _CITYSCAPES,
    "cityscapes-semantic": _CITYSCAPES,
    "mapillary-panoptic": _MAPILLARY,
    "mapillary-semantic": _MAPILLARY,
}
"""The original's recipes by data set and task. Swin-L on COCO trains for 100 epochs; Swin-B and Swin-L for semantic
segmentation of ADE20K at 640 pixels."""


_YOUTUBE_VIS = Recipe(
    crop_size=(1333, 1333),  # cuts nothing: no frame is larger
    shortest_edges=(360, 480),
    longest_edge=1333,
    is_padded=False,
    color_jitter=False,
    evaluation_size=(360, 1333),
    steps=6_000,
    schedule="multistep",
    milestones=(2 / 3,),
    warmup_steps=10,
)

VIDEO_RECIPES: Mapping[str, Recipe] = {
    "ytvis2019-instance": _YOUTUBE_VIS,
    "ytvis2021-instance": replace(_YOUTUBE_VIS, steps=8_000, milestones=(5_500 / 8_000,)),
}
"""The original's recipes for videos; images are frames there, which share all that is random, and a batch has 16 clips.
Evaluation is at 480 pixels with Swin backbones (2021's Swin-L: 360)."""


def get_recipe(name: str) -> Recipe:
    """Return the original's recipe of that name.

    Raises:
        ValueError: there is none; the message names the known ones.
    """
    if name not in RECIPES:
        raise ValueError(f"Unknown recipe {name!r}: use one of {', '.join(RECIPES)}.")
    return RECIPES[name]


def default_recipe(size: Mapping[str, int | None]) -> Recipe:
    """Return a recipe for data that the original has none for, around the checkpoint's image size.

    It is the original's for ADE20K with the checkpoint's shortest edge: images at half to twice that size, a square of
    that size cut out of them, colour jitter and flip. (Large-scale jitter down to a tenth, as on COCO, leaves most of a
    sample grey, which pays with a hundred thousand images rather than with a hundred.) The number of steps is left to
    the size of the data set.

    Args:
        size: The processor's: `shortest_edge` and maybe `longest_edge`, or `height` and `width`.

    Raises:
        ValueError: `size` has neither.
    """
    edges = [size.get(key) for key in ("shortest_edge", "height", "width")]
    given = [edge for edge in edges if edge]
    if not given:
        raise ValueError(f"size needs `shortest_edge`, or `height` and `width`; got {dict(size)}.")
    shortest = min(given)
    crop = -(-shortest // SIZE_MULTIPLE) * SIZE_MULTIPLE
    return replace(
        cropped(shortest, evaluation_size=(shortest, size.get("longest_edge") or 4 * shortest)),
        crop_size=(crop, crop),
        warmup_steps=10,
        warmup_factor=0.0,
    )


@dataclass(frozen=True)
class SizeSchedule:
    """Progressive resizing: small images at first, larger ones later in training.

    Attributes:
        stages: (share of training from which it holds, size) pairs. A size is the shorter side of the crops, in pixels,
            a multiple of 32. Shares rise from 0.
    """

    stages: tuple[tuple[float, int], ...]

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.stages]
        rises = all(later > earlier for earlier, later in itertools.pairwise(shares))
        if not shares or shares[0] != 0 or not rises or shares[-1] >= 1:
            raise ValueError(f"The shares of a size schedule start at 0 and rise, below 1; got {shares}.")
        sizes = [size for _, size in self.stages]
        if any(size < SIZE_MULTIPLE or size % SIZE_MULTIPLE for size in sizes):
            raise ValueError(f"The sizes of a size schedule are multiples of {SIZE_MULTIPLE}; got {sizes}.")

    @classmethod
    def parse(cls, text: str) -> "SizeSchedule":
        """Read `"0:256,0.5:384,0.8:512"`: crops of 256 pixels, 384 from half of the steps on, 512 from 80 % on.

        Raises:
            ValueError: the text has another form, or the schedule is impossible.
        """
        try:
            pairs = [stage.split(":") for stage in text.split(",")]
            stages = tuple((float(share), int(size)) for share, size in pairs)
        except ValueError:
            raise ValueError(
                f"{text!r} is no size schedule: write share:size pairs such as 0:256,0.5:384,0.8:512."
            ) from None
        return cls(stages)

    def size_at(self, step: int, total_steps: int) -> int:
        """Return the size at `step`, counted from 0, of `total_steps`."""
        done = step / max(total_steps, 1)
        return [size for share, size in self.stages if share <= done][-1]
