"""For `benchmark_gpu.py`: what is measured and checked, and how. Every part writes what it finds to a report."""

import functools
import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmark_checks import Check, check_bf16, check_forward, check_training
from benchmark_measure import is_out_of_memory
from benchmark_runs import prepare_post_processing
from benchmark_setup import IMPLEMENTATIONS, OURS, SIZES, THEIRS, Implementation, Setup, four_thirds, full_pixel_mask
from benchmark_tables import check_fields
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from m2f_hf.kernels import triton_deformable_attention as kernels
from m2f_hf.kernels.deformable_attention import (
    grid_sample_deformable_attention,
    multi_scale_deformable_attention,
)


KERNEL_TOLERANCE = 1e-4
"""Of float32 results of a kernel, times the largest value: a place in a map of 152 has 17 binary digits behind the
point. In half precision the rounding of the result itself is allowed."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESULT_HEIGHTS = (480, 3000)  # of post-processing, 4:3
TRAINING_SIDE, TRAINING_BATCH = 1024, 2  # of the recipe with large-scale jitter: 16 images on 8 GPUs
TRAINING_TARGETS = (20, 8)  # image by image: many where jitter shrinks a photo, few where it enlarges it
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class Contest(NamedTuple):
    """One line: seconds of each repetition, bytes above what was there before, and why something is missing, by name.

    Args:
        images: how many go through at once; None where that means nothing.
    """

    title: str
    seconds: Mapping[str, Sequence[float]]
    memory: Mapping[str, int]
    missing: Mapping[str, str]
    images: int | None = None


class Report:
    """Writes what is found to a file, line by line, so that it outlives the process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, kind: str, value: Any) -> None:
        """`kind` is "contests", "checks", "failures" or "notes"."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([kind, value], allow_nan=False) + "\n")

    def check(self, check: Check) -> None:
        self.add("checks", check_fields(check))

    def read(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"contests": [], "checks": [], "failures": [], "notes": []}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            with suppress(ValueError):  # the last line of a process that was stopped
                kind, value = json.loads(line)
                found[kind].append(value)
        return found

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Write a failure down and go on."""
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
    """How long to measure a line: for `seconds` an implementation, at least `least` times."""

    seconds: float = 2.0
    least: int = 5
    most: int = 50


def time_once(run: Callable[[], Any], device: str, loop: int) -> float:
    """Seconds of one run, the mean of a few in a row; on a GPU its own, by events in its queue."""
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


def memory_of(run: Callable[[], Any], device: str) -> int | None:
    """The most bytes that a run has allocated on the GPU above what was there before; None on the CPU."""
    if device == "cpu":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def contest(
    title: str,
    prepare: Mapping[str, Callable[[], Callable[[], Any]]],
    device: str,
    pace: Pace,
    images: int | None = None,
    loop: int = 1,
) -> Contest:
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
            peak = memory_of(run, device)
        except Exception as error:
            missing[name] = describe(error)
            continue
        runs[name] = run
        if peak is not None:
            memory[name] = peak
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for repeat in range(-1, pace.most):  # the first, after all are ready, does not count: a compiler may look again
        if not runs or (repeat >= pace.least and time.perf_counter() - start > pace.seconds * len(runs)):
            break
        for name, run in list(runs.items()):
            try:
                elapsed = time_once(run, device, loop)
            except Exception as error:
                missing[name] = describe(error)
                del runs[name], seconds[name]
                continue
            if repeat >= 0:
                seconds[name].append(elapsed)
    return Contest(title, seconds, memory, missing, images)


# --- parts ---


def with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], shapes: Any, direction: Tensor
) -> list[Tensor]:
    """Output, and gradients of values, locations and weights where that of the output is `direction`."""
    value, locations, weights = (tensor.detach().requires_grad_() for tensor in inputs)
    output = function(value, shapes, locations, weights)
    return [output.detach(), *torch.autograd.grad(output, [value, locations, weights], direction)]


def direction_of_output(value: Tensor, locations: Tensor) -> Tensor:
    """(B, Q, M * D), from -1 to 1, in the dtype of the values (B, S, M, D)."""
    shape = value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]
    return torch.linspace(-1, 1, torch.Size(shape).numel(), device=value.device).view(shape).to(value.dtype)


