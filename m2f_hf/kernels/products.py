"""Products of linear layers on the CPU, by oneDNN where that is the faster library.

PyTorch multiplies float32 by MKL, which has kernels of its own for Intel's processors and one for all others, without
AVX-512. oneDNN, which PyTorch brings along and uses for half precision, makes a kernel for each size on any processor:
on an AMD EPYC with AVX-512 it is 5 to 20 % faster at the sizes of this model; with AVX2 alone a forward pass takes as
long with either. Its operator has no gradient: it is for inference, and for functions with a backward pass of their
own.
"""

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from .pieces import is_recorded, pieces


_ARGUMENTS = ["X", "W", "B", "attr", "scalars", "algorithm"]  # of the operator that Inductor uses, too
_LEAST_ROWS = 32  # with fewer, calling costs more than the product


def linear(
    states: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, out: Tensor | None = None
) -> Tensor:
    """`F.linear`, then ReLU if asked; where gradients are recorded by `F.linear` itself, with its errors.

    Args:
        states: (..., in), of any dtype that `F.linear` takes; float32 goes by oneDNN.
        weight: (out, in); for a product `states @ matrix`, `matrix.T`, which is not copied.
        bias: (out,) or None.
        relu: whether to clip below zero.
        out: (n, out), where the result of (n, in) is to stand; not where gradients are recorded. None: in new memory.

    Returns:
        (..., out), `out` if given.
    """
    if _goes_by_onednn(states, weight, bias):
        multiply = _onednn_linear()
        if out is None:
            result: Tensor = multiply(states, weight, bias, "none", [], "")
        else:
            result = out
            for piece in pieces(len(states), len(weight)):  # the operator writes to new memory: little, used again
                out[piece] = multiply(states[piece], weight, bias, "none", [], "")
    elif out is None:
        result = F.linear(states, weight, bias)
    elif bias is None:
        result = torch.mm(states, weight.T, out=out)
    else:
        result = torch.addmm(bias, states, weight.T, out=out)
    # Not the operator's own, which makes zero of what is not a number.
    return result.relu_() if relu else result


def batched_linear(states: Tensor, weights: Tensor) -> Tensor:
    """`states @ weights.mT`, (B, n, in) and (B, out, in) -> (B, n, out), one by one where oneDNN multiplies."""
    if len(states) and _goes_by_onednn(states[0], weights[0], None):
        return torch.stack([linear(*pair) for pair in zip(states, weights, strict=True)])
    return states @ weights.mT


def _goes_by_onednn(states: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the operator serves, which has no gradients and checks neither shapes nor layouts.

    Subclasses of tensors (sharded, quantised) have arithmetic of their own.
    """
    tensors = [states, weight] if bias is None else [states, weight, bias]
    return bool(
        all(type(one) in (Tensor, nn.Parameter) for one in tensors)
        and all(one.device.type == "cpu" and one.dtype == torch.float32 for one in tensors)
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and not is_recorded()
        and not torch.is_autocast_enabled("cpu")
        and weight.dim() == 2
        and states.dim() > 1
        and states.shape[-1] == weight.shape[1]
        and states.numel() >= _LEAST_ROWS * states.shape[-1] > 0
        and (weight.is_contiguous() or weight.T.is_contiguous())
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and torch.backends.mkldnn.enabled
        and _onednn_linear() is not None
    )


@functools.cache
def _onednn_linear() -> Any:
    """PyTorch's operator; None where it has other arguments, or is not known to be faster than MKL."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    libraries = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    if not libraries or operator is None or not _mkl_leaves_instructions_unused():
        return None
    return operator.default if [one.name for one in operator.default._schema.arguments] == _ARGUMENTS else None


def _mkl_leaves_instructions_unused() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_by_amd()


def _is_by_amd() -> bool:
    """Whether AMD made the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "authenticamd" in platform.processor().lower()  # as Windows says it
    return any(line.startswith("vendor_id") and "AuthenticAMD" in line for line in lines)
