"""What `examples/finetune.py` is told, and what it chooses itself: options, data, model, and the plan of a run."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from transformers import PreTrainedConfig

from m2f_hf import (
    M2FImageProcessor,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerForVideoSegmentation,
    Mask2FormerVideoConfig,
    Mask2FormerVideoProcessor,
)
from m2f_hf.data import CATEGORIES, VIDEO_RECIPES, MovingShapesDataset, ShapesDataset, open_dataset
from m2f_hf.data.clips import FRAME_RANGE, NUM_FRAMES
from m2f_hf.data.hub_datasets import StreamingDataset
from m2f_hf.data.synthetic.shapes import TEST_SEED, VALIDATION_SEED
from m2f_hf.known.label_sets import LABEL_SETS, find_label_set
from m2f_hf.known.recipes import RECIPES, Recipe, SizeSchedule, default_recipe
from m2f_hf.metrics import MEASURES
from m2f_hf.training.checkpoints import has_batch_norm, set_classes
from m2f_hf.training.optimization import choose_num_steps, scale_learning_rate


KNOWN_RECIPE_IMAGES = 2000
"""Training images from which on the original's recipe for a known data set is taken: Cityscapes has 2,975."""
SMALL_BATCH = 8
"""Images per process below which statistics of batch norms are too rough to learn with."""
FIELDS = ("num_queries", "train_num_points")
"""Of the model's configuration, that options change."""
GENERATED = {"shapes": "panoptic", "moving_shapes": "video"}
"""Data sets that are drawn while they are read, and their tasks."""
NUM_STREAMED = 100
"""Images of a stream that are validated on."""


# --- options ---


