"""Windows of a long clip, and how their tracks are joined: with constructed masks and queries, and with the model."""

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import clips, pictures, tiny_config, tiny_video_model

from m2f_hf import (
    ClipTracker,
    M2FImageProcessor,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerVideoProcessor,
    stream_frames,
)
from m2f_hf.inference.tracking import TrackMemory, WindowTracks, to_id_map


def run(model, pixel_values, **kwargs):
    with torch.no_grad():
        return model(pixel_values, **kwargs)


# --- joining, constructed ---

CLASSES = 3


def found(start, tracks, length=4, side=8):
    """A window of tracks, each (columns of its squares by frame: None where absent, axis of its embedding, label)."""
    masks = torch.zeros(len(tracks), length, side, side, dtype=torch.bool)
    embeddings, probs = torch.zeros(len(tracks), 6), torch.full((len(tracks), CLASSES), 0.05)
    for index, (columns, axis, label) in enumerate(tracks):
        for frame, column in enumerate(columns):
            if column is not None:
                masks[index, frame, :, column : column + 2] = True
        embeddings[index, axis] = 5.0
        probs[index, label] = 0.9
    return WindowTracks(start, masks, embeddings, probs, [label for *_, label in tracks], [False] * len(tracks))


def ids_of(memory, *windows):
    return [memory.join(window)[0] for window in windows]


def test_tracks_that_overlap_are_joined():
    first = found(0, [([0, 0, 1, 2], 0, 0), ([6, 6, 5, 4], 1, 1)])
    second = found(2, [([5, 4, 3, 2], 0, 0), ([1, 2, 3, 4], 3, 2)])
    assert ids_of(TrackMemory(), first, second) == [[1, 2], [2, 1]]


def test_matching_is_one_to_one_and_optimal():
    first = found(0, [([0] * 4, 0, 0), ([1] * 4, 1, 0)])
    # Both overlap the first's place, and the nearer of the two takes it.
    second = found(2, [([1] * 4, 2, 0), ([0] * 4, 3, 0), ([0] * 4, 4, 0)])
    (before, now) = ids_of(TrackMemory(), first, second)
    assert before == [1, 2] and now[0] == 2 and sorted(now) == [1, 2, 3]


def test_without_shared_frames_queries_decide():
    first = found(0, [([0] * 4, 0, 0), ([4] * 4, 1, 1)])
    second = found(4, [([0] * 4, 1, 1), ([4] * 4, 0, 0), ([6] * 4, 2, 2)])
    assert ids_of(TrackMemory(), first, second) == [[1, 2], [2, 1, 3]]


@pytest.mark.parametrize(("axis", "label", "expected"), [(0, 0, 1), (1, 0, 2), (0, 1, 2)])
def test_object_out_of_sight_is_recognised(axis, label, expected):
    here, gone = found(0, [([0, 0, None, None], 0, 0)]), found(2, [])
    back = found(4, [([6] * 4, axis, label)])
    assert ids_of(TrackMemory(), here, gone, back)[2] == [expected]


def test_object_out_of_sight_for_long_is_forgotten():
    memory = TrackMemory(memory=6)
    here, soon, late = (found(start, [([0] * 4, 0, 0)]) for start in (0, 10, 40))
    assert ids_of(memory, here, found(4, []), soon) == [[1], [], [1]]
    assert memory.join(found(36, []))[0] == [] and len(memory) == 0
    assert memory.join(late)[0] == [2]


def test_tracks_seen_apart_are_not_joined():
    first, second = found(0, [([0] * 4, 0, 0)]), found(2, [([6] * 4, 0, 0)])
    assert ids_of(TrackMemory(), first, second) == [[1], [2]]


def test_two_classes_of_one_query_stay_two_tracks():
    window = found(0, [([0] * 4, 0, 0), ([0] * 4, 0, 0)])._replace(labels=[0, 1])
    swapped = window._replace(start=2, labels=[1, 0])
    assert ids_of(TrackMemory(), window, swapped) == [[1, 2], [2, 1]]


def test_a_tracks_class_is_that_of_most_windows():
    memory = TrackMemory()
    labels = [memory.join(found(start, [([0] * 4, 0, label)]))[1] for start, label in ((0, 1), (2, 1), (4, 2))]
    assert labels == [[1], [1], [1]]
    assert memory.join(found(6, [([0] * 4, 0, 2)]), [5.0])[1] == [2]


