"""Give a model the classes of a data set."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


def set_classes(model: Any, categories: Sequence[Mapping[str, Any]]) -> str:
    """Give a model the classes of a data set, and return in words what was done.

    What its class head has learnt of classes of the same name, and of "no object", stays; the rest of the head is new.

    Args:
        model: a `Mask2FormerForUniversalSegmentation`.
        categories: `id` (contiguous from 0), `name` and maybe `color` of each class.
    """
    config = model.config
    own = {str(name): int(label) for label, name in config.id2label.items()}
    names = [str(category["name"]) for category in categories]
    colors = [category.get("color") for category in categories]
    known_colors = [list(color) for color in colors if color] if colors and all(colors) else None
    if names == class_names(config):
        config.label_colors = config.label_colors or known_colors
        return f"its {len(names)} classes are the data set's"
    old = model.class_predictor
    head = nn.Linear(old.in_features, len(names) + 1, device=old.weight.device, dtype=old.weight.dtype)
    rows = [(new, own[name]) for new, name in enumerate(names) if name in own] + [(len(names), old.out_features - 1)]
    with torch.no_grad():
        for new, row in rows:
            head.weight[new], head.bias[new] = old.weight[row], old.bias[row]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: label for label, name in enumerate(names)}
    config.label_colors = known_colors
    model.class_predictor = head
    model.criterion = type(model.criterion)(config, model.weight_dict).to(old.weight.device)
    kept = [name for name in names if name in own]
    known = f"{', '.join(kept[:8])}{' …' if len(kept) > 8 else ''}" if kept else "none"
    return (
        f"a new class head for {len(names)} classes instead of {old.out_features - 1}; taken over by name: {known} "
        f"({len(kept)}); {len(names) - len(kept)} are new"
    )


def class_names(config: Any) -> list[str]:
    """Return the names of a model's classes in the order of their labels."""
    return [str(name) for _, name in sorted((int(label), name) for label, name in config.id2label.items())]
