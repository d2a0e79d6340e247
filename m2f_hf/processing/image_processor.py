"""The image processor: images and label maps to the model's frame, outputs back to segments in the image's own.

Pixels are treated as the original code treats them: Pillow's bilinear resizing on 8 bits with the aspect ratio kept,
normalisation, and only then padding with zeros at the bottom and right to a multiple of 32.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from ..known.label_sets import TASKS
from ..known.stock_checkpoints import add_known_settings, checkpoint_name, read_labels, translate_settings
from .images import Size, list_of_images, pad_to, read_image, resize_image, scale_to_255
from .labels import labels_of_images, to_targets
from .post_processing import (
    check_max_detections,
    check_probabilities,
    instance_segmentation,
    panoptic_segmentation,
    semantic_segmentation,
    split_batch,
)


Task = Literal["panoptic", "instance", "semantic"]
CHANNEL_ORDERS = ("RGB", "BGR")
# This package's processors, of images and of clips, each of which reads the other's settings.
OWN_TYPES = ("M2FImageProcessor", "Mask2FormerVideoProcessor")


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
    """Prepare images and label maps for Mask2Former, and turn its outputs into segments.

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
    tasks: tuple[str, ...] = TASKS
    post_processing_name = "post_process_{}_segmentation"

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
        self.check_task(self.task)
        probabilities = ("threshold", "instance_threshold", "mask_threshold", "overlap_mask_area_threshold")
        check_probabilities(**{name: getattr(self, name) for name in probabilities})
        check_max_detections(self.max_detections)
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
        """Read the settings as `transformers` does; to those of its own Mask2Former, add what name and labels tell.

        Those are the task, the stuff labels, the thresholds and, for released checkpoints, the size at which their
        figures were measured. Assumptions are warned of; arguments of `from_pretrained` come before all.
        """
        settings, unused = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        if settings.get("image_processor_type") in OWN_TYPES:
            return settings, unused
        labels = read_labels(pretrained_model_name_or_path, kwargs)
        name = checkpoint_name(pretrained_model_name_or_path)
        return add_known_settings(translate_settings(settings), labels, name, unused), unused

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a processor from its settings, or from those of `transformers`' own Mask2Former image processor."""
        settings = dict(image_processor_dict)
        if settings.get("image_processor_type") not in OWN_TYPES:
            settings = translate_settings(settings)
        for name in [name for name in kwargs if name in (cls.__init__.__kwdefaults__ or {})]:
            settings[name] = kwargs.pop(name)
        return super().from_dict(settings, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as `save_pretrained` writes them, without `num_labels`."""
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
        """Resize, normalise and pad images, and their label maps with them.

        Args:
            images: one or a list of any sizes, each as `read_image` takes it: path, http(s) address, Pillow image,
                array or tensor, in the order RGB; `input_data_format` says where the channels are. Whole numbers are
                0 to 255, or 16 bits if they are uint16 or any is above 255; fractions are 0 to 1, or 0 to 255 if any
                is above 1. Alpha is left out. Sizes and results are those of the upright image (EXIF).
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
        images = list_of_images(images)
        labels = labels_of_images(
            len(images), segmentation_maps, instance_id_to_semantic_id, segments_info, mask_labels, class_labels
        )
        pixel_values, targets = [], []
        for index, image in enumerate(images):
            try:
                array = self.process_image(image, input_data_format=kwargs["input_data_format"])
                pixel_values.append(self._to_pixel_values(array, **kwargs))
                if labels is not None:
                    targets.append(to_targets(labels[index], array.shape[-2:], pixel_values[-1].shape[-2:], **kwargs))
            except ValueError as error:
                if len(images) == 1:
                    raise
                raise ValueError(f"image {index} of the batch: {error}") from error

        padded_size = self._get_padded_size(pixel_values, **kwargs) if kwargs["do_pad"] else None
        inputs = {
            "pixel_values": [pad_to(image, padded_size) for image in pixel_values],
            "pixel_mask": [pad_to(np.ones(image.shape[-2:], dtype=np.int64), padded_size) for image in pixel_values],
        }
        return_tensors = kwargs["return_tensors"]
        batch = BatchFeature(data=inputs, tensor_type=return_tensors)
        if labels is not None:
            # Lists in any case: images have different numbers of targets.
            to_returned = torch.from_numpy if return_tensors == "pt" else np.asarray
            batch["mask_labels"] = [to_returned(pad_to(masks, padded_size)) for masks, _ in targets]
            batch["class_labels"] = [to_returned(classes) for _, classes in targets]
        return batch

    def process_image(  # type: ignore[override]
        self, image: Any, input_data_format: str | ChannelDimension | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Read any image that `preprocess` takes as (3, H, W) RGB: uint8, or float32 in the range it came in."""
        return read_image(image, input_data_format)

    def resize(  # type: ignore[override]
        self, image: np.ndarray, size: SizeDict, resample: PILImageResampling | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Resize (3, H, W) by Pillow on 8 bits, to `get_resized_size`; range and dtype stay."""
        return resize_image(image, size, resample)

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
        scale = scale_to_255(image) if do_resize or do_rescale or do_normalize else 1  # checks the range
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

    # --- and back ---

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: list[Size] | torch.Tensor | None = None,
        return_segmentation_scores: bool = False,
    ) -> Any:
        """Classify every pixel; see `post_processing.semantic_segmentation`.

        Args:
            outputs: the model's, of a batch.
            target_sizes: height and width of each image's result; by default the size it had before padding.
            return_segmentation_scores: return a `SemanticSegmentationPostProcessorOutput` for each image instead, with
                `segmentation` and `segmentation_scores` (num_labels, height, width).

        Returns:
            For each image a (height, width) int64 map of class ids.
        """
        resize_first = self.semantic_resize_before_inference
        if resize_first is None:
            resize_first = self.task != "semantic"
        results = [
            semantic_segmentation(image, resize_before_inference=resize_first, return_scores=return_segmentation_scores)
            for image in split_batch(outputs, target_sizes)
        ]
        if not return_segmentation_scores:
            return [segmentation for segmentation, _ in results]
        return [
            SemanticSegmentationPostProcessorOutput(data={"segmentation": segmentation, "segmentation_scores": scores})
            for segmentation, scores in results
        ]

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
        """Find instances by falling score, each with its own mask; see `post_processing.instance_segmentation`.

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
        return [
            instance_segmentation(
                image,
                threshold=self.instance_threshold if threshold is None else threshold,
                mask_threshold=self.mask_threshold if mask_threshold is None else mask_threshold,
                max_detections=self.max_detections,
                label_ids_to_drop=self.label_ids_to_fuse or (),
                return_coco_annotation=return_coco_annotation,
                return_binary_maps=return_binary_maps,
            )
            for image in split_batch(outputs, target_sizes)
        ]

    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float | None = None,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        label_ids_to_fuse: Collection[int] | None = None,
        target_sizes: list[Size] | torch.Tensor | None = None,
    ) -> list[dict[str, Any]]:
        """Make a map of things and stuff without overlaps; see `post_processing.panoptic_segmentation`.

        Args:
            outputs: the model's, of a batch.
            threshold: class probability that a query must exceed; None: the processor's, as for the next three.
            mask_threshold: mask probability from which a pixel belongs to a mask.
            overlap_mask_area_threshold: least part of its own mask that a segment must win.
            label_ids_to_fuse: the stuff classes.
            target_sizes: height and width of each image's result; by default the size it had before padding.

        Returns:
            For each image `segmentation`, (height, width) int32 with ids from 1 and 0 for void; and `segments_info`.
        """
        settings = self._fill_in(
            threshold=threshold,
            mask_threshold=mask_threshold,
            overlap_mask_area_threshold=overlap_mask_area_threshold,
            label_ids_to_fuse=label_ids_to_fuse,
        )
        return [panoptic_segmentation(image, **settings) for image in split_batch(outputs, target_sizes)]

    def _fill_in(self, **settings: Any) -> dict[str, Any]:
        """Return the settings with the processor's own in place of None."""
        return {name: getattr(self, name) if value is None else value for name, value in settings.items()}

    def post_process(self, outputs: Any, task: Task | None = None, **kwargs: Any) -> Any:
        """Call the `post_process_*_segmentation` of one of `tasks`, by default the checkpoint's own, with `kwargs`.

        Raises:
            ValueError: a task that does not exist.
        """
        task = self.task if task is None else task
        self.check_task(task)
        return getattr(self, self.post_processing_name.format(task))(outputs, **kwargs)

    @classmethod
    def check_task(cls, task: str) -> None:
        """Raise a ValueError for a task that is not among `tasks`."""
        if task not in cls.tasks:
            raise ValueError(f"{cls.__name__} has no task {task!r}; choose one of {', '.join(cls.tasks)}")


# `transformers`' name for it. The class has another because `AutoImageProcessor` finds classes by name, and must go on
# finding `transformers`' own for `transformers`' own checkpoints.
Mask2FormerImageProcessor = M2FImageProcessor
