"""Pictures of predictions next to targets, which show where a model is right and wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..data.inspection import sheet_of
from ..data.video import frame_mask
from ..draw.segments import draw_segments, semantic_to_segments
from ..processing.rle import decode_segmentation
from .evaluation import Evaluation, Prediction, detections, image_size, to_array, with_masks
from .mask_ap import is_thing


COLUMNS = ("image", "predicted", "target")
Segments = tuple[np.ndarray, list[dict[str, Any]]]
"""An id map (H, W) int32, 0 is void, and its segments."""


def to_map(segments: Sequence[Mapping[str, Any]], size: tuple[int, int], label_key: str) -> Segments:
    """Paint segments with a `segmentation` each one over the other, in this order."""
    painted = np.zeros(size, dtype=np.int32)
    infos = []
    for number, segment in enumerate(segments, start=1):
        painted[decode_segmentation(segment["segmentation"], *size)] = number
        infos.append({"id": number, "label_id": segment[label_key], "score": segment.get("score")})
    return painted, infos


def predicted_segments(
    prediction: Prediction, task: str, size: tuple[int, int], id2label: Mapping[int, str], threshold: float
) -> Segments:
    """Return the segments to draw of an `Evaluation.predict` result; instances from score `threshold` on."""
    if task == "panoptic":
        return to_array(prediction["panoptic"]["segmentation"]), list(prediction["panoptic"]["segments_info"])
    if task == "semantic":
        return semantic_to_segments(to_array(prediction["semantic"]), id2label)
    kept = [entry for entry in detections(prediction["instances"]) if entry["score"] >= threshold]
    return to_map(sorted(kept, key=lambda entry: entry["score"]), size, "label_id")


def target_segments(item: Mapping[str, Any], evaluation: Evaluation) -> Segments:
    """Return the segments of an item that belong to the task."""
    things = {int(category["id"]) for category in evaluation.categories if is_thing(category)}
    segments = [info for info in with_masks(item) if evaluation.task != "instance" or info["category_id"] in things]
    return to_map(segments, image_size(item), "category_id")


def draw_comparison(
    item: Mapping[str, Any],
    prediction: Prediction,
    evaluation: Evaluation,
    id2label: Mapping[int, str],
    colors: Mapping[int, Sequence[int]] | None = None,
    side: int = 480,
) -> list[Image.Image]:
    """Draw an item's image, its prediction and its target: three pictures, enlarged to about `side` pixels.

    Args:
        item: of a data set.
        prediction: of `evaluation.predict` for it.
        evaluation: has task and classes; its processor's `instance_threshold` decides which instances are drawn.
        id2label: names of the classes.
        colors: RGB of classes.
        side: longer side of the pictures, in pixels, where the image is at most half as large.
    """
    size = image_size(item)
    predicted = predicted_segments(prediction, evaluation.task, size, id2label, evaluation.processor.instance_threshold)
    nothing: Segments = (np.zeros(size, dtype=np.int32), [])
    return [
        draw_segments(item["image"], *segments, id2label=id2label, colors=colors, scale=max(1, side // max(size)))
        for segments in (nothing, predicted, target_segments(item, evaluation))
    ]


def draw_frames(
    item: Mapping[str, Any],
    prediction: Prediction,
    evaluation: Evaluation,
    id2label: Mapping[int, str],
    colors: Mapping[int, Sequence[int]] | None = None,
    number: int = 4,
) -> tuple[list[list[Image.Image]], list[str]]:
    """Draw `draw_comparison` of at most `number` frames of a video, spread evenly, and return them with their titles.

    A track has one colour in all of them. Other arguments are `draw_comparison`'s.
    """
    length = len(item["frames"])
    frames = np.linspace(0, length - 1, min(number, length)).round().astype(int).tolist()
    absent = np.zeros(image_size(item), dtype=bool)
    rows = []
    for frame in frames:
        segments = []
        for info in item["segments_info"]:
            mask = frame_mask(item, info, frame)
            segments.append({**info, "segmentation": absent if mask is None else mask})
        still = {"image": item["frames"][frame], "segments_info": segments}
        tracks = prediction["instances"]
        found = [tube[frame] for tube in tracks["segmentation"]]
        instances = {**tracks, "segmentation": [absent if mask is None else mask for mask in found]}
        rows.append(draw_comparison(still, {"instances": instances}, evaluation, id2label, colors))
    return rows, [f"{item['file_name']}, frame {frame + 1} of {length}" for frame in frames]


def draw_prediction(
    item: Mapping[str, Any], prediction: Prediction, evaluation: Evaluation, config: Any
) -> tuple[list[list[Image.Image]], list[str]]:
    """Draw an image, or four frames of a video, with prediction and target; return the rows and their titles.

    Args:
        config: the model's, with names and colours of the classes. Other arguments are `draw_comparison`'s.
    """
    id2label = {int(label): name for label, name in config.id2label.items()}
    colors = dict(enumerate(config.label_colors)) if config.label_colors else None
    if evaluation.task == "video":
        return draw_frames(item, prediction, evaluation, id2label, colors)
    row = draw_comparison(item, prediction, evaluation, id2label, colors)
    return [row], [str(item.get("file_name", f"image {item['image_id']}"))]


def comparison_sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], side: int = 480) -> Image.Image:
    """Put rows of `draw_comparison` into one picture, each with its title; images are fitted into `side` pixels."""
    return sheet_of([[_fit(picture, side) for picture in row] for row in rows], titles, COLUMNS, side)


def _fit(picture: Image.Image, side: int) -> Image.Image:
    fitted = picture.copy()
    fitted.thumbnail((side, side), Image.Resampling.LANCZOS)
    return fitted
