"""Runs with a model of a few thousand parameters: whatever splits a run leaves its losses as they are.

Split by interruptions, over accumulated batches, over processes. And: every task, what is chosen, what is refused.
"""

import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageOps
from runs import COMMON, FROZEN, SHAPES, SMALL, arguments_of, losses, rows_of, run, train, weights_of, write_config
from safetensors.torch import load_file
from transformers import pipeline
from two_processes import run_two

from m2f_hf import BUNDLED_MODEL, M2FImageProcessor, Mask2FormerConfig, Mask2FormerForUniversalSegmentation
from m2f_hf.cli import main as m2f
from m2f_hf.data import CATEGORIES, ShapesDataset, open_dataset, write_coco_panoptic
from m2f_hf.data.augmentation import TrainingTransform
from m2f_hf.data.loading import CollateSamples, TrainingStream, to_model_inputs
from m2f_hf.known.recipes import default_recipe, get_recipe
from m2f_hf.metrics import Evaluation
from m2f_hf.processing.rle import encode_rle
from m2f_hf.training import trainer as trainer_module
from m2f_hf.training.checkpoints import (
    WriteFailure,
    find_checkpoint,
    step_of,
)
from m2f_hf.training.classes import set_classes
from m2f_hf.training.optimization import ExponentialMovingAverage
from m2f_hf.training.plan import Data, choose_precision, choose_recipe, make_plan, plain_recipe, whole_recipe
from m2f_hf.training.start import prepare_for_training
from m2f_hf.training.trainer import Trainer
from m2f_hf.training.validation import THRESHOLDS, in_words, summarize


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def refusal(capsys, *arguments: object) -> str:
    """What the script says when it ends instead of training."""
    with pytest.raises(SystemExit) as caught:
        train(*arguments)
    return f"{caught.value.code}\n{capsys.readouterr().err}"


# --- data sets in a folder ---


def write_panoptic(folder: Path, categories: list = CATEGORIES, num_images: int = 3) -> Path:
    for seed, name in enumerate(("train", "validation")):
        write_coco_panoptic(ShapesDataset(num_images, 64, seed=seed), folder / name, categories)
    return folder


def write_instances(folder: Path, num_images: int = 3, num_labelled: int = 3) -> Path:
    """COCO instance files; images from `num_labelled` on have no annotation."""
    names = [{"id": 10 + category["id"], "name": category["name"]} for category in CATEGORIES if category["isthing"]]
    for seed, split in enumerate(("train", "valid")):
        (folder / split).mkdir(parents=True)
        found: dict[str, list] = {"images": [], "annotations": [], "categories": names}
        for index in range(num_images):
            scene = ShapesDataset(num_images, 64, seed=seed)[index]
            scene["image"].save(folder / split / f"{index}.png")
            found["images"].append({"id": index, "file_name": f"{index}.png", "height": 64, "width": 64})
            for segment in scene["segments_info"] if index < num_labelled else []:
                if segment["category_id"] < 4:
                    mask = scene["segmentation_map"] == segment["id"]
                    found["annotations"].append(
                        {
                            "id": len(found["annotations"]) + 1,
                            "image_id": index,
                            "category_id": 10 + segment["category_id"],
                            "iscrowd": 0,
                            "area": int(mask.sum()),
                            "bbox": segment["bbox"],
                            "segmentation": encode_rle(mask),
                        }
                    )
        (folder / split / "_annotations.coco.json").write_text(json.dumps(found))
    return folder


