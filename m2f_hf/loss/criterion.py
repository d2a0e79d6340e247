"""Losses of Mask2Former: classes of all queries, masks of the matched ones at sampled points (section 3.3)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.products import linear
from .matcher import Mask2FormerHungarianMatcher, Matching, Targets, pack_targets
from .points import draw_in_parts, draw_uniform_points, in_floats, sample_points, spread_to_maps, uncertain_points


_LOGITS_AT_ONCE = 1 << 23  # of matched masks, 32 MB


class Mask2FormerLoss(nn.Module):
    """Cross-entropy, mask and dice losses of every output of the decoder after bipartite matching.

    - `loss_cross_entropy`: mean over all queries of the classes' cross-entropy, weighted with `empty_weight` of the
      target class; unmatched queries are to say "no object".
    - `loss_mask`, `loss_dice`: binary cross-entropy (mean over points) and dice loss of the matched masks, summed and
      divided by the number of targets. The masks of a clip count frame by frame, its targets once.

    Computed in float32 whatever the model's dtype, autocast or not. Where `torch.distributed` is initialised, the
    number of targets and the sum of class weights are averaged over the processes, hence the mean of the processes'
    losses is the loss of their batches put together, and every process must call the criterion. (The original averages
    the former only; for one process there is no difference.)

    Memory: mask logits are written down for matched queries only, a few outputs at a time, and none is kept for the
    backward pass. On the way to the loss the device is read once, for the matching costs.

    Args:
        config: Uses `num_labels`, `no_object_weight`, `class_weight`, `mask_weight`, `dice_weight`,
            `train_num_points`, `oversample_ratio`, `importance_sample_ratio`; of clips also `label_frame`.
        weight_dict: What the model multiplies `loss_cross_entropy`, `loss_mask` and `loss_dice` with.

    Attributes:
        draw_points: Where random points come from, a `point_sampling.DrawPoints`. Replace it to repeat or to share
            points.
    """

    empty_weight: Tensor

    def __init__(self, config: Any, weight_dict: dict[str, float]):
        super().__init__()
        self.num_labels = config.num_labels
        self.weight_dict = weight_dict
        last_frame_decides = getattr(config, "label_frame", "any") == "last"
        self.absent_class = config.num_labels if last_frame_decides else None
        empty_weight = torch.ones(config.num_labels + 1)
        empty_weight[-1] = config.no_object_weight
        self.register_buffer("empty_weight", empty_weight)

        self.num_candidates = int(config.train_num_points * config.oversample_ratio)
        self.num_uncertain = int(config.train_num_points * config.importance_sample_ratio)
        self.num_random = config.train_num_points - self.num_uncertain
        self.draw_points = draw_uniform_points
        self.matcher = Mask2FormerHungarianMatcher(
            cost_class=config.class_weight,
            cost_mask=config.mask_weight,
            cost_dice=config.dice_weight,
            num_points=config.train_num_points,
        )

    # The assignment is made on the host, and the shapes that follow from it would be compiled anew at each step.
    @torch.compiler.disable
    def forward(
        self,
        class_queries_logits: Tensor,
        mask_embeddings: Tensor,
        mask_features: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Computes the losses of L outputs of the decoder, the final one last.

        Args:
            class_queries_logits: (L, B, Q, num_labels+1), the last class is "no object".
            mask_embeddings: (L, B, Q, C); a query's mask logits are its embedding times the mask features.
            mask_features: (B, C, H, W), or of clips (B, T, C, H, W).
            mask_labels: For each image (N, height, width), or clip (N, T, height, width), bool or 0 and 1 in another
                dtype, at the padded input size (any size that covers the same area will do). N may be 0, or exceed Q.
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
            mask_features = mask_features.flatten(0, -4).float()
            matching = self.matcher(class_queries_logits, mask_embeddings, mask_features, targets, self.draw_points)
            cross_entropy, class_weight = self.loss_labels(class_queries_logits, targets, matching)
            mask, dice = self.loss_masks(mask_embeddings, mask_features, targets, matching)

            num_masks = class_weight.new_full((1,), sum(targets.counts))
            num_masks, class_weight = average_over_processes(torch.cat([num_masks, class_weight])).split_with_sizes(
                [1, len(class_weight)]
            )
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
        """Weighted cross-entropies, summed over images and queries, and the sums of the weights: two of (L,)."""
        classes = class_queries_logits.new_full(class_queries_logits.shape[:3], self.num_labels, dtype=torch.int64)
        layers = torch.arange(len(classes), device=classes.device)[:, None]  # (L, 1), broadcast with (L, M)
        classes[layers, matching.images, matching.queries] = targets.classes[matching.targets]
        weight = self.empty_weight.float()
        # (L, B, Q, K+1) -> (L, B*Q, K+1) -> (L, K+1, B*Q), where cross_entropy looks for the classes
        cross_entropy = F.cross_entropy(
            class_queries_logits.flatten(1, 2).mT, classes.flatten(1), weight, reduction="none"
        )
        return cross_entropy.sum(1), weight[classes].sum((1, 2))

    def loss_masks(
        self, mask_embeddings: Tensor, mask_features: Tensor, targets: Targets, matching: Matching
    ) -> tuple[Tensor, Tensor]:
        """Binary cross-entropies and dice losses at points, summed over the matched masks: two of (L,)."""
        num_frames = len(mask_features) // len(matching.counts)
        layers = torch.arange(len(mask_embeddings), device=mask_features.device)[:, None]  # beside (L, M)
        matched = mask_embeddings[layers, matching.images, matching.queries]  # (L, M, C)
        matching = by_frame(matching, num_frames)
        images = [image for image, count in enumerate(matching.counts) for _ in range(count)]
        losses: tuple[Tensor, Tensor] = MatchedMaskLosses.apply(
            mask_features,
            matched,
            matching.counts,
            self.num_uncertain + self.num_random,
            lambda logits, layer, out: self.select_points(logits, layer, images, out),
            lambda points: self.sample_targets(targets, matching, points),
        )
        return losses

    @staticmethod
    def sample_targets(targets: Targets, matching: Matching, points: Tensor) -> Tensor:
        """The matched targets at the points of their queries: (L, M, P, 2) -> (L, M, P).

        Each target is read once, at the points of all outputs, as reading turns it into floats.
        """
        num_layers, num_matched, num_points, _ = points.shape
        device = points.device
        # Which pair a target is in. With more targets than queries some are in none: those read another's points, and
        # what they find goes to a row behind the others.
        pair_of = torch.full((num_layers, sum(map(len, targets.masks))), num_matched, device=device)
        pairs = torch.arange(num_matched, device=device).expand(num_layers, -1)
        pair_of.scatter_(1, matching.targets, pairs)
        labels = points.new_empty(num_layers, num_matched + 1, num_points)
        layers = torch.arange(num_layers, device=device)  # beside (N, L)
        first_target = 0
        for masks in targets.masks:
            pair = pair_of[:, first_target : first_target + len(masks)].T  # (N, L)
            for floats, of_floats in in_floats(masks, pair):
                read_at = points[layers, of_floats.clamp(max=num_matched - 1)]  # (n, L, P, 2)
                sampled = sample_points(floats[:, None], read_at.flatten(1, 2))
                labels[layers, of_floats] = sampled.view(read_at.shape[:3])
            first_target += len(masks)
        return labels[:, :num_matched]

    @torch.no_grad()
    def select_points(self, logits: Tensor, layer: int, images: Sequence[int], out: Tensor) -> None:
        """Writes (M, P, 2) points for (M, 1, H, W) logits, mostly where these are uncertain."""
        uncertain, random = out.tensor_split([self.num_uncertain], dim=1)
        draw = lambda purpose, num_points: (
            draw_in_parts(self.draw_points, purpose, layer, images, num_points, logits.device) if num_points else []
        )
        for part, candidates in draw("candidates", self.num_candidates if self.num_uncertain else 0):
            uncertain[part] = uncertain_points(logits[part], candidates, self.num_uncertain)
        for part, points in draw("random", self.num_random):
            random[part] = points


def by_frame(matching: Matching, num_frames: int) -> Matching:
    """The pairs of clips as pairs of their frames' masks: each pair's frames after another, T times as many."""
    if num_frames == 1:
        return matching
    frames = torch.arange(num_frames, device=matching.targets.device)
    return Matching(
        images=matching.images.repeat_interleave(num_frames),
        queries=matching.queries.repeat_interleave(num_frames, dim=1),
        targets=(matching.targets[..., None] * num_frames + frames).flatten(1),
        counts=[count * num_frames for count in matching.counts],
    )


class MatchedMaskLosses(torch.autograd.Function):
    """Losses of matched queries' masks at points that are chosen by them, of all outputs of the decoder.

    The masks are written down for a few outputs at a time, and for these in one product with the features. What is kept
    are the points, and logits and labels there: sampling is linear in the masks, so its gradient needs no mask, and
    those to embeddings and features are products again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mask_features: Tensor,
        embeddings: Tensor,
        counts: Sequence[int],
        num_points: int,
        choose: Callable[[Tensor, int, Tensor], None],
        label: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            mask_features: (B, C, H, W) float32, of clips (B * T, C, H, W).
            embeddings: (L, M, C) float32, of the matched queries, image after image.
            counts: how many masks belong to each image: of the M, of clips T times as many.
            num_points: P.
            choose: is given an output's (M * T, 1, H, W) logits and its number, and writes (M * T, P, 2) points.
            label: makes labels in [0, 1] (L, M * T, P) of all outputs' points (L, M * T, P, 2).

        Returns:
            Binary cross-entropies and dice losses, summed over the masks: (L,) each.
        """
        point_logits = embeddings.new_empty(len(embeddings), sum(counts), num_points)
        points = embeddings.new_empty(len(embeddings), sum(counts), num_points, 2)
        pairs = list(pairs_of_frames(mask_features, counts))
        size = mask_features.shape[2:]
        parts = list(outputs_at_once(mask_features, sum(counts), len(embeddings)))
        memory = embeddings.new_empty(parts[0].stop, sum(counts), *size)
        for part in parts:
            logits = memory[: part.stop - part.start]
            for features, of_frame, masks in pairs:
                rows = embeddings[part, of_frame]
                # (L' * M', C) x (C, H * W) -> (L', M', H, W)
                logits[:, masks] = linear(rows.flatten(0, 1), features.flatten(1).T).view(*rows.shape[:2], *size)
            for layer, of_layer in enumerate(logits[:, :, None], start=part.start):
                choose(of_layer, layer, points[layer])
                point_logits[layer] = sample_points(of_layer, points[layer])[:, 0]
        point_labels = label(points)
        ctx.save_for_backward(mask_features, embeddings, points, point_logits, point_labels)
        ctx.counts = counts
        # Output by output, so that what is written down on the way is small.
        of_outputs = list(zip(point_logits, point_labels, strict=True))
        return (
            torch.stack([sigmoid_cross_entropy(*of_output).sum() for of_output in of_outputs]),
            torch.stack([dice(*of_output).sum() for of_output in of_outputs]),
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cross_entropy_grad: Tensor, dice_grad: Tensor) -> tuple[Tensor | None, ...]:
        # Whoever calls `backward` within autocast would have the products below in half precision.
        with torch.autocast(dice_grad.device.type, enabled=False):
            return *MatchedMaskLosses._input_gradients(ctx, cross_entropy_grad, dice_grad), None, None, None, None

    @staticmethod
    def _input_gradients(ctx: Any, cross_entropy_grad: Tensor, dice_grad: Tensor) -> tuple[Tensor, Tensor]:
        """Of the two losses (L,) each -> of mask features (B, C, H, W) and embeddings (L, M, C)."""
        mask_features, embeddings, points, point_logits, point_labels = ctx.saved_tensors
        # In one of the two layouts in which the positions of a map are one axis.
        is_last = mask_features.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if is_last else torch.contiguous_format
        features_grad = torch.empty_like(mask_features, memory_format=layout)
        embeddings_grad = torch.zeros_like(embeddings)
        size = mask_features.shape[2:]
        num_masks = points.shape[1]
        parts = list(outputs_at_once(mask_features, num_masks, len(embeddings)))
        memory = points.new_empty(parts[0].stop, num_masks, size.numel())
        for part in parts:
            masks_grad = memory[: part.stop - part.start]  # (L', M * T, H * W)
            for layer, of_layer in enumerate(masks_grad.unflatten(2, size), start=part.start):
                grad = point_gradients(
                    point_logits[layer], point_labels[layer], cross_entropy_grad[layer], dice_grad[layer]
                )
                spread_to_maps(grad, points[layer], out=of_layer)
            for frame, (features, of_frame, masks) in enumerate(pairs_of_frames(mask_features, ctx.counts)):
                frame_grad = masks_grad[:, masks].flatten(0, 1)
                rows = embeddings[part, of_frame]
                embeddings_grad[part, of_frame] += linear(frame_grad, features.flatten(1)).view(rows.shape)
                # Written by the first outputs and added to by the others, as zeros are dear to write for a map.
                of_features = features_grad[frame].flatten(1)
                of_features.addmm_(rows.flatten(0, 1).T, frame_grad, beta=1 if part.start else 0)
        return features_grad, embeddings_grad


def pairs_of_frames(mask_features: Tensor, counts: Sequence[int]) -> Iterator[tuple[Tensor, slice, slice]]:
    """For each image, or each frame of a clip: its features (C, H, W), its queries among the matched, their masks."""
    num_frames = len(mask_features) // len(counts)
    first = 0
    for image, count in enumerate(counts):
        queries = slice(first // num_frames, (first + count) // num_frames)
        for frame in range(num_frames):
            features = mask_features[image * num_frames + frame]
            yield features, queries, slice(first + frame, first + count, num_frames)
        first += count


def outputs_at_once(mask_features: Tensor, num_masks: int, num_layers: int) -> Iterator[slice]:
    """Cut the L outputs so that the matched masks of each piece have about `_LOGITS_AT_ONCE` pixels."""
    step = max(1, _LOGITS_AT_ONCE // max(1, num_masks * mask_features.shape[2:].numel()))
    for start in range(0, num_layers, step):
        yield slice(start, min(start + step, num_layers))


def sigmoid_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, mean over points: (M, P) logits, (M, P) labels in [0, 1] -> (M,)."""
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice loss over points, smoothed by 1: (M, P) logits, (M, P) labels in [0, 1] -> (M,) in [0, 1)."""
    probabilities = logits.sigmoid()
    return 1 - (2 * (probabilities * labels).sum(1) + 1) / (probabilities.sum(1) + labels.sum(1) + 1)


def point_gradients(logits: Tensor, labels: Tensor, of_cross_entropy: Tensor, of_dice: Tensor) -> Tensor:
    """Gradient of (M, P) logits, given those of every mask's `sigmoid_cross_entropy` and of its `dice`, () each."""
    probabilities = logits.sigmoid()
    difference = probabilities - labels
    # dice = 1 - numerator / denominator, in which a probability counts 2 * label and 1.
    numerator = 2 * (probabilities * labels).sum(1, keepdim=True) + 1
    denominator = probabilities.sum(1, keepdim=True) + labels.sum(1, keepdim=True) + 1
    constant, of_label = of_dice * numerator / denominator.square(), -2 * of_dice / denominator
    of_probabilities = torch.addcmul(constant, of_label, labels)
    # The slope of the sigmoid is p (1 - p).
    slope = torch.addcmul(probabilities, probabilities, probabilities, value=-1)
    return difference.mul_(of_cross_entropy / logits.shape[1]).addcmul_(slope, of_probabilities)


def average_over_processes(values: Tensor) -> Tensor:
    """The mean over all processes where `torch.distributed` is initialised, `values` itself elsewhere."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    torch.distributed.all_reduce(values)
    return values / torch.distributed.get_world_size()
