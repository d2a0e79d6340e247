"""The `image-segmentation` pipeline, for which a checkpoint's own task, stuff classes and thresholds hold."""

from typing import Any

import numpy as np
from PIL import Image
from transformers import ImageSegmentationPipeline

from .image_processing_mask2former import M2FImageProcessor


class M2FImageSegmentationPipeline(ImageSegmentationPipeline):
    """`transformers`' pipeline, unchanged for every model but ours.

    The stock one always passes the thresholds 0.9, 0.5 and 0.5 and segments panoptically whenever it can. For our
    models only what the caller gave is passed on; the rest is the checkpoint's.

    Results are those of the stock pipeline, a list of `{"score", "label", "mask"}` for each image: the mask a Pillow
    image of mode "L" (0 or 255) of the image's size, the score None in semantic segmentation. Masks of instances may
    overlap; the list is then sorted by score.
    """

    def postprocess(self, model_outputs: Any, subtask: Any = None, **thresholds: Any) -> Any:  # type: ignore[override]
        """Segments of one image.

        Args:
            model_outputs: the model's, with `target_size`.
            subtask: "panoptic", "instance" or "semantic"; for our models None is the checkpoint's task.
            thresholds: `threshold`, `mask_threshold`, `overlap_mask_area_threshold`, as far as given by the caller.

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
