"""Parameter groups and schedules against the original's own list and their definitions; accumulation, averages."""

import copy
import io
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import BACKBONES, tiny_model
from torch import nn

from m2f_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from m2f_hf.known.recipes import RECIPES, get_recipe
from m2f_hf.loss import criterion as criterion_module
from m2f_hf.loss.points import SeededPoints
from m2f_hf.training.optimization import (
    ExponentialMovingAverage,
    choose_num_steps,
    get_loss_shares,
    get_parameter_groups,
    get_schedule,
    scale_learning_rate,
    scale_losses,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "conversion"))

from detectron2_config import config_from_yaml, read_config
from detectron2_mapping import mapping_for


UNDECAYED = ("norm", "relative_position_bias_table", "position_embeddings", "queries_")
UNDECAYED += ("transformer_module.level_embed",)


@pytest.fixture(scope="module")
def swin_model() -> Mask2FormerForUniversalSegmentation:
    return tiny_model("swin", backbone_config=BACKBONES["swin"] | {"use_absolute_embeddings": True, "image_size": 32})


def settings_by_name(groups: list[dict]) -> dict[str, tuple[float, float]]:
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def test_groups_are_those_of_the_original(goldens):
    """Each parameter of the original's own optimizer has the same rate and decay here, and none is missing."""
    folder = goldens / "coco_panoptic_r50"
    config = Mask2FormerConfig(**config_from_yaml(read_config(folder / "config.yaml")))
    model = Mask2FormerForUniversalSegmentation(config)
    ours = settings_by_name(get_parameter_groups(model, learning_rate=1e-4, weight_decay=0.05, backbone_multiplier=0.1))
    targets = {entry.source: entry.targets for entry in mapping_for(config)}
    expected = {
        target: (group["lr"], group["weight_decay"])
        for group in json.loads((folder / "optimizer_groups.json").read_text())
        for name in group["params"]
        for target in targets[name]
    }
    assert set(ours) == set(expected)
    for name, (rate, decay) in expected.items():
        assert ours[name] == pytest.approx((rate, decay)), name


def test_groups_of_swin(swin_model):
    groups = get_parameter_groups(swin_model, 1e-3, 0.05, 0.1)
    found = settings_by_name(groups)
    assert set(found) == {name for name, parameter in swin_model.named_parameters() if parameter.requires_grad}
    assert len(groups) == 4
    assert len({id(parameter) for group in groups for parameter in group["params"]}) == len(found)
    for name, (rate, decay) in found.items():
        assert rate == pytest.approx(1e-4 if ".pixel_level_module.encoder." in name else 1e-3), name
        # In the pixel decoder a convolution and its norm are numbers 0 and 1 of a sequence.
        is_decoder_norm = ".decoder." in name and name.split(".")[-2] == "1" and "encoder.layers" not in name
        is_norm_or_table = is_decoder_norm or any(part in name for part in UNDECAYED)
        assert decay == (0.0 if is_norm_or_table else 0.05), name
    assert found["model.pixel_level_module.decoder.level_embed"][1] == 0.05
    assert found["class_predictor.bias"][1] == 0.05


def test_frozen_parameters_are_left_out(swin_model):
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[0].weight.requires_grad_(False)
    assert settings_by_name(get_parameter_groups(model)) == {
        "0.bias": (1e-4, 0.05),
        "1.weight": (1e-4, 0.0),
        "1.bias": (1e-4, 0.0),
    }
    with pytest.raises(ValueError, match="unfreeze"):
        get_parameter_groups(model.requires_grad_(False))


def test_the_base_model_has_the_same_groups(swin_model):
    whole = settings_by_name(get_parameter_groups(swin_model))
    base = settings_by_name(get_parameter_groups(swin_model.model))
    assert base == {name.removeprefix("model."): value for name, value in whole.items() if name.startswith("model.")}


def rates(kind: str, total: int, **settings) -> list[list[float]]:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 0.1}])
    schedule = get_schedule(optimizer, kind, total, **settings)
    found = []
    for _ in range(total):
        found.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    return found


