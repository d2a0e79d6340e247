"""Parameter groups, learning rates, numbers of steps, shares of accumulated losses, averaged weights."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel


NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
UNDECAYED_NAMES = ("relative_position_bias_table", "position_embeddings", "absolute_pos_embed")
"""Last parts of the names of position tables that are plain parameters: Swin's, under old and new names."""
BACKBONE = "pixel_level_module.encoder."
"""Prefix of a backbone's parameters, after `model.` in models with heads."""
REFERENCE_BATCH_SIZE = 16
"""Images per step at which the original's learning rate of 1e-4 holds."""
IMAGES_PER_ROOT = 1000
"""Images seen in fine-tuning, divided by the square root of the data set's size."""


def get_parameter_groups(
    model: nn.Module, learning_rate: float = 1e-4, weight_decay: float = 0.05, backbone_multiplier: float = 0.1
) -> list[dict[str, Any]]:
    """Return the parameter groups of the original's AdamW: at most four, by learning rate and weight decay.

    The backbone learns at `backbone_multiplier` times `learning_rate`. Weights of norms, embeddings (queries and the
    transformer decoder's level embedding among them) and Swin's position tables are not decayed; everything else is,
    biases included. Parameters that don't require gradients are left out.

    Returns:
        Dicts of `params`, `names`, `lr` and `weight_decay` for any `torch.optim` optimizer.

    Raises:
        ValueError: if no parameter requires gradients.
    """
    undecayed = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (*NORMS, nn.Embedding))
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_backbone = name.removeprefix("model.").startswith(BACKBONE)
        rate = learning_rate * (backbone_multiplier if is_backbone else 1.0)
        is_decayed = id(parameter) not in undecayed and name.rpartition(".")[2] not in UNDECAYED_NAMES
        decay = weight_decay if is_decayed else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "names": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError("No parameter of the model requires gradients: unfreeze what is to be trained.")
    return list(groups.values())