def parse_arguments(arguments: list[str] | None, description: str | None) -> argparse.Namespace:
    """The options of `examples/finetune.py`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    generated = " or ".join(f'"{name}"' for name in GENERATED)
    data.add_argument("--dataset", required=True, help=f"folder, annotation file, name on the Hub, {generated}")
    data.add_argument("--task", choices=list(MEASURES), help="default: what the annotations are made for")
    data.add_argument("--validation", help="another folder or file to validate on")
    data.add_argument("--held_out", type=float, default=0.1, help="share to validate on, where there is no such split")
    data.add_argument("--labels", help=f"file with class names, or one of {', '.join(LABEL_SETS)}")
    data.add_argument("--streaming", action="store_true", help="read a Hub data set without downloading it first")
    data.add_argument("--image_size", type=int, default=160, help="side of generated scenes")
    data.add_argument("--eval_scenes", type=int, help="unseen scenes (200) or videos (60) of generated data")
    data.add_argument("--video_length", type=int, default=16, help="frames of generated videos")
    start = parser.add_argument_group("start")
    start.add_argument("--model", help="folder or Hub id of the model to start from")
    start.add_argument("--backbone", help="folder or Hub id of a backbone to start from, the rest being new")
    start.add_argument("--config", type=Path, help="JSON of `Mask2FormerConfig`, to start from scratch")
    start.add_argument("--num_queries", type=int, help="most segments found in an image; another number starts anew")
    start.add_argument("--train_num_points", type=int, help="at which masks are compared; small objects need more")
    start.add_argument("--freeze_backbone", action="store_true")
    samples = parser.add_argument_group("samples")
    recipes = ["default", "plain", "whole", *RECIPES, *VIDEO_RECIPES]
    samples.add_argument("--recipe", choices=recipes, help="default: by the data set")
    samples.add_argument("--input_size", type=int, help="shortest side that images are resized to (default: --model's)")
    samples.add_argument("--sizes", help='growing sizes of samples over training, such as "0:256,0.5:384,0.8:512"')
    samples.add_argument("--num_frames", type=int, default=NUM_FRAMES, help="of a video, that make a training clip")
    samples.add_argument(
        "--frame_range", type=int, default=FRAME_RANGE, help="how far from a random frame the others of a clip may be"
    )
    samples.add_argument("--inspect", type=int, default=0, metavar="N", help="draw samples of N images to samples.jpg")
    steps = parser.add_argument_group("steps (what is not given comes from the recipe, the batch and the data)")
    steps.add_argument("--steps", type=int)
    steps.add_argument("--batch_size", type=int, default=4, help="images or clips per process")
    steps.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches that make one step")
    steps.add_argument("--learning_rate", type=float)
    steps.add_argument("--backbone_multiplier", type=float, help="of the learning rate")
    steps.add_argument("--weight_decay", type=float)
    steps.add_argument("--max_grad_norm", type=float)
    steps.add_argument("--schedule", choices=["multistep", "poly", "cosine"])
    steps.add_argument("--warmup_steps", type=int)
    steps.add_argument("--no_object_weight", type=float, help="of the class loss, from here on (default: the model's)")
    steps.add_argument("--ema", type=float, metavar="DECAY", help="validate and keep averaged weights, such as 0.999")
    steps.add_argument("--seed", type=int, default=0)
    means = parser.add_argument_group("means")
    means.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: bf16 on GPUs that have it")
    means.add_argument("--gradient_checkpointing", action="store_true", help="less memory, a third more time")
    means.add_argument("--compile", action="store_true", help="torch.compile the model")
    means.add_argument("--num_workers", type=int, help="processes per process that make samples")
    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, required=True, help="folder of the run")
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output, if any")
    run.add_argument("--log_every", type=int, default=20)
    run.add_argument("--eval_every", type=int)
    run.add_argument("--save_every", type=int)
    run.add_argument("--report_to", choices=sorted(map(str, LOGGER_TYPE_TO_CLASS)), help="tracker beside the log")
    run.add_argument("--eval_only", action="store_true", help="measure --model on the validation data")
    run.add_argument("--choose_thresholds", action="store_true", help="choose --model's thresholds, save to --output")
    hub = parser.add_argument_group("Hub")
    hub.add_argument("--push_to_hub", action="store_true", help="publish what the run kept, with a model card")
    hub.add_argument("--hub_model_id", help="owner/name on the Hub (default: the name of --output, in your account)")
    hub.add_argument("--hub_private", action="store_true", help="make the repository a private one")
    hub.add_argument("--hub_license", help='of the weights, as the Hub names it: "apache-2.0", "cc-by-nc-4.0", …')
    args = parser.parse_args(arguments)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if (args.model is None) == (args.backbone is None and args.config is None):
        parser.error("give --model, or else --backbone or --config (or both of these)")
    if args.push_to_hub and (args.eval_only or args.choose_thresholds):
        parser.error("--push_to_hub is for training; `m2f push` sends a folder")
    if (args.eval_only or args.choose_thresholds) and args.model is None:
        parser.error("--eval_only and --choose_thresholds need --model")
    if args.dataset in GENERATED and args.seed in (VALIDATION_SEED, TEST_SEED):
        parser.error(f"--seed {args.seed} is that of the unseen scenes: take another")
    if args.config is not None and not args.config.is_file():
        parser.error(f"there is no file {args.config}")
    for name in (
        *FIELDS,
        "eval_scenes",
        "image_size",
        "video_length",
        "num_frames",
        "frame_range",
        "steps",
        "batch_size",
        "gradient_accumulation_steps",
        "log_every",
        "eval_every",
        "save_every",
    ):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is 1 or more")
    if args.learning_rate is not None and not 0 <= args.learning_rate < float("inf"):
        parser.error("--learning_rate is a number from 0 on")
    if args.report_to is not None and args.report_to not in map(str, get_available_trackers()):
        parser.error(f"--report_to {args.report_to}: it is not installed (pip install {args.report_to})")
    try:
        if args.sizes is not None:
            SizeSchedule.parse(args.sizes)
    except ValueError as error:
        parser.error(f"--sizes: {error}")


# --- data ---


class Data(NamedTuple):
    """What is trained and validated on; `name` and `hub_id` for the card, `report` for people; `most_segments` in one
    training image, as far as they were counted."""

    train: Any
    validation: Any
    categories: list[dict[str, Any]]
    task: str
    name: str
    report: str
    hub_id: str | None = None
    most_segments: int = 0


def open_data(args: argparse.Namespace, is_main_process: bool) -> Data:
    """The data set, checked by one process.

    Raises:
        ValueError, OSError, ImportError: it cannot be trained on as it is; every problem is named.
    """
    if args.dataset in GENERATED:
        return generated_data(args)
    found = open_dataset(
        args.dataset,
        task=args.task,
        labels=args.labels,
        validation=args.validation,
        held_out=args.held_out,
        streaming=args.streaming,
        max_opened=500 if is_main_process else 0,
    )
    validation = found.validation
    if isinstance(validation, StreamingDataset):
        validation = list(itertools.islice(validation, NUM_STREAMED))
    hub_id = None if Path(args.dataset).exists() else args.dataset
    name = hub_id or Path(args.dataset).resolve().name
    most_segments = found.report.splits[0].most_segments
    return Data(found.train, validation, found.categories, found.task, name, str(found.report), hub_id, most_segments)


def generated_data(args: argparse.Namespace) -> Data:
    """Scenes or videos without end; unseen ones of other seeds to validate on, and yet others for `--eval_only`."""
    task = GENERATED[args.dataset]
    if args.task not in (None, task):
        raise ValueError(f"Generated {args.dataset} are for --task {task}; write them to a folder for the others.")
    unseen_seed = TEST_SEED if args.eval_only else VALIDATION_SEED
    if task == "video":
        size = (args.video_length, args.image_size)
        unseen: Any = MovingShapesDataset(args.eval_scenes or 60, *size, seed=unseen_seed)
        videos = MovingShapesDataset(1_000_000, *size, seed=args.seed)
        return Data(videos, unseen, videos.categories, task, "moving shapes", "generated videos, without end")
    unseen = ShapesDataset(args.eval_scenes or 200, args.image_size, seed=unseen_seed)
    scenes = ShapesDataset(1_000_000, args.image_size, seed=args.seed)
    return Data(scenes, unseen, CATEGORIES, task, "generated shapes", "generated shapes, without end")


def num_images(data: Data) -> int | None:
    """Number of training images or videos; None where there is no end of them, or none that is known."""
    return None if isinstance(data.train, (StreamingDataset, ShapesDataset, MovingShapesDataset)) else len(data.train)


def frames_in_clip(args: argparse.Namespace, data: Data) -> int:
    """Frames of a training sample."""
    return args.num_frames if data.task == "video" else 1


# --- model ---


def classes_for(task: str) -> tuple[Any, Any]:
    """The model's class and the processor's for a task, "video" or one of images."""
    if task == "video":
        return Mask2FormerForVideoSegmentation, Mask2FormerVideoProcessor
    return Mask2FormerForUniversalSegmentation, M2FImageProcessor


def is_video_checkpoint(model: str) -> bool:
    """Whether a folder or Hub id is a model of clips already."""
    fields, _ = PreTrainedConfig.get_config_dict(model)
    return fields.get("model_type") == Mask2FormerVideoConfig.model_type


def build(args: argparse.Namespace, data: Data) -> tuple[Any, Any, str]:
    """Model and processor for the data: from `--model`, or new from `--backbone` and `--config`; and what was done.

    Raises:
        ValueError, OSError: there is no such model, or it does not do.
    """
    model_class, processor_class = classes_for(data.task)
    if args.model is not None:
        changed = changed_fields(args)
        model = model_class.from_pretrained(args.model, dtype=torch.float32, **changed)
        own = [name for _, name in sorted((int(label), name) for label, name in model.config.id2label.items())]
        if args.eval_only and own != [category["name"] for category in data.categories]:
            raise ValueError(
                f"The {len(own)} classes of {args.model} are not the data's {len(data.categories)}, in the same order: "
                "examples/evaluate.py finds them by name."
            )
        note = f"{args.model}: {set_classes(model, data.categories)}"
        processor = processor_class.from_pretrained(args.model)
        if data.task == "video" and not is_video_checkpoint(args.model):
            processor.max_detections = Mask2FormerVideoProcessor().max_detections  # images have more
        size = processor.size if args.input_size is None else to_size(args.input_size)
    else:
        model, note = build_new(args, data.categories, model_class)
        recipe = choose_recipe(args, data)[0]
        processor = processor_class(size=to_size(*recipe.evaluation_size))
        size = processor.size
    if args.no_object_weight is not None:
        model.config.no_object_weight = args.no_object_weight
        model.criterion.empty_weight[-1] = args.no_object_weight
    processor.size = size
    if not args.eval_only:
        processor.task = "instance" if data.task == "video" else data.task
        stuff = [category["id"] for category in data.categories if category["isthing"] in (False, 0)]
        processor.label_ids_to_fuse = stuff if data.task == "panoptic" else None
    return model, processor, note


def to_size(shortest: int, longest: int | None = None) -> dict[str, int]:
    return {"shortest_edge": shortest, "longest_edge": longest or 2 * shortest}


def changed_fields(args: argparse.Namespace) -> dict[str, int]:
    """Fields of the model's configuration that are to be others than the checkpoint's, or the file's."""
    given = {name: getattr(args, name) for name in FIELDS}
    return {name: value for name, value in given.items() if value is not None}


