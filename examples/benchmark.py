"""Compare with `transformers`' Mask2Former: CPU time, wall time, peak memory and outputs, in one run.

    python examples/benchmark.py --size swin-t --threads 1 --output table.md --json table.json
    python examples/benchmark.py --size r50 --only 'forward,training-*' --repeats 3
    python examples/benchmark.py --size r50 --curves curves.json

Both implementations load the same random weights, written by `transformers`, and get the same inputs. They take turns,
after a warm-up, and medians are reported. Peak memory is measured in a fresh process for each implementation and
measurement. Where outputs should be equal they are compared in the same run, and the exit status is 1 if they are not.
What the matrix products alone would cost is counted and measured beside it. With `--curves`, how cost grows with the
image, the batch, targets, queries and the result: a JSON file, which a second run continues, and a picture beside it.
"""

import argparse
import functools
import gc
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from benchmark_curves import Panel, PointFile, draw_curves, growth_table
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
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

BF16_TOLERANCE = 0.05
"""Relative, of the norm of the logits' difference, bfloat16 against float32 with the same attention masks: rounding to
eight binary places in some sixty layers, one after the other."""

WEIGHT_STD = 0.05
"""Of the random weights. The initial ones give every query the same, nearly empty or nearly full, mask."""
RESULT_HEIGHTS = {"": 480, "-3000x4000": 3000}  # of post-processing; all pictures are 4:3
NUM_SEGMENTS = 25  # queries that found something, in post-processing
NUM_LABELS, NUM_THINGS = 133, 80  # COCO panoptic
PHOTO = "photo.jpg"


# --- what is compared ---


class Implementation(NamedTuple):
    name: str
    model_class: Any
    deformable_attention: Callable[[Tensor, list[tuple[int, int]], Tensor, Tensor], Tensor]
    processor_class: Any
    target_dtype: torch.dtype  # of the target masks that its processor makes; `transformers`' loss takes no others


THEIRS = Implementation(
    "transformers",
    stock.Mask2FormerForUniversalSegmentation,
    stock.multi_scale_deformable_attention,
    Mask2FormerImageProcessorPil,
    torch.float32,
)
OURS = Implementation(
    "m2f_hf",
    m2f_hf.Mask2FormerForUniversalSegmentation,
    multi_scale_deformable_attention,
    m2f_hf.Mask2FormerImageProcessor,
    torch.bool,
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
    """A model, and how large what it is given is.

    Args:
        config: makes the configuration.
        checkpoint: name of the released model of this kind; what a processor makes of a photo depends on it.
        height, width: of the network's input, in pixels, where no line has a size of its own.
        training_side: of the square images of the training step.
        crowded_side: of the square image with 300 targets.
        photo_height: of the photo that is read from a file, which is 4:3.
        own_size: of the network's input in the settings that `transformers` has for the checkpoint.
        edges: shortest and longest that m2f_hf resizes a photo to; None for what it knows of the checkpoint.
        curve_side: of the square images of the curves, where these don't vary.
    """

    config: Callable[[], Mask2FormerConfig]
    checkpoint: str = "mask2former-swin-tiny-coco-panoptic"
    height: int = 800
    width: int = 1216
    training_side: int = 512
    crowded_side: int = 1024
    photo_height: int = 480
    own_size: tuple[int, int] = (384, 384)
    edges: tuple[int, int] | None = None
    curve_side: int = 256

    @property
    def photo(self) -> str:
        return f"{self.photo_height}×{four_thirds(self.photo_height)}"


SIZES = {
    "tiny": Size(
        _tiny,
        height=64,
        width=96,
        training_side=64,
        crowded_side=96,
        photo_height=48,
        own_size=(32, 32),
        edges=(64, 107),
        curve_side=64,
    ),
    "swin-t": Size(_swin_t),
    "r50": Size(_r50, checkpoint="mask2former-resnet-50-coco-panoptic"),
}


def save_checkpoint(size: str, parent: str | Path, seed: int, queries: int | None = None) -> str:
    """Write what a released checkpoint has, with random weights, and a photo: the new folder in `parent`.

    Masks vary from query to query and place to place. The settings of the image processor are those that `transformers`
    has for the released one.
    """
    folder = Path(parent) / SIZES[size].checkpoint
    config = SIZES[size].config()
    config.num_queries = config.num_queries if queries is None else queries
    torch.manual_seed(seed)
    model = stock.Mask2FormerForUniversalSegmentation(config)
    height, width = SIZES[size].own_size
    THEIRS.processor_class(size={"height": height, "width": width}, ignore_index=255).save_pretrained(folder)
    random_photo(SIZES[size].photo_height, torch.Generator().manual_seed(seed)).save(folder / PHOTO, quality=90)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=WEIGHT_STD)
    model.save_pretrained(folder)
    return str(folder)


