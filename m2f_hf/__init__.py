"""Mask2Former as a Hugging Face-style package: the original's results, `transformers`' manners.

Importing it registers the model types "m2f" and "m2f_video" with the Auto classes, and the `image-segmentation`
pipeline.
"""

from .auto import register
from .configuration_mask2former import Mask2FormerConfig, Mask2FormerVideoConfig
from .frames import DamagedFrame, stream_frames
from .image_processing_mask2former import M2FImageProcessor, Mask2FormerImageProcessor
from .modeling_mask2former import (
    Mask2FormerForUniversalSegmentation,
    Mask2FormerModel,
    Mask2FormerPreTrainedModel,
)
from .modeling_mask2former_video import Mask2FormerForVideoSegmentation, Mask2FormerVideoModel
from .tracking import ClipTracker
from .video_processing_mask2former import Mask2FormerVideoProcessor


__version__ = "0.1.0"

__all__ = [
    "Mask2FormerConfig",
    "Mask2FormerModel",
    "Mask2FormerForUniversalSegmentation",
    "Mask2FormerPreTrainedModel",
    "Mask2FormerVideoConfig",
    "Mask2FormerVideoModel",
    "Mask2FormerForVideoSegmentation",
    "Mask2FormerVideoProcessor",
    "Mask2FormerImageProcessor",
    "M2FImageProcessor",
    "ClipTracker",
    "DamagedFrame",
    "stream_frames",
]

register()
