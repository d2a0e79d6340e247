"""Generated data sets that are opened by name, as scripts do: "shapes" and "moving_shapes"."""

from typing import Any

from .moving_shapes import MovingShapesDataset
from .shapes import ShapesDataset


GENERATED = {"shapes": "panoptic", "moving_shapes": "video"}
"""Names, and the task of each."""
NUM_UNSEEN = {"shapes": 200, "moving_shapes": 60}
"""Scenes or videos to measure on."""


def open_generated(name: str, number: int, seed: int, image_size: int = 160, video_length: int = 16) -> Any:
    """Return generated scenes or videos: the same ones for the same seed."""
    if name == "moving_shapes":
        return MovingShapesDataset(number, video_length, image_size, seed=seed)
    return ShapesDataset(number, image_size, seed=seed)
