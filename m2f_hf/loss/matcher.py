"""Bipartite matching of queries and targets (Mask2Former, section 3.3; DETR, section 3.1)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from ..kernels.chunks import channels_last
from .points import DrawPoints, draw_checked, draw_uniform_points, float_chunks, sample_points


try:
    from scipy.optimize import linear_sum_assignment
except ImportError:  # not needed for inference
    linear_sum_assignment = None


logger = logging.get_logger(__name__)


class Targets(NamedTuple):
    """The targets of a batch, image after image (or clip after clip).

    Attributes:
        masks: For each image its (N, H, W), in the dtype they came in; of a clip (N * T, H, W), each target's frames
            in turn.
        labels: (N,) int64, contiguous class ids, as they were given.
        classes: (N,) int64, the classes matched queries learn: the labels, or the number of labels for "no object".
        counts: How many of them belong to each image.
    """

    masks: list[Tensor]
    labels: Tensor
    classes: Tensor
    counts: list[int]


class Matching(NamedTuple):
    """Pairs of queries and targets: M for each of L outputs, image after image, query ascending.

    Attributes:
        images: (M,) int64, position in the batch.
        queries: (L, M) int64, 0 to Q-1.
        targets: (L, M) int64, index into the `Targets`.
        counts: How many pairs each image has: the smaller of its targets and the queries.
    """

    images: Tensor
    queries: Tensor
    targets: Tensor
    counts: list[int]


def pack_targets(
    mask_labels: Sequence[Tensor],
    class_labels: Sequence[Tensor],
    batch_size: int,
    device: torch.device,
    clip: Sequence[int] = (),
    absent_class: int | None = None,
) -> Targets:
    """Collect a batch's targets on the device.

    Args:
        mask_labels: For each image (N, H, W), bool or 0 and 1 in another dtype; tensors or arrays. N may be 0.
        class_labels: For each image (N,), integers; tensors, arrays or lists.
        batch_size: Number of images that the model saw.
        device: Where the predictions are.
        clip: `(T,)` where these are clips of T frames, whose masks are (N, T, H, W).
        absent_class: The class of targets without a pixel in a clip's last frame; None: their label.

    Raises:
        ValueError: If lengths or shapes don't fit each other, or class labels aren't integers.
    """
    if not len(mask_labels) == len(class_labels) == batch_size:
        raise ValueError(
            "`mask_labels` and `class_labels` must be lists with one tensor per image: the batch has "
            f"{batch_size} images, but they have {len(mask_labels)} and {len(class_labels)} entries."
        )
    mask_labels, class_labels = (list(map(torch.as_tensor, labels)) for labels in (mask_labels, class_labels))
    for image, (masks, labels) in enumerate(zip(mask_labels, class_labels, strict=True)):
        expected = (len(labels), *clip, *masks.shape[-2:])
        if masks.ndim != len(expected) or labels.ndim != 1 or masks.shape != expected:
            raise ValueError(
                f"{'Clip' if clip else 'Image'} {image}: `mask_labels` must be (N, {''.join(f'{t}, ' for t in clip)}H, "
                "W) and `class_labels` (N,) with the same N, "
                f"but they are {tuple(masks.shape)} and {tuple(labels.shape)}."
            )
        if len(labels) and (labels.is_floating_point() or labels.dtype == torch.bool):
            raise ValueError(f"Image {image}: `class_labels` must be integers, but are {labels.dtype}.")
    labels = torch.cat([labels.to(device, torch.int64, non_blocking=True) for labels in class_labels])
    on_device = [masks.to(device, non_blocking=True) for masks in mask_labels]
    classes = labels
    if absent_class is not None:
        is_present = torch.cat([masks[:, -1].flatten(1).any(1) for masks in on_device])
        classes = labels.where(is_present, absent_class)
    return Targets(
        [masks.flatten(0, -3) for masks in on_device], labels, classes, [len(labels) for labels in class_labels]
    )


class Mask2FormerHungarianMatcher(nn.Module):
    """One-to-one assignment of targets to queries at the lowest total cost, for all outputs of the decoder at once.

    The cost of a pair is `cost_mask` x the mean binary cross-entropy + `cost_dice` x the dice loss, both at random
    points, - `cost_class` x the probability of the target's class. Mask features are sampled at the points and only
    then multiplied with the queries' mask embeddings, so that no query's whole mask is computed. All costs leave the
    device in a single copy.

    Args:
        cost_class, cost_mask, cost_dice: Weights of the three costs, not all 0.
        num_points: Number of points. Each image and output has its own, shared by all of its queries and targets; in a
            clip, by all of its frames too, and the means and sums of the costs run over the frames.
    """

    def __init__(
        self, cost_class: float = 1.0, cost_mask: float = 1.0, cost_dice: float = 1.0, num_points: int = 12544
    ):
        super().__init__()
        if cost_class == cost_mask == cost_dice == 0:
            raise ValueError("At least one of `cost_class`, `cost_mask` and `cost_dice` must differ from 0.")
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.num_points = num_points

    @torch.no_grad()
    def forward(
        self,
        class_queries_logits: Tensor,
        mask_embeddings: Tensor,
        mask_features: Tensor,
        targets: Targets,
        draw_points: DrawPoints = draw_uniform_points,
    ) -> Matching:
        """Match each of L outputs of the decoder with the targets.

        Args:
            class_queries_logits: (L, B, Q, K+1), the last class is "no object".
            mask_embeddings: (L, B, Q, C); a query's mask logits are its embedding times the mask features.
            mask_features: (B, C, H, W), of clips (B * T, C, H, W).
            targets: The targets of the B images.
            draw_points: Source of the points.

        Costs are computed in float32. A warning gives the number of those that are not finite; such pairs are matched
        only where nothing else is left.

        Raises:
            ImportError: If SciPy is not installed.
            ValueError: If a class label is outside 0..K-1, or a mask's value outside 0..1.
        """
        if linear_sum_assignment is None:
            raise ImportError("The loss needs SciPy for the assignment: `pip install scipy`.")
        device = mask_features.device
        num_layers, _, num_queries, num_classes = class_queries_logits.shape
        counts = [min(count, num_queries) for count in targets.counts]
        if sum(counts) == 0:
            none = torch.zeros(num_layers, 0, dtype=torch.int64, device=device)
            return Matching(none.new_zeros(0), none, none, counts)

        costs = self.compute_costs(class_queries_logits, mask_embeddings, mask_features, targets, draw_points)
        # The checks travel with the costs: reading labels or masks by themselves would be further copies.
        masks = [masks.aminmax() for masks in targets.masks if masks.dtype != torch.bool and masks.numel()]
        ranges = [bound.float() for bound in targets.labels.aminmax()]
        if masks:
            smallest, largest = zip(*masks, strict=True)
            ranges += [torch.stack(smallest).min().float(), torch.stack(largest).max().float()]
        on_host = torch.cat([costs.flatten(), torch.stack(ranges)]).cpu().numpy()
        check_ranges(on_host[costs.numel() :], num_labels=num_classes - 1)
        queries, matched = assign(on_host[: costs.numel()].reshape(costs.shape), targets.counts)

        images = np.repeat(np.arange(len(counts)), counts)
        indices = torch.from_numpy(np.concatenate([images[None], queries, matched])).to(device, non_blocking=True)
        return Matching(indices[0], indices[1 : 1 + num_layers], indices[1 + num_layers :], counts)

    def compute_costs(
        self,
        class_queries_logits: Tensor,
        mask_embeddings: Tensor,
        mask_features: Tensor,
        targets: Targets,
        draw_points: DrawPoints,
    ) -> Tensor:
        """Return (L, B, Q, N) float32 costs, with N the largest number of targets of an image; columns beyond an
        image's own targets mean nothing."""
        num_layers, batch_size, _, num_classes = class_queries_logits.shape
        num_frames = len(mask_features) // batch_size
        features = channels_last(mask_features.float())
        points = torch.stack(
            [
                draw_checked(draw_points, "matching", layer, range(batch_size), self.num_points, mask_features.device)
                for layer in range(num_layers)
            ]
        )  # (L, B, P, 2)

        # Out-of-range labels are reported later; on a GPU indexing with them would abort the process.
        classes = targets.classes.clamp(0, num_classes - 1).split(targets.counts)
        labels = nn.utils.rnn.pad_sequence(list(classes), batch_first=True)  # (B, N)
        # Each mask is turned into floats once, for the points of all outputs.
        at_points = points.new_zeros(*labels.shape, num_frames, num_layers, self.num_points)
        for own, masks, at in zip(at_points.flatten(1, 2), targets.masks, points.unbind(1), strict=True):
            for chunk, floats in float_chunks(masks):
                # (1, n, h, w) at (1, L * P, 2) -> (1, n, L * P)
                own[chunk] = sample_points(floats[None], at.reshape(1, -1, 2)).view(own[chunk].shape)

        costs = []
        for layer, embeddings in enumerate(mask_embeddings.float()):
            sampled = sample_points(features, points[layer].repeat_interleave(num_frames, 0))  # (B * T, C, P)
            # The frames' points are further points: (B, Q, C) x (B, C, T * P) -> (B, Q, T * P)
            logits = embeddings @ sampled.unflatten(0, (batch_size, -1)).transpose(1, 2).flatten(2)
            cross_entropy, dice = pairwise_losses(logits, at_points[:, :, :, layer].flatten(2))
            probabilities = class_queries_logits[layer].float().softmax(-1)
            costs.append(
                self.cost_mask * cross_entropy
                + self.cost_dice * dice
                # (B, Q, K+1) at (B, 1, N) -> (B, Q, N)
                - self.cost_class * probabilities.take_along_dim(labels[:, None], dim=2)
            )
        return torch.stack(costs)


