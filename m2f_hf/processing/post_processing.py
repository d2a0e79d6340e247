"""Turn class and mask logits into segments in the frame of the image that came in.

Pure functions of the model's outputs; the thresholds a checkpoint knows are settings of its processor. The arithmetic
is that of the original code: mask logits are enlarged to the padded input (four times their size), the padding is
cropped, the rest is resized to the target, and only then is anything decided (Mask2Former, arXiv 2112.01527, and the
merging of MaskFormer, arXiv 2107.06278, section 3.4). Both resizings are done for a tile of the target at a time and
for the queries that may change what is decided there, so no tensor of queries x target pixels is ever written.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .mask_tiles import MASK_STRIDE, MaskTiles, Size
from .rle import encode_rle


# Relative: more than a score is rounded by, be it a probability times a sigmoid or a sum of a hundred of them.
SCORE_ROUNDING = 1e-5
# Masks that move no semantic score by more, all together, count as constant in a tile. The rounding of such a sum in
# float32 is no less.
NEGLIGIBLE = 1e-6
ROWS_AT_ONCE = 32


class ImageOutputs(NamedTuple):
    """The model's outputs for one image, or one clip of T frames.

    Args:
        class_logits: (Q, K+1).
        mask_logits: (Q, h, w), or (Q, T, h, w).
        image_size: height and width before padding.
        target_size: height and width of the result.
    """

    class_logits: Tensor
    mask_logits: Tensor
    image_size: Size
    target_size: Size


# --- the batch ---


def split_batch(
    outputs: Any, target_sizes: Sequence[Size] | Tensor | None = None, *, is_video: bool = False
) -> Iterator[ImageOutputs]:
    """Split a batch into one `ImageOutputs` for each image or clip.

    Args:
        outputs: has `class_queries_logits` (B, Q, K+1) and `masks_queries_logits` (B, Q, h, w), and may have
            `image_sizes` (B, 2), each image's height and width before padding. Without it nothing was padded.
        target_sizes: height and width to resize each image's result to; by default its size before padding.
        is_video: whether the masks are (B, Q, T, h, w).

    Raises:
        ValueError: not one target size for each image, one that is not positive; an image larger than four times the
            masks; outputs of images where clips are meant, or the other way round.
    """
    class_logits, mask_logits = outputs.class_queries_logits.detach(), outputs.masks_queries_logits.detach()
    if mask_logits.dim() != 4 + is_video:
        kind, fix = (
            ("an image model's", "post-process them with `M2FImageProcessor`")
            if is_video
            else ("a video model's", "use `Mask2FormerVideoProcessor.post_process_video_instance_segmentation`")
        )
        raise ValueError(f"`masks_queries_logits` of {tuple(mask_logits.shape)} are {kind}: {fix}")
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
    return itertools.starmap(ImageOutputs, zip(class_logits, mask_logits, image_sizes, targets, strict=True))


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
    """Raise a ValueError that names the first value that is not from 0 to 1."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} {value} is not a probability or ratio from 0 to 1")


def check_max_detections(number: int) -> None:
    """Raise a ValueError for fewer than one."""
    if number < 1:
        raise ValueError(f"max_detections must be at least 1, not {number}")


# --- decisions in a tile ---

# Comparisons and reductions of booleans take a CPU ten times as long as arithmetic in float32. In a tile, therefore,
# 1.0 stands for True, and indices are floats.


def _is_positive(values: Tensor) -> Tensor:
    """Write 1 where a value is above 0, and else 0, in place."""
    return values.sign_().clamp_min_(0)


def _label_of_largest(values: Tensor, labels: Tensor) -> Tensor:
    """Return the label of the largest of N values at each pixel, the least label where several are the largest.

    Args:
        values: (N, rows, columns) float32, overwritten.
        labels: (N, rows, columns) or (N, 1, 1) float32, whole numbers from 0 to 2**22.

    Returns:
        (rows, columns) float32.
    """
    is_less = values.sub_(values.amax(0)).sign_()  # -1; 0 for the largest
    return torch.add(labels, is_less, alpha=-(2.0**23)).amin(0)


