"""What is chosen from the options, the data and the checkpoint, with reasons: data, recipe, rate, steps, precision."""

import itertools
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from ..data import RECIPES, VIDEO_RECIPES, MovingShapesDataset, Recipe, ShapesDataset, default_recipe, open_dataset
from ..data.hub_datasets import StreamingDataset
from ..data.synthetic.by_name import GENERATED, NUM_UNSEEN, open_generated
from ..data.synthetic.shapes import TEST_SEED, VALIDATION_SEED
from ..known.label_sets import find_label_set
from ..metrics.results import dataset_on_card
from .arguments import FinetuningArguments
from .optimization import choose_num_steps, scale_learning_rate


KNOWN_RECIPE_IMAGES = 2000
"""Training images from which on the original's recipe for a known data set is taken: Cityscapes has 2,975."""
NUM_STREAMED = 100
"""Images of a stream that are validated on."""


# --- data ---


class Data(NamedTuple):
    """What a run trains and validates on.

    Attributes:
        train, validation, categories, task: as `m2f_hf.data.open_dataset` returns them.
        name, hub_id: for the card.
        report: what was found, in words.
        most_segments: in one training image, among those that were counted.
    """

    train: Any
    validation: Any
    categories: list[dict[str, Any]]
    task: str
    name: str = "data"
    report: str = ""
    hub_id: str | None = None
    most_segments: int = 0

    @property
    def is_video(self) -> bool:
        return self.task == "video"

    @property
    def num_images(self) -> int | None:
        """Number of training images or videos; None where it is endless or unknown."""
        is_endless = isinstance(self.train, (StreamingDataset, ShapesDataset, MovingShapesDataset))
        return None if is_endless else len(self.train)


def open_data(args: FinetuningArguments, checks_files: bool = True) -> Data:
    """Open and check the data set.

    Args:
        checks_files: whether images are opened; one of several processes is enough.

    Raises:
        ValueError, OSError, ImportError: it cannot be trained on as it is; every problem is named.
    """
    if args.dataset in GENERATED:
        return _open_generated(args)
    found = open_dataset(
        args.dataset,
        task=args.task,
        labels=args.labels,
        validation=args.validation,
        held_out=args.held_out,
        streaming=args.streaming,
        max_opened=500 if checks_files else 0,
    )
    validation = found.validation
    if isinstance(validation, StreamingDataset):
        validation = list(itertools.islice(validation, NUM_STREAMED))
    name, hub_id = dataset_on_card(args.dataset)
    most_segments = found.report.splits[0].most_segments
    return Data(found.train, validation, found.categories, found.task, name, str(found.report), hub_id, most_segments)


def _open_generated(args: FinetuningArguments) -> Data:
    """Return endless scenes or videos, and others to validate on; `--eval_only` measures on yet others."""
    task = GENERATED[args.dataset]
    if args.task not in (None, task):
        raise ValueError(f"Generated {args.dataset} are for --task {task}; write them to a folder for the others.")
    seed = TEST_SEED if args.eval_only else VALIDATION_SEED
    size = (args.image_size, args.video_length)
    unseen = open_generated(args.dataset, args.eval_scenes or NUM_UNSEEN[args.dataset], seed, *size)
    endless = open_generated(args.dataset, 1_000_000, args.seed, *size)
    name = "moving shapes" if task == "video" else "generated shapes"
    return Data(endless, unseen, endless.categories, task, name, f"{name}, without end")


# --- the plan ---


@dataclass(frozen=True)
class Plan:
    """The settings of a run, given or chosen, and the reasons in words."""

    recipe: Recipe
    images_per_step: int
    steps: int
    learning_rate: float
    eval_every: int
    save_every: int
    num_workers: int
    is_video: bool
    lines: list[str]

    def settings(self, args: FinetuningArguments) -> dict[str, Any]:
        """Return what decides most how a run goes: for the card and for trackers."""
        names = ["seed", "batch_size", "gradient_accumulation_steps", "sizes", "ema", "freeze_backbone"]
        names += ["num_frames", "frame_range"] if self.is_video else []
        fields = ("crop_size", "schedule", "warmup_steps", "backbone_multiplier", "weight_decay", "max_grad_norm")
        values = {"steps": self.steps, "images_per_step": self.images_per_step, "learning_rate": self.learning_rate}
        return _plain(values | args.given(*names) | {name: getattr(self.recipe, name) for name in fields})

    def all_settings(self, args: FinetuningArguments, data: Data) -> dict[str, Any]:
        """Return everything that decides it, to be compared when a run goes on."""
        return _plain({**asdict(self.recipe), **self.settings(args), "data": data.name, "images": data.num_images})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, (tuple, list)) else v for name, v in values.items() if v is not None}