def test_stuff_is_one_track_for_each_class():
    memory = TrackMemory()
    first = found(0, [([0] * 4, 0, 2), ([4] * 4, 1, 1)])._replace(is_stuff=[True, False])
    second = found(4, [([4] * 4, 5, 2), ([0] * 4, 1, 1)])._replace(is_stuff=[True, False])
    assert [memory.join(window)[0] for window in (first, second)] == [[2, 1], [2, 1]]


# --- windows, with the model ---


def tracker(model=None, **settings):
    settings = {"threshold": 0.0, "max_detections": 4, **settings}
    return ClipTracker(model or tiny_video_model(), Mask2FormerVideoProcessor(do_resize=False), **settings)


def at_once(model, frames, **settings):
    processor = Mask2FormerVideoProcessor(do_resize=False)
    settings = {"threshold": 0.0, "max_detections": 4, **settings}
    inputs = processor(frames, return_tensors="pt")
    outputs = run(model, inputs["pixel_values_videos"], pixel_mask=inputs["pixel_mask"])
    return processor.post_process_video_instance_segmentation(outputs, **settings)[0]


def test_encode_and_decode_equal_forward():
    model, pixel_values = tiny_video_model(), clips(2)
    with torch.no_grad():
        outputs = model.decode_frames(model.encode_frames(pixel_values))
    expected = run(model, pixel_values)
    assert torch.equal(outputs.masks_queries_logits, expected.masks_queries_logits)
    assert torch.equal(outputs.class_queries_logits, expected.class_queries_logits)


@pytest.mark.parametrize("window", [5, 9])
def test_window_over_the_clip_equals_one_pass(window):
    model, frames = tiny_video_model(), pictures(5)
    expected = at_once(model, frames)
    results = list(tracker(model, window=window)(frames))
    assert [result["frame"] for result in results] == [0, 1, 2, 3, 4]
    seen = [info["id"] for info in expected["segments_info"] if any(info["areas"])]
    assert seen, "the random model finds something, or this test shows nothing"
    for result in results:
        frame = result["frame"]
        infos = [expected["segments_info"][index] for index in seen]
        present = [(number, info) for number, info in enumerate(infos, start=1) if info["areas"][frame]]
        assert result["segments_info"] == [
            {
                "id": number,
                "label_id": info["label_id"],
                "isthing": None,
                "score": info["score"],
                "area": info["areas"][frame],
            }
            for number, info in present
        ]
        assert torch.equal(result["segmentation"], expected["segmentation"][[info["id"] for _, info in present], frame])


@pytest.mark.parametrize(("window", "overlap"), [(1, 0), (3, 0), (4, 2), (4, 3), (5, 1)])
def test_each_window_equals_a_pass_over_its_frames(window, overlap):
    """Frames that windows share are encoded once, and the last window has its full length."""
    model, frames = tiny_video_model(), pictures(10)
    encoded = []
    encode = model.encode_frames
    model.encode_frames = lambda pixel_values_videos, pixel_mask=None: (
        encoded.append(pixel_values_videos.shape[1]) or encode(pixel_values_videos, pixel_mask)
    )
    results = list(tracker(model, window=window, overlap=overlap)(iter(frames)))
    assert sum(encoded) == 10
    assert [result["frame"] for result in results] == list(range(10))
    done = 0
    while done < 10:
        new = window if done == 0 else min(window - overlap, 10 - done)
        done += new
        expected = at_once(model, frames[done - window : done])
        for frame in range(done - new, done):
            areas = [info["areas"][frame - done] for info in expected["segments_info"]]
            infos = results[frame]["segments_info"]
            assert [info["area"] for info in infos] == [area for area in areas if area]
            assert results[frame]["segmentation"].sum((1, 2)).tolist() == [info["area"] for info in infos]
            assert len({info["id"] for info in infos}) == len(infos)


@pytest.mark.parametrize("stuff", [None, [0, 3]])
def test_panoptic_window_over_the_clip_equals_one_pass(stuff):
    model, frames = tiny_video_model(num_queries=20), pictures(5)
    processor = Mask2FormerVideoProcessor(
        do_resize=False, task="panoptic", threshold=0.1, overlap_mask_area_threshold=0.1, label_ids_to_fuse=stuff
    )
    inputs = processor(frames, return_tensors="pt")
    outputs = run(model, inputs["pixel_values_videos"], pixel_mask=inputs["pixel_mask"])
    (expected,) = processor.post_process_video_panoptic_segmentation(outputs)
    assert expected["segments_info"], "the random model finds something, or this test shows nothing"
    results = list(ClipTracker(model, processor, window=5)(frames))
    # Stuff is counted after things here.
    ids = {(info["label_id"], info["score"]): info["id"] for result in results for info in result["segments_info"]}
    for result in results:
        frame_map = torch.zeros(40, 60, dtype=torch.int32)
        for info in expected["segments_info"]:
            frame_map[expected["segmentation"][result["frame"]] == info["id"]] = ids[info["label_id"], info["score"]]
        assert torch.equal(result["segmentation"], frame_map)
        for info in result["segments_info"]:
            assert info["area"] == (result["segmentation"] == info["id"]).sum()
            assert info["isthing"] == (None if stuff is None else info["label_id"] not in stuff)
        assert np.array_equal(to_id_map(result), frame_map)


