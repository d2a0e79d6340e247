"""3x3 convolution with fewer products: Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308, section 4.1).

A tile of 2x2 outputs depends on 4x4 inputs. After the transforms below, 16 multiplications per pair of an input and an
output channel replace 36. The transforms are sums and differences of a few numbers, and sums over channels are nine
times shorter, so rounding is no worse: in float32 with 256 channels outputs have half the error of PyTorch's.

It works on CPU maps with channels last, where each of the 16 is a matrix product of tiles and weights, and so is the
backward pass; PyTorch's own gradient of the weights takes five to twelve times as long there on processors with AVX2
only. There are no second derivatives, forward-mode ones or `torch.func` transforms; infinity makes NaN of its tile.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .fast_path import Kernel


# With fewer channels the transforms cost what the products save. The gradient of the weights gains with fewer, too.
_LEAST_CHANNELS = 192
_LEAST_CHANNELS_TO_LEARN = 32
_TILES_PER_CHUNK = 512  # 8 MB of 256 channels in float32, for inputs and outputs each; products with fewer are slower


class TiledConvolution(torch.autograd.Function):
    """A 3x3 convolution with zeros around the map: (B, C, H, W) with channels last, H and W even; weights (O, C, 3, 3)
    and a bias (O,) or None. With few channels only the gradient of the weights goes by tiles."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(features, weight)
        return convolve(features, weight, bias)

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        wants_features, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            input_gradient(grad, weight) if wants_features else None,
            weight_gradient(features, grad) if wants_weight else None,
            grad.sum((0, 2, 3)) if wants_bias else None,
        )


