"""Draw segments over pictures, with Pillow and NumPy alone."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont


Color = tuple[int, int, int]
ClassColors = Mapping[int, Sequence[int]] | Sequence[Sequence[int]]

_FILL_PERCENT = 45
# Labels are placed on a map no larger than this, so that the search takes as long for a large photo.
_MAX_PLACEMENT_SIDE = 320
# Share of a label's box that must be on its segment; a smaller font is tried otherwise.
_COMFORTABLE_COVER = 0.7
# Hue (turns) and lightness (0-1) added for the first, second, … instance of a class.
_INSTANCE_VARIATION = (
    (0.0, 0.0),
    (0.09, 0.12),
    (-0.09, 0.1),
    (0.17, -0.08),
    (-0.17, -0.05),
    (0.05, -0.18),
    (-0.05, 0.25),
)


def semantic_to_segments(semantic_map: Any, id2label: Mapping[int, str]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Turn a semantic map into the (id map, `segments_info`) form of a panoptic result, a segment for each class seen.

    Args:
        semantic_map: (H, W) integer class ids; pixels whose class is not in `id2label` (such as 255) become void.
        id2label: names of the classes.

    Returns:
        (H, W) int32 map, void 0 and `id = class id + 1`, and a list of `{"id", "label_id", "label"}` by class id.
    """
    semantic_map = np.asarray(semantic_map)
    label_ids = [int(label_id) for label_id in np.unique(semantic_map) if int(label_id) in id2label]
    segmentation = np.where(np.isin(semantic_map, label_ids), semantic_map.astype(np.int32) + 1, 0).astype(np.int32)
    infos = [{"id": label_id + 1, "label_id": label_id, "label": id2label[label_id]} for label_id in label_ids]
    return segmentation, infos