def test_stuff_keeps_its_id_without_overlap():
    model = seeing_bright(tiny_video_model())
    processor = Mask2FormerVideoProcessor(do_resize=False, task="panoptic", label_ids_to_fuse=[3])
    results = list(ClipTracker(model, processor, window=2, overlap=0, min_similarity=1.0)(moving_square(8)))
    stuff = {info["id"] for result in results for info in result["segments_info"] if not info["isthing"]}
    things = {info["id"] for result in results for info in result["segments_info"] if info["isthing"]}
    assert len(stuff) == 1 < len(things)


def moving_square(number):
    """A bright square that goes from left to right over black."""
    for frame in range(number):
        picture = np.zeros((64, 96, 3), dtype=np.uint8)
        picture[20:44, 2 * frame % 64 : 2 * frame % 64 + 24] = 255
        yield picture


def seeing_bright(model):
    """The model, but that one query is what is bright and another is the rest; in each window they change places."""
    encode, decode, num_windows = model.encode_frames, model.decode_frames, itertools.count()

    def encode_frames(pixel_values_videos, pixel_mask=None):
        encoded = encode(pixel_values_videos, pixel_mask)
        bright = pixel_values_videos.mean(2, keepdim=True)[..., 2::4, 2::4]  # (B, T, 1, h, w)
        encoded.pixel_level.decoder_last_hidden_state[:, :, :1] = bright
        return encoded

    def decode_frames(encoded):
        outputs, turn = decode(encoded), next(num_windows)
        bright = encoded.pixel_level.decoder_last_hidden_state[:, :, 0]
        outputs.masks_queries_logits[:] = -5.0
        outputs.class_queries_logits[:] = 9.0 * torch.eye(6)[5]
        for number, (sign, label) in enumerate(((1, 1), (-1, 3))):
            query = (number + turn) % 2
            outputs.masks_queries_logits[:, query] = 10 * sign * bright
            outputs.class_queries_logits[:, query] = 9.0 * torch.eye(6)[label]
        return outputs

    model.encode_frames, model.decode_frames = encode_frames, decode_frames
    return model


def test_an_object_keeps_its_id_from_window_to_window():
    model = seeing_bright(tiny_video_model())
    results = list(tracker(model, window=6, overlap=2, threshold=0.5)(moving_square(30)))
    maps = np.stack([to_id_map(result) for result in results])
    assert maps.shape == (30, 64, 96)
    squares = {int(ids[32, 2 * frame % 64 + 12]) for frame, ids in enumerate(maps)}
    grounds = {int(ids[4, 4]) for ids in maps}
    assert len(squares) == len(grounds) == 1 and squares | grounds == {1, 2}
    assert {info["label_id"] for result in results for info in result["segments_info"]} == {1, 3}


@pytest.mark.parametrize("number", [50, 500])
def test_memory_holds_one_window(number):
    model = tiny_video_model()
    frames_alive, maps_alive, most = weakref.WeakSet(), [], {"frames": 0, "maps": 0}

    class Frame(np.ndarray):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    def stream():
        for index in range(number):
            frame = np.full((64, 64, 3), index % 255, dtype=np.uint8).view(Frame)
            frames_alive.add(frame)
            most["frames"] = max(most["frames"], len(frames_alive))
            yield frame
            del frame

    encode = model.encode_frames

    def encode_frames(pixel_values_videos, pixel_mask=None):
        encoded = encode(pixel_values_videos, pixel_mask)
        maps_alive.append(weakref.ref(encoded.pixel_level.decoder_last_hidden_state))
        maps_alive[:] = [ref for ref in maps_alive if ref() is not None]
        most["maps"] = max(most["maps"], len(maps_alive))
        return encoded

    model.encode_frames = encode_frames
    gc.collect()
    count = sum(1 for _ in tracker(model, window=4, overlap=1)(stream()))
    assert count == number
    assert most["frames"] <= 4 + 2 and most["maps"] <= 2