def write_maps(folder: Path, num_images: int = 4) -> Path:
    """Images with label maps: ground 0, things 1."""
    for index in range(num_images):
        scene = ShapesDataset(num_images, 64)[index]
        things = [segment["id"] for segment in scene["segments_info"] if segment["category_id"] < 4]
        for name, image in (
            ("images", scene["image"]),
            ("masks", Image.fromarray(np.isin(scene["segmentation_map"], things).astype(np.uint8))),
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
            image.save(folder / name / f"{index}.png")
    (folder / "classes.txt").write_text("ground\nthing\n")
    return folder


# --- interruptions ---


INTERRUPTED = ["--batch_size", "2", "--gradient_accumulation_steps", "2", "--ema", "0.9", "--steps", "5"]
INTERRUPTED += ["--save_every", "3", "--log_every", "2", "--eval_every", "4", "--schedule", "cosine"]
"""Checkpoints fall between rows of the log, so that the sums of a row are split, too."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    write_config(folder / "config.json")
    rows = run(folder / "run", *SHAPES, "--config", folder / "config.json", *INTERRUPTED)
    assert [row["step"] for row in rows] == [2, 4, 4, 5, 5]
    assert len({row["loss"] for row in losses(rows)}) == 3
    return folder


def assert_same_run(whole: Path, parts: Path) -> None:
    """To the digit and to the bit."""
    assert rows_of(parts) == rows_of(whole / "run")
    expected, found = weights_of(whole / "run"), weights_of(parts)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    states = [torch.load(find_checkpoint(folder) / "state.pt", weights_only=True) for folder in (whole / "run", parts)]
    assert states[0].keys() == states[1].keys() == {"progress", "schedule", "model", "optimizer", "average"}
    for name in ("model", "optimizer", "schedule", "average"):
        assert_equal(states[1][name], states[0][name])


def assert_equal(found, expected) -> None:
    """States, nested as they are, tensors to the bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, (dict, list)):
        assert len(found) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            assert_equal(found[key], expected[key])
    else:
        assert found == expected


def test_a_killed_run_resumes_exactly(whole, tmp_path):
    """SIGKILL after step 4, when its row is in the log already; with a worker process, before and after."""
    killed_at_4 = """
import os, signal, finetune
from m2f_hf.training import Trainer
write = Trainer.write_row
def write_and_die(self):
    row = write(self)
    if self.progress.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return row
Trainer.write_row = write_and_die
finetune.main()
"""
    arguments = [*SHAPES, "--config", str(whole / "config.json"), *INTERRUPTED, "--num_workers", "1"]
    command = [sys.executable, "-c", killed_at_4, *COMMON, "--output", str(tmp_path / "run"), *arguments]
    paths = {"PYTHONPATH": os.pathsep.join((str(EXAMPLES.parent), str(EXAMPLES))), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, timeout=200)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-3000:]
    assert step_of(find_checkpoint(tmp_path / "run")) == 3
    assert rows_of(tmp_path / "run")[-1]["step"] == 4
    run(tmp_path / "run", *arguments, "--resume")
    assert_same_run(whole, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint*")] == ["checkpoint-0000005"]


@pytest.mark.parametrize("moment", ["step", "validation"])
def test_a_stopped_run_saves_and_resumes_exactly(whole, tmp_path, monkeypatch, capsys, moment):
    """SIGTERM in step 2, where no checkpoint was due: the step is finished. In a validation: it is repeated."""
    owner, name, step = {
        "step": (Trainer, "backward", 1),
        "validation": (Evaluation, "add", 4),
    }[moment]
    original = getattr(owner, name)
    current = []

    def remember(self, *arguments):
        current[:] = [self]
        return reset(self, *arguments)

    def stop(self, *arguments):
        if current[0].progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    reset = Trainer._loader
    monkeypatch.setattr(Trainer, "_loader", remember)
    monkeypatch.setattr(owner, name, stop)
    arguments = [*SHAPES, "--config", whole / "config.json", *INTERRUPTED]
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "run", *arguments)
    assert caught.value.code == 128 + signal.SIGTERM
    at = {"step": 2, "validation": 4}[moment]
    assert f"after step {at} of 5: go on from step {at} with --resume" in capsys.readouterr().err
    assert step_of(find_checkpoint(tmp_path / "run")) == at
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.undo()
    run(tmp_path / "run", *arguments, "--resume")
    assert_same_run(whole, tmp_path / "run")


def test_a_run_is_not_written_over(whole, tmp_path, capsys):
    arguments = [*SHAPES, "--config", whole / "config.json", "--steps", 9, "--batch_size", 1]
    message = refusal(capsys, *arguments, "--output", whole / "run")
    assert "is at step 5: go on with --resume, or give another" in message
    # Nor the model that is left when checkpoints have been removed.
    (tmp_path / "kept" / "best").mkdir(parents=True)
    for more in ([], ["--resume"]):
        assert "would be written over" in refusal(capsys, *arguments, *more, "--output", tmp_path / "kept")
    # Without a checkpoint, as after an interruption before the first one, --resume begins.
    run(tmp_path / "run", *arguments[:4], "--steps", 1, "--batch_size", 1, "--resume")
    assert "no checkpoint yet: from the beginning" in capsys.readouterr().err


