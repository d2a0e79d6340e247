"""The pixel decoder's one step of a feature pyramid, from stride 8 to stride 4 (paper, section 3.2.2), image by image.

Maps at stride 4 are the largest that the model writes: of 256 channels 67 MB for 1024x1024 pixels. What is that large
comes from the operating system page by page, every time (see `chunking`), and of each image autograd would keep five.
With a backward pass of its own the step keeps one, the fused map before its norm; the rest is computed again from what
came in.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .convolution import convolve, input_gradient, weight_gradient
from .group_norm import apply_statistics, group_norm_gradients, normalise_groups, rows_of
from .pieces import pieces
from .products import linear
from .swin import to_map


class StepParameters(NamedTuple):
    """Of C channels, in the order in which they are used; D channels come from the backbone, M go out."""

    lateral: Tensor  # (C, D)
    lateral_scale: Tensor  # (C,), of the norm
    lateral_shift: Tensor
    fuse: Tensor  # (C, C, 3, 3)
    fuse_scale: Tensor
    fuse_shift: Tensor
    mask: Tensor  # (M, C)
    mask_bias: Tensor


class PyramidStep(torch.autograd.Function):
    """`mask(relu(norm(fuse(norm(lateral(features)) + enlarged(coarse)))))`; norms are GroupNorms.

    It has neither second derivatives nor forward-mode ones, no `torch.func` transforms.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        coarse: Tensor,
        learns: bool,
        groups: int,
        eps: tuple[float, float],
        *parameters: Tensor,
    ) -> Tensor:
        """
        Args:
            features: (B, D, H, W) with channels last, of a size and dtype that [`suits_tiles`] says yes to.
            coarse: (B, C, h, w).
            learns: whether there may be a backward pass, which keeps the maps for it.
            groups: of both norms.
            eps: of the two.
            parameters: those of [`StepParameters`].

        Returns:
            (B, M, H, W) with channels last.
        """
        step = StepParameters(*parameters)
        batch, _, height, width = features.shape
        output = torch.empty(
            (batch, len(step.mask), height, width),
            dtype=features.dtype,
            device=features.device,
            memory_format=torch.channels_last,
        )
        kept: list[Tensor] = []
        for image in range(batch):
            # Where the masks are to stand there is room for what comes before them.
            masks = rows_of(output)[image]
            fits = len(step.mask) == len(step.lateral)
            joined = _lateral(features[image], step, masks if fits else masks.new_empty(len(masks), len(step.lateral)))
            of_lateral = normalise_groups(
                joined, step.lateral_scale, step.lateral_shift, groups, eps[0], False, output=joined
            )
            _add_enlarged(joined, coarse[image : image + 1])
            fused = convolve(joined, step.fuse)
            del joined
            # Nobody reads it again where nothing is learnt.
            normalised = torch.empty_like(fused) if learns else fused
            of_fused = normalise_groups(fused, step.fuse_scale, step.fuse_shift, groups, eps[1], True, normalised)
            linear(rows_of(normalised)[0], step.mask, step.mask_bias, out=masks)
            if learns:
                kept += [fused, *of_lateral, *of_fused]
            del normalised, fused
        ctx.save_for_backward(features, coarse, *parameters, *kept)
        return output

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, coarse, *rest = ctx.saved_tensors
        step, kept = StepParameters(*rest[: len(StepParameters._fields)]), rest[len(StepParameters._fields) :]
        sums = StepParameters(*map(torch.zeros_like, step))
        grad_features = torch.empty_like(features) if ctx.needs_input_grad[0] else None
        grad_coarse = torch.empty_like(coarse, memory_format=torch.channels_last) if ctx.needs_input_grad[1] else None
        size = (features.shape[2], features.shape[3])
        for image, (fused, *statistics) in enumerate(zip(*(kept[start::5] for start in range(5)), strict=True)):
            of_lateral, of_fused = (statistics[0], statistics[1]), (statistics[2], statistics[3])
            of_masks = rows_of(grad[image : image + 1].contiguous(memory_format=torch.channels_last))[0]
            normalised = torch.empty_like(fused)
            apply_statistics(fused, step.fuse_scale, step.fuse_shift, of_fused, True, normalised)
            sums.mask.addmm_(of_masks.T, rows_of(normalised)[0])
            sums.mask_bias.add_(of_masks.sum(0))
            of_map = to_map(linear(of_masks, step.mask.T)[None], size)
            torch.ops.aten.threshold_backward.grad_input(of_map, normalised, 0, grad_input=of_map)  # in place
            del normalised
            of_map = _through_norm(of_map, fused, step.fuse_scale, of_fused, (sums.fuse_scale, sums.fuse_shift))
            lateral = _lateral(features[image], step, torch.empty_like(rows_of(fused)[0]))
            joined = torch.empty_like(lateral)
            apply_statistics(lateral, step.lateral_scale, step.lateral_shift, of_lateral, False, joined)
            _add_enlarged(joined, coarse[image : image + 1])
            sums.fuse.add_(weight_gradient(joined, of_map))
            del joined
            of_map = input_gradient(of_map, step.fuse)
            if grad_coarse is not None:
                grad_coarse[image] = torch.ops.aten.upsample_bilinear2d_backward(
                    of_map, size, (1, *coarse.shape[1:]), False
                )[0]
            of_map = _through_norm(
                of_map, lateral, step.lateral_scale, of_lateral, (sums.lateral_scale, sums.lateral_shift)
            )
            of_rows = rows_of(of_map)[0]
            sums.lateral.addmm_(of_rows.T, rows_of(features)[image])
            if grad_features is not None:
                linear(of_rows, step.lateral.T, out=rows_of(grad_features)[image])
        return grad_features, grad_coarse, None, None, None, *sums