def between_positions(locations: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Move (B, Q, M, L, P, 2) off the positions of their maps, where slopes have a step and rounding decides."""
    sides = torch.tensor([shape[::-1] for shape in shapes], device=locations.device)[:, None]
    places = locations.double() * sides - 0.5
    places = places.floor() + 0.05 + 0.9 * (places - places.floor())
    return ((places + 0.5) / sides).float()


def awkward_inputs(setup: Setup) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
    """As `Setup.attention_inputs`: one-pixel levels, heads no power of two wide, and many points outside."""
    shapes = [(7, 5), (1, 4), (3, 1), (1, 1)]
    generator = setup.generator()
    value = torch.randn(2, sum(height * width for height, width in shapes), 2, 24, generator=generator)
    locations = torch.rand(2, 9, 2, len(shapes), 2, 2, generator=generator) * 1.8 - 0.4
    weights = torch.rand(2, 9, 2, len(shapes), 2, generator=generator)
    value, locations, weights = (tensor.to(setup.device) for tensor in (value, locations, weights))
    return value, shapes, locations, weights


def check_kernels(setup: Setup, report: Report, pace: Pace) -> None:
    """The Triton kernels against the `grid_sample` form in double precision, forward and backward."""
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
                inputs = [value.to(dtype), locations, weights.to(dtype)]  # as they are in a model of this dtype
                direction = direction_of_output(inputs[0], locations)
                results = with_gradients(triton_form, inputs, shapes, direction)
                exact = with_gradients(
                    grid_sample_deformable_attention, [x.double() for x in inputs], shapes, direction.double()
                )
                whats = ("output", "gradient of values", "of locations", "of weights")
                for what, result, expected in zip(whats, results, exact, strict=True):
                    tolerance = max(torch.finfo(result.dtype).eps, KERNEL_TOLERANCE) * expected.abs().max().item()
                    difference = (result - expected).abs().max().item()
                    report.check(Check(f"{title}, {name}: {what}", difference, tolerance))


def measure_attention(setup: Setup, report: Report, pace: Pace) -> None:
    """Deformable attention as the model calls it beside the `grid_sample` form."""
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
            report.add("contests", contest(title, runs, setup.device, pace, loop=10))


def prepare_forward(
    implementation: Implementation, setup: Setup, dtype: torch.dtype, wrap: Callable[[Any], Any] = lambda model: model
) -> Callable[[], Any]:
    model, pixel_values = wrap(setup.model(implementation, dtype).eval()), setup.pixel_values().to(dtype)
    return torch.no_grad()(lambda: model(pixel_values))


def forward_setups(setup: Setup) -> Iterator[tuple[str, str, Setup]]:
    """Title, name of the dtype, and setup."""
    for name in ("bf16", "fp32"):
        for batch in (1, 2 if setup.size == "tiny" else 8):
            yield f"{batch} × {setup.height}×{setup.width}, {name}", name, setup._replace(batch=batch)


def measure_forward(setup: Setup, report: Report, pace: Pace) -> None:
    for title, name, at in forward_setups(setup):
        runs = {
            key: functools.partial(prepare_forward, implementation, at, DTYPES[name])
            for key, implementation in IMPLEMENTATIONS.items()
        }
        report.add("contests", contest(f"forward, {title}", runs, at.device, pace, images=at.batch))
        with report.attempt(f"outputs, {title}"):
            for check in check_bf16(at) if name == "bf16" else check_forward(at):
                report.check(check._replace(what=f"{title}: {check.what}"))


def measure_compiled(setup: Setup, report: Report, pace: Pace) -> None:
    """Both compiled. The compiled model decides for itself where to look, so it is held to what eager rounding does."""
    for title, name, at in forward_setups(setup):
        torch._dynamo.reset()
        dtype, compile_once = DTYPES[name], functools.cache(torch.compile)
        runs = {
            key: functools.partial(prepare_forward, implementation, at, dtype, compile_once)
            for key, implementation in IMPLEMENTATIONS.items()
        }
        report.add("contests", contest(f"compiled forward, {title}", runs, at.device, pace, images=at.batch))
        with report.attempt(f"outputs, compiled, {title}"):
            expected = prepare_forward(THEIRS, at, torch.float32)()
            eager, compiled = prepare_forward(OURS, at, dtype)(), runs[OURS.name]()()
            for key in ("class_queries_logits", "masks_queries_logits"):
                of_eager, of_compiled = (relative_difference(out[key], expected[key]) for out in (eager, compiled))
                note = f"relative norm, against transformers in fp32; eager {of_eager:.1e}, of which twice is allowed"
                report.check(Check(f"compiled, {title}: {key}", of_compiled, 2 * of_eager + 1e-4, note))


def relative_difference(result: Tensor, expected: Tensor) -> float:
    return ((result.float() - expected).norm() / expected.norm()).item()


def measure_training(setup: Setup, report: Report, pace: Pace) -> None:
    """Forward, loss and backward, in fp32 and with autocast to bf16; targets vary as with large-scale jitter."""
    side = SIZES[setup.size].training_side if setup.size == "tiny" else TRAINING_SIDE
    setup = setup._replace(height=side, width=side, batch=TRAINING_BATCH, targets=max(TRAINING_TARGETS))

    def prepare(implementation: Implementation, name: str) -> Callable[[], None]:
        model = setup.model(implementation).train()
        labels = setup.labels(implementation)
        labels = {
            key: [of_image[:count] for of_image, count in zip(values, TRAINING_TARGETS, strict=True)]
            for key, values in labels.items()
        }
        inputs = {"pixel_values": setup.pixel_values(), **labels}

        def step() -> None:
            with torch.autocast(setup.device, torch.bfloat16) if name == "bf16" else nullcontext():
                loss = model(**inputs).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

        return step

    for name, precision in (("fp32", "fp32"), ("bf16", "autocast to bf16")):
        title = f"training step, {setup.batch} × {side}×{side}, {' and '.join(map(str, TRAINING_TARGETS))} targets"
        runs = {
            key: functools.partial(prepare, implementation, name) for key, implementation in IMPLEMENTATIONS.items()
        }
        line = contest(f"{title}, {precision}", runs, setup.device, pace, images=setup.batch)
        report.add("contests", line)
    with report.attempt("loss and gradients"):
        for check in check_training(setup):
            report.check(check)


class Waits(NamedTuple):
    """What makes the host wait for the GPU."""

    synchronisations: list[str]
    copies: list[str]


def waits_of_host(run: Callable[[], Any], device: str) -> Waits:
    """What a profile of one run shows, after a warm-up."""
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device != "cpu" else [])]
    with profile(activities=activities) as profiled:
        with record_function("measured"):
            run()
        if device != "cpu":
            torch.cuda.synchronize()  # which is not part of it
    return waits_among(profiled.events())


def waits_among(events: Sequence[Any]) -> Waits:
    """Calls that wait, inside the range "measured" (the profiler waits, too); and copies to the host, anywhere."""
    # On a GPU the range has a second event, when its kernels ran.
    times = next(
        event.time_range for event in events if event.name == "measured" and event.device_type == DeviceType.CPU
    )
    synchronisations = [
        event.name for event in events if event.name in WAITS and times.start <= event.time_range.start <= times.end
    ]
    return Waits(synchronisations, [event.name for event in events if "Memcpy DtoH" in event.name])


def count_warned_waits(run: Callable[[], Any]) -> int:
    """How often PyTorch itself says that a run waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def check_host(setup: Setup, report: Report, pace: Pace) -> None:
    """`forward` without labels never waits for the GPU; with labels once, for one copy."""
    model, pixel_values = setup.model(OURS).eval(), setup.pixel_values()
    pixel_mask, labels = full_pixel_mask(setup), setup.labels(OURS)
    runs: dict[str, tuple[Callable[[], Any], int]] = {
        "forward": (torch.no_grad()(lambda: model(pixel_values)), 0),
        "forward with pixel_mask": (torch.no_grad()(lambda: model(pixel_values, pixel_mask=pixel_mask)), 0),
        "forward with labels": (lambda: model(pixel_values, **labels), 1),
    }
    for title, (run, once) in runs.items():
        expected = once if setup.device != "cpu" else 0  # nothing waits for a CPU
        with report.attempt(title):
            waits = waits_of_host(run, setup.device)
            found = {"waits of the host": waits.synchronisations, "copies to the host": waits.copies}
            for what, names in found.items():
                note = f"{len(names)} in a profile, {expected} expected"
                note += f": {', '.join(sorted(set(names)))}" if names else ""
                report.check(Check(f"{title}: {what}", abs(len(names) - expected), 0, note))
            if setup.device != "cpu":
                warned = count_warned_waits(run)
                note = f"{warned} told by `torch.cuda.set_sync_debug_mode`, {expected} expected"
                report.check(Check(f"{title}: waits that PyTorch tells of", abs(warned - expected), 0, note))


def measure_post_processing(setup: Setup, report: Report, pace: Pace) -> None:
    for height in (48, 96) if setup.size == "tiny" else RESULT_HEIGHTS:
        at = setup._replace(result_height=height)
        for task in ("panoptic", "instance", "semantic"):
            runs = {
                key: functools.partial(prepare_post_processing, task, implementation, at)
                for key, implementation in IMPLEMENTATIONS.items()
            }
            title = f"{task} post-processing, {height}×{four_thirds(height)}"
            report.add("contests", contest(title, runs, at.device, pace))


class Part(NamedTuple):
    """
    Args:
        run: does it, with a setup; finds are added to the report.
        share: of the time, in parts of what all that are still to come have together.
    """

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
