"""The options of a fine-tuning run: a dataclass, for `parse_options` or for Python."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import RECIPES, VIDEO_RECIPES, SizeSchedule
from ..data.clips import FRAME_RANGE, NUM_FRAMES
from ..data.synthetic.by_name import GENERATED
from ..data.synthetic.shapes import TEST_SEED, VALIDATION_SEED
from ..known.bundled import BUNDLED_MODEL, BUNDLED_VIDEO_MODEL
from ..known.label_sets import LABEL_SETS
from ..metrics import MEASURES
from ..metrics.options import check_options, option


_AT_LEAST_ONE = [
    *("num_queries", "train_num_points", "eval_scenes", "image_size", "video_length", "num_frames", "frame_range"),
    *("steps", "batch_size", "gradient_accumulation_steps", "log_every", "eval_every", "save_every"),
]


@dataclass
class FinetuningArguments:
    """What a run is asked to do. What is None is chosen from the data and the checkpoint: see `make_plan`.

    Raises:
        ValueError: options that contradict each other or are out of range.
    """

    # --- data ---
    dataset: str = option(help=f"folder, annotation file, name on the Hub, {' or '.join(GENERATED)}")
    task: str | None = option(None, "default: what the annotations are made for", choices=list(MEASURES))
    validation: str | None = option(None, "another folder or file to validate on")
    held_out: float = option(0.1, "share to validate on, where there is no such split")
    labels: str | None = option(None, f"file with class names, or one of {', '.join(LABEL_SETS)}")
    streaming: bool = option(False, "read a Hub data set without downloading it first")
    image_size: int = option(160, "side of generated scenes")
    eval_scenes: int | None = option(None, "unseen scenes (200) or videos (60) of generated data")
    video_length: int = option(16, "frames of generated videos")

    # --- start ---
    model: str | None = option(None, "folder or Hub id of the model to start from; default: the bundled model")
    backbone: str | None = option(None, "folder or Hub id of a backbone to start from, the rest being new")
    config: Path | None = option(None, "JSON of `Mask2FormerConfig`, to start from scratch")
    num_queries: int | None = option(None, "most segments found in an image; another number starts with new queries")
    train_num_points: int | None = option(None, "at which masks are compared; small objects need more")
    freeze_backbone: bool = option(False, "keep the backbone's weights as they are")

    # --- samples ---
    recipe: str | None = option(
        None, "default: by the data set", choices=["default", "plain", "whole", *RECIPES, *VIDEO_RECIPES]
    )
    input_size: int | None = option(None, "shortest side that images are resized to (default: --model's)")
    sizes: str | None = option(None, 'growing sizes of samples over training, such as "0:256,0.5:384,0.8:512"')
    num_frames: int = option(NUM_FRAMES, "of a video, that make a training clip")
    frame_range: int = option(FRAME_RANGE, "how far from a random frame the others of a clip may be")
    inspect: int = option(0, "draw samples of N images to samples.jpg", metavar="N")

    # --- steps: what is not given comes from the recipe, the batch and the data ---
    steps: int | None = option(None, "how many")
    batch_size: int = option(4, "images or clips per process")
    gradient_accumulation_steps: int = option(1, "batches that make one step")
    learning_rate: float | None = option(None, "of the decoders, at its peak")
    backbone_multiplier: float | None = option(None, "of the learning rate")
    weight_decay: float | None = option(None, "of AdamW; norms, embeddings and position tables have none")
    max_grad_norm: float | None = option(None, "of all parameters together; longer gradients are shortened to it")
    schedule: str | None = option(None, "of the learning rate", choices=["multistep", "poly", "cosine"])
    warmup_steps: int | None = option(None, "in which the learning rate rises")
    no_object_weight: float | None = option(None, "of the class loss, from here on (default: the model's)")
    ema: float | None = option(None, "validate and keep averaged weights, such as 0.999", metavar="DECAY")
    seed: int = option(0, "of everything random")

    # --- hardware ---
    mixed_precision: str | None = option(None, "default: bf16 on GPUs that have it", choices=["no", "fp16", "bf16"])
    gradient_checkpointing: bool = option(False, "less memory, a third more time")
    compile: bool = option(False, "torch.compile the model")
    num_workers: int | None = option(None, "processes per process that make samples")

    # --- run ---
    output: Path = option(None, "folder of the run; default: runs/NAME_OF_DATASET")
    resume: bool = option(False, "go on from the last checkpoint in --output, if any")
    log_every: int = option(20, "steps")
    eval_every: int | None = option(None, "steps")
    save_every: int | None = option(None, "steps")
    report_to: str | None = option(None, "tracker to send the log to: tensorboard, wandb, …")
    eval_only: bool = option(False, "measure --model on the validation data")
    choose_thresholds: bool = option(False, "choose --model's thresholds, save to --output")

    # --- Hub ---
    push_to_hub: bool = option(False, "publish what the run kept, with a model card")
    hub_model_id: str | None = option(None, "owner/name on the Hub (default: the name of --output, in your account)")
    hub_private: bool = option(False, "make the repository a private one")
    hub_license: str | None = option(None, 'of the weights, as the Hub names it: "apache-2.0", "cc-by-nc-4.0", …')

    def __post_init__(self) -> None:
        if self.output is None:
            data = Path(self.dataset).resolve()
            self.output = Path("runs") / (data.stem if data.is_file() else data.name)
        self.output, self.config = Path(self.output), None if self.config is None else Path(self.config)
        check_options(self, _AT_LEAST_ONE)
        if self.model is not None and self.is_new:
            raise ValueError("give --model, or else --backbone or --config (or both of these)")
        if self.push_to_hub and (self.eval_only or self.choose_thresholds):
            raise ValueError("--push_to_hub is for training; `m2f push` sends a folder")
        if (self.eval_only or self.choose_thresholds) and self.model is None:
            raise ValueError("--eval_only and --choose_thresholds need --model")
        if self.dataset in GENERATED and self.seed in (VALIDATION_SEED, TEST_SEED):
            raise ValueError(f"--seed {self.seed} is that of the unseen scenes: take another")
        if self.config is not None and not self.config.is_file():
            raise ValueError(f"--config: there is no file {self.config}")
        if self.learning_rate is not None and not 0 <= self.learning_rate < float("inf"):
            raise ValueError("--learning_rate is a number from 0 on")
        if self.sizes is not None:
            try:
                SizeSchedule.parse(self.sizes)
            except ValueError as error:
                raise ValueError(f"--sizes: {error}") from error
        if self.report_to is not None:
            _check_tracker(self.report_to)

    @property
    def is_new(self) -> bool:
        """Whether the decoders are new, to be learnt from a backbone or from nothing."""
        return self.backbone is not None or self.config is not None

    def start_model(self, task: str) -> str | None:
        """Return the checkpoint to start from, by default the bundled one; None for a new model."""
        if self.model is not None or self.is_new:
            return self.model
        return str(BUNDLED_VIDEO_MODEL if task == "video" else BUNDLED_MODEL)

    def given(self, *names: str) -> dict[str, Any]:
        """Return those of these options that are not None."""
        return {name: getattr(self, name) for name in names if getattr(self, name, None) is not None}


def _check_tracker(name: str) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in map(str, LOGGER_TYPE_TO_CLASS):
        raise ValueError(f"--report_to {name}: choose from {', '.join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))}")
    if name not in map(str, get_available_trackers()):
        raise ValueError(f"--report_to {name}: it is not installed (pip install {name})")
