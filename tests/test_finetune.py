"""The training script: resume, several processes, folders, evaluation; with a model of a few thousand parameters."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from m2f_hf.data import CATEGORIES, ShapesDataset, write_coco_panoptic


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import finetune
import plot_learning_curve


EXAMPLES = Path(finetune.__file__).parent

BACKBONE = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
SMALL = {
    "backbone_config": BACKBONE,
    "feature_size": 32,
    "mask_feature_size": 16,
    "hidden_dim": 16,
    "encoder_feedforward_dim": 16,
    "dim_feedforward": 16,
    "encoder_layers": 1,
    "decoder_layers": 4,  # one layer for each scale: with fewer a scale's projection has no gradient
    "num_attention_heads": 2,
    "num_queries": 12,
    "train_num_points": 64,
}
COMMON = ["--image_size", "64", "--num_workers", "0", "--log_every", "1", "--eval_scenes", "3"]
COMMON += ["--learning_rate", "1e-3", "--warmup_steps", "1"]


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return path


def run(output: Path, *arguments: object) -> list[dict]:
    """Train in this process and return the rows of the log."""
    finetune.main([*COMMON, "--output", str(output), *map(str, arguments)])
    return read_log(output)


def read_log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path, config, monkeypatch):
    arguments = ["--dataset", "shapes", "--config", config, "--batch_size", 2, "--steps", 4, "--save_every", 2]
    whole = run(tmp_path / "whole", *arguments)
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 4]
    assert len({row["loss"] for row in whole[:4]}) == 4

    save = finetune.save_checkpoint

    def save_and_be_interrupted(output, state):
        save(output, state)
        finetune.Log(output / "training_log.jsonl", 99, True).write({"step": 3, "loss": -1.0})  # a step past the save
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "save_checkpoint", save_and_be_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", *arguments)
    monkeypatch.undo()
    parts = run(tmp_path / "parts", *arguments, "--resume")
    assert parts == whole
    weights = [load_file(tmp_path / name / "best" / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint*")] == ["checkpoint-0000004"]


def test_two_processes_have_the_loss_of_one_with_the_same_global_batch(tmp_path, config):
    """Three steps through `accelerate launch`, without `find_unused_parameters`, on the same points.

    The backbone's batch norms are frozen: their statistics are those of a process's own half of the batch.
    """
    config.write_text(json.dumps({**SMALL, "freeze_backbone_norm": True}))
    arguments = ["--dataset", "shapes", "--config", config, "--steps", 3]
    one = run(tmp_path / "one", *arguments, "--batch_size", 4)
    # By itself `accelerate launch --cpu` starts further processes through MPI only, hence one launch for each.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_port", free_port()]
    command += [EXAMPLES / "finetune.py", *COMMON, "--output", tmp_path / "two", *arguments, "--batch_size", "2"]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            list(map(str, command)),
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    two = read_log(tmp_path / "two")
    assert [row["step"] for row in two] == [row["step"] for row in one] == [1, 2, 3, 3]
    for single, double in zip(one, two, strict=True):
        assert single == pytest.approx(double, rel=1e-4, abs=1e-5)


def test_fine_tunes_on_a_folder_and_measures_what_it_saved(tmp_path, config, capsys):
    """From a checkpoint with other classes, on two of the seven categories' worth of ids that the folder lists."""
    run(tmp_path / "first", "--dataset", "shapes", "--config", config, "--batch_size", 1, "--steps", 1)
    folder = tmp_path / "folder"
    extended = [*CATEGORIES, {"id": 7, "name": "sky", "isthing": 0, "color": [0, 0, 0]}]
    for seed, name in enumerate(("train", "validation")):
        write_coco_panoptic(ShapesDataset(3, 64, seed=seed), folder / name, extended)
    start = ["--dataset", folder, "--model"]
    rows = run(tmp_path / "second", *start, tmp_path / "first" / "best", "--batch_size", 2, "--steps", 2)
    saved = tmp_path / "second" / "best"
    settings = json.loads((saved / "config.json").read_text())
    assert settings["id2label"]["7"] == "sky" and len(settings["id2label"]) == 8
    assert json.loads((saved / "preprocessor_config.json").read_text())["label_ids_to_fuse"] == [4, 5, 6, 7]

    capsys.readouterr()
    finetune.main([*COMMON, "--output", str(tmp_path / "third"), *map(str, [*start, saved]), "--eval_only"])
    measured = json.loads(capsys.readouterr().out)
    assert finetune.summarize(measured) == {k: v for k, v in rows[-1].items() if k != "step"}


