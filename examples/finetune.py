"""Train Mask2Former on your images: panoptic, instance or semantic segmentation, on one or several processes.

    accelerate launch examples/finetune.py --dataset path/to/data --model path/or/hub/id --output runs/mine

`--dataset` is what `m2f_hf.data.open_dataset` opens (COCO's files, label maps, a data set on the Hub), or "shapes",
generated scenes. What is not given is chosen from the data and the checkpoint, and printed with the reason. In the
output folder: `best/`, a checkpoint for `from_pretrained` with its card; `training_log.jsonl`; `predictions/`, pictures
of predictions beside targets; and the last `checkpoint-…`, from which an interrupted run goes on with `--resume`,
exactly as if it had not been: what a step draws depends on the seed and the step alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
from accelerate.utils import DistributedType, gather_object, set_seed
from huggingface_hub import HfApi
from tqdm.auto import tqdm
from transformers.utils import logging

from m2f_hf import M2FImageProcessor, Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from m2f_hf.cli import Segmenter
from m2f_hf.data import CATEGORIES, ShapesDataset, open_dataset
from m2f_hf.data.augmentation import TrainingTransform, inspect_augmentation
from m2f_hf.data.hub_datasets import StreamingDataset
from m2f_hf.data.loading import StepSampler, TrainingStream, evaluation_loader, to_model_inputs, training_loader
from m2f_hf.data.recipes import RECIPES, Recipe, SizeSchedule, default_recipe, get_recipe
from m2f_hf.hub import CARD, Figure, HubFolder, model_card
from m2f_hf.label_sets import LABEL_SETS, find_label_set
from m2f_hf.metrics import MAIN_FIGURE, Evaluation, evaluate_model
from m2f_hf.metrics.pictures import comparison_sheet, draw_comparison
from m2f_hf.optimization import (
    ExponentialMovingAverage,
    LossShare,
    choose_num_steps,
    get_loss_shares,
    get_parameter_groups,
    get_schedule,
    scale_learning_rate,
    scale_losses,
)
from m2f_hf.point_sampling import SeededPoints
from m2f_hf.training import (
    Log,
    StopSignal,
    WriteFailure,
    find_checkpoint,
    has_batch_norm,
    load_checkpoint,
    read_log,
    save_checkpoint,
    save_model,
    saying_what_to_lower,
    set_classes,
    step_of,
    telling_of_failure,
    tidy,
)
from m2f_hf.visualization import draw_segments


VALIDATION_SEED = 1_000_001
TEST_SEED = 2_000_003
"""Seeds of the generated scenes that training never sees: to choose thresholds by, and to report."""
THRESHOLDS = {"threshold": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "overlap_mask_area_threshold": (0.5, 0.65, 0.8)}
MEASURED = {"panoptic": ("pq", "miou"), "instance": ("ap",), "semantic": ("miou",)}
"""What is measured on the way. (A panoptic model's AP takes longer than everything else: `examples/evaluate.py`.)"""
FIGURES = {"pq_all": ("panoptic", "PQ"), "pq_things": ("panoptic", "PQ things"), "pq_stuff": ("panoptic", "PQ stuff")}
FIGURES |= {"ap": ("instance", "AP"), "ap50": ("instance", "AP50"), "miou": ("semantic", "mIoU")}
KNOWN_RECIPE_IMAGES = 2000
"""Training images from which on the original's recipe for a known data set is taken: Cityscapes has 2,975."""
SMALL_BATCH = 8
"""Images per process below which statistics of batch norms are too rough to learn with."""
NUM_STREAMED = 100
"""Images of a stream that are validated on."""
NUM_PICTURES = 4
LOSSES = ("loss_cross_entropy", "loss_mask", "loss_dice")


def say(text: str) -> None:
    """Tell the person at the terminal; standard output is for results."""
    tqdm.write(text, file=sys.stderr)


# --- data ---


class Data(NamedTuple):
    """What is trained and validated on; `name` for the card, `report` for people."""

    train: Any
    validation: Any
    categories: list[dict[str, Any]]
    task: str
    name: str
    report: str


def open_data(args: argparse.Namespace, is_main_process: bool) -> Data:
    """The data set, checked by one process.

    Raises:
        ValueError, OSError, ImportError: it cannot be trained on as it is; every problem is named.
    """
    if args.dataset == "shapes":
        if args.task not in (None, "panoptic"):
            raise ValueError("Generated shapes are for --task panoptic; write them to a folder for the others.")
        train = ShapesDataset(1_000_000, args.image_size, seed=args.seed)
        unseen = ShapesDataset(args.eval_scenes, args.image_size, seed=TEST_SEED if args.eval_only else VALIDATION_SEED)
        return Data(train, unseen, CATEGORIES, "panoptic", "generated shapes", "generated shapes, without end")
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
    name = Path(args.dataset).resolve().name if Path(args.dataset).exists() else args.dataset
    return Data(found.train, validation, found.categories, found.task, name, str(found.report))


def num_images(data: Data, images_per_step: int) -> int | None:
    """Number of training images; None where there is no end of them, or none that is known."""
    return None if isinstance(data.train, (StreamingDataset, ShapesDataset)) else len(data.train)


# --- model ---


def build(args: argparse.Namespace, data: Data) -> tuple[Any, Any, str]:
    """Model and processor for the data: from `--model`, or new from `--backbone` and `--config`; and what was done.

    Raises:
        ValueError, OSError: there is no such model, or it does not do.
    """
    if args.model is not None:
        model = Mask2FormerForUniversalSegmentation.from_pretrained(args.model, dtype=torch.float32)
        note = f"{args.model}: {set_classes(model, data.categories)}"
        processor = M2FImageProcessor.from_pretrained(args.model)
        size = processor.size if args.input_size is None else to_size(args.input_size)
    else:
        model, note = build_new(args, data.categories)
        recipe = choose_recipe(args, data)[0]
        processor = M2FImageProcessor(size=to_size(*recipe.evaluation_size))
        size = processor.size
    if args.eval_only and "new class head" in note:
        raise ValueError(f"{note}. It cannot be measured by its classes; examples/evaluate.py finds them by name.")
    if args.no_object_weight is not None:
        model.config.no_object_weight = args.no_object_weight
        model.criterion.empty_weight[-1] = args.no_object_weight
    processor.size = size
    if not args.eval_only:
        processor.task = data.task
        stuff = [category["id"] for category in data.categories if category["isthing"] in (False, 0)]
        processor.label_ids_to_fuse = stuff if data.task == "panoptic" else processor.label_ids_to_fuse and None
    return model, processor, note


def to_size(shortest: int, longest: int | None = None) -> dict[str, int]:
    return {"shortest_edge": shortest, "longest_edge": longest or 2 * shortest}


def build_new(args: argparse.Namespace, categories: Sequence[Mapping[str, Any]]) -> tuple[Any, str]:
    """A model whose decoders have learnt nothing yet."""
    labels = {category["id"]: category["name"] for category in categories}
    names = {"id2label": labels, "label2id": {name: label for label, name in labels.items()}}
    colors = [category.get("color") for category in categories]
    if all(colors):
        names["label_colors"] = [list(color) for color in colors]
    if args.config is None:
        return Mask2FormerForUniversalSegmentation.from_backbone(args.backbone, **names), f"backbone {args.backbone}"
    settings = json.loads(args.config.read_text(encoding="utf-8"))
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**settings, **names))
    if args.backbone is None:
        return model, f"from scratch, {args.config}"
    backbone = model.model.pixel_level_module.encoder
    # A deeper backbone will do: blocks that the config has no place for are left behind.
    pretrained = type(backbone).from_pretrained(args.backbone, config=backbone.config)
    backbone.load_state_dict(pretrained.state_dict())
    return model, f"{args.config}, backbone {args.backbone}"


