"""Split a layer's work into chunks of a few thousand positions, where that is faster.

On the CPU a layer over a large map spends much of its time on memory: intermediate results do not fit the cache, and
each new tensor of tens of megabytes comes from the operating system page by page. A chunk stays in the cache, in memory
that the next chunk uses again. Outputs are the same to rounding, as positions do not depend on each other.

Compilers chunk by themselves, and an exported graph must not depend on the number of chunks: there a map is one. Where
gradients are recorded autograd keeps everything anyway, except for functions with a backward pass of their own.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .fast_path import is_recorded


_NUMBERS_PER_CHUNK = 1 << 20  # 4 MB in float32: of the widest tensor of a layer, in a core's share of the cache

# Several threads wait for each other after every operation on a chunk. On an idle machine that costs nothing, but where
# another program has one of the cores they wait until it lets go: larger chunks, fewer times.
_TIMES_LARGER_FOR_SEVERAL_THREADS = 8


def infers_in_chunks(layer: nn.Module, hidden_states: Tensor) -> bool:
    """Return whether a layer should go through `hidden_states` in chunks at inference; not where they are a subclass,
    such as fake tensors, which has no numbers or an arithmetic of its own."""
    return (
        type(hidden_states) is Tensor
        and hidden_states.device.type == "cpu"
        and not layer.training
        and not torch.is_grad_enabled()
        and not is_recorded()
    )


def learns_in_chunks(hidden_states: Tensor, weight: Tensor) -> bool:
    """Return whether a function of `hidden_states` and `weight` should use a backward pass in chunks.

    The weight's gradient is added up over the chunks, for which half precision is too coarse: the weight is float32,
    and so are the states unless autocast chooses the dtype of products.
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


def chunks(length: int, width: int) -> Iterator[slice]:
    """Yield slices that cut `length` positions into chunks, in order.

    Args:
        length: number of positions.
        width: numbers that the layer's widest tensor has for each of them.
    """
    step = chunk_length(width)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def chunk_length(width: int) -> int:
    """Return the number of positions in each chunk but the last."""
    numbers = _NUMBERS_PER_CHUNK * (_TIMES_LARGER_FOR_SEVERAL_THREADS if torch.get_num_threads() > 1 else 1)
    return max(1, numbers // max(1, width))


def channels_last(features: Tensor) -> Tensor:
    """Return (B, C, H, W) in the fastest memory format: on the CPU channels last.

    Convolutions, resizing and pointwise layers are up to twenty times as fast in half precision with it.
    """
    if features.device.type != "cpu" or is_recorded():
        return features
    return features.contiguous(memory_format=torch.channels_last)
