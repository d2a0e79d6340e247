"""Compare with `transformers`' Mask2Former: CPU time, wall time, peak memory and outputs, in one run.

    python examples/benchmark.py --size swin-t --threads 1 --output table.md
    python examples/benchmark.py --size r50 --only forward,training --repeats 3

Both implementations load the same random weights, written by `transformers`, and get the same inputs. They take turns,
after a warm-up, and medians are reported. Peak memory is measured in a fresh process for each implementation and
measurement. Where outputs should be equal they are compared in the same run, and the exit status is 1 if they are not.
"""

import argparse
import functools
import gc
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Mask2FormerConfig, ResNetConfig, SwinConfig
from transformers.models.mask2former import modeling_mask2former as stock
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

import m2f_hf
from m2f_hf.multi_scale_deformable_attention import multi_scale_deformable_attention


OUTPUT_TOLERANCE = 1e-5
"""Of logits and attention outputs, times the largest reference value where that is above 1."""
LOSS_TOLERANCE = 1e-4
"""Relative, of the loss at the same points."""
GRADIENT_TOLERANCE = 1e-3
"""Relative, of the norm of the whole gradient's difference: a near-tie among the uncertain points moves a few."""

WEIGHT_STD = 0.05
"""Of the random weights. The initial ones give every query the same, nearly empty or nearly full, mask."""
TARGET_SIZES = {"": (480, 640), "-3000x4000": (3000, 4000)}
NUM_TARGETS = 12  # target masks of an image in the training step
NUM_SEGMENTS = 25  # queries that found something, in post-processing
NUM_LABELS, NUM_THINGS = 133, 80  # COCO panoptic


# --- what is compared ---


class Implementation(NamedTuple):
    name: str
    model_class: Any
    deformable_attention: Callable[[Tensor, list[tuple[int, int]], Tensor, Tensor], Tensor]
    processor_class: Any


THEIRS = Implementation(
    "transformers",
    stock.Mask2FormerForUniversalSegmentation,
    stock.multi_scale_deformable_attention,
    Mask2FormerImageProcessorPil,
)
OURS = Implementation(
    "m2f_hf",
    m2f_hf.Mask2FormerForUniversalSegmentation,
    multi_scale_deformable_attention,
    m2f_hf.Mask2FormerImageProcessor,
)
IMPLEMENTATIONS = {implementation.name: implementation for implementation in (THEIRS, OURS)}


def _swin_t() -> Mask2FormerConfig:
    backbone = SwinConfig(
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.0,  # what it leaves out is random, and the losses are to be equal
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(backbone_config=backbone, num_labels=NUM_LABELS)


def _r50() -> Mask2FormerConfig:
    backbone = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    return Mask2FormerConfig(backbone_config=backbone, num_labels=NUM_LABELS)


def _tiny() -> Mask2FormerConfig:
    backbone = SwinConfig(
        embed_dim=24,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=NUM_LABELS,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        num_attention_heads=4,
        encoder_layers=2,
        encoder_feedforward_dim=64,
        decoder_layers=4,
        dim_feedforward=64,
        num_queries=20,
        train_num_points=112,
    )


class Size(NamedTuple):
    config: Callable[[], Mask2FormerConfig]
    height: int
    width: int


SIZES = {"tiny": Size(_tiny, 64, 96), "swin-t": Size(_swin_t, 800, 1216), "r50": Size(_r50, 800, 1216)}


def save_random_weights(config: Mask2FormerConfig, folder: str, seed: int) -> None:
    """Write a `transformers` checkpoint whose masks vary from query to query and place to place."""
    torch.manual_seed(seed)
    model = stock.Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=WEIGHT_STD)
    model.save_pretrained(folder)


