"""Losses: against the original's recorded run, `transformers`' criterion at the same points, and their properties."""

import json
import math
import multiprocessing
import socket
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import Mask2FormerConfig as StockConfig
from transformers.models.mask2former import modeling_mask2former as stock

from m2f_hf.loss import criterion as criterion_module
from m2f_hf.loss.criterion import Mask2FormerLoss, MatchedMaskLosses, point_losses
from m2f_hf.loss.matcher import pack_targets
from m2f_hf.loss.points import SeededPoints, sample_points


NUM_LABELS = 5
WEIGHTS = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
GOLDENS = [
    "coco_panoptic_r50",
    "coco_panoptic_swin",
    "coco_instance_swin",
    "ade20k_semantic_swinl",
    "fpn_basepixeldecoder",
]


def make_criterion(num_labels=NUM_LABELS, num_points=40, no_object_weight=0.1, importance_sample_ratio=0.75):
    config = SimpleNamespace(
        num_labels=num_labels,
        no_object_weight=no_object_weight,
        class_weight=2.0,
        mask_weight=5.0,
        dice_weight=5.0,
        train_num_points=num_points,
        oversample_ratio=3.0,
        importance_sample_ratio=importance_sample_ratio,
    )
    return Mask2FormerLoss(config, WEIGHTS)