def test_resuming_with_other_settings_warns(tmp_path, config, capsys):
    arguments = [*SHAPES, "--config", config, "--batch_size", 1]
    run(tmp_path / "run", *arguments, "--steps", 1)
    capsys.readouterr()
    run(tmp_path / "run", *arguments, "--steps", 2, "--resume", "--no_object_weight", 0.4)
    words = capsys.readouterr().err
    assert "warning: steps was 1 and is 2" in words and words.count("does not go on as") == 1
    assert torch.load(find_checkpoint(tmp_path / "run") / "state.pt", weights_only=True)["model"][
        "criterion.empty_weight"
    ].tolist() == pytest.approx([1.0] * 7 + [0.4])
    AcceleratorState._reset_state(reset_partial_state=True)
    run(tmp_path / "run", *arguments, "--steps", 3, "--resume", "--recipe", "default", "--mixed_precision", "bf16")
    words = capsys.readouterr().err
    for change in ("color_jitter was False and is True", "mixed_precision was no and is bf16"):
        assert f"warning: {change}: the run does not go on as it would have" in words
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "other settings: average" in refusal(
        capsys, *arguments, "--steps", 4, "--resume", "--ema", 0.9, "--output", tmp_path / "run"
    )


# --- what is on the disk ---


def test_a_full_disk_does_not_end_training(tmp_path, config, monkeypatch, capsys):
    save = torch.save
    full = [False, True, True]

    def save_until_full(state, path):
        if full.pop(0):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", save_until_full)
    arguments = [*SHAPES, "--config", config, "--batch_size", 1, "--steps", 3, "--save_every", 1, "--eval_every", 9]
    with pytest.raises(SystemExit, match=r"step 3 could not be written.*No space left.*go on with --resume"):
        run(tmp_path / "run", *arguments)
    assert "step 2 could not be written" in capsys.readouterr().err
    assert step_of(find_checkpoint(tmp_path / "run")) == 1
    assert [row["step"] for row in losses(rows_of(tmp_path / "run"))] == [1, 2, 3]


def test_the_best_is_the_best_that_could_be_written(tmp_path, config, monkeypatch, capsys):
    """The disk is full at the best validation: the next best is kept, and the card has its figures."""
    figures = iter([0.5, 0.9, 0.7])
    evaluate, save = trainer_module.evaluate, trainer_module.save_model

    def measure(*arguments):
        result, pictures = evaluate(*arguments)
        return {**result, "pq_all": next(figures)}, pictures

    def save_when_there_is_room(*arguments):
        if "step 2: PQ 90.0, " in capsys.readouterr().err:
            raise WriteFailure("best could not be written")
        save(*arguments)

    monkeypatch.setattr(trainer_module, "evaluate", measure)
    monkeypatch.setattr(trainer_module, "save_model", save_when_there_is_room)
    run(tmp_path / "run", *SHAPES, "--config", config, "--batch_size", 1, "--steps", 3, "--eval_every", 1)
    assert "The best checkpoint, of step 3, is" in capsys.readouterr().err
    card = (tmp_path / "run" / "best" / "README.md").read_text()
    assert "| kept step | 3 |" in card and "| PQ | 70.00 |" in card


def test_figures_that_do_not_exist_are_left_out():
    figures = {"ap": None, "ap50": 0.25, "ap_large": None, "per_class": {}}
    assert summarize(figures, "instance") == {"ap": 0.0, "ap50": 0.25}
    assert in_words({"ap": 0.0, "ap50": 0.25, "ar1": 0.5}) == "AP 0.0, AP50 25.0"


# --- splitting a batch ---


def test_accumulated_batches_equal_the_large_batch(tmp_path, config):
    write_config(config, FROZEN)
    arguments = [*SHAPES, "--config", config, "--steps", 3, "--max_grad_norm", 1, "--eval_every", 9]
    large = run(tmp_path / "large", *arguments, "--batch_size", 4)
    small = run(tmp_path / "small", *arguments, "--batch_size", 1, "--gradient_accumulation_steps", 4)
    assert [row["step"] for row in large] == [1, 2, 3, 3]
    for one, other in zip(losses(large), losses(small), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=2e-5)


