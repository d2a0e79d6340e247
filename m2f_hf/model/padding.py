"""Hides what a batch adds around an image from the model, so that the image gives what it gives alone."""

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.fast_path import is_recorded


PADDING_DIVISOR = 32  # an image's own padding; what a batch adds beyond it is hidden


def image_sizes_from_mask(pixel_mask: Tensor) -> Tensor:
    """Return height and width of each image: (B, H, W), nonzero = image, at the top left -> (B, 2) int64."""
    image = pixel_mask.bool()
    return torch.stack([image.any(dim=2).sum(dim=1), image.any(dim=1).sum(dim=1)], dim=1)


def may_hide_padding(pixel_values: Tensor, pixel_mask: Tensor | None, image_sizes: Tensor) -> bool:
    """Return whether there may be padding to hide; only on the CPU, where nothing waits, are the sizes looked at.

    A processor gives a mask with every image, and most often each fills its own multiple of 32.
    """
    if pixel_mask is None:
        return False
    if image_sizes.device.type != "cpu" or is_recorded():
        return True
    return bool((padded_sizes(image_sizes) < torch.tensor(pixel_values.shape[-2:])).any())


def padded_sizes(image_sizes: Tensor) -> Tensor:
    """Return height and width to which each image alone would be padded: (B, 2) -> (B, 2)."""
    return (image_sizes.clamp(min=1) + PADDING_DIVISOR - 1) // PADDING_DIVISOR * PADDING_DIVISOR


def hidden_padding(image_sizes: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Return where a map is beyond an image's own multiple of 32: (B, 2) -> (B, height, width) bool, True = padding.

    An image alone is padded to a multiple of 32 and the original attends there; what a batch adds beyond that must not
    move the result.
    """
    valid = padded_sizes(image_sizes) // stride  # (B, 2)
    rows, columns = (torch.arange(length, device=image_sizes.device) for length in size)
    return (rows[:, None] >= valid[:, :1, None]) | (columns >= valid[:, 1:, None])


# --- In the backbone -------------------------------------------------------------------------------------------------
#
# Alone, an image ends in the zeros with which convolutions and attention windows fill up their surroundings. Hence in a
# batch the same zeros: before each convolution or pooling that looks at neighbours, and after the norm in front of each
# window attention. So a convolutional backbone gives an image exactly what it gives it alone. A Swin nearly: its
# shifted windows wrap around at the edge of the batch, not of the image.


class PaddedBatch(NamedTuple):
    """A batch whose padding is hidden.

    Args:
        image_sizes: (B, 2) int64, height and width of each image before padding.
        size: height and width of the batch.
    """

    image_sizes: Tensor
    size: tuple[int, int]

    def padding(self, map_size: tuple[int, int]) -> Tensor:
        """Return where a map of this batch holds hidden padding: (B, height, width) bool, True = padding."""
        return hidden_padding(self.image_sizes, self.size[0] // map_size[0], map_size)


class _CurrentCall(threading.local):
    """The batch that the backbone reads in this thread: hooks are given tensors alone, so that it cannot be their
    argument. Of all carriers, compilers, exports and traces take this one (no `ContextVar`)."""

    batch: PaddedBatch | None = None


_CURRENT = _CurrentCall()


def call_on_batch(batch: PaddedBatch | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return `function(*args, **kwargs)`; a backbone in it hides the padding of `batch`, None: hides nothing."""
    before, _CURRENT.batch = _CURRENT.batch, batch
    try:
        return function(*args, **kwargs)
    finally:
        _CURRENT.batch = before


def keep_batch(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return a gradient checkpointing function that computes layers again with the batch that they were called on.

    The backward pass runs after the call, perhaps after others, and on a GPU in a thread of its own.
    """

    def checkpoint_on_batch(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the graph has the batch, and computes again by itself
            return checkpoint(function, *args, **kwargs)
        return checkpoint(partial(call_on_batch, _CURRENT.batch, function), *args, **kwargs)

    return checkpoint_on_batch


def hide_padding_in(backbone: nn.Module) -> None:
    """Hang hooks on a backbone that zero the padding of the batch it is called on, see [`call_on_batch`].

    A Swin's layers zero theirs by [`hidden_tokens`].
    """
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d):
            if max(module.kernel_size if isinstance(module.kernel_size, tuple) else (module.kernel_size,)) > 1:
                module.register_forward_pre_hook(_zero_in_map)
        elif name.endswith("layernorm_before") and not hasattr(
            backbone.get_submodule(name.removesuffix(".layernorm_before")), "hides_padding"
        ):
            module.register_forward_hook(_zero_in_tokens)


def hidden_tokens(map_size: tuple[int, int]) -> Tensor | None:
    """Return which tokens of a map are hidden padding: (B, height * width) bool, True = padding; None: none is."""
    return None if _CURRENT.batch is None else _CURRENT.batch.padding(map_size).flatten(1)


def _zero_in_map(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Hook before a module that reads (B, C, h, w)."""
    if _CURRENT.batch is None:
        return None
    features, *others = args
    padding = _CURRENT.batch.padding((features.shape[2], features.shape[3]))
    return (features.masked_fill(padding[:, None], 0.0), *others)


def _zero_in_tokens(module: nn.Module, args: tuple[Tensor, ...], tokens: Tensor) -> Tensor | None:
    """Hook after a module that gives (B, h * w, C)."""
    batch = _CURRENT.batch
    if batch is None:
        return None
    height, width = batch.size
    shrinkage = math.isqrt(height * width // tokens.shape[1])
    padding = batch.padding((height // shrinkage, width // shrinkage))
    return tokens.masked_fill(padding.flatten(1)[..., None], 0.0)


# --- In the decoders -------------------------------------------------------------------------------------------------


def masked_group_norm(features: Tensor, norm: nn.GroupNorm, padding: Tensor | None) -> Tensor:
    """Return GroupNorm of each image without its padding, zeros there: (B, C, H, W), (B, H, W) -> (B, C, H, W)."""
    if padding is None:
        return norm(features)
    image = ~padding.flatten(1)[:, None]  # (B, 1, N)
    share = image / image.sum(2, keepdim=True)  # sums to one over each image

    def group_mean(channels: Tensor) -> Tensor:
        # (B, C, N) -> (B, C, 1), the same for all channels of a group. No matrix product: autocast would run it in half
        # precision, where a mean that is large compared to the deviation spoils both.
        groups = (channels * share).sum(2, keepdim=True).unflatten(1, (norm.num_groups, -1))
        return groups.mean(2, keepdim=True).expand_as(groups).flatten(1, 2)

    channels = features.flatten(2).float()
    centred = channels - group_mean(channels)
    scale = torch.rsqrt(group_mean(centred.square()) + norm.eps) * norm.weight[:, None].float()
    normalised = torch.addcmul(norm.bias[:, None].float(), centred, scale) * image
    return normalised.view_as(features).to(features.dtype)


def continue_edges(features: Tensor, padding: Tensor | None) -> Tensor:
    """Repeat each image's last row and column into its padding, (B, C, H, W), (B, H, W) -> (B, C, H, W).

    Interpolation then gives at an image's edge what it gives at the edge of a map.
    """
    if padding is None:
        return features
    rows, columns = padding[:, :, :1], padding[:, :1]  # (B, H, 1), (B, 1, W), True = beyond the image
    last_row, last_column = ((~side).sum((1, 2)).sub(1).view(-1, 1, 1, 1) for side in (rows, columns))
    features = torch.where(rows[:, None], features.take_along_dim(last_row, dim=2), features)
    return torch.where(columns[:, None], features.take_along_dim(last_column, dim=3), features)