def random_photo(height: int, generator: torch.Generator) -> Image.Image:
    """Coloured ellipses on a shaded ground, 4:3, with a little noise, so that a JPEG file has the usual size."""
    width = four_thirds(height)
    pixels = torch.rand(3, 1, 1, generator=generator) * torch.linspace(0.5, 1, width)
    pixels = pixels.expand(3, height, width).clone()
    for distance in ellipses(10, height, width, generator):
        pixels[:, distance < 1] = torch.rand(3, 1, generator=generator)
    pixels += 0.03 * torch.randn(pixels.shape, generator=generator)
    return Image.fromarray((pixels.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def four_thirds(height: int) -> int:
    """The width of a picture."""
    return int(height * 4 / 3 + 0.5)


class Setup(NamedTuple):
    """Inputs and models, the same for both implementations and in every process.

    Args:
        size: key of `SIZES`.
        height, width: of the input in pixels, multiples of 32.
        batch: number of images.
        seed: of everything random.
        weights: folder that `save_checkpoint` wrote.
        targets: masks of an image to learn from.
        queries: of the model; None for its configuration's number.
        result_height: of what post-processing makes, 4:3.
    """

    size: str
    height: int
    width: int
    batch: int
    seed: int
    weights: str
    targets: int = 10
    queries: int | None = None
    result_height: int = 480

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def config(self) -> Mask2FormerConfig:
        config = SIZES[self.size].config()
        config.num_queries = config.num_queries if self.queries is None else self.queries
        return config

    def model(self, implementation: Implementation, dtype: torch.dtype = torch.float32) -> Any:
        return _load(implementation.name, self.weights, dtype)

    def pixel_values(self) -> Tensor:
        """(B, 3, H, W) float32."""
        return torch.randn(self.batch, 3, self.height, self.width, generator=self.generator())

    def labels(self, implementation: Implementation) -> dict[str, list[Tensor]]:
        """Ellipses (N, H, W) in the form that its processor makes, and classes (N,), for each image."""
        generator = self.generator()
        masks, classes = [], []
        for _ in range(self.batch):
            masks.append(torch.empty(self.targets, self.height, self.width, dtype=implementation.target_dtype))
            for mask in masks[-1]:  # one by one: 300 large ones at once would be the peak of the process
                mask.copy_(ellipses(1, self.height, self.width, generator)[0] < 1)
            classes.append(torch.randint(NUM_LABELS, (self.targets,), generator=generator))
        return {"mask_labels": masks, "class_labels": classes}

    def segmentation_outputs(self) -> SimpleNamespace:
        """What a trained model might say of one 4:3 photo: a few sure queries with a mask, the others with none."""
        generator = self.generator()
        num_queries = self.config().num_queries
        found = min(NUM_SEGMENTS, num_queries // 2)
        image_size = (self.height, four_thirds(self.height))
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
def _load(name: str, weights: str, dtype: torch.dtype) -> Any:
    return IMPLEMENTATIONS[name].model_class.from_pretrained(weights, dtype=dtype)


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


def check_bf16(setup: Setup) -> list[Check]:
    """With the decisions of the float32 model, as in `check_forward`, but as close as bfloat16 can be."""
    theirs, ours = setup.model(THEIRS).eval(), setup.model(OURS, torch.bfloat16).eval()
    pixel_values = setup.pixel_values()
    with torch.no_grad():
        with recorded_decisions(theirs) as decisions:
            expected = theirs(pixel_values)
        with imposed_decisions(ours, decisions):
            actual = ours(pixel_values)
    checks = []
    note = "relative norm, against float32; with the same attention masks"
    for kind, name in (("class", "class_queries_logits"), ("mask", "masks_queries_logits")):
        difference = (actual[name].float() - expected[name]).norm() / expected[name].norm()
        checks.append(Check(f"forward in bf16: {kind} logits", difference.item(), BF16_TOLERANCE, note))
    return checks


def check_end_to_end(setup: Setup) -> list[Check]:
    """The processors' pixels at a fixed size, which needs no padding: there both make the same of a photo."""
    height, width = SIZES[setup.size].own_size
    pixels = []
    for implementation in (OURS, THEIRS):
        processor = implementation.processor_class.from_pretrained(
            setup.weights, size={"height": height, "width": width}
        )
        with Image.open(Path(setup.weights) / PHOTO) as photo:
            pixels.append(processor(images=photo, return_tensors="pt").pixel_values)
    note = f"of the processors, at {height}×{width}; what they make by default differs by design"
    return [compare("image file: pixel values", *pixels, note)]


def check_deformable(setup: Setup) -> list[Check]:
    inputs = setup.attention_inputs()
    ours, theirs = OURS.deformable_attention(*inputs), THEIRS.deformable_attention(*inputs)
    return [compare("deformable attention: output", ours, theirs)]


def check_training(setup: Setup) -> list[Check]:
    """Loss and gradients at the same random points, with the same attention masks."""
    theirs, ours = setup.model(THEIRS).train(), setup.model(OURS).train()
    for model in (theirs, ours):
        model.zero_grad(set_to_none=True)  # what an earlier line left
    pixel_values, labels = setup.pixel_values(), setup.labels(THEIRS)
    torch.manual_seed(setup.seed)
    rand, draws = torch.rand, []

    def record(*shape: int, **kwargs: Any) -> Tensor:
        draws.append(rand(*shape, **kwargs))
        return draws[-1]

    with recorded_decisions(theirs) as decisions, mock.patch("torch.rand", record):
        expected = theirs(pixel_values, **labels).loss
    expected.backward()  # before the other model runs: the graphs of both at once would take twice the memory
    expected = expected.item()
    del labels
    last = setup.config().decoder_layers - 1

    def replay(purpose: str, layer: int, images: Sequence[int], num_points: int, device: torch.device) -> Tensor:
        # They go through the outputs one by one, the last first, and draw for each image and then twice for all masks.
        first = (0 if layer == last else layer + 1) * (setup.batch + 2)
        if purpose == "matching":
            return torch.cat([draws[first + image] for image in images])
        return draws[first + setup.batch + (purpose == "random")]

    with imposed_decisions(ours, decisions), mock.patch.object(ours.criterion, "draw_points", replay):
        actual = ours(pixel_values, **setup.labels(OURS)).loss
    actual.backward()
    relative = abs(actual.item() - expected) / abs(expected)
    what, note = f"training, {setup.targets} targets", "relative; at the same points, with the same attention masks"
    return [
        Check(f"{what}: loss", relative, LOSS_TOLERANCE, note),
        Check(f"{what}: gradient", gradient_difference(ours, theirs), GRADIENT_TOLERANCE, note),
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


def prepare_bf16(implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    """Ours in bfloat16, theirs in float32."""
    if implementation.name == THEIRS.name:
        return prepare_forward(implementation, setup)
    model, pixel_values = setup.model(implementation, torch.bfloat16).eval(), setup.pixel_values()
    return torch.no_grad()(lambda: model(pixel_values))


def prepare_deformable(implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    inputs = setup.attention_inputs()
    return torch.no_grad()(lambda: implementation.deformable_attention(*inputs))


def prepare_training(implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    model = setup.model(implementation).train()
    inputs = {"pixel_values": setup.pixel_values(), **setup.labels(implementation)}

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()

    return step


def prepare_post_processing(task: str, implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    processor = implementation.processor_class()
    outputs = setup.segmentation_outputs()
    function = getattr(processor, f"post_process_{task}_segmentation")
    kwargs: dict[str, Any] = {"target_sizes": [(setup.result_height, four_thirds(setup.result_height))]}
    if task == "panoptic":
        kwargs |= {"threshold": 0.8, "label_ids_to_fuse": set(range(NUM_THINGS, NUM_LABELS))}
    elif task == "instance":
        kwargs |= {"threshold": 0.5}
    return lambda: function(outputs, **kwargs)


def photo_processor(implementation: Implementation, setup: Setup, equal_input: bool) -> Any:
    """The checkpoint's image processor as `from_pretrained` makes it; with `equal_input`, theirs resizes like ours."""
    edges = SIZES[setup.size].edges
    given = {} if edges is None else {"size": {"shortest_edge": edges[0], "longest_edge": edges[1]}}
    ours = OURS.processor_class.from_pretrained(setup.weights, **given)
    if implementation.name == OURS.name:
        return ours
    return implementation.processor_class.from_pretrained(
        setup.weights, **({"size": dict(ours.size)} if equal_input else {})
    )


def prepare_end_to_end(equal_input: bool, implementation: Implementation, setup: Setup) -> Callable[[], Any]:
    """From a JPEG file to panoptic segments of its own size, as each library's documentation does it."""
    model = setup.model(implementation).eval()
    processor = photo_processor(implementation, setup, equal_input)
    path = Path(setup.weights) / PHOTO
    num_found = min(NUM_SEGMENTS, setup.config().num_queries // 2)

    @torch.no_grad()
    def segment() -> Any:
        with Image.open(path) as photo:
            inputs = processor(images=photo, return_tensors="pt")
            target_sizes = [(photo.height, photo.width)]
        outputs = model(**inputs)
        # Random weights are sure of nothing, and post-processing would have nothing to do: some queries are made sure
        # of the class they lean to, the others of none.
        outputs.class_queries_logits[:, :num_found] *= 100
        outputs.class_queries_logits[:, :num_found, -1] -= 1000
        outputs.class_queries_logits[:, num_found:, -1] += 1000
        return processor.post_process_panoptic_segmentation(
            outputs,
            threshold=0.8,
            overlap_mask_area_threshold=0.0,  # masks of random weights overlap
            label_ids_to_fuse=set(range(NUM_THINGS, NUM_LABELS)),
            target_sizes=target_sizes,
        )

    return segment


def describe_end_to_end(equal_input: bool, setup: Setup) -> str:
    """What each network gets, and how much is found."""
    parts = []
    for name, implementation in IMPLEMENTATIONS.items():
        processor = photo_processor(implementation, setup, equal_input)
        with Image.open(Path(setup.weights) / PHOTO) as photo:
            height, width = processor(images=photo, return_tensors="pt")["pixel_values"].shape[-2:]
        segments = prepare_end_to_end(equal_input, implementation, setup)()[0]["segments_info"]
        parts.append(f"{height}×{width} and {len(segments)} segments ({name})")
    return "network input and result " + ", ".join(parts)


def lacks_bf16_products() -> str:
    """Why bfloat16 would be no faster on this processor; empty where it has instructions for it."""
    try:
        known = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):
        known = {}
    names = ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16", "sve_bf16")
    features = set(re.findall(r"^(?:flags|Features)\s*:(.*)$", _cpu_info(), re.M)[:1] or [""])
    words = {word for line in features for word in line.split()}
    if any(known.get(name) for name in names) or words & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}:
        return ""
    return "not measured: this CPU has no bf16 products"


def _same(setup: Setup) -> Setup:
    return setup


def _learning(targets: int, setup: Setup) -> Setup:
    side = SIZES[setup.size].training_side
    return setup._replace(height=side, width=side, batch=2, targets=targets)


def _crowded(setup: Setup) -> Setup:
    side = SIZES[setup.size].crowded_side
    return setup._replace(height=side, width=side, batch=1, targets=300)


def _result(height: int, setup: Setup) -> Setup:
    return setup._replace(result_height=height)


class Case(NamedTuple):
    """One line of the tables.

    Args:
        title: what the reader sees, with fields of the setup.
        prepare: makes a function without arguments, which is what is measured.
        check: compares the outputs; None where they differ by design.
        at: sizes of the line's own.
        has_products: whether to tell what the matrix products alone would cost,
        dtype: in this precision.
        is_timed: False where memory is the question, and this process is kept from taking as much.
        missing: why this machine cannot measure it; empty where it can.
        describe: what else the reader should know.
    """

    title: str
    prepare: Callable[[Implementation, Setup], Callable[[], Any]]
    check: Callable[[Setup], list[Check]] | None = None
    at: Callable[[Setup], Setup] = _same
    has_products: bool = False
    dtype: torch.dtype = torch.float32
    is_timed: bool = True
    missing: Callable[[], str] = str
    describe: Callable[[Setup], str] | None = None


_TRAINING = "training step (forward, loss, backward), {0.batch} × {0.height}×{0.width}, {0.targets} targets an image"
_PHOTO = "image file → panoptic segments, {1.photo}, "

# Training comes last: it moves the statistics of batch norms.
CASES = {
    "forward": Case("forward", prepare_forward, check_forward, has_products=True),
    "forward-bf16": Case(
        "forward, m2f_hf in bf16, transformers in fp32",
        prepare_bf16,
        check_bf16,
        has_products=True,
        dtype=torch.bfloat16,
        missing=lacks_bf16_products,
    ),
    "pixel-mask": Case("forward with `pixel_mask`", prepare_pixel_mask, check_pixel_mask),
    "deformable": Case("deformable attention alone", prepare_deformable, check_deformable),
    "end-to-end": Case(
        _PHOTO + "equal network input",
        functools.partial(prepare_end_to_end, True),
        check_end_to_end,
        describe=functools.partial(describe_end_to_end, True),
    ),
    "end-to-end-own": Case(
        _PHOTO + "each library's own settings",
        functools.partial(prepare_end_to_end, False),
        describe=functools.partial(describe_end_to_end, False),
    ),
    **{
        task + suffix: Case(
            f"{task} post-processing, {height}×{four_thirds(height)}",
            functools.partial(prepare_post_processing, task),
            at=functools.partial(_result, height),
        )
        for suffix, height in RESULT_HEIGHTS.items()
        for task in ("panoptic", "instance", "semantic")
    },
    **{
        f"training-{targets}": Case(
            _TRAINING, prepare_training, check_training, functools.partial(_learning, targets), has_products=True
        )
        for targets in (10, 60)
    },
    "training-300": Case(_TRAINING, prepare_training, check_training, _crowded, is_timed=False),
}
LARGE = [*(name for name in CASES if name.endswith("-3000x4000")), "training-300"]


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


# --- memory, in a process of its own ---


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


def ask_fresh_process(what: str, request: dict[str, Any], limit: int | None) -> Any:
    """What `serve_request` answers in a process that has done nothing else; `OutOfMemory` where it could not.

    Args:
        what: for the error message.
        request: see `serve_request`.
        limit: bytes that the process may take; None for nine tenths of what is free now, so that it cannot take the
            machine down.
    """
    available = available_memory() if limit is None else None
    limit = limit if available is None else available * 9 // 10
    command = [sys.executable, str(Path(__file__).resolve()), "--request", json.dumps(request | {"limit": limit})]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    # Killed by the kernel, whose memory came to an end before the limit, or stopped where nothing could be raised.
    if result.returncode == -signal.SIGKILL or (result.returncode < 0 and says_out_of_memory(result.stderr[-2000:])):
        return OutOfMemory(limit)
    if result.returncode != 0:
        raise RuntimeError(f"{what} failed:\n{result.stderr[-2000:]}")
    answer = json.loads(result.stdout.splitlines()[-1])
    return OutOfMemory(limit) if answer == OUT_OF_MEMORY else answer


OUT_OF_MEMORY = "out of memory"


def serve_request(text: str) -> None:
    """In the fresh process: do what is asked and print the answer.

    The request's `do` is "memory" (of one run; with `repeats`, then also times) or "check" (the outputs).
    """
    asked = json.loads(text)
    torch.set_num_threads(asked["threads"])
    if asked["limit"] is not None:
        limit_memory(asked["limit"])
    case, setup = CASES[asked["case"]], Setup(*asked["setup"])
    answer: Any
    try:
        if asked["do"] == "check":
            answer = case.check(setup) if case.check is not None else []
        else:
            run = case.prepare(IMPLEMENTATIONS[asked["implementation"]], setup)
            memory = measure_memory(run)
            times = measure_times({"": run}, asked["repeats"], warm_up=0)[""]
            answer = [memory, times]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        answer = OUT_OF_MEMORY
    print(json.dumps(answer))


def measure_in_fresh_process(
    implementation: str, case: str, setup: Setup, threads: int, limit: int | None, repeats: int = 0
) -> tuple[Memory, Times] | OutOfMemory:
    """Memory of the first run, and times of `repeats` more."""
    request = {"do": "memory", "implementation": implementation, "case": case, "setup": setup, "threads": threads}
    answer = ask_fresh_process(
        f"measuring the memory of {implementation}'s {case}", request | {"repeats": repeats}, limit
    )
    return answer if isinstance(answer, OutOfMemory) else (Memory(*answer[0]), Times(*answer[1]))


def check_in_fresh_process(case: str, setup: Setup, threads: int, limit: int | None) -> list[Check] | OutOfMemory:
    request = {"do": "check", "case": case, "setup": setup, "threads": threads}
    answer = ask_fresh_process(f"comparing the outputs of {case}", request, limit)
    return answer if isinstance(answer, OutOfMemory) else [Check(*check) for check in answer]


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
        # Deformable attention is a weighted sum of rows on the CPU: no product.
        if "deformable" not in operator and (is_foreign or _PRODUCT_NAME.search(operator)):
            self.unknown.add(name)


def count_products(run: Callable[[], Any]) -> Products:
    """Runs it once, with attention as two products, which is what any form of it multiplies."""
    counter = ProductCounter()
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return Products(counter.operations, sorted(counter.unknown))


# --- the tables ---


class Row(NamedTuple):
    """What was measured of a case, by implementation.

    Args:
        name: of the case.
        title: as the reader sees it.
        memory, times, products: by implementation; what was not measured is missing.
        floor: CPU seconds of the fewest products any implementation needs.
        missing: why nothing was measured.
        notes: what else there is to say.
    """

    name: str
    title: str
    memory: Mapping[str, Memory | OutOfMemory] = {}
    times: Mapping[str, Times] = {}
    products: Mapping[str, Products] = {}
    floor: float | None = None
    missing: str = ""
    notes: Sequence[str] = ()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def time_cells(row: Row) -> list[str]:
    cells = [row.title]
    if row.missing:
        return [row.title, "–", row.missing, *["–"] * 4]
    for kind in Times._fields:
        medians = [
            statistics.median(getattr(row.times[name], kind)) if name in row.times else None for name in IMPLEMENTATIONS
        ]
        for name, median in zip(IMPLEMENTATIONS, medians, strict=True):
            cells.append(f"{median:.3g}" if median is not None else str(row.memory[name]))
        if None in medians:
            cells.append("–")
            continue
        ratio = f"{medians[0] / medians[1]:.2f}×"
        if kind == "cpu":
            pairs = [a / b for a, b in zip(*(row.times[name].cpu for name in IMPLEMENTATIONS), strict=True)]
            ratio = f"**{ratio}** ({min(pairs):.2f}–{max(pairs):.2f})"
        cells.append(ratio)
    return cells


def memory_cells(row: Row) -> list[str]:
    if row.missing:
        return [row.title, "–", row.missing, *["–"] * 4]
    measured = [row.memory[name] for name in IMPLEMENTATIONS]
    cells = [row.title]
    for value in (lambda memory: memory.peak, lambda memory: memory.peak - memory.idle):
        mebibytes = [value(memory) / 2**20 if isinstance(memory, Memory) else None for memory in measured]
        for number, memory in zip(mebibytes, measured, strict=True):
            cells.append(f"{number:,.0f}" if number is not None else str(memory))
        if None in mebibytes or min(mebibytes) < 1:
            cells.append("–")
        else:
            cells.append(f"**{mebibytes[0] / mebibytes[1]:.2f}×** ({mebibytes[1] / mebibytes[0]:.2f})")
    return cells


def floor_cells(row: Row) -> list[str]:
    above = [
        statistics.median(row.times[name].cpu) / row.floor if row.floor and name in row.times else None
        for name in IMPLEMENTATIONS
    ]
    return [
        row.title,
        *(f"{row.products[name].operations / 1e9:,.4g}" if name in row.products else "–" for name in IMPLEMENTATIONS),
        f"{row.floor:.3g}" if row.floor is not None else "–",
        *(f"{times:.2f}×" if times is not None else "–" for times in above),
    ]


def check_cells(check: Check) -> list[str]:
    verdict = "equal" if check.passed else "**DIFFERS**"
    return [check.what, f"{check.difference:.1e}", f"{check.tolerance:.1e}", verdict, check.note]


def render(facts: Mapping[str, str], rows: Sequence[Row], checks: Sequence[Check]) -> str:
    """The whole result as Markdown: machine, times, products, memory, outputs."""
    theirs, ours = IMPLEMENTATIONS
    parts = ["".join(f"- {name}: {value}\n" for name, value in facts.items())]
    timed = [row for row in rows if row.times or row.missing]
    if timed:
        header = ["median seconds", f"CPU, {theirs}", f"CPU, {ours}", "faster (range)"]
        header += [f"wall, {theirs}", f"wall, {ours}", "faster"]
        parts.append(markdown_table(header, [time_cells(row) for row in timed]))
    with_products = [row for row in rows if row.products]
    if with_products:
        header = ["matrix products alone", f"GFLOP, {theirs}", f"GFLOP, {ours}", "CPU seconds of the fewer"]
        header += [f"times above, {theirs}", f"times above, {ours}"]
        parts.append(markdown_table(header, [floor_cells(row) for row in with_products]))
    header = ["MiB", f"peak, {theirs}", f"peak, {ours}", "less", f"above idle, {theirs}", f"above idle, {ours}", "less"]
    parts.append(markdown_table(header, [memory_cells(row) for row in rows]))
    header = ["output", "largest difference", "allowed", "verdict", "note"]
    parts.append(
        markdown_table(header, [check_cells(check) for check in checks])
        if checks
        else "No outputs were compared: none of these should be equal.\n"
    )
    notes = [f"- {row.title}: {note}\n" for row in rows for note in row.notes]
    if notes:
        parts.append("".join(notes))
    parts.append(
        "Post-processing is compared for speed and memory alone: `transformers` decides on masks of 384×384 pixels and "
        "enlarges the result, `m2f_hf` decides at the target's size as the original does, so the results differ.\n"
    )
    return "\n".join(parts)


def as_json(facts: Mapping[str, str], rows: Sequence[Row], checks: Sequence[Check]) -> str:
    """The same, every repetition's time included; memory in bytes, or words where there was not enough."""
    lines = []
    for row in rows:
        memory = {name: m._asdict() if isinstance(m, Memory) else str(m) for name, m in row.memory.items()}
        times = {name: value._asdict() for name, value in row.times.items()}
        products = {name: value._asdict() for name, value in row.products.items()}
        lines.append(row._asdict() | {"memory": memory, "times": times, "products": products})
    document = {"facts": facts, "lines": lines, "checks": [check_fields(check) for check in checks]}
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def check_fields(check: Check) -> dict[str, Any]:
    # JSON has no word for infinity.
    difference = check.difference if math.isfinite(check.difference) else str(check.difference)
    return check._asdict() | {"difference": difference, "passed": check.passed}


def write_file(path: Path, text: str) -> None:
    """All of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def machine_facts(arguments: argparse.Namespace) -> dict[str, str]:
    config = SIZES[arguments.size].config()
    return {
        "processor": f"{_processor_name()}, {os.cpu_count()} logical cores, {arguments.threads} thread(s) used; "
        f"load average {os.getloadavg()[0]:.1f} at the start",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, m2f_hf {m2f_hf.__version__}",
        "model": f"{arguments.size}: {config.backbone_config.model_type} backbone, {config.num_queries} queries, "
        f"{config.num_labels} classes, random weights (seed {arguments.seed}), float32",
        "input": f"{arguments.batch} × {arguments.height}×{arguments.width}, where a line has no size of its own",
        "repetitions": f"{arguments.repeats} after a warm-up, taking turns; medians",
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _cpu_info() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _processor_name() -> str:
    names = re.findall(r"^model name\s*: *(.*)$", _cpu_info(), re.M)
    return names[0] if names else platform.processor() or platform.machine()


# --- measuring lines ---


def measure_line(name: str, setup: Setup, arguments: argparse.Namespace, tell: Callable[[str], None]) -> tuple:
    """Everything of one case: its row without the floor, and its checks."""
    case, setup = CASES[name], CASES[name].at(setup)
    title = case.title.format(setup, SIZES[setup.size])
    if case.missing():
        return Row(name, title, missing=case.missing()), []
    tell(f"{title}: memory")
    notes = [case.describe(setup)] if case.describe is not None else []
    memory: dict[str, Memory | OutOfMemory] = {}
    for implementation in IMPLEMENTATIONS:
        answer = measure_in_fresh_process(implementation, name, setup, arguments.threads, arguments.memory_limit)
        memory[implementation] = answer if isinstance(answer, OutOfMemory) else answer[0]
    fitting = {key: value for key, value in IMPLEMENTATIONS.items() if isinstance(memory[key], Memory)}
    checks: list[Check] | OutOfMemory = []
    if case.check is not None and len(fitting) == len(IMPLEMENTATIONS):
        tell(f"{title}: outputs")
        if case.is_timed:
            checks = case.check(setup)
        else:
            checks = check_in_fresh_process(name, setup, arguments.threads, arguments.memory_limit)
    if isinstance(checks, OutOfMemory) or (case.check is not None and len(fitting) < len(IMPLEMENTATIONS)):
        notes.append("outputs were not compared: out of memory")
        checks = []
    if not case.is_timed:
        return Row(name, title, memory, notes=notes), checks
    runs = {key: case.prepare(implementation, setup) for key, implementation in fitting.items()}
    tell(f"{title}: time")
    times = measure_times(runs, arguments.repeats)
    products = {}
    if case.has_products:
        tell(f"{title}: products")
        products = {key: count_products(run) for key, run in runs.items()}
        notes += [f"not counted in {key}: {name}" for key, product in products.items() for name in product.unknown]
    return Row(name, title, memory, times, products, notes=notes), checks


def run(arguments: argparse.Namespace, weights: str) -> tuple[dict[str, str], list[Row], list[Check]]:
    """Measure and compare everything asked for."""
    facts = machine_facts(arguments)
    setup = Setup(arguments.size, arguments.height, arguments.width, arguments.batch, arguments.seed, weights)
    rows, checks = [], []
    rates: dict[torch.dtype, Rate] = {}
    with tqdm(total=len(arguments.cases), unit="line", disable=None) as progress:
        for name in arguments.cases:
            row, line_checks = measure_line(name, setup, arguments, progress.set_description)
            if row.products:
                dtype = CASES[name].dtype
                if dtype not in rates:
                    rates[dtype] = measure_product_rate(dtype)
                fewest = min(product.operations for product in row.products.values())
                row = row._replace(floor=fewest / rates[dtype].cpu)
            rows.append(row)
            checks += line_checks
            progress.update()
    for dtype, rate in rates.items():
        name = str(dtype).removeprefix("torch.")
        facts[f"matrix products, {name}"] = (
            f"{rate.cpu / 1e9:.3g} GFLOP in a second of CPU time, {rate.wall / 1e9:.3g} of wall time (best of "
            f"{len(PRODUCT_SHAPES)} shapes)"
        )
    return facts, rows, checks


# --- how cost grows ---


class Curve(NamedTuple):
    """One cost against one size.

    Args:
        title: what is run.
        axis: what grows, as on the picture's axis.
        case: key of `CASES`.
        change: the setup with the size at one of the values.
        x: what the axis says of a setup.
        values: which are measured,
        tiny_values: and with `--size tiny`.
    """

    title: str
    axis: str
    case: str
    change: Callable[[Setup, int], Setup]
    x: Callable[[Setup], int]
    values: tuple[int, ...]
    tiny_values: tuple[int, ...]


def _with_side(setup: Setup, side: int) -> Setup:
    return setup._replace(height=side, width=side)


def _area(setup: Setup) -> int:
    return setup.height * setup.width


def _with_queries(setup: Setup, queries: int) -> Setup:
    return setup._replace(queries=queries)


CURVES = {
    "area": Curve("forward", "pixels", "forward", _with_side, _area, (128, 192, 256, 384, 512), (32, 64, 128)),
    "batch": Curve(
        "forward",
        "images",
        "forward",
        lambda setup, batch: setup._replace(batch=batch),
        lambda setup: setup.batch,
        (1, 2, 4, 8),
        (1, 2, 4),
    ),
    "queries": Curve(
        "forward",
        "queries",
        "forward",
        _with_queries,
        lambda setup: setup.config().num_queries,
        (50, 100, 200, 400),
        (10, 20, 40),
    ),
    "training-area": Curve(
        "training step", "pixels", "training-10", _with_side, _area, (128, 192, 256, 384), (32, 64, 128)
    ),
    "training-targets": Curve(
        "training step",
        "targets",
        "training-10",
        lambda setup, targets: setup._replace(targets=targets),
        lambda setup: setup.targets,
        (3, 10, 30, 100, 300),
        (3, 10, 30),
    ),
    "training-queries": Curve(
        "training step",
        "queries",
        "training-10",
        _with_queries,
        lambda setup: setup.config().num_queries,
        (50, 100, 200, 400),
        (10, 20, 40),
    ),
    "result": Curve(
        "panoptic post-processing",
        "pixels of the result",
        "panoptic",
        lambda setup, height: setup._replace(result_height=height),
        lambda setup: setup.result_height * four_thirds(setup.result_height),
        (240, 480, 960, 1920),
        (48, 96, 192),
    ),
}


def curve_setups(name: str, arguments: argparse.Namespace) -> list[Setup]:
    """The setups of a curve, the smallest first, still without weights. What doesn't grow is small."""
    curve, side = CURVES[name], SIZES[arguments.size].curve_side
    queries = SIZES[arguments.size].config().num_queries
    base = Setup(arguments.size, side, side, 1, arguments.seed, weights="", queries=queries)
    return [curve.change(base, value) for value in (curve.tiny_values if arguments.size == "tiny" else curve.values)]


def point_key(case: str, setup: Setup, implementation: str = "") -> str:
    """What makes a point: curves that meet in one share it."""
    sizes = f"{setup.batch}x{setup.height}x{setup.width}, {setup.queries} queries, {setup.targets} targets"
    return ", ".join(filter(None, [case, sizes, f"result {setup.result_height} high", implementation]))


def curve_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What points must have in common to stand in one picture, the package's code among it."""
    code = hashlib.sha256()
    for file in sorted(Path(m2f_hf.__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    facts = machine_facts(arguments)
    return {
        "size": arguments.size,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "seed": arguments.seed,
        "processor": _processor_name(),
        "versions": facts["versions"],
        "code": code.hexdigest()[:12],
    }


def run_curves(arguments: argparse.Namespace, folder: str) -> list[Check]:
    """Measure what the file lacks, compare outputs at each curve's smallest size, draw, and print the growth."""
    path = arguments.curves
    points = arguments.points
    checkpoints: dict[int | None, str] = {}

    def with_weights(setup: Setup) -> Setup:
        if setup.queries not in checkpoints:
            for weights in checkpoints.values():  # one at a time: they are large
                shutil.rmtree(weights)
            checkpoints.clear()
            _load.cache_clear()
            checkpoints[setup.queries] = save_checkpoint(setup.size, folder, setup.seed, setup.queries)
        return setup._replace(weights=checkpoints[setup.queries])

    wanted = [(name, setup) for name in arguments.cases for setup in curve_setups(name, arguments)]
    with tqdm(total=len(wanted), unit="point", disable=None) as progress:
        for name, setup in wanted:
            curve = CURVES[name]
            progress.set_description(f"{curve.title}: {curve.x(setup)} {curve.axis}")
            check, key = CASES[curve.case].check, point_key(curve.case, setup)
            is_smallest = setup == curve_setups(name, arguments)[0]
            if check is not None and is_smallest and not points.has("checks", key):
                checks = [check_fields(result) for result in check(with_weights(setup))]
                _load.cache_clear()
                points.add("checks", key, checks)
            for implementation in IMPLEMENTATIONS:
                key = point_key(curve.case, setup, implementation)
                if not points.has("points", key):
                    points.add("points", key, measure_point(implementation, curve.case, with_weights(setup), arguments))
            progress.update()
    panels = [curve_panel(name, arguments, points) for name in arguments.cases]
    table = growth_table(panels)
    print(table)
    if arguments.output is not None:
        write_file(arguments.output, table)
    draw_curves(panels, path.with_suffix(".png"))
    return [
        Check(field["what"], float(field["difference"]), field["tolerance"], field["note"])
        for fields in points.document["checks"].values()
        for field in fields
    ]


def measure_point(implementation: str, case: str, setup: Setup, arguments: argparse.Namespace) -> dict[str, Any]:
    answer = measure_in_fresh_process(
        implementation, case, setup, arguments.threads, arguments.memory_limit, arguments.repeats
    )
    if isinstance(answer, OutOfMemory):
        return {"missing": str(answer)}
    memory, times = answer
    return memory._asdict() | times._asdict()


def curve_panel(name: str, arguments: argparse.Namespace, points: PointFile) -> Panel:
    curve = CURVES[name]
    seconds: dict[str, list[tuple[float, float]]] = {implementation: [] for implementation in IMPLEMENTATIONS}
    mebibytes: dict[str, list[tuple[float, float]]] = {implementation: [] for implementation in IMPLEMENTATIONS}
    for setup in curve_setups(name, arguments):
        for implementation in IMPLEMENTATIONS:
            point = points.get("points", point_key(curve.case, setup, implementation))
            if "missing" not in point:
                seconds[implementation].append((curve.x(setup), statistics.median(point["cpu"])))
                mebibytes[implementation].append((curve.x(setup), (point["peak"] - point["idle"]) / 2**20))
    return Panel(curve.title, curve.axis, seconds, mebibytes)


# --- command line ---


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="swin-t", help="model (default: swin-t)")
    parser.add_argument("--height", type=int, help="of the input, a multiple of 32 (default: 800; tiny: 64)")
    parser.add_argument("--width", type=int, help="of the input, a multiple of 32 (default: 1216; tiny: 96)")
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--repeats", type=int, help="timed repetitions (default: 5; of curves 2)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument("--only", help=f"comma-separated, with * and ?, of {', '.join(CASES)}")
    parser.add_argument(
        "--large", action="store_true", help=f"also {', '.join(LARGE)} (they need about 16 GB of memory)"
    )
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="what a process that measures memory may take (default: nine tenths of what is free; only on Linux)",
    )
    parser.add_argument("--output", type=Path, help="write the Markdown here, too")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument(
        "--curves",
        type=Path,
        metavar="FILE.json",
        help="measure instead how cost grows, go on where an earlier run of this file stopped, and draw FILE.png",
    )
    parser.add_argument("--request", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    size = SIZES[arguments.size]
    arguments.height = size.height if arguments.height is None else arguments.height
    arguments.width = size.width if arguments.width is None else arguments.width
    if arguments.repeats is None:
        arguments.repeats = 5 if arguments.curves is None else 2
    for name in ("height", "width"):
        if getattr(arguments, name) < 32 or getattr(arguments, name) % 32:
            parser.error(f"--{name} {getattr(arguments, name)} must be a positive multiple of 32")
    for name in ("batch", "threads", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    if arguments.memory_limit is not None and not arguments.memory_limit > 0:
        parser.error(f"--memory-limit {arguments.memory_limit} must be more than 0")
    if arguments.memory_limit is not None:
        arguments.memory_limit = int(arguments.memory_limit * 1e9)
    choices = CASES if arguments.curves is None else CURVES
    patterns = arguments.only.split(",") if arguments.only else ["*"]
    unknown = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in choices)]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} unknown; choose from {', '.join(choices)}")
    wanted = [name for name in choices if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if arguments.only is None and arguments.curves is None and not arguments.large:
        wanted = [name for name in wanted if name not in LARGE]
    arguments.cases = wanted
    for name in ("output", "json", "curves"):
        path = getattr(arguments, name)
        if path is not None and not path.parent.is_dir():
            parser.error(f"--{name}: the folder {path.parent} does not exist")
    if arguments.curves is not None:
        if arguments.curves.suffix != ".json":
            parser.error(f"--curves: {arguments.curves} must end in .json")
        if importlib.util.find_spec("matplotlib") is None:
            parser.error('--curves draws with matplotlib: pip install "m2f_hf[train]"')
        try:
            arguments.points = PointFile(arguments.curves, curve_settings(arguments))
        except ValueError as error:
            parser.error(f"--curves: {error}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.request is not None:
        serve_request(arguments.request)
        return 0
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.curves is not None:
            checks = run_curves(arguments, folder)
        else:
            result = run(arguments, save_checkpoint(arguments.size, folder, arguments.seed))
            table, checks = render(*result), result[-1]
            print(table)
            if arguments.output is not None:
                write_file(arguments.output, table)
            if arguments.json is not None:
                write_file(arguments.json, as_json(*result))
    failed = [check.what for check in checks if not check.passed]
    if failed:
        print(f"error: outputs differ by more than allowed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