def make_batch(counts, num_layers=3, num_queries=6, channels=8, size=(8, 9), seed=0):
    """Class logits, mask embeddings, mask features, mask labels, class labels."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    masks = [torch.rand(count, 4 * size[0], 4 * size[1], generator=generator) > 0.5 for count in counts]
    labels = [torch.randint(0, NUM_LABELS, (count,), generator=generator) for count in counts]
    return (
        normal(num_layers, len(counts), num_queries, NUM_LABELS + 1).requires_grad_(),
        normal(num_layers, len(counts), num_queries, channels).requires_grad_(),
        normal(len(counts), channels, *size).requires_grad_(),
        masks,
        labels,
    )


def compute(batch, seed=0, first_image=0, **kwargs):
    criterion = make_criterion(**kwargs)
    criterion.draw_points = SeededPoints(seed, first_image)
    return criterion(*batch)


def assert_same(losses, expected, **tolerances):
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], **tolerances, msg=lambda text, name=name: f"{name}: {text}")


# The original's run


class Golden:
    """Logits, targets, points, matches and losses that the original recorded in one training step."""

    def __init__(self, folder):
        with np.load(folder / "loss.npz") as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        with np.load(folder / "targets.npz") as arrays:
            targets = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        draws = json.loads((folder / "loss.json").read_text())["draws"]
        self.first_draw = {draw["what"]: draw["first"] for draw in draws}

        self.num_layers = 1 + sum(name.startswith("raw/aux") for name in self.arrays) // 2
        prefixes = [*(f"raw/aux{i}_" for i in range(self.num_layers - 1)), "raw/"]
        stack = lambda name: torch.stack([torch.from_numpy(self.arrays[prefix + name]) for prefix in prefixes])
        self.class_logits, mask_logits = stack("pred_logits"), stack("pred_masks")
        # Any masks are embedding x features: take all mask logits for features, and let embeddings pick one each.
        _, batch_size, num_queries, height, width = mask_logits.shape
        self.features = mask_logits.transpose(0, 1).reshape(batch_size, -1, height, width)
        picks = torch.eye(self.num_layers * num_queries).reshape(self.num_layers, 1, num_queries, -1)
        self.embeddings = picks.expand(-1, batch_size, -1, -1)

        masks = [targets[f"masks_{i}"] for i in range(batch_size)]
        self.masks = [F.pad(m, (0, 4 * width - m.shape[2], 0, 4 * height - m.shape[1])) for m in masks]
        self.labels = [targets[f"labels_{i}"] for i in range(batch_size)]

    def call(self, layer):
        """The original starts with the final output."""
        return 0 if layer == self.num_layers - 1 else layer + 1

    def draw_points(self, purpose, layer, images, num_points, device):
        kind = "matcher" if purpose == "matching" else "loss_masks"
        first = self.first_draw[f"{kind}_call{self.call(layer)}"]
        if purpose == "matching":
            points = np.concatenate([self.arrays[f"rand/{first + image:03d}"] for image in images])
        else:
            points = self.arrays[f"rand/{first + (purpose == 'random'):03d}"]
        assert points.shape == (len(images), num_points, 2)
        return torch.from_numpy(points)


@pytest.mark.parametrize("name", GOLDENS)
def test_losses_and_matches_are_the_originals(name, goldens):
    golden = Golden(goldens / name)
    criterion = make_criterion(golden.class_logits.shape[-1] - 1, num_points=112)
    criterion.draw_points = golden.draw_points
    predictions = golden.class_logits, golden.embeddings, golden.features

    losses = criterion(*predictions, golden.masks, golden.labels)
    assert len(losses) == 3 * golden.num_layers
    for term, loss in losses.items():
        recorded = term.replace("cross_entropy", "ce")
        assert loss.item() == pytest.approx(float(golden.arrays[f"unweighted/{recorded}"]), rel=1e-5)
        weight = WEIGHTS[term.rstrip("_0123456789")]
        assert weight * loss.item() == pytest.approx(float(golden.arrays[f"weighted/{recorded}"]), rel=1e-5)

    targets = pack_targets(golden.masks, golden.labels, len(golden.features), golden.features.device)
    matching = criterion.matcher(*predictions, targets, golden.draw_points)
    starts = np.cumsum([0, *targets.counts])
    for layer in range(golden.num_layers):
        for image in range(len(golden.features)):
            recorded = f"match/call{golden.call(layer)}/image{image}"
            rows = matching.images == image
            np.testing.assert_array_equal(matching.queries[layer, rows], golden.arrays[f"{recorded}/src"])
            np.testing.assert_array_equal(
                matching.targets[layer, rows] - starts[image], golden.arrays[f"{recorded}/tgt"]
            )


# transformers


def recorded_draws(monkeypatch):
    draws, rand = [], torch.rand

    def record(*shape, **kwargs):
        draws.append(rand(*shape, **kwargs))
        return draws[-1]

    monkeypatch.setattr(torch, "rand", record)
    return draws


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (9, 1)], ids=["some", "none in one image", "more than queries"])
def test_losses_and_gradients_are_those_of_transformers_at_the_same_points(counts, monkeypatch):
    num_layers = 3
    classes, embeddings, features, masks, labels = batch = make_batch(counts, num_layers)
    config = StockConfig(num_labels=NUM_LABELS, train_num_points=40)
    with monkeypatch.context() as patch:
        torch.manual_seed(0)
        draws = recorded_draws(patch)
        logits = torch.einsum("lbqc,bchw->lbqhw", embeddings, features)
        auxiliary = [
            {"masks_queries_logits": mask, "class_queries_logits": cls}
            for mask, cls in zip(logits[:-1], classes[:-1], strict=True)
        ]
        theirs = stock.Mask2FormerLoss(config, WEIGHTS)
        expected = theirs(logits[-1], classes[-1], [mask.float() for mask in masks], labels, auxiliary)
    per_layer = len(counts) + 2
    assert len(draws) == num_layers * per_layer

    def replay(purpose, layer, images, num_points, device):
        first = per_layer * ((layer + 1) % num_layers)  # theirs starts with the last
        if purpose == "matching":
            return torch.cat(draws[first : first + len(counts)])
        return draws[first + len(counts) + (purpose == "random")]

    criterion = make_criterion()
    criterion.draw_points = replay
    losses = criterion(*batch)
    assert_same(losses, expected)
    ours = torch.autograd.grad(sum(losses.values()), batch[:3])
    for gradient, reference in zip(ours, torch.autograd.grad(sum(expected.values()), batch[:3]), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_state_dict_is_that_of_transformers():
    config = StockConfig(num_labels=NUM_LABELS)
    theirs = stock.Mask2FormerLoss(config, WEIGHTS).state_dict()
    ours = Mask2FormerLoss(config, WEIGHTS).state_dict()
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["empty_weight"], theirs["empty_weight"])


# Definition and properties


def test_values_for_a_model_that_knows_nothing():
    masks = torch.zeros(1, 200, 200, dtype=torch.bool)
    masks[:, :, :100] = True
    zeros = torch.zeros(1, 1, 4, NUM_LABELS + 1), torch.zeros(1, 1, 4, 2), torch.zeros(1, 2, 4, 4)
    losses = make_criterion(num_points=20_000)(*zeros, [masks], [torch.tensor([1])])
    assert losses.keys() == set(WEIGHTS)
    assert losses["loss_cross_entropy"].item() == pytest.approx(math.log(NUM_LABELS + 1), rel=1e-5)
    assert losses["loss_mask"].item() == pytest.approx(math.log(2), rel=1e-5)
    # Half of the points are in the mask, everything has probability 1/2: 1 - 2 * (1/4) / (1/2 + 1/2)
    assert losses["loss_dice"].item() == pytest.approx(0.5, abs=0.01)


def draw_pixel_centres(height, width):
    """Points at which bilinear values are a pixel's own, the same in every call with the same arguments."""

    def draw(purpose, layer, images, num_points, device):
        generator = torch.Generator().manual_seed(layer)
        pixels = torch.stack(
            [torch.randint(side, (len(images), num_points), generator=generator) for side in (width, height)], dim=-1
        )
        return (pixels + 0.5) / torch.tensor([width, height])

    return draw


