"""Datasets for training: generated shapes, and people's own files read where they lie."""

from .base import SegmentationDataset
from .coco import CocoInstanceDataset, CocoPanopticDataset
from .coco_panoptic import write_coco_panoptic
from .masks import decode_segmentation, segment_masks
from .problems import DatasetError
from .shapes import CATEGORIES, ShapesDataset


__all__ = [
    "CATEGORIES",
    "ShapesDataset",
    "SegmentationDataset",
    "CocoInstanceDataset",
    "CocoPanopticDataset",
    "write_coco_panoptic",
    "segment_masks",
    "decode_segmentation",
    "DatasetError",
]
