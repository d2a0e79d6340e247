"""Test-time augmentation: semantic segmentation from several sizes of an image and their mirror images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.image_utils import SizeDict


SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Times the checkpoint's own size: the original's settings for ADE20K, Cityscapes and Mapillary."""


@torch.no_grad()
def semantic_scores_with_augmentation(
    model: nn.Module,
    processor: Any,
    image: Any,
    *,
    shortest_edges: Sequence[int] | None = None,
    longest_edge: int | None = None,
    flip: bool = True,
    target_size: tuple[int, int] | None = None,
) -> Tensor:
    """Average the scores of every class at every pixel over several sizes of an image, each as it is and mirrored.

    As the original's `SemanticSegmentorWithTTA`: each view is segmented by itself, its scores are resized to the target
    and mirrored back, and scores are averaged, not decisions. (The original's own evaluation resizes an image to the
    checkpoint's size before these sizes are made of it; here they are made of `image`.)

    Args:
        model: a Mask2Former of this package or of transformers, in evaluation mode.
        processor: its `M2FImageProcessor`.
        image: one image, anything that the processor takes.
        shortest_edges: sizes in pixels; None: `SCALES` times the processor's shortest edge.
        longest_edge: bound on the longer side; None: the processor's, enlarged by the largest scale.
        flip: also take the mirror images.
        target_size: height and width of the result; None: the image's own.

    Returns:
        (num_labels, height, width) float32, at least 0; their argmax over classes is the segmentation.

    Raises:
        ValueError: no size, or a processor that stretches images, so that sizes must be given.
    """
    pixels = processor.process_image(image)  # (3, H, W)
    shortest_edges, longest_edge = _sizes(processor, shortest_edges, longest_edge)
    target_size = (pixels.shape[-2], pixels.shape[-1]) if target_size is None else target_size
    device = next(model.parameters()).device
    total: Tensor | None = None
    count = 0
    for view, is_mirrored in _views(processor, pixels, shortest_edges, longest_edge, flip):
        inputs = processor(view, do_resize=False, input_data_format="channels_first", return_tensors="pt")
        outputs = model(pixel_values=inputs["pixel_values"].to(device), pixel_mask=inputs["pixel_mask"].to(device))
        result = processor.post_process_semantic_segmentation(
            outputs, target_sizes=[target_size], return_segmentation_scores=True
        )[0]
        scores = result["segmentation_scores"]
        scores = scores.flip(-1) if is_mirrored else scores
        total = scores if total is None else total + scores
        count += 1
    assert total is not None
    return total / count


def _sizes(
    processor: Any, shortest_edges: Sequence[int] | None, longest_edge: int | None
) -> tuple[Sequence[int], int | None]:
    own = processor.size
    if shortest_edges is None:
        if not own.get("shortest_edge"):
            raise ValueError(f"the processor's size {dict(own)} has no shortest_edge to scale: give shortest_edges")
        shortest_edges = [int(scale * own["shortest_edge"] + 0.5) for scale in SCALES]
    if not shortest_edges:
        raise ValueError("shortest_edges is empty: give at least one size in pixels")
    if longest_edge is None and own.get("longest_edge"):
        longest_edge = int(max(SCALES) * own["longest_edge"] + 0.5)
    return shortest_edges, longest_edge


def _views(
    processor: Any, pixels: np.ndarray, shortest_edges: Sequence[int], longest_edge: int | None, flip: bool
) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield each resized image (3, h, w), then its mirror image, made after resizing as in the original."""
    for shortest_edge in shortest_edges:
        size = SizeDict(shortest_edge=shortest_edge, longest_edge=longest_edge)
        resized = processor.resize(pixels, size, processor.resample)
        yield resized, False
        if flip:
            yield np.ascontiguousarray(resized[..., ::-1]), True