def prepare_for_training(model: Any, args: argparse.Namespace) -> list[str]:
    """Freeze and wrap what is to be; what was done beyond what was asked for."""
    encoder = model.model.pixel_level_module.encoder
    notes = []
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
    lines: list[str]

    def settings(self, args: argparse.Namespace) -> dict[str, Any]:
        """What decides how a run goes: for the card, for trackers, and to be compared when it goes on."""
        names = ("seed", "batch_size", "gradient_accumulation_steps", "sizes", "ema", "freeze_backbone")
        of_recipe = ("backbone_multiplier", "weight_decay", "max_grad_norm", "schedule", "warmup_steps", "crop_size")
        values = {"steps": self.steps, "images_per_step": self.images_per_step, "learning_rate": self.learning_rate}
        values |= {name: getattr(args, name) for name in names}
        values |= {name: value for name, value in asdict(self.recipe).items() if name in of_recipe}
        return {name: str(v) if isinstance(v, (tuple, list)) else v for name, v in values.items() if v is not None}


def choose_recipe(args: argparse.Namespace, data: Data, size: Mapping[str, Any] | None = None) -> tuple[Recipe, str]:
    """How images become samples, and why so; options override single settings.

    Args:
        size: at which a checkpoint looks at images; None for a new model.
    """
    known = find_label_set({category["id"]: category["name"] for category in data.categories}, data.name)
    name = f"{known.dataset}-{data.task}" if known is not None else ""
    images = num_images(data, 1) or 0
    if size is None:
        size = to_size(args.input_size or (args.image_size if args.dataset == "shapes" else 512))
    if args.recipe in RECIPES:
        recipe, reason = get_recipe(args.recipe), f"{args.recipe}, the original's"
    elif args.recipe is None and name in RECIPES and images >= KNOWN_RECIPE_IMAGES:
        recipe, reason = get_recipe(name), f"{name}, the original's for these classes"
    elif args.recipe == "plain" or (args.recipe is None and args.dataset == "shapes"):
        recipe, reason = plain_recipe(size), "plain: images at one size, mirrored or not"
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


