"""Train Mask2Former on a panoptic dataset, from scratch or from a checkpoint, on one or several processes.

    python examples/finetune.py --dataset shapes --config examples/shapes_panoptic.json --output runs/shapes
    accelerate launch examples/finetune.py --dataset path/to/folder --model path/or/hub/id --output runs/mine

`--dataset` is "shapes", generated scenes, or a folder with `train/` and `validation/` in COCO's panoptic form (see
`m2f_hf.data.write_coco_panoptic`). A run that was interrupted goes on with `--resume`, exactly as if it had not been:
what a step draws depends on the seed and the step alone.
"""

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub import HfApi
from PIL import ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from m2f_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from m2f_hf.cli import Segmenter
from m2f_hf.data import CATEGORIES, CocoPanopticDataset, ShapesDataset
from m2f_hf.hub import CARD, Figure, HubFolder, model_card
from m2f_hf.image_processing_mask2former import Mask2FormerImageProcessor
from m2f_hf.metrics import PanopticEvaluation, evaluate_model
from m2f_hf.optimization import get_parameter_groups, get_schedule
from m2f_hf.point_sampling import SeededPoints
from m2f_hf.visualization import draw_segments


VALIDATION_SEED = 1_000_001
TEST_SEED = 2_000_003
"""Seeds of the generated scenes that training never sees: to choose thresholds by, and to report."""
THRESHOLDS = {"threshold": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "overlap_mask_area_threshold": (0.5, 0.65, 0.8)}
CHECKPOINT = "checkpoint-{:07d}"


# --- data ---


class TrainingStream(Dataset[dict[str, Any]]):
    """An endless sequence of training items: each epoch a new permutation, each item flipped or not.

    Position p gives the same item in every run with the same seed, whatever the number of processes.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
        item = self.dataset[int(self._order[offset])]
        if np.random.default_rng((self.seed, epoch, offset)).random() < 0.5:
            item["image"] = ImageOps.mirror(item["image"])
            item["segmentation_map"] = np.ascontiguousarray(item["segmentation_map"][:, ::-1])
        return item


class StepSampler(Sampler[list[int]]):
    """Positions of this process's part of each global batch, from step `first` to `last` (exclusive)."""

    def __init__(self, first: int, last: int, batch_size: int, process: int, num_processes: int) -> None:
        self.first, self.last = first, last
        self.batch_size, self.process, self.num_processes = batch_size, process, num_processes

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            start = (step * self.num_processes + self.process) * self.batch_size
            yield list(range(start, start + self.batch_size))


class Collate:
    """A list of items -> the model's inputs, and the items themselves where `keep_items`."""

    def __init__(self, processor: Any, keep_items: bool) -> None:
        self.processor, self.keep_items = processor, keep_items

    def __call__(self, items: list[dict[str, Any]]) -> Any:
        images = [item["image"] for item in items]
        if self.keep_items:
            return self.processor(images, return_tensors="pt"), items
        return self.processor(
            images,
            segmentation_maps=[item["segmentation_map"] for item in items],
            segments_info=[item["segments_info"] for item in items],
            return_tensors="pt",
        )


def open_datasets(args: argparse.Namespace) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Datasets to train on and to evaluate on, and their categories."""
    if args.dataset == "shapes":
        seed = TEST_SEED if args.eval_only else VALIDATION_SEED
        train = ShapesDataset(1_000_000, args.image_size, seed=args.seed)
        return train, ShapesDataset(args.eval_scenes, args.image_size, seed=seed), CATEGORIES
    folder = Path(args.dataset)
    train, validation = CocoPanopticDataset(folder / "train"), CocoPanopticDataset(folder / "validation")
    if train.categories != validation.categories:
        raise ValueError(
            f"The categories of {folder / 'train'} and {folder / 'validation'} differ: give both panoptic.json "
            "the same list, in the same order."
        )
    return train, validation, train.categories


def unseen_batches(dataset: Any, processor: Any, args: argparse.Namespace, accelerator: Accelerator) -> DataLoader[Any]:
    """This process's share of the evaluation data, in batches."""
    share = torch.utils.data.Subset(dataset, range(accelerator.process_index, len(dataset), accelerator.num_processes))
    return DataLoader(share, batch_size=args.batch_size, collate_fn=Collate(processor, keep_items=True))


