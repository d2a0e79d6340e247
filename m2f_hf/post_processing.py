"""From class and mask logits to segments in the frame of the image that came in.

Pure functions of the model's outputs; the thresholds a checkpoint knows live in the image processor. The arithmetic is
that of the original code: mask logits are enlarged to the padded input (four times their size), the padding is cropped,
the rest is resized to the target, and only then is anything decided (Mask2Former, arXiv 2112.01527, and the merging of
MaskFormer, arXiv 2107.06278, section 3.4). Both resizings are done for a few rows of the target at a time, so that no
tensor of queries x target pixels is ever written down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput


# The pixel decoder's mask features have stride 4, so the padded input is four times the mask logits.
MASK_STRIDE = 4

# Elements of the largest strip. On a CPU a strip should stay in the cache; on an accelerator launches are what costs.
STRIP_ELEMENTS = {"cpu": 2**20}
STRIP_ELEMENTS_ACCELERATOR = 2**25

Size = tuple[int, int]
Taps = tuple[Tensor, Tensor, Tensor]


class ImageOutputs(NamedTuple):
    """What the model said about one image: logits (Q, K+1) and (Q, h, w), and the sizes (height, width) in pixels."""

    class_logits: Tensor
    mask_logits: Tensor
    image_size: Size
    target_size: Size


# --- the batch ---


def split_batch(outputs: Any, target_sizes: Sequence[Size] | Tensor | None = None) -> Iterator[ImageOutputs]:
    """Takes a batch apart: one `ImageOutputs` per image.

    Args:
        outputs: has `class_queries_logits` (B, Q, K+1) and `masks_queries_logits` (B, Q, h, w), and may have
            `image_sizes` (B, 2), each image's height and width before padding. Without it nothing was padded.
        target_sizes: height and width to resize each image's result to; by default its size before padding.

    Raises:
        ValueError: as many target sizes as images are needed, all positive; an image larger than four times the masks.
    """
    class_logits, mask_logits = outputs.class_queries_logits.detach(), outputs.masks_queries_logits.detach()
    padded_size = (MASK_STRIDE * mask_logits.shape[-2], MASK_STRIDE * mask_logits.shape[-1])
    known_sizes = getattr(outputs, "image_sizes", None)
    image_sizes = [padded_size] * len(mask_logits) if known_sizes is None else _to_sizes(known_sizes)
    targets = image_sizes if target_sizes is None else _to_sizes(target_sizes)
    if len(targets) != len(mask_logits):
        raise ValueError(
            f"{len(targets)} target sizes for {len(mask_logits)} images: pass one (height, width) for each image"
        )
    for image_size, target_size in zip(image_sizes, targets, strict=True):
        if min(target_size) < 1:
            raise ValueError(f"target size {target_size} must be at least (1, 1); it is (height, width) in pixels")
        if image_size[0] > padded_size[0] or image_size[1] > padded_size[1]:
            raise ValueError(
                f"an image of {image_size} does not fit into {padded_size}, four times the size of the mask logits: "
                "were the inputs padded to a multiple of 32, and is `image_sizes` the size before padding?"
            )
    return (ImageOutputs(*of_image) for of_image in zip(class_logits, mask_logits, image_sizes, targets, strict=True))


def _to_sizes(sizes: Sequence[Size] | Tensor) -> list[Size]:
    rows = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    return [(int(height), int(width)) for height, width in rows]


# --- the two successive bilinear resizings, a strip of target rows at a time ---


def _bilinear_taps(size: int, new_size: int) -> Taps:
    """Lower neighbour, upper neighbour and the upper's weight for each of `new_size` positions, half-pixel centres.

    In float32, as `torch.nn.functional.interpolate` computes them: with large sizes the rounding of the position shows.
    """
    scale = torch.tensor(size, dtype=torch.float32) / new_size
    position = ((torch.arange(new_size, dtype=torch.float32) + 0.5) * scale - 0.5).clamp(min=0)
    low = position.long().clamp(max=size - 1)
    weight = position - low
    return low, torch.where(weight > 0, low + 1, low).clamp(max=size - 1), weight


def _resize_rows(masks: Tensor, taps: Taps) -> Tensor:
    """(N, h, w) -> (N, rows, w); in float32, as the weights are."""
    low, high, weight = (tap.to(masks.device) for tap in taps)
    weight = weight[:, None]
    return masks.index_select(1, low) * (1 - weight) + masks.index_select(1, high) * weight


def _resize_columns(masks: Tensor, width: int) -> Tensor:
    """(N, rows, w) -> (N, rows, width)."""
    if masks.shape[-1] == width:
        return masks
    return F.interpolate(masks, size=width, mode="linear", align_corners=False)


class Strip(NamedTuple):
    """Rows of the target, the queries that are in it (N',) int64, and their values (N' or C, rows, width) float32."""

    rows: slice
    queries: Tensor
    values: Tensor


def resized_strips(
    mask_logits: Tensor,
    image_size: Size,
    target_size: Size,
    *,
    num_channels: int | None = None,
    at_padded_size: Callable[[Tensor], Tensor] | None = None,
    above: float | None = None,
) -> Iterator[Strip]:
    """Enlarges mask logits to the padded input, crops the padding and resizes to the target, by horizontal strips.

    Args:
        mask_logits: (N, h, w), any floating dtype; the computation is in float32.
        image_size: height and width before padding, at most (4 h, 4 w).
        target_size: height and width of the result.
        num_channels: the most channels that the caller makes of the N, to bound the strip's memory by.
        at_padded_size: applied between the two resizings, (N, rows, width) -> (C, rows, width).
        above: where given, queries that nowhere in a strip exceed it are left out of that strip.

    Yields:
        Strips in the order of rows. The largest tensor has about `STRIP_ELEMENTS` elements, or one row of every channel
        where that is more.
    """
    channels = max(len(mask_logits), num_channels or 1, 1)
    queries = torch.arange(len(mask_logits), device=mask_logits.device)
    padded_width = MASK_STRIDE * mask_logits.shape[-1]
    strip_elements = STRIP_ELEMENTS.get(mask_logits.device.type, STRIP_ELEMENTS_ACCELERATOR)
    rows_per_strip = max(1, strip_elements // (channels * max(target_size[1], padded_width)))

    to_padded = _bilinear_taps(mask_logits.shape[-2], MASK_STRIDE * mask_logits.shape[-2])
    to_target = _bilinear_taps(image_size[0], target_size[0])
    for start in range(0, target_size[0], rows_per_strip):
        rows = slice(start, min(start + rows_per_strip, target_size[0]))
        low, high, weight = (tap[rows] for tap in to_target)
        # `source`: the rows of the padded input that this strip reads, each once.
        source, place = torch.unique(torch.stack([low, high]), return_inverse=True)
        values = _resize_rows(mask_logits, (to_padded[0][source], to_padded[1][source], to_padded[2][source]))
        if above is not None:
            # Every value to come is a weighted mean of these, so it exceeds nothing that they do not.
            queries = (values.amax((1, 2)) > above).nonzero()[:, 0]
            values = values[queries]
        values = _resize_columns(values, padded_width)[..., : image_size[1]]
        if at_padded_size is not None:
            values = at_padded_size(values)
        if image_size[0] != target_size[0]:
            values = _resize_rows(values, (place[0], place[1], weight))
        yield Strip(rows, queries, _resize_columns(values, target_size[1]))


# --- semantic ---


def semantic_segmentation(
    image: ImageOutputs, *, resize_before_inference: bool = True, return_scores: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Class of every pixel: argmax over classes of the sum over queries of class probability x mask probability.

    Args:
        image: one image of a batch (`split_batch`).
        resize_before_inference: masks are resized to the target before the product (panoptic and instance
            checkpoints); otherwise the product is taken at the padded size, cropped and resized (semantic-only ones).
        return_scores: also return the sums.

    Returns:
        (height, width) int64 and, if asked for, the scores (K, height, width) float32, at least 0 and up to Q.
    """
    class_probs = image.class_logits.float().softmax(-1)[:, :-1]
    num_labels = class_probs.shape[1]

    def product(mask_logits: Tensor) -> Tensor:
        # (Q, K) x (Q, rows, width) -> (K, rows, width)
        return torch.einsum("qk,qhw->khw", class_probs, mask_logits.sigmoid())

    device = image.mask_logits.device
    segmentation = torch.empty(image.target_size, dtype=torch.int64, device=device)
    all_scores = torch.empty(num_labels, *image.target_size, device=device) if return_scores else None
    strips = resized_strips(
        image.mask_logits,
        image.image_size,
        image.target_size,
        num_channels=num_labels,
        at_padded_size=None if resize_before_inference else product,
    )
    for rows, _, values in strips:
        scores = product(values) if resize_before_inference else values
        segmentation[rows] = scores.max(0).indices  # several times faster than argmax over the first axis
        if all_scores is not None:
            all_scores[:, rows] = scores
    return segmentation, all_scores


