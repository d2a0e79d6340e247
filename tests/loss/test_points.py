"""Sampling at points: against `grid_sample`, the original's recorded values and the definition."""

import numpy as np
import pytest
import torch

from m2f_hf.kernels import pieces as chunking
from m2f_hf.loss import points as point_sampling
from m2f_hf.loss.points import (
    PointRows,
    SeededPoints,
    draw_in_parts,
    draw_uniform_points,
    in_floats,
    sample_points,
    smallest_of_rows,
    spread_to_maps,
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


@pytest.mark.parametrize("at_once", [1, 10**6], ids=["one by one", "all at once"])
def test_spreading_is_the_gradient_of_sampling(at_once, monkeypatch):
    monkeypatch.setattr(chunking, "_NUMBERS_PER_PIECE", at_once)
    points = torch.rand(3, 40, 2) * 1.2 - 0.1
    features = torch.randn(3, 1, 5, 7, requires_grad=True)
    grad = torch.randn(3, 40)
    (expected,) = torch.autograd.grad(sample_points(features, points), features, grad[:, None])
    found = torch.empty(3, 5, 7)
    spread_to_maps(grad, points, out=found)
    torch.testing.assert_close(found[:, None], expected)


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
    parts = [sample_points(part[:, None], at)[:, 0] for part, at in in_floats(masks.to(dtype), points)]
    torch.testing.assert_close(torch.cat(parts), expected)


def test_no_masks_at_all_can_be_sampled():
    masks = torch.zeros(0, 4, 4, dtype=torch.bool)
    assert list(in_floats(masks, torch.zeros(0, 9, 2))) == []


def test_uncertain_points_are_those_with_logits_nearest_to_zero():
    # A ramp over x: the logit is 0 at x = 0.5 and grows with the distance from it.
    logits = torch.linspace(-10, 10, 101).expand(2, 1, 4, 101)
    candidates = torch.rand(2, 60, 2)
    candidates[..., 1] = 0.5  # where values don't fade into the zeros outside
    selected = uncertain_points(logits, candidates, 20)
    assert selected.shape == (2, 20, 2)
    distances = (candidates[..., 0] - 0.5).abs().sort(dim=1).values
    torch.testing.assert_close((selected[..., 0] - 0.5).abs().sort(dim=1).values, distances[:, :20])


@pytest.mark.parametrize(
    "kind", ["random", "with ties", "all the same", "sorted", "small where sampled", "large there", "not numbers"]
)
@pytest.mark.parametrize(
    ("length", "count"),
    [(40_000, 10_000), (5_000, 4_990), (5_000, 2), (7, 7), (7, 0), (1, 1), (1, 0), *((60, n) for n in range(61))],
)
def test_the_smallest_of_a_row_are_those_that_sorting_finds(kind, length, count):
    """Also where the sample says nothing of the rest."""
    values = np.random.default_rng(0).normal(size=(3, length)).astype(np.float32)
    if kind == "with ties":
        values = np.round(values, 1)
    elif kind == "all the same":
        values[:] = 1.0
    elif kind == "sorted":
        values.sort(axis=1)
    elif kind != "random" and kind != "not numbers":
        values[:, :: max(1, length // point_sampling._SAMPLED)] += 100 if kind == "large there" else -100
    elif kind == "not numbers":
        values[:, ::3] = np.nan
    kept = smallest_of_rows(values, count)
    assert kept.shape == (3, count)
    assert all(len(set(of_row)) == count for of_row in kept)
    found = np.sort(np.take_along_axis(values, kept, axis=1), axis=1)
    np.testing.assert_array_equal(found, np.sort(values, axis=1)[:, :count])


@pytest.mark.parametrize("is_sorted", [False, True], ids=["random", "sorted"])
def test_little_of_a_row_is_told_apart(is_sorted, monkeypatch):
    """The rest is only compared with two numbers."""
    moved = []
    whole = np.argpartition
    monkeypatch.setattr(np, "argpartition", lambda values, count: moved.append(len(values)) or whole(values, count))
    values = np.random.default_rng(0).normal(size=(5, 40_000)).astype(np.float32)
    smallest_of_rows(np.sort(values, axis=1) if is_sorted else values, 10_000)
    assert len(moved) == 5 and max(moved) < 40_000 / 10


@pytest.mark.parametrize("at_once", [1, 45, 10**6], ids=["one by one", "in fours", "all at once"])
@pytest.mark.parametrize("draw", [draw_uniform_points, SeededPoints(7)], ids=["uniform", "seeded"])
def test_points_drawn_in_parts_are_those_of_one_draw(draw, at_once, monkeypatch):
    """So that they don't depend on the number of threads, which decides on the parts."""
    monkeypatch.setattr(chunking, "_NUMBERS_PER_PIECE", at_once)
    monkeypatch.setattr(chunking, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)
    request = ("candidates", 2, [0, 0, 0, 0, 0, 1, 3, 3], 5, CPU)
    torch.manual_seed(0)
    parts = list(draw_in_parts(draw, *request))
    assert [row for part, _ in parts for row in range(8)[part]] == list(range(8))
    torch.manual_seed(0)
    whole = draw(*request)
    assert torch.equal(torch.cat([points for _, points in parts]), whole)
    assert whole.shape == (8, 5, 2) and len(whole.unique()) > 70
    assert list(draw_in_parts(draw, "random", 0, [], 5, CPU)) == []
    assert draw("random", 0, [], 5, CPU).shape == (0, 5, 2)


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


def test_other_points_are_asked_for_once():
    """They may have been recorded for all rows together."""
    asked = []
    points = torch.rand(1000, 30, 2)

    def draw(*request):
        asked.append(request)
        return points

    ((part, drawn),) = draw_in_parts(draw, "candidates", 1, [0] * 1000, 30, CPU)
    assert asked == [("candidates", 1, [0] * 1000, 30, CPU)]
    assert drawn is points and part == slice(None)


@pytest.mark.parametrize("shape", [(1, 30, 2), (3, 1, 2), (4, 30, 2)], ids=str)
def test_other_points_than_asked_for_are_refused(shape):
    with pytest.raises(ValueError, match=r"'random' points of the shape .*, expected \(3, 30, 2\)"):
        list(draw_in_parts(lambda *_: torch.rand(shape), "random", 1, [0] * 3, 30, CPU))


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
