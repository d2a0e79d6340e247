"""Sampling at points: against `grid_sample`, the original's recorded values and the definition."""

import numpy as np
import pytest
import torch

from m2f_hf import point_sampling
from m2f_hf.point_sampling import (
    PointRows,
    SeededPoints,
    draw_uniform_points,
    sample_masks,
    sample_masks_alike,
    sample_points,
    select_uncertain_points,
    spread_to_maps,
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
    selected = select_uncertain_points(recorded["ps_input"], candidates, random, num_uncertain)
    in_some_order = lambda points: [sorted(map(tuple, image)) for image in points.tolist()]
    assert in_some_order(selected) == in_some_order(recorded["up_selected"])


def test_values_are_exact_at_pixel_centres_and_fade_to_zero_outside():
    features = torch.arange(12.0).reshape(1, 1, 3, 4) + 1
    points = torch.tensor([[[0.5 / 4, 0.5 / 3], [3.5 / 4, 1.5 / 3], [0.5, 0.5], [0.0, 0.5 / 3], [1.5, 0.5]]])
    # centre of (row 0, column 0), of (1, 3), the middle of the map, half out on the left, far out
    torch.testing.assert_close(sample_points(features, points), torch.tensor([[[1.0, 8.0, 6.5, 0.5, 0.0]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_sampled_as_maps_are(dtype):
    features = torch.randn(2, 6, 5, 9).to(dtype)
    points = torch.rand(2, 200, 2) * 1.4 - 0.2  # some outside, on every side
    torch.testing.assert_close(PointRows(features).sample(points), sample_points(features, points).mT)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_rows_of_maps_with_channels_last_are_the_maps(layout):
    features = torch.randn(2, 6, 5, 9).contiguous(memory_format=layout)
    assert (PointRows(features).rows.data_ptr() == features.data_ptr()) == (layout == torch.channels_last)


def test_rows_fade_to_zero_at_every_edge():
    x, y = torch.meshgrid(
        *(torch.tensor([-1e9, -0.5, -0.01, 0.0, 0.02, 0.5, 0.98, 1.0, 1.01, 2.0, 1e9]),) * 2, indexing="xy"
    )
    points = torch.stack([x, y], dim=-1).view(1, -1, 2).expand(2, -1, -1)
    for size in ((5, 9), (1, 3), (1, 1)):
        features = torch.randn(2, 6, *size)
        torch.testing.assert_close(PointRows(features).sample(points), sample_points(features, points).mT)


def test_rows_are_float32_whatever_the_default_is():
    features, points = torch.randn(1, 6, 5, 9), torch.rand(1, 20, 2)
    expected = PointRows(features).sample(points)
    torch.set_default_dtype(torch.float64)
    try:
        actual = PointRows(features).sample(points)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual, expected)


def test_spreading_is_the_gradient_of_sampling():
    points = torch.rand(3, 40, 2) * 1.2 - 0.1
    features = torch.randn(3, 2, 5, 7, requires_grad=True)
    grad = torch.randn(3, 2, 40)
    (expected,) = torch.autograd.grad(sample_points(features, points), features, grad)
    torch.testing.assert_close(spread_to_maps(grad, points, features.shape), expected)


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
    torch.testing.assert_close(sample_masks(masks.to(dtype), points), expected)
    alike = sample_points(masks[None], points[:1])[0]
    torch.testing.assert_close(sample_masks_alike(masks.to(dtype), points[0]), alike)


def test_no_masks_at_all_can_be_sampled():
    masks = torch.zeros(0, 4, 4, dtype=torch.bool)
    assert sample_masks(masks, torch.zeros(0, 9, 2)).shape == (0, 9)
    assert sample_masks_alike(masks, torch.zeros(9, 2)).shape == (0, 9)


def test_uncertain_points_are_those_with_logits_nearest_to_zero():
    # A ramp over x: the logit is 0 at x = 0.5 and grows with the distance from it.
    logits = torch.linspace(-10, 10, 101).expand(2, 1, 4, 101)
    candidates, random = torch.rand(2, 60, 2), torch.rand(2, 7, 2)
    candidates[..., 1] = 0.5  # where values don't fade into the zeros outside
    selected = select_uncertain_points(logits, candidates, random, 20)
    assert selected.shape == (2, 27, 2)
    assert torch.equal(selected[:, 20:], random)
    distances = (candidates[..., 0] - 0.5).abs().sort(dim=1).values
    torch.testing.assert_close((selected[:, :20, 0] - 0.5).abs().sort(dim=1).values, distances[:, :20])


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