def build_new(args: argparse.Namespace, categories: Sequence[Mapping[str, Any]], model_class: Any) -> tuple[Any, str]:
    """A model whose decoders have learnt nothing yet."""
    labels = {category["id"]: category["name"] for category in categories}
    names: dict[str, Any] = {"id2label": labels, "label2id": {name: label for label, name in labels.items()}}
    colors = [category.get("color") for category in categories]
    if all(colors):
        names["label_colors"] = [list(color) for color in colors]
    names |= changed_fields(args)
    if args.config is None:
        return model_class.from_backbone(args.backbone, **names), f"backbone {args.backbone}"
    settings = json.loads(args.config.read_text(encoding="utf-8")) | names
    model = model_class(model_class.config_class(**settings))
    if args.backbone is None:
        return model, f"from scratch, {args.config}"
    backbone = model.model.pixel_level_module.encoder
    # A deeper backbone will do: blocks that the config has no place for are left behind.
    pretrained = type(backbone).from_pretrained(args.backbone, config=backbone.config)
    backbone.load_state_dict(pretrained.state_dict())
    return model, f"{args.config}, backbone {args.backbone}"


def prepare_for_training(model: Any, args: argparse.Namespace, data: Data) -> list[str]:
    """Freeze and wrap what is to be; what was done beyond what was asked for, and what may go wrong."""
    encoder = model.model.pixel_level_module.encoder
    notes = []
    most_segments = data.most_segments
    if most_segments > model.config.num_queries:
        notes.append(
            f"warning: there are images with {most_segments} segments, but only {model.config.num_queries} queries to "
            f"find them with: --num_queries {2 * most_segments} gives the model more, which start anew"
        )
    is_pretrained = args.model is not None or args.backbone is not None
    if has_batch_norm(encoder) and not model.config.freeze_backbone_norm:
        few = f"{args.batch_size} images per process are too few for the statistics of the backbone's batch norms"
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


