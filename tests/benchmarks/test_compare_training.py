"""The comparison of our training with that of transformers' model: equal starts and inputs, resumption, figures."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from m2f_hf.data import ShapesDataset
from m2f_hf.training.checkpoints import read_log
from m2f_hf.training.optimization import get_parameter_groups


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import compare_training


SMALL = {
    "backbone_config": {
        "model_type": "resnet",
        "layer_type": "basic",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 8, 8],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "feature_size": 32,
    "mask_feature_size": 16,
    "hidden_dim": 16,
    "encoder_feedforward_dim": 16,
    "dim_feedforward": 16,
    "encoder_layers": 1,
    "decoder_layers": 4,
    "num_attention_heads": 2,
    "num_queries": 12,
    "train_num_points": 64,
}
COMMON = ["--image_size", "64", "--batch_size", "2", "--steps", "4", "--evaluate_every", "2", "--log_every", "1"]
COMMON += ["--scenes", "3", "--warmup_steps", "1"]


@pytest.fixture(autouse=True)
def one_thread():
    """Sums depend on the number of threads in their last digits; the script takes one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return path


def train(output: Path, config: Path, implementation: str, *arguments: object) -> list[dict]:
    """A run in this process; the rows of its log."""
    compare_training.main(arguments_of(output, config, implementation, *arguments))
    return read_log(output / f"{implementation}-seed0" / "log.jsonl")


def arguments_of(output: Path, config: Path, implementation: str, *arguments: object) -> list[str]:
    values = ["--output", output, "--config", config, "--implementation", implementation, *COMMON, *arguments]
    return [str(value) for value in values]


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.endswith("_seconds")} for row in rows]


def test_both_start_with_the_same_outputs_on_the_same_inputs_and_learn_at_the_same_rates(tmp_path, config):
    start = compare_training.initial_weights(tmp_path, config, seed=0)
    models = [kind.from_pretrained(start).eval() for kind in compare_training.IMPLEMENTATIONS.values()]
    batch = compare_training.make_batch(ShapesDataset(4, 64), 1, 2, compare_training.processor_for(64))
    with torch.no_grad():
        theirs, ours = (model(pixel_values=batch["pixel_values"]) for model in models)
    assert type(models[0]).__module__.startswith("transformers.") and type(models[1]).__module__.startswith("m2f_hf.")
    for name in ("class_queries_logits", "masks_queries_logits"):
        assert torch.allclose(theirs[name], ours[name], atol=1e-4), name
    names = [
        [(group["lr"], group["weight_decay"], sorted(group["names"])) for group in get_parameter_groups(model)]
        for model in models
    ]
    assert sorted(names[0]) == sorted(names[1])


def test_initial_weights_are_drawn_once_and_by_seed(tmp_path, config):
    first = compare_training.initial_weights(tmp_path, config, seed=0)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert compare_training.initial_weights(tmp_path, config, seed=0) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    again = compare_training.initial_weights(tmp_path / "again", config, seed=0)
    other = compare_training.initial_weights(tmp_path, config, seed=1)
    content = [(folder / "model.safetensors").read_bytes() for folder in (first, again, other)]
    assert content[0] == content[1] != content[2]
    assert not list(tmp_path.glob(".start.*"))


def test_inputs_are_those_of_transformers_own_processor(tmp_path):
    scenes = ShapesDataset(4, 64, seed=3)
    batch = compare_training.make_batch(scenes, 1, 2, compare_training.processor_for(64))
    theirs = transformers.Mask2FormerImageProcessorPil(do_resize=False, ignore_index=None)
    for place in range(2):
        item = scenes[2 + place]
        classes = {info["id"]: info["category_id"] for info in item["segments_info"]}
        expected = theirs(
            [item["image"]],
            segmentation_maps=[item["segmentation_map"]],
            instance_id_to_semantic_id=[classes],
            return_tensors="pt",
        )
        assert torch.allclose(batch["pixel_values"][place], expected["pixel_values"][0], atol=1e-5)
        assert torch.equal(batch["pixel_mask"][place], expected["pixel_mask"][0])
        for name in ("mask_labels", "class_labels"):
            assert batch[name][place].dtype == expected[name][0].dtype
            assert torch.equal(batch[name][place], expected[name][0])


