"""Whether both implementations give the same, and how far apart they are."""

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from cases import OURS, PHOTO, THEIRS, Setup
from PIL import Image
from torch import Tensor, nn


OUTPUT_TOLERANCE = 1e-5
"""Of logits and attention outputs, times the largest reference value where that is above 1."""
LOSS_TOLERANCE = 1e-4
"""Relative, of the loss at the same points."""
GRADIENT_TOLERANCE = 1e-3
"""Relative, of the norm of the whole gradient's difference: a near-tie among the uncertain points moves a few."""

BF16_TOLERANCE = 0.05
"""Relative, of the norm of the logits' difference, bfloat16 against float32 with the same attention masks: rounding to
eight binary places in some sixty layers, one after the other."""


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
    """Return the largest absolute difference; infinite where the shapes differ, not a number where a value is none."""
    tolerance = OUTPUT_TOLERANCE * max(1.0, theirs.abs().max().item())
    difference = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
    return Check(what, difference, tolerance, note)


class Decision(NamedTuple):
    """Which positions one masked attention may not read: mask logits (B, Q, S), True = blocked (B, Q, S)."""

    logits: Tensor
    blocked: Tensor


@contextmanager
def recorded_decisions(model: Any) -> Iterator[list[Decision]]:
    """Collect the attention masks that the `transformers` model makes, one for each prediction of its decoder."""
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
    """Make our model attend where `decisions` say, and collect the logits at which it would have decided otherwise.

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


def check_forward(setup: Setup) -> list[Check]:
    """Compare the logits with `transformers`' attention masks, and count where m2f_hf's own would differ."""
    theirs, ours = setup.model(THEIRS).eval(), setup.model(OURS).eval()
    pixel_values = setup.pixel_values()
    with torch.no_grad():
        with recorded_decisions(theirs) as decisions:
            expected = theirs(pixel_values)
        with imposed_decisions(ours, decisions) as otherwise:
            actual = ours(pixel_values)
        free = ours(pixel_values)
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


def check_bf16(setup: Setup) -> list[Check]:
    """Compare bfloat16 with `transformers` in float32, with its attention masks, as close as bfloat16 can be."""
    theirs, ours = setup.model(THEIRS).eval(), setup.model(OURS, torch.bfloat16).eval()
    pixel_values = setup.pixel_values()
    with torch.no_grad():
        with recorded_decisions(theirs) as decisions:
            expected = theirs(pixel_values)
        with imposed_decisions(ours, decisions):
            actual = ours(pixel_values)
    checks = []
    note = "relative norm, to float32; with the same attention masks"
    for kind, name in (("class", "class_queries_logits"), ("mask", "masks_queries_logits")):
        difference = (actual[name].float() - expected[name]).norm() / expected[name].norm()
        checks.append(Check(f"forward in bf16: {kind} logits", difference.item(), BF16_TOLERANCE, note))
    return checks


def check_end_to_end(setup: Setup) -> list[Check]:
    """Compare the processors' pixels at a fixed size, which needs no padding."""
    pixels = []
    for implementation in (OURS, THEIRS):
        processor = implementation.processor_class.from_pretrained(setup.weights, size={"height": 384, "width": 384})
        with Image.open(Path(setup.weights) / PHOTO) as photo:
            pixels.append(processor(images=photo, return_tensors="pt").pixel_values)
    note = "at 384×384; with the aspect ratio kept, transformers stretches where m2f_hf pads"
    return [compare("image file: pixel values", pixels[0], pixels[1], note)]


def check_training(setup: Setup) -> list[Check]:
    """Compare loss and gradients at the same random points, with the same attention masks."""
    theirs, ours = setup.model(THEIRS).train(), setup.model(OURS).train()
    for model in (theirs, ours):
        model.zero_grad(set_to_none=True)  # what an earlier line left
        # As in the original's training. With the statistics of one small image batch norms make thousands of times as
        # much of rounding: gradients 2e-3 instead of 7e-7 apart, in a ResNet-50 at 256x256.
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    pixel_values, labels = setup.pixel_values(), setup.labels(THEIRS)
    torch.manual_seed(setup.seed)
    rand, draws = torch.rand, []

    def record(*shape: int, **kwargs: Any) -> Tensor:
        drawn = rand(*shape, **kwargs)
        if drawn.dim() == 3:  # points, not the numbers by which older versions might leave layers out
            draws.append(drawn)
        return drawn

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
    """Return the norm of the difference of all gradients, relative to that of `theirs`; sets both to None."""
    gradients = []
    for model in (ours, theirs):
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    if gradients[0].keys() != gradients[1].keys():
        return float("inf")
    # In double precision: the squares of millions of entries are summed.
    differences = torch.stack([(gradients[0][name] - grad).double().norm() for name, grad in gradients[1].items()])
    norms = torch.stack([grad.double().norm() for grad in gradients[1].values()])
    return (differences.norm() / norms.norm()).item()
