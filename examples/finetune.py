"""Train Mask2Former on your images or videos, for any of its tasks, on one or several processes.

    accelerate launch examples/finetune.py --dataset path/to/data --model path/or/hub/id --output runs/mine

`--dataset` is what `m2f_hf.data.open_dataset` opens (COCO's files, label maps, YouTube-VIS' files, a data set on the
Hub), or "shapes" or "moving_shapes", generated scenes and videos. What is not given is chosen from the data and the
checkpoint, and printed with the reason. In the output folder: `best/`, a checkpoint for `from_pretrained` with its
card; `training_log.jsonl`; `predictions/`, pictures of predictions beside targets; and the last `checkpoint-…`, from
which an interrupted run goes on with `--resume`, exactly as if it had not been: what a step draws depends on the seed
and the step alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


try:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, broadcast_object_list, gather_object, set_seed
except ImportError as error:
    raise SystemExit("This script needs Accelerate: pip install 'm2f_hf[train]'") from error
from finetune_setup import (
    Data,
    Plan,
    build,
    choose_precision,
    make_plan,
    open_data,
    parse_arguments,
    prepare_for_training,
)
from huggingface_hub import HfApi
from tqdm.auto import tqdm
from transformers.utils import logging

from m2f_hf import Segmenter
from m2f_hf.data import ClipTransform, TrainingTransform, inspect_augmentation, inspect_clips
from m2f_hf.data.hub_datasets import StreamingDataset
from m2f_hf.data.loading import StepSampler, TrainingStream, evaluation_loader, to_model_inputs, training_loader
from m2f_hf.hub import HubFolder
from m2f_hf.hub.card import CARD, Figure, model_card
from m2f_hf.known.recipes import Recipe, SizeSchedule
from m2f_hf.loss.points import SeededPoints
from m2f_hf.metrics import MAIN_FIGURE, Evaluation, evaluate_model
from m2f_hf.metrics.pictures import comparison_sheet, draw_comparison, draw_frames
from m2f_hf.training.checkpoints import (
    Log,
    StopSignal,
    WriteFailure,
    find_checkpoint,
    load_checkpoint,
    read_log,
    save_checkpoint,
    save_model,
    saying_what_to_lower,
    step_of,
    telling_of_failure,
    tidy,
)
from m2f_hf.training.optimization import (
    ExponentialMovingAverage,
    LossShare,
    get_loss_shares,
    get_parameter_groups,
    get_schedule,
    scale_losses,
)


THRESHOLDS = {"threshold": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "overlap_mask_area_threshold": (0.5, 0.65, 0.8)}
MEASURED = {"panoptic": ("pq", "miou"), "instance": ("ap",), "semantic": ("miou",), "video": ("ap",)}
"""What is measured on the way. (A panoptic model's AP takes longer than everything else: `examples/evaluate.py`.)"""
FIGURES = {"pq_all": ("panoptic", "PQ"), "pq_things": ("panoptic", "PQ things"), "pq_stuff": ("panoptic", "PQ stuff")}
FIGURES |= {"ap": ("instance", "AP"), "ap50": ("instance", "AP50"), "miou": ("semantic", "mIoU")}
NUM_PICTURES = 4
PICTURE = "predictions/step-{:07d}.jpg"
LOSSES = ("loss_cross_entropy", "loss_mask", "loss_dice")


def say(text: str) -> None:
    """Tell the person at the terminal; standard output is for results."""
    tqdm.write(text, file=sys.stderr)


# --- training ---


class Progress:
    """What a checkpoint holds beside weights: how far the run is, what was best, sums since the last row of the log."""

    def __init__(self, settings: Mapping[str, Any], tells: bool) -> None:
        self.tells = tells
        self.step = 0
        self.best = -1.0
        self.best_step = 0
        self.sums: dict[str, torch.Tensor] = {}
        self.settings = dict(settings)

    def state_dict(self) -> dict[str, Any]:
        sums = {name: value.cpu() for name, value in self.sums.items()}
        best = {"best": self.best, "best_step": self.best_step}
        return {"step": self.step, **best, "sums": sums, "settings": self.settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.sums = state["step"], dict(state["sums"])
        self.best, self.best_step = state["best"], state["best_step"]
        for name in sorted(self.settings.keys() | state["settings"].keys()):
            before, now = state["settings"].get(name), self.settings.get(name)
            if before != now and self.tells:
                say(f"warning: {name} was {before} and is {now}: the run does not go on as it would have")


class Training:
    """One run."""

    def __init__(
        self, model: Any, processor: Any, data: Data, plan: Plan, args: argparse.Namespace, accelerator: Accelerator
    ) -> None:
        self.processor, self.data, self.plan, self.args, self.accelerator = processor, data, plan, args, accelerator
        self.is_main = accelerator.is_main_process
        self.is_sharded = is_sharded(accelerator)
        model.to(accelerator.device)
        recipe = plan.recipe
        groups = get_parameter_groups(model, plan.learning_rate, recipe.weight_decay, recipe.backbone_multiplier)
        optimizer = torch.optim.AdamW(groups, fused=True)
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
        settings = plan.everything(args, data) | {"mixed_precision": accelerator.mixed_precision}
        self.progress = Progress(settings, self.is_main)
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
            self.accelerator.wait_for_everyone()
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
        transform = transform_for(args, self.data, plan.recipe)
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
        terms["gradient_norm"] = torch.zeros_like(terms["loss"]) if norm is None else whole(norm)
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
        values = {name: float(value) for name, value in terms.items()}
        saved = f"as the model saw them: {path}"
        try:
            with telling_of_failure("what the model saw"):
                torch.save({"step": step, "batches": batches, "terms": values}, path)
        except WriteFailure as failure:
            saved = str(failure)
        files = [name for batch in batches for name in batch["file_names"]]
        kept = find_checkpoint(self.args.output)
        raise SystemExit(
            f"{what} of step {step} is not finite ({json.dumps(values)}). The weights "
            f"were left as before the step. Its images: {', '.join(files[:16])}; {saved}. "
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
            model = self.model if self.is_sharded else self.plain_model
            result, pictures = evaluate(
                model, self.processor, self.data, self.args, self.accelerator, self.end_if_told_to
            )
            row = summarize(result, self.data.task)
            self.record(row)
            figure = row[MAIN_FIGURE[self.data.task]]
            # The main process decides: it alone knows whether an earlier one could be written.
            is_best = broadcast_object_list([figure > self.progress.best])[0]
            if self.is_main:
                better = ", the best so far" if is_best else f"; the best was step {self.progress.best_step}"
                say(f"step {self.progress.step}: {in_words(row)}{better}")
                self.save_pictures(pictures)
            if is_best:
                self.keep(figure)

    def keep(self, figure: float) -> None:
        """Write the model into `best/`; only then it is the best."""
        weights = self.accelerator.get_state_dict(self.model) if self.is_sharded else None
        if self.is_main:
            with self.tolerating_failure("best"):
                save_model(self.plain_model, self.processor, self.args.output / "best", weights)
                self.progress.best, self.progress.best_step = figure, self.progress.step

    def end_if_told_to(self) -> None:
        """In a validation: its step is saved."""
        if self.stop.received is not None:
            self.end_early()

    def save_pictures(self, pictures: Any) -> None:
        """The validation images that are drawn each time, predictions beside targets."""
        folder = self.args.output / "predictions"
        with self.tolerating_failure("pictures"), telling_of_failure(f"Pictures in {folder}"):
            folder.mkdir(exist_ok=True)
            pictures.save(self.args.output / PICTURE.format(self.progress.step), quality=90)


def whole(norm: Any) -> torch.Tensor:
    """A norm as a plain tensor; FSDP's is spread over the processes."""
    return torch.as_tensor(norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float()


def is_before(row: Mapping[str, Any], step: int) -> bool:
    """Whether a row of the log is kept by a run that goes on from `step`; that step's validation is done again."""
    return row["step"] < step or (row["step"] == step and "loss" in row)


def memory_used() -> int:
    """Most bytes in use so far, on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- evaluation ---


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a process has a part of the model only."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def evaluate(
    model: Any,
    processor: Any,
    data: Data,
    args: argparse.Namespace,
    accelerator: Accelerator,
    before_batch: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], Any]:
    """Figures on the validation data, over all processes, and a picture of its first images; what `before_batch` raises
    ends it."""
    evaluation = Evaluation(data.task, processor, data.categories, MEASURED[data.task])
    # Where processes need each other for every batch, all see all images: shares may differ in length.
    share = (0, 1) if is_sharded(accelerator) else (accelerator.process_index, accelerator.num_processes)
    config = accelerator.unwrap_model(model).config
    id2label = {int(label): name for label, name in config.id2label.items()}
    colors = dict(enumerate(config.label_colors)) if config.label_colors else None
    rows: list[Any] = []
    titles: list[str] = []

    def update(outputs: Any, items: Sequence[Mapping[str, Any]]) -> None:
        before_batch()
        for prediction, item in zip(evaluation.predict(outputs, items), items, strict=True):
            evaluation.add(prediction, item)
            if not accelerator.is_main_process or len(rows) >= NUM_PICTURES:
                continue
            if data.task == "video":
                found, named = draw_frames(item, prediction, evaluation, id2label, colors, NUM_PICTURES)
                rows.extend(found)
                titles.extend(named)
            else:
                rows.append(draw_comparison(item, prediction, evaluation, id2label, colors))
                titles.append(str(item.get("file_name", f"image {item['image_id']}")))

    batches = evaluation_loader(data.validation, processor, args.batch_size, *share)
    evaluate_model(model, batches, update, accelerator.is_main_process)
    result = evaluation.compute(None if is_sharded(accelerator) else gather_object)
    return result, comparison_sheet(rows, titles) if rows else None


def summarize(result: Mapping[str, Any], task: str) -> dict[str, float]:
    """The figures of an evaluation in one flat row, without those that are undefined; the task's main one is 0 then."""
    known = {name: round(value, 4) for name, value in result.items() if name != "per_class" and value is not None}
    return {MAIN_FIGURE[task]: 0.0, **known}


def in_words(row: Mapping[str, Any]) -> str:
    """The figures that the paper's tables have, in percent."""
    return ", ".join(f"{name} {100 * row[key]:.1f}" for key, (_, name) in FIGURES.items() if key in row)


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


def transform_for(args: argparse.Namespace, data: Data, recipe: Recipe) -> Any:
    """What makes training samples of the data's items."""
    if data.task == "video":
        return ClipTransform(recipe, args.num_frames, args.frame_range)
    return TrainingTransform(recipe)


def measured(output: Path, data: Data, step: int) -> list[Figure]:
    """What the run measured of the step that was kept; in percent, as the field gives them."""
    rows = read_log(output / "training_log.jsonl")
    best = next(row for row in rows if row["step"] == step and MAIN_FIGURE[data.task] in row)
    source = "the training run, which chose its step by them"
    return [
        Figure(task, data.name, "validation", metric, round(100 * best[key], 2), source, data.hub_id)
        for key, (task, metric) in FIGURES.items()
        if key in best
    ]


def draw_example(best: Path, data: Data) -> None:
    """A validation image with what the model in `best` finds in it."""
    picture = data.validation[0]["image"]
    overlay = Segmenter.from_pretrained(best)(picture).draw(scale=max(1, 480 // picture.width))
    overlay.save(best / "example.jpg", quality=90)


def describe_run(
    args: argparse.Namespace, data: Data, plan: Plan, training: Training, num_processes: int, repo_id: str
) -> None:
    """Put a card and an example picture beside the weights that the run kept."""
    best, step = args.output / "best", training.progress.best_step
    figures = measured(args.output, data, step)
    if data.task == "video":
        shutil.copyfile(args.output / PICTURE.format(step), best / "example.jpg")
    else:
        draw_example(best, data)
    is_local = args.model is not None and Path(args.model).exists()
    start = Path(args.model).name if is_local else args.model or "scratch"
    if args.backbone is not None:
        start += f", backbone {Path(args.backbone).name}"
    settings = {"start": start, "data": data.name, "kept step": step, "processes": num_processes}
    card = model_card(
        training.plain_model.config,
        training.processor,
        repo_id=repo_id,
        base_model=None if is_local else args.model,
        datasets=[data.hub_id] if data.hub_id else [],
        license=args.hub_license,
        figures=figures,
        training={**settings, **plan.settings(args)},
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
    if checkpoint is None and (args.output / "best").exists():
        raise SystemExit(
            f"{args.output} holds the best model of an earlier run, which would be written over: give another --output."
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
    inspect: Any = inspect_clips if data.task == "video" else inspect_augmentation
    sheet = inspect(items, transform_for(args, data, recipe), data.categories, indices, seed=args.seed)
    sheet.save(args.output / "samples.jpg", quality=90)
    say(f"samples of {len(indices)} images are drawn in {args.output / 'samples.jpg'}")


def run_training(
    args: argparse.Namespace, data: Data, model: Any, processor: Any, accelerator: Accelerator, lines: list[str]
) -> None:
    """Plan, train, describe and publish."""
    is_main = accelerator.is_main_process
    if is_sharded(accelerator) and args.ema is not None:
        raise SystemExit("--ema needs the whole model in every process: use DDP (examples/accelerate/ddp.yaml).")
    if accelerator.distributed_type == DistributedType.DEEPSPEED and args.gradient_accumulation_steps > 1:
        raise SystemExit("DeepSpeed steps after every batch: leave out --gradient_accumulation_steps, or use DDP.")
    checkpoint = check_output(args)
    repo_id = claim_repository(args) if args.push_to_hub and is_main else args.output.resolve().name
    with ending_with_the_message():
        plan = make_plan(args, data, processor, accelerator.num_processes)
    lines = [*lines, *plan.lines, *prepare_for_training(model, args, data)]
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
        step = training.progress.best_step
        describe_run(args, data, plan, training, accelerator.num_processes, repo_id)
        best = args.output / "best"
        how = "track clip.mp4" if data.task == "video" else "segment photo.jpg"
        say(f"Done. The best checkpoint, of step {step}, is {best}: m2f {how} --model {best}")
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
    args = parse_arguments(arguments, __doc__)
    precision, why = choose_precision(args.mixed_precision)
    logging.disable_progress_bar()  # of weights loaded and saved, between the lines of the run's own
    with ending_with_the_message():
        accelerator = Accelerator(mixed_precision=precision, log_with=args.report_to, project_dir=str(args.output))
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            accelerator.gradient_accumulation_steps = 1  # here losses are weighted with their shares, not divided
        set_seed(args.seed)
        data = open_data(args, accelerator.is_main_process)
        if accelerator.is_main_process:
            say(f"{data.report}\n")
        model, processor, note = build(args, data)
    if args.choose_thresholds and data.task != "panoptic":
        raise SystemExit(f"--choose_thresholds is for panoptic segmentation, not {data.task}")
    args.output.mkdir(parents=True, exist_ok=True)
    with saying_what_to_lower(ADVICE):
        if args.eval_only:
            result, _ = evaluate(model.to(accelerator.device), processor, data, args, accelerator)
            if accelerator.is_main_process:
                print(json.dumps(result, indent=2))
        elif args.choose_thresholds:
            choose_thresholds(model.to(accelerator.device), processor, data, args)
            save_model(model, processor, args.output / "best")
        else:
            run_training(args, data, model, processor, accelerator, [f"start: {note}", why])


if __name__ == "__main__":
    main()
