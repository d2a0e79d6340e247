"""What a run measures on its validation data: figures, pictures, thresholds."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from ..data.loading import evaluation_loader
from ..metrics import MAIN_FIGURE, Evaluation, evaluate_model
from ..metrics.evaluation import CARD_FIGURES
from ..metrics.pictures import comparison_sheet, draw_prediction
from .plan import Data


THRESHOLDS = {"threshold": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "overlap_mask_area_threshold": (0.5, 0.65, 0.8)}
MEASURED = {"panoptic": ("pq", "miou"), "instance": ("ap",), "semantic": ("miou",), "video": ("ap",)}
"""What is measured during training. (A panoptic model's AP takes longer than everything else: `m2f evaluate`.)"""
NUM_PICTURES = 4


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether a process has only a part of the model."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def evaluate(
    model: Any,
    processor: Any,
    data: Data,
    batch_size: int,
    accelerator: Accelerator,
    before_batch: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], Any]:
    """Return the figures on the validation data, over all processes, and a picture of its first images.

    Only the main process gets the picture; the others None.

    Args:
        before_batch: called before each batch is measured; may raise to end the evaluation.
    """
    evaluation = Evaluation(data.task, processor, data.categories, MEASURED[data.task])
    # Where processes need each other for every batch, all see all images: shares may differ in length.
    share = (0, 1) if is_sharded(accelerator) else (accelerator.process_index, accelerator.num_processes)
    config = accelerator.unwrap_model(model).config
    rows: list[Any] = []
    titles: list[str] = []

    def update(outputs: Any, items: Sequence[Mapping[str, Any]]) -> None:
        before_batch()
        for prediction, item in zip(evaluation.predict(outputs, items), items, strict=True):
            evaluation.add(prediction, item)
            if accelerator.is_main_process and len(rows) < NUM_PICTURES:
                found, named = draw_prediction(item, prediction, evaluation, config)
                rows.extend(found)
                titles.extend(named)

    batches = evaluation_loader(data.validation, processor, batch_size, *share)
    evaluate_model(model, batches, update, accelerator.is_main_process)
    result = evaluation.compute(None if is_sharded(accelerator) else gather_object)
    return result, comparison_sheet(rows, titles) if rows else None


def summarize(result: Mapping[str, Any], task: str) -> dict[str, float]:
    """Return the defined figures of an evaluation in one flat row; the task's main one is 0 where it is undefined."""
    known = {name: round(value, 4) for name, value in result.items() if name != "per_class" and value is not None}
    return {MAIN_FIGURE[task]: 0.0, **known}


def in_words(row: Mapping[str, Any]) -> str:
    """Return the figures that go onto the card as text, in percent."""
    return ", ".join(f"{name} {100 * row[key]:.1f}" for key, (_, name) in CARD_FIGURES.items() if key in row)


def choose_thresholds(model: Any, processor: Any, data: Data, batch_size: int) -> str:
    """Give the processor the pair of `THRESHOLDS` with the best PQ on the validation data; return it in words.

    Raises:
        ValueError: for other tasks than panoptic segmentation.
    """
    if data.task != "panoptic":
        raise ValueError(f"--choose_thresholds is for panoptic segmentation, not {data.task}")
    pairs = [dict(zip(THRESHOLDS, values, strict=True)) for values in itertools.product(*THRESHOLDS.values())]
    evaluations = []
    for pair in pairs:
        other = copy.copy(processor)
        for name, value in pair.items():
            setattr(other, name, value)
        evaluations.append(Evaluation("panoptic", other, data.categories, ["pq"]))

    def update(outputs: Any, items: Any) -> None:
        for evaluation in evaluations:
            evaluation.update(outputs, items)

    evaluate_model(model, evaluation_loader(data.validation, processor, batch_size), update)
    qualities = [evaluation.compute()["pq_all"] or 0.0 for evaluation in evaluations]
    best = int(np.argmax(qualities))
    for name, value in pairs[best].items():
        setattr(processor, name, value)
    return f"thresholds {pairs[best]}: PQ {qualities[best]:.4f} on the scenes they were chosen by"
