"""Puts our classes where `transformers` looks for them; stock `mask2former` checkpoints stay what they were."""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForUniversalSegmentation,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

# `transformers.AutoVideoProcessor` raises without torchvision; this one, which AutoProcessor asks, does not.
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .hub.push import register_push_to_hub
from .inference.pipeline import M2FImageSegmentationPipeline
from .model.configuration import Mask2FormerConfig, Mask2FormerVideoConfig
from .model.modeling import Mask2FormerForUniversalSegmentation, Mask2FormerModel
from .model.modeling_video import Mask2FormerForVideoSegmentation, Mask2FormerVideoModel
from .processing.image_processor import M2FImageProcessor
from .processing.video_processor import Mask2FormerVideoProcessor


def register() -> None:
    """Register "m2f" and "m2f_video" with the Auto classes, our pipeline and `push_to_hub`; again changes nothing.

    `exist_ok` is needed because `transformers` compares configuration classes by name and has a `Mask2FormerConfig` of
    its own; it looks models up by class, so the two do not meet.
    """
    AutoConfig.register(Mask2FormerConfig.model_type, Mask2FormerConfig, exist_ok=True)
    AutoModel.register(Mask2FormerConfig, Mask2FormerModel, exist_ok=True)
    AutoConfig.register(Mask2FormerVideoConfig.model_type, Mask2FormerVideoConfig, exist_ok=True)
    AutoModel.register(Mask2FormerVideoConfig, Mask2FormerVideoModel, exist_ok=True)
    # The segmentation pipeline builds a model given by name through AutoModelForImageSegmentation; ours must be given
    # one of clips to say that it takes none.
    for auto_class in (AutoModelForUniversalSegmentation, AutoModelForImageSegmentation):
        auto_class.register(Mask2FormerConfig, Mask2FormerForUniversalSegmentation, exist_ok=True)
        auto_class.register(Mask2FormerVideoConfig, Mask2FormerForVideoSegmentation, exist_ok=True)
    # What AutoImageProcessor.register does, less its look at the stock processors of the same configuration name, which
    # complains where torchvision is missing.
    by_config = {Mask2FormerConfig: M2FImageProcessor, Mask2FormerVideoConfig: Mask2FormerVideoProcessor}
    for config_class, processor_class in by_config.items():
        processors: Any = dict.fromkeys(("pil", "torchvision"), processor_class)
        IMAGE_PROCESSOR_MAPPING.register(config_class, processors, exist_ok=True)
    AutoVideoProcessor.register(Mask2FormerVideoConfig, Mask2FormerVideoProcessor, exist_ok=True)
    # In place: registering anew would warn, and drop the task's default model.
    PIPELINE_REGISTRY.supported_tasks["image-segmentation"]["impl"] = M2FImageSegmentationPipeline
    register_push_to_hub()