def _to_logit(prob: float) -> float:
    """Masks are compared as logits, since just above 0 a logit's sigmoid rounds to 0.5."""
    return torch.logit(torch.tensor(prob, dtype=torch.float64)).item()


# --- semantic ---


def semantic_segmentation(
    image: ImageOutputs, *, resize_before_inference: bool = True, return_scores: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Classify every pixel: argmax over classes of the sum over queries of class probability x mask probability.

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
    contest = _semantic_contest(tiles, class_probs.cpu(), keep_all=return_scores)
    rest = contest.rest.to(device)
    members = tiles.members(contest.can_win), tiles.members(contest.matters)
    for index, (tile, classes, queries) in enumerate(zip(tiles, *members, strict=True)):
        if len(classes) == 1 and not return_scores:
            segmentation[tile.place] = classes
            continue
        # (c, n), and what the other queries add for each class
        weights = class_probs.index_select(0, queries).index_select(1, classes).T
        tile_rest = rest[:, index].index_select(0, classes)[:, None]

        def product(mask_logits: Tensor, weights: Tensor = weights, tile_rest: Tensor = tile_rest) -> Tensor:
            # (c, n) x (n, rows, columns) -> (c, rows, columns)
            scores = torch.addmm(tile_rest, weights, mask_logits.sigmoid_().flatten(1))
            return scores.unflatten(1, mask_logits.shape[1:])

        if resize_before_inference:
            scores = product(tiles.logits(tile, queries))
        else:
            scores = tiles.logits(tile, queries, at_padded_size=product)
        if all_scores is not None:
            all_scores[(slice(None), *tile.place)] = scores
        segmentation[tile.place] = _label_of_largest(scores, labels.index_select(0, classes)[:, None, None])
    return segmentation, all_scores


class _SemanticContest(NamedTuple):
    can_win: Tensor  # (K, tile rows, tile columns) bool
    matters: Tensor  # (Q, tile rows, tile columns) bool
    rest: Tensor  # (K, tiles) float32: what the queries that do not matter add to the scores


def _semantic_contest(tiles: MaskTiles, class_probs: Tensor, keep_all: bool) -> _SemanticContest:
    """Find which classes can be the best of a tile, and which queries' masks matter to that.

    A class cannot if its score is everywhere less than the least of another's. Masks of so little weight, or so little
    change in the tile, that all of them together move no score by more than `NEGLIGIBLE` count as their mean.
    """
    # In float64, whose rounding is nothing next to the margins: (Q, tiles)
    low, high = (bound.flatten(1).double().sigmoid() for bound in (tiles.low, tiles.high))
    class_probs = class_probs.double()
    if keep_all:
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


# --- panoptic ---


def panoptic_segmentation(
    image: ImageOutputs,
    *,
    threshold: float = 0.8,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] | None = None,
) -> dict[str, Any]:
    """Merge the queries of one image into a map of segments that do not overlap (arXiv 2107.06278, section 3.4).

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
        threshold=threshold, mask_threshold=mask_threshold, overlap_mask_area_threshold=overlap_mask_area_threshold
    )
    kept, scores, labels = _select_queries(image.class_logits, threshold)
    codes, contest = _resolve_overlaps(image, image.mask_logits[kept], scores, mask_threshold)
    visible = contest.rows.sum(1)
    is_segment = _wins_enough(contest.own_area, contest.won_area, visible, overlap_mask_area_threshold)
    segments, members = _merge(scores, labels, is_segment, label_ids_to_fuse)
    areas = visible.tolist()
    for segment, queries in zip(segments, members, strict=True):
        segment["area"] = sum(areas[query] for query in queries)
        segment["bbox"] = _box(contest.rows[queries].any(0), contest.columns[queries].any(0))
    _write_ids(codes, len(kept), members)
    return {"segmentation": codes, "segments_info": segments}


def _select_queries(class_logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries (N,) whose likeliest class is not "no object" and above the threshold, its probability, it."""
    scores, labels = class_logits.float().softmax(-1).max(-1)
    kept = ((labels != class_logits.shape[-1] - 1) & (scores > threshold)).nonzero()[:, 0]
    return kept, scores[kept], labels[kept]