def launch_two(arguments: list) -> None:
    """`accelerate launch` with two processes on the CPU.

    By itself `accelerate launch --cpu` starts further processes through MPI only, hence one launch for each.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    run_two(lambda port: [*command, "--main_process_port", port, EXAMPLES / "finetune.py", *arguments])


def test_two_processes_equal_one(tmp_path, config):
    """Without `find_unused_parameters`; two of the three images have no target, and three are validated on."""
    write_config(config, FROZEN)
    folder = write_instances(tmp_path / "data", num_images=3, num_labelled=1)
    arguments = [*COMMON, "--dataset", folder, "--config", config, "--steps", "3", "--recipe", "plain"]
    arguments += ["--input_size", "64", "--gradient_accumulation_steps", "2", "--eval_every", "9"]
    train(*arguments, "--output", tmp_path / "one", "--batch_size", 2)
    launch_two([*arguments, "--output", tmp_path / "two", "--batch_size", 1])
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["step"] for row in two] == [row["step"] for row in one] == [1, 2, 3, 3]
    assert all(row["loss_mask"] > 0 and row["gradient_norm"] > 0 for row in losses(one))
    for single, double in zip(one, two, strict=True):
        assert single == pytest.approx(double, rel=1e-4, abs=1e-5)


# --- queries ---


def test_more_queries_than_the_checkpoint_has(tmp_path, small_model, config, capsys):
    """Too few for the segments of an image are warned of. New ones are learnt; everything else is the checkpoint's."""
    folder = write_panoptic(tmp_path / "data")
    most = max(len(open_dataset(folder).train.annotation(index)["segments_info"]) for index in range(3))
    common = ["--dataset", folder, "--steps", 1]
    for name, start in (("model", small_model), ("config", config)):
        run(tmp_path / name, *common, f"--{name}", start, "--num_queries", most - 1)
        words = capsys.readouterr().err
        assert f"{most} segments" in words and f"--num_queries {2 * most}" in words
        run(tmp_path / f"{name}-more", *common, f"--{name}", start, "--num_queries", 2 * most + 1)
        assert "--num_queries" not in capsys.readouterr().err
        saved = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / f"{name}-more" / "best")
        assert saved.config.num_queries == 2 * most + 1
    learnt, start = weights_of(tmp_path / "model-more"), load_file(small_model / "model.safetensors")
    assert learnt.keys() == start.keys()
    changed = {name for name in start if learnt[name].shape != start[name].shape}
    assert {name.split(".")[-2] for name in changed} == {"queries_features", "queries_embedder"}


# --- tasks ---


TASKS = {"panoptic": (write_panoptic, "pq_all"), "instance": (write_instances, "ap"), "semantic": (write_maps, "miou")}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_ends_in_a_folder_that_works(tmp_path, small_model, task, capsys):
    """From a checkpoint, with nothing but data, model and output; the pipeline and the command line take the result."""
    write, figure = TASKS[task]
    folder = write(tmp_path / "data")
    arguments = ["--dataset", folder, "--model", small_model, "--steps", 2, "--batch_size", 2, "--eval_every", 2]
    rows = run(tmp_path / "run", *arguments)
    assert rows[-1][figure] >= 0.0 and rows[-1]["step"] == 2
    words = capsys.readouterr().err
    assert words.index(f"task:      {task}") < words.index("start: ") < words.index("recipe default")

    best = tmp_path / "run" / "best"
    processor = M2FImageProcessor.from_pretrained(best)
    assert processor.task == task
    assert processor.label_ids_to_fuse == ([4, 5, 6] if task == "panoptic" else None)
    names = [category["name"] for category in open_dataset(folder).categories]
    assert list(Mask2FormerConfig.from_pretrained(best).id2label.values()) == names
    card = (best / "README.md").read_text()
    assert f"| {task} | data | validation |" in card
    assert "| kept step | 2 |" in card
    picture = ShapesDataset(1, 64)[0]["image"]
    assert isinstance(pipeline("image-segmentation", model=str(best))(picture), list)
    picture.save(tmp_path / "photo.png")
    assert m2f(["segment", str(tmp_path / "photo.png"), "--model", str(best), "--output", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "run" / "predictions" / "step-0000002.jpg") as sheet:
        assert sheet.width > 3 * 400


def test_what_was_saved_scores_what_the_log_says(tmp_path, small_model, capsys):
    folder = write_panoptic(tmp_path / "data")
    arguments = ["--dataset", folder, "--batch_size", 2]
    rows = run(tmp_path / "run", *arguments, "--model", small_model, "--steps", 2, "--ema", 0.5)
    capsys.readouterr()
    best = tmp_path / "run" / "best"
    train(*COMMON, "--output", tmp_path / "again", *arguments, "--model", best, "--eval_only")
    measured = json.loads(capsys.readouterr().out)
    assert summarize(measured, "panoptic") == {name: value for name, value in rows[-1].items() if name != "step"}


def test_averaged_weights_are_what_is_kept(tmp_path, config):
    run(
        tmp_path / "run",
        *SHAPES,
        "--config",
        config,
        "--steps",
        1,
        "--batch_size",
        2,
        "--ema",
        0.9,
        "--warmup_steps",
        0,
    )
    state = torch.load(find_checkpoint(tmp_path / "run") / "state.pt", weights_only=True)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "run" / "best")
    kept, averages = model.state_dict(), ExponentialMovingAverage(model)
    averages.load_state_dict(state["average"])
    averages = averages.module.state_dict()
    assert all(torch.equal(kept[name], average) for name, average in averages.items())
    name = "class_predictor.weight"
    assert not torch.equal(state["model"][name], averages[name])


