"""From class and mask logits to segments in the frame of the image that came in.

Pure functions of the model's outputs; the thresholds a checkpoint knows live in the image processor. The arithmetic is
that of the original code: mask logits are enlarged to the padded input (four times their size), the padding is cropped,
the rest is resized to the target, and only then is anything decided (Mask2Former, arXiv 2112.01527, and the merging of
MaskFormer, arXiv 2107.06278, section 3.4). Both resizings are done for a tile of the target at a time and for the
queries that may change what is decided there, so that no tensor of queries x target pixels is ever written down.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput

from .mask_tiles import MASK_STRIDE, MaskTiles, Size


# Relative: more than a score is rounded by, be it a probability times a sigmoid or a sum of a hundred of them.
SCORE_ROUNDING = 1e-5

# Masks that move no semantic score by more, all together, count as constant in a tile. The rounding of such a sum in
# float32 is no less.
NEGLIGIBLE = 1e-6

ROWS_AT_ONCE = 32


class ImageOutputs(NamedTuple):
    """What the model said about one image: logits (Q, K+1) and (Q, h, w), and the sizes (height, width) in pixels."""

    class_logits: Tensor
    mask_logits: Tensor
    image_size: Size
    target_size: Size


# --- the batch ---


def split_batch(
    outputs: Any, target_sizes: Sequence[Size] | Tensor | None = None, *, of_clips: bool = False
) -> Iterator[ImageOutputs]:
    """Takes a batch apart: one `ImageOutputs` per image.

    Args:
        outputs: has `class_queries_logits` (B, Q, K+1) and `masks_queries_logits` (B, Q, h, w), and may have
            `image_sizes` (B, 2), each image's height and width before padding. Without it nothing was padded.
        target_sizes: height and width to resize each image's result to; by default its size before padding.
        of_clips: whether the masks are (B, Q, T, h, w), of clips, whose frames have one size.

    Raises:
        ValueError: as many target sizes as images are needed, all positive; an image larger than four times the masks;
            outputs of images where clips are meant, or the other way round.
    """
    class_logits, mask_logits = outputs.class_queries_logits.detach(), outputs.masks_queries_logits.detach()
    if mask_logits.dim() != 4 + of_clips:
        of_what, fix = (
            ("an image model's", "post-process them with `M2FImageProcessor`")
            if of_clips
            else ("a video model's", "use `Mask2FormerVideoProcessor.post_process_video_instance_segmentation`")
        )
        raise ValueError(f"`masks_queries_logits` of {tuple(mask_logits.shape)} are {of_what}: {fix}")
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
    try:
        return [(int(height), int(width)) for height, width in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{sizes} is no list of sizes: pass one (height, width) in pixels for each image, [(480, 640)] for one"
        ) from error


# --- settings ---


def check_probabilities(**values: float) -> None:
    """
    Raises:
        ValueError: one that is not from 0 to 1, by its name.
    """
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} {value} is not a probability or ratio from 0 to 1")


def check_max_detections(number: int) -> None:
    """
    Raises:
        ValueError: fewer than one.
    """
    if number < 1:
        raise ValueError(f"max_detections must be at least 1, not {number}")


# --- decisions in a tile ---

# Comparisons and reductions of booleans take a CPU ten times as long as arithmetic in float32. In a tile, therefore,
# 1.0 stands for True, and indices are floats.


def _is_positive(values: Tensor) -> Tensor:
    """1 where a value is above 0, and else 0; in place."""
    return values.sign_().clamp_min_(0)


def _least_label_of_the_largest(values: Tensor, labels: Tensor) -> Tensor:
    """What the largest of N values is called at each pixel, and the least name where several are the largest.

    Args:
        values: (N, rows, columns) float32, overwritten.
        labels: (N, rows, columns) or (N, 1, 1) float32, whole numbers from 0 to 2**22.

    Returns:
        (rows, columns) float32.
    """
    is_less = values.sub_(values.amax(0)).sign_()  # -1; 0 for the largest
    return torch.add(labels, is_less, alpha=-(2.0**23)).amin(0)


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
    device = image.mask_logits.device
    segmentation = torch.empty(image.target_size, dtype=torch.int64, device=device)
    all_scores = torch.empty(num_labels, *image.target_size, device=device) if return_scores else None
    labels = torch.arange(num_labels, dtype=torch.float32, device=device)
    tiles = MaskTiles(image.mask_logits, image.image_size, image.target_size, num_labels)
    contest = _semantic_contest(tiles, class_probs.cpu(), everything=return_scores)
    rest = contest.rest.to(device)
    members = tiles.members(contest.can_win), tiles.members(contest.matters)
    for index, (tile, classes, queries) in enumerate(zip(tiles, *members, strict=True)):
        if len(classes) == 1 and not return_scores:
            segmentation[tile.place] = classes
            continue
        # (c, n), and what the other queries add for each class
        weights = class_probs.index_select(0, queries).index_select(1, classes).T
        rest_of_tile = rest[:, index].index_select(0, classes)[:, None]

        def product(mask_logits: Tensor, weights: Tensor = weights, rest_of_tile: Tensor = rest_of_tile) -> Tensor:
            # (c, n) x (n, rows, columns) -> (c, rows, columns)
            scores = torch.addmm(rest_of_tile, weights, mask_logits.sigmoid_().flatten(1))
            return scores.unflatten(1, mask_logits.shape[1:])

        if resize_before_inference:
            scores = product(tiles.logits(tile, queries))
        else:
            scores = tiles.logits(tile, queries, at_padded_size=product)
        if all_scores is not None:
            all_scores[(slice(None), *tile.place)] = scores
        segmentation[tile.place] = _least_label_of_the_largest(scores, labels.index_select(0, classes)[:, None, None])
    return segmentation, all_scores


class _SemanticContest(NamedTuple):
    can_win: Tensor  # (K, tile rows, tile columns) bool
    matters: Tensor  # (Q, tile rows, tile columns) bool
    rest: Tensor  # (K, tiles) float32: what the queries that do not matter add to the scores


def _semantic_contest(tiles: MaskTiles, class_probs: Tensor, everything: bool) -> _SemanticContest:
    """Which classes can be the best of a tile, and which queries' masks matter to that.

    A class cannot, if its score is everywhere less than the least of another's. Masks of so little weight, or so little
    change in the tile, that all of them together move no score by more than `NEGLIGIBLE` count as their mean.
    """
    # In float64, whose rounding is nothing beside the margins: (Q, tiles)
    low, high = (bound.flatten(1).double().sigmoid() for bound in (tiles.low, tiles.high))
    class_probs = class_probs.double()
    if everything:
        can_win, is_negligible = low.new_ones(class_probs.shape[1], low.shape[1]).bool(), torch.zeros_like(low).bool()
    else:
        upper = class_probs.T @ high  # (K, tiles)
        can_win = upper * (1 + SCORE_ROUNDING) + 2 * NEGLIGIBLE >= (class_probs.T @ low).amax(0)
        half_ranges, order = (class_probs.amax(1, keepdim=True) * (high - low) / 2).sort(0)
        is_negligible = torch.empty_like(low, dtype=torch.bool)
        is_negligible.scatter_(0, order, half_ranges.cumsum(0) <= NEGLIGIBLE)
    rest = class_probs.T @ ((low + high) / 2 * is_negligible)
    grid = tiles.pixels.shape
    return _SemanticContest(can_win.unflatten(1, grid), ~is_negligible.unflatten(1, grid), rest.float())


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
    check_probabilities(
        threshold=threshold,
        mask_threshold=mask_threshold,
        overlap_mask_area_threshold=overlap_mask_area_threshold,
    )
    kept, scores, labels = _likely(image.class_logits, threshold)
    segmentation, contest = _compete(image, image.mask_logits[kept], scores, mask_threshold)
    visible = contest.rows.sum(1)
    segments, segment_of_query = _merge(
        scores, labels, contest.own_area, contest.won_area, visible, overlap_mask_area_threshold, label_ids_to_fuse
    )
    areas = visible.tolist()
    for segment, of_segment in zip(segments, _queries_of(segments, segment_of_query), strict=True):
        segment["area"] = sum(areas[query] for query in of_segment)
        segment["bbox"] = _box(contest.rows[of_segment].any(0), contest.columns[of_segment].any(0))
    _write_ids(segmentation, segment_of_query)
    return {"segmentation": segmentation, "segments_info": segments}


def _likely(class_logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """The queries (N,) whose likeliest class is not "no object" and above the threshold, its probability, the class."""
    scores, labels = class_logits.float().softmax(-1).max(-1)
    kept = ((labels != class_logits.shape[-1] - 1) & (scores > threshold)).nonzero()[:, 0]
    return kept, scores[kept], labels[kept]


def _merge(
    scores: Tensor,
    labels: Tensor,
    own_area: Tensor,
    won_area: Tensor,
    visible: Tensor,
    overlap_mask_area_threshold: float,
    label_ids_to_fuse: Collection[int] | None,
) -> tuple[list[dict[str, Any]], list[int]]:
    """The segments that N queries make, in the order of ids, which count up from 1, and each query's, 0 for none.

    Args:
        own_area, won_area, visible: (N,), the pixels of each mask, those it wins, and of these those inside of it.
    """
    segment_of_query = [0] * len(scores)
    segments: list[dict[str, Any]] = []
    fused: dict[int, dict[str, Any]] = {}
    areas = (area.tolist() for area in (own_area, won_area, visible))
    queries = zip(scores.tolist(), labels.tolist(), *areas, strict=True)
    for query, (score, label, own, won, has_pixels) in enumerate(queries):
        if not has_pixels or won / own < overlap_mask_area_threshold:
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
            }
            segments.append(segment)
            if is_stuff:
                fused[label] = segment
        segment["score"] = max(segment["score"], round(score, 6))
        segment_of_query[query] = segment["id"]
    return segments, segment_of_query


def _queries_of(segments: list[dict[str, Any]], segment_of_query: list[int]) -> list[list[int]]:
    return [[query for query, of_query in enumerate(segment_of_query) if of_query == info["id"]] for info in segments]


def _write_ids(codes: Tensor, segment_of_query: list[int]) -> None:
    """In place: codes of `_compete` -> ids of segments, 0 where none is."""
    ids = torch.tensor([[segment, 0] for segment in segment_of_query], dtype=torch.int32, device=codes.device)
    for rows in codes.split(ROWS_AT_ONCE) if segment_of_query else ():
        rows.copy_(ids.flatten().index_select(0, rows.flatten()).view_as(rows))


class _PanopticContest(NamedTuple):
    own_area: Tensor  # (N,) pixels of each query's mask
    won_area: Tensor  # (N,) those it wins
    rows: Tensor  # (N, height) those it wins inside its mask, row by row
    columns: Tensor  # (N, width)


def _compete(
    image: ImageOutputs, mask_logits: Tensor, scores: Tensor, mask_threshold: float
) -> tuple[Tensor, _PanopticContest]:
    """Which of N queries gets each pixel, and what each has.

    Returns:
        (height, width) int32, twice the index of the query that wins, and 1 more outside of its mask; 0 if N is.
    """
    num_queries, device = len(scores), scores.device
    codes = torch.zeros(image.target_size, dtype=torch.int32, device=device)
    if num_queries == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return codes, _PanopticContest(nothing, nothing, nothing[:, None], nothing[:, None])
    tiles = MaskTiles(mask_logits, image.image_size, image.target_size)
    threshold = _to_logit(mask_threshold)

    # What the bounds decide. A tile is settled if only one query can win it, and its mask has all of it or nothing.
    is_full, is_empty = tiles.low >= threshold, tiles.high < threshold
    low, high = (bound.sigmoid() * scores.cpu()[:, None, None] for bound in (tiles.low, tiles.high))
    can_win = high * (1 + SCORE_ROUNDING) >= low.amax(0)
    is_settled = (can_win.sum(0) == 1) & (can_win & (is_full | is_empty)).any(0)
    wins_all = can_win & is_settled
    plays = can_win & ~is_settled
    own_area = (tiles.pixels * (is_full & ~plays)).sum((1, 2)).to(device)
    won_area = (tiles.pixels * wins_all).sum((1, 2)).to(device)
    rows, columns = (
        spread(((wins_all & is_full) * sides).sum(axis))
        for spread, sides, axis in ((tiles.rows_of, tiles.widths, 2), (tiles.columns_of, tiles.heights[:, None], 1))
    )
    code_of_settled = (2 * wins_all.int().argmax(0) + (wins_all & is_empty).any(0)).flatten().tolist()

    # What has to be looked at: in each tile the queries that play, and after them others with a part of it as mask.
    only_covers = ~(is_full | is_empty | plays)
    members = tiles.members(torch.cat([plays, only_covers]))
    num_players = plays.sum(0).flatten().tolist()
    labels = 2.0 * torch.arange(num_queries, device=device)
    offsets = torch.arange(tiles.side, dtype=torch.int32, device=device) * 2 * num_queries
    for tile, code, count, of_tile in zip(tiles, code_of_settled, num_players, members, strict=True):
        if count == 0:
            codes[tile.place] = code
        if len(of_tile) == 0:
            continue
        queries = of_tile % num_queries
        logits = tiles.logits(tile, queries)  # (n, rows, columns)
        is_outside = _is_positive(threshold - logits)  # 0 or 1
        own_area.index_add_(0, queries, (logits[0].numel() - is_outside.sum((1, 2))).long())
        if count == 0:
            continue
        players = queries[:count]
        values = logits[:count].sigmoid_().mul_(scores.index_select(0, players)[:, None, None])
        code_of_query = is_outside[:count].add_(labels.index_select(0, players)[:, None, None])
        best = _least_label_of_the_largest(values, code_of_query).int()
        codes[tile.place] = best
        height, width = best.shape
        in_row, in_column = (
            (best + of_line).flatten().bincount(minlength=lines * 2 * num_queries).view(lines, num_queries, 2)
            for of_line, lines in ((offsets[:height, None], height), (offsets[:width], width))
        )
        won_area += in_row.sum((0, 2))
        rows[:, tile.place[0]] += in_row[..., 0].T
        columns[:, tile.place[1]] += in_column[..., 0].T
    return codes, _PanopticContest(own_area, won_area, rows, columns)


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
    check_probabilities(threshold=threshold, mask_threshold=mask_threshold)
    check_max_detections(max_detections)
    class_probs = image.class_logits.float().softmax(-1)[:, :-1]
    num_labels = class_probs.shape[1]
    scores, pairs = class_probs.flatten().topk(min(max_detections, class_probs.numel()))
    labels = pairs % num_labels
    # The mean probability inside a mask is at most 1, so a pair below the threshold now will be below it later.
    candidates = ~_is_one_of(labels, label_ids_to_drop) & (scores >= threshold)
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
        segmentation = _binary_maps(image, image.mask_logits[queries[of_instance]], mask_threshold)
    else:
        segmentation = _instance_map(image, mask_logits, of_instance, mask_threshold)
    return {"segmentation": segmentation, "segments_info": segments}


def _is_one_of(labels: Tensor, label_ids: Collection[int]) -> Tensor:
    return torch.isin(labels, torch.tensor(sorted(label_ids), dtype=labels.dtype, device=labels.device))


def _mask_statistics(image: ImageOutputs, mask_logits: Tensor, mask_threshold: float) -> _MaskStatistics:
    num_queries, device = len(mask_logits), mask_logits.device
    tiles = MaskTiles(mask_logits, image.image_size, image.target_size)
    threshold = _to_logit(mask_threshold)
    rows, columns = (torch.zeros(num_queries, side, device=device) for side in image.target_size)
    prob_sums = torch.zeros(num_queries, tiles.pixels.numel(), device=device)
    for index, (tile, queries) in enumerate(zip(tiles, tiles.members(tiles.high > threshold), strict=True)):
        if not len(queries):
            continue
        logits = tiles.logits(tile, queries)  # (n, rows, columns)
        is_inside = _is_positive(logits - threshold)
        rows[:, tile.place[0]].index_add_(0, queries, is_inside.sum(2))
        columns[:, tile.place[1]].index_add_(0, queries, is_inside.sum(1))
        prob_sums[:, index].index_add_(0, queries, logits.sigmoid_().mul_(is_inside).sum((1, 2)))
    area = rows.long().sum(1)
    return _MaskStatistics(area, prob_sums.sum(1) / (area + 1e-6), rows > 0, columns > 0)


def _instance_map(image: ImageOutputs, mask_logits: Tensor, of_instance: Tensor, mask_threshold: float) -> Tensor:
    """(height, width) int32: at each pixel the first instance whose mask covers it, -1 where none does."""
    num_instances, device = len(of_instance), mask_logits.device
    segmentation = torch.full(image.target_size, -1, dtype=torch.int32, device=device)
    if num_instances == 0:
        return segmentation
    ranks = torch.arange(num_instances, dtype=torch.int32, device=device)
    first = torch.full((len(mask_logits),), num_instances, dtype=torch.int32, device=device)
    first = first.scatter_reduce(0, of_instance, ranks, "amin")

    tiles = MaskTiles(mask_logits, image.image_size, image.target_size)
    threshold = _to_logit(mask_threshold)
    first_of_query = first.cpu()[:, None, None]
    # The first that has all of a tile hides those after it.
    first_full = torch.where(tiles.low > threshold, first_of_query, num_instances).amin(0)
    members = tiles.members((tiles.high > threshold) & (first_of_query < first_full))
    for tile, whole, queries in zip(tiles, first_full.flatten().tolist(), members, strict=True):
        if len(queries):
            is_inside = _is_positive(tiles.logits(tile, queries).sub_(threshold))
            # How many come after it, from 1 on, and 0 outside of the mask: (n, rows, columns)
            behind = is_inside.mul_((num_instances - first.index_select(0, queries))[:, None, None])
            most = behind.amax(0).clamp_min_(num_instances - whole)
            segmentation[tile.place] = num_instances - F.threshold(most, 0.5, num_instances + 1)  # 0 becomes -1
        elif whole < num_instances:
            segmentation[tile.place] = whole
    return segmentation


def _binary_maps(image: ImageOutputs, mask_logits: Tensor, mask_threshold: float) -> Tensor:
    """(N, height, width) bool."""
    maps = torch.zeros(len(mask_logits), *image.target_size, dtype=torch.bool, device=mask_logits.device)
    tiles = MaskTiles(mask_logits, image.image_size, image.target_size)
    threshold = _to_logit(mask_threshold)
    is_full = tiles.low > threshold
    members = tiles.members(is_full), tiles.members((tiles.high > threshold) & ~is_full)
    for tile, full, mixed in zip(tiles, *members, strict=True):
        of_tile = maps[(slice(None), *tile.place)]
        if len(full):
            of_tile.index_fill_(0, full, True)
        if len(mixed):
            of_tile.index_copy_(0, mixed, tiles.logits(tile, mixed) > threshold)
    return maps


def _encode_query(image: ImageOutputs, mask_logits: Tensor, mask_threshold: float) -> dict[str, Any]:
    """One query's mask, (h, w) logits, as run-length encoding; only this one is ever at full size."""
    # Runs go down the columns, so the mask is made lying on its side.
    (height, width), (target_height, target_width) = image.image_size, image.target_size
    lying = image._replace(image_size=(width, height), target_size=(target_width, target_height))
    return encode_rle(_binary_maps(lying, mask_logits.T[None], mask_threshold)[0].T)


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

    def frame(self, mask_logits: Tensor) -> ImageOutputs:
        """As one image, with masks (N, h, w) of one of its frames."""
        return ImageOutputs(self.class_logits, mask_logits, self.image_size, self.target_size)