def _wins_enough(own_area: Tensor, won_area: Tensor, visible: Tensor, overlap_mask_area_threshold: float) -> Tensor:
    """Return which of N queries have a pixel and win enough of their mask: (N,) bool, on the CPU."""
    ratio = won_area.cpu().double() / own_area.cpu().double()  # as exact as Python's
    return (visible.cpu() > 0) & (ratio >= overlap_mask_area_threshold)


def _merge(
    scores: Tensor, labels: Tensor, is_segment: Tensor, label_ids_to_fuse: Collection[int] | None
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Make segments of those of N queries that are one, stuff of one class fused, and list the queries of each."""
    segments: list[dict[str, Any]] = []
    members: list[list[int]] = []
    fused: dict[int, int] = {}  # label -> its segment's index
    for query, (score, label, is_kept) in enumerate(
        zip(scores.tolist(), labels.tolist(), is_segment.tolist(), strict=True)
    ):
        if not is_kept:
            continue
        index = fused.get(label, len(segments))
        if index == len(segments):
            is_stuff = label in (label_ids_to_fuse or ())
            if is_stuff:
                fused[label] = index
            segments.append(
                {
                    "id": index + 1,
                    "label_id": label,
                    "was_fused": is_stuff,
                    "isthing": None if label_ids_to_fuse is None else not is_stuff,
                    "score": 0.0,
                }
            )
            members.append([])
        segments[index]["score"] = max(segments[index]["score"], round(score, 6))
        members[index].append(query)
    return segments, members


def _write_ids(codes: Tensor, num_queries: int, members: list[list[int]]) -> None:
    """Turn codes of `_resolve_overlaps`, (height, width) int32, into ids of segments, 0 where none is, in place."""
    if num_queries == 0:
        return
    ids = torch.zeros(num_queries, 2, dtype=torch.int32)
    for index, queries in enumerate(members):
        ids[queries, 0] = index + 1
    ids = ids.flatten().to(codes.device)
    for rows in codes.split(ROWS_AT_ONCE):
        rows.copy_(ids.index_select(0, rows.flatten()).view_as(rows))


class _PanopticContest(NamedTuple):
    own_area: Tensor  # (N,) pixels of each query's mask
    won_area: Tensor  # (N,) those it wins
    rows: Tensor  # (N, height) those it wins inside its mask, row by row
    columns: Tensor  # (N, width)


def _resolve_overlaps(
    image: ImageOutputs, mask_logits: Tensor, scores: Tensor, mask_threshold: float
) -> tuple[Tensor, _PanopticContest]:
    """Find which of N queries gets each pixel, and count what each has.

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
    rows = tiles.expand_rows(((wins_all & is_full) * tiles.widths).sum(2))
    columns = tiles.expand_columns(((wins_all & is_full) * tiles.heights[:, None]).sum(1))
    settled_codes = (2 * wins_all.int().argmax(0) + (wins_all & is_empty).any(0)).flatten().tolist()

    # What has to be looked at: in each tile the queries that play, and after them others with a part of it as mask.
    only_covers = ~(is_full | is_empty | plays)
    members = tiles.members(torch.cat([plays, only_covers]))
    num_players = plays.sum(0).flatten().tolist()
    labels = 2.0 * torch.arange(num_queries, device=device)
    offsets = torch.arange(tiles.side, dtype=torch.int32, device=device) * 2 * num_queries
    for tile, code, count, tile_members in zip(tiles, settled_codes, num_players, members, strict=True):
        if count == 0:
            codes[tile.place] = code
        if len(tile_members) == 0:
            continue
        queries = tile_members % num_queries
        logits = tiles.logits(tile, queries)  # (n, rows, columns)
        is_outside = _is_positive(threshold - logits)  # 0 or 1
        own_area.index_add_(0, queries, (logits[0].numel() - is_outside.sum((1, 2))).long())
        if count == 0:
            continue
        players = queries[:count]
        values = logits[:count].sigmoid_().mul_(scores.index_select(0, players)[:, None, None])
        query_codes = is_outside[:count].add_(labels.index_select(0, players)[:, None, None])
        best = _label_of_largest(values, query_codes).int()
        codes[tile.place] = best
        height, width = best.shape
        in_row, in_column = (
            (best + line).flatten().bincount(minlength=lines * 2 * num_queries).view(lines, num_queries, 2)
            for line, lines in ((offsets[:height, None], height), (offsets[:width], width))
        )
        won_area += in_row.sum((0, 2))
        rows[:, tile.place[0]] += in_row[..., 0].T
        columns[:, tile.place[1]] += in_column[..., 0].T
    return codes, _PanopticContest(own_area, won_area, rows, columns)


def _box(has_row: Tensor, has_column: Tensor) -> list[int]:
    """Return [x, y, width, height] in pixels, from (height,) and (width,) bool: True where the mask has a pixel."""
    ys, xs = has_row.nonzero()[:, 0], has_column.nonzero()[:, 0]
    x, y = int(xs[0]), int(ys[0])
    return [x, y, int(xs[-1]) + 1 - x, int(ys[-1]) + 1 - y]


# --- instance ---


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
    """Return the best (query, class) pairs of one image, each with its own mask; masks may overlap.

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

    Raises:
        ValueError: both `return_coco_annotation` and `return_binary_maps`, settings out of range.
    """
    if return_coco_annotation and return_binary_maps:
        raise ValueError("ask for return_coco_annotation or for return_binary_maps, not for both")
    check_probabilities(threshold=threshold, mask_threshold=mask_threshold)
    scores, labels, queries = _best_pairs(image.class_logits, threshold, max_detections, label_ids_to_drop)
    queries, pair_query = torch.unique(queries, return_inverse=True)  # several classes may share a query
    statistics = _mask_statistics(image, image.mask_logits[queries], mask_threshold)
    scores = scores * statistics.mean_prob[pair_query]
    kept = _rank(scores, (scores >= threshold) & (statistics.area[pair_query] > 0))
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
            zip(labels[kept].tolist(), scores[kept].tolist(), pair_query[kept].tolist(), strict=True)
        )
    ]

    queries, instance_query = torch.unique(queries[pair_query[kept]], return_inverse=True)  # each mask is made once
    mask_logits = image.mask_logits[queries]
    segmentation: Tensor | list[dict[str, Any]]
    if return_coco_annotation:
        encodings = [_encode_query(image, mask_logits[i], mask_threshold) for i in range(len(queries))]
        segmentation = [encodings[i] for i in instance_query.tolist()]
    elif return_binary_maps:
        segmentation = _binary_maps(image, mask_logits[instance_query], mask_threshold)
    else:
        segmentation = _instance_map(image, mask_logits, instance_query, mask_threshold)
    return {"segmentation": segmentation, "segments_info": segments}