def test_a_frozen_backbone_does_not_change(tmp_path, small_model):
    arguments = [*SHAPES, "--model", small_model, "--steps", 1, "--batch_size", 2, "--warmup_steps", 0]
    run(tmp_path / "run", *arguments, "--freeze_backbone", "--gradient_checkpointing")
    before, after = load_file(small_model / "model.safetensors"), weights_of(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "class_predictor.weight" in changed
    assert not any(".encoder." in name and "pixel_level_module.encoder" in name for name in changed)


def test_half_precision_keeps_float32_weights(tmp_path, small_model):
    """Autocast on the CPU; the loss is that in float32 but for rounding, the weights are stored as before."""
    arguments = [*SHAPES, "--model", small_model, "--steps", 1, "--batch_size", 2]
    full = run(tmp_path / "full", *arguments)[0]
    AcceleratorState._reset_state(reset_partial_state=True)
    half = run(tmp_path / "half", *arguments, "--mixed_precision", "bf16")[0]
    assert half["loss"] != full["loss"] and half["loss"] == pytest.approx(full["loss"], rel=0.05)
    assert {weight.dtype for weight in weights_of(tmp_path / "half").values() if weight.is_floating_point()} == {
        torch.float32
    }


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed"])
def test_accelerate_reads_the_configurations(name):
    """That they are complete and without unknown fields; running them takes two GPUs."""
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(EXAMPLES / "accelerate" / f"{name}.yaml"))
    assert found.num_processes == 2 and found.mixed_precision == "bf16"
    kinds = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}
    assert str(found.distributed_type).endswith(kinds[name])
    if name == "fsdp":
        wrapped = found.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
        assert wrapped == Mask2FormerForUniversalSegmentation._no_split_modules


# --- classes of another data set ---


def test_a_new_head_takes_over_classes_by_name():
    model = Mask2FormerForUniversalSegmentation.from_pretrained(BUNDLED_MODEL)
    before = copy.deepcopy(model.class_predictor)
    names = ["star", "moon", "circle"]
    note = set_classes(model, [{"id": index, "name": name} for index, name in enumerate(names)])
    assert "3 classes instead of 7; taken over by name: star, circle (2); 1 are new" in note
    after = model.class_predictor
    for new, old in ((0, 3), (2, 0), (3, 7)):  # star, circle, no object
        assert torch.equal(after.weight[new], before.weight[old]) and torch.equal(after.bias[new], before.bias[old])
    assert not any(torch.equal(after.weight[1], row) for row in before.weight)
    assert model.config.num_labels == 3 and model.config.label2id == {"star": 0, "moon": 1, "circle": 2}
    assert model.config.label_colors is None
    assert model.criterion.empty_weight.tolist() == pytest.approx([1, 1, 1, model.config.no_object_weight])
    assert set_classes(model, [{"id": index, "name": name} for index, name in enumerate(names)]) == (
        "its 3 classes are the data set's"
    )