def test_a_perfect_prediction_costs_nothing_and_its_opposite_the_most():
    masks = torch.zeros(1, 4, 6, dtype=torch.bool)
    masks[:, :, :3] = True
    features = masks.float()[None] * 200 - 100
    right_class, wrong_class = (60 * F.one_hot(torch.tensor([[[label]]]), NUM_LABELS + 1).float() for label in (2, 3))
    criterion = make_criterion(num_points=40)
    criterion.draw_points = draw_pixel_centres(4, 6)
    targets = [masks], [torch.tensor([2])]
    best = criterion(right_class, torch.ones(1, 1, 1, 1), features, *targets)
    assert [loss.item() for loss in best.values()] == pytest.approx([0, 0, 0], abs=1e-6)
    worst = criterion(wrong_class, -torch.ones(1, 1, 1, 1), features, *targets)
    assert [loss.item() for loss in worst.values()] == pytest.approx([60, 100, 1 - 1 / (40 + 1)], rel=1e-5)


def test_order_of_targets_does_not_matter():
    batch = make_batch((4, 3))
    order = [torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])]
    permuted = [[image[index] for image, index in zip(labels, order, strict=True)] for labels in batch[3:]]
    assert_same(compute((*batch[:3], *permuted)), compute(batch))


def test_a_batch_is_the_mean_of_its_images():
    counts = (4, 1, 0)
    classes, embeddings, features, masks, labels = batch = make_batch(counts)
    singles = []
    for image in range(len(counts)):
        part = slice(image, image + 1)
        single = classes[:, part], embeddings[:, part], features[part], masks[part], labels[part]
        singles.append(compute(single, first_image=image))
    class_weights = [count + 0.1 * (classes.shape[2] - count) for count in counts]
    for name, loss in compute(batch).items():
        weights = class_weights if "cross_entropy" in name else counts
        expected = sum(weight * single[name] for weight, single in zip(weights, singles, strict=True)) / sum(weights)
        torch.testing.assert_close(loss, expected)


def test_target_masks_may_have_their_own_size():
    batch = make_batch((3, 2))
    criterion = make_criterion()
    criterion.draw_points = draw_pixel_centres(32, 36)
    expected = criterion(*batch)
    finer = batch[3][1].repeat_interleave(3, 1).repeat_interleave(3, 2)  # with the same values at those points
    assert_same(criterion(*batch[:3], [batch[3][0], finer], batch[4]), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float32])
