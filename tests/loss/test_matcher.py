"""Matching: costs against `transformers` and the definition, assignment against trying all permutations."""

import logging
from itertools import permutations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.models.mask2former import modeling_mask2former as stock

from m2f_hf.loss import matcher as matcher_module
from m2f_hf.loss import points as point_sampling
from m2f_hf.loss.matcher import Mask2FormerHungarianMatcher, assign, pack_targets, pairwise_losses
from m2f_hf.loss.points import sample_points


NUM_LABELS = 5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def warnings_logged(caplog, monkeypatch):
    """Texts of the warnings of `m2f_hf.loss.matcher`, which `transformers`' logging keeps from the root logger."""
    monkeypatch.setattr(matcher_module.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("m2f_hf"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def make_batch(counts, num_layers=2, num_queries=6, channels=8, size=(8, 9), seed=0):
    """Class logits, mask embeddings, mask features, mask labels, class labels."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    masks = [torch.rand(count, 4 * size[0], 4 * size[1], generator=generator) > 0.5 for count in counts]
    labels = [torch.randint(0, NUM_LABELS, (count,), generator=generator) for count in counts]
    return (
        normal(num_layers, len(counts), num_queries, NUM_LABELS + 1),
        normal(num_layers, len(counts), num_queries, channels),
        normal(len(counts), channels, *size),
        masks,
        labels,
    )


def match(batch, matcher=None, **kwargs):
    classes, embeddings, features, masks, labels = batch
    targets = pack_targets(masks, labels, len(features), features.device)
    return (matcher or Mask2FormerHungarianMatcher(2.0, 5.0, 5.0, 30))(classes, embeddings, features, targets, **kwargs)


def pairs_by_image(matching, counts):
    """[layer][image] -> (queries, targets within the image) as lists."""
    starts = np.cumsum([0, *counts])
    return [
        [
            (queries[matching.images == image].tolist(), (targets[matching.images == image] - starts[image]).tolist())
            for image in range(len(counts))
        ]
        for queries, targets in zip(matching.queries, matching.targets, strict=True)
    ]


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (9, 1)], ids=["some", "none in one image", "more than queries"])
def test_matches_are_those_of_transformers_at_the_same_points(counts, monkeypatch):
    classes, embeddings, features, masks, labels = batch = make_batch(counts)
    points = torch.rand(len(classes), len(counts), 30, 2)
    matching = match(batch, draw_points=lambda purpose, layer, images, num_points, device: points[layer])
    assert matching.counts == [min(count, 6) for count in counts]

    theirs = stock.Mask2FormerHungarianMatcher(2.0, 5.0, 5.0, 30)
    for layer, ours in enumerate(pairs_by_image(matching, counts)):
        draws = iter(points[layer][:, None])
        monkeypatch.setattr(torch, "rand", lambda *shape, draws=draws, **kwargs: next(draws))
        logits = torch.einsum("bqc,bchw->bqhw", embeddings[layer], features)
        expected = theirs(logits, classes[layer], [mask.float() for mask in masks], labels)
        assert ours == [(queries.tolist(), targets.tolist()) for queries, targets in expected]


def test_pairwise_costs_are_the_losses_of_each_pair():
    logits, labels = 10 * torch.randn(2, 4, 50), torch.rand(2, 3, 50)
    pair_logits, pair_labels = (values.expand(2, 4, 3, 50) for values in (logits[:, :, None], labels[:, None]))
    expected = F.binary_cross_entropy_with_logits(pair_logits, pair_labels, reduction="none").mean(-1)
    cross_entropy, dice = pairwise_losses(logits, labels)
    torch.testing.assert_close(cross_entropy, expected)
    probabilities = pair_logits.sigmoid()
    numerator, denominator = (probabilities * pair_labels).sum(-1), (probabilities + pair_labels).sum(-1)
    torch.testing.assert_close(dice, 1 - (2 * numerator + 1) / (denominator + 1))


@pytest.mark.parametrize("counts", [(2, 1), (0, 3)], ids=str)
@pytest.mark.parametrize("num_frames", [1, 3])
def test_costs_are_those_of_whole_masks_at_the_points(num_frames, counts, monkeypatch):
    """Of clips: the points of all frames together."""
    monkeypatch.setattr(point_sampling, "_FLOATS_AT_ONCE", 1)
    layers, images, queries, channels, size = 3, 2, 6, 8, (5, 7)
    classes = torch.randn(layers, images, queries, NUM_LABELS + 1)
    embeddings = torch.randn(layers, images, queries, channels)
    features = torch.randn(images * num_frames, channels, *size)
    labels = [torch.randint(0, NUM_LABELS, (count,)) for count in counts]
    clip = [num_frames] if num_frames > 1 else []
    masks = [torch.rand(count, *clip, 16, 20) > 0.5 for count in counts]
    points = torch.rand(layers, images, 30, 2)
    found = Mask2FormerHungarianMatcher(2.0, 5.0, 3.0, 30).compute_costs(
        classes,
        embeddings,
        features,
        pack_targets(masks, labels, images, features.device, clip),
        lambda purpose, layer, images, num_points, device: points[layer],
    )
    assert found.shape == (layers, images, queries, max(counts))
    for layer in range(layers):
        for image, count in enumerate(counts):
            frames = features[image * num_frames : (image + 1) * num_frames]
            at = points[layer, image].expand(num_frames, -1, -1)
            # (Q, C) x (T, C, H, W) at (T, P) -> (T, Q, P) -> (Q, T * P)
            logits = sample_points(torch.einsum("qc,tchw->tqhw", embeddings[layer, image], frames), at)
            targets = masks[image].float().view(count, num_frames, 16, 20).transpose(0, 1)
            expected = pairwise_losses(
                logits.transpose(0, 1).flatten(1)[None], sample_points(targets, at).transpose(0, 1).flatten(1)[None]
            )
            of_classes = classes[layer, image].softmax(-1)[:, labels[image]]
            torch.testing.assert_close(
                found[layer, image, :, :count], 5 * expected[0][0] + 3 * expected[1][0] - 2 * of_classes
            )


@pytest.mark.parametrize("shape", [(5, 3), (3, 3), (2, 4)])
def test_assignment_is_the_cheapest_of_all(shape):
    num_queries, num_targets = shape
    costs = np.random.default_rng(0).normal(size=(3, 1, *shape)).astype(np.float32)
    queries, targets = assign(costs, [num_targets])
    for cost, query, target in zip(costs[:, 0], queries, targets, strict=True):
        wide = cost if num_queries <= num_targets else cost.T
        cheapest = min(sum(wide[i, j] for i, j in enumerate(p)) for p in permutations(range(max(shape)), min(shape)))
        assert len(set(query)) == len(set(target)) == min(shape)
        np.testing.assert_allclose(cost[query, target].sum(), cheapest, rtol=1e-6)


def test_a_perfect_prediction_is_matched_with_its_target():
    labels = torch.arange(3)
    masks = torch.zeros(3, 12, 12, dtype=torch.bool)
    for row in range(3):
        masks[row, 4 * row : 4 * row + 4] = True
    order = torch.tensor([2, 0, 1])  # query i shows target order[i]
    features = masks.float()[None] * 20 - 10
    embeddings = torch.eye(3)[order][None, None]
    classes = 10 * F.one_hot(labels[order], NUM_LABELS + 1).float()[None, None]
    matching = match((classes, embeddings, features, [masks], [labels]))
    assert pairs_by_image(matching, [3]) == [[([0, 1, 2], order.tolist())]]


def test_non_finite_costs_are_counted_and_do_not_spoil_the_others(warnings_logged):
    classes, embeddings, features, masks, labels = make_batch((2, 3))
    embeddings[1, 0, 4] = float("nan")  # one query: 2 pairs
    classes[0, 1, 2] = float("nan")  # one query: 3 pairs
    matching = match((classes, embeddings, features, masks, labels))
    (message,) = warnings_logged()
    assert f"5 of {2 * 6 * (2 + 3)} matching costs are not finite" in message
    pairs = pairs_by_image(matching, [2, 3])
    assert 4 not in pairs[1][0][0]
    assert 2 not in pairs[0][1][0]


def test_finite_costs_are_still_assigned_at_the_lowest_cost(warnings_logged):
    costs = np.array([[[[np.nan, 1e-3], [2e-3, np.inf], [-np.inf, 5e-3]]]], dtype=np.float32)
    queries, targets = assign(costs, [2])
    assert (queries.tolist(), targets.tolist()) == ([[0, 1]], [[1, 0]])
    assert "3 of 6 matching costs" in warnings_logged()[0]


def test_an_assignment_exists_even_when_no_cost_is_finite(warnings_logged):
    classes, embeddings, features, masks, labels = make_batch((2,))
    matching = match((classes, embeddings.fill_(float("inf")), features, masks, labels))
    assert matching.queries.shape == (2, 2)
    assert all(len(set(queries.tolist())) == 2 for queries in matching.queries)
    assert "24 of 24" in warnings_logged()[0]


def test_finite_costs_give_no_warning(warnings_logged):
    match(make_batch((2, 3)))
    assert warnings_logged() == []


def test_no_target_in_the_batch_gives_no_pairs():
    matching = match(make_batch((0, 0)))
    assert matching.queries.shape == matching.targets.shape == (2, 0)
    assert matching.images.shape == (0,)
    assert matching.counts == [0, 0]


@pytest.mark.parametrize(("label", "text"), [(NUM_LABELS, "range from . to 5"), (-1, "range from -1"), (255, "to 255")])
def test_labels_out_of_range_are_refused_with_the_range(label, text):
    batch = make_batch((2, 3))
    batch[4][1][0] = label
    with pytest.raises(ValueError, match=rf"must be in 0\.\.4 .*{text}"):
        match(batch)


@pytest.mark.parametrize(("value", "dtype"), [(255, torch.uint8), (-1.0, torch.float32), (float("nan"), torch.float32)])
def test_mask_values_out_of_range_are_refused(value, dtype):
    batch = make_batch((2, 3))
    batch[3][:] = [mask.to(dtype) for mask in batch[3]]
    batch[3][0][1, 3, 3] = value
    with pytest.raises(ValueError, match=r"`mask_labels` must be bool, or in 0\.\.1"):
        match(batch)


def test_targets_that_do_not_fit_are_refused():
    masks, labels = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    for arguments, text in (
        (([masks], [labels, labels], 2), "the batch has 2 images, but they have 1 and 2 entries"),
        (([masks], [labels], 2), "the batch has 2 images, but they have 1 and 1 entries"),
        (([masks, masks], [labels, labels[:1]], 2), r"Image 1: .* \(2, 4, 4\) and \(1,\)"),
        (([masks[0]], [labels], 1), r"must be \(N, H, W\)"),
        (([masks], [labels.float()], 1), "must be integers, but are torch.float32"),
    ):
        with pytest.raises(ValueError, match=text):
            pack_targets(*arguments, torch.device("cpu"))


def test_costs_must_not_all_be_zero():
    with pytest.raises(ValueError, match="At least one"):
        Mask2FormerHungarianMatcher(0.0, 0.0, 0.0)


def test_missing_scipy_is_named(monkeypatch):
    monkeypatch.setattr(matcher_module, "linear_sum_assignment", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        match(make_batch((2,)))
