"""Work on a few thousand positions at a time, where that is faster.

On the CPU a layer over a large map spends much of its time on memory: what it writes down between two steps does not
fit the cache, and each new tensor of tens of megabytes is fetched from the operating system page by page. A piece of a
map stays in the cache, in memory that is used again for the next piece. Outputs are the same to rounding, as every
position is treated as before.

Compilers make their own pieces, and an exported graph must not know how many there are: there a map is one piece. Where
gradients are wanted autograd keeps everything anyway, except for functions that have a backward pass of their own.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .fast_path import is_recorded


_NUMBERS_PER_PIECE = 1 << 20  # 4 MB in float32: of the widest tensor of a layer, in a core's share of the cache

# Several threads wait for each other after every operation on a piece. On a machine with nothing else to do that costs
# nothing, but where another program has one of the cores they wait until it lets go: larger pieces, fewer times.
_TIMES_LARGER_FOR_SEVERAL_THREADS = 8


def works_in_pieces(layer: nn.Module, hidden_states: Tensor) -> bool:
    """Whether a layer should treat `hidden_states` piece by piece; not where they are a subclass, fake ones among them,
    which has no numbers or an arithmetic of its own."""
    return (
        type(hidden_states) is Tensor
        and hidden_states.device.type == "cpu"
        and not layer.training
        and not torch.is_grad_enabled()
        and not is_recorded()
    )


def learns_in_pieces(hidden_states: Tensor, weight: Tensor) -> bool:
    """Whether a function of `hidden_states` and `weight` should use a backward pass that goes piece by piece.

    It adds up the weight's gradient over the pieces, for which half precision is too coarse: the weight is float32, and
    so are the states unless autocast chooses the dtype of products.
    """
    return (
        hidden_states.device.type == "cpu"
        and torch.is_grad_enabled()
        and weight.dtype == torch.float32
        and (hidden_states.dtype == torch.float32 or torch.is_autocast_enabled("cpu"))
        and not is_recorded()
    )


def product_dtype(hidden_states: Tensor) -> torch.dtype:
    """Return the dtype in which a layer multiplies states on the CPU: autocast's where it is on, else their own."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `total` in place; under autocast `total` is float32 and the factors are not."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def pieces(length: int, width: int) -> Iterator[slice]:
    """Slices that cut `length` positions into pieces, in order.

    Args:
        length: number of positions.
        width: numbers that the layer's widest tensor has for each of them.
    """
    step = length_of_pieces(width)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def length_of_pieces(width: int) -> int:
    """How many positions [`pieces`] puts into each, but for the last."""
    numbers = _NUMBERS_PER_PIECE * (_TIMES_LARGER_FOR_SEVERAL_THREADS if torch.get_num_threads() > 1 else 1)
    return max(1, numbers // max(1, width))


def with_channels_last(features: Tensor) -> Tensor:
    """(B, C, H, W) as it lies in memory best: on the CPU a position's channels side by side.

    Convolutions, resizing and what treats positions one by one are up to twenty times as fast in half precision so.
    """
    if features.device.type != "cpu" or is_recorded():
        return features
    return features.contiguous(memory_format=torch.channels_last)
