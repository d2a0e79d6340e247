"""Labelled data for training: people's own files, read in place, and generated scenes and clips."""

from ..known.recipes import RECIPES, VIDEO_RECIPES, Recipe, SizeSchedule, default_recipe, get_recipe
from ..processing.rle import decode_segmentation, segment_masks
from .augmentation import TrainingTransform
from .base import SegmentationDataset
from .clips import ClipTransform, CollateClips, sample_frames
from .coco import CocoInstanceDataset, CocoPanopticDataset
from .inspection import inspect_augmentation, inspect_clips
from .opening import DataSplits, open_dataset
from .problems import DatasetError
from .report import DatasetReport, check_dataset
from .synthetic.moving_shapes import MovingShapesDataset, occlusion_clip
from .synthetic.shapes import CATEGORIES, ShapesDataset
from .video import Frames, VideoDataset, tube_masks
from .writing import write_coco_panoptic, write_youtube_vis
from .youtube_vis import VideoReport, YouTubeVISDataset, open_youtube_vis


__all__ = [
    "CATEGORIES",
    "ShapesDataset",
    "MovingShapesDataset",
    "occlusion_clip",
    "VideoDataset",
    "Frames",
    "tube_masks",
    "YouTubeVISDataset",
    "open_youtube_vis",
    "write_youtube_vis",
    "VideoReport",
    "open_dataset",
    "DataSplits",
    "DatasetReport",
    "check_dataset",
    "SegmentationDataset",
    "CocoInstanceDataset",
    "CocoPanopticDataset",
    "write_coco_panoptic",
    "segment_masks",
    "decode_segmentation",
    "DatasetError",
    "TrainingTransform",
    "inspect_augmentation",
    "ClipTransform",
    "CollateClips",
    "sample_frames",
    "inspect_clips",
    "Recipe",
    "RECIPES",
    "VIDEO_RECIPES",
    "get_recipe",
    "default_recipe",
    "SizeSchedule",
]
