"""Measure the same weights with transformers' own image processor, for comparisons."""

from __future__ import annotations

from typing import Any

from transformers import Mask2FormerImageProcessorPil

from ..processing.image_processor import M2FImageProcessor
from ..processing.rle import encode_rle


class StockProcessor:
    """transformers' image processor with a checkpoint's settings; its results in the form that `Evaluation` reads.

    It stretches an image to a multiple of 32 and its post-processing knows nothing of padding, so images must come one
    by one. Segments without a pixel are left out, and of entries with one id the first stands (a fused class is listed
    once for each of its queries; and the id after a fused segment may be one that was given before).

    Raises:
        ValueError: for a checkpoint trained on BGR, which transformers cannot feed.
    """

    def __init__(self, processor: M2FImageProcessor) -> None:
        if processor.channel_order != "RGB":
            raise ValueError("transformers' image processor has no BGR: this checkpoint can be measured with ours only")
        self.ours, self.instance_threshold = processor, processor.instance_threshold
        names = ("size", "image_mean", "image_std", "rescale_factor", "resample", "size_divisor")
        self.stock = Mask2FormerImageProcessorPil(**{name: getattr(processor, name) for name in names})

    def __call__(self, images: list[Any], return_tensors: str) -> Any:
        if len(images) != 1:
            raise ValueError("transformers' processing does not undo padding: take a batch size of 1")
        return self.stock(images, return_tensors=return_tensors)

    def post_process_panoptic_segmentation(self, outputs: Any, target_sizes: Any) -> list[dict[str, Any]]:
        results = self.stock.post_process_panoptic_segmentation(
            outputs,
            threshold=self.ours.threshold,
            mask_threshold=self.ours.mask_threshold,
            overlap_mask_area_threshold=self.ours.overlap_mask_area_threshold,
            label_ids_to_fuse=set(self.ours.label_ids_to_fuse or ()),
            target_sizes=target_sizes,
        )
        for result in results:
            result["segmentation"] = result["segmentation"].int().clamp(min=0)  # -1 where nothing was found
            present = set(result["segmentation"].unique().tolist())
            first = {info["id"]: info for info in reversed(result["segments_info"])}
            result["segments_info"] = [info for segment_id, info in sorted(first.items()) if segment_id in present]
        return results

    def post_process_instance_segmentation(
        self, outputs: Any, threshold: float, target_sizes: Any, return_coco_annotation: bool
    ) -> list[dict[str, Any]]:
        assert return_coco_annotation
        results = self.stock.post_process_instance_segmentation(
            outputs, threshold, self.ours.mask_threshold, target_sizes=target_sizes, return_binary_maps=True
        )
        for result in results:  # with nothing found `segmentation` is a map
            masks = result["segmentation"] if result["segments_info"] else []
            result["segmentation"] = [encode_rle(mask > 0) for mask in masks]
        return results

    def post_process_semantic_segmentation(self, outputs: Any, target_sizes: Any) -> Any:
        return self.stock.post_process_semantic_segmentation(outputs, target_sizes=target_sizes)
