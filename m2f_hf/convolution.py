"""3x3 convolution with fewer products: Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308, section 4.1).

Four outputs that lie in a square see sixteen inputs. In the basis of the transforms below their products with the nine
weights are 16 products of one number each instead of 36, for every pair of an input and an output channel. The
transforms themselves are sums and differences, so nothing is lost to rounding: sums over channels are shorter by nine,
and in float32 the error is half of what PyTorch's convolution has.

For maps on the CPU with channels last: each of the sixteen is then a matrix product of tiles and weights, and the
backward pass is made of the same parts. In this layout PyTorch's own gradient of the weights takes five to twelve times
as long where the processor has AVX2 and no more.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .chunking import is_recorded


_LEAST_CHANNELS = 192  # with fewer the transforms cost what the products save; but for the gradient of the weights
_TILES_PER_PIECE = 512  # 8 MB of 256 channels in float32; products with fewer are slower


class TiledConv2d(nn.Conv2d):
    """A convolution that works in tiles of 2x2 outputs where it can and where that is faster."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (self._is_three_by_three() and works_in_tiles(input, weight)):
            return super()._conv_forward(input, weight, bias)
        if not torch.is_grad_enabled():
            return _convolve_faster(input, weight, bias)
        output: Tensor = TiledConvolution.apply(input, weight, bias)
        return output

    def _is_three_by_three(self) -> bool:
        """Whether each output sees the square of nine positions around it, in every channel."""
        return (
            self.kernel_size == (3, 3)
            and self.stride == self.dilation == (1, 1)
            and self.padding in ((1, 1), "same")
            and self.padding_mode == "zeros"
            and self.groups == 1
        )


def works_in_tiles(features: Tensor, weight: Tensor) -> bool:
    """Whether [`TiledConvolution`] can do it: (B, C, H, W) on the CPU, H and W even, channels last, single or double
    precision; (O, C, 3, 3)."""
    return (
        features.device.type == "cpu"
        and features.dim() == 4
        and weight.dtype == features.dtype in (torch.float32, torch.float64)
        and features.numel() > 0
        and features.shape[2] % 2 == features.shape[3] % 2 == 0
        and features.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
        and not is_recorded()
    )


class TiledConvolution(torch.autograd.Function):
    """A 3x3 convolution of what `works_in_tiles` says yes to: the map, weights and a bias or None."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(features, weight)
        return _convolve_faster(features, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        wants_features, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            # What an output saw to its right sees the output to its left.
            _convolve_faster(grad, weight.transpose(0, 1).flip(2, 3)) if wants_features else None,
            weight_gradient(features, grad) if wants_weight else None,
            grad.sum((0, 2, 3)) if wants_bias else None,
        )


def _convolve_faster(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """By tiles or as PyTorch does it; channels last."""
    if min(weight.shape[:2]) >= _LEAST_CHANNELS:
        return convolve(features, weight, bias)
    return F.conv2d(features, weight, bias, padding=1).contiguous(memory_format=torch.channels_last)


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, C, H, W) with channels last, H and W even; (O, C, 3, 3), (O,) -> (B, O, H, W) with channels last."""
    batch, _, height, width = features.shape
    output = features.new_empty(batch, height, width, len(weight))
    kernel = _transformed_kernel(weight)
    products = _Room(features)
    for tiles in _Tiles.of(features):
        found = products.view(4, 4, *tiles.shape, len(weight))
        torch.bmm(_matrices(tiles.inputs()), kernel, out=_matrices(found))
        if bias is not None:
            found[1, 1] += bias  # the one of the sixteen that all four outputs have in them
        _write_outputs(found, tiles.outputs_in(output))
    return output.permute(0, 3, 1, 2)


def weight_gradient(features: Tensor, grad: Tensor) -> Tensor:
    """Of `convolve`: (B, C, H, W) and its output's gradient (B, O, H, W), both with channels last -> (O, C, 3, 3)."""
    rows = grad.permute(0, 2, 3, 1)
    of_kernel = features.new_zeros(16, grad.shape[1], features.shape[1])
    of_products = _Room(features)
    for tiles in _Tiles.of(features):
        spread = of_products.view(4, 4, *tiles.shape, grad.shape[1])
        _spread_outputs(tiles.outputs_in(rows), spread)
        of_kernel.baddbmm_(_matrices(spread).mT, _matrices(tiles.inputs()))
    basis = _kernel_basis(features)
    return torch.einsum("ai,bj,aboc->ocij", basis, basis, of_kernel.unflatten(0, (4, 4)))


