"""Measures of segmentation quality: panoptic quality and mean intersection over union."""

from .evaluate_model import PanopticEvaluation, evaluate_model
from .mean_iou import MeanIoU
from .panoptic_quality import PanopticQuality


__all__ = ["PanopticQuality", "MeanIoU", "PanopticEvaluation", "evaluate_model"]