def test_other_class_names_give_a_new_head():
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**SMALL, id2label={0: "cat", 1: "dog"}))
    before = model.class_predictor
    note = set_classes(
        model, [{"id": 0, "name": "dog", "color": [1, 2, 3]}, {"id": 1, "name": "cow", "color": [4, 5, 6]}]
    )
    assert "taken over by name: dog (1); 1 are new" in note
    assert torch.equal(model.class_predictor.weight[0], before.weight[1])
    assert model.config.label_colors == [[1, 2, 3], [4, 5, 6]]


# --- when it goes wrong ---


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, small_model, monkeypatch, what):
    folder = write_panoptic(tmp_path / "data")
    calls = []

    def spoil(loss_dict, share):
        calls.append(None)
        if what == "gradient" and len(calls) == 3:
            next(iter(loss_dict.values())).register_hook(lambda gradient: gradient * float("inf"))
            return loss_dict
        return {name: loss * (float("nan") if len(calls) == 3 else 1.0) for name, loss in loss_dict.items()}

    monkeypatch.setattr(trainer_module, "scale_losses", spoil)
    arguments = ["--dataset", folder, "--model", small_model, "--steps", 4, "--batch_size", 2, "--save_every", 1]
    with pytest.raises(SystemExit) as caught:
        run(tmp_path / "run", *arguments, "--eval_every", 9)
    path = tmp_path / "run" / "bad-batch-step0000003-process0.pt"
    for words in (f"The {what} of step 3 is not finite", str(path), "checkpoint-0000002", "images/"):
        assert words in str(caught.value)
    saved = torch.load(path, weights_only=True)
    assert saved["step"] == 3 and len(saved["batches"][0]["file_names"]) == 2
    inputs = to_model_inputs(saved["batches"][0])
    assert inputs["mask_labels"][0].shape[1:] == inputs["pixel_values"].shape[2:]
    monkeypatch.undo()
    run(tmp_path / "run", *arguments, "--eval_every", 9, "--resume")  # the checkpoint was not touched
    assert [row["step"] for row in losses(rows_of(tmp_path / "run"))] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_running_out_of_memory_gives_advice(tmp_path, config, monkeypatch, error):
    def allocate(self, batches, seed):
        raise error

    monkeypatch.setattr(Trainer, "backward", allocate)
    with pytest.raises(SystemExit, match=r"Out of memory.*\n.*--batch_size.*--gradient_checkpointing"):
        run(tmp_path / "run", *SHAPES, "--config", config, "--steps", 1, "--batch_size", 1)


def test_other_errors_give_no_advice(tmp_path, config, monkeypatch):
    def fail(self, batches, seed):
        raise RuntimeError("another reason")

    monkeypatch.setattr(Trainer, "backward", fail)
    with pytest.raises(RuntimeError, match="another reason"):
        run(tmp_path / "run", *SHAPES, "--config", config, "--steps", 1, "--batch_size", 1)


def test_unusable_data_and_models_are_refused(tmp_path, small_model, config, capsys):
    other = write_panoptic(tmp_path / "panoptic")
    instances, maps = write_instances(tmp_path / "instances"), write_maps(tmp_path / "maps")
    (tmp_path / "broken").mkdir()
    other_classes = [*CATEGORIES[:-1], {**CATEGORIES[-1], "name": "lawn"}]
    write_coco_panoptic(ShapesDataset(1, 64), tmp_path / "differing" / "train", CATEGORIES)
    write_coco_panoptic(ShapesDataset(1, 64), tmp_path / "differing" / "validation", other_classes)
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(maps / "masks" / "0.png")
    for dataset, more, message in (
        (tmp_path / "absent", ["--model", small_model], "neither a folder or file nor the name"),
        (tmp_path / "broken", ["--model", small_model], "in a layout that is known"),
        (instances, ["--model", small_model, "--task", "panoptic"], "don't do for task='panoptic'"),
        (maps, ["--model", small_model, "--task", "instance"], "do not tell the objects of a class apart"),
        (maps, ["--model", small_model], "0.png"),
        (tmp_path / "differing", ["--model", small_model], "lawn"),
        ("shapes", ["--model", small_model, "--task", "semantic"], "for --task panoptic"),
        (other, ["--model", tmp_path / "no-model"], "no-model"),
        (instances, ["--model", small_model, "--eval_only"], "m2f evaluate finds them by name"),
        ("shapes", ["--config", config], "Give --steps"),
        (other, ["--model", small_model, "--recipe", "whole", "--sizes", "0:32,0.5:64"], "--recipe whole"),
    ):
        arguments = ["--dataset", dataset, *more, "--output", tmp_path / "run"]
        assert message in refusal(capsys, *arguments), arguments
        assert not (tmp_path / "run" / "training_log.jsonl").exists()