def pairwise_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean binary cross-entropy, and the dice loss, of each pair of a query and a target: (B, Q, N) each.

    With s the softplus, the cross-entropy is s(x) - x y: products give all pairs.

    Args:
        logits: (B, Q, P), of the queries.
        labels: (B, N, P) in [0, 1], of the targets.
    """
    probabilities = logits.sigmoid()
    # The few labels first: several times faster than the same products the other way round.
    products, overlaps = (labels @ logits.mT).mT, (labels @ probabilities.mT).mT
    cross_entropy = (F.softplus(logits).sum(-1, keepdim=True) - products) / logits.shape[-1]
    dice = 1 - (2 * overlaps + 1) / (probabilities.sum(-1, keepdim=True) + labels.sum(-1)[:, None] + 1)
    return cross_entropy, dice


def check_ranges(ranges: np.ndarray, num_labels: int) -> None:
    """Raise ValueError unless the smallest and largest label, and mask value where given, are in range."""
    smallest, largest = ranges[:2]
    if smallest < 0 or largest >= num_labels:
        raise ValueError(
            f"`class_labels` must be in 0..{num_labels - 1} (the config's num_labels is {num_labels}), but range from "
            f"{smallest:.0f} to {largest:.0f}. Leave ignored or void segments out of the targets."
        )
    # NaN fails every comparison, so ask for what is right.
    if len(ranges) > 2 and not (ranges[2] >= 0 and ranges[3] <= 1):
        raise ValueError(f"`mask_labels` must be bool, or in 0..1, but range from {ranges[2]:g} to {ranges[3]:g}.")


def assign(costs: np.ndarray, counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Solve the assignment problems of (L, B, Q, N) costs, where image b has `counts[b]` targets.

    Returns:
        (L, M) queries and (L, M) targets, the latter counted over the whole batch.
    """
    starts = np.cumsum([0, *counts])[:-1]
    valid = [costs[:, image, :, :count] for image, count in enumerate(counts)]
    num_bad = sum(int((~np.isfinite(cost)).sum()) for cost in valid)
    if num_bad:
        logger.warning(
            f"{num_bad} of {sum(cost.size for cost in valid)} matching costs are not finite: mask or class logits "
            "overflow or are NaN. The training has probably diverged; lower the learning rate or clip gradients."
        )
    queries, targets = [], []
    for layer in range(len(costs)):
        pairs = [linear_sum_assignment(_replace_non_finite(cost[layer])) for cost in valid]
        queries.append(np.concatenate([query for query, _ in pairs]))
        targets.append(np.concatenate([start + target for start, (_, target) in zip(starts, pairs, strict=True)]))
    return np.stack(queries), np.stack(targets)


def _replace_non_finite(cost: np.ndarray) -> np.ndarray:
    """Return a copy with non-finite costs so high that any assignment with fewer of them is cheaper."""
    is_finite = np.isfinite(cost)
    cost = np.where(is_finite, cost, 0).astype(np.float64)
    cost[~is_finite] = 1 + 2 * min(cost.shape) * np.abs(cost).max(initial=0)
    return cost
