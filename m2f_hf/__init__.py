"""Mask2Former as a Hugging Face-style package: the original's results, `transformers`' manners.

Importing it registers the model type "m2f" with the Auto classes and the `image-segmentation` pipeline.
"""

from .auto import register
from .configuration_mask2former import Mask2FormerConfig
from .image_processing_mask2former import M2FImageProcessor, Mask2FormerImageProcessor
from .modeling_mask2former import (
    Mask2FormerForUniversalSegmentation,
    Mask2FormerModel,
    Mask2FormerPreTrainedModel,
)


__version__ = "0.1.0"

__all__ = [
    "Mask2FormerConfig",
    "Mask2FormerModel",
    "Mask2FormerForUniversalSegmentation",
    "Mask2FormerPreTrainedModel",
    "Mask2FormerImageProcessor",
    "M2FImageProcessor",
]

register()