def make_plan(args: FinetuningArguments, data: Data, processor: Any, num_processes: int) -> Plan:
    """Choose what the options leave open.

    Raises:
        ValueError: the number of steps cannot be known, or `--sizes` contradict the recipe.
    """
    recipe, why = choose_recipe(args, data, None if args.is_new else processor.size)
    per_step = args.batch_size * args.gradient_accumulation_steps * num_processes
    cut = "" if args.recipe == "whole" else f"; samples of {recipe.crop_size[0]}x{recipe.crop_size[1]}"
    lines = [f"recipe {why}{cut}"]
    if data.is_video:
        lines.append(f"clips of {args.num_frames} frames, at most {args.frame_range} from one of them")
    if args.sizes is not None:
        lines.append(f"sizes of samples over training: {args.sizes}")
    scaled = scale_learning_rate(per_step, recipe.learning_rate)
    rate = scaled.value if args.learning_rate is None else args.learning_rate
    lines.append(scaled.reason if args.learning_rate is None else f"learning rate {rate:.3g}, as given")
    steps, reason = _choose_steps(args, data, recipe, per_step)
    lines.append(f"{reason}; schedule {recipe.schedule}, warm-up {recipe.warmup_steps} steps")
    if steps <= recipe.warmup_steps:
        lines.append("warning: training ends before the learning rate has risen: little is learnt; give more --steps")
    # A validation image costs about a third of a training image; a tenth of the time may go there.
    count, frames = len(data.validation), _mean_length(data.validation) if data.is_video else 1
    by_cost = 3 * count * frames // (per_step * (args.num_frames if data.is_video else 1))
    eval_every = args.eval_every or min(steps, max(by_cost, steps // 20, 1))
    save_every = args.save_every or min(eval_every, 500)
    validation = f"videos: {count} of about {frames} frames" if data.is_video else f"images: {count}"
    lines.append(f"validation {validation}, every {eval_every} steps; a checkpoint every {save_every}")
    workers = args.num_workers
    if workers is None:
        workers = min(4, max(1, (os.cpu_count() or 1) // num_processes - 1))
    return Plan(recipe, per_step, steps, rate, eval_every, save_every, workers, data.is_video, lines)


def _mean_length(videos: Any) -> int:
    """Return the mean number of frames of the first twenty videos."""
    lengths = [len(videos[index]["frames"]) for index in range(min(len(videos), 20))]
    return max(1, round(sum(lengths) / len(lengths)))


def _choose_steps(args: FinetuningArguments, data: Data, recipe: Recipe, images_per_step: int) -> tuple[int, str]:
    """Return how long to train, and why."""
    if args.steps is not None:
        unit = "clips" if data.is_video else "images"
        return args.steps, f"{args.steps} steps of {images_per_step} {unit}, as given"
    if recipe.steps is not None and args.is_new:
        steps = -(-recipe.steps * recipe.batch_size // images_per_step)
        return steps, f"{steps} steps of {images_per_step} images: as many images as in the original"
    if data.num_images is None:
        raise ValueError("Give --steps: the data has no end that is known.")
    chosen = choose_num_steps(data.num_images, images_per_step)
    more = " (a rule for models that segment already: from less, raise --steps)" if args.is_new else ""
    return int(chosen.value), chosen.reason + more


# --- recipes ---


def to_size(shortest: int, longest: int | None = None) -> dict[str, int]:
    """Return a processor's `size`."""
    return {"shortest_edge": shortest, "longest_edge": longest or 2 * shortest}


def choose_recipe(args: FinetuningArguments, data: Data, size: Mapping[str, Any] | None = None) -> tuple[Recipe, str]:
    """Return how images become samples, and why so; options override single settings.

    Args:
        size: at which a checkpoint looks at images; None for a new model.
    """
    known = find_label_set({category["id"]: category["name"] for category in data.categories}, data.name)
    name = f"{known.dataset}-{'instance' if data.is_video else data.task}" if known is not None else ""
    recipes = {**RECIPES, **VIDEO_RECIPES}
    if size is None:
        size = to_size(args.input_size or (args.image_size if args.dataset in GENERATED else 512))
    if args.recipe is not None and args.recipe in recipes:
        recipe, reason = recipes[args.recipe], f"{args.recipe}, the original's"
    elif args.recipe is None and name in recipes and (data.num_images or 0) >= KNOWN_RECIPE_IMAGES:
        recipe, reason = recipes[name], f"{name}, the original's for these classes"
    elif args.recipe == "plain" or (args.recipe is None and args.dataset in GENERATED):
        recipe, reason = plain_recipe(size), "plain: images at one size, mirrored or not"
    elif args.recipe == "whole":
        if args.sizes is not None:
            raise ValueError("--sizes are sizes of crops, and --recipe whole cuts none: leave out one of them.")
        recipe, reason = whole_recipe(size), "whole: images as at evaluation, neither cut nor mirrored"
    else:
        recipe = default_recipe(size)
        reason = "default: images at half to double size, cropped, mirrored, colours varied"
    names = ("schedule", "warmup_steps", "learning_rate", "backbone_multiplier", "weight_decay", "max_grad_norm")
    return replace(recipe, **args.given(*names)), reason


def plain_recipe(size: Mapping[str, Any]) -> Recipe:
    """Return a recipe for images at the size of evaluation, a square of their shorter side, mirrored or not."""
    recipe = default_recipe(size)
    shortest = recipe.evaluation_size[0]
    return replace(recipe, shortest_edges=(shortest,), color_jitter=False, is_padded=False)


def whole_recipe(size: Mapping[str, Any]) -> Recipe:
    """Return a recipe for images exactly as at evaluation: to see whether a model can learn a few by heart."""
    recipe = plain_recipe(size)
    longest = recipe.evaluation_size[1]
    return replace(recipe, crop_size=(longest, longest), longest_edge=longest, flip_probability=0.0)


# --- precision ---


def choose_precision(asked: str | None) -> tuple[str, str]:
    """Return the mixed precision, and why; the loss is computed in float32 in any case."""
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked is not None:
        return asked, f"mixed precision {asked}, as given"
    if configured != "no":
        return configured, f"mixed precision {configured}, as accelerate is configured"
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "mixed precision bf16: this GPU computes in it (--mixed_precision no turns it off)"
    return "no", "float32 throughout: no GPU with bf16 here"
