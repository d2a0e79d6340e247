"""Measures of segmentation quality: panoptic quality, mask AP, video AP, mean IoU, scores of single masks."""

from .base import Gather, Metric, merged
from .evaluate_model import evaluate_model
from .evaluation import MAIN_FIGURE, MEASURES, Evaluation, Prediction
from .mask_ap import MaskAP
from .mean_iou import MeanIoU
from .modules import module_path
from .panoptic_quality import PanopticQuality
from .pixel_scores import PixelScores
from .video_ap import VideoAP


__all__ = [
    "Metric",
    "Gather",
    "merged",
    "PanopticQuality",
    "MaskAP",
    "VideoAP",
    "MeanIoU",
    "PixelScores",
    "module_path",
    "Evaluation",
    "Prediction",
    "MEASURES",
    "MAIN_FIGURE",
    "evaluate_model",
]