class Setup(NamedTuple):
    """Inputs and models, the same for both implementations and in every process.

    Args:
        size: key of `SIZES`.
        height, width: of the input in pixels, multiples of 32.
        batch: number of images.
        seed: of everything random.
        weights: folder with the `transformers` checkpoint.
    """

    size: str
    height: int
    width: int
    batch: int
    seed: int
    weights: str

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def config(self) -> Mask2FormerConfig:
        return SIZES[self.size].config()

    def model(self, implementation: Implementation) -> Any:
        return _load(implementation.name, self.weights)

    def pixel_values(self) -> Tensor:
        """(B, 3, H, W) float32."""
        return torch.randn(self.batch, 3, self.height, self.width, generator=self.generator())

    def labels(self) -> dict[str, list[Tensor]]:
        """Ellipses (N, H, W) float32, which is what `transformers`' loss takes, and classes (N,), for each image."""
        generator = self.generator()
        masks, classes = [], []
        for _ in range(self.batch):
            distances = ellipses(NUM_TARGETS, self.height, self.width, generator)
            masks.append((distances < 1).float())
            classes.append(torch.randint(NUM_LABELS, (NUM_TARGETS,), generator=generator))
        return {"mask_labels": masks, "class_labels": classes}

    def segmentation_outputs(self) -> SimpleNamespace:
        """What a trained model might say of one 4:3 photo: a few sure queries with a mask, the others with none."""
        generator = self.generator()
        num_queries = self.config().num_queries
        found = min(NUM_SEGMENTS, num_queries // 2)
        image_size = (self.height, int(self.height * 4 / 3 + 0.5))
        padded = [-(-side // 32) * 32 for side in image_size]
        distances = ellipses(num_queries, padded[0] // 4, padded[1] // 4, generator)
        mask_logits = 6 * (1 - distances) + torch.randn(distances.shape, generator=generator)
        mask_logits[found:] -= 10
        class_logits = torch.randn(num_queries, NUM_LABELS + 1, generator=generator)
        labels = torch.full((num_queries,), NUM_LABELS)
        labels[:found] = torch.randint(NUM_LABELS, (found,), generator=generator)
        class_logits[torch.arange(num_queries), labels] += 12
        return SimpleNamespace(
            class_queries_logits=class_logits[None],
            masks_queries_logits=mask_logits[None].clamp(-20, 20),
            image_sizes=torch.tensor([image_size]),
        )

    def attention_inputs(self) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
        """Arguments of deformable attention as in the pixel decoder: every position of three levels is a query."""
        generator = self.generator()
        config = self.config()
        heads, levels, points = config.num_attention_heads, 3, 4
        shapes = [(self.height // stride, self.width // stride) for stride in (32, 16, 8)]
        grids = [torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in (w, h)), indexing="xy") for h, w in shapes]
        # (H, W, 2) as (x, y) for each level -> (S, 2)
        reference = torch.cat([torch.stack(grid, dim=-1).flatten(0, 1) for grid in grids])
        total = len(reference)
        value = torch.randn(self.batch, total, heads, config.feature_size // heads, generator=generator)
        offsets = torch.randn(self.batch, total, heads, levels, points, 2, generator=generator) * 2  # pixels
        sides = torch.tensor([(w, h) for h, w in shapes])[:, None]
        locations = reference[:, None, None, None] + offsets / sides
        weights = torch.randn(self.batch, total, heads, levels * points, generator=generator).softmax(-1)
        return value, shapes, locations, weights.unflatten(-1, (levels, points))


@functools.cache
def _load(name: str, weights: str) -> Any:
    return IMPLEMENTATIONS[name].model_class.from_pretrained(weights)


def ellipses(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Distances from the centres of `count` random ellipses, 1 on their outlines: (count, height, width)."""
    centre_y, centre_x, radius_y, radius_x = torch.rand(4, count, 1, 1, generator=generator)
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return torch.hypot((y - centre_y) / (0.1 + 0.3 * radius_y), (x - centre_x) / (0.1 + 0.3 * radius_x))


# --- whether it is the same ---


class Check(NamedTuple):
    """Largest difference of an output, what is allowed, and what to know about it."""

    what: str
    difference: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        # Values that overflow are no tolerance for others that do.
        return math.isfinite(self.difference) and self.difference <= self.tolerance


def compare(what: str, ours: Tensor, theirs: Tensor, note: str = "") -> Check:
    """Largest absolute difference; infinite where the shapes differ, not a number where a value is none."""
    tolerance = OUTPUT_TOLERANCE * max(1.0, theirs.abs().max().item())
    difference = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
    return Check(what, difference, tolerance, note)


class Decision(NamedTuple):
    """Which positions one masked attention may not read: mask logits (B, Q, S), True = blocked (B, Q, S)."""

    logits: Tensor
    blocked: Tensor


@contextmanager
def recorded_decisions(model: Any) -> Iterator[list[Decision]]:
    """Collect the attention masks that the `transformers` model makes, one for each of its decoder's predictions."""
    decisions: list[Decision] = []

    def record(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        mask_logits, blocked = output
        level = nn.functional.interpolate(mask_logits.detach(), size=args[2], mode="bilinear", align_corners=False)
        # (B * heads, Q, S), the same for all heads -> (B, Q, S)
        blocked = blocked.unflatten(0, (len(mask_logits), -1))[:, 0]
        decisions.append(Decision(level.flatten(2), blocked & ~blocked.all(-1, keepdim=True)))

    handle = model.model.transformer_module.decoder.mask_predictor.register_forward_hook(record)
    try:
        yield decisions
    finally:
        handle.remove()


@contextmanager
def imposed_decisions(model: Any, decisions: list[Decision]) -> Iterator[list[Tensor]]:
    """Make our model read where `decisions` say; collects the logits at which it would have decided otherwise.

    A mask logit within rounding of zero blocks a position or doesn't, and either is right, but what comes after
    differs. With the same decisions everything else can be held to rounding, and the decisions to being near-ties.
    """
    otherwise: list[Tensor] = []

    def impose(decision: Decision, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        blocked = args[4][:, 0]  # (B, 1, Q, S) -> (B, Q, S)
        otherwise.append(decision.logits[blocked != decision.blocked])
        return (*args[:4], decision.blocked[:, None], *args[5:])

    layers = model.model.transformer_module.decoder.layers
    handles = [
        layer.register_forward_pre_hook(functools.partial(impose, decision))
        for layer, decision in zip(layers, decisions, strict=False)  # nothing reads the last prediction's mask
    ]
    try:
        yield otherwise
    finally:
        for handle in handles:
            handle.remove()


def check_forward(setup: Setup, **inputs: Tensor) -> list[Check]:
    theirs, ours = setup.model(THEIRS).eval(), setup.model(OURS).eval()
    pixel_values = setup.pixel_values()
    with torch.no_grad():
        with recorded_decisions(theirs) as decisions:
            expected = theirs(pixel_values, **inputs)
        with imposed_decisions(ours, decisions) as otherwise:
            actual = ours(pixel_values, **inputs)
        free = ours(pixel_values, **inputs)
    names = ("class_queries_logits", "masks_queries_logits")
    apart = max((free[name] - expected[name]).abs().max().item() for name in names)
    near_ties = torch.cat(otherwise).abs()
    logits = torch.cat([decision.logits.flatten() for decision in decisions[:-1]]).abs()
    ties = Check(
        "forward: mask logits where attention masks differ",
        near_ties.max().item() if len(near_ties) else 0.0,
        OUTPUT_TOLERANCE * max(1.0, logits.max().item()),
        f"{len(near_ties)} of {len(logits)} decisions differ; left to itself, m2f_hf's logits are {apart:.1e} apart",
    )
    return [
        compare("forward: class logits", actual[names[0]], expected[names[0]], "with the same attention masks"),
        compare("forward: mask logits", actual[names[1]], expected[names[1]], "with the same attention masks"),
        ties,
    ]


def check_pixel_mask(setup: Setup) -> list[Check]:
    checks = check_forward(setup, pixel_mask=full_pixel_mask(setup))
    return [check._replace(what=check.what.replace("forward", "forward with pixel_mask")) for check in checks]


def check_deformable(setup: Setup) -> list[Check]:
    inputs = setup.attention_inputs()
    ours, theirs = OURS.deformable_attention(*inputs), THEIRS.deformable_attention(*inputs)
    return [compare("deformable attention: output", ours, theirs)]


def check_training(setup: Setup) -> list[Check]:
    """Loss and gradients at the same random points, with the same attention masks."""
    theirs, ours = setup.model(THEIRS).train(), setup.model(OURS).train()
    inputs = {"pixel_values": setup.pixel_values(), **setup.labels()}
    torch.manual_seed(setup.seed)
    rand, draws = torch.rand, []

    def record(*shape: int, **kwargs: Any) -> Tensor:
        draws.append(rand(*shape, **kwargs))
        return draws[-1]

    with recorded_decisions(theirs) as decisions, mock.patch("torch.rand", record):
        expected = theirs(**inputs).loss
    expected.backward()
    last = setup.config().decoder_layers - 1

    def replay(purpose: str, layer: int, images: Sequence[int], num_points: int, device: torch.device) -> Tensor:
        # They go through the outputs one by one, the last first, and draw for each image and then twice for all masks.
        first = (0 if layer == last else layer + 1) * (setup.batch + 2)
        if purpose == "matching":
            return torch.cat([draws[first + image] for image in images])
        return draws[first + setup.batch + (purpose == "random")]

    with imposed_decisions(ours, decisions), mock.patch.object(ours.criterion, "draw_points", replay):
        actual = ours(**inputs).loss
    actual.backward()
    relative = abs(actual.item() - expected.item()) / abs(expected.item())
    note = "relative; at the same points, with the same attention masks"
    return [
        Check("training: loss", relative, LOSS_TOLERANCE, note),
        Check("training: gradient", gradient_difference(ours, theirs), GRADIENT_TOLERANCE, note),
    ]


def gradient_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Norm of the difference of all gradients, relative to the norm of `theirs`; sets both to None."""
    gradients = []
    for model in (ours, theirs):
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    if gradients[0].keys() != gradients[1].keys():
        return float("inf")
    # In double precision: the squares of millions of entries are summed.
    squares = [(gradients[0][name] - grad).double().square().sum() for name, grad in gradients[1].items()]
    norm = sum(grad.double().square().sum() for grad in gradients[1].values())
    return (sum(squares) / norm).sqrt().item()


# --- what is measured ---


def full_pixel_mask(setup: Setup) -> Tensor:
    """(B, H, W) int64, no padding."""
    return torch.ones(setup.batch, setup.height, setup.width, dtype=torch.int64)


def prepare_forward(implementation: Implementation, setup: Setup, **inputs: Tensor) -> Callable[[], Any]:
    model, pixel_values = setup.model(implementation).eval(), setup.pixel_values()
    return torch.no_grad()(lambda: model(pixel_values, **inputs))


def prepare_pixel_mask(implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    return prepare_forward(implementation, setup, pixel_mask=full_pixel_mask(setup))


def prepare_deformable(implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    inputs = setup.attention_inputs()
    return torch.no_grad()(lambda: implementation.deformable_attention(*inputs))


def prepare_training(implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    model = setup.model(implementation).train()
    inputs = {"pixel_values": setup.pixel_values(), **setup.labels()}

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()

    return step


def prepare_post_processing(
    task: str, target_size: tuple[int, int], implementation: Implementation, setup: Setup
) -> Callable[[], Any]:
    processor = implementation.processor_class()
    outputs = setup.segmentation_outputs()
    function = getattr(processor, f"post_process_{task}_segmentation")
    kwargs: dict[str, Any] = {"target_sizes": [target_size]}
    if task == "panoptic":
        kwargs |= {"threshold": 0.8, "label_ids_to_fuse": set(range(NUM_THINGS, NUM_LABELS))}
    elif task == "instance":
        kwargs |= {"threshold": 0.5}
    return lambda: function(outputs, **kwargs)


class Case(NamedTuple):
    """One line of the tables.

    Args:
        title: what the reader sees.
        prepare: makes a function without arguments, which is what is measured.
        check: compares the outputs; None where they differ by design.
    """

    title: str
    prepare: Callable[[Implementation, Setup], Callable[[], Any]]
    check: Callable[[Setup], list[Check]] | None = None


# Training comes last: it moves the statistics of batch norms.
CASES = {
    "forward": Case("forward", prepare_forward, check_forward),
    "pixel-mask": Case("forward with `pixel_mask`", prepare_pixel_mask, check_pixel_mask),
    "deformable": Case("deformable attention alone", prepare_deformable, check_deformable),
    **{
        task + suffix: Case(
            f"{task} post-processing, {target_size[0]}×{target_size[1]}",
            functools.partial(prepare_post_processing, task, target_size),
        )
        for suffix, target_size in TARGET_SIZES.items()
        for task in ("panoptic", "instance", "semantic")
    },
    "training": Case("training step (forward, loss, backward)", prepare_training, check_training),
}
LARGE = [name for name in CASES if name.endswith("-3000x4000")]


class Times(NamedTuple):
    """Seconds of each repetition."""

    cpu: list[float]
    wall: list[float]


def measure_times(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Let the implementations take turns, so that whatever else the machine does falls on all of them."""
    times = {name: Times([], []) for name in runs}
    for repeat in range(-1, repeats):
        for name, run in runs.items():
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            result = run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            del result
            if repeat >= 0:  # the first is the warm-up
                times[name].cpu.append(cpu)
                times[name].wall.append(wall)
    return times


class Memory(NamedTuple):
    """Resident memory in bytes: with weights and inputs loaded, and the most while running."""

    idle: int
    peak: int


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


def _kibibytes_of(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure_memory_in_fresh_process(implementation: str, case: str, setup: Setup, threads: int) -> Memory:
    request = json.dumps({"implementation": implementation, "case": case, "setup": setup, "threads": threads})
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-request", request]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"measuring the memory of {implementation}'s {case} failed:\n{result.stderr[-2000:]}")
    return Memory(*json.loads(result.stdout.splitlines()[-1]))


def serve_memory_request(request: str) -> None:
    """In the fresh process: do what `measure_memory_in_fresh_process` asks and print the result."""
    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    implementation, setup = IMPLEMENTATIONS[asked["implementation"]], Setup(*asked["setup"])
    print(json.dumps(measure_memory(CASES[asked["case"]].prepare(implementation, setup))))


# --- the tables ---


class Row(NamedTuple):
    title: str
    times: dict[str, Times]
    memory: dict[str, Memory]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def render(facts: dict[str, str], rows: Sequence[Row], checks: Sequence[Check]) -> str:
    """The whole result as Markdown: machine, times, memory, outputs."""
    theirs, ours = IMPLEMENTATIONS
    time_rows, memory_rows = [], []
    for row in rows:
        cpu, wall = (
            [statistics.median(getattr(row.times[name], kind)) for name in (theirs, ours)] for kind in Times._fields
        )
        pairs = [a / b for a, b in zip(row.times[theirs].cpu, row.times[ours].cpu, strict=True)]
        time_rows.append(
            [
                row.title,
                *(f"{seconds:.3g}" for seconds in cpu),
                f"**{cpu[0] / cpu[1]:.2f}×** ({min(pairs):.2f}–{max(pairs):.2f})",
                *(f"{seconds:.3g}" for seconds in wall),
                f"{wall[0] / wall[1]:.2f}×",
            ]
        )
        peaks = [row.memory[name].peak / 2**20 for name in (theirs, ours)]
        above = [(row.memory[name].peak - row.memory[name].idle) / 2**20 for name in (theirs, ours)]
        ratio = f"**{above[0] / above[1]:.2f}×**" if min(above) >= 1 else "–"
        memory_rows.append([row.title, *(f"{mebibytes:,.0f}" for mebibytes in (*peaks, *above)), ratio])
    check_rows = [
        [
            check.what,
            f"{check.difference:.1e}",
            f"{check.tolerance:.1e}",
            "equal" if check.passed else "**DIFFERS**",
            check.note,
        ]
        for check in checks
    ]
    parts = ["".join(f"- {name}: {value}\n" for name, value in facts.items())]
    parts.append(
        markdown_table(
            [
                "median seconds",
                *(f"CPU, {name}" for name in (theirs, ours)),
                "faster (range)",
                *(f"wall, {name}" for name in (theirs, ours)),
                "faster",
            ],
            time_rows,
        )
    )
    parts.append(
        markdown_table(
            ["MiB", f"peak, {theirs}", f"peak, {ours}", f"above idle, {theirs}", f"above idle, {ours}", "less"],
            memory_rows,
        )
    )
    parts.append(
        markdown_table(["output", "largest difference", "allowed", "verdict", "note"], check_rows)
        if checks
        else "No outputs were compared: none of these should be equal.\n"
    )
    parts.append(
        "Post-processing is compared for speed and memory alone: `transformers` decides on masks of 384×384 pixels and "
        "enlarges the result, `m2f_hf` decides at the target's size as the original does, so the results differ.\n"
    )
    return "\n".join(parts)


def machine_facts(arguments: argparse.Namespace) -> dict[str, str]:
    config = SIZES[arguments.size].config()
    return {
        "processor": f"{_processor_name()}, {os.cpu_count()} logical cores, {arguments.threads} thread(s) used; "
        f"load average {os.getloadavg()[0]:.1f} at the start",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, m2f_hf {m2f_hf.__version__}",
        "model": f"{arguments.size}: {config.backbone_config.model_type} backbone, {config.num_queries} queries, "
        f"{config.num_labels} classes, random weights (seed {arguments.seed}), float32",
        "input": f"{arguments.batch} × {arguments.height}×{arguments.width}",
        "repetitions": f"{arguments.repeats} after a warm-up, taking turns; medians",
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- command line ---


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="swin-t", help="model (default: swin-t)")
    parser.add_argument("--height", type=int, help="of the input, a multiple of 32 (default: 800; tiny: 64)")
    parser.add_argument("--width", type=int, help="of the input, a multiple of 32 (default: 1216; tiny: 96)")
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--large", action="store_true", help="also post-process to 3000×4000 (needs about 16 GB)")
    parser.add_argument("--output", type=Path, help="write the Markdown here, too")
    parser.add_argument("--memory-request", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    size = SIZES[arguments.size]
    arguments.height = size.height if arguments.height is None else arguments.height
    arguments.width = size.width if arguments.width is None else arguments.width
    for name in ("height", "width"):
        if getattr(arguments, name) < 32 or getattr(arguments, name) % 32:
            parser.error(f"--{name} {getattr(arguments, name)} must be a positive multiple of 32")
    for name in ("batch", "threads", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    wanted = arguments.only.split(",") if arguments.only else [n for n in CASES if arguments.large or n not in LARGE]
    unknown = [name for name in wanted if name not in CASES]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} unknown; choose from {', '.join(CASES)}")
    arguments.cases = [name for name in CASES if name in wanted]
    if arguments.output is not None and not arguments.output.parent.is_dir():
        parser.error(f"--output: the folder {arguments.output.parent} does not exist")
    return arguments


def run(arguments: argparse.Namespace, weights: str) -> tuple[str, list[Check]]:
    """Measure and compare everything asked for: the Markdown, and the checks in it."""
    facts = machine_facts(arguments)
    setup = Setup(arguments.size, arguments.height, arguments.width, arguments.batch, arguments.seed, weights)
    rows, checks = [], []
    with tqdm(total=len(arguments.cases) * 3, unit="part", disable=None) as progress:
        for name in arguments.cases:
            case = CASES[name]
            progress.set_description(f"{case.title}: memory")
            memory = {
                implementation: measure_memory_in_fresh_process(implementation, name, setup, arguments.threads)
                for implementation in IMPLEMENTATIONS
            }
            progress.update()
            progress.set_description(f"{case.title}: outputs")
            checks += case.check(setup) if case.check is not None else []
            progress.update()
            progress.set_description(f"{case.title}: time")
            runs = {key: case.prepare(value, setup) for key, value in IMPLEMENTATIONS.items()}
            rows.append(Row(case.title, measure_times(runs, arguments.repeats), memory))
            progress.update()
    return render(facts, rows, checks), checks


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.memory_request is not None:
        serve_memory_request(arguments.memory_request)
        return 0
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as weights:
        save_random_weights(SIZES[arguments.size].config(), weights, arguments.seed)
        table, checks = run(arguments, weights)
    print(table)
    if arguments.output is not None:
        temporary = arguments.output.with_name(arguments.output.name + ".tmp")
        temporary.write_text(table, encoding="utf-8")
        os.replace(temporary, arguments.output)
    failed = [check.what for check in checks if not check.passed]
    if failed:
        print(f"error: outputs differ by more than allowed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
