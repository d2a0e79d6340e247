"""Images and label maps to the model's frame, and the model's outputs back to segments in the image's own frame.

Pixels are treated as the original code treats them: Pillow's bilinear resizing on 8 bits with the aspect ratio kept,
normalisation, and only then padding with zeros at the bottom and right to a multiple of 32. Built on Pillow and NumPy.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    load_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .post_processing import (
    post_process_instance_segmentation,
    post_process_panoptic_segmentation,
    post_process_semantic_segmentation,
)
from .segment_ids import rgb_to_id
from .stock_checkpoints import add_known_settings, checkpoint_name, read_labels, translate_settings


Task = Literal["panoptic", "instance", "semantic"]
Size = tuple[int, int]

TASKS = ("panoptic", "instance", "semantic")
CHANNEL_ORDERS = ("RGB", "BGR")


# --- images in ---


def open_image(path: str | Path) -> Image.Image:
    """Opens and decodes an image file; pixels as stored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what is there is no image that Pillow can decode to the end.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no image file {path}")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} cannot be read as an image ({error}): the file is damaged, incomplete or of a format that Pillow "
            "does not know; save it again as PNG or JPEG"
        ) from error


def _fetch_image(address: str) -> Image.Image:
    try:
        return load_image(address)
    except Exception as error:  # of the network, of its client, of Pillow
        raise ValueError(
            f"no image could be had from {address[:100]} ({error}): download it and pass its path"
        ) from error