def test_masks_of_any_dtype_give_the_same_losses(dtype):
    batch = make_batch((3, 2))
    assert_same(compute((*batch[:3], [mask.to(dtype) for mask in batch[3]], batch[4])), compute(batch), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_predictions_are_judged_in_float32(dtype):
    *predictions, masks, labels = make_batch((3, 2))
    low = [prediction.detach().to(dtype).requires_grad_() for prediction in predictions]
    losses = compute((*low, masks, labels))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    exact = compute((*(prediction.detach().float() for prediction in low), masks, labels))
    assert_same(losses, exact, rtol=0, atol=0)
    sum(losses.values()).backward()
    assert all(prediction.grad.dtype == dtype and prediction.grad.isfinite().all() for prediction in low)


def test_autocast_changes_nothing():
    batch = make_batch((3, 2))
    with torch.autocast("cpu", torch.bfloat16):
        losses = compute(batch)
    assert_same(losses, compute(batch), rtol=0, atol=0)


def test_a_criterion_cast_to_bfloat16_still_returns_float32():
    criterion = make_criterion().to(torch.bfloat16)
    assert {loss.dtype for loss in criterion(*make_batch((3, 2))).values()} == {torch.float32}


def test_without_targets_masks_cost_nothing_and_every_input_has_a_gradient():
    batch = make_batch((0, 0))
    losses = compute(batch)
    for name, loss in losses.items():
        assert loss.item() > 0 if "cross_entropy" in name else loss.item() == 0
    sum(losses.values()).backward()
    assert batch[0].grad.abs().sum() > 0
    assert all(prediction.grad is not None and not prediction.grad.any() for prediction in batch[1:3])


def test_without_targets_and_without_weight_on_no_object_the_loss_is_zero():
    losses = compute(make_batch((0,)), no_object_weight=0.0)
    assert all(loss.item() == 0 for loss in losses.values())


def test_suffixes_count_from_the_raw_queries():
    batch = make_batch((3, 2), num_layers=3)
    losses = compute(batch)
    assert list(losses) == [
        f"loss_{term}{suffix}" for suffix in ("", "_0", "_1") for term in ("cross_entropy", "mask", "dice")
    ]
    first = compute((batch[0][:1], batch[1][:1], *batch[2:]))  # the raw queries alone are then the last output
    assert_same({name: losses[f"{name}_0"] for name in first}, first)


def test_wrong_targets_are_refused():
    batch = make_batch((3, 2))
    with pytest.raises(ValueError, match="one tensor per image: the batch has 2 images"):
        compute((*batch[:3], batch[3][:1], batch[4][:1]))
    batch[4][0][1] = NUM_LABELS
    with pytest.raises(ValueError, match=r"must be in 0\.\.4"):
        compute(batch)


# Masks of the matched queries, a few outputs at a time


@pytest.mark.parametrize("at_once", [1, 10**6], ids=["one output", "all outputs"])
@pytest.mark.parametrize("counts", [[2, 1], [0, 3], [0, 0]], ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (0, 1, 3, 2)], ids=["BCHW", "BHWC", "BCWH"])
@pytest.mark.parametrize("num_frames", [1, 2])
def test_losses_of_matched_masks_have_the_gradient_of_the_masks(num_frames, order, counts, at_once, monkeypatch):
    """In every memory layout of the features. A query of a clip has a mask in each frame."""
    monkeypatch.setattr(criterion_module, "_LOGITS_AT_ONCE", at_once)
    back = [order.index(axis) for axis in range(4)]
    features = torch.randn(2 * num_frames, 4, 5, 6).permute(order).contiguous().permute(back).requires_grad_()
    embeddings = torch.randn(3, sum(counts), 4, requires_grad=True)
    images = [image for image, count in enumerate(counts) for _ in range(count)]
    frames = torch.tensor([image * num_frames + frame for image in images for frame in range(num_frames)]).long()
    counts = [count * num_frames for count in counts]
    points, labels = torch.rand(3, sum(counts), 7, 2), torch.rand(3, sum(counts), 7)
    seen, labelled = [], []

    def choose(logits, layer):
        seen.append(logits.clone())
        return points[layer]

    def label(chosen):
        labelled.append(chosen.clone())
        return labels

    losses = MatchedMaskLosses.apply(features, embeddings, counts, points.shape[2], choose, label)
    masks = torch.einsum("lmc,mchw->lmhw", embeddings.repeat_interleave(num_frames, 1), features[frames])
    expected = torch.stack(
        [
            point_losses(sample_points(layer_masks[:, None], at)[:, 0], layer_labels)
            for layer_masks, at, layer_labels in zip(masks, points, labels, strict=True)
        ],
        dim=1,
    )
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(torch.stack(seen)[:, :, 0], masks)
    assert len(labelled) == 1 and torch.equal(labelled[0], points)
    weights, inputs = torch.randn(2, 3), [features, embeddings]
    torch.testing.assert_close(
        torch.autograd.grad(losses, inputs, weights), torch.autograd.grad(expected, inputs, weights)
    )


