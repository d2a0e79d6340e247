"""Mask2Former as a Hugging Face-style package: the original's results, `transformers`' manners.

Importing it registers the model types "m2f" and "m2f_video" with the Auto classes, and the `image-segmentation`
pipeline.
"""

from .auto import register
from .inference.tracking import ClipTracker
from .model.configuration import Mask2FormerConfig, Mask2FormerVideoConfig
from .model.modeling import Mask2FormerForUniversalSegmentation, Mask2FormerModel, Mask2FormerPreTrainedModel
from .model.modeling_video import Mask2FormerForVideoSegmentation, Mask2FormerVideoModel
from .processing.frames import DamagedFrame, stream_frames
from .processing.image_processor import M2FImageProcessor, Mask2FormerImageProcessor
from .processing.video_processor import Mask2FormerVideoProcessor


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
