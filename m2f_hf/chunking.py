"""Work on a few thousand positions at a time, where that is faster.

On the CPU a layer over a large map spends much of its time on memory: what it writes down between two steps does not
fit the cache, and each new tensor of tens of megabytes is fetched from the operating system page by page. A piece of a
map stays in the cache, in memory that is used again for the next piece. Outputs are the same to rounding, as every
position is treated as before.

Where gradients are wanted everything is kept anyway, compilers make their own pieces, and an exported graph must not
know how many there are: there a map is one piece.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


_NUMBERS_PER_PIECE = 1 << 20  # 4 MB in float32: of the widest tensor of a layer, in a core's share of the cache


def works_in_pieces(layer: nn.Module, hidden_states: Tensor) -> bool:
    """Whether a layer should treat `hidden_states` piece by piece."""
    return (
        hidden_states.device.type == "cpu"
        and not layer.training
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()
    )


def pieces(length: int, width: int) -> Iterator[slice]:
    """Slices that cut `length` positions into pieces, in order.

    Args:
        length: number of positions.
        width: numbers that the layer's widest tensor has for each of them.
    """
    step = max(1, _NUMBERS_PER_PIECE // width)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