class _Room:
    """Memory that is used again for every piece: fresh memory is not in the cache."""

    def __init__(self, like: Tensor) -> None:
        self._numbers = like.new_empty(0)

    def view(self, *shape: int) -> Tensor:
        """Of that shape; what was there before is lost."""
        count = math.prod(shape)
        if count > len(self._numbers):
            self._numbers = self._numbers.new_empty(count)
        return self._numbers[:count].view(shape)


class _Tiles(NamedTuple):
    """Some rows of tiles of an image.

    Args:
        rows: (2 * n + 2, W + 2, C), what n rows of tiles see, with zeros around the image.
        image: which of the batch it is.
        first: number of the first row of tiles.
        room: for `inputs`.
    """

    rows: Tensor
    image: int
    first: int
    room: tuple[_Room, _Room]

    @classmethod
    def of(cls, features: Tensor) -> Iterator["_Tiles"]:
        """(B, C, H, W), a few hundred tiles at a time; each is overwritten by the next."""
        height, width = features.shape[2:]
        step = min(max(1, _TILES_PER_PIECE // (width // 2)), height // 2)
        padded = features.new_zeros(2 * step + 2, width + 2, features.shape[1])
        room = _Room(features), _Room(features)
        for image, rows in enumerate(features.permute(0, 2, 3, 1)):
            for first in range(0, height // 2, step):
                seen = padded[: 2 * min(step, height // 2 - first) + 2]
                above = 2 * first - 1  # the first row that is seen
                start, stop = max(above, 0), min(above + len(seen), height)
                seen[: start - above] = 0
                seen[stop - above :] = 0
                seen[start - above : stop - above, 1:-1] = rows[start:stop]
                yield cls(seen, image, first, room)

    @property
    def shape(self) -> tuple[int, int]:
        """Tiles along height and width."""
        return len(self.rows) // 2 - 1, self.rows.shape[1] // 2 - 1

    def inputs(self) -> Tensor:
        """Transformed, (4, 4, n, W / 2, C)."""
        height, width = self.shape
        along_height = self.room[0].view(4, height, *self.rows.shape[1:])
        _transform([self.rows[row : row + 2 * height : 2] for row in range(4)], along_height)
        transformed = self.room[1].view(4, 4, height, width, self.rows.shape[2])
        _transform(
            [along_height[:, :, column : column + 2 * width : 2] for column in range(4)], transformed.transpose(0, 1)
        )
        return transformed

    def outputs_in(self, output: Tensor) -> Tensor:
        """Where the outputs are in (B, H, W, O): (2, 2, n, W / 2, O)."""
        rows = output[self.image, 2 * self.first : 2 * (self.first + self.shape[0])]
        return rows.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).permute(1, 3, 0, 2, 4)


def _matrices(of_tiles: Tensor) -> Tensor:
    """(4, 4, n, W / 2, C) -> (16, n * W / 2, C)."""
    return of_tiles.flatten(2, 3).flatten(0, 1)


def _transform(seen: list[Tensor], transformed: Tensor) -> None:
    """Four inputs in a line, in the basis of the products."""
    torch.sub(seen[0], seen[2], out=transformed[0])
    torch.add(seen[1], seen[2], out=transformed[1])
    torch.sub(seen[2], seen[1], out=transformed[2])
    torch.sub(seen[1], seen[3], out=transformed[3])


def _kernel_basis(like: Tensor) -> Tensor:
    """Three weights in a line, in the basis of the products: (4, 3)."""
    return like.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def _transformed_kernel(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) -> (16, C, O)."""
    basis = _kernel_basis(weight)
    return torch.einsum("ai,bj,ocij->abco", basis, basis, weight).flatten(0, 1).contiguous()


def _write_outputs(products: Tensor, outputs: Tensor) -> None:
    """(4, 4, ...) to (2, 2, ...)."""
    along_height = products.new_empty(2, *products.shape[1:])
    for lines, written in ((products, along_height), (along_height.transpose(0, 1), outputs.transpose(0, 1))):
        torch.add(lines[0], lines[1], out=written[0]).add_(lines[2])
        torch.sub(lines[1], lines[2], out=written[1]).sub_(lines[3])


def _spread_outputs(outputs: Tensor, products: Tensor) -> None:
    """The transpose of `_write_outputs`: (2, 2, ...) to (4, 4, ...)."""
    along_height = products.new_empty(4, *outputs.shape[1:])
    for lines, written in ((outputs, along_height), (along_height.transpose(0, 1), products.transpose(0, 1))):
        written[0] = lines[0]
        torch.add(lines[0], lines[1], out=written[1])
        torch.sub(lines[0], lines[1], out=written[2])
        torch.neg(lines[1], out=written[3])
