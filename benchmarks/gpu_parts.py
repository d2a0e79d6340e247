"""For `gpu.py`: what is measured and checked on a device. Every part writes what it finds to a report."""

import functools
import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import (
    IMPLEMENTATIONS,
    OURS,
    SIZES,
    THEIRS,
    Setup,
    four_thirds,
    prepare_forward,
    prepare_post_processing,
    prepare_training,
)
from equality import Check, check_bf16, check_forward, check_training
from measuring import Memory, is_out_of_memory
from report import Line, check_fields, line_fields
from torch import Tensor

from m2f_hf.kernels import triton_deformable_attention as kernels
from m2f_hf.kernels.deformable_attention import grid_sample_deformable_attention, multi_scale_deformable_attention


KERNEL_TOLERANCE = 1e-4
"""Of float32 results of a kernel, times the largest value: a place in a map of 152 has 17 binary digits behind the
point. In half precision the rounding of the result itself is allowed."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESULT_HEIGHTS = (480, 3000)  # of post-processing, 4:3
TRAINING_SIDE, TRAINING_BATCH = 1024, 2  # of the recipe with large-scale jitter: 16 images on 8 GPUs
TRAINING_TARGETS = (20, 8)  # image by image: many where jitter shrinks a photo, few where it enlarges it


class Report:
    """Writes what is found to a file, line by line, so that it outlives the process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, kind: str, value: Any) -> None:
        """Write one finding; `kind` is "lines", "checks", "failures" or "notes"."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([kind, value], allow_nan=False) + "\n")

    def line(self, line: Line) -> None:
        self.add("lines", line_fields(line))

    def check(self, check: Check) -> None:
        self.add("checks", check_fields(check))

    def read(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"lines": [], "checks": [], "failures": [], "notes": []}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            with suppress(ValueError):  # the last line of a process that was stopped
                kind, value = json.loads(line)
                found[kind].append(value)
        return found

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Record a failure and go on."""
        try:
            yield
        except Exception as error:
            self.add("failures", f"{what}: {describe(error)}")


def describe(error: Exception) -> str:
    if is_out_of_memory(error):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


# --- measuring on a device ---


class Pace(NamedTuple):
    """How long to measure a line: for `seconds` an implementation, `least` to `most` times."""

    seconds: float = 2.0
    least: int = 5
    most: int = 50


def time_on_device(run: Callable[[], Any], device: str, loop: int) -> float:
    """Return the seconds of one run; on a GPU the mean of `loop` in a row, by events in its queue."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(loop):
        run()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1e3 / loop


def memory_on_device(run: Callable[[], Any], device: str) -> Memory | None:
    """Return what is allocated on the GPU before a run and the most during it; None on the CPU."""
    if device == "cpu":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return Memory(before, torch.cuda.max_memory_allocated())


def contest(
    title: str, prepare: Mapping[str, Callable[[], Callable[[], Any]]], device: str, pace: Pace, loop: int = 1
) -> Line:
    """Warm up, measure memory, then let all take turns. What fails is left out, with the reason.

    Args:
        prepare: by name what makes a function without arguments, which is what is measured.
        loop: runs in a row for one time; more than one where launching takes as long as running.
    """
    runs, memory, missing = {}, {}, {}
    for name, make in prepare.items():
        try:
            run = make()
            for _ in range(2):
                run()
            used = memory_on_device(run, device)
        except Exception as error:
            missing[name] = describe(error)
            continue
        runs[name] = run
        if used is not None:
            memory[name] = used
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for repeat in range(-1, pace.most):  # the first, after all are ready, does not count: a compiler may look again
        if not runs or (repeat >= pace.least and time.perf_counter() - start > pace.seconds * len(runs)):
            break
        for name, run in list(runs.items()):
            try:
                elapsed = time_on_device(run, device, loop)
            except Exception as error:
                missing[name] = describe(error)
                del runs[name], seconds[name]
                continue
            if repeat >= 0:
                seconds[name].append(elapsed)
    return Line(title, title, seconds, memory=memory, missing=missing)


def compete(
    title: str, prepare: Callable[..., Callable[[], Any]], setup: Setup, pace: Pace, *args: Any, **kwargs: Any
) -> Line:
    """Let `transformers` and this package take turns at the same thing."""
    runs = {
        name: functools.partial(prepare, implementation, setup, *args, **kwargs)
        for name, implementation in IMPLEMENTATIONS.items()
    }
    return contest(title, runs, setup.device, pace)


# --- the kernels ---


def with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], shapes: Any, direction: Tensor
) -> list[Tensor]:
    """Return the output, and gradients of values, locations and weights where that of the output is `direction`."""
    value, locations, weights = (tensor.detach().requires_grad_() for tensor in inputs)
    output = function(value, shapes, locations, weights)
    return [output.detach(), *torch.autograd.grad(output, [value, locations, weights], direction)]


def direction_of_output(value: Tensor, locations: Tensor) -> Tensor:
    """Return (B, Q, M * D), from -1 to 1, in the dtype of the values (B, S, M, D)."""
    shape = value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]
    return torch.linspace(-1, 1, torch.Size(shape).numel(), device=value.device).view(shape).to(value.dtype)


def between_positions(locations: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Move (B, Q, M, L, P, 2) off the positions of their maps, where slopes have a step and rounding decides."""
    sides = torch.tensor([shape[::-1] for shape in shapes], device=locations.device)[:, None]
    places = locations.double() * sides - 0.5
    places = places.floor() + 0.05 + 0.9 * (places - places.floor())
    return ((places + 0.5) / sides).float()