def _lateral(features: Tensor, step: StepParameters, out: Tensor) -> Tensor:
    """Of one image, before the norm: (D, H, W), where it is to stand (H * W, C) -> (1, C, H, W) with channels last."""
    return to_map(linear(rows_of(features[None])[0], step.lateral, out=out)[None], features.shape[1:])


def _add_enlarged(fine: Tensor, coarse: Tensor) -> None:
    """Adds a smaller map, enlarged bilinearly: (1, C, H, W) with channels last, and (1, C, h, w)."""
    height, width = coarse.shape[2:]
    if fine.shape[2:] != (2 * height, 2 * width):
        fine += F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
        return
    # A pixel becomes two along each side, of which each takes a quarter from the pixel next to it; at the edge from
    # itself. PyTorch's operator would write a map for another pass, and is six times as slow where strides say that
    # channels lie apart, as those of `batch[image][None]` do.
    given = coarse[0].permute(1, 2, 0)
    written = rows_of(fine)[0].view(2 * height, width, 2, -1)
    for piece in pieces(height, 4 * given[0].numel()):
        rows = given.new_empty(piece.stop - piece.start, 2, *given.shape[1:])
        upper, lower = rows.unbind(1)
        first, last = max(piece.start, 1), min(piece.stop, height - 1)  # of the rows with one above, and below
        torch.lerp(given[first : piece.stop], given[first - 1 : piece.stop - 1], 0.25, out=upper[first - piece.start :])
        torch.lerp(given[piece.start : last], given[piece.start + 1 : last + 1], 0.25, out=lower[: last - piece.start])
        upper[: first - piece.start] = given[0]
        lower[last - piece.start :] = given[-1]
        rows = rows.flatten(0, 1)
        left, right = written[2 * piece.start : 2 * piece.stop].unbind(2)
        left.add_(rows, alpha=0.75)[:, 1:].add_(rows[:, :-1], alpha=0.25)
        right.add_(rows, alpha=0.75)[:, :-1].add_(rows[:, 1:], alpha=0.25)
        left[:, 0].add_(rows[:, 0], alpha=0.25)
        right[:, -1].add_(rows[:, -1], alpha=0.25)


def _through_norm(
    grad: Tensor, features: Tensor, scale: Tensor, statistics: tuple[Tensor, Tensor], sums: tuple[Tensor, Tensor]
) -> Tensor:
    """From the gradient of a norm's output that of its input; adds those of scale and shift."""
    of_features, *of_parameters = group_norm_gradients(grad, features, scale, statistics, (True, True, True))
    assert of_features is not None
    for total, one in zip(sums, of_parameters, strict=True):
        assert one is not None
        total += one
    return of_features
