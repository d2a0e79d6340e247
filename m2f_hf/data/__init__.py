"""Datasets for training: generated shapes and folders in COCO's panoptic form."""

from .coco_panoptic import CocoPanopticDataset, write_coco_panoptic
from .shapes import CATEGORIES, ShapesDataset


__all__ = [
    "CATEGORIES",
    "ShapesDataset",
    "CocoPanopticDataset",
    "write_coco_panoptic",
]