# --- what is chosen ---


def arguments_for(*arguments: object):
    return arguments_of("--dataset", "x", "--output", "y", *arguments)


def data_of(num_images: int, names: list[str], task: str = "panoptic"):
    categories = [{"id": index, "name": name, "isthing": None} for index, name in enumerate(names)]
    return Data(range(num_images), range(50), categories, task, "photos")


def test_recipes_are_chosen_by_data_and_options():
    from m2f_hf.known.label_sets import label_set

    cityscapes = list(label_set("cityscapes-panoptic").id2label.values())
    size = {"shortest_edge": 800, "longest_edge": 1333}
    args = arguments_for("--model", "m")
    assert choose_recipe(args, data_of(2975, cityscapes), size)[0] == get_recipe("cityscapes-panoptic")
    # Few images of known classes, and other classes.
    assert choose_recipe(args, data_of(20, cityscapes), size)[0] == default_recipe(size)
    assert choose_recipe(args, data_of(9999, ["a", "b"]), size)[0] == default_recipe(size)
    chosen = choose_recipe(arguments_for("--model", "m", "--recipe", "ade20k-semantic"), data_of(9, ["a"]), size)
    assert chosen[0] == get_recipe("ade20k-semantic")
    args = arguments_for("--model", "m", "--recipe", "coco-instance", "--schedule", "poly", "--max_grad_norm", 3)
    assert choose_recipe(args, data_of(9, ["a"]), size)[0] == replace(
        get_recipe("coco-instance"), schedule="poly", max_grad_norm=3.0
    )


def test_rate_and_steps_follow_batch_and_data():
    processor = M2FImageProcessor(size={"shortest_edge": 512, "longest_edge": 1024})
    args = arguments_for("--model", "m", "--batch_size", 2, "--gradient_accumulation_steps", 2)
    plan = make_plan(args, data_of(400, ["a"]), processor, num_processes=1)
    assert plan.images_per_step == 4
    assert plan.learning_rate == pytest.approx(1e-4 * (4 / 16) ** 0.5)
    assert plan.steps == 1000 * 20 / 4
    assert plan.eval_every == plan.steps // 20 and plan.save_every == 250
    text = "\n".join(plan.lines)
    assert "square root of 4/16" in text and "400 training images" in text and "warning" not in text
    short = make_plan(arguments_for("--model", "m", "--steps", 5), data_of(400, ["a"]), processor, 1)
    assert any("before the learning rate has risen" in line for line in short.lines)
    # From a backbone alone, with the original's recipe: as many images as the original saw.
    args = arguments_for("--backbone", "b", "--batch_size", 4, "--recipe", "ade20k-semantic")
    plan = make_plan(args, data_of(400, ["a"]), processor, num_processes=2)
    assert plan.steps == 2 * 160_000 and plan.recipe.schedule == "poly"


def test_precision_is_bf16_where_a_gpu_has_it(monkeypatch):
    assert choose_precision("fp16")[0] == "fp16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert choose_precision(None)[0] == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert choose_precision(None)[0] == "fp16"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_precision(None)[0] == "no"


def test_small_batches_freeze_pretrained_batch_norms():
    def prepared(*arguments):
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**SMALL))
        notes = prepare_for_training(model, arguments_for(*arguments), data_of(9, ["a"]))
        return model.config.freeze_backbone_norm, "".join(notes)

    is_frozen, notes = prepared("--model", "m", "--batch_size", 2)
    assert is_frozen and "too few" in notes
    assert prepared("--model", "m", "--batch_size", 8) == (False, "")
    is_frozen, notes = prepared("--config", EXAMPLES.parent / "benchmarks" / "shapes_panoptic.json", "--batch_size", 2)
    assert not is_frozen and "warning" in notes


