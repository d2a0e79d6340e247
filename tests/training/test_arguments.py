"""Options from a command line, a file or Python; what is refused; `m2f train` without any."""

import json
import sys
from pathlib import Path

import pytest
from runs import SHAPES, arguments_of, save_small_model, train

from m2f_hf import BUNDLED_MODEL, BUNDLED_VIDEO_MODEL
from m2f_hf.cli import main as m2f
from m2f_hf.data import CATEGORIES, ShapesDataset, write_coco_panoptic
from m2f_hf.data.synthetic.shapes import TEST_SEED
from m2f_hf.training import FinetuningArguments


def test_options_come_from_a_command_line_a_file_or_python(tmp_path):
    expected = FinetuningArguments("photos", model="owner/name", learning_rate=5e-4, batch_size=2, resume=True)
    assert expected.output == Path("runs/photos")
    line = ["--model", "owner/name", "--learning_rate", "5e-4", "--batch-size", 2, "--resume"]
    assert arguments_of("--dataset", "photos", *line) == arguments_of("photos", *line) == expected
    (tmp_path / "run.yaml").write_text(
        "dataset: photos\nmodel: owner/name\nlearning_rate: 5e-4\nbatch_size: 8\nresume: true\nema: null\n"
    )
    fields = {"dataset": "photos", "model": "owner/name", "learning_rate": 5e-4, "batch_size": 8, "streaming": False}
    (tmp_path / "run.json").write_text(json.dumps(fields))
    assert arguments_of(tmp_path / "run.yaml", "--batch_size", 2) == expected
    assert arguments_of(tmp_path / "run.json", "--batch_size", 2, "--resume") == expected
    # An annotation file is a data set.
    (tmp_path / "instances.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    args = arguments_of(tmp_path / "instances.json")
    assert args.dataset == str(tmp_path / "instances.json") and args.output == Path("runs/instances")


def test_without_a_start_the_bundled_model_of_the_task_is_taken():
    assert FinetuningArguments("x").start_model("semantic") == str(BUNDLED_MODEL)
    assert FinetuningArguments("x").start_model("video") == str(BUNDLED_VIDEO_MODEL)
    assert FinetuningArguments("x", model="owner/name").start_model("video") == "owner/name"
    assert FinetuningArguments("x", backbone="owner/name").start_model("video") is None


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        arguments_of(*arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_arguments_that_contradict_each_other_are_refused(tmp_path, config, capsys):
    for arguments, message in (
        ([*SHAPES, "--config", config, "--eval_only"], "need --model"),
        ([*SHAPES, "--config", config, "--seed", TEST_SEED], "take another"),
        ([*SHAPES, "--model", "x", "--eval_only", "--push_to_hub"], "`m2f push` sends a folder"),
        ([*SHAPES, "--model", "x", "--config", config], "give --model, or else"),
        ([*SHAPES, "--config", tmp_path / "none.json"], "there is no file"),
        ([*SHAPES, "--config", config, "--steps", 0], "--steps is 1 or more"),
        ([*SHAPES, "--config", config, "--eval_scenes", 0], "--eval_scenes is 1 or more"),
        ([*SHAPES, "--config", config, "--learning_rate", "nan"], "--learning_rate is a number from 0 on"),
        ([*SHAPES, "--config", config, "--sizes", "0:100"], "multiples of 32"),
        ([*SHAPES, "--config", config, "--report_to", "comet_ml"], "it is not installed"),
        ([*SHAPES, "--report_to", "paper"], "--report_to paper: choose from"),
        ([*SHAPES, "--schedule", "linear"], "choose from"),
        ([*SHAPES, "--stepps", 3], "unrecognized arguments: --stepps"),
        (["--steps", 3], "required: --dataset"),
    ):
        assert message in refused(capsys, *arguments), arguments
    with pytest.raises(ValueError, match="--schedule linear: choose from multistep, poly, cosine"):
        FinetuningArguments("shapes", schedule="linear")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset: x\nsteps: many\n", "--steps: invalid int value: 'many'"),
        ("dataset: x\nstepps: 3\n", "--stepps=3"),
        ("dataset: [x\n", "run.yaml cannot be read"),
    ],
)
def test_a_file_with_wrong_options_is_refused(text, message, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert message in refused(capsys, tmp_path / "run.yaml")


def test_a_folder_that_cannot_be_the_output_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit, match=r"taken cannot be written .*: name another folder"):
        train(*SHAPES, "--output", tmp_path / "taken")
    (tmp_path / "run" / "best").mkdir(parents=True)
    with pytest.raises(SystemExit, match="would be written over: give another --output"):
        train(*SHAPES, "--model", "nowhere", "--choose_thresholds", "--output", tmp_path / "run")


def test_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "m2f_hf.training.run")
    assert m2f(["train", "my-data"]) == 2
    assert "pip install 'm2f_hf[train]'" in capsys.readouterr().err


def test_the_command_needs_a_data_set_alone(tmp_path, monkeypatch, capsys):
    """All of it as a person would type it, but for the number of steps and a smaller model for the bundled one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("m2f_hf.training.arguments.BUNDLED_MODEL", save_small_model(tmp_path / "bundled"))
    write_coco_panoptic(ShapesDataset(3, 64), tmp_path / "my-data", CATEGORIES)
    assert m2f(["train", "my-data", "--steps", "2", "--batch_size", "1"]) == 0
    words = capsys.readouterr().err
    assert "no --model was given: the bundled one knows generated shapes only" in words
    assert "m2f segment photo.jpg --model runs/my-data/best" in words
    evaluate = ["evaluate", "my-data", "--model", "runs/my-data/best", "--output", "measured", "--worst", "0"]
    assert m2f([*evaluate, "--task", "semantic"]) == 0
    assert (tmp_path / "measured" / "results.md").is_file()
    assert m2f([*evaluate[:3], "nowhere", *evaluate[4:]]) == 2
    assert "nowhere is neither a folder with a checkpoint nor on the Hub" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        m2f(["train", "--help"])
    assert "usage: m2f train" in capsys.readouterr().out