def test_gradients_are_float32_when_the_backward_pass_is_under_autocast():
    batch = make_batch((2, 1))
    expected, found = [], []
    for grads, enabled in ((expected, False), (found, True)):
        for tensor in batch[:3]:
            tensor.grad = None
        torch.manual_seed(0)
        loss = sum(make_criterion()(*batch).values())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss.backward()
        grads += [tensor.grad for tensor in batch[1:3]]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("ratio", "purposes"), [(0.0, ["random"]), (1.0, ["candidates"])])
def test_points_may_all_be_random_or_all_be_uncertain(ratio, purposes):
    batch = make_batch((2, 1))
    criterion = make_criterion(importance_sample_ratio=ratio)
    draw, asked = SeededPoints(0), []

    def record(purpose, *request):
        asked.append(purpose)
        return draw(purpose, *request)

    criterion.draw_points = record
    losses = criterion(*batch)
    assert sorted({*asked} - {"matching"}) == purposes
    assert_same(losses, compute(batch, importance_sample_ratio=ratio))
    sum(losses.values()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in batch[:3])


# Cost: memory and synchronisation


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def test_masks_are_computed_for_a_few_outputs_at_a_time(monkeypatch):
    monkeypatch.setattr(criterion_module, "_LOGITS_AT_ONCE", 1)
    features, embeddings = torch.randn(1, 2, 32, 32, requires_grad=True), torch.randn(9, 3, 2, requires_grad=True)
    points = torch.rand(9, 3, 5, 2)
    with LargestTensor() as largest:
        losses = MatchedMaskLosses.apply(
            features, embeddings, [3], 5, lambda _, layer: points[layer], lambda _: points[..., 0]
        )
        losses.sum().backward()
    assert largest.numel == 3 * 32 * 32


def test_mask_logits_of_unmatched_queries_are_never_computed():
    num_queries, size = 50, (32, 32)
    batch = make_batch((2, 1), num_queries=num_queries, channels=4, size=size)
    criterion = make_criterion(num_points=20)
    with LargestTensor() as largest:
        sum(criterion(*batch).values()).backward()
    features, targets = batch[2].numel(), 2 * (4 * size[0]) * (4 * size[1])  # an image's, as floats
    assert largest.numel == max(features, targets)
    assert largest.numel < num_queries * size[0] * size[1]
    with LargestTensor() as naive:
        torch.einsum("bqc,bchw->bqhw", batch[1][0], batch[2])
    assert naive.numel > largest.numel


def test_nothing_large_is_kept_for_the_backward_pass():
    batch = make_batch((4, 4), size=(32, 32), channels=4)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = make_criterion(num_points=20)(*batch)
    dense_logits = 4 * 8 * 32 * 32  # bytes, of one output's matched masks
    features = batch[2].untyped_storage()
    assert kept.pop(features.data_ptr()) == features.nbytes()
    assert max(kept.values()) < dense_logits / 2
    assert len(losses) == 9


class OnAccelerator(torch.Tensor):
    """A CPU tensor that claims to be on another device ("meta", the one that needs no hardware)."""

    @staticmethod
    def __new__(cls, data):
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), dtype=data.dtype, device="meta"
        )
        wrapper.data_on_cpu = data
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the simulated accelerator")


