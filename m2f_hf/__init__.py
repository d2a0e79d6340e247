"""Mask2Former as a Hugging Face-style package."""

from .configuration_mask2former import Mask2FormerConfig
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
]
