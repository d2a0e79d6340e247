"""For the benchmarks: time, memory, what the matrix products alone would cost, and what the processor can do."""

import functools
import gc
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


# --- time ---


class Times(NamedTuple):
    """Seconds of each repetition."""

    cpu: list[float]
    wall: list[float]


def measure_times(runs: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 1) -> dict[str, Times]:
    """Let the implementations take turns, so that whatever else the machine does falls on all of them."""
    times = {name: Times([], []) for name in runs}
    gc.collect()
    gc.freeze()  # what is there stays: looking through all of it before every run takes longer than small runs do
    try:
        for repeat in range(-warm_up, repeats):
            for name, run in runs.items():
                gc.collect()
                cpu, wall = time.process_time(), time.perf_counter()
                result = run()
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                del result
                if repeat >= 0:
                    times[name].cpu.append(cpu)
                    times[name].wall.append(wall)
    finally:
        gc.unfreeze()
    return times


# --- memory ---


class Memory(NamedTuple):
    """Resident memory in bytes: with weights and inputs loaded, and the most while running."""

    idle: int
    peak: int


class OutOfMemory(NamedTuple):
    """What needed more than a process was allowed, in bytes; None where the system allowed no more."""

    limit: int | None

    def __str__(self) -> str:
        return "out of memory" + (f" at {self.limit / 1e9:.3g} GB" if self.limit is not None else "")


def measure_memory(run: Callable[[], Any]) -> Memory:
    """Memory of this process before and at the height of one run, to be called in a fresh process.

    Where the kernel cannot forget an earlier peak (outside Linux), that of loading is part of both.
    """
    if not Path("/proc/self/clear_refs").exists():
        scale = 1 if sys.platform == "darwin" else 1024
        idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return Memory(idle * scale, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale)
    # Not `ru_maxrss`, which on Linux begins at the peak of the process that started this one.
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    idle = _kibibytes_of("VmRSS") * 1024
    run()
    return Memory(idle, _kibibytes_of("VmHWM") * 1024)


def _kibibytes_of(field: str, file: str = "/proc/self/status") -> int:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def available_memory() -> int | None:
    """Bytes that a new process could take; None where the system (outside Linux) doesn't say."""
    try:
        available = _kibibytes_of("MemAvailable", "/proc/meminfo") * 1024
    except (OSError, StopIteration):
        return None
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # a container's own limit
        try:
            available = min(available, int((Path("/sys/fs/cgroup") / file).read_text()))
        except (OSError, ValueError):
            continue
    return available


def limit_memory(limit: int) -> None:
    """Make allocations of this process fail beyond `limit` bytes, on Linux, before the machine has to kill something.

    `RLIMIT_DATA` counts what can be written; `RLIMIT_AS` would count libraries and reserved addresses, too.
    """
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def says_out_of_memory(message: str) -> bool:
    """PyTorch, NumPy, oneDNN and C++ have words of their own for it."""
    return bool(re.search(r"allocate|bad_alloc|out of memory|could not create a (primitive|memory)", message))


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and says_out_of_memory(str(error)))


# --- the matrix products alone ---


class Rate(NamedTuple):
    """Floating-point operations in a second of all threads' CPU time, and of wall time."""

    cpu: float
    wall: float


PRODUCT_SHAPES = [(1024, 1024, 1024), (2048, 1024, 2048), (4096, 256, 1024), (16384, 256, 256)]
"""Rows, inner size and columns: the best of them counts, whatever the library prefers."""


def measure_product_rate(dtype: torch.dtype, repeats: int = 5) -> Rate:
    """How fast this process multiplies large matrices, with the threads it has."""
    runs: dict[str, Callable[[], Any]] = {}
    operations = {}
    for rows, inner, columns in PRODUCT_SHAPES:
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        name = f"{rows}x{inner}x{columns}"
        runs[name] = functools.partial(torch.mm, left, right, out=torch.empty(rows, columns, dtype=dtype))
        operations[name] = 2 * rows * inner * columns
    times = measure_times(runs, repeats)
    return Rate(
        max(operations[name] / min(times[name].cpu) for name in runs),
        max(operations[name] / min(times[name].wall) for name in runs),
    )


class Products(NamedTuple):
    """Operations (two for each multiplication with addition) in products and convolutions, and operators not known."""

    operations: int
    unknown: list[str]


# PyTorch's formulas know none of these, which a model may use on a CPU.
_MORE_PRODUCTS: dict[str, Callable[..., int]] = {
    "aten.addmm_": lambda total, left, right, **_: 2 * left.numel() * right.shape[1],
    "aten.baddbmm_": lambda total, left, right, **_: 2 * left.numel() * right.shape[2],
    "aten._addmm_activation": lambda bias, left, right, **_: 2 * left.numel() * right.shape[1],
    "mkl._mkl_linear": lambda states, packed, weight, *_, **__: 2 * states.numel() * weight.shape[0],
    "mkldnn._linear_pointwise": lambda states, weight, *_, **__: 2 * states.numel() * weight.shape[0],
}
_PRODUCT_NAME = re.compile(r"(^|_)(b?mm|b?addb?mm|linear|conv(olution|\d)\w*|matmul|gemm|attention)")


class ProductCounter(TorchDispatchMode):
    """Counts operations by the formulas of `torch.utils.flop_counter`, wherever they are called, backward too.

    `FlopCounterMode` would do but for its bookkeeping by module, which fails for parameters given to one as arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet, name = func._overloadpacket, str(func._overloadpacket)
        if packet not in flop_registry and name not in _MORE_PRODUCTS:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self._suspect(name)
        result = func(*args, **kwargs)
        if packet in flop_registry:
            self.operations += flop_registry[packet](*args, **kwargs, out_val=result)
        elif name in _MORE_PRODUCTS:
            self.operations += _MORE_PRODUCTS[name](*args, **kwargs)
        return result

    def _suspect(self, name: str) -> None:
        """Remember what may be a product, or have one inside."""
        namespace, _, operator = name.partition(".")
        is_foreign = namespace not in ("aten", "prim", "prims", "profiler")
        # No products of matrices: deformable attention is a weighted sum of rows on the CPU, and its backward pass
        # picks single products of rows.
        is_sum_of_rows = "deformable" in operator or operator == "sparse_sampled_addmm"
        if not is_sum_of_rows and (is_foreign or _PRODUCT_NAME.search(operator)):
            self.unknown.add(name)


def count_products(run: Callable[[], Any]) -> Products:
    """Runs it once, with attention as two products, which is what any form of it multiplies."""
    counter = ProductCounter()
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return Products(counter.operations, sorted(counter.unknown))


# --- the processor ---


def lacks_bf16_products() -> str:
    """Why bfloat16 would be no faster on this processor; empty where it has instructions for it."""
    try:
        known = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):
        known = {}
    names = ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16", "sve_bf16")
    features = set(re.findall(r"^(?:flags|Features)\s*:(.*)$", cpu_info(), re.M)[:1] or [""])
    words = {word for line in features for word in line.split()}
    if any(known.get(name) for name in names) or words & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}:
        return ""
    return "not measured: this CPU has no bf16 products"


def cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def processor_name() -> str:
    names = re.findall(r"^model name\s*: *(.*)$", cpu_info(), re.M)
    return names[0] if names else platform.processor() or platform.machine()