def convolve(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve by tiles where there are many channels: (B, C, H, W), (O, C, 3, 3), (O,) -> (B, O, H, W)."""
    if min(weight.shape[:2]) >= _LEAST_CHANNELS:
        return convolve_tiles(features, weight, bias)
    return F.conv2d(features, weight, bias, padding=1)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of the input of `convolve`: (B, O, H, W) with channels last, (O, C, 3, 3) -> (B, C, H, W)."""
    # An input to the right of an output has that output to its left.
    return convolve(grad, weight.transpose(0, 1).flip(2, 3))


def convolve_tiles(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve (B, C, H, W) with channels last, H and W even, by (O, C, 3, 3) and (O,) -> the same, (B, O, H, W)."""
    batch, _, height, width = features.shape
    output = features.new_empty(batch, height, width, len(weight))
    filters = _transform_filters(weight)
    product_space, output_space = _Workspace(features), _Workspace(features)
    for tiles in _Tiles.split(features):
        products = product_space.view(4, 4, *tiles.shape, len(weight))
        torch.bmm(_matrices(tiles.transformed_inputs()), filters, out=_matrices(products))
        if bias is not None:
            products[1, 1] += bias  # the only one of the sixteen that all four outputs add
        _transform_outputs(products, tiles.outputs_in(output), output_space)
    return output.permute(0, 3, 1, 2)


def weight_gradient(features: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of a 3x3 convolution's weights, (O, C, 3, 3), from input and gradient of the output.

    (B, C, H, W) and (B, O, H, W), both with channels last, H and W even.
    """
    rows = grad.permute(0, 2, 3, 1)
    filter_grad = features.new_zeros(16, grad.shape[1], features.shape[1])
    product_space, output_space = _Workspace(features), _Workspace(features)
    for tiles in _Tiles.split(features):
        product_grad = product_space.view(4, 4, *tiles.shape, grad.shape[1])
        _transform_output_grad(tiles.outputs_in(rows), product_grad, output_space)
        filter_grad.baddbmm_(_matrices(product_grad).mT, _matrices(tiles.transformed_inputs()))
    transform = _filter_transform(features)
    return torch.einsum("ai,bj,aboc->ocij", transform, transform, filter_grad.unflatten(0, (4, 4)))


class _Workspace:
    """Memory that every chunk uses again, as fresh memory is not in the cache; the last chunk may be smaller."""

    def __init__(self, like: Tensor) -> None:
        self._numbers = like.new_empty(0)

    def view(self, *shape: int) -> Tensor:
        """Return memory of that shape; its former contents are lost."""
        count = math.prod(shape)
        if count > len(self._numbers):
            self._numbers = self._numbers.new_empty(count)
        return self._numbers[:count].view(shape)


class _Tiles(NamedTuple):
    """Some rows of tiles of an image.

    Args:
        rows: (2 * n + 2, W + 2, C), inputs of n rows of tiles, with zeros around the image.
        image: index in the batch.
        first: number of the first row of tiles.
        workspaces: for `transformed_inputs`.
    """

    rows: Tensor
    image: int
    first: int
    workspaces: tuple[_Workspace, _Workspace]

    @classmethod
    def split(cls, features: Tensor) -> Iterator["_Tiles"]:
        """Cut (B, C, H, W) into a few hundred tiles at a time; each overwrites the one before."""
        height, width = features.shape[2:]
        step = min(max(1, _TILES_PER_CHUNK // (width // 2)), height // 2)
        padded = features.new_zeros(2 * step + 2, width + 2, features.shape[1])
        workspaces = _Workspace(features), _Workspace(features)
        for image, rows in enumerate(features.permute(0, 2, 3, 1)):
            for first in range(0, height // 2, step):
                inputs = padded[: 2 * min(step, height // 2 - first) + 2]
                above = 2 * first - 1  # the first row of inputs
                start, stop = max(above, 0), min(above + len(inputs), height)
                inputs[: start - above] = 0
                inputs[stop - above :] = 0
                inputs[start - above : stop - above, 1:-1] = rows[start:stop]
                yield cls(inputs, image, first, workspaces)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of tiles along height and width."""
        return len(self.rows) // 2 - 1, self.rows.shape[1] // 2 - 1

    def transformed_inputs(self) -> Tensor:
        """B^T d B of the paper, for each tile and channel: (4, 4, n, W / 2, C)."""
        height, width = self.shape
        along_height = self.workspaces[0].view(4, height, *self.rows.shape[1:])
        _transform_inputs([self.rows[row : row + 2 * height : 2] for row in range(4)], along_height)
        transformed = self.workspaces[1].view(4, 4, height, width, self.rows.shape[2])
        columns = [along_height[:, :, column : column + 2 * width : 2] for column in range(4)]
        _transform_inputs(columns, transformed.transpose(0, 1))
        return transformed

    def outputs_in(self, output: Tensor) -> Tensor:
        """Return a view of the tiles' outputs in (B, H, W, O): (2, 2, n, W / 2, O)."""
        rows = output[self.image, 2 * self.first : 2 * (self.first + self.shape[0])]
        return rows.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).permute(1, 3, 0, 2, 4)


def _matrices(tiles: Tensor) -> Tensor:
    """(4, 4, n, W / 2, C) -> (16, n * W / 2, C)."""
    return tiles.flatten(2, 3).flatten(0, 1)


def _transform_inputs(inputs: list[Tensor], transformed: Tensor) -> None:
    """B^T of the paper: along one side of a tile, four inputs (...) to (4, ...)."""
    torch.sub(inputs[0], inputs[2], out=transformed[0])
    torch.add(inputs[1], inputs[2], out=transformed[1])
    torch.sub(inputs[2], inputs[1], out=transformed[2])
    torch.sub(inputs[1], inputs[3], out=transformed[3])


def _filter_transform(like: Tensor) -> Tensor:
    """G of the paper, (4, 3)."""
    return like.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])


def _transform_filters(weight: Tensor) -> Tensor:
    """G g G^T of the paper: (O, C, 3, 3) -> (16, C, O)."""
    transform = _filter_transform(weight)
    return torch.einsum("ai,bj,ocij->abco", transform, transform, weight).flatten(0, 1).contiguous()


def _transform_outputs(products: Tensor, outputs: Tensor, workspace: _Workspace) -> None:
    """A^T m A of the paper: (4, 4, ...) to (2, 2, ...)."""
    along_height = workspace.view(2, *products.shape[1:])
    for given, written in ((products, along_height), (along_height.transpose(0, 1), outputs.transpose(0, 1))):
        torch.add(given[0], given[1], out=written[0]).add_(given[2])
        torch.sub(given[1], given[2], out=written[1]).sub_(given[3])


def _transform_output_grad(grad: Tensor, product_grad: Tensor, workspace: _Workspace) -> None:
    """The transpose of `_transform_outputs`: (2, 2, ...) to (4, 4, ...)."""
    along_height = workspace.view(4, *grad.shape[1:])
    for given, written in ((grad, along_height), (along_height.transpose(0, 1), product_grad.transpose(0, 1))):
        written[0] = given[0]
        torch.add(given[0], given[1], out=written[1])
        torch.sub(given[0], given[1], out=written[2])
        torch.neg(given[1], out=written[3])


def _serves(layer: Any, features: Tensor) -> bool:
    weight, parameters = layer.weight, list(layer.parameters())
    return (
        layer.kernel_size == (3, 3)
        and layer.stride == layer.dilation == (1, 1)
        and layer.padding in ((1, 1), "same")
        and layer.padding_mode == "zeros"
        and layer.groups == 1
        and features.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and features.dim() == 4
        and features.dtype in (torch.float32, torch.float64)
        and all(parameter.dtype == features.dtype for parameter in parameters)
        and features.numel() > 0
        and features.shape[1] == weight.shape[1]
        and features.shape[2] % 2 == features.shape[3] % 2 == 0
        and features.is_contiguous(memory_format=torch.channels_last)
        and min(weight.shape[:2]) >= _LEAST_CHANNELS_TO_LEARN
        # Small maps have too few tiles for the sixteen matrices of weights.
        and features.shape[2] * features.shape[3] >= 4 * min(weight.shape[:2])
    )


def _forward(layer: Any, features: Tensor) -> Tensor:
    output: Tensor = TiledConvolution.apply(features, layer.weight, layer.bias)
    return output


winograd_convolution = Kernel(_serves, _forward)
