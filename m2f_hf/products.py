"""Products of linear layers on the CPU, by oneDNN where that is the faster library.

PyTorch multiplies float32 by MKL, which has kernels of its own for Intel's processors and one for all others, without
AVX-512. oneDNN, which PyTorch brings along and uses for half precision, makes a kernel for each size on any processor:
on an AMD EPYC with AVX-512 it is 5 to 20 % faster at the sizes of this model, with AVX2 up to 5 %. Its
operator has no gradient: it is for inference, and for functions with a backward pass of their own.
"""

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunking import is_recorded, pieces


_ARGUMENTS = ["X", "W", "B", "attr", "scalars", "algorithm"]  # of the operator that Inductor uses, too
_LEAST_ROWS = 32  # with fewer, calling costs more than the product


def linear(
    states: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, out: Tensor | None = None
) -> Tensor:
    """`F.linear`, then ReLU if asked; with gradients by `F.linear` itself.

    Args:
        states: (..., in).
        weight: (out, in); for a product `states @ matrix`, `matrix.T`, which is not copied.
        bias: (out,) or None.
        relu: whether to clip below zero.
        out: (..., out), where the result is to stand, two axes only; None: in new memory.
    """
    if _goes_by_onednn(states, weight, bias):
        multiply, activation = _onednn_linear(), "relu" if relu else "none"
        if out is None:
            result: Tensor = multiply(states, weight, bias, activation, [], "")
            return result
        for piece in pieces(len(states), len(weight)):  # the operator writes to new memory: little, used again
            out[piece] = multiply(states[piece], weight, bias, activation, [], "")
        return out
    if out is None:
        result = F.linear(states, weight, bias)
    elif bias is None:
        result = torch.mm(states, weight.T, out=out)
    else:
        result = torch.addmm(bias, states, weight.T, out=out)
    return result.relu_() if relu else result


def _goes_by_onednn(states: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return bool(
        states.device.type == weight.device.type == "cpu"
        and states.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not is_recorded()
        and not torch.is_autocast_enabled("cpu")
        and all(type(one) in (Tensor, torch.nn.Parameter) for one in (states, weight, bias) if one is not None)
        and states.numel() >= _LEAST_ROWS * states.shape[-1] > 0
        and (weight.is_contiguous() or weight.T.is_contiguous())
        and torch.backends.mkldnn.enabled
        and _onednn_linear() is not None
    )


@functools.cache
def _onednn_linear() -> Any:
    """PyTorch's operator, or None where it has none of these arguments, or where MKL has kernels for the processor."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if not torch.backends.mkldnn.is_available() or operator is None or not _is_by_amd():
        return None
    known = [argument.name for argument in operator.default._schema.arguments]
    return operator.default if known == _ARGUMENTS and platform.machine().lower() in ("x86_64", "amd64") else None


def _is_by_amd() -> bool:
    """Whether AMD made the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "authenticamd" in platform.processor().lower()  # as Windows says it
    return any(line.startswith("vendor_id") and "AuthenticAMD" in line for line in lines)