def test_schedules_follow_their_definitions():
    multistep = [first for first, _ in rates("multistep", 100, warmup_steps=0)]
    assert multistep == pytest.approx([1.0] * 90 + [0.1] * 5 + [0.01] * 5)
    poly = [first for first, _ in rates("poly", 100, warmup_steps=0)]
    assert poly == pytest.approx([(1 - step / 100) ** 0.9 for step in range(100)])
    cosine = [first for first, _ in rates("cosine", 100, warmup_steps=0)]
    assert cosine[0] == 1.0 and cosine[50] == pytest.approx(0.5) and cosine[99] < 1e-3
    assert all(later < earlier for earlier, later in itertools.pairwise(cosine))


def test_warm_up_rises_to_the_peak_in_every_group():
    found = rates("multistep", 40, warmup_steps=4)
    assert [first for first, _ in found[:6]] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert all(second == pytest.approx(0.1 * first) for first, second in found)


@pytest.mark.parametrize("name", ["coco-panoptic", "coco-instance-100ep", "cityscapes-semantic"])
def test_schedules_of_the_recipes_are_the_originals(name):
    """Rates around every change, by detectron2's definitions (bisect over the steps; poly of the share of steps)."""
    recipe = get_recipe(name)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    schedule = get_schedule(
        optimizer,
        recipe.schedule,
        recipe.steps,
        recipe.warmup_steps,
        recipe.milestones,
        warmup_factor=recipe.warmup_factor,
    )
    factor = schedule.lr_lambdas[0]
    if recipe.schedule == "poly":
        steps = [0, 1, 9, 30_000, 89_999]
        assert [factor(step) for step in steps] == pytest.approx([(1 - step / 90_000) ** 0.9 for step in steps])
        return
    first, second = {368_750: (327_778, 355_092), 737_500: (655_556, 710_184)}[recipe.steps]
    expected = {0: 1, 1: 1, 9: 1, 10: 1, first - 1: 1, first: 0.1, second - 1: 0.1, second: 0.01}
    for step, value in expected.items():
        assert factor(step) == pytest.approx(value), step


def test_warm_up_may_start_higher():
    found = [first for first, _ in rates("multistep", 40, warmup_steps=4, warmup_factor=0.5)]
    assert found[:6] == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert [first for first, _ in rates("multistep", 40, warmup_steps=4, warmup_factor=1.0)][:6] == [1.0] * 6


def test_every_recipe_names_a_schedule():
    for recipe in RECIPES.values():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        get_schedule(optimizer, recipe.schedule, recipe.steps, recipe.warmup_steps, recipe.milestones)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'multistep', 'poly', 'cosine'"):
        rates("linear", 10)


def test_a_resnet_with_trained_norms_keeps_them_undecayed():
    found = settings_by_name(get_parameter_groups(tiny_model()))
    norms = {name for name in found if ".normalization." in name}
    assert norms and all(found[name] == pytest.approx((1e-5, 0.0)) for name in norms)


# --- defaults ---


def test_learning_rate_follows_the_batch():
    assert scale_learning_rate(16) == (1e-4, "learning rate 0.0001: the original's for 16 images per step")
    assert scale_learning_rate(4).value == pytest.approx(5e-5)
    assert scale_learning_rate(64, 2e-4).value == pytest.approx(4e-4)
    assert "square root of 4/16" in scale_learning_rate(4).reason
    with pytest.raises(ValueError, match="1 image or more"):
        scale_learning_rate(0)


def test_number_of_steps_follows_the_data():
    assert choose_num_steps(100, 10).value == 1000
    assert choose_num_steps(10_000, 16).value == 6250
    assert choose_num_steps(1, 10_000).value == 1
    assert "each image about 100 times" in choose_num_steps(100, 10).reason
    for arguments in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least one image"):
            choose_num_steps(*arguments)


def test_fine_tuning_sees_a_twentieth_of_what_the_original_sees():
    """Images per root of the data set's size, in the original's recipes (sizes of the training sets as published)."""
    for name, num_images in {"coco-panoptic": 118_287, "ade20k-semantic": 20_210, "cityscapes-panoptic": 2_975}.items():
        recipe = get_recipe(name)
        ours = choose_num_steps(num_images, recipe.batch_size).value
        assert 1 / 36 < ours / recipe.steps < 1 / 15, name


