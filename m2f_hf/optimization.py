"""AdamW with the original's parameter groups, and its learning rate schedules with warm-up."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


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
"""How the names of a backbone's parameters go on after `model.` (or begin, in a `Mask2FormerModel`)."""


def get_parameter_groups(
    model: nn.Module, learning_rate: float = 1e-4, weight_decay: float = 0.05, backbone_multiplier: float = 0.1
) -> list[dict[str, Any]]:
    """Parameter groups of the original's AdamW: at most four, by learning rate and weight decay.

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
) -> LambdaLR:
    """Learning rate schedule, to be advanced once per optimizer step; every group keeps its own peak rate.

    A linear warm-up of `warmup_steps` rises to the peak. (The original's starts at it; its COCO recipes warm up over 10
    steps.) `kind` says what multiplies the rate at step t of `total_steps`:

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
        warmup = min(1.0, (step + 1) / (warmup_steps + 1))
        return warmup * decay(min(step / max(total_steps, 1), 1.0))

    return LambdaLR(optimizer, factor)
