"""A layer of the pixel decoder's encoder that learns a few thousand positions at a time.

Autograd would keep what every step on the way writes down: queries with their positions, scores, both sides of every
norm and the wide states of the feed-forward network. With a backward pass of its own the layer keeps what is dear to
compute again, in pieces that fit the cache (see `chunking`); the rest is computed again from that.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunking import pieces
from .multi_scale_deformable_attention import GatherTable, softmax_over_samples


# Of the feed-forward network's wide states, 64 MB in float32: a tenth of the backward pass for twice the memory.
_NUMBERS_KEPT = 1 << 24


class EncodedPlaces(NamedTuple):
    """What all positions of a batch's maps share.

    Args:
        shapes: height and width of each of the L levels; S positions together.
        points: (S, L * P * 2), where each lies in every level, as `points_in_maps` says it.
        padding: (B, S) bool, True = padding, whose values are zero; None: there is none.
    """

    shapes: list[tuple[int, int]]
    points: Tensor
    padding: Tensor | None


class LayerWeights(NamedTuple):
    """Of an encoder layer with C channels and M heads, in the order in which they are used; F is the wide width."""

    value_weight: Tensor  # (C, C)
    value_bias: Tensor
    sampling_weight: Tensor  # (M * L * P * 3, C): offsets, then logits of the attention weights
    sampling_bias: Tensor
    output_weight: Tensor  # (C, C)
    output_bias: Tensor
    norm1_weight: Tensor
    norm1_bias: Tensor
    fc1_weight: Tensor  # (F, C)
    fc1_bias: Tensor
    fc2_weight: Tensor  # (C, F)
    fc2_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor


class DeformableLayer(torch.autograd.Function):
    """`norm2(x + feed_forward(x))` of `x = norm1(states + attention(states + positions, states))`."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        positions: Tensor,
        places: EncodedPlaces,
        heads: int,
        eps: tuple[float, float],
        *parameters: Tensor,
    ) -> Tensor:
        """
        Args:
            states: (B, S, C).
            positions: encoding (1 or B, S, C).
            eps: of the two norms.
            parameters: those of `LayerWeights`.

        Returns:
            (B, S, C).
        """
        weights = LayerWeights(*parameters)
        length = states.shape[1]
        rows, width = states.flatten(0, 1), len(weights.fc1_weight)
        samples = len(weights.sampling_weight) // (3 * heads)  # of a head
        output, attended, first, second = (torch.empty_like(rows) for _ in range(4))
        coordinates = rows.new_empty(len(rows), heads * samples * 2)
        shares = rows.new_empty(len(rows), heads, samples)
        norms = rows.new_empty(4, len(rows), 1)  # mean and inverse deviation of the first, and of the second
        expanded = rows.new_empty(len(rows), width) if len(rows) * width <= _NUMBERS_KEPT else None
        for part in _parts(states, shares):
            table = _table(states[part], weights, part, heads, places)
            for piece in _pieces(part, length, width):
                queries = rows[piece] + _of_positions(positions, piece, length)
                sampling = torch.addmm(weights.sampling_bias, queries, weights.sampling_weight.T)
                offsets, logits = sampling.tensor_split([coordinates.shape[1]], dim=1)
                points = _of_positions(places.points[None], piece, length)
                torch.add(
                    offsets.unflatten(1, (heads, -1)),
                    points[:, None],
                    out=coordinates[piece].view(len(points), heads, -1),
                )
                shares[piece] = softmax_over_samples(logits.unflatten(1, (heads, -1)))
                attended[piece] = table.attend(coordinates[piece], shares[piece], _images(part, piece, length))
                torch.addmm(weights.output_bias, attended[piece], weights.output_weight.T, out=first[piece])
                normed = _norm(first[piece].add_(rows[piece]), *weights[6:8], eps[0], norms[:2, piece])
                into = None if expanded is None else expanded[piece]
                wide = torch.addmm(weights.fc1_bias, normed, weights.fc1_weight.T, out=into).relu_()
                torch.addmm(weights.fc2_bias, wide, weights.fc2_weight.T, out=second[piece])
                output[piece] = _norm(second[piece].add_(normed), *weights[12:], eps[1], norms[2:, piece])
        ctx.save_for_backward(
            states, positions, coordinates, shares, attended, first, second, norms, expanded, places.points,
            places.padding, *parameters,
        )  # fmt: skip
        ctx.settings = (places.shapes, heads, samples, eps)
        return output.view(states.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, positions, coordinates, shares, attended, first, second, norms, expanded, *rest = ctx.saved_tensors
        points, padding, *parameters = rest
        shapes, heads, samples, eps = ctx.settings
        places, weights = EncodedPlaces(shapes, points, padding), LayerWeights(*parameters)
        length, width = states.shape[1], len(weights.fc1_weight)
        rows, grad_output = states.flatten(0, 1), grad.flatten(0, 1)
        grads = LayerWeights(*(torch.zeros_like(one) for one in parameters))
        grad_rows, grad_attended = torch.empty_like(rows), torch.empty_like(rows)
        grad_positions = torch.zeros_like(positions)
        same_head = torch.block_diag(*[rows.new_ones(samples, samples)] * heads)  # sums over a head's samples
        for part in _parts(states, shares):
            table = _table(states[part], weights, part, heads, places)
            of_part = slice(part.start * length, part.stop * length)
            located = [torch.empty(shares[of_part].shape, dtype=of) for of in (torch.int32, rows.dtype, rows.dtype)]
            for piece in _pieces(part, length, width):
                grad_second, *of_norm = _norm_backward(
                    grad_output[piece], second[piece], norms[2:, piece], *weights[12:]
                )
                _add(grads[12:], of_norm)
                normed = F.layer_norm(first[piece], first.shape[1:], *weights[6:8], eps[0])
                if expanded is None:
                    wide = torch.addmm(weights.fc1_bias, normed, weights.fc1_weight.T).relu_()
                else:
                    wide = expanded[piece]
                _add_linear(grads[10:12], grad_second, wide)
                grad_wide = torch.ops.aten.threshold_backward(grad_second @ weights.fc2_weight, wide, 0)
                _add_linear(grads[8:10], grad_wide, normed)
                grad_normed = torch.addmm(grad_second, grad_wide, weights.fc1_weight)
                grad_first, *of_norm = _norm_backward(grad_normed, first[piece], norms[:2, piece], *weights[6:8])
                _add(grads[6:8], of_norm)
                _add_linear(grads[4:6], grad_first, attended[piece])
                of_heads = torch.mm(grad_first, weights.output_weight, out=grad_attended[piece])
                of_piece = table.locate(coordinates[piece], _images(part, piece, length))
                grad_coordinates, grad_shares = table.sample_gradients(
                    of_heads.unflatten(1, (heads, -1)), coordinates[piece], shares[piece], of_piece
                )
                for whole, one in zip(located, of_piece, strict=True):
                    whole[piece.start - of_part.start : piece.stop - of_part.start] = one
                # Through the softmax; its sums by a product, as short rows are slow to sum and to spread.
                share, grad_share = shares[piece].flatten(1), grad_shares.flatten(1)
                grad_logits = torch.addcmul(share * grad_share, share, (share * grad_share) @ same_head, value=-1)
                grad_sampling = torch.cat([grad_coordinates.flatten(1), grad_logits], dim=1)
                queries = rows[piece] + _of_positions(positions, piece, length)
                _add_linear(grads[2:4], grad_sampling, queries)
                grad_queries = grad_sampling @ weights.sampling_weight
                _add_to_positions(grad_positions, grad_queries, piece, length)
                torch.add(grad_first, grad_queries, out=grad_rows[piece])
            grad_value = table.value_gradient(
                grad_attended[of_part].unflatten(1, (heads, -1)), shares[of_part], located
            ).flatten(0, 1)
            if padding is not None:
                grad_value.masked_fill_(padding[part].view(-1, 1), 0.0)
            _add_linear(grads[:2], grad_value, rows[of_part])
            grad_rows[of_part].addmm_(grad_value, weights.value_weight)
        return grad_rows.view(states.shape), grad_positions, None, None, None, *grads


def _parts(states: Tensor, shares: Tensor) -> Iterator[slice]:
    """The images of a batch whose values make up one table."""
    length, channels = states.shape[1:]
    return pieces(len(states), length * max(channels, 4 * shares[0].numel()))  # a sample has four corners


def _table(states: Tensor, weights: LayerWeights, part: slice, heads: int, places: EncodedPlaces) -> GatherTable:
    """Values of some images, (b, S, C) states; cheap enough to compute for either pass."""
    value = F.linear(states, weights.value_weight, weights.value_bias)
    if places.padding is not None:
        value.masked_fill_(places.padding[part][..., None], 0.0)
    samples = len(weights.sampling_weight) // (3 * heads)  # of a head
    return GatherTable(value.unflatten(2, (heads, -1)), places.shapes, samples // len(places.shapes))


def _pieces(part: slice, length: int, width: int) -> Iterator[slice]:
    """Rows of some images, a few thousand at a time."""
    first = part.start * length
    for piece in pieces((part.stop - part.start) * length, width):
        yield slice(first + piece.start, first + piece.stop)


def _images(part: slice, piece: slice, length: int) -> Tensor | None:
    """Each row's image among those of a part, (n,) int32; None where there is but one."""
    if part.stop - part.start == 1:
        return None
    return torch.arange(piece.start, piece.stop).div(length, rounding_mode="floor").sub_(part.start).int()


def _of_positions(table: Tensor, piece: slice, length: int) -> Tensor:
    """What belongs to the positions of some rows of the batch: (1 or B, S, X) -> (n, X)."""
    if len(table) > 1:
        return table.flatten(0, 1)[piece]
    positions = _positions(piece, length)
    return table[0, positions] if isinstance(positions, slice) else table[0].index_select(0, positions)


def _add_to_positions(table: Tensor, grad: Tensor, piece: slice, length: int) -> None:
    """Adds (n, X) where `_of_positions` read."""
    if len(table) > 1:
        table.flatten(0, 1)[piece] += grad
        return
    positions = _positions(piece, length)
    if isinstance(positions, slice):
        table[0, positions] += grad
    else:
        table[0].index_add_(0, positions, grad)


def _positions(piece: slice, length: int) -> slice | Tensor:
    """Of some rows of the batch: in one image a slice, in several (n,)."""
    first = piece.start // length * length
    if piece.stop <= first + length:
        return slice(piece.start - first, piece.stop - first)
    return torch.arange(piece.start, piece.stop) % length


def _norm(states: Tensor, weight: Tensor, bias: Tensor, eps: float, statistics: Tensor) -> Tensor:
    """LayerNorm of (n, C); mean and inverse deviation go to (2, n, 1)."""
    normed, *found = torch.native_layer_norm(states, states.shape[1:], weight, bias, eps)
    for of_rows, one in zip(statistics, found, strict=True):
        of_rows.copy_(one)
    return normed


def _norm_backward(
    grad: Tensor, states: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm_backward(
        grad, states, states.shape[1:], *statistics, weight, bias, [True, True, True]
    )
    return grads


def _add(sums: tuple[Tensor, ...], more: list[Tensor]) -> None:
    for total, one in zip(sums, more, strict=True):
        total += one


def _add_linear(sums: tuple[Tensor, ...], grad: Tensor, states: Tensor) -> None:
    """Adds a linear layer's gradients, of weight and bias, for some rows: (n, out) and (n, in)."""
    weight, bias = sums
    weight.addmm_(grad.T, states)
    bias += grad.sum(0)