def _best_pairs(
    class_logits: Tensor, threshold: float, max_detections: int, label_ids_to_drop: Collection[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return probability, label and query, (N,) each, of the most probable (query, class) pairs that may be kept.

    Raises:
        ValueError: fewer than one detection.
    """
    check_max_detections(max_detections)
    class_probs = class_logits.float().softmax(-1)[:, :-1]
    scores, pairs = class_probs.flatten().topk(min(max_detections, class_probs.numel()))
    labels, queries = pairs % class_probs.shape[1], pairs // class_probs.shape[1]
    dropped = torch.tensor(sorted(label_ids_to_drop), dtype=labels.dtype, device=labels.device)
    # The mean probability inside a mask is at most 1, so a pair below the threshold now will be below it later.
    candidates = ~torch.isin(labels, dropped) & (scores >= threshold)
    return scores[candidates], labels[candidates], queries[candidates]


def _rank(scores: Tensor, is_kept: Tensor) -> Tensor:
    """Return the indices of the scores that are kept, by falling score."""
    kept = is_kept.nonzero()[:, 0]
    return kept[scores[kept].argsort(descending=True, stable=True)]


class _MaskStatistics(NamedTuple):
    area: Tensor  # (N,) int64
    mean_prob: Tensor  # (N,) float32, inside the mask
    rows: Tensor  # (N, height) bool, True where the mask has a pixel
    columns: Tensor  # (N, width) bool


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


def _instance_map(image: ImageOutputs, mask_logits: Tensor, instance_query: Tensor, mask_threshold: float) -> Tensor:
    """Return (height, width) int32: at each pixel the first instance whose mask covers it, -1 where none does."""
    num_instances, device = len(instance_query), mask_logits.device
    segmentation = torch.full(image.target_size, -1, dtype=torch.int32, device=device)
    if num_instances == 0:
        return segmentation
    ranks = torch.arange(num_instances, dtype=torch.int32, device=device)
    first = torch.full((len(mask_logits),), num_instances, dtype=torch.int32, device=device)
    first = first.scatter_reduce(0, instance_query, ranks, "amin")  # (queries,): the first instance of each

    tiles = MaskTiles(mask_logits, image.image_size, image.target_size)
    threshold = _to_logit(mask_threshold)
    first_on_cpu = first.cpu()[:, None, None]
    # The first that has all of a tile hides those after it.
    first_full = torch.where(tiles.low > threshold, first_on_cpu, num_instances).amin(0)
    members = tiles.members((tiles.high > threshold) & (first_on_cpu < first_full))
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
    """Return (N, height, width) bool, True where the mask probability exceeds the threshold."""
    maps = torch.zeros(len(mask_logits), *image.target_size, dtype=torch.bool, device=mask_logits.device)
    tiles = MaskTiles(mask_logits, image.image_size, image.target_size)
    threshold = _to_logit(mask_threshold)
    is_full = tiles.low > threshold
    members = tiles.members(is_full), tiles.members((tiles.high > threshold) & ~is_full)
    for tile, full, mixed in zip(tiles, *members, strict=True):
        tile_maps = maps[(slice(None), *tile.place)]
        if len(full):
            tile_maps.index_fill_(0, full, True)
        if len(mixed):
            tile_maps.index_copy_(0, mixed, tiles.logits(tile, mixed) > threshold)
    return maps


def _encode_query(image: ImageOutputs, mask_logits: Tensor, mask_threshold: float) -> dict[str, Any]:
    """Encode one query's mask, (h, w) logits, as run lengths; only this one is ever at full size."""
    # Runs go down the columns, so the mask is made transposed.
    transposed = image._replace(image_size=image.image_size[::-1], target_size=image.target_size[::-1])
    return encode_rle(_binary_maps(transposed, mask_logits.T[None], mask_threshold)[0].T)


# --- clips ---


def video_instance_segmentation(
    clip: ImageOutputs,
    *,
    threshold: float = 0.0,
    mask_threshold: float = 0.5,
    max_detections: int = 10,
    use_mask_quality: bool = False,
    label_ids_to_drop: Collection[int] = (),
    return_coco_annotation: bool = False,
) -> dict[str, Any]:
    """Return the best (query, class) pairs of one clip, each with a mask in every frame; masks may overlap.

    As the original's (arXiv 2112.10764): the `max_detections` most probable pairs, scored by class probability alone,
    whether or not their masks have a pixel. Where `use_mask_quality` is set, the score is times the mean mask
    probability inside the mask, over all frames, as for images. Pairs below `threshold` are left out, and of the most
    probable those whose class is in `label_ids_to_drop` (stuff, for a panoptic checkpoint).

    Returns:
        `segments_info`, by falling score, ids counting up from 0: `id`, `label_id`, `score` (0 to 1), `areas`, the
        pixels in each frame, and `query`, its index; and `segmentation`: (N, T, height, width) bool, or with
        `return_coco_annotation` for each of the N a list of T COCO run-length encodings, None for a frame without a
        pixel.
    """
    check_probabilities(threshold=threshold, mask_threshold=mask_threshold)
    scores, labels, queries = _best_pairs(clip.class_logits, threshold, max_detections, label_ids_to_drop)
    all_queries, pair_query = torch.unique(queries, return_inverse=True)
    frames = _split_frames(clip, all_queries)
    if use_mask_quality:
        scores = scores * _mask_quality(frames, mask_threshold)[pair_query]
    kept = _rank(scores, scores >= threshold)

    queries, track_query = torch.unique(pair_query[kept], return_inverse=True)  # classes may share a query
    areas = torch.empty(len(kept), len(frames), dtype=torch.int64, device=scores.device)
    # Filled frame by frame: joining the frames' masks afterwards would hold all of them twice.
    segmentation: Any = (
        [[None] * len(frames) for _ in range(len(kept))]
        if return_coco_annotation
        else torch.empty(len(kept), len(frames), *clip.target_size, dtype=torch.bool, device=scores.device)
    )
    for index, frame in enumerate(frames):
        maps = _binary_maps(frame, frame.mask_logits[queries], mask_threshold)  # (queries, height, width)
        areas[:, index] = maps.flatten(1).sum(1)[track_query]
        if return_coco_annotation:
            encodings = [encode_rle(mask) if mask.any() else None for mask in maps]
            for track, query in zip(segmentation, track_query.tolist(), strict=True):
                track[index] = encodings[query]
        else:
            segmentation[:, index] = maps[track_query]
    columns = (labels[kept], scores[kept], areas, all_queries[pair_query[kept]])
    segments = [
        {"id": index, "label_id": label, "score": round(score, 6), "areas": frame_areas, "query": query}
        for index, (label, score, frame_areas, query) in enumerate(zip(*(c.tolist() for c in columns), strict=True))
    ]
    return {"segmentation": segmentation, "segments_info": segments}


def _split_frames(clip: ImageOutputs, queries: Tensor) -> list[ImageOutputs]:
    """Return each frame as an image, with the masks of some queries."""
    return [clip._replace(mask_logits=mask_logits) for mask_logits in clip.mask_logits[queries].unbind(1)]


def _mask_quality(frames: list[ImageOutputs], mask_threshold: float) -> Tensor:
    """Return the mean mask probability inside of the masks of all frames: (Q,), 0 where there is no pixel."""
    statistics = [_mask_statistics(frame, frame.mask_logits, mask_threshold) for frame in frames]
    areas = torch.stack([each.area for each in statistics])  # (T, Q)
    sums = torch.stack([each.mean_prob for each in statistics]) * areas
    return sums.sum(0) / areas.sum(0).clamp(min=1)


def video_panoptic_segmentation(
    clip: ImageOutputs,
    *,
    threshold: float = 0.8,
    mask_threshold: float = 0.5,
    overlap_mask_area_threshold: float = 0.8,
    label_ids_to_fuse: Collection[int] | None = None,
    use_mask_quality: bool = False,
) -> dict[str, Any]:
    """Merge the queries of one clip into tracks that do not overlap: `panoptic_segmentation` over all frames at once.

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
        threshold=threshold, mask_threshold=mask_threshold, overlap_mask_area_threshold=overlap_mask_area_threshold
    )
    kept, scores, labels = _select_queries(clip.class_logits, threshold)
    frames = _split_frames(clip, kept)
    if use_mask_quality:
        scores = scores * _mask_quality(frames, mask_threshold)
        good = (scores > threshold).nonzero()[:, 0]
        kept, scores, labels = kept[good], scores[good], labels[good]
        frames = _split_frames(clip, kept)
    segmentation = torch.zeros(len(frames), *clip.target_size, dtype=torch.int32, device=scores.device)
    own_area, won_area = (torch.zeros(len(kept), dtype=torch.int64, device=scores.device) for _ in range(2))
    visible = torch.zeros(len(kept), len(frames), dtype=torch.int64, device=scores.device)
    for index, frame in enumerate(frames):
        segmentation[index], contest = _resolve_overlaps(frame, frame.mask_logits, scores, mask_threshold)
        own_area += contest.own_area
        won_area += contest.won_area
        visible[:, index] = contest.rows.sum(1)
    is_segment = _wins_enough(own_area, won_area, visible.sum(1), overlap_mask_area_threshold)
    segments, members = _merge(scores, labels, is_segment, label_ids_to_fuse)
    for codes in segmentation:
        _write_ids(codes, len(kept), members)
    all_scores, all_queries = scores.tolist(), kept.tolist()
    for segment, queries in zip(segments, members, strict=True):
        segment["areas"] = visible[queries].sum(0).tolist()
        segment["query"] = all_queries[max(queries, key=all_scores.__getitem__)]
    return {"segmentation": segmentation, "segments_info": segments}
