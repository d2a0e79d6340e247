"""A layer of the pixel decoder's encoder that learns a few thousand positions at a time.

Autograd would keep what every step on the way writes down: queries with their positions, scores, both sides of every
norm and the wide states of the feed-forward network. With a backward pass of its own the layer keeps what is dear to
compute again, in pieces that fit the cache (see `chunking`); the rest is computed again from that.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .deformable_attention import GatherTable, empty_places, images_of_queries, softmax_over_samples
from .pieces import pieces
from .products import linear


# Of what is between the layers of the feed-forward network, 16 MB in float32. Kept for all positions, it would save a
# tenth of the products and cost as much memory as everything else that an encoder layer keeps.
_NUMBERS_KEPT = 1 << 22


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


Pair = tuple[Any, Any]  # weight and bias of a linear layer or a norm: tensors; of gradients that nobody wants, None


class LayerWeights(NamedTuple):
    """Of an encoder layer with C channels and M heads, in the order in which they are used; F is the wide width."""

    value: Pair  # (C, C)
    sampling: Pair  # (M * L * P * 3, C): offsets, then logits of the attention weights
    output: Pair  # (C, C)
    norm1: Pair
    fc1: Pair  # (F, C)
    fc2: Pair  # (C, F)
    norm2: Pair

    @classmethod
    def of(cls, parameters: Sequence[Any]) -> "LayerWeights":
        """From weights and biases in turn."""
        return cls(*zip(parameters[::2], parameters[1::2], strict=True))

    def flat(self) -> tuple[Any, ...]:
        """Weights and biases in turn."""
        return tuple(one for pair in self for one in pair)

    def num_samples(self, heads: int) -> int:
        """Of a head, in all levels."""
        return len(self.sampling[0]) // (3 * heads)


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
            states: (B, S, C) float32 or float64, on the CPU.
            positions: encoding (1 or B, S, C).
            places: of the S positions.
            heads: M, which divides C.
            eps: of the two norms.
            parameters: those of `LayerWeights`, weights and biases in turn.

        Returns:
            (B, S, C).
        """
        weights = LayerWeights.of(parameters)
        length = states.shape[1]
        rows, width = states.flatten(0, 1), len(weights.fc1[0])
        samples = weights.num_samples(heads)
        output, attended, first, second = (torch.empty_like(rows) for _ in range(4))
        coordinates = rows.new_empty(len(rows), heads * samples * 2)
        shares = rows.new_empty(len(rows), heads, samples)
        norms = rows.new_empty(4, len(rows), 1)  # mean and inverse deviation of the first, and of the second
        expanded = rows.new_empty(min(len(rows), _NUMBERS_KEPT // width), width)  # of the first positions
        for part in _parts(states, shares):
            table = _table(states[part], weights, part, heads, places)
            for piece, images in _pieces(part, length, max(width, 4 * shares[0].numel()), len(expanded)):
                queries = rows[piece] + _of_positions(positions, piece, length)
                sampling = linear(queries, *weights.sampling)
                offsets, logits = sampling.tensor_split([coordinates.shape[1]], dim=1)
                points = _of_positions(places.points[None], piece, length)
                torch.add(
                    offsets.unflatten(1, (heads, -1)),
                    points[:, None],
                    out=coordinates[piece].view(len(points), heads, -1),
                )
                shares[piece] = softmax_over_samples(logits.unflatten(1, (heads, -1)))
                attended[piece] = table.attend(coordinates[piece], shares[piece], images)
                linear(attended[piece], *weights.output, out=first[piece]).add_(rows[piece])
                normed = _norm(first[piece], weights.norm1, eps[0], norms[:2, piece])
                kept = expanded[piece] if piece.stop <= len(expanded) else None
                wide = linear(normed, *weights.fc1, relu=True, out=kept)
                linear(wide, *weights.fc2, out=second[piece]).add_(normed)
                output[piece] = _norm(second[piece], weights.norm2, eps[1], norms[2:, piece])
        ctx.save_for_backward(
            states, positions, coordinates, shares, attended, first, second, norms, expanded, places.points,
            places.padding, *parameters,
        )  # fmt: skip
        ctx.settings = (places.shapes, heads, samples, eps)
        return output.view(states.shape)

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, positions, coordinates, shares, attended, first, second, norms, expanded, *rest = ctx.saved_tensors
        points, padding, *parameters = rest
        shapes, heads, samples, eps = ctx.settings
        places, weights = EncodedPlaces(shapes, points, padding), LayerWeights.of(parameters)
        length, width = states.shape[1], len(weights.fc1[0])
        rows, grad_output = states.flatten(0, 1), grad.flatten(0, 1)
        wanted = zip(parameters, ctx.needs_input_grad[-len(parameters) :], strict=True)
        grads = LayerWeights.of([torch.zeros_like(one) if is_wanted else None for one, is_wanted in wanted])
        grad_rows, grad_attended = torch.empty_like(rows), torch.empty_like(rows)
        grad_positions = positions.new_zeros(positions.shape) if ctx.needs_input_grad[1] else None
        same_head = torch.block_diag(*[rows.new_ones(samples, samples)] * heads)  # sums over a head's samples
        for part in _parts(states, shares):
            table = _table(states[part], weights, part, heads, places)
            of_part = slice(part.start * length, part.stop * length)
            located = empty_places(shares[of_part])
            for piece, images in _pieces(part, length, max(width, 4 * shares[0].numel()), len(expanded)):
                grad_second = _norm_backward(
                    grads.norm2, grad_output[piece], second[piece], norms[2:, piece], weights.norm2
                )
                normed = F.layer_norm(first[piece], first.shape[1:], *weights.norm1, eps[0])
                is_kept = piece.stop <= len(expanded)
                wide = expanded[piece] if is_kept else linear(normed, *weights.fc1, relu=True)
                _add_linear(grads.fc2, grad_second, wide)
                grad_wide = linear(grad_second, weights.fc2[0].T)
                # In place: fresh memory of that width would not be in the cache.
                torch.ops.aten.threshold_backward.grad_input(grad_wide, wide, 0, grad_input=grad_wide)
                _add_linear(grads.fc1, grad_wide, normed)
                grad_normed = linear(grad_wide, weights.fc1[0].T).add_(grad_second)
                grad_first = _norm_backward(grads.norm1, grad_normed, first[piece], norms[:2, piece], weights.norm1)
                _add_linear(grads.output, grad_first, attended[piece])
                of_heads = linear(grad_first, weights.output[0].T, out=grad_attended[piece])
                of_piece = table.locate(coordinates[piece], images)
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
                _add_linear(grads.sampling, grad_sampling, queries)
                grad_queries = linear(grad_sampling, weights.sampling[0].T)
                if grad_positions is not None:
                    _add_to_positions(grad_positions, grad_queries, piece, length)
                torch.add(grad_first, grad_queries, out=grad_rows[piece])
            grad_value = table.value_gradient(
                grad_attended[of_part].unflatten(1, (heads, -1)), shares[of_part], located
            ).flatten(0, 1)
            if padding is not None:
                grad_value.masked_fill_(padding[part].view(-1, 1), 0.0)
            _add_linear(grads.value, grad_value, rows[of_part])
            grad_rows[of_part] += linear(grad_value, weights.value[0].T)
        return grad_rows.view(states.shape), grad_positions, None, None, None, *grads.flat()


def _parts(states: Tensor, shares: Tensor) -> Iterator[slice]:
    """The images of a batch whose values make up one table."""
    length, channels = states.shape[1:]
    return pieces(len(states), length * max(channels, 4 * shares[0].numel()))  # a sample has four corners


def _table(states: Tensor, weights: LayerWeights, part: slice, heads: int, places: EncodedPlaces) -> GatherTable:
    """Values of some images, (b, S, C) states; cheap enough to compute for either pass."""
    value = linear(states, *weights.value)
    if places.padding is not None:
        value.masked_fill_(places.padding[part][..., None], 0.0)
    return GatherTable(value.unflatten(2, (heads, -1)), places.shapes, weights.num_samples(heads) // len(places.shapes))


def _pieces(part: slice, length: int, width: int, cut: int) -> Iterator[tuple[slice, Tensor | None]]:
    """Rows of some images, a few thousand at a time, before or after row `cut` of the batch; and which of these images
    each row is of, (n,) int32, None for one."""
    first, images = part.start * length, images_of_queries(part, length)
    for piece in pieces((part.stop - part.start) * length, width):
        middle = min(max(piece.start, cut - first), piece.stop)
        for start, stop in ((piece.start, middle), (middle, piece.stop)):
            if start < stop:
                yield slice(first + start, first + stop), None if images is None else images[start:stop]


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


def _norm(states: Tensor, layer: Pair, eps: float, statistics: Tensor) -> Tensor:
    """LayerNorm of (n, C); mean and inverse deviation go to (2, n, 1)."""
    normed, *found = torch.native_layer_norm(states, states.shape[1:], *layer, eps)
    for of_rows, one in zip(statistics, found, strict=True):
        of_rows.copy_(one)
    return normed


def _norm_backward(sums: Pair, grad: Tensor, states: Tensor, statistics: Tensor, layer: Pair) -> Tensor:
    """From the gradient of a norm's output that of its input, (n, C) each; adds those of weight and bias."""
    wanted = [True, *(total is not None for total in sums)]
    of_states, *found = torch.ops.aten.native_layer_norm_backward(
        grad, states, states.shape[1:], *statistics, *layer, wanted
    )
    for total, one in zip(sums, found, strict=True):
        if total is not None:
            total += one
    return of_states


def _add_linear(sums: Pair, grad: Tensor, states: Tensor) -> None:
    """Adds a linear layer's gradients, of weight and bias, for some rows: (n, out) and (n, in)."""
    weight, bias = sums
    if weight is not None:
        weight.addmm_(grad.T, states)
    if bias is not None:
        bias += grad.sum(0)