def test_results_stream_out():
    read = []

    def stream():
        for frame in pictures(20):
            read.append(frame)
            yield frame

    results = tracker(window=4, overlap=2)(stream())
    assert next(results)["frame"] == 0 and len(read) == 4


def test_settings_come_from_the_processor():
    processor = Mask2FormerVideoProcessor(instance_threshold=0.3, mask_threshold=0.4)
    assert ClipTracker(tiny_video_model(), processor).settings["threshold"] == 0.3
    assert ClipTracker(tiny_video_model(), Mask2FormerVideoProcessor()).settings["threshold"] == 0.5
    (result,) = ClipTracker(tiny_video_model(), processor, threshold=0.0)([Image.new("RGB", (61, 33))])
    assert result["segmentation"].shape[1:] == (33, 61)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"overlap 4 must be .* less than window 4"):
        tracker(window=4, overlap=4)
    with pytest.raises(ValueError, match="window must be at least 1"):
        tracker(window=0)
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        tracker(tiny_video_model().train())
    with pytest.raises(ValueError, match="numbers from 0 to 1"):
        tracker(min_similarity=2)
    image_model = Mask2FormerForUniversalSegmentation(tiny_config())
    with pytest.raises(TypeError, match=r"Mask2FormerForVideoSegmentation\.from_pretrained"):
        tracker(image_model)
    with pytest.raises(TypeError, match=r"M2FImageProcessor is no video processor: .*from_pretrained"):
        ClipTracker(tiny_video_model(), M2FImageProcessor())
    with pytest.raises(TypeError, match="float"):
        tracker(window=2.5)
    with pytest.raises(ValueError, match="threshold 50 is not a probability"):
        tracker(threshold=50)
    with pytest.raises(ValueError, match="mask_threshold -1 is not a probability"):
        tracker(mask_threshold=-1)
    with pytest.raises(ValueError, match=r"no task 'semantic'; choose one of instance, panoptic"):
        tracker(task="semantic")
    with pytest.raises(ValueError, match="max_detections is for task='instance'"):
        tracker(task="panoptic")
    with pytest.raises(ValueError, match="no frames"):
        list(tracker()([]))
    with pytest.raises(FileNotFoundError, match="no folder or video file"):
        tracker()("nowhere")
    for image in (pictures(1)[0], np.asarray(pictures(1)[0])):
        with pytest.raises(ValueError, match="a single image is no clip"):
            tracker()(image)
    for thing in (None, 3, b"clip.mp4", np.zeros((1, 2, 40, 60, 3), np.uint8)):
        with pytest.raises(ValueError, match="is no clip: give a list of images"):
            tracker()(thing)
    with pytest.raises(ValueError, match="differ in size"):
        list(tracker()([*pictures(2), *pictures(1, (50, 60))]))


@pytest.mark.parametrize("size", [(40, 3), (40, 1), (3, 40)])
def test_narrow_frames(size):
    frames = pictures(5, size)
    follow = tracker(window=10**7)  # more than there is memory for
    results = list(follow(frames))
    assert {result["segmentation"].shape[1:] for result in results} == {size}
    again = list(follow(stream_frames(frames), "channels_first"))
    assert all(
        torch.equal(one["segmentation"], other["segmentation"]) for one, other in zip(results, again, strict=True)
    )


# --- damaged frames ---


def test_damaged_frames_keep_their_numbers(tmp_path):
    frames = pictures(6)
    for index, frame in enumerate(frames):
        frame.save(tmp_path / f"{index}.png")
    for index in (0, 3, 5):
        (tmp_path / f"{index}.png").write_bytes((tmp_path / f"{index}.png").read_bytes()[:60])
    model = tiny_video_model()
    with pytest.warns(UserWarning) as warned:
        results = list(tracker(model, window=2, overlap=1)(stream_frames(tmp_path)))
    assert [f"frame {index}" in str(warning.message) for index, warning in zip((0, 3, 5), warned, strict=True)] == [
        True
    ] * 3
    expected = list(tracker(model, window=2, overlap=1)([frames[index] for index in (1, 2, 4)]))
    assert [result["frame"] for result in results] == list(range(6))
    for index, other in zip((1, 2, 4), expected, strict=True):
        assert results[index]["segments_info"] == other["segments_info"] and "damaged" not in results[index]
    for index in (0, 3, 5):
        assert f"{index}.png" in results[index]["damaged"]
        assert results[index]["segmentation"].shape == (0, 40, 60) and results[index]["segments_info"] == []
