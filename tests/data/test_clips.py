"""Training clips: which frames, the same place for all, targets that keep their identity, batches."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from m2f_hf import Mask2FormerVideoProcessor
from m2f_hf.data import (
    VIDEO_RECIPES,
    ClipTransform,
    CollateClips,
    MovingShapesDataset,
    TrainingTransform,
    inspect_clips,
    occlusion_clip,
    sample_frames,
    tube_masks,
)
from m2f_hf.data.clips import FRAME_RANGE, NUM_FRAMES
from m2f_hf.data.inspection import draw_clip
from m2f_hf.data.loading import TrainingStream
from m2f_hf.known.recipes import Recipe, cropped
from m2f_hf.processing.rle import encode_rle


WHOLE = Recipe(
    crop_size=(400, 400),
    shortest_edges=(48, 72),
    longest_edge=100,
    is_padded=False,
    color_jitter=False,
    evaluation_size=(64, 100),
)
SAME = replace(WHOLE, shortest_edges=(96,), flip_probability=0.0)
CROP = cropped(64)
JITTER = Recipe(crop_size=(64, 96), scale_range=(0.3, 2.0), evaluation_size=(64, 96))
RECIPES = pytest.mark.parametrize("recipe", [WHOLE, CROP, JITTER], ids=["whole", "crop", "jitter"])


@pytest.fixture(scope="module")
def video() -> dict:
    return MovingShapesDataset(1, num_frames=12, image_size=80, seed=4)[0]


def with_runs(item: dict) -> dict:
    """The same item with run lengths, None where an instance is not seen, in place of maps."""
    tubes = tube_masks(item)
    segments = [
        {**info, "segmentations": [encode_rle(mask) if mask.any() else None for mask in tube]}
        for info, tube in zip(item["segments_info"], tubes, strict=True)
    ]
    return {**{key: item[key] for key in item if key != "segmentation_maps"}, "segments_info": segments}


def equal(one: dict, other: dict) -> bool:
    return all(np.array_equal(one[key], other[key]) for key in one)


# --- which frames ---


def test_frames_are_near_one_of_them_ascending_and_cover_the_video():
    counts, gaps = np.zeros(60), set()
    for seed in range(3000):
        first, second = sample_frames(60, 2, 20, np.random.default_rng(seed))
        counts[[first, second]] += 1
        gaps.add(second - first)
    assert gaps == set(range(1, 21))
    assert counts.min() > 40
    for seed in range(100):
        frames = sample_frames(30, 5, 4, np.random.default_rng(seed))
        assert frames == sorted(set(frames)) and frames[0] >= 0 and frames[-1] < 30
        assert any(max(abs(frame - reference) for frame in frames) <= 4 for reference in frames)
    assert sample_frames(9, 1, 20, np.random.default_rng(0))[0] in range(9)


def test_short_videos_repeat_frames():
    assert sample_frames(1, 3, 20, np.random.default_rng(0)) == [0, 0, 0]
    for seed in range(20):
        assert set(sample_frames(2, 4, 20, np.random.default_rng(seed))) == {0, 1}
        assert sample_frames(4, 4, 20, np.random.default_rng(seed)) == [0, 1, 2, 3]


# --- what becomes of them ---


@RECIPES
def test_each_frame_equals_the_image_transform(video, recipe):
    """The oracle is `TrainingTransform`, given the same draws for every frame."""
    seen = 0
    for seed in range(12):
        sample = ClipTransform(recipe, num_frames=3, frame_range=5)(video, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        frames = sample_frames(12, 3, 5, rng)
        assert sample["frame_indices"].tolist() == frames
        for t, frame in enumerate(frames):
            item = {"image": video["frames"][frame], "image_id": 0, "segments_info": video["segments_info"]}
            item["segmentation_map"] = video["segmentation_maps"][frame]
            expected = TrainingTransform(recipe)(item, copy.deepcopy(rng))
            assert np.array_equal(sample["pixel_values_videos"][t].transpose(1, 2, 0), expected["image"])
            masks = sample["mask_labels"][:, t]
            is_seen = masks.any((1, 2))
            assert np.array_equal(masks[is_seen], expected["mask_labels"])
            assert np.array_equal(sample["class_labels"][is_seen], expected["class_labels"])
            seen += is_seen.sum()
        assert sample["pixel_values_videos"].dtype == np.uint8 and sample["mask_labels"].dtype == bool
        assert sample["class_labels"].dtype == np.int64
    assert seen > 20


@RECIPES
def test_run_lengths_and_maps_give_the_same_clip(video, recipe):
    transform = ClipTransform(recipe, 4)
    for seed in range(5):
        first, second = (transform(item, np.random.default_rng(seed)) for item in (video, with_runs(video)))
        assert equal(first, second)


def test_instances_absent_from_all_frames_are_no_target():
    """The star of the scripted clip is hidden in the middle; one row of masks is one identity."""
    clip = occlusion_clip(16, 96)
    hidden = ~tube_masks(clip)[0].any((1, 2))
    found = set()
    for seed in range(40):
        sample = ClipTransform(SAME, 2)(clip, np.random.default_rng(seed))
        absent = hidden[sample["frame_indices"]]
        found.add(int(absent.sum()))
        assert sample["class_labels"].tolist() == ([0, 3] if absent.all() else [3, 0, 3])
        if not absent.all():
            assert np.array_equal(~sample["mask_labels"][0].any((1, 2)), absent)
        (star,) = sample["mask_labels"][-1:]
        columns = [np.nonzero(mask.any(0))[0].mean() for mask in star]
        assert columns[0] >= columns[1], "the other star goes to the left"
    assert found == {0, 1, 2}


def test_crowds_are_left_out_and_a_clip_may_have_no_target(video):
    crowded = {**video, "segments_info": [{**info, "iscrowd": 1} for info in video["segments_info"]]}
    sample = ClipTransform(WHOLE)(crowded, np.random.default_rng(0))
    assert sample["mask_labels"].shape == (0, *np.array(sample["pixel_values_videos"].shape)[[0, 2, 3]])
    assert sample["class_labels"].shape == (0,)


def test_only_the_frames_of_the_clip_are_read(video):
    read = []

    class Watched:
        def __len__(self):
            return 12

        def __getitem__(self, index):
            read.append(index)
            return video["frames"][index]

    sample = ClipTransform(WHOLE)({**video, "frames": Watched()}, np.random.default_rng(0))
    assert read == sample["frame_indices"].tolist()


def test_impossible_clips_are_refused(video):
    with pytest.raises(ValueError, match="1 or more"):
        ClipTransform(WHOLE, num_frames=0)
    with pytest.raises(ValueError, match="max_category_share"):
        ClipTransform(replace(CROP, max_category_share=0.75))
    long = {**video, "height": 1, "width": 4000}
    with pytest.raises(ValueError, match="moving shapes 0"):
        ClipTransform(WHOLE)(long, np.random.default_rng(0))


# --- batches ---


def test_a_batch_pads_clips_to_one_size(video):
    """Frames of a clip are as the processor makes them alone; masks are False on padding, and rows stay instances."""
    processor = Mask2FormerVideoProcessor(size_divisor=32)
    clips = [ClipTransform(WHOLE, 3)(item, np.random.default_rng(seed)) for seed, item in enumerate([video] * 3, 5)]
    clips.append(ClipTransform(JITTER, 3)(occlusion_clip(16, 96), np.random.default_rng(8)))
    assert len({clip["pixel_values_videos"].shape for clip in clips}) > 1
    batch = CollateClips(processor)(clips)
    height, width = batch["pixel_mask"].shape[1:]
    assert batch["pixel_values_videos"].shape == (4, 3, 3, height, width) and height % 32 == width % 32 == 0
    assert batch["pixel_values_videos"].dtype == torch.float32
    for index, clip in enumerate(clips):
        h, w = clip["pixel_values_videos"].shape[2:]
        assert batch["pixel_mask"][index, :h, :w].all() and batch["pixel_mask"][index].sum() == h * w
        masks = batch["mask_labels"][index]
        assert masks.dtype == torch.bool and masks.shape == (len(clip["class_labels"]), 3, height, width)
        assert np.array_equal(masks[..., :h, :w], clip["mask_labels"]) and masks.sum() == clip["mask_labels"].sum()
        assert batch["class_labels"][index].tolist() == clip["class_labels"].tolist()
        pixels = torch.from_numpy(clip["pixel_values_videos"])
        mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
        expected = (pixels.float() * processor.rescale_factor - mean) / std
        torch.testing.assert_close(batch["pixel_values_videos"][index, :, :, :h, :w], expected)
        assert not batch["pixel_values_videos"][index, :, :, h:].any()


def test_a_batch_may_have_clips_without_targets():
    clip = occlusion_clip(16, 96)
    samples = [ClipTransform(SAME, 2)(clip, np.random.default_rng(seed)) for seed in range(40)]
    once = next(one for one in samples if one["mask_labels"].any((2, 3)).tolist()[0] == [True, False])
    empty = ClipTransform(WHOLE, 2)({**clip, "segments_info": []}, np.random.default_rng(0))
    batch = CollateClips(Mask2FormerVideoProcessor())([once, empty])
    assert [len(labels) for labels in batch["class_labels"]] == [3, 0]
    assert batch["mask_labels"][0][0, 0].any() and not batch["mask_labels"][0][0, 1].any()
    assert batch["mask_labels"][1].shape[:2] == (0, 2)


def test_a_stream_of_clips_is_the_same_in_every_run():
    dataset = MovingShapesDataset(3, num_frames=4, image_size=48)
    first, second = (TrainingStream(dataset, ClipTransform(WHOLE), seed=1) for _ in range(2))
    for place in (5, 0, 7):
        assert equal(
            {key: value for key, value in first[place].items() if key != "file_name"},
            {key: value for key, value in second[place].items() if key != "file_name"},
        )
    assert first[0]["file_name"].startswith("moving shapes")


# --- the original's settings ---


def test_recipes_equal_the_released_checkpoints(shared):
    entries = json.loads((shared / "data" / "zoo" / "zoo.json").read_text())
    compared = set()
    for entry in entries:
        dataset = entry["config"].partition("/")[0]
        if not dataset.startswith("youtubevis"):
            continue
        name = f"ytvis{dataset.partition('_')[2]}-instance"
        recipe, given, solver = VIDEO_RECIPES[name], entry["spec"]["input"], entry["spec"]["solver"]
        compared.add(name)
        assert recipe.shortest_edges == tuple(given["min_size_train"]) and not given["crop"]["ENABLED"]
        assert recipe.color_jitter == given["color_aug_ssd"]
        assert recipe.evaluation_size[1] == given["max_size_test"] and given["min_size_test"] in (360, 480)
        assert (recipe.steps, recipe.batch_size) == (solver["max_iter"], solver["ims_per_batch"])
        assert [share * recipe.steps for share in recipe.milestones] == pytest.approx(solver["steps"])
        assert (recipe.learning_rate, recipe.weight_decay) == (solver["base_lr"], solver["weight_decay"])
        assert (recipe.warmup_steps, recipe.warmup_factor) == (solver["warmup_iters"], solver["warmup_factor"])
    assert compared == set(VIDEO_RECIPES)


def test_defaults_equal_the_original_configuration(goldens):
    yaml = pytest.importorskip("yaml")
    given = yaml.safe_load((goldens / "ytvis2019_r50" / "config.yaml").read_text())["INPUT"]
    recipe = VIDEO_RECIPES["ytvis2019-instance"]
    assert given["SAMPLING_FRAME_RANGE"] == FRAME_RANGE and not given["SAMPLING_FRAME_SHUFFLE"]
    assert NUM_FRAMES == 2, "the released ones' (arXiv 2112.10764, section 3); the recorded run was made with 3"
    assert given["RANDOM_FLIP"] == "flip_by_clip" and given["MIN_SIZE_TRAIN_SAMPLING"] == "choice_by_clip"
    assert tuple(given["MIN_SIZE_TRAIN"]) == recipe.shortest_edges
    assert given["MAX_SIZE_TRAIN"] == recipe.longest_edge == recipe.crop_size[0] and not given["AUGMENTATIONS"]


def test_the_recipe_shows_whole_frames():
    """No crop, no padding: a sample is the frame at one of two sizes."""
    clip = {**occlusion_clip(16, 96), "height": 96, "width": 96}
    sizes = {
        ClipTransform(VIDEO_RECIPES["ytvis2019-instance"])(clip, np.random.default_rng(seed))[
            "pixel_values_videos"
        ].shape[2:]
        for seed in range(12)
    }
    assert sizes == {(360, 360), (480, 480)}


# --- looking at it ---


def test_a_strip_shows_an_instance_in_one_colour():
    clip = occlusion_clip(16, 192)
    recipe = replace(SAME, shortest_edges=(192,), longest_edge=192)
    sample = ClipTransform(recipe, 3, 15)(clip, np.random.default_rng(4))
    pictures = draw_clip(sample, colors={0: (255, 0, 0), 3: (0, 255, 0)})
    frames = sample["pixel_values_videos"].transpose(0, 2, 3, 1)
    for tube in sample["mask_labels"]:
        fills = []
        for picture, pixels, mask in zip(pictures, frames, tube, strict=True):
            if mask.sum() > 200:
                drawn = np.asarray(picture, dtype=np.float64) - 0.55 * pixels
                fills.append(np.median(drawn[mask], axis=0) / 0.45)
        assert len(fills) > 1 and np.ptp(np.stack(fills), axis=0).max() < 6
    outside = ~sample["mask_labels"].any((0, 1))
    as_before = (np.asarray(pictures[0]) == frames[0]).all(-1)
    assert as_before[outside].mean() > 0.97, "all but where a label reaches beyond its star"


def test_the_sheet_has_a_strip_for_each_clip():
    dataset = MovingShapesDataset(2, num_frames=6, image_size=64)
    sheet = inspect_clips(dataset, ClipTransform(WHOLE, 3), dataset.categories, num_samples=1, side=100)
    more = inspect_clips(dataset, ClipTransform(WHOLE, 4), dataset.categories, num_samples=2, side=100)
    assert more.width > sheet.width > 300 and more.height > 1.5 * sheet.height
    with pytest.raises(ValueError, match="Nothing to show"):
        inspect_clips(dataset, ClipTransform(WHOLE), indices=())
