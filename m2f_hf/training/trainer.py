"""The training loop: exact resuming, accumulated batches, several processes, validation, and what is kept."""

import contextlib
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list, set_seed
from tqdm.auto import tqdm

from ..data.loading import StepSampler, TrainingStream, to_model_inputs, training_loader
from ..known.recipes import SizeSchedule
from ..loss.points import SeededPoints
from ..metrics import MAIN_FIGURE
from .arguments import FinetuningArguments
from .checkpoints import (
    Log,
    WriteFailure,
    as_write_failure,
    find_checkpoint,
    hidden_folder,
    load_checkpoint,
    save_checkpoint,
    save_model,
    step_of,
)
from .interruptions import StopSignal
from .optimization import (
    ExponentialMovingAverage,
    LossShare,
    get_loss_shares,
    get_parameter_groups,
    get_schedule,
    scale_losses,
)
from .plan import Data, Plan
from .report import BEST, LOG, PICTURE, say, transform_for
from .validation import evaluate, in_words, is_sharded, summarize


LOSSES = ("loss_cross_entropy", "loss_mask", "loss_dice")


class Progress:
    """What a checkpoint holds besides weights: the step, the best figure, sums since the last row of the log."""

    def __init__(self, settings: Mapping[str, Any], is_main: bool) -> None:
        self.is_main = is_main
        self.step = 0
        self.best = -1.0
        self.best_step = 0
        self.sums: dict[str, torch.Tensor] = {}
        self.settings = dict(settings)

    def state_dict(self) -> dict[str, Any]:
        sums = {name: value.cpu() for name, value in self.sums.items()}
        names = ("step", "best", "best_step", "settings")
        return {"sums": sums, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.best, self.best_step = state["step"], state["best"], state["best_step"]
        self.sums = dict(state["sums"])
        for name in sorted(self.settings.keys() | state["settings"].keys()):
            before, now = state["settings"].get(name), self.settings.get(name)
            if before != now and self.is_main:
                say(f"warning: {name} was {before} and is {now}: the run does not go on as it would have")


class Trainer:
    """One run.

    Args:
        args: the options.
        plan: what was chosen for them.
        data: to train and validate on.
        model: with the data's classes, in training mode (`prepare_for_training`).
        processor: the model's.
        accelerator: places the model; of `accelerate`.
    """

    def __init__(
        self,
        args: FinetuningArguments,
        plan: Plan,
        data: Data,
        model: Any,
        processor: Any,
        accelerator: Accelerator,
    ) -> None:
        self.args, self.plan, self.data, self.processor, self.accelerator = args, plan, data, processor, accelerator
        self.is_main, self.is_sharded = accelerator.is_main_process, is_sharded(accelerator)
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
        settings = plan.all_settings(args, data) | {"mixed_precision": accelerator.mixed_precision}
        self.progress = Progress(settings, self.is_main)
        self.failures: dict[str, str] = {}
        self.stop = StopSignal()

    # --- checkpoints ---

    def _parts(self) -> dict[str, Any]:
        """Return what a checkpoint is made of, beyond what is sharded."""
        parts: dict[str, Any] = {"progress": self.progress, "schedule": self.schedule}
        if not self.is_sharded:
            parts |= {"model": self.plain_model, "optimizer": self.optimizer}
        if self.average is not None:
            parts["average"] = self.average
        if self.accelerator.scaler is not None:
            parts["scaler"] = self.accelerator.scaler
        return parts

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError, OSError: it is damaged or another run's.
        """
        load_checkpoint(checkpoint, self._parts())
        if self.is_sharded:
            self.accelerator.load_state(str(checkpoint))
        self.progress.sums = {name: value.to(self.accelerator.device) for name, value in self.progress.sums.items()}
        if self.args.no_object_weight is not None:
            self.plain_model.criterion.empty_weight[-1] = self.args.no_object_weight

    def save(self) -> None:
        """Write a checkpoint; where that fails, the one before is kept."""
        step = self.progress.step
        shards = hidden_folder(self.args.output / f"checkpoint-{step:07d}", "parts")
        if self.is_sharded:  # every process writes its part
            self.accelerator.save_state(str(shards))
            self.accelerator.wait_for_everyone()

        def move_shards(folder: Path) -> None:
            for path in shards.iterdir():
                os.replace(path, folder / path.name)
            shards.rmdir()

        if self.is_main:
            with self._tolerate_failure("checkpoint"):
                save_checkpoint(self.args.output, step, self._parts(), move_shards if self.is_sharded else None)

    @contextlib.contextmanager
    def _tolerate_failure(self, what: str) -> Iterator[None]:
        """Report a disk that is full, and let training go on: there may be room again."""
        self.failures.pop(what, None)
        try:
            yield
        except WriteFailure as failure:
            self.failures[what] = str(failure)
            say(f"{failure}. What was there before is kept, and training goes on: make room.")

    # --- the loop ---

    def fit(self) -> None:
        """Train to the end, or until a signal.

        Raises:
            SystemExit: a signal ended it, a loss is not finite, or something could not be written to the end.
        """
        plan, args = self.plan, self.args
        step = self.progress.step
        self.log = Log(args.output / LOG, lambda row: is_before(row, step)) if self.is_main else None
        self.model.train()
        with self.stop:
            if step and self._is_due(plan.eval_every):  # a checkpoint is written before its step's validation
                self.validate()
            self.started, self.paused, self.first_step = time.monotonic(), 0.0, step
            batches = iter(self._loader())
            bar = tqdm(total=plan.steps, initial=step, unit="step", mininterval=5, disable=not self.is_main)
            with bar:
                while self.progress.step < plan.steps:
                    row = self.train_step(list(itertools.islice(batches, args.gradient_accumulation_steps)))
                    bar.set_postfix(row, refresh=False)
                    bar.update()
                    done = time.monotonic()
                    if self._is_due(plan.save_every) or self._is_due(plan.eval_every) or self.stops:
                        self.save()
                    if self.stops:
                        self._end_early()
                    if self._is_due(plan.eval_every):
                        self.validate()
                    self.paused += time.monotonic() - done
        self.accelerator.wait_for_everyone()
        if self.failures:
            raise SystemExit(f"{'; '.join(self.failures.values())}. Make room, and go on with --resume.")

    def _loader(self) -> Any:
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

    def _is_due(self, every: int) -> bool:
        return self.progress.step % every == 0 or self.progress.step == self.plan.steps

    def _end_early(self) -> None:
        """End the run after a signal, once the step is done and saved."""
        checkpoint = find_checkpoint(self.args.output)
        where = "nothing was saved" if checkpoint is None else f"go on from step {step_of(checkpoint)} with --resume"
        if self.is_main:
            say(f"Stopped by a signal after step {self.progress.step} of {self.plan.steps}: {where}.")
        raise SystemExit(self.stop.exit_code)

    def train_step(self, batches: list[dict[str, Any]]) -> dict[str, float]:
        """Do one step of the optimizer; return what the log got, if a row was due."""
        accelerator, progress = self.accelerator, self.progress
        seed = self.args.seed * 1_000_003 + progress.step + 1
        set_seed(seed * accelerator.num_processes + accelerator.process_index)  # drop path, where the backbone has it
        self.optimizer.zero_grad()
        terms = self.backward(batches, seed)
        # One exchange a step: is the loss a number everywhere, and did a process get a signal?
        signals = torch.tensor([0.0, float(self.stop.received is not None)], device=accelerator.device)
        signals[0] = terms["loss"]
        total, stops = (accelerator.reduce(signals, "sum") if accelerator.num_processes > 1 else signals).tolist()
        if not np.isfinite(total):
            self._refuse(batches, terms, "The loss")
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.plan.recipe.max_grad_norm)
        terms["gradient_norm"] = torch.zeros_like(terms["loss"]) if norm is None else whole_tensor(norm)
        if accelerator.scaler is None and not torch.isfinite(terms["gradient_norm"]):  # a scaler skips such steps
            self._refuse(batches, terms, "The gradient")
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update(self.plain_model)
        progress.step += 1
        self.stops = stops > 0
        terms["steps"] = torch.ones_like(terms["loss"])
        progress.sums = {name: progress.sums.get(name, 0) + value.detach() for name, value in terms.items()}
        return self.write_row() if self._is_due(self.args.log_every) else {}

    def backward(self, batches: list[dict[str, Any]], seed: int) -> dict[str, torch.Tensor]:
        """Add up the gradients of the batches' losses to those of one large batch; return the loss and its terms."""
        criterion = self.plain_model.criterion
        sums: dict[str, torch.Tensor] = {}
        for index, (batch, share) in enumerate(zip(batches, self._shares(batches), strict=True)):
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

    def _shares(self, batches: list[dict[str, Any]]) -> list[LossShare]:
        """Return what each batch counts for in the step."""
        if len(batches) == 1:
            return [LossShare(1.0, 1.0)]
        labels = [batch["class_labels"] for batch in batches]
        model, accelerator = self.plain_model, self.accelerator
        return get_loss_shares(
            labels,
            model.config.num_queries,
            model.criterion.empty_weight,
            lambda totals: accelerator.reduce(totals.to(accelerator.device), "mean"),
        )

    def _refuse(self, batches: list[dict[str, Any]], terms: Mapping[str, torch.Tensor], what: str) -> None:
        """End a run whose loss is no number before its weights are spoilt, and keep the images for inspection."""
        step, rank = self.progress.step + 1, self.accelerator.process_index
        path = self.args.output / f"bad-batch-step{step:07d}-process{rank}.pt"
        values = {name: float(value) for name, value in terms.items()}
        saved = f"as the model saw them: {path}"
        try:
            with as_write_failure("the model's inputs"):
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
        """Log means since the last row, speed, memory and time left; return what the progress bar shows."""
        progress, plan = self.progress, self.plan
        means = {name: float(value) for name, value in self.accelerator.reduce(progress.sums, "mean").items()}
        count = means.pop("steps")
        progress.sums = {}
        row = {name: round(value / count, 5) for name, value in means.items()}
        seconds, steps = time.monotonic() - self.started, progress.step - self.first_step
        speed = {
            "images_per_second": round(steps * plan.images_per_step / (seconds - self.paused), 2),
            "memory_gb": round(memory_used() / 1e9, 2),
            "minutes_left": round((plan.steps - progress.step) * seconds / steps / 60, 1),
        }
        self._record({"learning_rate": self.schedule.get_last_lr()[-1], **row, **speed})
        return {name: row[name] for name in ("loss", *LOSSES)} | speed

    def _record(self, row: Mapping[str, Any]) -> None:
        """Add a row to the log and the trackers."""
        self.accelerator.log(dict(row), step=self.progress.step)
        if self.log is not None:
            with self._tolerate_failure("log"):
                self.log.write({"step": self.progress.step, **row})

    # --- validation ---

    def validate(self) -> None:
        """Measure, draw, and keep the model if it is the best so far."""
        args, task = self.args, self.data.task
        with contextlib.nullcontext() if self.average is None else self.average.applied(self.plain_model):
            model = self.model if self.is_sharded else self.plain_model
            result, picture = evaluate(
                model, self.processor, self.data, args.batch_size, self.accelerator, self._end_if_stopped
            )
            row = summarize(result, task)
            self._record(row)
            figure = row[MAIN_FIGURE[task]]
            # The main process decides: it alone knows whether an earlier one could be written.
            is_best = broadcast_object_list([figure > self.progress.best])[0]
            if self.is_main:
                better = ", the best so far" if is_best else f"; the best was step {self.progress.best_step}"
                say(f"step {self.progress.step}: {in_words(row)}{better}")
                path = args.output / PICTURE.format(self.progress.step)
                with self._tolerate_failure("pictures"), as_write_failure(f"Pictures in {path.parent}"):
                    path.parent.mkdir(exist_ok=True)
                    picture.save(path, quality=90)
            if is_best:
                self._keep(figure)

    def _keep(self, figure: float) -> None:
        """Write the model into `best/`; only then it is the best."""
        weights = self.accelerator.get_state_dict(self.model) if self.is_sharded else None
        if self.is_main:
            with self._tolerate_failure("best"):
                save_model(self.plain_model, self.processor, self.args.output / BEST, weights)
                self.progress.best, self.progress.best_step = figure, self.progress.step

    def _end_if_stopped(self) -> None:
        """End a validation after a signal: its step is saved."""
        if self.stop.received is not None:
            self._end_early()


def whole_tensor(norm: Any) -> torch.Tensor:
    """Return a norm as a plain tensor; FSDP's is spread over the processes."""
    return torch.as_tensor(norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float()


def is_before(row: Mapping[str, Any], step: int) -> bool:
    """Return whether a run that goes on from `step` keeps a row of the log; that step's validation is repeated."""
    return row["step"] < step or (row["step"] == step and "loss" in row)


def memory_used() -> int:
    """Return the most bytes in use so far, on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
