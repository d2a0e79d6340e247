"""Training on clips: what images have, resuming among it, with a model of a few thousand parameters."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import losses, rows_of, run, train, weights_of

from m2f_hf import Mask2FormerForVideoSegmentation, Mask2FormerVideoProcessor
from m2f_hf.data import MovingShapesDataset, write_youtube_vis
from m2f_hf.metrics.evaluate_dataset import EvaluationArguments, evaluate_dataset
from m2f_hf.training.checkpoints import find_checkpoint
from m2f_hf.training.trainer import Trainer


MOVING = ["--dataset", "moving_shapes", "--num_frames", "3", "--frame_range", "4", "--video_length", "6"]
MOVING += ["--eval_scenes", "2", "--schedule", "cosine"]


@pytest.fixture(scope="module")
def whole(small_model, tmp_path_factory) -> Path:
    """A run of three steps on moving shapes that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    rows = run(folder, *MOVING, "--model", small_model, "--batch_size", 2, "--steps", 3, "--inspect", 2)
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    return folder


def test_a_run_on_moving_shapes_gives_a_video_checkpoint(whole):
    rows = rows_of(whole)
    assert all(row["loss"] > 0 for row in losses(rows)) and {"ap", "ap50", "ar10"} <= rows[-1].keys()
    model = Mask2FormerForVideoSegmentation.from_pretrained(whole / "best")
    assert list(model.config.id2label.values()) == ["circle", "rectangle", "triangle", "star"]
    processor = Mask2FormerVideoProcessor.from_pretrained(whole / "best")
    assert processor.size["shortest_edge"] == 64 and processor.max_detections == 10
    assert processor.label_ids_to_fuse is None
    clip = list(MovingShapesDataset(1, 5, 64, seed=9)[0]["frames"])
    tracks = processor.post_process_video_instance_segmentation(model(**processor(clip, return_tensors="pt")))[0]
    assert tracks["segmentation"].shape[1:] == (5, 64, 64)
    fields = json.loads((whole / "best" / "config.json").read_text())
    assert fields["model_type"] == "m2f_video"
    card = (whole / "best" / "README.md").read_text()
    assert "Mask2FormerForVideoSegmentation" in card and "moving shapes" in card and "num_frames" in card
    assert "type: video-instance-segmentation" in card and "| instance | moving shapes |" in card
    pictures = [whole / "samples.jpg", whole / "predictions" / "step-0000003.jpg", whole / "best" / "example.jpg"]
    assert all(Image.open(path).width > 200 for path in pictures)


def test_an_interrupted_run_on_clips_resumes_exactly(whole, small_model, tmp_path, monkeypatch):
    """Stopped after the second of its steps; the clips, the points and the order are those of the whole run."""
    arguments = [*MOVING, "--model", small_model, "--batch_size", 2, "--steps", 3, "--save_every", 2]
    train_step = Trainer.train_step

    def stop_after_two(self, batches):
        if self.progress.step == 2:
            raise KeyboardInterrupt
        return train_step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", *arguments)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path / "run").name == "checkpoint-0000002"
    assert rows_of(whole) == run(tmp_path / "run", *arguments, "--resume")
    found, expected = weights_of(tmp_path / "run"), weights_of(whole)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_accumulated_clips_count_as_one_batch(whole, small_model, tmp_path):
    rows = run(
        tmp_path / "run",
        *(*MOVING, "--model", small_model, "--batch_size", 1, "--gradient_accumulation_steps", 2, "--steps", 3),
    )
    expected = [row["loss"] for row in losses(rows_of(whole))]
    assert [row["loss"] for row in losses(rows)] == pytest.approx(expected, rel=1e-4)


def test_a_video_checkpoint_is_a_start_too_and_is_measured(whole, tmp_path, capsys):
    run(tmp_path / "run", *MOVING, "--model", whole / "best", "--batch_size", 1, "--steps", 1)
    assert "its 4 classes are the data set's" in capsys.readouterr().err
    train(*MOVING, "--model", whole / "best", "--eval_only", "--output", tmp_path / "e", "--image_size", 64)
    assert {"ap", "ap75", "per_class"} <= json.loads(capsys.readouterr().out).keys()


def test_generated_videos_have_one_task(small_model, tmp_path):
    with pytest.raises(SystemExit, match="moving_shapes are for --task video"):
        run(tmp_path / "run", *MOVING, "--model", small_model, "--task", "panoptic", "--steps", 1)


# --- YouTube-VIS' files ---


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for seed, name in enumerate(("train", "valid")):
        write_youtube_vis(MovingShapesDataset(2, 5 + seed, 64, seed=seed, shapes=("cross", "star")), folder / name)
    return folder


def test_a_folder_of_videos_is_trained_on_and_evaluated(videos, small_model, tmp_path, capsys):
    arguments = ["--dataset", videos, "--model", small_model, "--task", "video", "--batch_size", 2, "--steps", 2]
    rows = run(tmp_path / "run", *arguments)
    words = capsys.readouterr().err
    assert "taken over by name: star (1); 1 are new" in words and "validation videos: 2 of about 6 frames" in words
    assert f"m2f track clip.mp4 --model {tmp_path / 'run' / 'best'}" in words, "how to go on"
    assert len(losses(rows)) == 2 and rows[-1]["ap"] >= 0
    assert Mask2FormerForVideoSegmentation.from_pretrained(tmp_path / "run" / "best").config.id2label[0] == "cross"
    model = str(tmp_path / "run" / "best")
    result = evaluate_dataset(EvaluationArguments(str(videos), model, tmp_path / "result", card=True))
    assert result["task"] == "video" and result["num_images"] == 2
    assert result["figures"]["ap"] == pytest.approx(rows[-1]["ap"], abs=1e-4)
    assert len(list((tmp_path / "result" / "worst").glob("*.jpg"))) == 2
    card = (tmp_path / "run" / "best" / "README.md").read_text()
    assert card.count(f"| instance | {videos.name} | validation | AP |") == 1, "in the place of the training run's"
    assert "type: video-instance-segmentation" in card and "video-video" not in card


def test_annotations_for_frames_that_are_not_there_start_nothing(videos, small_model, tmp_path):
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    gone = folder / "train" / "JPEGImages" / "00001" / "00003.png"
    gone.unlink()
    with pytest.raises(SystemExit, match=r"(?s)missing.*00001/00003\.png"):
        run(tmp_path / "run", "--dataset", folder, "--model", small_model, "--steps", 1)
    assert not (tmp_path / "run").exists()
