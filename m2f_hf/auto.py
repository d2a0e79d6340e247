"""Register our classes with `transformers`; stock `mask2former` checkpoints keep theirs."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageSegmentation, AutoModelForUniversalSegmentation
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

# `transformers.AutoVideoProcessor` raises without torchvision; this one, which AutoProcessor asks, does not.
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .hub.families import IMAGES, VIDEOS
from .hub.push import register_push_to_hub
from .inference.pipeline import M2FImageSegmentationPipeline


def register() -> None:
    """Register "m2f" and "m2f_video" with the Auto classes, our pipeline and `push_to_hub`; again changes nothing.

    `exist_ok` is needed because `transformers` compares configuration classes by name and has a `Mask2FormerConfig` of
    its own; it looks models up by class, so the two do not meet.
    """
    for family in (IMAGES, VIDEOS):
        AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
        AutoModel.register(family.config, family.base_model, exist_ok=True)
        # The segmentation pipeline loads models by name through AutoModelForImageSegmentation. It must find video
        # models too, to say that it does not take them.
        for auto_class in (AutoModelForUniversalSegmentation, AutoModelForImageSegmentation):
            auto_class.register(family.config, family.model, exist_ok=True)
        # As AutoImageProcessor.register does, without its look at the stock processors of the same configuration name,
        # which complains where torchvision is missing.
        processors: Any = dict.fromkeys(("pil", "torchvision"), family.processor)
        IMAGE_PROCESSOR_MAPPING.register(family.config, processors, exist_ok=True)
    AutoVideoProcessor.register(VIDEOS.config, VIDEOS.processor, exist_ok=True)
    # In place: registering again would warn, and drop the task's default model.
    PIPELINE_REGISTRY.supported_tasks["image-segmentation"]["impl"] = M2FImageSegmentationPipeline
    register_push_to_hub()
