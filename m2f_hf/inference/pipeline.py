"""The `image-segmentation` pipeline, for which a checkpoint's own task, stuff classes and thresholds hold."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import ImageSegmentationPipeline

from ..model.configuration import Mask2FormerVideoConfig
from ..processing.image_processor import M2FImageProcessor
from ..processing.images import ADDRESSES, read_image


PADDED_INPUTS = ("pixel_values", "pixel_mask")


def _pad_together(images: list[Any]) -> torch.Tensor:
    """Pad (..., h, w) of any sizes, or lists of these, to (B, ..., H, W) with zeros at the bottom and right."""
    images = [image for item in images for image in (item if isinstance(item, list) else [item])]
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    return torch.stack([F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images])


class M2FImageSegmentationPipeline(ImageSegmentationPipeline):
    """`transformers`' pipeline, unchanged for every model but ours.

    The stock one always passes the thresholds 0.9, 0.5 and 0.5 and segments panoptically whenever it can. For our
    models only what the caller gave is passed on, the rest is the checkpoint's, and images are read by `read_image`.
    With `batch_size`, images of different sizes are padded together.

    Results are the stock pipeline's, a list of `{"score", "label", "mask"}` for each image: the mask a Pillow image of
    mode "L" (0 or 255) of the image's size, the score None in semantic segmentation. Masks of instances may overlap;
    the list is then sorted by score.

    Raises:
        ValueError: a video model, which takes clips.
    """

    # A published checkpoint names its image processor's code. Looked up as a video processor it would not be known, and
    # `transformers` would ask at the terminal whether to fetch and run it.
    _load_video_processor: Any = False

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(model.config, Mask2FormerVideoConfig):
            raise ValueError(
                f"{model.config.name_or_path or 'this model'} is a video model, and this pipeline takes images: give "
                "clips to `Mask2FormerForVideoSegmentation` and `Mask2FormerVideoProcessor`, or name an image model"
            )
        super().__init__(model, *args, **kwargs)

    def preprocess(  # type: ignore[override]
        self, image: Any, subtask: Any = None, timeout: float | None = None
    ) -> Any:
        """Return the model's inputs of one image; ours as lists, so images of different sizes can be batched."""
        if not isinstance(self.image_processor, M2FImageProcessor):
            return super().preprocess(image, subtask=subtask, timeout=timeout)
        if (
            isinstance(image, str)
            and "." not in image
            and not image.startswith(ADDRESSES)
            and not os.path.exists(image)
        ):
            image = f"data:image/png;base64,{image}"  # which the stock pipeline takes by itself
        pixels = read_image(image, timeout=timeout)  # (3, H, W)
        inputs: Any = self.image_processor(pixels, input_data_format="channels_first", return_tensors="pt")
        inputs = inputs.to(self.dtype)
        inputs.update({name: list(inputs[name]) for name in PADDED_INPUTS})
        inputs["target_size"] = [pixels.shape[1:]]
        return inputs

    def _forward(self, model_inputs: Any) -> Any:  # type: ignore[override]
        if isinstance(self.image_processor, M2FImageProcessor):
            model_inputs.update({name: _pad_together(model_inputs[name]) for name in PADDED_INPUTS})
        return super()._forward(model_inputs)

    def postprocess(self, model_outputs: Any, subtask: Any = None, **thresholds: Any) -> Any:  # type: ignore[override]
        """Return the segments of one image.

        Args:
            model_outputs: the model's, with `target_size`.
            subtask: "panoptic", "instance" or "semantic"; for our models None is the checkpoint's task.
            thresholds: those of `threshold`, `mask_threshold`, `overlap_mask_area_threshold` that the caller gave.

        Raises:
            ValueError: a subtask that does not exist.
        """
        processor = self.image_processor
        if not isinstance(processor, M2FImageProcessor):
            return super().postprocess(model_outputs, subtask=subtask, **thresholds)
        task = processor.task if subtask is None else subtask
        target_sizes = model_outputs["target_size"]
        if task == "semantic":
            classes = processor.post_process(model_outputs, task, target_sizes=target_sizes)[0].cpu().numpy()
            return [self._annotation(None, label, classes == label) for label in np.unique(classes).tolist()]

        binary_maps = {"return_binary_maps": True} if task == "instance" else {}
        result = processor.post_process(model_outputs, task, target_sizes=target_sizes, **binary_maps, **thresholds)[0]
        segmentation = result["segmentation"].cpu().numpy()
        return [
            self._annotation(
                segment["score"],
                segment["label_id"],
                segmentation[index] if binary_maps else segmentation == segment["id"],
            )
            for index, segment in enumerate(result["segments_info"])
        ]

    def _annotation(self, score: float | None, label_id: int, mask: np.ndarray) -> dict[str, Any]:
        labels: dict[int, str] = self.model.config.id2label  # type: ignore[assignment]
        return {"score": score, "label": labels[label_id], "mask": Image.fromarray(mask.astype(np.uint8) * 255)}
