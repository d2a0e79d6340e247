"""Time, memory, single kernels turned off, and what is known of the processor."""

import functools
import gc
import importlib
import os
import pkgutil
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch


def time_once(run: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of one run, as CPU time of all threads and as wall time."""
    gc.collect()
    gc.freeze()  # what is there stays: searching all of it during the run can take longer than a small run does
    try:
        cpu, wall = time.process_time(), time.perf_counter()
        result = run()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        del result
    finally:
        gc.unfreeze()
    return cpu, wall


# --- memory ---


class Memory(NamedTuple):
    """Bytes: with weights and inputs loaded, and the most while running."""

    idle: int
    peak: int


def measure_memory(run: Callable[[], Any]) -> Memory:
    """Return the resident memory of this process before and at the height of one run, to be called in a fresh process.

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
    idle = _read_kibibytes("VmRSS") * 1024
    run()
    return Memory(idle, _read_kibibytes("VmHWM") * 1024)


def _read_kibibytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def limit_memory(limit: int) -> None:
    """Make allocations of this process fail beyond `limit` bytes, on Linux, before the machine has to kill something.

    `RLIMIT_DATA` counts what can be written; `RLIMIT_AS` would count libraries and reserved addresses, too.
    """
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def says_out_of_memory(message: str) -> bool:
    """Return whether an error message is about memory: PyTorch, NumPy, oneDNN and C++ each word it differently."""
    return bool(re.search(r"allocate|bad_alloc|out of memory|could not create a (primitive|memory)", message))


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and says_out_of_memory(str(error)))


# --- kernels ---


def list_kernels() -> dict[str, Any]:
    """Return every kernel of this package that can run in place of a plain layer, by name."""
    from m2f_hf import kernels
    from m2f_hf.kernels.fast_path import Kernel

    modules = [
        importlib.import_module(f"{kernels.__name__}.{info.name}") for info in pkgutil.iter_modules(kernels.__path__)
    ]
    found = {name: value for module in modules for name, value in vars(module).items() if isinstance(value, Kernel)}
    return {name: kernel for name, kernel in sorted(found.items()) if not name.startswith("triton")}


@contextmanager
def kernel_off(name: str | None) -> Iterator[None]:
    """Let plain layers run in place of one kernel, or of every kernel if the name is "all"."""
    if name is None:
        yield
        return
    from m2f_hf.kernels import fast_path

    off = list(list_kernels().values()) if name == "all" else [list_kernels()[name]]
    allowed = fast_path._is_allowed

    def is_allowed(kernel: Any, *args: Any) -> bool:
        return not any(kernel is one for one in off) and allowed(kernel, *args)

    with mock.patch.object(fast_path, "_is_allowed", is_allowed):
        yield


# --- the processor ---


PRODUCT_SHAPES = [(1024, 1024, 1024), (2048, 1024, 2048), (4096, 256, 1024), (16384, 256, 256)]
"""Rows, inner size and columns: the best of them counts, whatever the library prefers."""


def measure_product_rate(dtype: torch.dtype, repeats: int = 5) -> float:
    """Return how many floating-point operations in matrix products this process does in a second of CPU time."""
    rates = []
    for rows, inner, columns in PRODUCT_SHAPES:
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        run = functools.partial(torch.mm, left, right)
        fastest = min(time_once(run)[0] for _ in range(repeats))
        rates.append(2 * rows * inner * columns / fastest)
    return max(rates)


def lacks_bf16_products() -> str:
    """Return why bfloat16 would be no faster on this processor; empty where it has instructions for it."""
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
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} logical cores"
