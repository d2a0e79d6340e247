"""Run a kernel in place of a layer's plain `forward` where it applies, and the plain one everywhere else.

A layer's own code is plain PyTorch. A kernel is a module of this folder with two functions that take the layer's
arguments. It is attached to the layer by a decorator:

    my_kernel = Kernel(serves, forward)            # at the end of kernels/my_kernel.py

    @fast_path(my_kernel)                          # in the model, on a method or a function
    def forward(self, hidden_states, places): ...

`serves` returns whether the kernel applies to this call: device, dtype, sizes, dropout. What all kernels have in common
is decided here: `torch.export` and `torch.jit.trace` see the plain layer, compilers too unless the kernel is one
registered operator. Layers whose parts other tools have changed (hooks, adapters, quantised or sharded weights) also
run plainly, because a kernel reads the parts' parameters without calling them. Hooks on the layer itself always run.

`M2F_HF_KERNELS=plain` in the environment, read at import, turns all kernels off.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn


_VARIABLE = "M2F_HF_KERNELS"
_CHOICES = ("auto", "plain")
_CHOICE = os.environ.get(_VARIABLE) or "auto"
if _CHOICE not in _CHOICES:
    raise ValueError(f"The environment variable {_VARIABLE}={_CHOICE!r} must be one of {', '.join(_CHOICES)}.")

# Layers from here do what their class says. A `forward` from elsewhere is an adapter's or a quantiser's.
_KNOWN_PACKAGES = ("torch.nn.modules.", "transformers.models.", "transformers.activations", __name__.split(".")[0])

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Kernel(NamedTuple):
    """A faster way to compute what a layer's `forward`, or a function, computes.

    Args:
        serves: whether the kernel can do it and is the faster one: arguments of `forward` -> bool.
        forward: the arguments and results of the plain one.
        compiles: whether it is one registered operator on tensors, which `torch.compile` takes into its graph.
    """

    serves: Callable[..., bool]
    forward: Callable[..., Any]
    compiles: bool = False


def fast_path(*kernels: Kernel) -> Callable[[_Function], _Function]:
    """Return a decorator that runs the first of `kernels` that serves a call, or else the decorated function itself.

    What it returns has the plain function as `__wrapped__` and the kernels as `kernels`.
    """

    def decorate(plain: _Function) -> _Function:
        @functools.wraps(plain)
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            for kernel in kernels:
                if _is_allowed(kernel, *args, *kwargs.values()) and kernel.serves(*args, **kwargs):
                    return kernel.forward(*args, **kwargs)
            return plain(*args, **kwargs)

        dispatch.kernels = kernels  # type: ignore[attr-defined]
        return dispatch  # type: ignore[return-value]

    return decorate


def _is_allowed(kernel: Kernel, *args: Any) -> bool:
    """Whether a kernel may take a call, apart from what the kernel itself knows."""
    if _CHOICE == "plain" or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return False
    if torch.compiler.is_compiling():
        return kernel.compiles
    # Subclasses (fake, sharded, quantised tensors) have no numbers or an arithmetic of their own.
    if any(isinstance(one, Tensor) and not is_plain_tensor(one) for one in args):
        return False
    return not isinstance(args[0], nn.Module) or has_plain_parts(args[0])


def is_recorded() -> bool:
    """Return whether a compiler, an export or a trace records what is computed."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()


def has_plain_parts(layer: nn.Module) -> bool:
    """Return whether a layer's parts do what their classes say and its parameters are ordinary tensors."""
    return all(
        all(map(is_plain_tensor, module.parameters(recurse=False))) and (module is layer or is_plain(module))
        for module in layer.modules()
    )


def is_plain(module: nn.Module) -> bool:
    """Return whether a module is called with its own class's `forward` and nothing else: adapters replace that, other
    tools hang hooks on it or compile it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return (
        not any(hooks)
        and not nn.modules.module._has_any_global_hook()
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
        and type(module).forward.__module__.startswith(_KNOWN_PACKAGES)
    )


def is_plain_tensor(tensor: Tensor) -> bool:
    """Return whether it is a tensor or parameter of PyTorch's own class."""
    return type(tensor) in (Tensor, nn.Parameter)