def test_splits_with_other_categories_are_refused(tmp_path, config):
    for seed, name in enumerate(("train", "validation")):
        categories = CATEGORIES if seed == 0 else [*CATEGORIES[:-1], {**CATEGORIES[-1], "name": "lawn"}]
        write_coco_panoptic(ShapesDataset(1, 64, seed=seed), tmp_path / "data" / name, categories)
    with pytest.raises(ValueError, match="validation differ"):
        run(tmp_path / "run", "--dataset", tmp_path / "data", "--config", config, "--steps", 1)


def test_thresholds_are_chosen_among_those_offered_and_saved(tmp_path, config, capsys):
    run(tmp_path / "run", "--dataset", "shapes", "--config", config, "--batch_size", 1, "--steps", 1)
    arguments = ["--dataset", "shapes", "--model", tmp_path / "run" / "best", "--choose_thresholds"]
    finetune.main([*COMMON, "--output", str(tmp_path / "chosen"), *map(str, arguments)])
    settings = json.loads((tmp_path / "chosen" / "best" / "preprocessor_config.json").read_text())
    for name, values in finetune.THRESHOLDS.items():
        assert settings[name] in values
    assert f"'threshold': {settings['threshold']}" in capsys.readouterr().out


def test_positions_of_the_stream_depend_on_the_seed_alone():
    """Each epoch shows every item once, in an order of its own; reading out of order changes nothing."""
    dataset = ShapesDataset(5, 32)
    stream, other = finetune.TrainingStream(dataset, seed=1), finetune.TrainingStream(dataset, seed=1)
    epochs = [[stream[position]["image_id"] for position in range(start, start + 5)] for start in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    for position in (12, 3, 7):
        assert other[position]["image_id"] == epochs[position // 5][position % 5]
        assert other[position]["image"].tobytes() == stream[position]["image"].tobytes()
        assert (other[position]["segmentation_map"] == stream[position]["segmentation_map"]).all()


def test_processes_share_each_global_batch():
    """Two processes' positions, step by step, are those of one with the batch of both."""
    one = list(finetune.StepSampler(3, 6, 4, 0, 1))
    first, second = (list(finetune.StepSampler(3, 6, 2, process, 2)) for process in range(2))
    assert (
        [a + b for a, b in zip(first, second, strict=True)]
        == one
        == [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]]
    )


def test_arguments_that_contradict_each_other_are_refused(tmp_path, config, capsys):
    for arguments, message in (
        (["--dataset", "shapes", "--config", config, "--eval_only"], "need --model"),
        (["--dataset", "shapes", "--config", config, "--seed", finetune.TEST_SEED], "take another"),
        (["--dataset", "shapes", "--model", "x", "--eval_only", "--push_to_hub"], "`m2f push` sends a folder"),
    ):
        with pytest.raises(SystemExit):
            finetune.main(["--output", str(tmp_path / "run"), *map(str, arguments)])
        assert message in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="without --resume"):
        run(tmp_path / "run", "--dataset", "shapes", "--config", config, "--resume")


def test_the_no_object_weight_can_change_on_the_way(tmp_path, config):
    arguments = ["--dataset", "shapes", "--config", config, "--batch_size", 1, "--save_every", 1]
    run(tmp_path / "run", *arguments, "--steps", 1)
    saved = tmp_path / "run" / "best"
    assert json.loads((saved / "config.json").read_text())["no_object_weight"] == 0.1
    state = finetune.load_checkpoint(tmp_path / "run")
    state["best"] = -1.0  # so that the second part is saved, whatever it scores
    finetune.save_checkpoint(tmp_path / "run", state)
    run(tmp_path / "run", *arguments, "--steps", 2, "--resume", "--no_object_weight", 0.4)
    assert json.loads((saved / "config.json").read_text())["no_object_weight"] == 0.4
    weight = load_file(saved / "model.safetensors")["criterion.empty_weight"]
    assert weight.tolist() == pytest.approx([1.0] * 7 + [0.4])


def test_the_learning_curve_is_drawn(tmp_path):
    rows = [{"step": step, **dict.fromkeys(plot_learning_curve.LOSSES, 1 / step)} for step in range(1, 5)]
    rows += [{"step": step, **dict.fromkeys(plot_learning_curve.QUALITIES, step / 5)} for step in (2, 4)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages, starts = plot_learning_curve.read_stages([tmp_path / "log.jsonl"] * 3)
    assert sorted({row["step"] for row in stages}) == list(range(1, 13)) and starts == [4, 8]
    plot_learning_curve.main(
        ["--log", *[str(tmp_path / "log.jsonl")] * 2, "--output", str(tmp_path / "docs" / "curve.png")]
    )
    with Image.open(tmp_path / "docs" / "curve.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50, "an empty frame has few colours"