def post_process_semantic_segmentation(
    outputs: Any,
    target_sizes: Sequence[Size] | Tensor | None = None,
    return_segmentation_scores: bool = False,
    *,
    resize_before_inference: bool = True,
) -> list[Tensor] | list[SemanticSegmentationPostProcessorOutput]:
    """`semantic_segmentation` of every image of a batch, in `transformers`' form.

    Returns:
        One (height, width) int64 map of class ids per image; with `return_segmentation_scores` a
        `SemanticSegmentationPostProcessorOutput` of `segmentation` and `segmentation_scores` (K, height, width) each.
    """
    results = [
        semantic_segmentation(
            image, resize_before_inference=resize_before_inference, return_scores=return_segmentation_scores
        )
        for image in split_batch(outputs, target_sizes)
    ]
    if not return_segmentation_scores:
        return [segmentation for segmentation, _ in results]
    return [
        SemanticSegmentationPostProcessorOutput(data={"segmentation": segmentation, "segmentation_scores": scores})
        for segmentation, scores in results
    ]


# --- panoptic ---


def panoptic_segmentation(
    image: ImageOutputs,
    *,
    threshold: float = 0.8,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] | None = None,
) -> dict[str, Any]:
    """Merges the queries of one image into a map of segments that do not overlap (arXiv 2107.06278, section 3.4).

    A query is kept if its likeliest class is not "no object" and more probable than `threshold`. Each pixel goes to the
    kept query with the largest class probability x mask probability, if its mask probability there is at least
    `mask_threshold`, and is void otherwise. A query that wins less than `overlap_mask_area_threshold` of its own mask
    is dropped, and so is one without pixels; theirs become void.

    Args:
        label_ids_to_fuse: the stuff classes; all segments of such a class are one. None: not known, nothing is fused.

    Returns:
        `segmentation`, (height, width) int32, 0 is void; `segments_info`, one dict per segment in the order of ids,
        which count up from 1: `id`, `label_id`, `was_fused` (its class is one of `label_ids_to_fuse`), `isthing` (it is
        not; None where these are not known), `score` (0 to 1; the best of those fused), `area` in pixels and `bbox` as
        [x, y, width, height].
    """
    num_labels = image.class_logits.shape[-1] - 1
    scores, labels = image.class_logits.float().softmax(-1).max(-1)
    kept = (labels != num_labels) & (scores > threshold)
    scores, labels = scores[kept], labels[kept]

    winners, own_area, won_area, visible_area = _compete(image, image.mask_logits[kept], scores, mask_threshold)
    segment_of_query = [0] * len(scores) + [0]  # the last: pixels that no query covers
    segments: list[dict[str, Any]] = []
    fused: dict[int, dict[str, Any]] = {}
    queries = zip(scores.tolist(), labels.tolist(), own_area, won_area, visible_area, strict=True)
    for query, (score, label, own, won, visible) in enumerate(queries):
        if visible == 0 or won / own < overlap_mask_area_threshold:
            continue
        segment = fused.get(label)
        if segment is None:
            is_stuff = label in (label_ids_to_fuse or ())
            segment = {
                "id": len(segments) + 1,
                "label_id": label,
                "was_fused": is_stuff,
                "isthing": None if label_ids_to_fuse is None else not is_stuff,
                "score": 0.0,
                "area": 0,
            }
            segments.append(segment)
            if is_stuff:
                fused[label] = segment
        segment["score"] = max(segment["score"], round(score, 6))
        segment["area"] += visible
        segment_of_query[query] = segment["id"]

    segmentation = torch.tensor(segment_of_query, dtype=torch.int32, device=winners.device)[winners]
    for segment in segments:
        mask = segmentation == segment["id"]
        segment["bbox"] = _box(mask.any(1), mask.any(0))
    return {"segmentation": segmentation, "segments_info": segments}


