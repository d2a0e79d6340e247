"""Products of linear layers at inference on the CPU, by oneDNN where that is the faster library.

PyTorch multiplies float32 by MKL, which has kernels of its own for Intel's processors and one for all others, without
AVX-512. oneDNN, which PyTorch brings along and uses for half precision, makes a kernel for each size on any processor:
on an AMD EPYC with AVX-512 a forward pass takes a tenth less time. In training it brings nothing, and its operator has
no gradient.
"""

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from .fast_path import Kernel, fast_path


_ARGUMENTS = ["X", "W", "B", "attr", "scalars", "algorithm"]  # of the operator that Inductor uses, too
_LEAST_ROWS = 32  # with fewer, calling costs more than the product


def _serves(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether the operator serves, which has no gradients and checks neither shapes nor layouts."""
    tensors = [states, weight] if bias is None else [states, weight, bias]
    return bool(
        all(one.device.type == "cpu" and one.dtype == torch.float32 for one in tensors)
        and not torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
        and weight.dim() == 2
        and states.dim() > 1
        and states.shape[-1] == weight.shape[1]
        and states.numel() >= _LEAST_ROWS * states.shape[-1] > 0
        and weight.is_contiguous()
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and torch.backends.mkldnn.enabled
        and _onednn_linear() is not None
    )


def _forward(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output: Tensor = _onednn_linear()(states, weight, bias, "none", [], "")
    return output


onednn_linear = Kernel(_serves, _forward)


@fast_path(onednn_linear)
def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: (..., in), (out, in), (out,) -> (..., out)."""
    return F.linear(states, weight, bias)


@functools.cache
def _onednn_linear() -> Any:
    """Return PyTorch's operator; None where it has other arguments, or is not known to be faster than MKL."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    libraries = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    if not libraries or operator is None or not _mkl_leaves_instructions_unused():
        return None
    return operator.default if [one.name for one in operator.default._schema.arguments] == _ARGUMENTS else None


def _mkl_leaves_instructions_unused() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_by_amd()


def _is_by_amd() -> bool:
    """Return whether the system says that AMD made the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "authenticamd" in platform.processor().lower()  # Windows
    return any(line.startswith("vendor_id") and "AuthenticAMD" in line for line in lines)