def test_a_loop_written_down_plainly_has_the_same_losses(tmp_path, config):
    """Transformers' model, three lines of PyTorch: what the log says of its run."""
    rows = train(tmp_path, config, "transformers", "--learning_rate", "1e-3", "--max_grad_norm", "0.5")
    model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "start-seed0").train()
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        is_norm = parameter.ndim == 1 and ("norm" in name or ".1." in name)  # GroupNorms lie behind convolutions
        is_embedding = any(part in name for part in ("queries_", "transformer_module.level_embed"))
        (others if is_norm or is_embedding else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    scenes, processor = ShapesDataset(8, 64), compare_training.processor_for(64)
    losses = []
    for step in range(4):
        for group in optimizer.param_groups:  # warmed up over one step, then half a cosine wave
            group["lr"] = 1e-3 * min(1, (step + 1) / 2) * 0.5 * (1 + np.cos(np.pi * step / 4))
        torch.manual_seed(step + 1)
        loss = model(**compare_training.make_batch(scenes, step, 2, processor)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("implementation", list(compare_training.IMPLEMENTATIONS))
def test_an_interrupted_run_goes_on_and_a_finished_one_stays(tmp_path, config, implementation, monkeypatch):
    whole = train(tmp_path / "whole", config, implementation)
    assert [row["step"] for row in whole if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in whole if "m2f_hf" in row] == [2, 4]
    assert all(np.isfinite(row[name]) for row in whole if "loss" in row for name in compare_training.LOSSES)

    train_step = compare_training.Run.train_step

    def told_to_stop(run):
        train_step(run)
        if run.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(compare_training.Run, "train_step", told_to_stop)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "parts", config, implementation)
    assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.setattr(compare_training.Run, "train_step", train_step)
    before = read_log(tmp_path / "parts" / f"{implementation}-seed0" / "log.jsonl")
    rows = train(tmp_path / "parts", config, implementation)
    assert rows[: len(before)] == before and len(before) == len(whole) - 2
    assert without_times(rows) == without_times(whole)
    seconds = [row["training_seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[-1] > before[-1]["training_seconds"]

    monkeypatch.delattr(compare_training.Run, "train_step")
    assert train(tmp_path / "parts", config, implementation) == rows


def test_other_settings_are_refused(tmp_path, config):
    train(tmp_path, config, "m2f_hf")
    with pytest.raises(SystemExit, match=r"other settings \(learning_rate\)"):
        train(tmp_path, config, "m2f_hf", "--learning_rate", "1")
    config.write_text(json.dumps({**SMALL, "num_queries": 13}))
    with pytest.raises(SystemExit, match=r"other settings \(model\)"):
        train(tmp_path, config, "m2f_hf")


def write_log(folder: Path, implementation: str, seed: int, qualities: list[float], seconds: float) -> None:
    path = folder / f"{implementation}-seed{seed}" / "log.jsonl"
    path.parent.mkdir(parents=True)
    rows = []
    for step, quality in enumerate(qualities, start=1):
        figures = {"pq_all": quality, "pq_things": quality / 2, "pq_stuff": 1.0}
        other = {name: value / 10 for name, value in figures.items()}
        both = {"transformers": other, "m2f_hf": other} | {implementation: figures}
        rows.append({"step": step * 50, "training_seconds": step * seconds, **both})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_table_and_picture(tmp_path, capsys):
    for seed, (theirs, ours) in enumerate(((120.0, 60.0), (120.0, 84.0))):
        write_log(tmp_path, "transformers", seed, [0.2, 0.4 + 0.1 * seed], theirs)
        write_log(tmp_path, "m2f_hf", seed, [0.3, 0.6 + 0.1 * seed], ours)
    compare_training.main(["--output", str(tmp_path), "--plot", str(tmp_path / "docs" / "curve.png")])
    printed = capsys.readouterr().out.splitlines()
    assert "| transformers | 1 | 100 | 0.500 | 0.250 | 1.000 | 0.050 | 4.0 | 2.40 |" in printed
    assert "| **m2f_hf** | mean | 100 | 0.650 | 0.325 | 1.000 | 0.650 | 2.4 | 1.44 |" in printed
    assert printed[-1] == "CPU time, m2f_hf / transformers: 0.60 of the means; by seed: 0.50, 0.70"
    with Image.open(tmp_path / "docs" / "curve.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10


def test_nothing_to_compare_is_said(tmp_path):
    write_log(tmp_path, "m2f_hf", 0, [0.5], 60.0)
    with pytest.raises(SystemExit, match="no evaluated run"):
        compare_training.main(["--output", str(tmp_path), "--plot", str(tmp_path / "curve.png")])