def test_thresholds_are_chosen_and_saved(tmp_path, small_model, capsys):
    arguments = [*SHAPES, "--model", small_model, "--choose_thresholds", "--output", tmp_path / "chosen"]
    train(*COMMON, *arguments)
    settings = json.loads((tmp_path / "chosen" / "best" / "preprocessor_config.json").read_text())
    for name, values in THRESHOLDS.items():
        assert settings[name] in values
    assert f"'threshold': {settings['threshold']}" in capsys.readouterr().out


def test_samples_are_drawn_and_trackers_get_the_log(tmp_path, small_model, monkeypatch):
    """A tracker of our own in the place of one that would have to be installed."""
    from accelerate import tracking

    logged = []

    class Tracker(tracking.GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = False
        tracker = None

        def __init__(self, run_name, **arguments):
            super().__init__()

        def store_init_configuration(self, values):
            logged.append(values)

        def log(self, values, step, **arguments):
            logged.append((step, values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD])
    arguments = ["--dataset", write_panoptic(tmp_path / "data"), "--model", small_model, "--batch_size", 2]
    rows = run(tmp_path / "run", *arguments, "--steps", 1, "--inspect", 2, "--report_to", "tensorboard")
    assert logged[0]["steps"] == 1
    assert [step for step, _ in logged[1:]] == [1, 1]
    assert logged[1][1]["loss"] == rows[0]["loss"] and logged[2][1]["pq_all"] == rows[1]["pq_all"]
    with Image.open(tmp_path / "run" / "samples.jpg") as sheet:
        assert len(sheet.convert("RGB").getcolors(1 << 20)) > 1000


# --- samples ---


def test_plain_samples_are_what_the_processor_makes_of_an_image_mirrored_or_not():
    """So training and evaluation see images alike; the bundled checkpoint was trained on the processor's."""
    dataset = ShapesDataset(8, 64)
    processor = M2FImageProcessor(size={"shortest_edge": 96, "longest_edge": 192})
    samples = TrainingStream(dataset, TrainingTransform(plain_recipe(processor.size)), seed=1)
    batch = [samples[position] for position in range(8)]
    found = to_model_inputs(CollateSamples(processor)(batch))
    mirrored = set()
    for place, sample in enumerate(batch):
        item = dataset[int(sample["file_name"])]
        images = [item["image"], ImageOps.mirror(item["image"])]
        maps = [item["segmentation_map"], item["segmentation_map"][:, ::-1]]
        expected = processor(
            images, segmentation_maps=maps, segments_info=[item["segments_info"]] * 2, return_tensors="pt"
        )
        is_mirrored = torch.equal(found["pixel_values"][place], expected["pixel_values"][1])
        assert torch.equal(found["pixel_values"][place], expected["pixel_values"][int(is_mirrored)])
        assert torch.equal(found["mask_labels"][place], expected["mask_labels"][int(is_mirrored)])
        assert torch.equal(found["class_labels"][place], expected["class_labels"][int(is_mirrored)])
        mirrored.add(is_mirrored)
    assert mirrored == {True, False}


@pytest.mark.parametrize("size", [(60, 90), (90, 60)])
def test_whole_samples_are_what_evaluation_sees(size):
    """Images of either format, at the processor's size; nothing is random in them."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 3, (size[0] // 10, size[1] // 10)).repeat(10, axis=0).repeat(10, axis=1).astype(np.int32)
    item = {
        "image": Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)),
        "segmentation_map": ids,
        "segments_info": [{"id": 1, "category_id": 4, "iscrowd": 0}, {"id": 2, "category_id": 2, "iscrowd": 0}],
        "image_id": 0,
    }
    processor = M2FImageProcessor(size={"shortest_edge": 96, "longest_edge": 128})
    samples = TrainingStream([item], TrainingTransform(whole_recipe(processor.size)), seed=1)
    expected = processor(
        item["image"], segmentation_maps=ids, segments_info=[item["segments_info"]], return_tensors="pt"
    )
    for position in range(6):
        found = to_model_inputs(CollateSamples(processor)([samples[position]]))
        assert torch.equal(found["pixel_values"], expected["pixel_values"])
        assert torch.equal(found["mask_labels"][0], expected["mask_labels"][0])
        assert torch.equal(found["class_labels"][0], expected["class_labels"][0])