def video_instance_segmentation(
    clip: ClipOutputs,
    *,
    threshold: float = 0.0,
    mask_threshold: float = 0.5,
    max_detections: int = 10,
    use_mask_quality: bool = False,
    label_ids_to_drop: Collection[int] = (),
    return_coco_annotation: bool = False,
) -> dict[str, Any]:
    """The best (query, class) pairs of one clip, each with a mask in every frame; masks may overlap.

    As the original's (arXiv 2112.10764): the `max_detections` most probable pairs, scored by class probability alone,
    whether or not their masks have a pixel. Where `use_mask_quality` is set, the score is times the mean mask
    probability inside the mask, over all frames, as for images. Pairs below `threshold` are left out, and of the most
    probable those whose class is in `label_ids_to_drop` (stuff, for a panoptic checkpoint).

    Returns:
        `segments_info`, by falling score, ids counting up from 0: `id`, `label_id`, `score` (0 to 1), `areas`, the
        pixels in each frame, and `query`, which it is; and `segmentation`: (N, T, height, width) bool, or with
        `return_coco_annotation` for each of the N a list of T COCO run-length encodings, None for a frame without a
        pixel.
    """
    check_probabilities(threshold=threshold, mask_threshold=mask_threshold)
    check_max_detections(max_detections)
    class_probs = clip.class_logits.float().softmax(-1)[:, :-1]
    scores, pairs = class_probs.flatten().topk(min(max_detections, class_probs.numel()))
    # Masks are at most certain, so a pair below the threshold now will be below it later.
    candidates = (scores >= threshold) & ~_is_one_of(pairs % class_probs.shape[1], label_ids_to_drop)
    scores, pairs = scores[candidates], pairs[candidates]
    labels = pairs % class_probs.shape[1]
    all_queries, of_pair = torch.unique(pairs // class_probs.shape[1], return_inverse=True)
    frames = _frames_of(clip, all_queries)
    if use_mask_quality:
        scores = scores * _mask_quality(frames, mask_threshold)[of_pair]
    kept = (scores >= threshold).nonzero()[:, 0]
    kept = kept[scores[kept].argsort(descending=True, stable=True)]

    queries, of_track = torch.unique(of_pair[kept], return_inverse=True)  # classes may share a query
    areas = torch.empty(len(kept), len(frames), dtype=torch.int64, device=scores.device)
    # Filled frame by frame: joining the frames' masks afterwards would hold all of them twice.
    segmentation: Any = (
        [[None] * len(frames) for _ in range(len(kept))]
        if return_coco_annotation
        else torch.empty(len(kept), len(frames), *clip.target_size, dtype=torch.bool, device=scores.device)
    )
    for index, frame in enumerate(frames):
        maps = _binary_maps(frame, frame.mask_logits[queries], mask_threshold)  # (queries, height, width)
        areas[:, index] = maps.flatten(1).sum(1)[of_track]
        if return_coco_annotation:
            encodings = [encode_rle(mask) if mask.any() else None for mask in maps]
            for of_frames, query in zip(segmentation, of_track.tolist(), strict=True):
                of_frames[index] = encodings[query]
        else:
            segmentation[:, index] = maps[of_track]
    found = (labels[kept], scores[kept], areas, all_queries[of_pair[kept]])
    segments = [
        {"id": index, "label_id": label, "score": round(score, 6), "areas": of_frames, "query": query}
        for index, (label, score, of_frames, query) in enumerate(zip(*(v.tolist() for v in found), strict=True))
    ]
    return {"segmentation": segmentation, "segments_info": segments}


def _frames_of(clip: ClipOutputs, queries: Tensor) -> list[ImageOutputs]:
    """Of each frame the masks of some queries."""
    return [clip.frame(mask_logits) for mask_logits in clip.mask_logits[queries].unbind(1)]


def _mask_quality(frames: list[ImageOutputs], mask_threshold: float) -> Tensor:
    """The mean mask probability inside of the masks of all frames: (Q,), 0 where there is no pixel."""
    statistics = [_mask_statistics(frame, frame.mask_logits, mask_threshold) for frame in frames]
    areas = torch.stack([of_frame.area for of_frame in statistics])  # (T, Q)
    sums = torch.stack([of_frame.mean_prob for of_frame in statistics]) * areas
    return sums.sum(0) / areas.sum(0).clamp(min=1)


def video_panoptic_segmentation(
    clip: ClipOutputs,
    *,
    threshold: float = 0.8,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] | None = None,
    use_mask_quality: bool = False,
) -> dict[str, Any]:
    """Merges the queries of one clip into tracks that do not overlap: `panoptic_segmentation` over all frames at once.

    A query is kept or dropped in all frames alike, by the pixels of its mask and those it wins in the whole clip.

    Args:
        threshold, mask_threshold, overlap_mask_area_threshold, label_ids_to_fuse: as of `panoptic_segmentation`.
        use_mask_quality: scores, by which queries are kept and compete, are times the mean mask probability inside the
            mask, over all frames.

    Returns:
        `segmentation`, (T, height, width) int32, 0 is void; `segments_info`, in the order of ids, which count up from
        1: `id`, `label_id`, `was_fused`, `isthing` and `score` as of `panoptic_segmentation`, `areas`, the pixels in
        each frame, and `query`, the best of those fused.
    """
    check_probabilities(
        threshold=threshold,
        mask_threshold=mask_threshold,
        overlap_mask_area_threshold=overlap_mask_area_threshold,
    )
    kept, scores, labels = _likely(clip.class_logits, threshold)
    frames = _frames_of(clip, kept)
    if use_mask_quality:
        scores = scores * _mask_quality(frames, mask_threshold)
        good = (scores > threshold).nonzero()[:, 0]
        kept, scores, labels = kept[good], scores[good], labels[good]
        frames = _frames_of(clip, kept)
    segmentation = torch.zeros(len(frames), *clip.target_size, dtype=torch.int32, device=scores.device)
    own_area, won_area = (torch.zeros(len(kept), dtype=torch.int64, device=scores.device) for _ in range(2))
    visible = torch.zeros(len(kept), len(frames), dtype=torch.int64, device=scores.device)
    for index, frame in enumerate(frames):
        segmentation[index], contest = _compete(frame, frame.mask_logits, scores, mask_threshold)
        own_area += contest.own_area
        won_area += contest.won_area
        visible[:, index] = contest.rows.sum(1)
    segments, segment_of_query = _merge(
        scores, labels, own_area, won_area, visible.sum(1), overlap_mask_area_threshold, label_ids_to_fuse
    )
    for codes in segmentation:
        _write_ids(codes, segment_of_query)
    score_of, query_of = scores.tolist(), kept.tolist()
    for segment, of_segment in zip(segments, _queries_of(segments, segment_of_query), strict=True):
        segment["areas"] = visible[of_segment].sum(0).tolist()
        segment["query"] = query_of[max(of_segment, key=score_of.__getitem__)]
    return {"segmentation": segmentation, "segments_info": segments}


