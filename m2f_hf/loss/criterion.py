"""Losses of Mask2Former: classes of all queries, masks of the matched ones at sampled points (section 3.3)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .matcher import Mask2FormerHungarianMatcher, Matching, Targets, pack_targets
from .points import (
    DrawPoints,
    draw_checked,
    draw_uniform_points,
    float_chunks,
    sample_points,
    scatter_to_maps,
    uncertain_points,
)


_LOGITS_AT_ONCE = 1 << 23  # of matched masks, 32 MB


class Mask2FormerLoss(nn.Module):
    """Cross-entropy, mask and dice losses of every output of the decoder after bipartite matching.

    - `loss_cross_entropy`: mean over all queries of the classes' cross-entropy, weighted with `empty_weight` of the
      target class; the class of unmatched queries is "no object".
    - `loss_mask`, `loss_dice`: binary cross-entropy (mean over points) and dice loss of the matched masks, summed and
      divided by the number of targets. The masks of a clip count frame by frame, its targets once.

    Computed in float32 whatever the model's dtype, autocast or not. Where `torch.distributed` is initialised, the
    number of targets and the sum of class weights are averaged over the processes, so the mean of the processes' losses
    is the loss of their batches put together, and every process must call the criterion. (The original averages the
    former only; for one process there is no difference.)

    Mask logits are computed for matched queries only, a few outputs at a time, and none is kept for the backward pass.
    The device is read once, for the matching costs.

    Args:
        config: Uses `num_labels`, `no_object_weight`, `class_weight`, `mask_weight`, `dice_weight`,
            `train_num_points`, `oversample_ratio`, `importance_sample_ratio`; of clips also `label_frame`.
        weight_dict: Factors by which the model multiplies `loss_cross_entropy`, `loss_mask` and `loss_dice`.

    Attributes:
        draw_points: Source of random points, a `points.DrawPoints`. Replace it to repeat or to share points.
    """

    empty_weight: Tensor

    def __init__(self, config: Any, weight_dict: dict[str, float]):
        super().__init__()
        self.num_labels = config.num_labels
        self.weight_dict = weight_dict
        self.absent_class = config.num_labels if getattr(config, "label_frame", "any") == "last" else None
        empty_weight = torch.ones(config.num_labels + 1)
        empty_weight[-1] = config.no_object_weight
        self.register_buffer("empty_weight", empty_weight)

        self.num_candidates = int(config.train_num_points * config.oversample_ratio)
        self.num_uncertain = int(config.train_num_points * config.importance_sample_ratio)
        self.num_random = config.train_num_points - self.num_uncertain
        self.draw_points: DrawPoints = draw_uniform_points
        self.matcher = Mask2FormerHungarianMatcher(
            cost_class=config.class_weight,
            cost_mask=config.mask_weight,
            cost_dice=config.dice_weight,
            num_points=config.train_num_points,
        )

    # The assignment is made on the host, and the shapes that follow from it would be compiled again at each step.
    @torch.compiler.disable
    def forward(
        self,
        class_queries_logits: Tensor,
        mask_embeddings: Tensor,
        mask_features: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Compute the losses of L outputs of the decoder, the final one last.

        Args:
            class_queries_logits: (L, B, Q, num_labels+1), the last class is "no object".
            mask_embeddings: (L, B, Q, C); a query's mask logits are its embedding times the mask features.
            mask_features: (B, C, H, W), or of clips (B, T, C, H, W).
            mask_labels: For each image (N, height, width), or clip (N, T, height, width), bool or 0 and 1 in another
                dtype, at the padded input size or any other that covers the same area. N may be 0, or exceed Q.
            class_labels: For each image (N,) integers from 0 to num_labels-1.

        Returns:
            Unweighted float32 scalars `loss_cross_entropy`, `loss_mask`, `loss_dice` of the last output, and the same
            with the suffix `_0`, `_1`, … of the ones before it.

        Raises:
            ValueError: If targets don't fit the batch or each other, or are out of range.
            ImportError: If SciPy is not installed.
        """
        (batch_size, *clip), device = mask_features.shape[:-3], mask_features.device
        targets = pack_targets(mask_labels, class_labels, batch_size, device, clip, self.absent_class)
        with torch.autocast(device.type, enabled=False):
            class_queries_logits, mask_embeddings = class_queries_logits.float(), mask_embeddings.float()
            mask_features = mask_features.flatten(0, -4)
            matching = self.matcher(class_queries_logits, mask_embeddings, mask_features, targets, self.draw_points)
            cross_entropy, class_weight = self.loss_labels(class_queries_logits, targets, matching)
            mask, dice = self.loss_masks(mask_embeddings, mask_features, targets, matching)

            num_masks = class_weight.new_full((1,), sum(targets.counts))
            averages = average_over_processes(torch.cat([num_masks, class_weight]))
            num_masks, class_weight = averages[:1], averages[1:]
            # Without any target and with a no-object weight of 0 there is nothing to average: 0, not 0 / 0.
            cross_entropy = cross_entropy / class_weight.clamp(min=torch.finfo(torch.float32).tiny)
            mask, dice = mask / num_masks.clamp(min=1), dice / num_masks.clamp(min=1)
        losses = {"loss_cross_entropy": cross_entropy, "loss_mask": mask, "loss_dice": dice}
        suffixes = ["", *(f"_{i}" for i in range(len(cross_entropy) - 1))]
        return {
            name + suffix: loss[layer]
            for layer, suffix in zip([-1, *range(len(cross_entropy) - 1)], suffixes, strict=True)
            for name, loss in losses.items()
        }

    def loss_labels(self, class_queries_logits: Tensor, targets: Targets, matching: Matching) -> tuple[Tensor, Tensor]:
        """Return weighted cross-entropies, summed over images and queries, and the sums of the weights: two of (L,)."""
        classes = class_queries_logits.new_full(class_queries_logits.shape[:3], self.num_labels, dtype=torch.int64)
        layers = torch.arange(len(classes), device=classes.device)[:, None]  # (L, 1), broadcast with (L, M)
        classes[layers, matching.images, matching.queries] = targets.classes[matching.targets]
        weight = self.empty_weight.float()
        # (L, B, Q, K+1) -> (L, B*Q, K+1) -> (L, K+1, B*Q), where cross_entropy expects the classes
        cross_entropy = F.cross_entropy(
            class_queries_logits.flatten(1, 2).mT, classes.flatten(1), weight, reduction="none"
        )
        return cross_entropy.sum(1), weight[classes].sum((1, 2))

    def loss_masks(
        self, mask_embeddings: Tensor, mask_features: Tensor, targets: Targets, matching: Matching
    ) -> Tensor:
        """Return binary cross-entropies and dice losses at points, summed over the matched masks: (2, L)."""
        layers = torch.arange(len(mask_embeddings), device=mask_features.device)[:, None]  # (L, 1)
        matched = mask_embeddings[layers, matching.images, matching.queries]  # (L, M, C)
        matching = repeat_for_frames(matching, len(mask_features) // len(matching.counts))
        images = [image for image, count in enumerate(matching.counts) for _ in range(count)]
        losses: Tensor = MatchedMaskLosses.apply(
            mask_features,
            matched,
            matching.counts,
            self.num_uncertain + self.num_random,
            lambda logits, layer: self.select_points(logits, layer, images),
            lambda points: sample_targets(targets, matching, points),
        )
        return losses

    @torch.no_grad()
    def select_points(self, logits: Tensor, layer: int, images: Sequence[int]) -> Tensor:
        """Choose points, most of them where masks are uncertain: (M, 1, H, W) logits -> (M, P, 2)."""
        draw = lambda purpose, number: draw_checked(self.draw_points, purpose, layer, images, number, logits.device)
        points = []
        if self.num_uncertain:
            points.append(uncertain_points(logits, draw("candidates", self.num_candidates), self.num_uncertain))
        if self.num_random:
            points.append(draw("random", self.num_random))
        return torch.cat(points, dim=1)


def sample_targets(targets: Targets, matching: Matching, points: Tensor) -> Tensor:
    """Sample the matched targets at the points of their queries: (L, M, P, 2) -> (L, M, P).

    Each target is turned into floats once, for the points of all outputs.
    """
    num_layers, num_matched, num_points, _ = points.shape
    device = points.device
    # Each target's pair. With more targets than queries some have none: those are sampled at another's points, and the
    # values go to a row behind the others.
    pair_of = torch.full((num_layers, sum(map(len, targets.masks))), num_matched, device=device)
    pair_of.scatter_(1, matching.targets, torch.arange(num_matched, device=device).expand(num_layers, -1))
    labels = points.new_empty(num_layers, num_matched + 1, num_points)
    layers = torch.arange(num_layers, device=device)  # broadcast with (N, L)
    for masks, pairs in zip(targets.masks, pair_of.T.split(list(map(len, targets.masks))), strict=True):
        for chunk, floats in float_chunks(masks):
            at = points[layers, pairs[chunk].clamp(max=num_matched - 1)]  # (n, L, P, 2)
            labels[layers, pairs[chunk]] = sample_points(floats[:, None], at.flatten(1, 2)).view(at.shape[:3])
    return labels[:, :num_matched]


def repeat_for_frames(matching: Matching, num_frames: int) -> Matching:
    """Turn the pairs of clips into pairs of their frames' masks: T times as many, each pair's frames in turn."""
    frames = torch.arange(num_frames, device=matching.targets.device)
    return Matching(
        images=matching.images.repeat_interleave(num_frames),
        queries=matching.queries.repeat_interleave(num_frames, dim=1),
        targets=(matching.targets[..., None] * num_frames + frames).flatten(1),
        counts=[count * num_frames for count in matching.counts],
    )


class MatchedMaskLosses(torch.autograd.Function):
    """Losses of matched queries' masks at points that are chosen by them, of all outputs of the decoder.

    The masks of a few outputs at a time exist, from one product with the features. Kept for the backward pass are the
    points, and logits and labels there: sampling is linear in the masks, so its gradient needs no mask, and those of
    embeddings and features are products again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mask_features: Tensor,
        embeddings: Tensor,
        counts: Sequence[int],
        num_points: int,
        choose: Callable[[Tensor, int], Tensor],
        label: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """
        Args:
            mask_features: (B, C, H, W), of clips (B * T, C, H, W); of any dtype, multiplied in float32.
            embeddings: (L, M, C) float32, of the matched queries, image after image.
            counts: number of masks of each image: of the M, of clips T times as many.
            num_points: P.
            choose: takes an output's (M * T, 1, H, W) logits and its number, returns (M * T, P, 2) points.
            label: returns labels in [0, 1] (L, M * T, P) for all outputs' points (L, M * T, P, 2).

        Returns:
            (2, L) binary cross-entropies and dice losses, summed over the masks.
        """
        size = mask_features.shape[2:]
        point_logits = embeddings.new_empty(len(embeddings), sum(counts), num_points)
        points = embeddings.new_empty(*point_logits.shape, 2)
        chunks = layer_chunks(mask_features, sum(counts), len(embeddings))
        buffer = embeddings.new_empty(chunks[0].stop, sum(counts), size.numel())
        for chunk in chunks:
            masks = buffer[: chunk.stop - chunk.start]
            for features, queries, rows in frames_of(mask_features, counts):
                # (L', M', C) x (C, H * W) -> (L', M', H * W)
                masks[:, rows] = embeddings[chunk, queries] @ features
            for layer, logits in enumerate(masks.unflatten(2, size)[:, :, None], start=chunk.start):
                points[layer] = choose(logits, layer)
                point_logits[layer] = sample_points(logits, points[layer])[:, 0]
        point_labels = label(points)
        ctx.save_for_backward(mask_features, embeddings, points, point_logits, point_labels)
        ctx.counts = counts
        return torch.stack(list(map(point_losses, point_logits, point_labels)), dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Products would be in half precision where the caller's `backward` is within autocast.
        with torch.autocast(grad.device.type, enabled=False):
            return *MatchedMaskLosses._input_gradients(ctx, grad), None, None, None, None

    @staticmethod
    def _input_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """(2, L), of the losses -> (B, C, H, W), of the mask features, and (L, M, C), of the embeddings."""
        mask_features, embeddings, points, point_logits, point_labels = ctx.saved_tensors
        # In one of the two layouts in which the positions of a map are one axis.
        is_last = mask_features.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if is_last else torch.contiguous_format
        features_grad = torch.empty_like(mask_features, dtype=grad.dtype, memory_format=layout)
        embeddings_grad = torch.zeros_like(embeddings)
        size, num_masks = mask_features.shape[2:], points.shape[1]
        chunks = layer_chunks(mask_features, num_masks, len(embeddings))
        buffer = grad.new_empty(chunks[0].stop, num_masks, size.numel())
        for chunk in chunks:
            masks_grad = buffer[: chunk.stop - chunk.start]  # (L', M * T, H * W)
            for layer, layer_grad in enumerate(masks_grad.unflatten(2, size), start=chunk.start):
                point_grad = point_gradients(point_logits[layer], point_labels[layer], grad[:, layer])
                layer_grad.copy_(scatter_to_maps(point_grad, points[layer], size))
            for frame, (features, queries, rows) in enumerate(frames_of(mask_features, ctx.counts)):
                frame_grad = masks_grad[:, rows].flatten(0, 1)  # (L' * M', H * W)
                frame_embeddings = embeddings[chunk, queries]
                embeddings_grad[chunk, queries] += (frame_grad @ features.T).view(frame_embeddings.shape)
                # The first chunk writes and the others add, because writing zeros to a map first takes time.
                features_grad[frame].flatten(1).addmm_(
                    frame_embeddings.flatten(0, 1).T, frame_grad, beta=1 if chunk.start else 0
                )
        return features_grad.to(mask_features.dtype), embeddings_grad


def frames_of(mask_features: Tensor, counts: Sequence[int]) -> Iterator[tuple[Tensor, slice, slice]]:
    """Yield for each image, or each frame of a clip, its float32 features (C, H * W), the slice of its queries among
    the matched ones, and that of its masks."""
    num_frames = len(mask_features) // len(counts)
    first = 0
    for image, count in enumerate(counts):
        queries = slice(first // num_frames, (first + count) // num_frames)
        for frame in range(num_frames):
            features = mask_features[image * num_frames + frame].flatten(1).float()
            yield features, queries, slice(first + frame, first + count, num_frames)
        first += count


def layer_chunks(mask_features: Tensor, num_masks: int, num_layers: int) -> list[slice]:
    """Cut the L outputs so that the matched masks of each chunk have about `_LOGITS_AT_ONCE` pixels."""
    step = max(1, _LOGITS_AT_ONCE // max(1, num_masks * mask_features.shape[2:].numel()))
    return [slice(start, min(start + step, num_layers)) for start in range(0, num_layers, step)]


def point_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sums over masks of binary cross-entropy, mean over points, and of dice loss, smoothed by 1: (2,).

    Args:
        logits, labels: (M, P), labels in [0, 1].
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
    probabilities = logits.sigmoid()
    dice = 1 - (2 * (probabilities * labels).sum(1) + 1) / (probabilities.sum(1) + labels.sum(1) + 1)
    return torch.stack([cross_entropy.sum(), dice.sum()])


def point_gradients(logits: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of the logits (M, P), given that of `point_losses` (2,)."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        (logits_grad,) = torch.autograd.grad(point_losses(logits, labels), logits, grad)
    return logits_grad


def average_over_processes(values: Tensor) -> Tensor:
    """Return the mean over all processes where `torch.distributed` is initialised, `values` itself elsewhere."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    torch.distributed.all_reduce(values)
    return values / torch.distributed.get_world_size()
