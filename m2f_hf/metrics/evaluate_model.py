"""Run a model over a data set, and hand what it says to a measure."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .evaluation import VOID_LABEL, semantic_map
from .mean_iou import MeanIoU
from .panoptic_quality import PanopticQuality


class PanopticEvaluation:
    """PQ and mIoU of one model, image by image, in the frame of the original images.

    Args:
        processor: an `M2FImageProcessor`; its thresholds and stuff classes are used.
        categories: the classes in COCO's form with contiguous ids.
    """

    def __init__(self, processor: Any, categories: Sequence[Mapping[str, Any]]) -> None:
        self.processor = processor
        self.panoptic_quality = PanopticQuality(categories)
        self.mean_iou = MeanIoU(len(categories), VOID_LABEL)

    def update(self, outputs: Any, items: Sequence[Mapping[str, Any]], **thresholds: float) -> None:
        """Add a batch: the model's outputs, and the items of a panoptic dataset (see `ShapesDataset`) they are for.

        `thresholds` are passed on to `post_process_panoptic_segmentation`.
        """
        sizes = [item["segmentation_map"].shape for item in items]
        panoptic = self.processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes, **thresholds)
        semantic = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        for item, segments, labels in zip(items, panoptic, semantic, strict=True):
            self.panoptic_quality.update(
                segments["segmentation"].cpu().numpy(),
                segments["segments_info"],
                item["segmentation_map"],
                item["segments_info"],
            )
            self.mean_iou.update(labels.cpu().numpy(), semantic_map(item["segmentation_map"], item["segments_info"]))

    def compute(self, sum_over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None) -> dict[str, Any]:
        """`{"panoptic_quality": {"all": …, "things": …, "stuff": …, "per_class": …}, "mean_iou": …}`.

        With `sum_over_processes` the totals of all processes are added up first.
        """
        if sum_over_processes is not None:
            for metric, name in ((self.panoptic_quality, "totals"), (self.mean_iou, "confusion")):
                total = sum_over_processes(torch.from_numpy(getattr(metric, name)))
                setattr(metric, name, total.cpu().numpy())
        quality, iou = self.panoptic_quality.compute(), self.mean_iou.compute()
        nested = {
            group: {key: quality[f"{key}_{group}"] or 0.0 for key in ("pq", "sq", "rq")}
            for group in ("all", "things", "stuff")
        }
        per_class = [entry["iou"] for entry in iou["per_class"].values()]
        return {
            "panoptic_quality": {**nested, "per_class": quality["per_class"]},
            "mean_iou": {"mean_iou": iou["miou"] or 0.0, "per_class": per_class},
        }


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    batches: Iterable[tuple[Mapping[str, torch.Tensor], Sequence[Mapping[str, Any]]]],
    update: Callable[[Any, Sequence[Mapping[str, Any]]], None],
    show_progress: bool = True,
) -> None:
    """Run `model` over batches of inputs and dataset items, and hand outputs and items to `update`.

    `update` is an `Evaluation`'s, for example. The model is in evaluation mode meanwhile.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    for inputs, items in tqdm(batches, desc="Evaluating", unit="batch", leave=False, disable=not show_progress):
        outputs = model(pixel_values=inputs["pixel_values"].to(device), pixel_mask=inputs["pixel_mask"].to(device))
        update(outputs, items)
    model.train(was_training)
