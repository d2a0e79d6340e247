"""What a run leaves for people: samples, the card with its figures and an example, the repository on the Hub."""

import itertools
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi
from tqdm.auto import tqdm

from ..data import ClipTransform, TrainingTransform, inspect_augmentation, inspect_clips
from ..data.hub_datasets import StreamingDataset
from ..hub.card import CARD, Figure, model_card
from ..hub.push import HubFolder
from ..inference.segmenter import Segmenter
from ..known.recipes import Recipe
from ..metrics import MAIN_FIGURE
from ..metrics.results import card_figures
from .arguments import FinetuningArguments
from .checkpoints import read_log
from .plan import Data


BEST = "best"
LOG = "training_log.jsonl"
PICTURE = "predictions/step-{:07d}.jpg"


def say(text: str) -> None:
    """Print for the person at the terminal; standard output is for results."""
    tqdm.write(text, file=sys.stderr)


def transform_for(args: FinetuningArguments, data: Data, recipe: Recipe) -> Any:
    """Return what makes training samples of the data's items."""
    if data.is_video:
        return ClipTransform(recipe, args.num_frames, args.frame_range)
    return TrainingTransform(recipe)


def draw_samples(args: FinetuningArguments, data: Data, recipe: Recipe) -> None:
    """Draw augmented samples of `--inspect` images with their targets."""
    train = data.train
    items = list(itertools.islice(train, args.inspect)) if isinstance(train, StreamingDataset) else train
    indices = np.linspace(0, len(items) - 1, min(args.inspect, len(items))).round().astype(int).tolist()
    inspect: Any = inspect_clips if data.is_video else inspect_augmentation
    sheet = inspect(items, transform_for(args, data, recipe), data.categories, indices, seed=args.seed)
    sheet.save(args.output / "samples.jpg", quality=90)
    say(f"samples of {len(indices)} images are drawn in {args.output / 'samples.jpg'}")


def measured_figures(output: Path, data: Data, step: int) -> list[Figure]:
    """Return the figures that the run measured at the step that it kept, in percent."""
    rows = read_log(output / LOG)
    best = next(row for row in rows if row["step"] == step and MAIN_FIGURE[data.task] in row)
    source = "the training run, which chose its step by them"
    return card_figures(best, data.name, "validation", source, data.hub_id)


def write_card(trainer: Any, repo_id: str) -> None:
    """Put a card and an example picture next to the weights that the run kept."""
    args, data, step = trainer.args, trainer.data, trainer.progress.best_step
    best = args.output / BEST
    if data.is_video:
        shutil.copyfile(args.output / PICTURE.format(step), best / "example.jpg")
    else:
        image = data.validation[0]["image"]
        result = Segmenter.from_pretrained(best)(image)
        result.draw(scale=max(1, 480 // image.width)).save(best / "example.jpg", quality=90)
    name = args.start_model(data.task)
    is_local = name is not None and Path(name).exists()
    start = Path(name).name if name is not None and is_local else name or "scratch"
    if args.backbone is not None:
        start += f", backbone {Path(args.backbone).name}"
    settings = {"start": start, "data": data.name, "kept step": step}
    settings["processes"] = trainer.accelerator.num_processes
    card = model_card(
        trainer.plain_model.config,
        trainer.processor,
        repo_id=repo_id,
        base_model=None if is_local else name,
        datasets=[data.hub_id] if data.hub_id else [],
        license=args.hub_license,
        figures=measured_figures(args.output, data, step),
        training={**settings, **trainer.plan.settings(args)},
        example_image="example.jpg",
    )
    card.save(best / CARD)


def claim_repository(args: FinetuningArguments) -> str:
    """Make the repository on the Hub and return its id: what the Hub refuses, it refuses before the training."""
    api = HfApi()
    api.whoami()
    name = args.hub_model_id or args.output.resolve().name
    return api.create_repo(name, private=args.hub_private or None, exist_ok=True).repo_id


def publish(best: Path, repo_id: str, is_private: bool) -> None:
    """Send what the run kept, with its card; where that fails, the message says how to send it later."""
    try:
        commit = HubFolder(best).push(repo_id, private=is_private or None)
    except Exception:
        print(f"The model is in {best}; to publish it: m2f push {best} {repo_id}")
        raise
    print(f"{commit.repo_url} is at {commit.oid[:8]}")