def make_plan(args: argparse.Namespace, data: Data, processor: Any, num_processes: int) -> Plan:
    """Everything that a run needs to know."""
    recipe, why = choose_recipe(args, data, None if args.model is None else processor.size)
    per_step = args.batch_size * args.gradient_accumulation_steps * num_processes
    lines = [f"recipe {why}; samples of {recipe.crop_size[0]}x{recipe.crop_size[1]}"]
    if args.sizes is not None:
        lines.append(f"sizes of samples over training: {args.sizes}")
    scaled = scale_learning_rate(per_step, recipe.learning_rate)
    rate = scaled.value if args.learning_rate is None else args.learning_rate
    lines.append(scaled.reason if args.learning_rate is None else f"learning rate {rate:.3g}, as given")
    steps, reason = choose_steps(args, data, recipe, per_step)
    lines.append(f"{reason}; schedule {recipe.schedule}, warm-up {recipe.warmup_steps} steps")
    # A validation image costs about a third of a training image; a tenth of the time may go there.
    by_cost = 3 * len(data.validation) // per_step
    eval_every = args.eval_every or min(steps, max(by_cost, steps // 20, 1))
    save_every = args.save_every or min(eval_every, 500)
    lines.append(f"validation on {len(data.validation)} images every {eval_every} steps, checkpoint every {save_every}")
    workers = args.num_workers
    if workers is None:
        workers = min(4, max(1, (os.cpu_count() or 1) // num_processes - 1))
    return Plan(recipe, per_step, steps, rate, eval_every, save_every, workers, lines)


def choose_steps(args: argparse.Namespace, data: Data, recipe: Recipe, images_per_step: int) -> tuple[int, str]:
    """How long to train, and why so long.

    Raises:
        ValueError: it cannot be known.
    """
    if args.steps is not None:
        return args.steps, f"{args.steps} steps of {images_per_step} images, as given"
    if recipe.steps is not None and args.model is None:
        steps = -(-recipe.steps * recipe.batch_size // images_per_step)
        return steps, f"{steps} steps of {images_per_step} images: as many images as in the original"
    images = num_images(data, images_per_step)
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


# --- training ---


class Progress:
    """What a checkpoint holds beside weights: how far the run is, what was best, sums since the last row of the log."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.step = 0
        self.best = -1.0
        self.sums: dict[str, torch.Tensor] = {}
        self.settings = dict(settings)

    def state_dict(self) -> dict[str, Any]:
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return {"step": self.step, "best": self.best, "sums": sums, "settings": self.settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.best, self.sums = state["step"], state["best"], dict(state["sums"])
        for name in sorted(self.settings.keys() | state["settings"].keys()):
            before, now = state["settings"].get(name), self.settings.get(name)
            if before != now:
                say(f"warning: {name} was {before} and is {now}: the run does not go on as it would have")


class Training:
    """One run."""

    def __init__(
        self, model: Any, processor: Any, data: Data, plan: Plan, args: argparse.Namespace, accelerator: Accelerator
    ) -> None:
        self.processor, self.data, self.plan, self.args, self.accelerator = processor, data, plan, args, accelerator
        self.is_main = accelerator.is_main_process
        self.is_sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        model.to(accelerator.device)
        recipe = plan.recipe
        groups = get_parameter_groups(model, plan.learning_rate, recipe.weight_decay, recipe.backbone_multiplier)
        optimizer = torch.optim.AdamW(groups)
        self.schedule = get_schedule(
            optimizer,
            recipe.schedule,
            plan.steps,
            recipe.warmup_steps,
            recipe.milestones or (0.9, 0.95),
            warmup_factor=recipe.warmup_factor,
        )
        self.average = None if args.ema is None else ExponentialMovingAverage(model, args.ema)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            AcceleratorState().deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.batch_size
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.plain_model = accelerator.unwrap_model(self.model)
        self.progress = Progress(plan.settings(args))
        self.failures: dict[str, str] = {}
        self.stop = StopSignal()

    # --- resuming ---

    def parts(self) -> dict[str, Any]:
        """What a checkpoint is made of, beyond what is sharded."""
        parts: dict[str, Any] = {"progress": self.progress, "schedule": self.schedule}
        if not self.is_sharded:
            parts |= {"model": self.plain_model, "optimizer": self.optimizer}
        if self.average is not None:
            parts["average"] = self.average
        if self.accelerator.scaler is not None:
            parts["scaler"] = self.accelerator.scaler
        return parts

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint."""
        load_checkpoint(checkpoint, self.parts())
        if self.is_sharded:
            self.accelerator.load_state(str(checkpoint))
        self.progress.sums = {name: value.to(self.accelerator.device) for name, value in self.progress.sums.items()}
        if self.args.no_object_weight is not None:
            self.plain_model.criterion.empty_weight[-1] = self.args.no_object_weight

    def save(self) -> None:
        """Write a checkpoint; where that fails, the one before is kept."""
        step = self.progress.step
        if self.is_sharded:  # every process writes its part
            self.accelerator.save_state(str(self.args.output / f".checkpoint-{step:07d}.parts"))
        if not self.is_main:
            return
        with self.tolerating_failure("checkpoint"):
            save_checkpoint(self.args.output, step, self.parts(), self.move_shards if self.is_sharded else None)

    def move_shards(self, folder: Path) -> None:
        source = self.args.output / f".checkpoint-{self.progress.step:07d}.parts"
        for path in source.iterdir():
            os.replace(path, folder / path.name)
        source.rmdir()

    @contextlib.contextmanager
    def tolerating_failure(self, what: str) -> Iterator[None]:
        """A disk that is full is told of, and training goes on: there may be room again."""
        self.failures.pop(what, None)
        try:
            yield
        except WriteFailure as failure:
            self.failures[what] = str(failure)
            say(f"{failure}. What was there before is kept, and training goes on: make room.")

    # --- the loop ---

    def fit(self) -> None:
        """Train to the end, or until told to stop."""
        plan, args = self.plan, self.args
        step = self.progress.step
        self.log = Log(args.output / "training_log.jsonl", lambda row: is_before(row, step)) if self.is_main else None
        self.model.train()
        with self.stop:
            if step and self.is_due(plan.eval_every):  # a checkpoint is written before its step's validation
                self.validate()
            self.started, self.paused, self.counted_from = time.monotonic(), 0.0, step
            batches = iter(self.loader())
            bar = tqdm(total=plan.steps, initial=step, unit="step", mininterval=5, disable=not self.is_main)
            with bar:
                while self.progress.step < plan.steps:
                    row = self.train_step(list(itertools.islice(batches, args.gradient_accumulation_steps)))
                    bar.set_postfix(row, refresh=False)
                    bar.update()
                    done = time.monotonic()
                    if self.is_due(plan.save_every) or self.is_due(plan.eval_every) or self.stops:
                        self.save()
                    if self.stops:
                        self.end_early()
                    if self.is_due(plan.eval_every):
                        self.validate()
                    self.paused += time.monotonic() - done
        self.accelerator.wait_for_everyone()
        if self.failures:
            raise SystemExit(f"{'; '.join(self.failures.values())}. Make room, and go on with --resume.")

    def loader(self) -> Any:
        args, plan, accelerator = self.args, self.plan, self.accelerator
        self.sampler = StepSampler(
            self.progress.step,
            plan.steps,
            args.batch_size,
            args.gradient_accumulation_steps,
            accelerator.process_index,
            accelerator.num_processes,
        )
        transform = TrainingTransform(plan.recipe)
        sizes = None if args.sizes is None else SizeSchedule.parse(args.sizes)
        samples = TrainingStream(self.data.train, transform, args.seed, sizes, plan.images_per_step, plan.steps)
        return training_loader(samples, self.sampler, self.processor, plan.num_workers)

    def is_due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.plan.steps

    def end_early(self) -> None:
        """What a signal leads to, once the step is done and saved."""
        checkpoint = find_checkpoint(self.args.output)
        where = "nothing was saved" if checkpoint is None else f"go on from step {step_of(checkpoint)} with --resume"
        if self.is_main:
            say(f"Stopped by a signal after step {self.progress.step} of {self.plan.steps}: {where}.")
        raise SystemExit(self.stop.exit_code)

    def train_step(self, batches: list[dict[str, Any]]) -> dict[str, float]:
        """One step of the optimizer; what the log got of it, if it was due."""
        accelerator, progress = self.accelerator, self.progress
        seed = self.args.seed * 1_000_003 + progress.step + 1
        set_seed(seed * accelerator.num_processes + accelerator.process_index)  # drop path, where the backbone has it
        self.optimizer.zero_grad()
        terms = self.backward(batches, seed)
        # One exchange a step: is the loss a number everywhere, and was a process told to stop?
        signals = torch.tensor([0.0, float(self.stop.received is not None)], device=accelerator.device)
        signals[0] = terms["loss"]
        total, stops = (
            accelerator.reduce(signals, "sum").tolist() if accelerator.num_processes > 1 else signals.tolist()
        )
        if not np.isfinite(total):
            self.refuse(batches, terms, "The loss")
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.plan.recipe.max_grad_norm)
        terms["gradient_norm"] = torch.zeros_like(terms["loss"]) if norm is None else torch.as_tensor(norm).float()
        if accelerator.scaler is None and not torch.isfinite(terms["gradient_norm"]):  # a scaler skips such steps
            self.refuse(batches, terms, "The gradient")
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.plain_model)
        progress.step += 1
        self.stops = stops > 0
        terms["steps"] = torch.ones_like(terms["loss"])
        progress.sums = {name: progress.sums.get(name, 0) + value.detach() for name, value in terms.items()}
        return self.write_row() if self.is_due(self.args.log_every) else {}

    def backward(self, batches: list[dict[str, Any]], seed: int) -> dict[str, torch.Tensor]:
        """Gradients of the batches' losses, added up to those of one large batch; the loss and its terms."""
        criterion = self.plain_model.criterion
        sums: dict[str, torch.Tensor] = {}
        for index, (batch, share) in enumerate(zip(batches, self.shares(batches), strict=True)):
            criterion.draw_points = SeededPoints(seed, first_image=self.sampler.first_image(index))
            is_last = index == len(batches) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.model):
                outputs = self.model(**to_model_inputs(batch, self.accelerator.device))
                losses = scale_losses(outputs.loss_dict, share)
                loss = self.plain_model.get_loss(losses)
                self.accelerator.backward(loss)
            terms = {"loss": loss, **{name: losses[name] for name in LOSSES}}
            sums = {name: sums.get(name, 0) + value.detach() for name, value in terms.items()}
        return sums

    def shares(self, batches: list[dict[str, Any]]) -> list[LossShare]:
        """What each batch counts for in the step."""
        if len(batches) == 1:
            return [LossShare(1.0, 1.0)]
        labels = [batch["class_labels"] for batch in batches]
        return get_loss_shares(
            labels, self.plain_model.config.num_queries, self.plain_model.criterion.empty_weight, self.mean
        )

    def mean(self, totals: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(totals.to(self.accelerator.device), "mean")

    def refuse(self, batches: list[dict[str, Any]], terms: Mapping[str, torch.Tensor], what: str) -> None:
        """End a run whose loss is no number, before its weights are spoilt; the images are kept to be looked at."""
        step, rank = self.progress.step + 1, self.accelerator.process_index
        path = self.args.output / f"bad-batch-step{step:07d}-process{rank}.pt"
        torch.save({"step": step, "batches": batches, "terms": {k: float(v) for k, v in terms.items()}}, path)
        files = [name for batch in batches for name in batch["file_names"]]
        kept = find_checkpoint(self.args.output)
        raise SystemExit(
            f"{what} of step {step} is not finite ({json.dumps({k: float(v) for k, v in terms.items()})}). The weights "
            f"were left as before the step. Its images: {', '.join(files[:16])}; as the model saw them: {path}. "
            f"Last checkpoint: {kept or 'none'}. Look at these images and their masks; what helps otherwise is a lower "
            "--learning_rate, a longer --warmup_steps or --mixed_precision no."
        )

    def write_row(self) -> dict[str, float]:
        """Means since the last row, speed, memory and time left, for the log and the trackers."""
        progress, plan = self.progress, self.plan
        means = {name: float(value) for name, value in self.accelerator.reduce(progress.sums, "mean").items()}
        count = means.pop("steps")
        progress.sums = {}
        row = {name: round(value / count, 5) for name, value in means.items()}
        seconds, steps = time.monotonic() - self.started, progress.step - self.counted_from
        speed = {
            "images_per_second": round(steps * plan.images_per_step / (seconds - self.paused), 2),
            "memory_gb": round(memory_used() / 1e9, 2),
            "minutes_left": round((plan.steps - progress.step) * seconds / steps / 60, 1),
        }
        self.record({"learning_rate": self.schedule.get_last_lr()[-1], **row, **speed})
        return {name: row[name] for name in ("loss", *LOSSES)} | speed

    def record(self, row: Mapping[str, Any]) -> None:
        """A row for the log, and for the trackers."""
        self.accelerator.log(dict(row), step=self.progress.step)
        if self.log is not None:
            with self.tolerating_failure("log"):
                self.log.write({"step": self.progress.step, **row})

    # --- validation ---

    def validate(self) -> None:
        """Measure, draw, and keep the model if it is the best so far."""
        with contextlib.nullcontext() if self.average is None else self.average.applied(self.plain_model):
            result, pictures = evaluate(
                self.plain_model, self.processor, self.data, self.args, self.accelerator, self.stop
            )
            if self.stop.received is not None:
                self.end_early()
            row = summarize(result)
            self.record(row)
            if self.is_main:
                say(f"step {self.progress.step}: {json.dumps(row)}")
                self.save_pictures(pictures)
            figure = row[MAIN_FIGURE[self.data.task]]
            if figure > self.progress.best:
                self.progress.best = figure
                weights = self.accelerator.get_state_dict(self.model) if self.is_sharded else None
                if self.is_main:
                    with self.tolerating_failure("best"):
                        save_model(self.plain_model, self.processor, self.args.output / "best", weights)

    def save_pictures(self, pictures: Any) -> None:
        """The validation images that are drawn each time, predictions beside targets."""
        folder = self.args.output / "predictions"
        with self.tolerating_failure("pictures"), telling_of_failure(f"Pictures in {folder}"):
            folder.mkdir(exist_ok=True)
            pictures.save(folder / f"step-{self.progress.step:07d}.jpg", quality=90)


def is_before(row: Mapping[str, Any], step: int) -> bool:
    """Whether a row of the log is kept by a run that goes on from `step`; that step's validation is done again."""
    return row["step"] < step or (row["step"] == step and "loss" in row)


def memory_used() -> int:
    """Most bytes in use so far, on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- evaluation ---


def evaluate(
    model: Any,
    processor: Any,
    data: Data,
    args: argparse.Namespace,
    accelerator: Accelerator,
    stop: StopSignal | None = None,
) -> tuple[dict[str, Any], Any]:
    """Figures on the validation data, over all processes, and a picture of its first images; none when told to stop."""
    evaluation = Evaluation(data.task, processor, data.categories, MEASURED[data.task])
    batches = evaluation_loader(
        data.validation, processor, args.batch_size, accelerator.process_index, accelerator.num_processes
    )
    id2label = {int(label): name for label, name in model.config.id2label.items()}
    colors = dict(enumerate(model.config.label_colors)) if model.config.label_colors else None
    rows: list[Any] = []
    titles: list[str] = []

    def update(outputs: Any, items: Sequence[Mapping[str, Any]]) -> None:
        for prediction, item in zip(evaluation.predict(outputs, items), items, strict=True):
            evaluation.add(prediction, item)
            if len(rows) < NUM_PICTURES:
                rows.append(draw_comparison(item, prediction, evaluation, id2label, colors))
                titles.append(str(item.get("file_name", f"image {item['image_id']}")))

    batches = itertools.takewhile(lambda _: stop is None or stop.received is None, batches)
    evaluate_model(model, batches, update, accelerator.is_main_process)
    if stop is not None and stop.received is not None:
        return {}, None
    return evaluation.compute(gather_object), comparison_sheet(rows, titles) if rows else None


def summarize(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation in one flat row, 0 where there is none."""
    return {name: round(value or 0.0, 4) for name, value in result.items() if name != "per_class"}


def choose_thresholds(model: Any, processor: Any, data: Data, args: argparse.Namespace) -> None:
    """Give the processor the pair of `THRESHOLDS` with the best PQ on the validation data. For one process."""
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

    evaluate_model(model, evaluation_loader(data.validation, processor, args.batch_size), update)
    qualities = [evaluation.compute()["pq_all"] or 0.0 for evaluation in evaluations]
    best = int(np.argmax(qualities))
    for name, value in pairs[best].items():
        setattr(processor, name, value)
    print(f"thresholds {pairs[best]}: PQ {qualities[best]:.4f} on the scenes they were chosen by")


# --- the card, and to the Hub ---


def measured(output: Path, data: Data) -> tuple[int, list[Figure]]:
    """The step that was kept, and what the run measured of it; in percent, as the field gives them."""
    main = MAIN_FIGURE[data.task]
    best = max((row for row in read_log(output / "training_log.jsonl") if main in row), key=lambda row: row[main])
    source = "the training run, which chose its step by them"
    return best["step"], [
        Figure(task, data.name, "validation", metric, round(100 * best[key], 2), source)
        for key, (task, metric) in FIGURES.items()
        if key in best
    ]


def describe_run(args: argparse.Namespace, data: Data, plan: Plan, num_processes: int, repo_id: str) -> None:
    """Put a card and an example picture beside the weights that the run kept."""
    best = args.output / "best"
    step, figures = measured(args.output, data)
    segmenter = Segmenter.load(str(best), task=None, threshold=None, device=None, dtype="float32")
    config, picture = segmenter.model.config, data.validation[0]["image"]
    segmentation, segments_info = segmenter(picture)
    scale = max(1, 480 // picture.width)
    overlay = draw_segments(picture, segmentation, segments_info, colors=config.label_colors, scale=scale)
    overlay.save(best / "example.jpg", quality=90)
    is_local = args.model is not None and Path(args.model).exists()
    start = Path(args.model).name if is_local else args.model or "scratch"
    if args.backbone is not None:
        start += f", backbone {Path(args.backbone).name}"
    training = {"start": start, "data": data.name, "kept step": step, "processes": num_processes}
    card = model_card(
        config,
        segmenter.processor,
        repo_id=repo_id,
        base_model=None if is_local else args.model,
        license=args.hub_license,
        figures=figures,
        training={**training, **plan.settings(args)},
        example_image="example.jpg",
    )
    card.save(best / CARD)


def publish(args: argparse.Namespace, repo_id: str) -> None:
    """Send what the run kept, with its card; where that fails, it can be sent later."""
    try:
        commit = HubFolder(args.output / "best").push(repo_id, private=args.hub_private or None)
    except Exception:
        print(f"The model is in {args.output / 'best'}; to publish it: m2f push {args.output / 'best'} {repo_id}")
        raise
    print(f"{commit.repo_url} is at {commit.oid[:8]}")


# --- the script ---


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", required=True, help='folder, annotation file, name on the Hub, or "shapes"')
    data.add_argument("--task", choices=list(MEASURED), help="default: what the annotations are made for")
    data.add_argument("--validation", help="another folder or file to validate on")
    data.add_argument("--held_out", type=float, default=0.1, help="share to validate on, where there is no such split")
    data.add_argument("--labels", help=f"file with class names, or one of {', '.join(LABEL_SETS)}")
    data.add_argument("--streaming", action="store_true", help="read a Hub data set without downloading it first")
    data.add_argument("--image_size", type=int, default=160, help="side of generated scenes")
    data.add_argument("--eval_scenes", type=int, default=200, help="unseen scenes of --dataset shapes")
    start = parser.add_argument_group("start")
    start.add_argument("--model", help="folder or Hub id of the model to start from")
    start.add_argument("--backbone", help="folder or Hub id of a backbone to start from, the rest being new")
    start.add_argument("--config", type=Path, help="JSON of `Mask2FormerConfig`, to start from scratch")
    start.add_argument("--freeze_backbone", action="store_true")
    samples = parser.add_argument_group("samples")
    samples.add_argument("--recipe", choices=["default", "plain", *RECIPES], help="default: by the data set")
    samples.add_argument("--input_size", type=int, help="shortest side that images are resized to (default: --model's)")
    samples.add_argument("--sizes", help='growing sizes of samples over training, such as "0:256,0.5:384,0.8:512"')
    samples.add_argument("--inspect", type=int, default=0, metavar="N", help="draw samples of N images to samples.jpg")
    steps = parser.add_argument_group("steps (what is not given comes from the recipe, the batch and the data)")
    steps.add_argument("--steps", type=int)
    steps.add_argument("--batch_size", type=int, default=4, help="images per process")
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
    if args.dataset == "shapes" and args.seed in (VALIDATION_SEED, TEST_SEED):
        parser.error(f"--seed {args.seed} is that of the unseen scenes: take another")
    if args.config is not None and not args.config.is_file():
        parser.error(f"there is no file {args.config}")
    for name in ("steps", "batch_size", "gradient_accumulation_steps", "log_every", "eval_every", "save_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is 1 or more")
    if args.report_to is not None and not filter_trackers([args.report_to]):
        parser.error(f"--report_to {args.report_to}: it is not installed (pip install {args.report_to})")
    try:
        if args.sizes is not None:
            SizeSchedule.parse(args.sizes)
    except ValueError as error:
        parser.error(f"--sizes: {error}")


def check_output(args: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from, None to begin.

    Raises:
        SystemExit: there is a run that must not be written over.
    """
    checkpoint = find_checkpoint(args.output)
    if checkpoint is not None and not args.resume:
        raise SystemExit(
            f"{args.output} holds a run that is at step {step_of(checkpoint)}: go on with --resume, or give another "
            "--output."
        )
    return checkpoint


def claim_repository(args: argparse.Namespace) -> str:
    """The Hub's repository; what the Hub refuses, it refuses before the training."""
    api = HfApi()
    api.whoami()
    name = args.hub_model_id or args.output.resolve().name
    return api.create_repo(name, private=args.hub_private or None, exist_ok=True).repo_id


def draw_samples(args: argparse.Namespace, data: Data, recipe: Recipe) -> None:
    """Contact sheets of augmented samples with their targets."""
    train = data.train
    items = list(itertools.islice(train, args.inspect)) if isinstance(train, StreamingDataset) else train
    indices = np.linspace(0, len(items) - 1, min(args.inspect, len(items))).round().astype(int).tolist()
    sheet = inspect_augmentation(items, TrainingTransform(recipe), data.categories, indices, seed=args.seed)
    sheet.save(args.output / "samples.jpg", quality=90)
    say(f"samples of {len(indices)} images are drawn in {args.output / 'samples.jpg'}")


def run_training(
    args: argparse.Namespace, data: Data, model: Any, processor: Any, accelerator: Accelerator, lines: list[str]
) -> None:
    """Plan, train, describe and publish."""
    is_main = accelerator.is_main_process
    checkpoint = check_output(args)
    repo_id = claim_repository(args) if args.push_to_hub and is_main else args.output.resolve().name
    with ending_with_the_message():
        plan = make_plan(args, data, processor, accelerator.num_processes)
    lines = [*lines, *plan.lines, *prepare_for_training(model, args)]
    if is_main:
        tidy(args.output)
        say("\n".join(lines))
        if args.resume:
            say("no checkpoint yet: from the beginning" if checkpoint is None else f"going on from {checkpoint}")
        if args.inspect:
            draw_samples(args, data, plan.recipe)
    accelerator.init_trackers("m2f_hf", config=plan.settings(args))
    training = Training(model, processor, data, plan, args, accelerator)
    if checkpoint is not None:
        with ending_with_the_message():
            training.resume(checkpoint)
    training.fit()
    if is_main:
        describe_run(args, data, plan, accelerator.num_processes, repo_id)
        if args.push_to_hub:
            publish(args, repo_id)
    accelerator.end_training()


@contextlib.contextmanager
def ending_with_the_message() -> Iterator[None]:
    """What is wrong with data, model or arguments ends the program with what to do, and without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from error


ADVICE = (
    "Halve --batch_size and double --gradient_accumulation_steps, which gives the same result; add "
    "--gradient_checkpointing; lower --input_size; or use --mixed_precision bf16."
)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    precision, why = choose_precision(args.mixed_precision)
    accelerator = Accelerator(mixed_precision=precision, log_with=args.report_to, project_dir=str(args.output))
    set_seed(args.seed)
    logging.disable_progress_bar()  # of weights loaded and saved, between the lines of the run's own
    with ending_with_the_message():
        data = open_data(args, accelerator.is_main_process)
        if accelerator.is_main_process:
            say(f"{data.report}\n")
        model, processor, note = build(args, data)
    if args.choose_thresholds and data.task != "panoptic":
        raise SystemExit(f"--choose_thresholds is for panoptic segmentation, not {data.task}")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.eval_only:
        result, _ = evaluate(model.to(accelerator.device), processor, data, args, accelerator)
        if accelerator.is_main_process:
            print(json.dumps(result, indent=2))
    elif args.choose_thresholds:
        choose_thresholds(model.to(accelerator.device), processor, data, args)
        save_model(model, processor, args.output / "best")
    else:
        with saying_what_to_lower(ADVICE):
            run_training(args, data, model, processor, accelerator, [f"start: {note}", why])


if __name__ == "__main__":
    main()