# --- model ---


def build(args: argparse.Namespace, categories: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Model and processor for the categories: from `--model`, or new from `--config` and maybe `--backbone`."""
    labels = {category["id"]: category["name"] for category in categories}
    names = {"id2label": labels, "label2id": {name: label for label, name in labels.items()}}
    stuff = [category["id"] for category in categories if not category["isthing"]]
    if args.model is not None:
        model = Mask2FormerForUniversalSegmentation.from_pretrained(args.model, ignore_mismatched_sizes=True, **names)
        processor = Mask2FormerImageProcessor.from_pretrained(args.model)
        if not args.eval_only:
            processor.label_ids_to_fuse = stuff
        if args.input_size is not None:
            processor.size = {"shortest_edge": args.input_size, "longest_edge": 2 * args.input_size}
        return model, processor
    settings = json.loads(args.config.read_text(encoding="utf-8"))
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**settings, **names))
    if args.backbone is not None:
        backbone = model.model.pixel_level_module.encoder
        # A deeper backbone will do: blocks that the config has no place for are left behind.
        pretrained = type(backbone).from_pretrained(args.backbone, config=backbone.config)
        backbone.load_state_dict(pretrained.state_dict())
    shortest = args.input_size or args.image_size
    size = {"shortest_edge": shortest, "longest_edge": 2 * shortest}
    return model, Mask2FormerImageProcessor(size=size, label_ids_to_fuse=stuff)


# --- checkpoints and log ---


def replace_folder(work: Path, target: Path) -> None:
    """Give a finished folder its name, in the place of an older one."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(work, target)
    shutil.rmtree(old, ignore_errors=True)


def save_model(model: Any, processor: Any, target: Path) -> None:
    """Write a folder for `from_pretrained`; it is whole or absent."""
    work = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    model.save_pretrained(work)
    processor.save_pretrained(work)
    replace_folder(work, target)


def save_checkpoint(output: Path, state: dict[str, Any]) -> None:
    """Write everything a run needs to go on, then remove the checkpoint before it."""
    target = output / CHECKPOINT.format(state["step"])
    work = target.with_name(f".{target.name}.tmp")
    work.mkdir(parents=True, exist_ok=True)
    torch.save(state, work / "state.pt")
    replace_folder(work, target)
    for older in output.glob("checkpoint-*"):
        if older != target:
            shutil.rmtree(older)


def load_checkpoint(output: Path) -> dict[str, Any]:
    """The last complete checkpoint of a run."""
    found = sorted(output.glob("checkpoint-*"))
    if not found:
        raise FileNotFoundError(f"No checkpoint in {output}: start the run without --resume.")
    return torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True)


class Log:
    """A JSONL file of training and evaluation rows; after a resume, rows of steps that are run again are dropped."""

    def __init__(self, path: Path, first_step: int, is_writer: bool) -> None:
        self.path, self.is_writer = path, is_writer
        if not is_writer:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if first_step and path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= first_step]
        work = path.with_suffix(".tmp")
        work.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(work, path)

    def write(self, row: dict[str, Any]) -> None:
        if not self.is_writer:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


# --- training and evaluation ---