def _compete(
    image: ImageOutputs, mask_logits: Tensor, scores: Tensor, mask_threshold: float
) -> tuple[Tensor, list[int], list[int], list[int]]:
    """Which of N queries gets each pixel, and what each has.

    Returns:
        The winning query per pixel, (height, width) int32, N where its mask probability is below `mask_threshold`; and
        per query the pixels of its mask, those it wins, and those it wins inside its mask.
    """
    num_queries = len(scores)
    device = scores.device
    winners = torch.full(image.target_size, num_queries, dtype=torch.int32, device=device)
    if num_queries == 0:
        return winners, [], [], []
    own_area = torch.zeros(num_queries, dtype=torch.int64, device=device)
    won_area, visible_area = torch.zeros_like(own_area), torch.zeros_like(own_area)
    for rows, _, values in resized_strips(mask_logits, image.image_size, image.target_size):
        probs = values.sigmoid()  # (N, rows, width)
        best = (probs * scores[:, None, None]).max(0).indices
        is_inside = probs.gather(0, best[None])[0] >= mask_threshold
        own_area += (probs >= mask_threshold).sum((1, 2))
        won_area += best.flatten().bincount(minlength=num_queries)
        visible_area += best[is_inside].bincount(minlength=num_queries)
        winners[rows] = best.masked_fill(~is_inside, num_queries).int()
    return winners, own_area.tolist(), won_area.tolist(), visible_area.tolist()