def awkward_inputs(setup: Setup) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
    """Return inputs with one-pixel levels, heads no power of two wide, and many points outside."""
    shapes = [(7, 5), (1, 4), (3, 1), (1, 1)]
    generator = setup.generator()
    value = torch.randn(2, sum(height * width for height, width in shapes), 2, 24, generator=generator)
    locations = torch.rand(2, 9, 2, len(shapes), 2, 2, generator=generator) * 1.8 - 0.4
    weights = torch.rand(2, 9, 2, len(shapes), 2, generator=generator)
    value, locations, weights = (tensor.to(setup.device) for tensor in (value, locations, weights))
    return value, shapes, locations, weights


def check_kernels(setup: Setup, report: Report, pace: Pace) -> None:
    """Compare the Triton kernels with the `grid_sample` form in double precision, forward and backward."""
    if not kernels.runs_on(torch.device(setup.device)):
        report.add("notes", "not run: the Triton kernels need a GPU, or TRITON_INTERPRET=1 in the environment")
        return

    def triton_form(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
        sides = [side for shape in shapes for side in shape]
        return kernels.triton_deformable_attention(value, sides, locations, weights)

    for title, inputs in (("model's sizes", setup.attention_inputs()), ("awkward sizes", awkward_inputs(setup))):
        value, shapes, locations, weights = inputs
        locations = between_positions(locations, shapes)
        for name, dtype in DTYPES.items():
            with report.attempt(f"{title}, {name}"):
                given = [value.to(dtype), locations, weights.to(dtype)]  # as they are in a model of this dtype
                direction = direction_of_output(given[0], locations)
                results = with_gradients(triton_form, given, shapes, direction)
                exact = with_gradients(
                    grid_sample_deformable_attention, [x.double() for x in given], shapes, direction.double()
                )
                whats = ("output", "gradient of values", "of locations", "of weights")
                for what, result, expected in zip(whats, results, exact, strict=True):
                    tolerance = max(torch.finfo(result.dtype).eps, KERNEL_TOLERANCE) * expected.abs().max().item()
                    difference = (result - expected).abs().max().item()
                    report.check(Check(f"{title}, {name}: {what}", difference, tolerance))


def measure_attention(setup: Setup, report: Report, pace: Pace) -> None:
    """Measure deformable attention as the model calls it, and the `grid_sample` form."""
    forms = {"grid_sample": grid_sample_deformable_attention, OURS.name: multi_scale_deformable_attention}
    value, shapes, locations, weights = setup.attention_inputs()
    takes = "takes" if kernels.triton_attention.serves(value, shapes, locations, weights) else "does not take"
    report.add("notes", f"{OURS.name} {takes} the Triton kernels on this device")

    def prepare(function: Callable[..., Tensor], dtype: torch.dtype, backward: bool) -> Callable[[], Any]:
        inputs = [value.to(dtype), locations, weights.to(dtype)]
        if backward:
            direction = direction_of_output(inputs[0], locations)
            return lambda: with_gradients(function, inputs, shapes, direction)
        return torch.no_grad()(lambda: function(inputs[0], shapes, *inputs[1:]))

    for backward, passes in ((False, "forward"), (True, "forward and backward")):
        for name in ("fp32", "bf16"):
            title = f"deformable attention, {passes}, {setup.batch} × {setup.height}×{setup.width}, {name}"
            runs = {form: functools.partial(prepare, forms[form], DTYPES[name], backward) for form in forms}
            report.line(contest(title, runs, setup.device, pace, loop=10))


# --- the model ---


def forward_setups(setup: Setup) -> Iterator[tuple[str, str, Setup]]:
    """Yield title, name of the dtype, and setup."""
    for name in ("bf16", "fp32"):
        for batch in (1, 2 if setup.size == "tiny" else 8):
            yield f"{batch} × {setup.height}×{setup.width}, {name}", name, setup._replace(batch=batch)


def measure_forward(setup: Setup, report: Report, pace: Pace) -> None:
    for title, name, at in forward_setups(setup):
        report.line(compete(f"forward, {title}", prepare_forward, at, pace, DTYPES[name]))
        with report.attempt(f"outputs, {title}"):
            for check in check_bf16(at) if name == "bf16" else check_forward(at):
                report.check(check._replace(what=f"{title}: {check.what}"))


def measure_compiled(setup: Setup, report: Report, pace: Pace) -> None:
    """Measure both compiled. The compiled model decides for itself where to attend, so it is held to what eager
    rounding does."""
    for title, name, at in forward_setups(setup):
        torch._dynamo.reset()
        dtype, compile_once = DTYPES[name], functools.cache(torch.compile)
        report.line(compete(f"compiled forward, {title}", prepare_forward, at, pace, dtype, compile_once))
        with report.attempt(f"outputs, compiled, {title}"):
            expected = prepare_forward(THEIRS, at, torch.float32)()
            eager, compiled = prepare_forward(OURS, at, dtype)(), prepare_forward(OURS, at, dtype, compile_once)()
            for key in ("class_queries_logits", "masks_queries_logits"):
                allowed, found = (relative_difference(out[key], expected[key]) for out in (eager, compiled))
                note = f"relative norm, to transformers in fp32; eager {allowed:.1e}, of which twice is allowed"
                report.check(Check(f"compiled, {title}: {key}", found, 2 * allowed + 1e-4, note))


def relative_difference(result: Tensor, expected: Tensor) -> float:
    return ((result.float() - expected).norm() / expected.norm()).item()


def measure_training(setup: Setup, report: Report, pace: Pace) -> None:
    """Measure a step in fp32 and under autocast to bf16; targets vary as with large-scale jitter."""
    side = SIZES[setup.size].training_side if setup.size == "tiny" else TRAINING_SIDE
    setup = setup._replace(height=side, width=side, batch=TRAINING_BATCH, targets=max(TRAINING_TARGETS))
    for autocast, precision in ((False, "fp32"), (True, "autocast to bf16")):
        title = f"training step, {setup.batch} × {side}×{side}, {' and '.join(map(str, TRAINING_TARGETS))} targets"
        report.line(compete(f"{title}, {precision}", prepare_training, setup, pace, autocast, TRAINING_TARGETS))
    with report.attempt("loss and gradients"):
        for check in check_training(setup):
            report.check(check)


def measure_post_processing(setup: Setup, report: Report, pace: Pace) -> None:
    for height in (48, 96) if setup.size == "tiny" else RESULT_HEIGHTS:
        for task in ("panoptic", "instance", "semantic"):
            prepare = functools.partial(prepare_post_processing, task)
            title = f"{task} post-processing, {height}×{four_thirds(height)}"
            report.line(compete(title, prepare, setup._replace(result_height=height), pace))


# --- the host ---


def count_waits(run: Callable[[], Any]) -> int:
    """Return how often PyTorch reports that a run makes the host wait for the GPU."""
    run()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def check_host(setup: Setup, report: Report, pace: Pace) -> None:
    """Check that `forward` without labels never waits for the GPU, and with labels once, for one copy."""
    model, pixel_values = setup.model(OURS).eval(), setup.pixel_values()
    pixel_mask, labels = setup.full_pixel_mask(), setup.labels(OURS)
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        "forward": (torch.no_grad()(lambda: model(pixel_values)), 0),
        "forward with pixel_mask": (torch.no_grad()(lambda: model(pixel_values, pixel_mask=pixel_mask)), 0),
        "forward with labels": (lambda: model(pixel_values, **labels), 1),
    }
    if setup.device == "cpu":
        report.add("notes", "not run: nothing waits for a CPU")
        return
    for title, (run, expected) in runs.items():
        with report.attempt(title):
            waits = count_waits(run)
            note = f"{waits} reported by `torch.cuda.set_sync_debug_mode`, {expected} expected"
            report.check(Check(f"{title}: waits of the host", abs(waits - expected), 0, note))


class Part(NamedTuple):
    """A part of the benchmark, and its share of the time among those that are still to come."""

    title: str
    run: Callable[[Setup, Report, Pace], None]
    share: int


# The surest first: compiling comes last, since how long it takes is hard to tell.
PARTS = {
    "kernels": Part("Triton kernels against the grid_sample form in float64", check_kernels, 50),
    "host": Part("Whether the host waits for the GPU", check_host, 60),
    "attention": Part("Deformable attention", measure_attention, 50),
    "forward": Part("Forward pass", measure_forward, 90),
    "training": Part("Training step", measure_training, 90),
    "post-processing": Part("Post-processing", measure_post_processing, 50),
    "compiled": Part("Forward pass, compiled", measure_compiled, 150),
}