# --- what is not given ---


@dataclass(frozen=True)
class Plan:
    """The settings of a run, given or chosen, and the reasons."""

    recipe: Recipe
    images_per_step: int
    steps: int
    learning_rate: float
    eval_every: int
    save_every: int
    num_workers: int
    is_video: bool
    lines: list[str]

    def settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """What decides most how a run goes: for the card and for trackers."""
        names = ("seed", "batch_size", "gradient_accumulation_steps", "sizes", "ema", "freeze_backbone")
        names += ("num_frames", "frame_range") if self.is_video else ()
        of_recipe = ("backbone_multiplier", "weight_decay", "max_grad_norm", "schedule", "warmup_steps", "crop_size")
        values = {"steps": self.steps, "images_per_step": self.images_per_step, "learning_rate": self.learning_rate}
        values |= {name: getattr(args, name) for name in names}
        values |= {name: value for name, value in asdict(self.recipe).items() if name in of_recipe}
        return as_settings(values)

    def everything(self, args: argparse.Namespace, data: Data) -> dict[str, Any]:
        """All that decides it, to be compared when a run goes on."""
        return {
            **as_settings(asdict(self.recipe)),
            **self.settings(args),
            "data": data.name,
            "images": num_images(data),
        }


def as_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are set, as numbers and words."""
    return {name: str(v) if isinstance(v, (tuple, list)) else v for name, v in values.items() if v is not None}


def choose_recipe(args: argparse.Namespace, data: Data, size: Mapping[str, Any] | None = None) -> tuple[Recipe, str]:
    """How images become samples, and why so; options override single settings.

    Args:
        size: at which a checkpoint looks at images; None for a new model.
    """
    known = find_label_set({category["id"]: category["name"] for category in data.categories}, data.name)
    name = f"{known.dataset}-{'instance' if data.task == 'video' else data.task}" if known is not None else ""
    recipes = RECIPES | VIDEO_RECIPES
    images = num_images(data) or 0
    if size is None:
        size = to_size(args.input_size or (args.image_size if args.dataset in GENERATED else 512))
    if args.recipe in recipes:
        recipe, reason = recipes[args.recipe], f"{args.recipe}, the original's"
    elif args.recipe is None and name in recipes and images >= KNOWN_RECIPE_IMAGES:
        recipe, reason = recipes[name], f"{name}, the original's for these classes"
    elif args.recipe == "plain" or (args.recipe is None and args.dataset in GENERATED):
        recipe, reason = plain_recipe(size), "plain: images at one size, mirrored or not"
    elif args.recipe == "whole":
        if args.sizes is not None:
            raise ValueError("--sizes are sizes of crops, and --recipe whole cuts none: leave out one of them.")
        recipe, reason = whole_recipe(size), "whole: images as at evaluation, neither cut nor mirrored"
    else:
        recipe, reason = (
            default_recipe(size),
            "default: images at half to double size, cropped, mirrored, colours varied",
        )
    given = {field: getattr(args, field) for field in asdict(recipe) if getattr(args, field, None) is not None}
    given.pop("steps", None)
    given.pop("batch_size", None)
    return replace(recipe, **given), reason


def plain_recipe(size: Mapping[str, Any]) -> Recipe:
    """Images at the size of evaluation, a square of their shorter side cut out, mirrored or not."""
    recipe = default_recipe(size)
    shortest = recipe.evaluation_size[0]
    return replace(recipe, shortest_edges=(shortest,), color_jitter=False, is_padded=False)


def whole_recipe(size: Mapping[str, Any]) -> Recipe:
    """Images exactly as at evaluation: to see whether a model can learn some images by heart."""
    recipe = plain_recipe(size)
    longest = recipe.evaluation_size[1]
    return replace(recipe, crop_size=(longest, longest), longest_edge=longest, flip_probability=0.0)


def make_plan(args: argparse.Namespace, data: Data, processor: Any, num_processes: int) -> Plan:
    """Everything that a run needs to know."""
    recipe, why = choose_recipe(args, data, None if args.model is None else processor.size)
    per_step = args.batch_size * args.gradient_accumulation_steps * num_processes
    is_video = data.task == "video"
    cut = "" if args.recipe == "whole" else f"; samples of {recipe.crop_size[0]}x{recipe.crop_size[1]}"
    lines = [f"recipe {why}{cut}"]
    if is_video:
        lines.append(f"clips of {args.num_frames} frames, at most {args.frame_range} from one of them")
    if args.sizes is not None:
        lines.append(f"sizes of samples over training: {args.sizes}")
    scaled = scale_learning_rate(per_step, recipe.learning_rate)
    rate = scaled.value if args.learning_rate is None else args.learning_rate
    lines.append(scaled.reason if args.learning_rate is None else f"learning rate {rate:.3g}, as given")
    steps, reason = choose_steps(args, data, recipe, per_step)
    lines.append(f"{reason}; schedule {recipe.schedule}, warm-up {recipe.warmup_steps} steps")
    if steps <= recipe.warmup_steps:
        lines.append("warning: training ends before the learning rate has risen: little is learnt; give more --steps")
    # A validation image costs about a third of a training image; a tenth of the time may go there.
    frames = mean_length(data.validation) if is_video else 1
    by_cost = 3 * len(data.validation) * frames // (per_step * frames_in_clip(args, data))
    eval_every = args.eval_every or min(steps, max(by_cost, steps // 20, 1))
    save_every = args.save_every or min(eval_every, 500)
    count = len(data.validation)
    validation = f"videos: {count} of about {frames} frames" if is_video else f"images: {count}"
    lines.append(f"validation {validation}, every {eval_every} steps; a checkpoint every {save_every}")
    workers = args.num_workers
    if workers is None:
        workers = min(4, max(1, (os.cpu_count() or 1) // num_processes - 1))
    return Plan(recipe, per_step, steps, rate, eval_every, save_every, workers, is_video, lines)


def mean_length(videos: Any) -> int:
    """Frames of a video, of the first twenty."""
    lengths = [len(videos[index]["frames"]) for index in range(min(len(videos), 20))]
    return max(1, round(sum(lengths) / len(lengths)))


def choose_steps(args: argparse.Namespace, data: Data, recipe: Recipe, images_per_step: int) -> tuple[int, str]:
    """How long to train, and why so long.

    Raises:
        ValueError: it cannot be known.
    """
    unit = "clips" if data.task == "video" else "images"
    if args.steps is not None:
        return args.steps, f"{args.steps} steps of {images_per_step} {unit}, as given"
    if recipe.steps is not None and args.model is None:
        steps = -(-recipe.steps * recipe.batch_size // images_per_step)
        return steps, f"{steps} steps of {images_per_step} images: as many images as in the original"
    images = num_images(data)
    if images is None:
        raise ValueError("Give --steps: the data has no end that is known.")
    chosen = choose_num_steps(images, images_per_step)
    more = "" if args.model is not None else " (a rule for models that segment already: from less, raise --steps)"
    return int(chosen.value), chosen.reason + more


def choose_precision(asked: str | None) -> tuple[str, str]:
    """Mixed precision, and why; the loss is computed in float32 in any case."""
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked is not None:
        return asked, f"mixed precision {asked}, as given"
    if configured != "no":
        return configured, f"mixed precision {configured}, as accelerate is configured"
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "mixed precision bf16: this GPU computes in it (--mixed_precision no turns it off)"
    return "no", "float32 throughout: no GPU with bf16 here"
