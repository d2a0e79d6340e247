"""Datasets for training: generated shapes and folders in COCO's panoptic form."""

from .coco_panoptic import CocoPanopticDataset, decode_panoptic_ids, encode_panoptic_ids, write_coco_panoptic
from .shapes import CATEGORIES, ShapesDataset


__all__ = [
    "CATEGORIES",
    "ShapesDataset",
    "CocoPanopticDataset",
    "write_coco_panoptic",
    "encode_panoptic_ids",
    "decode_panoptic_ids",
]