def evaluate(
    model: Any,
    processor: Any,
    dataset: Any,
    categories: list[dict[str, Any]],
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """PQ, SQ, RQ and mIoU on `dataset`, over all processes."""
    evaluation = PanopticEvaluation(processor, categories)
    batches = unseen_batches(dataset, processor, args, accelerator)
    evaluate_model(accelerator.unwrap_model(model), batches, evaluation.update, accelerator.is_main_process)
    return evaluation.compute(lambda total: accelerator.reduce(total.to(accelerator.device), "sum"))


def summarize(result: dict[str, Any]) -> dict[str, float]:
    """The figures of an evaluation in one flat row."""
    row = {"mean_iou": round(result["mean_iou"]["mean_iou"], 4)}
    for group in ("all", "things", "stuff"):
        for key in ("pq", "sq", "rq"):
            row[f"{key}_{group}"] = round(result["panoptic_quality"][group][key], 4)
    return row


def choose_thresholds(
    model: Any, processor: Any, dataset: Any, categories: list[dict[str, Any]], args: argparse.Namespace
) -> None:
    """Give the processor the pair of `THRESHOLDS` with the best PQ on `dataset`. For one process."""
    pairs = [dict(zip(THRESHOLDS, values, strict=True)) for values in itertools.product(*THRESHOLDS.values())]
    evaluations = [PanopticEvaluation(processor, categories) for _ in pairs]

    def update(outputs: Any, items: Any) -> None:
        for pair, evaluation in zip(pairs, evaluations, strict=True):
            evaluation.update(outputs, items, **pair)

    batches = DataLoader(dataset, batch_size=args.batch_size, collate_fn=Collate(processor, keep_items=True))
    evaluate_model(model, batches, update)
    qualities = [evaluation.compute()["panoptic_quality"]["all"]["pq"] for evaluation in evaluations]
    best = int(np.argmax(qualities))
    for name, value in pairs[best].items():
        setattr(processor, name, value)
    print(f"thresholds {pairs[best]}: PQ {qualities[best]:.4f} on the scenes they were chosen by")


def train(
    model: Any,
    processor: Any,
    datasets: tuple[Any, Any],
    categories: list[dict[str, Any]],
    args: argparse.Namespace,
    accelerator: Accelerator,
) -> None:
    """The training loop, from the last checkpoint with `--resume`."""
    optimizer = torch.optim.AdamW(
        get_parameter_groups(model, args.learning_rate, args.weight_decay, args.backbone_multiplier)
    )
    schedule = get_schedule(optimizer, args.schedule, args.steps, args.warmup_steps)
    state: dict[str, Any] = {"step": 0, "best": -1.0}
    if args.resume:
        state = load_checkpoint(args.output)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    if args.no_object_weight is not None:
        model.config.no_object_weight = args.no_object_weight
        model.criterion.empty_weight[-1] = args.no_object_weight
    first, best = state["step"], state["best"]
    model, optimizer = accelerator.prepare(model, optimizer)
    criterion = accelerator.unwrap_model(model).criterion
    rank, processes = accelerator.process_index, accelerator.num_processes
    batches = DataLoader(
        TrainingStream(datasets[0], args.seed),
        batch_sampler=StepSampler(first, args.steps, args.batch_size, rank, processes),
        collate_fn=Collate(processor, keep_items=False),
        num_workers=args.num_workers,
    )
    log = Log(args.output / "training_log.jsonl", first, accelerator.is_main_process)
    progress = tqdm(
        batches, initial=first, total=args.steps, unit="step", mininterval=5, disable=not accelerator.is_main_process
    )
    model.train()
    sums: dict[str, torch.Tensor] = {}
    for step, batch in enumerate(progress, start=first + 1):
        set_seed(args.seed * 1_000_003 + step * processes + rank)  # drop path, where the backbone has it
        criterion.draw_points = SeededPoints(args.seed * 1_000_003 + step, first_image=rank * args.batch_size)
        outputs = model(
            pixel_values=batch["pixel_values"].to(accelerator.device),
            pixel_mask=batch["pixel_mask"].to(accelerator.device),
            mask_labels=[masks.to(accelerator.device) for masks in batch["mask_labels"]],
            class_labels=[labels.to(accelerator.device) for labels in batch["class_labels"]],
        )
        optimizer.zero_grad()
        accelerator.backward(outputs.loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()

        terms = {"loss": outputs.loss, "gradient_norm": norm, "steps": torch.ones((), device=accelerator.device)}
        terms |= {name: outputs.loss_dict[name] for name in ("loss_cross_entropy", "loss_mask", "loss_dice")}
        sums = {name: sums.get(name, 0) + value.detach() for name, value in terms.items()}
        if step % args.log_every == 0 or step == args.steps:
            means = {name: float(value) for name, value in accelerator.reduce(sums, "mean").items()}
            count, sums = means.pop("steps"), {}
            row = {name: round(value / count, 5) for name, value in means.items()}
            progress.set_postfix(row, refresh=False)
            log.write({"step": step, "learning_rate": schedule.get_last_lr()[-1], **row})
        if step % args.eval_every == 0 or step == args.steps:
            row = summarize(evaluate(model, processor, datasets[1], categories, args, accelerator))
            log.write({"step": step, **row})
            progress.write(f"step {step}: {json.dumps(row)}")
            if row["pq_all"] > best:
                best = row["pq_all"]
                if accelerator.is_main_process:
                    save_model(accelerator.unwrap_model(model), processor, args.output / "best")
        if (step % args.save_every == 0 or step == args.steps) and accelerator.is_main_process:
            parts = {"model": accelerator.unwrap_model(model), "optimizer": optimizer, "schedule": schedule}
            states = {name: part.state_dict() for name, part in parts.items()}
            save_checkpoint(args.output, {"step": step, "best": best, **states})
    accelerator.wait_for_everyone()


# --- to the Hub ---


FIGURES = {"pq_all": ("panoptic", "PQ"), "pq_things": ("panoptic", "PQ things"), "pq_stuff": ("panoptic", "PQ stuff")}
FIGURES |= {"mean_iou": ("semantic", "mIoU")}
SETTINGS = ("steps", "batch_size", "learning_rate", "backbone_multiplier", "weight_decay", "max_grad_norm", "schedule")
SETTINGS += ("warmup_steps", "seed")


def measured(args: argparse.Namespace) -> tuple[int, list[Figure]]:
    """The step that was kept, and what the run measured of it; in percent, as the field gives them."""
    lines = (args.output / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "pq_all" in row]
    best = max(rows, key=lambda row: row["pq_all"])
    name = "generated shapes" if args.dataset == "shapes" else Path(args.dataset).resolve().name
    source = "the training run, which chose its step by them"
    return best["step"], [
        Figure(task, name, "validation", metric, round(100 * best[key], 2), source)
        for key, (task, metric) in FIGURES.items()
    ]


def describe_run(args: argparse.Namespace, num_processes: int, repo_id: str, picture: Any) -> None:
    """Put a card and an example picture beside the weights that the run kept."""
    best = args.output / "best"
    step, figures = measured(args)
    segmenter = Segmenter.load(str(best), task=None, threshold=None, device=None, dtype="float32")
    config = segmenter.model.config
    segmentation, segments_info = segmenter(picture)
    scale = max(1, 480 // picture.width)
    overlay = draw_segments(picture, segmentation, segments_info, colors=config.label_colors, scale=scale)
    overlay.save(best / "example.jpg", quality=90)
    is_local = args.model is not None and Path(args.model).exists()
    start = Path(args.model).name if is_local else args.model or "scratch"
    if args.backbone is not None:
        start += f", backbone {Path(args.backbone).name}"
    training = {"start": start, "data": figures[0].dataset, "kept step": step, "processes": num_processes}
    card = model_card(
        config,
        segmenter.processor,
        repo_id=repo_id,
        base_model=None if is_local else args.model,
        license=args.hub_license,
        figures=figures,
        training={**training, **{name: getattr(args, name) for name in SETTINGS}},
        example_image="example.jpg",
    )
    card.save(best / CARD)


def publish(args: argparse.Namespace, num_processes: int, repo_id: str, picture: Any) -> None:
    """Send what the run kept, with its card; where that fails, it can be sent later."""
    describe_run(args, num_processes, repo_id, picture)
    try:
        commit = HubFolder(args.output / "best").push(repo_id, private=args.hub_private or None)
    except Exception:
        print(f"The model is in {args.output / 'best'}; to publish it: m2f push {args.output / 'best'} {repo_id}")
        raise
    print(f"{commit.repo_url} is at {commit.oid[:8]}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help='"shapes", or a folder with train/ and validation/')
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", help="folder or Hub id of the model to start from")
    start.add_argument("--config", type=Path, help="JSON of `Mask2FormerConfig`, to start from scratch")
    parser.add_argument("--backbone", help="with --config: folder of a backbone to start from")
    parser.add_argument("--image_size", type=int, default=160, help="side of generated scenes")
    parser.add_argument(
        "--input_size", type=int, help="shortest side that images are resized to (default: --model's, or --image_size)"
    )
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch_size", type=int, default=16, help="images per process")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--backbone_multiplier", type=float, default=0.1)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--no_object_weight", type=float, help="of the class loss, from here on (default: the model's)")
    parser.add_argument("--max_grad_norm", type=float, default=0.01)
    parser.add_argument("--schedule", choices=["multistep", "poly", "cosine"], default="poly")
    parser.add_argument("--warmup_steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--log_every", type=int, default=20)
    parser.add_argument("--eval_every", type=int, default=500)
    parser.add_argument("--eval_scenes", type=int, default=200, help="unseen scenes of --dataset shapes")
    parser.add_argument("--save_every", type=int, default=200)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--eval_only", action="store_true", help="measure --model on unseen scenes")
    parser.add_argument(
        "--choose_thresholds", action="store_true", help="choose --model's thresholds, save to --output"
    )
    parser.add_argument("--push_to_hub", action="store_true", help="publish what the run kept, with a model card")
    parser.add_argument("--hub_model_id", help="owner/name on the Hub (default: the name of --output, in your account)")
    parser.add_argument("--hub_private", action="store_true", help="make the repository a private one")
    parser.add_argument("--hub_license", help='of the weights, as the Hub names it: "apache-2.0", "cc-by-nc-4.0", …')
    args = parser.parse_args(arguments)
    if args.push_to_hub and (args.eval_only or args.choose_thresholds):
        parser.error("--push_to_hub is for training; `m2f push` sends a folder")
    if (args.eval_only or args.choose_thresholds) and args.model is None:
        parser.error("--eval_only and --choose_thresholds need --model")
    if args.dataset == "shapes" and args.seed in (VALIDATION_SEED, TEST_SEED):
        parser.error(f"--seed {args.seed} is that of the unseen scenes: take another")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    accelerator = Accelerator()
    set_seed(args.seed)
    train_data, unseen, categories = open_datasets(args)
    model, processor = build(args, categories)
    args.output.mkdir(parents=True, exist_ok=True)
    repo_id = None
    if args.push_to_hub and accelerator.is_main_process:  # what the Hub refuses, it refuses before the training
        name = args.hub_model_id or args.output.resolve().name
        api = HfApi()
        api.whoami()
        repo_id = api.create_repo(name, private=args.hub_private or None, exist_ok=True).repo_id
    if args.eval_only:
        model = accelerator.prepare(model)
        result = evaluate(model, processor, unseen, categories, args, accelerator)
        if accelerator.is_main_process:
            print(json.dumps(result, indent=2))
    elif args.choose_thresholds:
        choose_thresholds(model.to(accelerator.device), processor, unseen, categories, args)
        save_model(model, processor, args.output / "best")
    else:
        train(model, processor, (train_data, unseen), categories, args, accelerator)
        if repo_id is not None:
            publish(args, accelerator.num_processes, repo_id, unseen[0]["image"])
    accelerator.end_training()


if __name__ == "__main__":
    main()