def post_process_panoptic_segmentation(
    outputs: Any,
    threshold: float = 0.8,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] | None = None,
    target_sizes: Sequence[Size] | Tensor | None = None,
) -> list[dict[str, Any]]:
    """`panoptic_segmentation` of every image of a batch. Nothing is fused where `label_ids_to_fuse` is None."""
    return [
        panoptic_segmentation(
            image,
            threshold=threshold,
            mask_threshold=mask_threshold,
            overlap_mask_area_threshold=overlap_mask_area_threshold,
            label_ids_to_fuse=None if label_ids_to_fuse is None else frozenset(label_ids_to_fuse),
        )
        for image in split_batch(outputs, target_sizes)
    ]


# --- instance ---


class _MaskStatistics(NamedTuple):
    area: Tensor  # (N,) int64
    mean_prob: Tensor  # (N,) float32, inside the mask
    rows: Tensor  # (N, height) bool, True where the mask has a pixel
    columns: Tensor  # (N, width) bool


def instance_segmentation(
    image: ImageOutputs,
    *,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    max_detections: int = 100,
    label_ids_to_drop: Collection[int] = (),
    return_coco_annotation: bool = False,
    return_binary_maps: bool = False,
) -> dict[str, Any]:
    """The best (query, class) pairs of one image, each with its own mask; masks may overlap.

    Of the `max_detections` most probable pairs those are kept whose class is not in `label_ids_to_drop` (stuff, for a
    panoptic checkpoint). The mask is where the mask probability exceeds `mask_threshold`; the score is the class
    probability x the mean mask probability inside the mask. Instances without a pixel or below `threshold` are left
    out (a threshold of 0 keeps every instance with a pixel).

    Returns:
        `segments_info`, by falling score, ids counting up from 0: `id`, `label_id`, `was_fused` (False), `isthing`
        (True), `score` (0 to 1), `area` in pixels and `bbox` as [x, y, width, height] of the whole mask; and
        `segmentation`: by default (height, width) int32, -1 where there is none and the better-scored id where
        instances overlap; (N, height, width) bool with `return_binary_maps`; a list of N COCO run-length encodings
        with `return_coco_annotation`.
    """
    class_probs = image.class_logits.float().softmax(-1)[:, :-1]
    num_labels = class_probs.shape[1]
    scores, pairs = class_probs.flatten().topk(min(max_detections, class_probs.numel()))
    labels = pairs % num_labels
    is_dropped = torch.isin(labels, torch.tensor(sorted(label_ids_to_drop), dtype=labels.dtype, device=labels.device))
    # The mean probability inside a mask is at most 1, so a pair below the threshold now will be below it later.
    candidates = ~is_dropped & (scores >= threshold)
    scores, labels = scores[candidates], labels[candidates]
    queries, of_query = torch.unique(pairs[candidates] // num_labels, return_inverse=True)

    statistics = _mask_statistics(image, image.mask_logits[queries], mask_threshold)
    scores = scores * statistics.mean_prob[of_query]
    kept = ((scores >= threshold) & (statistics.area[of_query] > 0)).nonzero()[:, 0]
    kept = kept[scores[kept].argsort(descending=True, stable=True)]
    segments = [
        {
            "id": index,
            "label_id": label,
            "was_fused": False,
            "isthing": True,
            "score": round(score, 6),
            "area": int(statistics.area[query]),
            "bbox": _box(statistics.rows[query], statistics.columns[query]),
        }
        for index, (label, score, query) in enumerate(
            zip(labels[kept].tolist(), scores[kept].tolist(), of_query[kept].tolist(), strict=True)
        )
    ]

    # Several classes may share a query: each mask is made once.
    queries, of_instance = torch.unique(queries[of_query[kept]], return_inverse=True)
    mask_logits = image.mask_logits[queries]
    segmentation: Tensor | list[dict[str, Any]]
    if return_coco_annotation:
        encodings = [_encode_query(image, mask_logits[i], mask_threshold) for i in range(len(queries))]
        segmentation = [encodings[i] for i in of_instance.tolist()]
    elif return_binary_maps:
        segmentation = _binary_maps(image, mask_logits, of_instance, mask_threshold)
    else:
        segmentation = _instance_map(image, mask_logits, of_instance, mask_threshold)
    return {"segmentation": segmentation, "segments_info": segments}


def _strips_above(
    image: ImageOutputs, mask_logits: Tensor, mask_threshold: float, num_channels: int = 1
) -> Iterator[tuple[Strip, Tensor]]:
    """Strips with the queries whose mask has a pixel there, and True where it has, (N', rows, width)."""
    # Compared as logits, since just above 0 a logit's sigmoid rounds to 0.5.
    threshold = torch.logit(torch.tensor(mask_threshold, dtype=torch.float64)).item()
    sizes = image.image_size, image.target_size
    for strip in resized_strips(mask_logits, *sizes, num_channels=num_channels, above=threshold):
        if len(strip.queries):
            yield strip, strip.values > threshold


def _mask_statistics(image: ImageOutputs, mask_logits: Tensor, mask_threshold: float) -> _MaskStatistics:
    num_queries, (height, width) = len(mask_logits), image.target_size
    area_of_row = torch.zeros(num_queries, height, dtype=torch.int64, device=mask_logits.device)
    prob_sum = torch.zeros(num_queries, device=mask_logits.device)
    has_column = torch.zeros(num_queries, width, dtype=torch.bool, device=mask_logits.device)
    for (rows, queries, values), is_inside in _strips_above(image, mask_logits, mask_threshold):
        area_of_row[queries, rows] = is_inside.sum(2)
        prob_sum[queries] += (values.sigmoid() * is_inside).sum((1, 2))
        has_column[queries] |= is_inside.any(1)
    area = area_of_row.sum(1)
    return _MaskStatistics(area, prob_sum / (area + 1e-6), area_of_row > 0, has_column)


def _instance_map(image: ImageOutputs, mask_logits: Tensor, of_instance: Tensor, mask_threshold: float) -> Tensor:
    """(height, width) int32: at each pixel the first instance whose mask covers it, -1 where none does."""
    num_instances, device = len(of_instance), mask_logits.device
    segmentation = torch.full(image.target_size, -1, dtype=torch.int32, device=device)
    ranks = torch.arange(num_instances, dtype=torch.int32, device=device)
    first = torch.full((len(mask_logits),), num_instances, dtype=torch.int32, device=device)
    first = first.scatter_reduce(0, of_instance, ranks, "amin")
    for (rows, queries, _), is_inside in _strips_above(image, mask_logits, mask_threshold):
        # (N', 1, 1) where (N', rows, width) -> (rows, width)
        best = torch.where(is_inside, first[queries, None, None], num_instances).amin(0)
        segmentation[rows] = best.masked_fill(best == num_instances, -1)
    return segmentation


def _binary_maps(image: ImageOutputs, mask_logits: Tensor, of_instance: Tensor, mask_threshold: float) -> Tensor:
    """(instances, height, width) bool; `of_instance` (instances,) says whose mask each instance has."""
    maps = torch.zeros(len(of_instance), *image.target_size, dtype=torch.bool, device=mask_logits.device)
    strips = _strips_above(image, mask_logits, mask_threshold, num_channels=len(of_instance))
    for (rows, queries, _), is_inside in strips:
        of_all = is_inside.new_zeros(len(mask_logits), *is_inside.shape[1:])
        of_all[queries] = is_inside
        maps[:, rows] = of_all[of_instance]
    return maps


def _encode_query(image: ImageOutputs, mask_logits: Tensor, mask_threshold: float) -> dict[str, Any]:
    """One query's mask, (h, w) logits, as run-length encoding; only this one is ever at full size."""
    own = torch.zeros(1, dtype=torch.int64, device=mask_logits.device)
    return encode_rle(_binary_maps(image, mask_logits[None], own, mask_threshold)[0])


def post_process_instance_segmentation(
    outputs: Any,
    threshold: float = 0.5,
    mask_threshold: float = 0.5,
    target_sizes: Sequence[Size] | Tensor | None = None,
    return_coco_annotation: bool = False,
    return_binary_maps: bool = False,
    *,
    max_detections: int = 100,
    label_ids_to_drop: Collection[int] | None = None,
) -> list[dict[str, Any]]:
    """`instance_segmentation` of every image of a batch.

    Raises:
        ValueError: if both `return_coco_annotation` and `return_binary_maps` are asked for.
    """
    if return_coco_annotation and return_binary_maps:
        raise ValueError("ask for return_coco_annotation or for return_binary_maps, not for both")
    return [
        instance_segmentation(
            image,
            threshold=threshold,
            mask_threshold=mask_threshold,
            max_detections=max_detections,
            label_ids_to_drop=frozenset(label_ids_to_drop or ()),
            return_coco_annotation=return_coco_annotation,
            return_binary_maps=return_binary_maps,
        )
        for image in split_batch(outputs, target_sizes)
    ]


class ClipOutputs(NamedTuple):
    """What the model said about one clip: logits (Q, K+1) and (Q, T, h, w), and the frames' sizes (height, width)."""

    class_logits: Tensor
    mask_logits: Tensor
    image_size: Size
    target_size: Size


def video_instance_segmentation(
    clip: ClipOutputs,
    *,
    threshold: float = 0.0,
    mask_threshold: float = 0.5,
    max_detections: int = 10,
    use_mask_quality: bool = False,
    return_coco_annotation: bool = False,
) -> dict[str, Any]:
    """The best (query, class) pairs of one clip, each with a mask in every frame; masks may overlap.

    As the original's (arXiv 2112.10764): the `max_detections` most probable pairs, scored by class probability alone,
    whether or not their masks have a pixel. Where `use_mask_quality` is set, the score is times the mean mask
    probability inside the mask, over all frames, as for images. Pairs below `threshold` are left out.

    Returns:
        `segments_info`, by falling score, ids counting up from 0: `id`, `label_id`, `score` (0 to 1) and `areas`, the
        pixels in each frame; and `segmentation`: (N, T, height, width) bool, or with `return_coco_annotation` for each
        of the N a list of T COCO run-length encodings, None for a frame without a pixel.
    """
    class_probs = clip.class_logits.float().softmax(-1)[:, :-1]
    scores, pairs = class_probs.flatten().topk(min(max_detections, class_probs.numel()))
    # Masks are at most certain, so a pair below the threshold now will be below it later.
    scores, pairs = scores[scores >= threshold], pairs[scores >= threshold]
    labels = pairs % class_probs.shape[1]
    queries, of_pair = torch.unique(pairs // class_probs.shape[1], return_inverse=True)
    frames = [
        ImageOutputs(clip.class_logits, of_frame, clip.image_size, clip.target_size)
        for of_frame in clip.mask_logits[queries].unbind(1)
    ]
    if use_mask_quality:
        statistics = [_mask_statistics(frame, frame.mask_logits, mask_threshold) for frame in frames]
        areas = torch.stack([of_frame.area for of_frame in statistics])  # (T, queries)
        sums = torch.stack([of_frame.mean_prob for of_frame in statistics]) * areas
        scores = scores * (sums.sum(0) / areas.sum(0).clamp(min=1))[of_pair]
    kept = (scores >= threshold).nonzero()[:, 0]
    kept = kept[scores[kept].argsort(descending=True, stable=True)]

    queries, of_track = torch.unique(of_pair[kept], return_inverse=True)  # classes may share a query
    own = torch.arange(len(queries), device=queries.device)
    areas_of_tracks: list[Tensor] = []
    masks: list[Any] = []
    for frame in frames:
        maps = _binary_maps(frame, frame.mask_logits[queries], own, mask_threshold)
        areas_of_tracks.append(maps.flatten(1).sum(1)[of_track])
        masks.append([encode_rle(mask) if mask.any() else None for mask in maps] if return_coco_annotation else maps)
    segments = [
        {"id": index, "label_id": label, "score": round(score, 6), "areas": of_frames}
        for index, (label, score, of_frames) in enumerate(
            zip(labels[kept].tolist(), scores[kept].tolist(), torch.stack(areas_of_tracks, 1).tolist(), strict=True)
        )
    ]
    segmentation: Tensor | list[Any]
    if return_coco_annotation:
        segmentation = [[of_frame[track] for of_frame in masks] for track in of_track.tolist()]
    else:
        segmentation = torch.stack(masks, 1)[of_track]
    return {"segmentation": segmentation, "segments_info": segments}


def post_process_video_instance_segmentation(
    outputs: Any, target_sizes: Sequence[Size] | Tensor | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """`video_instance_segmentation` of every clip of a batch; `settings` go to it.

    Raises:
        ValueError: as `split_batch`.
    """
    return [video_instance_segmentation(ClipOutputs(*clip), **settings) for clip in split_batch(outputs, target_sizes)]


# --- forms of a mask ---


def _box(has_row: Tensor, has_column: Tensor) -> list[int]:
    """[x, y, width, height] in pixels, from (height,) and (width,) bool: True where the mask has a pixel."""
    ys, xs = has_row.nonzero()[:, 0], has_column.nonzero()[:, 0]
    x, y = int(xs[0]), int(ys[0])
    return [x, y, int(xs[-1]) + 1 - x, int(ys[-1]) + 1 - y]


def encode_rle(mask: Tensor | np.ndarray) -> dict[str, Any]:
    """COCO's compressed run-length encoding of a (height, width) bool mask.

    Returns:
        `size` [height, width] and `counts`, a string: the lengths of the runs down the columns, of zeros first, each
        from the fourth on as the difference to the one two before, in groups of 5 bits, lowest first, as printable
        characters. `pycocotools.mask.decode` reads it.
    """
    array = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    pixels = array.T.astype(bool).ravel()
    ends = np.flatnonzero(np.diff(pixels, prepend=False))  # a first pixel of 1 gives an empty first run
    runs = np.diff(ends, prepend=0, append=pixels.size).astype(np.int64)
    runs[3:] -= runs[1:-2]  # NumPy reads before it writes where the two overlap

    groups, goes_on = [], [np.ones(len(runs), dtype=bool)]
    rest = runs
    while goes_on[-1].any():
        group, rest = rest & 0x1F, rest >> 5
        # The top bit of the last group is the sign, so a number ends where the rest is nothing but that sign.
        more = np.where(group & 0x10, rest != -1, rest != 0) & goes_on[-1]
        groups.append(group + 0x20 * more + 48)
        goes_on.append(more)
    is_written = np.stack(goes_on[:-1], axis=1)  # (runs, groups)
    counts = np.stack(groups, axis=1)[is_written].astype(np.uint8).tobytes().decode("ascii")
    return {"size": [int(array.shape[0]), int(array.shape[1])], "counts": counts}
