"""Run a model over a data set and update measures with its outputs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    batches: Iterable[tuple[Mapping[str, torch.Tensor], Sequence[Mapping[str, Any]]]],
    update: Callable[[Any, Sequence[Mapping[str, Any]]], None],
    show_progress: bool = True,
) -> None:
    """Run `model` in evaluation mode over batches of inputs and items; call `update(outputs, items)` for each.

    `update` is an `Evaluation`'s, for example.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        for inputs, items in tqdm(batches, desc="Evaluating", unit="batch", leave=False, disable=not show_progress):
            outputs = model(**{name: values.to(device) for name, values in inputs.items()})
            update(outputs, items)
    finally:
        model.train(was_training)