def post_process_video_instance_segmentation(
    outputs: Any, target_sizes: Sequence[Size] | Tensor | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """`video_instance_segmentation` of every clip of a batch; `settings` go to it.

    Raises:
        ValueError: as `split_batch`.
    """
    clips = split_batch(outputs, target_sizes, of_clips=True)
    return [video_instance_segmentation(ClipOutputs(*clip), **settings) for clip in clips]


def post_process_video_panoptic_segmentation(
    outputs: Any, target_sizes: Sequence[Size] | Tensor | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """`video_panoptic_segmentation` of every clip of a batch; `settings` go to it.

    Raises:
        ValueError: as `split_batch`.
    """
    clips = split_batch(outputs, target_sizes, of_clips=True)
    return [video_panoptic_segmentation(ClipOutputs(*clip), **settings) for clip in clips]


# --- forms of a mask ---


def _to_logit(prob: float) -> float:
    """Masks are compared as logits, since just above 0 a logit's sigmoid rounds to 0.5."""
    return torch.logit(torch.tensor(prob, dtype=torch.float64)).item()


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
    pixels = array.T.astype(bool, order="C", copy=False).ravel()
    ends = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    if pixels[:1].any():
        ends = np.concatenate([[0], ends])  # the first run, of zeros, is empty
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