def get_schedule(
    optimizer: Optimizer,
    kind: str,
    total_steps: int,
    warmup_steps: int = 10,
    milestones: Sequence[float] = (0.9, 0.95),
    power: float = 0.9,
    warmup_factor: float = 0.0,
) -> LambdaLR:
    """Return a learning rate schedule, to be advanced once per optimizer step; every group keeps its own peak rate.

    (`transformers.get_scheduler` has none that equals the original's: its warm-up starts at 0 and delays the decay.) A
    linear warm-up rises from above `warmup_factor` times the peak (the original's factor is 1.0) to the peak in
    `warmup_steps`. `kind` says what multiplies the rate at step t of `total_steps`:

    - "multistep": 0.1 for each milestone passed, given as shares of `total_steps` (the original on COCO: 327,778 and
      355,092 of 368,750 steps);
    - "poly": (1 - t / total_steps) ** power (the original on ADE20K, Cityscapes and Mapillary Vistas);
    - "cosine": half a cosine wave, from 1 to 0.

    Raises:
        ValueError: if `kind` is none of these.
    """
    decays: dict[str, Callable[[float], float]] = {
        "multistep": lambda done: 0.1 ** sum(done >= milestone for milestone in milestones),
        "poly": lambda done: (1.0 - done) ** power,
        "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    }
    if kind not in decays:
        raise ValueError(f"Unknown schedule {kind!r}: use one of {', '.join(map(repr, decays))}.")
    decay = decays[kind]

    def factor(step: int) -> float:
        done = min(1.0, (step + 1) / (warmup_steps + 1))
        warmup = warmup_factor + (1.0 - warmup_factor) * done
        return warmup * decay(min(step / max(total_steps, 1), 1.0))

    return LambdaLR(optimizer, factor)


# --- defaults from the batch and the data set ---


class Choice(NamedTuple):
    """A number that was chosen for a run, and why."""

    value: float
    reason: str


def scale_learning_rate(batch_size: int, learning_rate: float = 1e-4) -> Choice:
    """Return the learning rate for `batch_size` images per step (over all processes and accumulated batches).

    `learning_rate` is that for 16 images. It grows with the square root of the batch: AdamW's step has the same length
    for every gradient, and only its noise shrinks with the batch (Malladi et al., arXiv 2205.10287).

    Raises:
        ValueError: if `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"A batch has 1 image or more, got {batch_size}.")
    value = learning_rate * math.sqrt(batch_size / REFERENCE_BATCH_SIZE)
    reason = f"{learning_rate:.3g} for {REFERENCE_BATCH_SIZE} images per step, times the square root of {batch_size}/16"
    if batch_size == REFERENCE_BATCH_SIZE:
        reason = f"the original's for {REFERENCE_BATCH_SIZE} images per step"
    return Choice(value, f"learning rate {value:.3g}: {reason}")


def choose_num_steps(num_images: int, batch_size: int) -> Choice:
    """Return how many steps to fine-tune a model that segments already, on `num_images` images.

    1000 times the square root of the number of images are seen: each of 10 images 316 times, of 200 images 71 times.
    The original sees 17,000 (COCO) to 36,000 (Mapillary Vistas) times that root, from a backbone alone; this is about a
    twentieth. A rule of thumb: watch the validation figure.

    Raises:
        ValueError: if there is no image, or `batch_size` is below 1.
    """
    if num_images < 1 or batch_size < 1:
        raise ValueError(f"Need at least one image, in batches of one or more; got {num_images} and {batch_size}.")
    seen = IMAGES_PER_ROOT * math.sqrt(num_images)
    steps = math.ceil(seen / batch_size)
    reason = (
        f"{steps} steps: {IMAGES_PER_ROOT} times the square root of {num_images} training images, in batches of "
        f"{batch_size}, each image about {max(1, round(seen / num_images))} times"
    )
    return Choice(steps, reason)


# --- gradient accumulation ---


class LossShare(NamedTuple):
    """Factors, 0 to 1, of a batch's `loss_cross_entropy` and mask losses in a step of several batches."""

    classes: float
    masks: float


def get_loss_shares(
    class_labels: Sequence[Sequence[Tensor]],
    num_queries: int,
    empty_weight: Tensor,
    average: Callable[[Tensor], Tensor] = lambda totals: totals,
) -> list[LossShare]:
    """Return the shares with which the losses of batches add up to the loss of all their images in one batch.

    A loss is a sum over its batch, divided by the batch's number of targets (masks) or sum of class weights (classes).
    Batches differ in both, so the mean of their losses is not the loss of all images together. Hence:

        shares = get_loss_shares([batch["class_labels"] for batch in batches], num_queries, criterion.empty_weight)
        for batch, share in zip(batches, shares):
            outputs = model(**batch)
            model.get_loss(scale_losses(outputs.loss_dict, share)).backward()

    The gradients then add up to those of the large batch (except with batch norms in training, and with classes of
    different weight in images with more targets than queries).

    Args:
        class_labels: for each batch of the step, for each image (N,) int64.
        num_queries: of the model.
        empty_weight: (num_labels + 1,) weights of the classes, the last of "no object" (`Mask2FormerLoss`).
        average: returns the mean over processes of a (batches, 2) float32 tensor; all have as many batches.
    """
    weight = empty_weight.detach().double().cpu()
    totals = []
    for labels in class_labels:
        num_targets = sum(len(image) for image in labels)
        class_weight = torch.zeros((), dtype=torch.float64)
        for image in labels:
            matched = min(len(image), num_queries)
            class_weight += (num_queries - matched) * weight[-1]
            class_weight += matched * weight[image.cpu()].mean() if matched else 0.0
        totals.append([float(num_targets), float(class_weight)])
    targets, weights = average(torch.tensor(totals)).double().cpu().unbind(1)
    # As the loss does: a batch without targets is divided by one; without any class weight it is 0 as it is.
    masks = targets.clamp(min=1) / targets.sum().clamp(min=1)
    classes = weights / weights.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return [LossShare(*pair) for pair in zip(classes.tolist(), masks.tolist(), strict=True)]


def scale_losses(loss_dict: Mapping[str, Tensor], share: LossShare) -> dict[str, Tensor]:
    """Return a model's `loss_dict` with each term multiplied by its share."""
    return {
        name: loss * (share.classes if name.startswith("loss_cross_entropy") else share.masks)
        for name, loss in loss_dict.items()
    }


# --- averaged weights ---


class ExponentialMovingAverage(AveragedModel):
    """A running average of a model's weights (in `module`), often better than the weights of any one step.

    After each step: average = d * average + (1 - d) * weights, with d = min(`decay`, (1 + t) / (10 + t)) at step t, so
    that the start is soon forgotten. Parameters and float buffers are averaged in float32 at least.

    Args:
        model: on its device, without wrappers (DDP, compile), as later for `update` and `applied`.
        decay: of the average, in [0, 1).

    Raises:
        ValueError: if `decay` is out of range.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"The decay of a moving average is in [0, 1), got {decay}.")
        super().__init__(model, multi_avg_fn=self._average, use_buffers=True)
        self.decay = decay
        self.n_averaged += 1  # the first update is averaged with the start instead of replacing it
        if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in self.module.state_dict().values()):
            self.module.float()

    def _average(self, averages: Sequence[Tensor], weights: Sequence[Tensor], step: Tensor | int) -> None:
        decay = min(self.decay, (1 + int(step)) / (10 + int(step)))
        for average, weight in zip(averages, weights, strict=True):
            if average.is_floating_point():
                average.lerp_(weight.to(average.dtype), 1 - decay)
            else:
                average.copy_(weight)

    def update(self, model: nn.Module) -> None:
        """Take the model's weights into the average; once per optimizer step."""
        self.update_parameters(model)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights inside the `with` block, and its own again after it."""
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            model.load_state_dict(self.module.state_dict())
            yield
        finally:
            model.load_state_dict(own)