class SimulatedAccelerator(TorchDispatchMode):
    """Runs a second device on the CPU and counts what would make the host wait for it.

    Copies to the host, blocking uploads, reading a number, and operations whose output size depends on values wait;
    mixing devices is an error, as it is on a GPU.
    """

    aten = torch.ops.aten
    waiting = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.repeat_interleave)

    def __init__(self):
        super().__init__()
        self.copies_to_host = 0
        self.other_waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        on_accelerator = any(isinstance(leaf, OnAccelerator) for leaf in leaves)
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        packet = func.overloadpacket
        if packet in (self.aten._to_copy, self.aten.copy_):
            self.copies_to_host += on_accelerator and device is not None and device.type == "cpu"
            if device is not None and device.type == "meta" and not kwargs.get("non_blocking"):
                self.other_waits.append("upload")
        elif on_accelerator:
            strangers = [leaf for leaf in leaves if not isinstance(leaf, OnAccelerator) and leaf.ndim > 0]
            assert not strangers, f"{func} mixes devices"
            masks = packet in (self.aten.index, self.aten.index_put, self.aten.index_put_, self.aten._index_put_impl_)
            if packet in self.waiting or (masks and any(leaf.dtype == torch.bool for leaf in leaves[1:])):
                self.other_waits.append(str(func))
        result = func(
            *tree_map_only(OnAccelerator, lambda leaf: leaf.data_on_cpu, args),
            **tree_map_only(OnAccelerator, lambda leaf: leaf.data_on_cpu, kwargs),
        )
        if func._schema.is_mutable:
            return args[0]
        if on_accelerator if device is None else device.type == "meta":
            return tree_map_only(torch.Tensor, OnAccelerator, result)
        return result


def test_the_host_waits_once_for_the_device(monkeypatch):
    # The stand-in device has no autocast.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    *predictions, masks, labels = make_batch((3, 2, 0))
    expected = compute((*predictions, masks, labels))
    criterion = make_criterion()
    criterion.empty_weight = OnAccelerator(criterion.empty_weight)
    criterion.draw_points = SeededPoints(0)
    moved = [OnAccelerator(prediction.detach()) for prediction in predictions]
    moved_targets = [[OnAccelerator(image) for image in targets] for targets in (masks, labels)]
    with SimulatedAccelerator() as accelerator:
        losses = criterion(*moved, *moved_targets)
    assert accelerator.copies_to_host == 1
    assert accelerator.other_waits == []
    assert_same({name: loss.data_on_cpu for name, loss in losses.items()}, expected)


def test_the_simulated_accelerator_notices_what_it_should():
    tensor = OnAccelerator(torch.arange(4.0))
    with SimulatedAccelerator() as accelerator:
        assert (tensor * 2).cpu().tolist() == [0, 2, 4, 6]
        assert accelerator.copies_to_host == 1
        assert tensor.sum().item() == 6
        assert bool(tensor[1] > 0)
        tensor[tensor > 1]
        assert len(accelerator.other_waits) == 3
        torch.ones(4).to("meta")
        assert accelerator.other_waits.pop() == "upload"
        with pytest.raises(AssertionError, match="mixes devices"):
            tensor + torch.ones(4)


# Several processes


def half_of_the_batch(rank, port):
    """Losses of one of two processes with half of the batch each, and their gradients for the whole batch's inputs."""
    timeout = timedelta(seconds=300)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timeout, rank=rank, world_size=2)
    try:
        *predictions, masks, labels = make_batch((4, 0, 1, 2))
        part = slice(2 * rank, 2 * rank + 2)
        classes, embeddings, features = predictions
        mine = classes[:, part], embeddings[:, part], features[part], masks[part], labels[part]
        losses = compute(mine, first_image=2 * rank)
        gradients = torch.autograd.grad(sum(losses.values()), predictions)
    finally:
        torch.distributed.destroy_process_group()
    return {name: loss.item() for name, loss in losses.items()}, [gradient.numpy() for gradient in gradients]


def test_two_processes_average_to_one_with_the_whole_batch():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other_process:
        other = other_process.submit(half_of_the_batch, 1, port)
        results = [half_of_the_batch(0, port), other.result()]

    batch = make_batch((4, 0, 1, 2))
    expected = compute(batch)
    for name, loss in expected.items():
        assert np.mean([losses[name] for losses, _ in results]) == pytest.approx(loss.item(), rel=1e-5)
    for index, gradient in enumerate(torch.autograd.grad(sum(expected.values()), batch[:3])):
        mean = np.mean([gradients[index] for _, gradients in results], axis=0)
        np.testing.assert_allclose(mean, gradient.numpy(), rtol=1e-4, atol=1e-6)
