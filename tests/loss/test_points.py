"""Sampling at points: against `grid_sample`, the original's recorded values and the definition."""

import numpy as np
import pytest
import torch

from m2f_hf.loss import points as point_sampling
from m2f_hf.loss.points import (
    SeededPoints,
    draw_checked,
    draw_uniform_points,
    float_chunks,
    sample_points,
    scatter_to_maps,
    uncertain_points,
)


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def recorded(goldens):
    with np.load(goldens / "extra" / "modules.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith(("ps_", "up_"))}


def test_sampled_values_are_the_originals(recorded):
    sampled = sample_points(recorded["ps_input"], recorded["ps_coords"])
    torch.testing.assert_close(sampled, recorded["ps_out"], rtol=0, atol=1e-6)


def test_selected_points_are_the_originals(recorded):
    candidates, random = recorded["up_rand0"], recorded["up_rand1"]
    num_uncertain = recorded["up_selected"].shape[1] - random.shape[1]
    selected = torch.cat([uncertain_points(recorded["ps_input"], candidates, num_uncertain), random], dim=1)
    in_some_order = lambda points: [sorted(map(tuple, image)) for image in points.tolist()]
    assert in_some_order(selected) == in_some_order(recorded["up_selected"])


def test_values_are_exact_at_pixel_centres_and_fade_to_zero_outside():
    features = torch.arange(12.0).reshape(1, 1, 3, 4) + 1
    points = torch.tensor([[[0.5 / 4, 0.5 / 3], [3.5 / 4, 1.5 / 3], [0.5, 0.5], [0.0, 0.5 / 3], [1.5, 0.5]]])
    # centre of (row 0, column 0), of (1, 3), the middle of the map, half out on the left, far out
    torch.testing.assert_close(sample_points(features, points), torch.tensor([[[1.0, 8.0, 6.5, 0.5, 0.0]]]))


def test_scattering_is_the_gradient_of_sampling():
    points = torch.rand(3, 40, 2) * 1.2 - 0.1
    features = torch.randn(3, 1, 5, 7, requires_grad=True)
    grad = torch.randn(3, 40)
    (expected,) = torch.autograd.grad(sample_points(features, points), features, grad[:, None])
    torch.testing.assert_close(scatter_to_maps(grad, points, (5, 7))[:, None], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_maps_are_sampled_in_float32(dtype):
    features = torch.randn(1, 2, 6, 6).to(dtype).requires_grad_()
    points = torch.rand(1, 30, 2)
    sampled = sample_points(features, points)
    assert sampled.dtype == torch.float32
    assert torch.equal(sampled, sample_points(features.detach().float(), points))
    sampled.sum().backward()
    assert features.grad.dtype == dtype


@pytest.mark.parametrize("at_once", [1, 100], ids=["one by one", "in threes"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32])
def test_masks_of_all_dtypes_are_sampled_as_maps_are(dtype, at_once, monkeypatch):
    monkeypatch.setattr(point_sampling, "_FLOATS_AT_ONCE", at_once)
    masks = torch.rand(5, 4, 8) > 0.5
    points = torch.rand(5, 60, 2) * 1.4 - 0.2  # some of them outside
    expected = sample_points(masks[:, None], points)[:, 0]
    chunks = [sample_points(floats[:, None], points[chunk])[:, 0] for chunk, floats in float_chunks(masks.to(dtype))]
    assert len(chunks) == (5 if at_once == 1 else 2)
    torch.testing.assert_close(torch.cat(chunks), expected)


def test_no_masks_give_no_chunks():
    assert list(float_chunks(torch.zeros(0, 4, 4, dtype=torch.bool))) == []


def test_uncertain_points_are_those_with_logits_nearest_to_zero():
    # A ramp over x: the logit is 0 at x = 0.5 and grows with the distance from it.
    logits = torch.linspace(-10, 10, 101).expand(2, 1, 4, 101)
    candidates = torch.rand(2, 60, 2)
    candidates[..., 1] = 0.5  # where values don't fade into the zeros outside
    selected = uncertain_points(logits, candidates, 20)
    assert selected.shape == (2, 20, 2)
    distances = (candidates[..., 0] - 0.5).abs().sort(dim=1).values
    torch.testing.assert_close((selected[..., 0] - 0.5).abs().sort(dim=1).values, distances[:, :20])


@pytest.mark.parametrize("draw", [draw_uniform_points, SeededPoints(7)], ids=["uniform", "seeded"])
def test_points_are_float32_on_the_cpu_whatever_the_defaults_are(draw):
    torch.manual_seed(0)
    expected = draw("random", 0, [0, 0], 5, CPU)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        points = draw("random", 0, [0, 0], 5, CPU)
        chosen = uncertain_points(torch.zeros(2, 1, 4, 4, device="cpu", dtype=torch.float32), points, 3)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(points, expected)
    assert chosen.shape == (2, 3, 2) and chosen.device == CPU


@pytest.mark.parametrize("shape", [(1, 30, 2), (3, 1, 2), (4, 30, 2)], ids=str)
def test_points_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"'random' points of the shape .*, expected \(3, 30, 2\)"):
        draw_checked(lambda *_: torch.rand(shape), "random", 1, [0] * 3, 30, CPU)


def test_uniform_points_follow_the_global_seed_and_fill_the_unit_square():
    torch.manual_seed(0)
    points = draw_uniform_points("matching", 0, range(4), 500, CPU)
    assert points.shape == (4, 500, 2)
    assert points.min() >= 0 and points.max() <= 1
    torch.testing.assert_close(points.mean((0, 1)), torch.full((2,), 0.5), rtol=0, atol=0.05)
    torch.manual_seed(0)
    assert torch.equal(points, draw_uniform_points("random", 3, [0, 0, 1, 2], 500, CPU))


def test_seeded_points_do_not_depend_on_how_the_batch_is_split():
    whole = SeededPoints(seed=7)("candidates", 1, [0, 0, 2, 3], 5, CPU)
    first = SeededPoints(seed=7)("candidates", 1, [0, 0], 5, CPU)
    second = SeededPoints(seed=7, first_image=2)("candidates", 1, [0, 1], 5, CPU)
    assert torch.equal(whole, torch.cat([first, second]))
    assert SeededPoints(seed=7)("candidates", 1, [], 5, CPU).shape == (0, 5, 2)


def test_seeded_points_differ_for_every_purpose_layer_image_row_and_seed():
    draws = [
        draw
        for seed in (0, 1)
        for purpose in SeededPoints.purposes
        for layer in (0, 1)
        for draw in SeededPoints(seed)(purpose, layer, [0, 0, 1], 3, CPU)
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws) == 36
