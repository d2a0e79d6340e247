"""The model that a run starts from, with the data's classes, and its processor."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from torch import nn

from ..hub.families import VIDEOS
from ..inference.loading import checkpoint_family
from ..model.modeling import Mask2FormerForUniversalSegmentation
from ..model.modeling_video import Mask2FormerForVideoSegmentation
from ..processing.image_processor import M2FImageProcessor
from ..processing.video_processor import Mask2FormerVideoProcessor
from .arguments import FinetuningArguments
from .classes import class_names, set_classes
from .plan import Data, choose_recipe, to_size


SMALL_BATCH = 8
"""Images per process below which statistics of batch norms are too rough to learn with."""
FIELDS = ("num_queries", "train_num_points")
"""Of the model's configuration, that options change."""


class Start(NamedTuple):
    """A model and its processor, and in words where they come from."""

    model: Any
    processor: Any
    note: str


def load_start(args: FinetuningArguments, data: Data) -> Start:
    """Return model and processor for the data, from a checkpoint or new.

    Raises:
        ValueError, OSError: there is no such model, or it does not fit the data.
    """
    set_seed(args.seed)
    name = args.start_model(data.task)
    model_class: Any = Mask2FormerForVideoSegmentation if data.is_video else Mask2FormerForUniversalSegmentation
    processor_class: Any = Mask2FormerVideoProcessor if data.is_video else M2FImageProcessor
    if name is None:
        model, note = _build_new(args, data.categories, model_class)
        processor = processor_class(size=to_size(*choose_recipe(args, data)[0].evaluation_size))
    else:
        model = model_class.from_pretrained(name, dtype=torch.float32, **args.given(*FIELDS))
        if args.eval_only and class_names(model.config) != [category["name"] for category in data.categories]:
            raise ValueError(
                f"The {model.config.num_labels} classes of {name} are not the data's {len(data.categories)}, in the "
                "same order: m2f evaluate finds them by name."
            )
        note = f"{name}: {set_classes(model, data.categories)}"
        if args.model is None:
            note += (
                "\nno --model was given: the bundled one knows generated shapes only. For photos start from, for "
                "example, --model facebook/mask2former-swin-tiny-coco-panoptic"
            )
        processor = processor_class.from_pretrained(name)
        if data.is_video and checkpoint_family(name) is not VIDEOS:
            processor.max_detections = Mask2FormerVideoProcessor().max_detections  # image models have more
        if args.input_size is not None:
            processor.size = to_size(args.input_size)
    if args.no_object_weight is not None:
        model.config.no_object_weight = args.no_object_weight
        model.criterion.empty_weight[-1] = args.no_object_weight
    if not args.eval_only:
        set_task(processor, data)
    return Start(model, processor, note)


def set_task(processor: Any, data: Any) -> None:
    """Give a processor the task of a data set (`task`, `categories`), and which labels to fuse."""
    processor.task = "instance" if data.task == "video" else data.task
    stuff = [category["id"] for category in data.categories if category["isthing"] in (False, 0)]
    processor.label_ids_to_fuse = stuff if data.task == "panoptic" else None


def _build_new(args: FinetuningArguments, categories: Sequence[Mapping[str, Any]], model_class: Any) -> tuple[Any, str]:
    """Return a model with new decoders, and how it was made."""
    labels = {category["id"]: category["name"] for category in categories}
    fields: dict[str, Any] = {"id2label": labels, "label2id": {name: label for label, name in labels.items()}}
    colors = [category.get("color") for category in categories]
    if all(colors):
        fields["label_colors"] = [list(color) for color in colors if color]
    fields |= args.given(*FIELDS)
    if args.config is None:
        return model_class.from_backbone(args.backbone, **fields), f"backbone {args.backbone}"
    settings = json.loads(args.config.read_text(encoding="utf-8")) | fields
    model = model_class(model_class.config_class(**settings))
    if args.backbone is None:
        return model, f"from scratch, {args.config}"
    backbone = model.model.pixel_level_module.encoder
    # A deeper backbone is fine, too: blocks that the configuration has no place for are left out.
    pretrained = type(backbone).from_pretrained(args.backbone, config=backbone.config)
    backbone.load_state_dict(pretrained.state_dict())
    return model, f"{args.config}, backbone {args.backbone}"


def prepare_for_training(model: Any, args: FinetuningArguments, data: Data) -> list[str]:
    """Freeze and wrap what the options say; return what else was done, and warnings."""
    encoder = model.model.pixel_level_module.encoder
    notes = []
    if data.most_segments > model.config.num_queries:
        notes.append(
            f"warning: there are images with {data.most_segments} segments, but only {model.config.num_queries} "
            f"queries to find them with: --num_queries {2 * data.most_segments} gives the model more, which are new"
        )
    if has_batch_norm(encoder) and not model.config.freeze_backbone_norm:
        few = f"{args.batch_size} images per process are too few for the statistics of the backbone's batch norms"
        is_pretrained = args.backbone is not None or not args.is_new
        if args.freeze_backbone or (args.batch_size < SMALL_BATCH and is_pretrained):
            model.config.freeze_backbone_norm = True
            notes.append("batch norms frozen" if args.freeze_backbone else f"batch norms frozen: {few}")
        elif args.batch_size < SMALL_BATCH:
            notes.append(f"warning: {few}, which must be learnt: raise --batch_size to {SMALL_BATCH}")
    model.train()
    if args.freeze_backbone:
        encoder.requires_grad_(False)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if args.compile:
        model.model.compile()  # the loss, which matches on the CPU, stays as it is
    return notes


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether some batch norm of the model would learn, or count, in training."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