def label_color(label_id: int) -> Color:
    """Return a fixed, vivid colour (RGB, 0-255) for a class; successive classes' hues are a golden angle apart."""
    hue = (0.58 + label_id * 0.61803398875) % 1.0
    lightness = (0.55, 0.42, 0.66)[label_id // 5 % 3]
    return _from_hls(hue, lightness, 0.85)


def segment_colors(segments_info: Iterable[Mapping[str, Any]], colors: ClassColors | None = None) -> dict[int, Color]:
    """Return a colour for each segment: its class's, in another shade for each further instance of a thing.

    Args:
        segments_info: dictionaries with `id` and `label_id`, and where known `isthing`.
        colors: RGB of classes by label id, such as a configuration's `label_colors`; others get [`label_color`].

    Returns:
        Segment id -> RGB, 0-255.
    """
    known = dict(colors if isinstance(colors, Mapping) else enumerate(colors or ()))
    seen: Counter[int] = Counter()
    result = {}
    for info in segments_info:
        label_id = info["label_id"]
        red, green, blue = known.get(label_id) or label_color(label_id)
        step = seen[label_id] % len(_INSTANCE_VARIATION)
        is_plain = step == 0 or info.get("isthing") is False
        result[info["id"]] = (red, green, blue) if is_plain else _vary((red, green, blue), *_INSTANCE_VARIATION[step])
        seen[label_id] += 1
    return result


def draw_segments(
    image: Image.Image,
    segmentation: Any,
    segments_info: Sequence[Mapping[str, Any]],
    id2label: Mapping[int, str] | None = None,
    colors: ClassColors | None = None,
    scale: int = 1,
) -> Image.Image:
    """Draw segments over a photo: coloured fill, outline, and a label with the score where there is room.

    Args:
        image: the photo.
        segmentation: (H, W) integer ids at the photo's size; ids that `segments_info` lacks stay undrawn.
        segments_info: dictionaries with `id` and `label_id`, and where known `label` and `score` (0-1).
        id2label: names for segments without `label`; without a name the number is written.
        colors: RGB of classes by label id, such as a configuration's `label_colors`, in place of the built-in palette.
        scale: whole-number enlargement of the picture, for labels that can be read on small images.

    Returns:
        RGB picture, `scale` times the photo's size.

    Raises:
        ValueError: the map's size is not the photo's.
    """
    segmentation = np.asarray(segmentation)
    if segmentation.shape != (image.height, image.width):
        raise ValueError(
            f"the segment map is {segmentation.shape} but the image is {(image.height, image.width)} (height, width): "
            "pass target_sizes=[(height, width)] to post-processing"
        )
    image = image.convert("RGB")
    if scale > 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
        segmentation = segmentation.repeat(scale, axis=0).repeat(scale, axis=1)
    palette = segment_colors(segments_info, colors)
    picture = _paint(np.asarray(image), segmentation, palette)
    texts = {info["id"]: _label_text(info, id2label) for info in segments_info}
    return _write_labels(Image.fromarray(picture), segmentation, texts, palette)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], row_titles: Sequence[str], column_titles: Sequence[str]
) -> Image.Image:
    """Arrange pictures of one size in a grid: `rows[i][j]` under `column_titles[j]`, below `row_titles[i]`."""
    width, height = rows[0][0].size
    gap = max(8, width // 40)
    font = ImageFont.load_default(max(12, width // 22))
    line = int(font.getbbox("Ag")[3]) + gap
    size = (len(column_titles) * (width + gap) + gap, line + len(rows) * (height + line) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles):
        draw.text((gap + column * (width + gap), gap // 2), title, fill="black", font=font)
    for row, (pictures, title) in enumerate(zip(rows, row_titles, strict=True)):
        top = line + row * (height + line)
        draw.text((gap, top + gap // 2), title, fill=(90, 90, 90), font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (gap + column * (width + gap), top + line))
    return sheet


def _vary(color: Color, hue_step: float, lightness_step: float) -> Color:
    hue, lightness, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in color))
    varied = lightness + lightness_step
    if not 0 <= varied <= 1:  # the other way, or black and white would have no shades
        varied = lightness - lightness_step
    return _from_hls((hue + hue_step) % 1.0, varied, saturation)


def _darken(color: Sequence[int]) -> Color:
    """Return the colour at a lightness against which white text can be read."""
    hue, _, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in color))
    return _from_hls(hue, 0.16, saturation)


def _from_hls(hue: float, lightness: float, saturation: float) -> Color:
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


def _label_text(info: Mapping[str, Any], id2label: Mapping[int, str] | None) -> str:
    name = info.get("label") or (id2label or {}).get(info["label_id"]) or str(info["label_id"])
    score = info.get("score")
    return name if score is None else f"{name} {score:.0%}"


def _paint(pixels: np.ndarray, segmentation: np.ndarray, palette: Mapping[int, Color]) -> np.ndarray:
    """Fill and outline: (H, W, 3) uint8, (H, W) ids -> (H, W, 3) uint8."""
    if not palette:
        return pixels
    ids = np.array(sorted(palette))
    position = np.minimum(np.searchsorted(ids, segmentation), len(ids) - 1)  # (H, W)
    index = np.where(ids[position] == segmentation, position + 1, 0).astype(np.int32)  # 0 = undrawn
    table = np.array([(0, 0, 0)] + [palette[int(segment_id)] for segment_id in ids], dtype=np.uint16)
    drawn = index > 0
    picture = pixels.copy()
    # In percent and 16 bits: 25,500 fits, and a phone's photo does not turn into a gigabyte of floats.
    picture[drawn] = (
        pixels[drawn] * np.uint16(100 - _FILL_PERCENT) + table[index[drawn]] * np.uint16(_FILL_PERCENT)
    ) // 100
    edge = _edges(index, width=max(1, round(min(index.shape) / 300))) & drawn
    picture[edge] = table[index[edge]] * np.uint16(3) // 4 + 63
    return picture


def _edges(index: np.ndarray, width: int) -> np.ndarray:
    """Return (H, W) bool, True on pixels within `width` of a pixel of another segment."""
    edge = np.zeros(index.shape, dtype=bool)
    for step in range(1, width + 1):
        for axis in (0, 1):
            ahead = np.moveaxis(index, axis, 0)
            marked = np.moveaxis(edge, axis, 0)  # a view: writing to it marks `edge`
            differs = ahead[step:] != ahead[:-step]
            marked[step:] |= differs
            marked[:-step] |= differs
    return edge


def _write_labels(
    picture: Image.Image, segmentation: np.ndarray, texts: Mapping[int, str], palette: Mapping[int, Color]
) -> Image.Image:
    """Label segments from the largest to the smallest, each inside its own where possible and clear of the others."""
    height, width = segmentation.shape
    stride = max(1, -(-max(height, width) // _MAX_PLACEMENT_SIDE))
    coarse = segmentation[stride // 2 :: stride, stride // 2 :: stride]
    taken = np.zeros(coarse.shape, dtype=bool)
    draw = ImageDraw.Draw(picture, "RGBA")
    areas = dict(zip(*(values.tolist() for values in np.unique(coarse, return_counts=True)), strict=True))
    normal = max(9, round(min(height, width) / 30))
    small = max(9, round(normal * 0.75))
    for segment_id in sorted(areas.keys() & texts.keys(), key=lambda segment_id: -areas[segment_id]):
        mask = coarse == segment_id
        label = _Label(texts[segment_id], normal, stride)
        spot, cover = _find_spot(mask, taken, *label.cells)
        if cover < _COMFORTABLE_COVER:
            label = _Label(texts[segment_id], small, stride)
            spot, cover = _find_spot(mask, taken, *label.cells)
        if cover == 0:
            continue
        taken[spot[0] : spot[0] + label.cells[0], spot[1] : spot[1] + label.cells[1]] = True
        top = min(spot[0] * stride + label.padding, height - label.height)
        left = min(spot[1] * stride + label.padding, width - label.width)
        label.draw(draw, left, top, background=_darken(palette[segment_id]))
    return picture


class _Label:
    """A text in a box: its size in pixels (`height`, `width`) and, with a margin, in cells of the placement map."""

    def __init__(self, text: str, font_size: int, stride: int):
        self.text = text
        self.font = ImageFont.load_default(font_size)
        self.padding = max(1, font_size // 5)
        text_box = self.font.getbbox(text)
        line_box = self.font.getbbox("bg")  # one height for all texts, with or without ascenders
        self.left, self.top = text_box[0], line_box[1]
        self.height = int(line_box[3] - self.top) + 2 * self.padding
        self.width = int(text_box[2] - self.left) + 2 * self.padding
        self.cells = (-(-(self.height + 2 * self.padding) // stride), -(-(self.width + 2 * self.padding) // stride))

    def draw(self, draw: ImageDraw.ImageDraw, left: int, top: int, background: Color) -> None:
        box = (left, top, left + self.width - 1, top + self.height - 1)
        draw.rounded_rectangle(box, radius=self.padding, fill=(*background, 205))
        position = (left + self.padding - self.left, top + self.padding - self.top)
        draw.text(position, self.text, fill="white", font=self.font)


def _find_spot(mask: np.ndarray, taken: np.ndarray, height: int, width: int) -> tuple[tuple[int, int], float]:
    """Return the top left corner of the free (height, width) box that is most inside `mask`, preferably near its
    centre, and the share of that box inside `mask`: 0 where there is no such box.
    """
    if height > mask.shape[0] or width > mask.shape[1]:
        return (0, 0), 0.0
    inside = _box_means(mask, height, width)  # (H - height + 1, W - width + 1)
    inside[_box_means(taken, height, width) > 0] = 0
    rows, columns = np.nonzero(mask)
    row_distance = np.arange(inside.shape[0])[:, None] + height / 2 - rows.mean()
    column_distance = np.arange(inside.shape[1])[None, :] + width / 2 - columns.mean()
    distance = np.hypot(row_distance, column_distance) / np.hypot(*mask.shape)
    row, column = np.unravel_index(np.argmax(np.where(inside > 0, inside - 0.1 * distance, -1)), inside.shape)
    return (int(row), int(column)), float(inside[row, column])


def _box_means(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the mean of each (height, width) window, from a summed-area table: (H - height + 1, W - width + 1)."""
    table = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    table[1:, 1:] = mask.cumsum(axis=0).cumsum(axis=1)
    sums = table[height:, width:] - table[:-height, width:] - table[height:, :-width] + table[:-height, :-width]
    return sums / (height * width)