def _to_array(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode, (H, W, 3) uint8 or (H, W) of the mode's own type where that is wider than 8 bits."""
    is_png = image.format == "PNG"  # a copy no longer knows
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" and is_png:
        return np.asarray(image).astype(np.uint16)  # older versions of Pillow read 16 bits of grey as 32
    if image.mode.startswith("I") or image.mode == "F":
        return np.asarray(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB Pillow warns of the transparency that is lost
    return np.asarray(image.convert("RGB"))


def _to_channels_first(array: np.ndarray, prefers_channels_first: bool, data_format: str | None) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels -> (3, H, W); alpha is left out, grey is repeated."""
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3:
        fits = {"channels_first": array.shape[0] in (1, 3, 4), "channels_last": array.shape[2] in (1, 3, 4)}
        if data_format is None:
            order = list(fits) if prefers_channels_first else list(fits)[::-1]
            data_format = next((candidate for candidate in order if fits[candidate]), None)
        if data_format is None or not fits[data_format]:
            raise ValueError(f"an image of shape {array.shape} has no axis of 1, 3 or 4 channels")
        array = array if data_format == "channels_first" else np.moveaxis(array, -1, 0)
    else:
        raise ValueError(f"an image has 2 or 3 dimensions, not {array.ndim} (shape {array.shape})")
    if 0 in array.shape:
        raise ValueError(f"an image of shape {array.shape} has no pixels")
    return np.repeat(array, 3, axis=0) if array.shape[0] == 1 else array[:3]


def _to_known_range(array: np.ndarray) -> np.ndarray:
    """uint8 of 0 to 255 from any whole numbers; float32 from fractions, whose range stays as it is.

    uint16 is 16 bits however dark it is. Other whole numbers do not say: they are 8 bits unless any is above 255.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 65535:
            raise ValueError(f"pixels from {low} to {high}: whole numbers must be 0 to 255, or 0 to 65535 for 16 bits")
        is_16_bit = (array.dtype.kind, array.dtype.itemsize) == ("u", 2) or high > 255
        return np.rint(array / 257).astype(np.uint8) if is_16_bit else array.astype(np.uint8)
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ValueError("the image has NaN or infinite pixels; replace them, for example by np.nan_to_num")
        return array.astype(np.float32)
    raise ValueError(f"an image of {array.dtype} has no pixel values: pass uint8, another whole-number type or a float")


def _scale_to_255(image: np.ndarray) -> int:
    """What to multiply an image with to have 0 to 255: 255 for fractions from 0 to 1, otherwise 1.

    Raises:
        ValueError: fractions outside of 0 to 255.
    """
    if image.dtype == np.uint8:
        return 1
    low, high, tolerance = float(image.min()), float(image.max()), 1e-3
    if low < -tolerance or high > 255 + tolerance:
        raise ValueError(
            f"pixels from {low:g} to {high:g}: fractions must be 0 to 1 or 0 to 255. Pass the image before it is "
            "normalised; or, to have it only padded, set do_resize, do_rescale and do_normalize to False"
        )
    return 255 if high <= 1 + tolerance else 1


def get_resized_size(image_size: Size, size: SizeDict) -> Size:
    """Height and width after resizing, rounded half up.

    With a `shortest_edge` the aspect ratio is kept: the shorter side has that length unless the longer one would exceed
    `longest_edge` (which may be missing), which then is the longer one's length. `height` and `width` stretch.

    Raises:
        ValueError: for other keys, and where the shorter side would be left without a pixel.
    """
    if size.height and size.width:
        return size.height, size.width
    if not size.shortest_edge:
        raise ValueError(f"size needs `shortest_edge` (and `longest_edge`), or `height` and `width`; got {dict(size)}")
    height, width = image_size
    scale = size.shortest_edge / min(height, width)
    # In two steps, as the original does: the rounding of the products decides where a side ends in one half.
    new_height, new_width = (
        (size.shortest_edge, scale * width) if height < width else (scale * height, size.shortest_edge)
    )
    longest = max(new_height, new_width)
    if size.longest_edge and longest > size.longest_edge:
        shrink = size.longest_edge / longest
        new_height, new_width = new_height * shrink, new_width * shrink
    rounded = int(new_height + 0.5), int(new_width + 0.5)
    if min(rounded) < 1:
        raise ValueError(
            f"an image of {height}x{width} pixels is too elongated: at a longest edge of {size.longest_edge} the other "
            "would have none left. Crop it, or give a larger `longest_edge` in `size`"
        )
    return rounded


# --- label maps in ---


def read_label_map(label_map: Any) -> tuple[np.ndarray, bool]:
    """A label map of any kind to (H, W) whole numbers, and whether it was colour-coded.

    Args:
        label_map: path, Pillow image (a palette image's indices are its labels), array or tensor, (H, W), (1, H, W) or
            (H, W, 1), of whole numbers; or RGB, (H, W, 3), where a segment's id is R + 256 G + 65536 B.

    Raises:
        ValueError: other shapes and fractions.
    """
    if isinstance(label_map, str | Path):
        label_map = open_image(label_map)
    if isinstance(label_map, Image.Image):
        if label_map.mode not in ("1", "L", "P", "I", "RGB", "RGBA") and not label_map.mode.startswith("I;16"):
            raise ValueError(f"a label map of Pillow mode {label_map.mode}: save it as L, P, I or RGB")
        label_map = ImageOps.exif_transpose(label_map)
    array = label_map.detach().cpu().numpy() if isinstance(label_map, torch.Tensor) else np.asarray(label_map)
    if array.dtype.kind == "f" and (array == np.rint(array)).all():
        array = array.astype(np.int64)
    if array.dtype.kind not in "iub":
        raise ValueError(f"a label map holds whole numbers, not {array.dtype} with fractions, NaN or other values")
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[-1]):
        array = array.squeeze(0 if array.shape[0] == 1 else -1)
    if array.ndim == 2:
        return array.astype(np.int64), False
    if array.ndim == 3 and array.shape[-1] not in (3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] in (3, 4):
        return rgb_to_id(array[..., :3]).astype(np.int64), True
    raise ValueError(f"a label map has the shape (H, W), or (H, W, 3) for ids as colours; got {array.shape}")


def resize_labels(labels: np.ndarray, size: Size) -> np.ndarray:
    """(..., H, W) -> (..., *size) by nearest neighbour, any dtype; it reads the pixels that Pillow's reads."""
    rows, columns = (
        np.asarray(Image.fromarray(np.arange(old, dtype=np.int32)[None]).resize((new, 1), Image.Resampling.NEAREST))[0]
        for old, new in zip(labels.shape[-2:], size, strict=True)
    )
    return labels[..., rows[:, None], columns]


def _classes_of_segments(segments_info: Sequence[Mapping[str, Any]]) -> dict[int, int | None]:
    """Segment id -> class; None for crowds, which are left out.

    Raises:
        ValueError: an entry without id or class, a class that is no whole number from 0, an id given twice.
    """
    classes: dict[int, int | None] = {}
    for segment in segments_info:
        label = segment.get("category_id", segment.get("label_id"))
        if "id" not in segment or label is None:
            raise ValueError(
                f"segments_info needs `id` and `category_id` (or `label_id`) in every entry; got {segment}"
            )
        if isinstance(label, bool) or not isinstance(label, int | np.integer) or label < 0:
            raise ValueError(f"unknown class {label!r} of segment {segment['id']}: classes are whole numbers from 0")
        if int(segment["id"]) in classes:
            raise ValueError(f"segments_info has the id {segment['id']} twice")
        classes[int(segment["id"])] = None if segment.get("iscrowd") else int(label)
    return classes


def convert_label_map_to_masks(
    label_map: np.ndarray,
    class_of_id: Mapping[int, int | None] | None = None,
    *,
    ignore_index: int | None = 255,
    do_reduce_labels: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """One boolean mask and one class for each segment of a label map, by rising id.

    Args:
        label_map: (H, W) whole numbers: classes, or segment ids if `class_of_id` is given.
        class_of_id: segment id -> class; None leaves the segment out. The ids 0 and `ignore_index` need not be in it:
            they are void then.
        ignore_index: the class that is no class; its pixels are in no mask.
        do_reduce_labels: classes count from 1 and 0 is none: 1 becomes 0, and 0 is ignored; `ignore_index` stays so.

    Returns:
        Masks (N, H, W) bool and classes (N,) int64.

    Raises:
        ValueError: an id that is not in `class_of_id`; a negative class.
    """
    ids = np.unique(label_map).tolist()
    if class_of_id is None:
        class_of_id = {label: label for label in ids}
    unlisted = [i for i in ids if i not in class_of_id and i not in (0, ignore_index)]
    if unlisted:
        raise ValueError(
            f"the label map has segment ids without a class: {unlisted[:5]}{' and more' if len(unlisted) > 5 else ''}. "
            "List them in segments_info or instance_id_to_semantic_id, or set their pixels to 0"
        )
    segments: dict[int, int] = {}
    for segment_id in ids:
        label = class_of_id.get(segment_id)
        if label is None or label == ignore_index or (do_reduce_labels and label == 0):
            continue
        segments[segment_id] = label - 1 if do_reduce_labels else label
    kept = np.array(list(segments), dtype=label_map.dtype)
    masks = label_map[None] == kept[:, None, None]  # (1, H, W) == (N, 1, 1) -> (N, H, W)
    return masks, np.array(list(segments.values()), dtype=np.int64)


def _check_classes(classes: np.ndarray, num_labels: int | None) -> None:
    outside = classes[(classes < 0) | (classes >= (math.inf if num_labels is None else num_labels))]
    if len(outside):
        allowed = "at least 0" if num_labels is None else f"0 to {num_labels - 1}"
        raise ValueError(
            f"class {outside[0]} is out of range, classes are {allowed}: map the labels to the model's own, set "
            "`ignore_index` to the value of pixels without a class, or `do_reduce_labels` where 0 is such a value"
        )


# --- batches of arguments ---


class _Labels(NamedTuple):
    """One image's labels at its own size: a label map, or masks (N, H, W) with their classes."""

    array: np.ndarray
    class_of_id: Mapping[int, int | None] | None = None
    classes: np.ndarray | None = None


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | torch.Tensor)


def _to_list(images: Any) -> list[Any]:
    """One image, a list of images or a (B, ...) array of four dimensions, to a list of images."""
    if isinstance(images, list | tuple) or (_is_array(images) and images.ndim == 4):
        images = list(images)
        if not images:
            raise ValueError("there are no images: the list is empty")
        return images
    return [images]


def _ndim(value: Any) -> int:
    """Dimensions of an array, of nested lists, or of arrays in lists."""
    if isinstance(value, list | tuple):
        return 1 + (_ndim(value[0]) if len(value) else 0)
    return getattr(value, "ndim", 0)


def _per_image(values: Any, num_images: int, name: str, ndim: int | None = None) -> list[Any]:
    """`values`, one for each image. A single value may come without a list around it if there is one image.

    `ndim` is that of one image's value where this may be a list itself.
    """
    is_batch = isinstance(values, list | tuple) or (_is_array(values) and num_images > 1)
    if num_images == 1 and _ndim(values) == ndim:
        is_batch = False
    values = list(values) if is_batch else [values]
    if len(values) != num_images:
        raise ValueError(f"{len(values)} {name} for {num_images} images: pass one for each image")
    return values


def _to_label_list(
    num_images: int,
    segmentation_maps: Any,
    instance_id_to_semantic_id: Any,
    segments_info: Any,
    mask_labels: Any,
    class_labels: Any,
) -> list[_Labels] | None:
    if segmentation_maps is None and mask_labels is None:
        if any(value is not None for value in (instance_id_to_semantic_id, segments_info, class_labels)):
            raise ValueError("classes without masks: pass segmentation_maps or mask_labels with them")
        return None
    if segmentation_maps is None:
        if class_labels is None:
            raise ValueError("mask_labels without class_labels: pass one class for each mask")
        masks = _per_image(mask_labels, num_images, "mask_labels", ndim=3)
        classes = _per_image(class_labels, num_images, "class_labels", ndim=1)
        return [_read_masks(*of_image) for of_image in zip(masks, classes, strict=True)]
    if mask_labels is not None or class_labels is not None:
        raise ValueError("pass segmentation_maps, or mask_labels and class_labels, not both")
    maps = _per_image(segmentation_maps, num_images, "segmentation maps")
    return [
        _read_labels(*of_image)
        for of_image in zip(
            maps, _classes_per_image(instance_id_to_semantic_id, segments_info, num_images), strict=True
        )
    ]


def _classes_per_image(
    instance_id_to_semantic_id: Any, segments_info: Any, num_images: int
) -> list[Mapping[int, int | None] | None]:
    if instance_id_to_semantic_id is not None and segments_info is not None:
        raise ValueError("pass instance_id_to_semantic_id or segments_info, not both")
    if isinstance(instance_id_to_semantic_id, Mapping):
        return [instance_id_to_semantic_id] * num_images
    if instance_id_to_semantic_id is not None:
        return _per_image(instance_id_to_semantic_id, num_images, "instance_id_to_semantic_id")
    if segments_info is None:
        return [None] * num_images
    if num_images == 1 and (len(segments_info) == 0 or isinstance(segments_info[0], Mapping)):
        segments_info = [segments_info]
    return [_classes_of_segments(of_image) for of_image in _per_image(segments_info, num_images, "segments_info")]


def _read_labels(label_map: Any, class_of_id: Mapping[int, int | None] | None) -> _Labels:
    array, is_colour_coded = read_label_map(label_map)
    if is_colour_coded and class_of_id is None:
        raise ValueError(
            "a label map in RGB holds segment ids: pass their classes as segments_info or instance_id_to_semantic_id; "
            "or, if it holds classes, pass it with one channel"
        )
    return _Labels(array, class_of_id)


def _read_masks(masks: Any, classes: Any) -> _Labels:
    """(N, H, W) of any number type, above 0 inside, and (N,) whole numbers."""
    masks, classes = (
        value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        for value in (masks, classes)
    )
    if masks.ndim != 3 or classes.shape != masks.shape[:1]:
        raise ValueError(
            f"mask_labels (N, H, W) and class_labels (N,) do not fit: got {masks.shape} and {classes.shape}"
        )
    if classes.size and classes.dtype.kind not in "iu":
        raise ValueError(f"class_labels must be whole numbers, not {classes.dtype}")
    return _Labels(masks > 0, classes=classes.astype(np.int64))


def _to_targets(
    labels: _Labels,
    image_size: Size,
    new_size: Size,
    *,
    ignore_index: int | None,
    do_reduce_labels: bool,
    num_labels: int | None,
    **kwargs: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Masks (N, *new_size) bool and classes (N,) int64."""
    if labels.array.shape[-2:] != tuple(image_size):
        raise ValueError(
            f"the label map has {labels.array.shape[-2]}x{labels.array.shape[-1]} pixels, the image "
            f"{image_size[0]}x{image_size[1]} (upright, after its EXIF orientation): resize the map with nearest "
            "neighbour, or check that the two belong together"
        )
    resized = resize_labels(labels.array, new_size)
    if labels.classes is None:
        masks, classes = convert_label_map_to_masks(
            resized, labels.class_of_id, ignore_index=ignore_index, do_reduce_labels=do_reduce_labels
        )
    else:
        masks, classes = resized, labels.classes
    _check_classes(classes, num_labels)
    return masks, classes


def _pad_to(array: np.ndarray, size: Size | None, value: int) -> np.ndarray:
    """(..., H, W) -> (..., *size)."""
    if size is None or array.shape[-2:] == tuple(size):
        return array
    bottom, right = size[0] - array.shape[-2], size[1] - array.shape[-1]
    if bottom < 0 or right < 0:
        raise ValueError(
            f"an image of {array.shape[-2]}x{array.shape[-1]} does not fit into {size[0]}x{size[1]}: give a larger "
            "`pad_size`, or a smaller `size`"
        )
    widths = [(0, 0)] * (array.ndim - 2) + [(0, bottom), (0, right)]
    return np.pad(array, widths, constant_values=value)


@contextmanager
def _naming_the_image(index: int, num_images: int) -> Iterator[None]:
    """Says in the error which image of a batch it is about."""
    try:
        yield
    except ValueError as error:
        if num_images == 1:
            raise
        raise ValueError(f"image {index} of the batch: {error}") from error


# --- the processor ---


class M2FImageProcessorKwargs(ImagesKwargs, total=False):
    """
    ignore_index (`int`, *optional*, defaults to 255):
        The label of pixels without a class.
    do_reduce_labels (`bool`, *optional*, defaults to `False`):
        Whether 0 stands for no class in label maps and classes count from 1.
    num_labels (`int`, *optional*):
        The number of classes; labels are checked against it.
    size_divisor (`int`, *optional*, defaults to 32):
        Images are padded to a multiple of it.
    channel_order (`str`, *optional*, defaults to `"RGB"`):
        `"RGB"` or `"BGR"`, the order the model was trained with.
    """

    ignore_index: int | None
    do_reduce_labels: bool
    num_labels: int | None
    size_divisor: int
    channel_order: str


class M2FImageProcessor(PilBackend):
    """Prepares images and label maps for Mask2Former, and turns its outputs into segments.

    Args:
        task: "panoptic", "instance" or "semantic": what the checkpoint was trained for, and what `post_process` does.
        label_ids_to_fuse: the stuff classes: one segment each in a panoptic map, none in an instance result.
        threshold: class probability above which a query takes part in a panoptic map, 0 to 1.
        instance_threshold: least score of an instance, 0 to 1.
        mask_threshold: mask probability from which a pixel belongs to a mask, 0 to 1.
        overlap_mask_area_threshold: least part of its own mask that a panoptic segment must win, 0 to 1.
        max_detections: most instances in an image.
        semantic_resize_before_inference: resize masks to the target before classes are summed; None: for every task
            but "semantic", as the original.
        kwargs: `transformers`' settings, `do_resize`, `size`, `resample`, `do_rescale`, `rescale_factor`,
            `do_normalize`, `image_mean`, `image_std` (in `channel_order`, and of pixels times `rescale_factor`),
            `do_pad`, `pad_size`, and those of `M2FImageProcessorKwargs`.

    Raises:
        ValueError: a task, channel order or threshold that does not exist.
    """

    valid_kwargs = M2FImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012 (transformers declares it so)

    do_resize = True
    size: Any = {"shortest_edge": 800, "longest_edge": 1333}  # noqa: RUF012
    default_to_square = False
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_pad = True
    size_divisor = 32
    channel_order = "RGB"
    ignore_index = 255
    do_reduce_labels = False

    def __init__(
        self,
        *,
        task: Task = "panoptic",
        label_ids_to_fuse: Collection[int] | None = None,
        threshold: float = 0.8,
        instance_threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        max_detections: int = 100,
        semantic_resize_before_inference: bool | None = None,
        **kwargs: Unpack[M2FImageProcessorKwargs],
    ) -> None:
        super().__init__(**kwargs)  # type: ignore[misc]
        self.task = task
        self.label_ids_to_fuse = None if label_ids_to_fuse is None else sorted(int(i) for i in label_ids_to_fuse)
        self.threshold = threshold
        self.instance_threshold = instance_threshold
        self.mask_threshold = mask_threshold
        self.overlap_mask_area_threshold = overlap_mask_area_threshold
        self.max_detections = max_detections
        self.semantic_resize_before_inference = semantic_resize_before_inference
        self._validate_settings()

    def _validate_settings(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} does not exist; choose one of {', '.join(TASKS)}")
        for name in ("threshold", "instance_threshold", "mask_threshold", "overlap_mask_area_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is not a probability or ratio from 0 to 1")
        if self.max_detections < 1:
            raise ValueError(f"max_detections must be at least 1, not {self.max_detections}")
        self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self.valid_kwargs.__annotations__})

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:  # type: ignore[override]
        super()._validate_preprocess_kwargs(**kwargs)
        if kwargs["channel_order"] not in CHANNEL_ORDERS:
            raise ValueError(f"channel_order {kwargs['channel_order']!r} does not exist; choose RGB or BGR")
        if kwargs["size_divisor"] < 1:
            raise ValueError(f"size_divisor must be at least 1, not {kwargs['size_divisor']}")
        if kwargs["do_center_crop"]:
            raise ValueError("do_center_crop is not offered: crop images and label maps before they are processed")

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `transformers`; for its own Mask2Former image processor with what name and labels tell of the checkpoint.

        Those are the task, the stuff labels, the thresholds and, for released checkpoints, the size at which their
        figures were measured. What had to be assumed is warned of; arguments of `from_pretrained` come before all.
        """
        settings, unused = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        if settings.get("image_processor_type") == cls.__name__:
            return settings, unused
        labels = read_labels(pretrained_model_name_or_path, kwargs)
        name = checkpoint_name(pretrained_model_name_or_path)
        return add_known_settings(translate_settings(settings), labels, name, unused), unused

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `transformers`; also reads the settings of `transformers`' own Mask2Former image processor."""
        settings = dict(image_processor_dict)
        if settings.get("image_processor_type") != cls.__name__:
            settings = translate_settings(settings)
        for name in [name for name in kwargs if name in (cls.__init__.__kwdefaults__ or {})]:
            settings[name] = kwargs.pop(name)
        return super().from_dict(settings, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings as `save_pretrained` writes them, without `num_labels`."""
        settings = super().to_dict()
        settings.pop("num_labels", None)
        return settings

    # --- to the model's frame ---

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: Any = None,
        instance_id_to_semantic_id: list[dict[int, int]] | dict[int, int] | None = None,
        segments_info: list[Any] | None = None,
        mask_labels: Any = None,
        class_labels: Any = None,
        **kwargs: Unpack[M2FImageProcessorKwargs],
    ) -> BatchFeature:
        """Resizes, normalises and pads images, and their label maps with them.

        Args:
            images: one or a list of any sizes: path (str or Path), http(s) address, Pillow image of any mode, or array
                or tensor (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels in the order RGB; where the shape fits
                both, NumPy is read as (H, W, C) and torch as (C, H, W), unless `input_data_format` says. Whole numbers
                are 0 to 255, or 16 bits if they are uint16 or any is above 255; fractions are 0 to 1, or 0 to 255 if
                any is above 1. Alpha is left out. The EXIF orientation of files and Pillow images is applied: sizes and
                results are those of the upright image.
            segmentation_maps: one for each image, of the image's size, in any form that `read_label_map` reads:
                classes, or segment ids up to 2^24 if one of the next two is given.
            instance_id_to_semantic_id: segment id -> class; one for all images or one for each.
            segments_info: for each image a list of dicts with `id`, `category_id` or `label_id`, and maybe `iscrowd`
                (left out if 1), as in COCO's panoptic files.
            mask_labels: instead of maps, for each image (N, H, W) masks of the image's size, and
            class_labels: their classes (N,).
            kwargs: settings for this call only.

        Returns:
            `pixel_values` (B, 3, H, W) float32; `pixel_mask` (B, H, W) int64, 1 on the image and 0 on padding; and with
            labels `mask_labels`, a list of (N, H, W) bool, False on padding, and `class_labels`, a list of (N,) int64.
            Tensors with `return_tensors="pt"`, otherwise arrays.

        Raises:
            ValueError: what is not an image or not a label map, sizes that differ between the two, classes and ids that
                do not exist; each says what to do.
            FileNotFoundError: a path without a file.
        """
        return super().preprocess(
            images, segmentation_maps, instance_id_to_semantic_id, segments_info, mask_labels, class_labels, **kwargs
        )

    def _preprocess_image_like_inputs(  # type: ignore[override]
        self,
        images: Any,
        segmentation_maps: Any,
        instance_id_to_semantic_id: Any,
        segments_info: Any,
        mask_labels: Any,
        class_labels: Any,
        **kwargs: Any,
    ) -> BatchFeature:
        images = _to_list(images)
        labels = _to_label_list(
            len(images), segmentation_maps, instance_id_to_semantic_id, segments_info, mask_labels, class_labels
        )
        pixel_values, masks, classes = [], [], []
        for index, image in enumerate(images):
            with _naming_the_image(index, len(images)):
                array = self.process_image(image, input_data_format=kwargs["input_data_format"])
                pixel_values.append(self._to_pixel_values(array, **kwargs))
                if labels is not None:
                    targets = _to_targets(labels[index], array.shape[-2:], pixel_values[-1].shape[-2:], **kwargs)
                    masks.append(targets[0])
                    classes.append(targets[1])

        padded_size = self._get_padded_size(pixel_values, **kwargs) if kwargs["do_pad"] else None
        padded, pixel_masks, padded_masks = self.pad(pixel_values, padded_size, masks)
        return_tensors = kwargs["return_tensors"]
        batch = BatchFeature(data={"pixel_values": padded, "pixel_mask": pixel_masks}, tensor_type=return_tensors)
        if labels is not None:
            # Lists in any case: images have different numbers of targets.
            is_torch = return_tensors == "pt"
            batch["mask_labels"] = [torch.from_numpy(mask) if is_torch else mask for mask in padded_masks or []]
            batch["class_labels"] = [torch.from_numpy(label) if is_torch else label for label in classes]
        return batch

    def process_image(  # type: ignore[override]
        self, image: Any, input_data_format: str | ChannelDimension | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Any image that `preprocess` takes, to (3, H, W) RGB: uint8, or float32 in the range it came in."""
        if isinstance(image, str) and image.startswith(("http://", "https://", "data:image/")):
            image = _fetch_image(image)
        elif isinstance(image, str | Path):
            image = open_image(image)
        is_torch = isinstance(image, torch.Tensor)
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            array = (image.float() if image.is_floating_point() else image).numpy()
        elif isinstance(image, Image.Image):
            array = _to_array(image)
        elif isinstance(image, np.ndarray):
            array = image
        else:
            raise ValueError(
                f"{type(image).__name__} is not an image: pass a path, an address, a Pillow image, an array or a tensor"
            )
        data_format = None if input_data_format is None else ChannelDimension(input_data_format).value
        return _to_known_range(_to_channels_first(array, is_torch, data_format))

    def resize(  # type: ignore[override]
        self, image: np.ndarray, size: SizeDict, resample: PILImageResampling | None = None, **kwargs: Any
    ) -> np.ndarray:
        """(3, H, W) -> (3, new H, new W) by Pillow on 8 bits; size as `get_resized_size`, range and dtype as before."""
        height, width = get_resized_size((image.shape[-2], image.shape[-1]), size)
        scale = _scale_to_255(image)
        pixels = image if image.dtype == np.uint8 else np.rint(image * scale).clip(0, 255).astype(np.uint8)
        resized = Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1))).resize(
            (width, height), Image.Resampling.BILINEAR if resample is None else Image.Resampling(int(resample))
        )
        array = np.moveaxis(np.asarray(resized), -1, 0)
        return array if image.dtype == np.uint8 else array.astype(np.float32) / scale

    def _to_pixel_values(
        self,
        image: np.ndarray,
        *,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        channel_order: str,
        **kwargs: Any,
    ) -> np.ndarray:
        """(3, H, W) RGB -> (3, new H, new W) float32, in the model's channel order."""
        if not (do_resize or do_rescale or do_normalize):
            factor = 1.0
        else:
            scale = _scale_to_255(image)
            factor = rescale_factor * scale if do_rescale else 1.0
        if do_resize:
            image = self.resize(image, size, resample)
        if channel_order == "BGR":
            image = image[::-1]
        pixels = image.astype(np.float32)
        if not do_normalize:
            return pixels * np.float32(factor)
        # (x - 123.675) / 58.395 rather than (x / 255 - 0.485) / 0.229: the original's roundings.
        mean, std = (
            np.broadcast_to(np.asarray(value, dtype=np.float64) / factor, 3).astype(np.float32)[:, None, None]
            for value in (image_mean, image_std)
        )
        return (pixels - mean) / std

    @staticmethod
    def _get_padded_size(
        images: list[np.ndarray], *, size_divisor: int, pad_size: SizeDict | None, **kwargs: Any
    ) -> Size:
        heights, widths = zip(*(image.shape[-2:] for image in images), strict=True)
        height, width = max(heights), max(widths)
        if pad_size is not None:
            if not (pad_size.height and pad_size.width):
                raise ValueError(f"pad_size needs `height` and `width`; got {dict(pad_size)}")
            height, width = pad_size.height, pad_size.width
        return math.ceil(height / size_divisor) * size_divisor, math.ceil(width / size_divisor) * size_divisor

    def pad(  # type: ignore[override]
        self,
        images: list[np.ndarray],
        padded_size: Size | None,
        segmentation_maps: list[np.ndarray] | None = None,
        fill: int = 0,
        ignore_index: int = 255,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray] | None]:
        """Pads at the bottom and right.

        Args:
            images: (C, H, W) each.
            padded_size: height and width; None leaves every image at its own.
            segmentation_maps: (..., H, W) each; masks (bool) are padded with False, others with `ignore_index`.
            fill: value of the padding of images.
            ignore_index: value of the padding of label maps.

        Returns:
            The padded images, for each (height, width) int64 with 1 on the image and 0 on padding, the padded maps.

        Raises:
            ValueError: an image larger than `padded_size`.
        """
        padded_images, pixel_masks = [], []
        for image in images:
            pixel_mask = np.ones(image.shape[-2:], dtype=np.int64)
            padded_images.append(_pad_to(image, padded_size, fill))
            pixel_masks.append(_pad_to(pixel_mask, padded_size, 0))
        if segmentation_maps is None:
            return padded_images, pixel_masks, None
        padded_maps = [
            _pad_to(labels, padded_size, 0 if labels.dtype == np.bool_ else ignore_index)
            for labels in segmentation_maps
        ]
        return padded_images, pixel_masks, padded_maps

    # --- and back ---

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: list[Size] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> Any:
        """The class of every pixel, one (height, width) int64 map for each image.

        Args:
            outputs: the model's, of a batch.
            target_sizes: height and width of each image's result; by default the size it had before padding.
            return_segmentation_scores: return a `SemanticSegmentationPostProcessorOutput` for each image instead, with
                `segmentation` and `segmentation_scores` (num_labels, height, width).
        """
        resize_before_inference = self.semantic_resize_before_inference
        if resize_before_inference is None:
            resize_before_inference = self.task != "semantic"
        return post_process_semantic_segmentation(
            outputs, target_sizes, return_segmentation_scores, resize_before_inference=resize_before_inference
        )

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        target_sizes: list[Size] | torch.Tensor | None = None,
        return_coco_annotation: bool = False,
        return_binary_maps: bool = False,
    ) -> list[dict[str, Any]]:
        """Instances by falling score, each with its own mask; see `post_processing.instance_segmentation`.

        Args:
            outputs: the model's, of a batch.
            threshold: least score; None: the processor's `instance_threshold`.
            mask_threshold: None: the processor's.
            overlap_mask_area_threshold: has no effect, as instances may overlap; `transformers` has it here.
            target_sizes: height and width of each image's result; by default the size it had before padding.
            return_coco_annotation: `segmentation` is a list of COCO run-length encodings, one for each instance.
            return_binary_maps: `segmentation` is (N, height, width) bool.

        Returns:
            For each image `segmentation`, by default (height, width) int32 with ids from 0, -1 where there is none,
            and the better instance's id where they overlap; and `segments_info`.
        """
        return post_process_instance_segmentation(
            outputs,
            threshold=self.instance_threshold if threshold is None else threshold,
            mask_threshold=self.mask_threshold if mask_threshold is None else mask_threshold,
            target_sizes=target_sizes,
            return_coco_annotation=return_coco_annotation,
            return_binary_maps=return_binary_maps,
            max_detections=self.max_detections,
            label_ids_to_drop=self.label_ids_to_fuse,
        )

    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        label_ids_to_fuse: Collection[int] | None = None,
        target_sizes: list[Size] | torch.Tensor | None = None,
    ) -> list[dict[str, Any]]:
        """A map of things and stuff without overlaps; see `post_processing.panoptic_segmentation`.

        Args:
            outputs: the model's, of a batch.
            threshold: class probability that a query must exceed; None: the processor's.
            mask_threshold: None: the processor's.
            overlap_mask_area_threshold: None: the processor's.
            label_ids_to_fuse: the stuff classes; None: the processor's.
            target_sizes: height and width of each image's result; by default the size it had before padding.

        Returns:
            For each image `segmentation`, (height, width) int32 with ids from 1 and 0 for void; and `segments_info`.
        """
        return post_process_panoptic_segmentation(
            outputs,
            threshold=self.threshold if threshold is None else threshold,
            mask_threshold=self.mask_threshold if mask_threshold is None else mask_threshold,
            overlap_mask_area_threshold=(
                self.overlap_mask_area_threshold if overlap_mask_area_threshold is None else overlap_mask_area_threshold
            ),
            label_ids_to_fuse=self.label_ids_to_fuse if label_ids_to_fuse is None else label_ids_to_fuse,
            target_sizes=target_sizes,
        )

    def post_process(self, outputs: Any, task: Task | None = None, **kwargs: Any) -> Any:
        """The `post_process_*_segmentation` of a task, by default of the checkpoint's own; `kwargs` go to it.

        Raises:
            ValueError: a task that does not exist.
        """
        task = self.task if task is None else task
        if task not in TASKS:
            raise ValueError(f"task {task!r} does not exist; choose one of {', '.join(TASKS)}")
        return getattr(self, f"post_process_{task}_segmentation")(outputs, **kwargs)


# The name that `transformers` has for it. The class is named otherwise because `AutoImageProcessor` finds classes by
# name, and must go on finding `transformers`' own for `transformers`' own checkpoints.
Mask2FormerImageProcessor = M2FImageProcessor
