"""A whole run: data, model and plan from the options, then training, measuring or the choice of thresholds."""

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers.utils import logging


try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError as error:
    raise ImportError("Training needs Accelerate: pip install 'm2f_hf[train]'") from error
from .arguments import FinetuningArguments
from .checkpoints import find_checkpoint, save_model, step_of, tidy
from .interruptions import advise_on_oom, exit_with_message
from .plan import Data, choose_precision, make_plan, open_data
from .report import BEST, claim_repository, draw_samples, publish, say, write_card
from .start import Start, load_start, prepare_for_training
from .trainer import Trainer
from .validation import choose_thresholds, evaluate, is_sharded


def finetune(args: FinetuningArguments, data: Data | None = None, start: Start | None = None) -> None:
    """Train a model, or measure it or choose its thresholds, as the options say.

    Args:
        args: the options.
        data: your own; default: what `args.dataset` names.
        start: your own model and processor, with the data's classes; default: as `args` say.

    Raises:
        SystemExit: with a message, where data, model or options do not fit; with a shell's status after a signal.
    """
    logging.disable_progress_bar()  # of weights loaded and saved, between the lines of the run's own
    with advise_on_oom():
        with exit_with_message():
            checkpoint = check_output(args)
            precision, why = choose_precision(args.mixed_precision)
            accelerator = Accelerator(mixed_precision=precision, log_with=args.report_to, project_dir=str(args.output))
            check_distribution(args, accelerator)
            data = data or open_data(args, accelerator.is_main_process)
            if accelerator.is_main_process:
                say(f"{data.report}\n")
            model, processor, note = start or load_start(args, data)
        if args.eval_only or args.choose_thresholds:
            _measure(args, data, model.to(accelerator.device), processor, accelerator)
            return
        repo_id = claim_repository(args) if args.push_to_hub and accelerator.is_main_process else None
        with exit_with_message():
            plan = make_plan(args, data, processor, accelerator.num_processes)
        lines = [f"start: {note}", why, *plan.lines, *prepare_for_training(model, args, data)]
        args.output.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            tidy(args.output)
            say("\n".join(lines))
            if args.resume:
                say("no checkpoint yet: from the beginning" if checkpoint is None else f"going on from {checkpoint}")
            if args.inspect:
                draw_samples(args, data, plan.recipe)
        accelerator.init_trackers("m2f_hf", config=plan.settings(args))
        trainer = Trainer(args, plan, data, model, processor, accelerator)
        if checkpoint is not None:
            with exit_with_message():
                trainer.resume(checkpoint)
        trainer.fit()
        if accelerator.is_main_process:
            write_card(trainer, repo_id or args.output.resolve().name)
            best, how = args.output / BEST, "track clip.mp4" if data.is_video else "segment photo.jpg"
            say(f"Done. The best checkpoint, of step {trainer.progress.best_step}, is {best}: m2f {how} --model {best}")
            if repo_id is not None:
                publish(best, repo_id, args.hub_private)
        accelerator.end_training()


def check_output(args: FinetuningArguments) -> Path | None:
    """Return the checkpoint to go on from, None to begin.

    Raises:
        ValueError: the folder cannot be written, or holds a run that must not be written over.
    """
    output = args.output
    try:
        with tempfile.TemporaryFile(dir=next(path for path in (output, *output.parents) if path.exists())):
            pass
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written ({error.strerror}): name another folder") from error
    checkpoint = find_checkpoint(output)
    if args.eval_only:
        return None
    if checkpoint is not None and not args.resume and not args.choose_thresholds:
        raise ValueError(
            f"{output} holds a run that is at step {step_of(checkpoint)}: go on with --resume, or give another "
            "--output."
        )
    if (checkpoint is None or args.choose_thresholds) and (output / BEST).exists():
        raise ValueError(
            f"{output} holds the best model of an earlier run, which would be written over: give another --output."
        )
    return checkpoint


def check_distribution(args: FinetuningArguments, accelerator: Accelerator) -> None:
    """Set up how `accelerate` treats accumulated batches.

    Raises:
        ValueError: options that this distribution does not have.
    """
    if is_sharded(accelerator) and args.ema is not None:
        raise ValueError("--ema needs the whole model in every process: use DDP (examples/accelerate/ddp.yaml).")
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        accelerator.gradient_accumulation_steps = 1  # here losses are weighted with their shares, not divided
    elif args.gradient_accumulation_steps > 1:
        raise ValueError("DeepSpeed steps after every batch: leave out --gradient_accumulation_steps, or use DDP.")


def _measure(args: FinetuningArguments, data: Data, model: Any, processor: Any, accelerator: Accelerator) -> None:
    """Print the figures, or choose thresholds and save the model with them."""
    if args.eval_only:
        result, _ = evaluate(model, processor, data, args.batch_size, accelerator)
        if accelerator.is_main_process:
            print(json.dumps(result, indent=2))
        return
    with exit_with_message():
        print(choose_thresholds(model, processor, data, args.batch_size))
    save_model(model, processor, args.output / BEST)