# --- accumulation ---

NUM_QUERIES = 5


def batch_of(counts: list[int], seed: int = 0) -> dict:
    """Images of 64 x 64 pixels with so many targets each."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(len(counts), 3, 64, 64, generator=generator),
        "mask_labels": [torch.rand(count, 64, 64, generator=generator) < 0.4 for count in counts],
        "class_labels": [torch.randint(0, 2, (count,), generator=generator) for count in counts],
    }


def part(batch: dict, start: int, end: int) -> dict:
    return {name: values[start:end] for name, values in batch.items()}


@pytest.fixture(scope="module")
def plain_model() -> Mask2FormerForUniversalSegmentation:
    """Without anything that looks at other images of a batch, or drops something at random."""
    return tiny_model("swin", num_queries=NUM_QUERIES, num_labels=2, train_num_points=64).train()


def run(model: Mask2FormerForUniversalSegmentation, batch: dict, first_image: int) -> dict[str, torch.Tensor]:
    model.criterion.draw_points = SeededPoints(7, first_image=first_image)
    return model(**batch).loss_dict


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6 * float(scale), msg=name)


COUNTS = [3, 0, 1, 4, 2, 7]  # an image without targets, and one with more than there are queries


@pytest.mark.parametrize("splits", [[0, 2, 4, 6], [0, 1, 6], [0, 1, 2, 3, 4, 5, 6]], ids=str)
def test_accumulated_batches_equal_the_large_batch(plain_model, splits):
    """Losses and gradients, though the parts differ in images and targets, and some have none."""
    batch = batch_of(COUNTS)
    whole = run(plain_model, batch, 0)
    plain_model.get_loss(whole).backward()
    expected = gradients(plain_model)

    parts = [part(batch, *pair) for pair in itertools.pairwise(splits)]
    shares = get_loss_shares([p["class_labels"] for p in parts], NUM_QUERIES, plain_model.criterion.empty_weight)
    total = dict.fromkeys(whole, 0.0)
    for start, piece, share in zip(splits, parts, shares, strict=False):
        losses = scale_losses(run(plain_model, piece, start), share)
        plain_model.get_loss(losses).backward()
        total = {name: value + float(losses[name].detach()) for name, value in total.items()}
    assert total == pytest.approx({name: float(value.detach()) for name, value in whole.items()}, rel=1e-5)
    assert_same_gradients(gradients(plain_model), expected)


def test_the_mean_of_batches_is_another_loss(plain_model):
    """What the shares are for: without them the result differs by far more than roundings."""
    batch = batch_of(COUNTS)
    whole = run(plain_model, batch, 0)
    halves = [run(plain_model, part(batch, start, start + 3), start) for start in (0, 3)]
    mean = (halves[0]["loss_mask"] + halves[1]["loss_mask"]) / 2
    assert abs((mean / whole["loss_mask"]).item() - 1) > 1e-3


def test_accumulated_batches_of_two_processes_equal_the_large_batch(plain_model, monkeypatch):
    """Two processes with two batches each, run one after the other; their means are what a collective would give."""
    batch = batch_of([*COUNTS, 0, 2])
    plain_model.get_loss(run(plain_model, batch, 0)).backward()
    expected = gradients(plain_model)

    # Step s of process p has images 4 s + 2 p and the next, as one batch of eight would be dealt out.
    starts = [[4 * step + 2 * process for step in range(2)] for process in range(2)]
    parts = [[part(batch, start, start + 2) for start in row] for row in starts]
    labels = [[piece["class_labels"] for piece in row] for row in parts]
    weight = plain_model.criterion.empty_weight
    local: list[torch.Tensor] = []
    for process in range(2):
        get_loss_shares(labels[process], NUM_QUERIES, weight, lambda totals: local.append(totals) or totals)
    mean = (local[0] + local[1]) / 2

    found: dict[str, torch.Tensor] = {}
    for process in range(2):
        shares = get_loss_shares(labels[process], NUM_QUERIES, weight, lambda totals: mean)
        for step, share in enumerate(shares):
            # The criterion averages the number of targets and the sums of class weights, one for each output.
            monkeypatch.setattr(
                criterion_module,
                "average_over_processes",
                lambda values, step=step: torch.cat([mean[step, :1], mean[step, 1:].expand(len(values) - 1)]),
            )
            losses = run(plain_model, parts[process][step], starts[process][step])
            plain_model.get_loss(scale_losses(losses, share)).backward()
        for name, gradient in gradients(plain_model).items():
            found[name] = found.get(name, 0) + gradient / 2  # DDP takes the mean over processes
    assert_same_gradients(found, expected)


def test_shares_by_hand():
    labels = [[torch.tensor([0, 1])], [torch.tensor([], dtype=torch.int64)], [torch.tensor([1] * 7)]]
    shares = get_loss_shares(labels, NUM_QUERIES, torch.tensor([1.0, 1.0, 0.1]))
    weights = [2 + 0.3, 0.5, 5.0]
    assert [share.classes for share in shares] == pytest.approx([weight / 7.8 for weight in weights])
    assert [share.masks for share in shares] == pytest.approx([2 / 9, 1 / 9, 7 / 9])
    empty = [[torch.tensor([], dtype=torch.int64)]] * 2
    assert get_loss_shares(empty, NUM_QUERIES, torch.tensor([1.0, 0.1])) == [(0.5, 1.0)] * 2
    assert get_loss_shares(empty, NUM_QUERIES, torch.tensor([1.0, 0.0])) == [(0.0, 1.0)] * 2


# --- averaged weights ---


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def shifted(model: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount)


def test_average_follows_its_definition():
    torch.manual_seed(0)
    model = Small()
    average = ExponentialMovingAverage(model, decay=0.5)
    expected = model.layer.weight.detach().clone()
    for step in range(1, 12):
        shifted(model, 0.1 * step)
        model.norm.running_mean.add_(1.0)
        average.update(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.layer.weight.detach()
    assert decay == 0.5
    torch.testing.assert_close(average.module.layer.weight, expected)
    assert 0 < average.module.norm.running_mean[0] < model.norm.running_mean[0]


def test_the_model_gets_its_own_weights_back():
    model = Small().bfloat16()
    average = ExponentialMovingAverage(model)
    assert average.module.layer.weight.dtype == torch.float32
    shifted(model, 1.0)
    average.update(model)
    own, averages = copy.deepcopy(model.state_dict()), copy.deepcopy(average.module.state_dict())
    with pytest.raises(RuntimeError, match="on the way"), average.applied(model):
        torch.testing.assert_close(model.layer.weight.detach().float(), averages["layer.weight"], rtol=1e-2, atol=1e-2)
        assert not torch.equal(model.layer.weight, own["layer.weight"])
        assert model.layer.weight.requires_grad
        raise RuntimeError("on the way")
    assert_same(model.state_dict(), own)
    assert_same(average.module.state_dict(), averages)


def test_an_average_goes_on_from_a_checkpoint():
    torch.manual_seed(0)
    model = Small()
    average = ExponentialMovingAverage(model, decay=0.9)
    for _ in range(3):
        shifted(model, 0.5)
        average.update(model)
    buffer = io.BytesIO()
    torch.save(average.state_dict(), buffer)
    buffer.seek(0)
    other = ExponentialMovingAverage(Small(), decay=0.9)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    shifted(model, 0.5)
    average.update(model)
    other.update(model)
    assert_same(other.state_dict(), average.state_dict())


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_averages_of_another_model_and_decays_out_of_range_are_refused():
    average = ExponentialMovingAverage(Small())
    with pytest.raises(RuntimeError, match=r"layer\.weight"):
        average.load_state_dict(ExponentialMovingAverage(nn.Linear(3, 2)).state_dict())
    with pytest.raises(ValueError, match="decay"):
        ExponentialMovingAverage(Small(), decay=1.0)
