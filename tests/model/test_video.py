"""Clips: the video model, its processor and its tracks. Its logits and losses are compared in test_goldens.py."""

import json
import sys

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from operations import NoHostWaits, refuse_uploads
from PIL import Image
from tiny import SIZE, VIDEO_FIELDS, clips, pictures, tiny_config, tiny_video_model, write_video
from torch.utils._pytree import tree_flatten

from m2f_hf import (
    M2FImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerForVideoSegmentation,
    Mask2FormerVideoConfig,
    Mask2FormerVideoModel,
    Mask2FormerVideoProcessor,
)
from m2f_hf.loss.points import SeededPoints
from m2f_hf.model.layers import Mask2FormerSinePositionEmbedding
from m2f_hf.processing.frames import count_frames, frame_rate, stream_frames
from m2f_hf.processing.post_processing import (
    ImageOutputs,
    panoptic_segmentation,
    video_instance_segmentation,
    video_panoptic_segmentation,
)
from m2f_hf.processing.rle import encode_rle


def run(model, pixel_values, **kwargs):
    with torch.no_grad():
        return model(pixel_values, **kwargs)


def assert_same(outputs, expected, atol=1e-4):
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(outputs[name], expected[name], atol=atol, rtol=1e-4)


# --- the model ---


@pytest.mark.parametrize("frames", [1, 4])
def test_a_query_has_one_class_and_a_mask_in_every_frame(frames):
    outputs = run(tiny_video_model(), clips(2, frames))
    assert outputs.class_queries_logits.shape == (2, 6, 6)
    assert outputs.masks_queries_logits.shape == (2, 6, frames, SIZE[0] // 4, SIZE[1] // 4)
    assert outputs.image_sizes.tolist() == [list(SIZE)] * 2


def test_clips_of_a_batch_do_not_see_each_other():
    model, pixel_values = tiny_video_model(), clips(2)
    outputs = run(model, pixel_values)
    for clip in range(2):
        alone = run(model, pixel_values[clip : clip + 1])
        assert_same({name: outputs[name][clip : clip + 1] for name in alone if name != "image_sizes"}, alone)


@pytest.mark.parametrize("frames_per_batch", [1, 2, None])
def test_frames_read_a_few_at_a_time_are_frames_read_together(frames_per_batch):
    model = tiny_video_model(frames_per_batch=frames_per_batch)
    with torch.enable_grad():
        together = model(clips(2), output_hidden_states=True)
    outputs = run(model, clips(2), output_hidden_states=True)
    assert_same(outputs, together)
    for maps in ("encoder_hidden_states", "pixel_decoder_hidden_states"):
        for ours, expected in zip(outputs[maps], together[maps], strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_padding_of_a_clip_does_not_move_its_result():
    """Frames of 40 rows are padded to 64 either way; what the batch adds beyond that is hidden."""
    model = tiny_video_model()
    frames = clips(1, 3, (40, 96))
    own = torch.nn.functional.pad(frames, (0, 0, 0, 24))
    more = torch.nn.functional.pad(frames, (0, 0, 0, 56))
    mask = torch.zeros(1, 96, 96, dtype=torch.int64)
    mask[:, :40] = 1
    outputs, expected = run(model, more, pixel_mask=mask), run(model, own, pixel_mask=mask[:, :64])
    torch.testing.assert_close(outputs.class_queries_logits, expected.class_queries_logits, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        outputs.masks_queries_logits[..., :16, :], expected.masks_queries_logits, atol=1e-3, rtol=1e-3
    )
    assert outputs.image_sizes.tolist() == [[40, 96]]


def test_a_clip_backwards_gives_masks_backwards_but_for_the_encoding_of_time(monkeypatch):
    """Time enters through the position encoding alone: without it a clip is a set of frames, in no order."""
    model, pixel_values = tiny_video_model(), clips(1, 4)
    forwards, backwards = run(model, pixel_values), run(model, pixel_values.flip(1))
    differs = (backwards.masks_queries_logits.flip(2) - forwards.masks_queries_logits).abs().max()
    assert differs > 1e-3

    plain = Mask2FormerSinePositionEmbedding.forward
    monkeypatch.setattr(
        Mask2FormerSinePositionEmbedding,
        "forward",
        lambda self, features, padding=None: (
            plain(self, features[:, 0], padding)[:, None].expand(-1, features.shape[1], -1, -1, -1)
            if features.dim() == 5
            else plain(self, features, padding)
        ),
    )
    forwards, backwards = run(model, pixel_values), run(model, pixel_values.flip(1))
    torch.testing.assert_close(backwards.class_queries_logits, forwards.class_queries_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        backwards.masks_queries_logits.flip(2), forwards.masks_queries_logits, atol=1e-3, rtol=1e-3
    )


def test_frames_encoding_is_the_originals_formula():
    """Of (T, H, W): the plane's encoding, and that of frame t of T, z / (T + eps) * 2 pi, over all channels."""
    embedder = Mask2FormerSinePositionEmbedding(8)
    encoding = embedder(torch.zeros(1, 3, 16, 4, 5))
    plane = embedder(torch.zeros(1, 16, 4, 5))
    for frame in range(3):
        z = (frame + 1) / (3 + 1e-6) * 2 * np.pi
        for channel in range(16):
            angle = z / 10000 ** (2 * (channel // 2) / 16)
            expected = np.sin(angle) if channel % 2 == 0 else np.cos(angle)
            torch.testing.assert_close(
                encoding[0, frame, channel], plane[0, channel] + expected, atol=1e-5, rtol=1e-5, check_dtype=False
            )


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = tiny_video_model(label_frame="last")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "m2f_video"
    loaded, report = Mask2FormerForVideoSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.label_frame == "last"
    assert torch.equal(run(loaded, clips()).masks_queries_logits, run(model, clips()).masks_queries_logits)


def test_the_auto_classes_know_clips(tmp_path):
    from transformers import AutoConfig, AutoModel, AutoModelForUniversalSegmentation, AutoProcessor
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the others ask for torchvision
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor

    tiny_video_model().save_pretrained(tmp_path)
    Mask2FormerVideoProcessor(max_detections=7).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is Mask2FormerVideoConfig
    assert AutoModel.from_pretrained(tmp_path).main_input_name == "pixel_values_videos"
    assert type(AutoModelForUniversalSegmentation.from_pretrained(tmp_path)) is Mask2FormerForVideoSegmentation
    for auto_class in (AutoProcessor, AutoImageProcessor, AutoVideoProcessor):
        processor = auto_class.from_pretrained(tmp_path)
        assert type(processor) is Mask2FormerVideoProcessor
        assert processor.max_detections == 7


def test_the_image_pipeline_says_that_it_takes_no_clips(tmp_path):
    from transformers import pipeline

    tiny_video_model().save_pretrained(tmp_path)
    Mask2FormerVideoProcessor().save_pretrained(tmp_path)
    says = "is a video model, and this pipeline takes images: give clips to `Mask2FormerForVideoSegmentation`"
    with pytest.raises(ValueError, match=f"{tmp_path} {says}"):
        pipeline("image-segmentation", model=str(tmp_path))
    with pytest.raises(ValueError, match=f"^this model {says}"):
        pipeline("image-segmentation", model=tiny_video_model(), image_processor=M2FImageProcessor())


def test_a_video_checkpoint_is_read_as_an_image_model_with_a_warning(tmp_path, caplog):
    video_model = tiny_video_model(label_frame="last", frames_per_batch=2)
    video_model.save_pretrained(tmp_path)
    model, report = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path} is a video model, read here as an image model: the weights fit")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model.config) is Mask2FormerConfig
    assert not {"label_frame", "frames_per_batch"} & model.config.to_dict().keys()
    state = video_model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_image_checkpoint_is_a_start(tmp_path):
    torch.manual_seed(0)
    image_model = Mask2FormerForUniversalSegmentation(tiny_config(**VIDEO_FIELDS)).eval()
    image_model.save_pretrained(tmp_path)
    model, report = Mask2FormerForVideoSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model.config) is Mask2FormerVideoConfig
    state = image_model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    model, report = Mask2FormerForVideoSegmentation.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert {name for name, *_ in report["mismatched_keys"]} == {
        "class_predictor.weight",
        "class_predictor.bias",
        "criterion.empty_weight",
    }
    assert run(model, clips()).class_queries_logits.shape == (1, 6, 4)


@pytest.mark.parametrize("with_mask", [False, True])
def test_without_labels_the_host_never_waits(with_mask, monkeypatch):
    model = tiny_video_model().to("meta")
    refuse_uploads(monkeypatch)
    pixel_values = torch.empty(2, 3, 3, *SIZE, device="meta")
    pixel_mask = torch.empty(2, *SIZE, dtype=torch.int64, device="meta") if with_mask else None
    with NoHostWaits():
        outputs = run(model, pixel_values, pixel_mask=pixel_mask, output_hidden_states=True)
    assert outputs.masks_queries_logits.shape == (2, 6, 3, 16, 24)
    assert {tensor.device.type for tensor in tree_flatten(outputs.to_tuple())[0]} == {"meta"}


def test_a_graph_of_clips_is_whole():
    """Compiled without a break and exported, with padding that is hidden: frames are read together there."""
    model, mask = tiny_video_model(), torch.ones(2, *SIZE, dtype=torch.int64)
    mask[1, :, 64:] = 0
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_same(compiled(clips(2), pixel_mask=mask), model(clips(2), pixel_mask=mask))
        exported = torch.export.export(model, (clips(2),)).module()
        assert_same(exported(clips(2, seed=3)), model(clips(2, seed=3)))


def test_an_image_models_configuration_is_refused():
    for model_class in (Mask2FormerForVideoSegmentation, Mask2FormerVideoModel):
        with pytest.raises(TypeError, match="make a Mask2FormerVideoConfig of the same settings"):
            model_class(tiny_config(**VIDEO_FIELDS))


def test_what_are_no_encoded_frames_is_refused():
    model = tiny_video_model()
    of_images = Mask2FormerForUniversalSegmentation(tiny_config(**VIDEO_FIELDS)).model.encode(clips()[0])
    for encoded in (None, clips(), of_images):
        with pytest.raises(ValueError, match=r"pass what `encode_frames` gave, with maps \(B, T, C, h, w\)"):
            model.decode_frames(encoded)


def test_shapes_that_are_no_clips_are_refused():
    with pytest.raises(ValueError, match=r"expected \(batch, frames, channels, height, width\).*\[None\]"):
        run(tiny_video_model(), clips()[0])
    with pytest.raises(ValueError, match="at least one clip and one frame"):
        run(tiny_video_model(), clips(1, 3)[:, :0])
    with pytest.raises(ValueError, match="at least one clip and one frame"):
        run(tiny_video_model(), clips(1, 3)[:0])
    with pytest.raises(StrictDataclassError, match="label_frame"):
        tiny_video_model(label_frame="first")
    with pytest.raises(StrictDataclassError, match="frames_per_batch"):
        tiny_video_model(frames_per_batch=0)


# --- losses ---


def targets(frames=3):
    """Two instances; the second is gone in the last frame."""
    masks = torch.zeros(2, frames, *SIZE, dtype=torch.bool)
    masks[0, :, :30, :40] = True
    masks[1, :-1, 20:50, 50:90] = True
    return {"mask_labels": [masks], "class_labels": [torch.tensor([1, 3])]}


def losses(model, pixel_values, labels):
    model.criterion.draw_points = SeededPoints(0)
    return model(pixel_values, **labels)


def test_an_instance_gone_in_the_last_frame_is_learned_or_is_no_object():
    by_rule = {rule: losses(tiny_video_model(label_frame=rule).train(), clips(), targets()) for rule in ("any", "last")}
    terms = {rule: outputs.loss_dict["loss_cross_entropy"] for rule, outputs in by_rule.items()}
    assert not torch.isclose(terms["any"], terms["last"])
    everywhere = targets()
    everywhere["mask_labels"][0][1, -1, 20:50, 50:90] = True
    same = {
        rule: losses(tiny_video_model(label_frame=rule).train(), clips(), everywhere).loss for rule in ("any", "last")
    }
    assert torch.equal(same["any"], same["last"])


def test_targets_in_another_order_cost_the_same_and_every_parameter_learns():
    model = tiny_video_model().train()
    loss = losses(model, clips(), targets()).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    swapped = {name: [value[0].flip(0)] for name, value in targets().items()}
    torch.testing.assert_close(losses(model, clips(), swapped).loss, loss, atol=1e-3, rtol=1e-4)


def test_a_clip_of_one_frame_costs_what_the_image_does():
    video, image = tiny_video_model().train(), Mask2FormerForUniversalSegmentation(tiny_config(**VIDEO_FIELDS)).train()
    image.load_state_dict(video.state_dict())
    embedder = video.model.transformer_module.position_embedder
    of_plane = embedder.forward  # an image has no time, so the clip is to have none either
    embedder.forward = lambda features, padding=None: of_plane(features[:, 0], padding)[:, None]
    labels = targets(2)
    first = labels["mask_labels"][0][:, :1]  # both instances are seen
    ours = losses(video, clips(1, 1), {**labels, "mask_labels": [first]})
    expected = losses(image, clips(1, 1)[:, 0], {**labels, "mask_labels": [first[:, 0]]})
    torch.testing.assert_close(ours.loss_dict, expected.loss_dict, atol=1e-4, rtol=1e-4)


def test_masks_of_another_number_of_frames_are_refused():
    with pytest.raises(ValueError, match=r"Clip 0: `mask_labels` must be \(N, 3, H, W\)"):
        tiny_video_model()(clips(), **targets(2))


# --- tracks ---


def test_tracks_are_the_originals(goldens, repository, tmp_path):
    sys.path.insert(0, str(repository / "conversion"))
    from converter import convert

    folder = goldens / "ytvis2019_r50"
    convert(folder / "model.pkl", folder / "config.yaml", tmp_path / "converted")
    model = Mask2FormerForVideoSegmentation.from_pretrained(tmp_path / "converted")
    processor = Mask2FormerVideoProcessor.from_pretrained(tmp_path / "converted")
    assert processor.max_detections == 10 and processor.instance_threshold == 0
    frames = [np.load(folder / f"frame_{frame}.npy") for frame in range(3)]
    inputs = processor(frames, do_resize=False, return_tensors="pt")
    recorded = np.load(folder / "intermediate.npz")["input"]
    np.testing.assert_array_equal(inputs["pixel_values_videos"][0], recorded)
    outputs = run(model, inputs["pixel_values_videos"], pixel_mask=inputs["pixel_mask"])
    (tracks,) = processor.post_process_video_instance_segmentation(outputs, target_sizes=[(120, 160)])
    with np.load(folder / "final.npz") as final:
        order = np.argsort(-final["scores"], kind="stable")
        assert [track["label_id"] for track in tracks["segments_info"]] == final["labels"][order].tolist()
        scores = [track["score"] for track in tracks["segments_info"]]
        np.testing.assert_allclose(scores, final["scores"][order], atol=1e-5)
        differing = tracks["segmentation"].numpy() != final["masks"][order]
    assert differing.mean() < 1e-5  # near-ties of a logit with 0
    assert tracks["segmentation"].sum((2, 3)).tolist() == [track["areas"] for track in tracks["segments_info"]]


def clip_outputs(queries=5, labels=3, frames=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: 3 * torch.randn(shape, generator=generator)
    return ImageOutputs(normal(queries, labels + 1), normal(queries, frames, 8, 12), (30, 45), (50, 75))


@pytest.mark.parametrize("use_mask_quality", [False, True])
def test_tracks_follow_their_definition(use_mask_quality):
    clip = clip_outputs()
    result = video_instance_segmentation(clip, max_detections=4, use_mask_quality=use_mask_quality)
    logits = enlarged(clip.mask_logits)
    found = []
    probs = clip.class_logits.softmax(-1)[:, :-1]
    for score, pair in zip(*probs.flatten().topk(4), strict=True):
        mask = logits[pair // 3] > 0
        quality = (logits[pair // 3].sigmoid()[mask]).mean() if use_mask_quality else 1.0
        found.append((float(score * quality), int(pair % 3), mask))
    found.sort(key=lambda track: -track[0])
    assert [track["label_id"] for track in result["segments_info"]] == [label for _, label, _ in found]
    for track, masks, (score, _, expected) in zip(result["segments_info"], result["segmentation"], found, strict=True):
        assert track["score"] == pytest.approx(score, abs=1e-4)
        assert (masks != expected).float().mean() < 1e-3
    assert result["segmentation"].shape == (4, 2, 50, 75)


def test_stuff_is_no_track_of_an_instance():
    clip = clip_outputs()
    everything = video_instance_segmentation(clip, max_detections=6)["segments_info"]
    things = video_instance_segmentation(clip, max_detections=6, label_ids_to_drop=[1])["segments_info"]
    kept = [info for info in everything if info["label_id"] != 1]
    assert 0 < len(kept) < len(everything)
    assert [{**info, "id": None} for info in things] == [{**info, "id": None} for info in kept]


def test_tracks_as_encodings_and_none_at_all():
    clip = clip_outputs()
    clip.mask_logits[:, 1] = -1  # nothing in the second frame
    maps = video_instance_segmentation(clip)
    encoded = video_instance_segmentation(clip, return_coco_annotation=True)
    assert encoded["segments_info"] == maps["segments_info"]
    for of_frames, masks in zip(encoded["segmentation"], maps["segmentation"], strict=True):
        assert of_frames == [encode_rle(masks[0]), None]
    nothing = video_instance_segmentation(clip, threshold=1.0)
    assert nothing["segmentation"].shape == (0, 2, 50, 75) and nothing["segments_info"] == []


# --- tracks without overlaps ---

LOOSE = {"threshold": 0.4, "overlap_mask_area_threshold": 0.2}


def enlarged(logits):
    """(Q, T, 8, 12) mask logits, by way of the 32 x 48 input and the 30 x 45 frame in it, at the target's size."""
    logits = torch.nn.functional.interpolate(logits, (32, 48), mode="bilinear")[..., :30, :45]
    return torch.nn.functional.interpolate(logits, (50, 75), mode="bilinear")


@pytest.mark.parametrize("stuff", [None, [1]])
def test_a_panoptic_clip_of_one_frame_is_the_image(stuff):
    clip = clip_outputs(queries=12, frames=1)
    ours = video_panoptic_segmentation(clip, label_ids_to_fuse=stuff, **LOOSE)
    expected = panoptic_segmentation(
        clip._replace(mask_logits=clip.mask_logits[:, 0]), label_ids_to_fuse=stuff, **LOOSE
    )
    assert expected["segments_info"], "there are segments, or this test shows nothing"
    assert torch.equal(ours["segmentation"][0], expected["segmentation"])
    for info, image_info in zip(ours["segments_info"], expected["segments_info"], strict=True):
        assert {**info, "areas": info["areas"][0]} == {
            **{name: value for name, value in image_info.items() if name not in ("area", "bbox")},
            "areas": image_info["area"],
            "query": info["query"],
        }


@pytest.mark.parametrize("use_mask_quality", [False, True])
def test_panoptic_tracks_follow_their_definition(use_mask_quality):
    clip = clip_outputs(queries=12, frames=3, seed=5)
    result = video_panoptic_segmentation(clip, label_ids_to_fuse=[1], use_mask_quality=use_mask_quality, **LOOSE)
    probs, labels = clip.class_logits.softmax(-1).max(-1)
    masks = enlarged(clip.mask_logits).sigmoid()
    if use_mask_quality:
        probs = probs * torch.stack([mask[mask > 0.5].mean() for mask in masks])
    kept = [query for query in range(12) if labels[query] != 3 and probs[query] > LOOSE["threshold"]]
    winner = (probs[kept, None, None, None] * masks[kept]).argmax(0)
    expected, info_of = torch.zeros(3, 50, 75, dtype=torch.int32), {}
    for index, query in enumerate(kept):
        won, own = winner == index, masks[query] >= 0.5
        if (won & own).any() and won.sum() / own.sum() >= LOOSE["overlap_mask_area_threshold"]:
            label = int(labels[query])
            number = next((i for i, of in info_of.items() if label == of == 1), len(info_of) + 1)
            info_of[number] = label
            expected[won & own] = number
    assert 1 < len(info_of) < len(kept), "some are dropped or fused, or this test shows nothing"
    assert [(info["id"], info["label_id"]) for info in result["segments_info"]] == list(info_of.items())
    assert (result["segmentation"] != expected).float().mean() < 1e-3
    for info in result["segments_info"]:
        assert info["areas"] == (result["segmentation"] == info["id"]).sum((1, 2)).tolist()
        assert labels[info["query"]] == info["label_id"]
        assert info["score"] == pytest.approx(float(probs[info["query"]]), abs=1e-4)
        assert info["isthing"] == (info["label_id"] != 1) == (not info["was_fused"])


def test_panoptic_tracks_by_the_processors_settings_and_none_at_all():
    processor = Mask2FormerVideoProcessor(task="panoptic", label_ids_to_fuse=[0], threshold=0.3)
    outputs = run(tiny_video_model(), clips(2))
    by_default = processor.post_process_video_panoptic_segmentation(outputs, target_sizes=[(64, 96), (32, 48)])
    assert [result["segmentation"].shape for result in by_default] == [(3, 64, 96), (3, 32, 48)]
    said = Mask2FormerVideoProcessor().post_process_video_panoptic_segmentation(
        outputs, threshold=0.3, label_ids_to_fuse=[0], target_sizes=[(64, 96), (32, 48)]
    )
    assert [result["segments_info"] for result in by_default] == [result["segments_info"] for result in said]
    (nothing, _) = processor.post_process_video_panoptic_segmentation(outputs, threshold=1.0)
    assert not nothing["segmentation"].any() and nothing["segments_info"] == []


# --- frames ---


def test_frames_come_in_many_forms(tmp_path):
    frames = pictures()
    for index, frame in enumerate(frames):
        frame.save(tmp_path / f"{index:03d}.png")
    arrays = np.stack([np.asarray(frame) for frame in frames])
    processor = Mask2FormerVideoProcessor()
    expected = processor(frames, return_tensors="pt")
    assert expected["pixel_values_videos"].shape == (1, 3, 3, 384, 544)
    assert expected["pixel_mask"].sum() == 360 * 540
    forms = [tmp_path, str(tmp_path), arrays, torch.from_numpy(arrays).permute(0, 3, 1, 2), [frames], tuple(frames)]
    forms.append(sorted(tmp_path.iterdir()))
    for form in forms:
        assert torch.equal(processor(form, return_tensors="pt")["pixel_values_videos"], expected["pixel_values_videos"])
    both = processor([frames, tmp_path], return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(both, expected["pixel_values_videos"].expand(2, -1, -1, -1, -1))


def test_each_frame_is_treated_as_an_image():
    frames = pictures()
    clip = Mask2FormerVideoProcessor()(frames, return_tensors="pt")
    images = M2FImageProcessor(size={"shortest_edge": 360, "longest_edge": 1333})(frames, return_tensors="pt")
    assert torch.equal(clip["pixel_values_videos"][0], images["pixel_values"])
    assert torch.equal(clip["pixel_mask"][0], images["pixel_mask"][0])


def test_masks_go_with_their_frames():
    masks = np.zeros((2, 3, 40, 60), dtype=bool)
    masks[0, 1, :20] = True
    masks[1, 2, :, 30:] = True
    batch = Mask2FormerVideoProcessor(do_resize=False)(
        pictures(), mask_labels=[masks], class_labels=[[4, 2]], return_tensors="pt"
    )
    assert batch["mask_labels"][0].shape == (2, 3, 64, 64) and batch["mask_labels"][0].dtype == torch.bool
    assert np.array_equal(batch["mask_labels"][0][..., :40, :60], masks)
    assert batch["mask_labels"][0].sum() == masks.sum()
    assert batch["class_labels"][0].tolist() == [4, 2]


def test_the_processor_is_saved_and_reads_an_image_checkpoints_settings(tmp_path, caplog):
    Mask2FormerVideoProcessor(max_detections=7, instance_threshold=0.25).save_pretrained(tmp_path / "video")
    loaded = Mask2FormerVideoProcessor.from_pretrained(tmp_path / "video")
    assert type(loaded) is Mask2FormerVideoProcessor
    assert (loaded.max_detections, loaded.instance_threshold, loaded.task) == (7, 0.25, "instance")
    image_processor = M2FImageProcessor(task="panoptic", size={"height": 64, "width": 96}, channel_order="BGR")
    image_processor.save_pretrained(tmp_path / "image")
    of_images = Mask2FormerVideoProcessor.from_pretrained(tmp_path / "image")
    assert (of_images.task, dict(of_images.size), of_images.channel_order) == (
        "instance",
        {"height": 64, "width": 96},
        "BGR",
    )
    back = M2FImageProcessor.from_pretrained(tmp_path / "video")
    assert (back.task, dict(back.size)) == ("instance", {"shortest_edge": 360, "longest_edge": 1333})
    assert caplog.text == ""  # nothing had to be guessed


def test_frames_of_a_folder_come_by_their_numbers(tmp_path):
    for number in (10, 9, 100):
        Image.new("L", (8, 8), number).save(tmp_path / f"frame{number}.png")
    Image.new("L", (8, 8), 11).save(tmp_path / "frame10.png2.png")  # where others have a number, a text ends
    Image.new("L", (8, 8)).save(tmp_path / ".hidden.png")
    assert [int(frame[0, 0, 0]) for frame in stream_frames(tmp_path)] == [9, 10, 11, 100]
    assert count_frames(tmp_path) == 4 and count_frames(iter([])) is None


def test_a_stream_holds_one_frame_and_knows_early_that_there_is_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder or video file"):
        stream_frames(tmp_path / "nowhere")
    opened = []
    frames = stream_frames(opened.append(frame) or frame for frame in pictures(3))
    next(frames)
    assert len(opened) == 1


def test_a_damaged_frame_of_a_stream_keeps_its_number(tmp_path):
    for index, frame in enumerate(pictures(3)):
        frame.save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"frame 1 \(.*1\.png"):
        first, damaged, last = stream_frames(tmp_path)
    assert damaged.index == 1 and "1.png" in damaged.reason
    assert first.shape == last.shape == (3, 40, 60)
    (tmp_path / "0.png").unlink()
    (tmp_path / "2.png").unlink()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no frames that can be read"):
        list(stream_frames(tmp_path))


def test_a_clip_that_cannot_be_read_says_why(tmp_path):
    processor = Mask2FormerVideoProcessor()
    with pytest.raises(ValueError, match="no frames"):
        processor([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no frames.*\.png"):
        processor(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no folder or video file"):
        processor(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"differ in size .*40x60 in frame 0, 50x60 in frame 2"):
        processor([*pictures(2), *pictures(1, (50, 60))])
    with pytest.raises(ValueError, match=r"one number of frames.*\[2, 3\]"):
        processor([pictures(2), pictures(3)])
    with pytest.raises(ValueError, match="go together"):
        processor(pictures(), class_labels=[[1]])


@pytest.mark.parametrize("clip", ["image", "array", "tensor"])
def test_a_single_image_is_no_clip(clip):
    image = pictures(1)[0]
    form = {"image": image, "array": np.asarray(image), "tensor": torch.from_numpy(np.array(image))}[clip]
    with pytest.raises(ValueError, match=r"a single image is no clip: give a list of frames, \[image\]"):
        Mask2FormerVideoProcessor()(form)
    assert Mask2FormerVideoProcessor()([form])["pixel_values_videos"].shape[:2] == (1, 1)


@pytest.mark.parametrize("clip", [None, 3, {"a": 1}, np.zeros((1, 1, 1, 4, 4, 3), dtype=np.uint8)])
def test_what_is_no_clip_is_refused(clip):
    with pytest.raises(ValueError, match=r"is no clip: give a list of images, an array \(T, H, W, 3\), a folder"):
        Mask2FormerVideoProcessor()(clip)


def test_labels_of_another_clip_are_refused():
    processor, frames, masks = Mask2FormerVideoProcessor(), pictures(), np.zeros((2, 3, 40, 60), dtype=bool)
    for labels in (
        {"mask_labels": [masks] * 2, "class_labels": [[1, 2]] * 2},
        {"mask_labels": [masks], "class_labels": []},
    ):
        with pytest.raises(ValueError, match=r"one entry for each clip: there are 1 clips, but \d and \d entries"):
            processor(frames, **labels)
    with pytest.raises(ValueError, match=r"mask_labels of clip 0 must be \(N, 3, H, W\), but are \(2, 2, 40, 60\)"):
        processor(frames, mask_labels=[masks[:, :2]], class_labels=[[1, 2]])
    with pytest.raises(ValueError, match=r"segmentation_maps is for images: give .* as mask_labels"):
        processor(frames, segmentation_maps=[np.zeros((40, 60))] * 3)


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_outputs_of_the_other_kind_of_model_are_refused(task):
    with torch.no_grad():
        of_clips = tiny_video_model()(clips())
        of_images = Mask2FormerForUniversalSegmentation(tiny_config(**VIDEO_FIELDS))(clips()[0])
    says = r"are a video model's: use `Mask2FormerVideoProcessor\.post_process_video_instance_segmentation`"
    with pytest.raises(ValueError, match=says):
        M2FImageProcessor(task=task).post_process(of_clips)
    processor = Mask2FormerVideoProcessor()
    with pytest.raises(ValueError, match=says):
        getattr(processor, f"post_process_{task}_segmentation")(of_clips)
    with pytest.raises(ValueError, match=r"are an image model's: post-process them with `M2FImageProcessor`"):
        processor.post_process_video_instance_segmentation(of_images)
    if task == "semantic":
        with pytest.raises(ValueError, match=r"no task 'semantic'; choose one of instance, panoptic"):
            processor.post_process(of_clips, task)
    else:
        own = Mask2FormerVideoProcessor(task=task).post_process(of_clips)[0]["segmentation"]
        assert own.dim() == (4 if task == "instance" else 3)
        assert torch.equal(own, processor.post_process(of_clips, task)[0]["segmentation"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 50}, "threshold 50 is not a probability"),
        ({"threshold": float("nan")}, "threshold nan is not"),
        ({"mask_threshold": -1}, "mask_threshold -1 is not"),
        ({"overlap_mask_area_threshold": 2}, "overlap_mask_area_threshold 2 is not"),
        ({"max_detections": -1}, "max_detections must be at least 1"),
        ({"target_sizes": (48, 64)}, r"is no list of sizes: pass one \(height, width\)"),
        ({"target_sizes": torch.tensor([48, 64])}, "is no list of sizes"),
        ({"target_sizes": [(48, 64, 3)]}, "is no list of sizes"),
        ({"target_sizes": [(48, 64)] * 2}, "2 target sizes for 1 images"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    outputs, (name,) = run(tiny_video_model(), clips()), settings
    for task, other in (("instance", "overlap_mask_area_threshold"), ("panoptic", "max_detections")):
        if name != other:
            with pytest.raises(ValueError, match=message):
                Mask2FormerVideoProcessor(task=task).post_process(outputs, **settings)


@pytest.mark.parametrize("width", [1, 3, 4])
def test_columns_are_no_channels(width):
    frames = np.random.default_rng(0).integers(256, size=(2, 40, width, 3), dtype=np.uint8)
    processor = Mask2FormerVideoProcessor(do_resize=False, do_normalize=False)
    for clip, data_format in ((frames, None), (frames.transpose(0, 3, 1, 2), "channels_first")):
        batch = processor(clip, input_data_format=data_format, return_tensors="pt")
        pixels = batch["pixel_values_videos"][0, :, :, :40, :width]
        assert np.array_equal((255 * pixels).round().numpy(), frames.transpose(0, 3, 1, 2))


def test_a_folder_is_read_whatever_else_is_in_it(tmp_path):
    """Names that mix numbers and texts, other files, folders, and links that lead nowhere."""
    frame = pictures(1)[0]
    for name in ("a1.png", "a1.png2.png", "a1.png10.png", "1a.png", "\u00b2.png", "\u0663.PNG", "-.png"):
        frame.save(tmp_path / name)
    (tmp_path / "b.png").mkdir()
    for name in ("._a1.png", "notes.txt"):
        (tmp_path / name).write_text("no picture")
    assert count_frames(tmp_path) == len(list(stream_frames(f"{tmp_path}/"))) == 7
    (tmp_path / "a1.png3.png").symlink_to(tmp_path / "gone.png")
    with pytest.warns(UserWarning, match=r"there is no image file .*a1\.png3\.png"):
        frames = list(stream_frames(tmp_path))
    assert [isinstance(frame, np.ndarray) for frame in frames] == [True] * 4 + [False] + [True] * 3


def test_a_damaged_frame_is_named_and_the_others_are_kept(tmp_path):
    for index, frame in enumerate(pictures()):
        frame.save(tmp_path / f"{index}.png")
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"goes on without what cannot be read: frame 1 \("):
        batch = Mask2FormerVideoProcessor()(tmp_path, return_tensors="pt")
    assert batch["pixel_values_videos"].shape[1] == 2


def test_a_video_file_without_pyav(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"no video")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"needs PyAV: pip install 'm2f_hf\[video\]'.*folder of its frames"):
        Mask2FormerVideoProcessor()(path)


def test_a_video_file_is_read(tmp_path):
    shades = (40, 120, 200)
    write_video(tmp_path / "clip.mp4", [np.full((32, 64, 3), shade, dtype=np.uint8) for shade in shades])
    batch = Mask2FormerVideoProcessor(do_resize=False, do_normalize=False)(tmp_path / "clip.mp4", return_tensors="pt")
    assert batch["pixel_values_videos"].shape == (1, 3, 3, 32, 64)
    for frame, shade in zip(batch["pixel_values_videos"][0], shades, strict=True):
        assert (255 * frame - shade).abs().max() < 8
    assert count_frames(tmp_path / "clip.mp4") == 3 and frame_rate(tmp_path / "clip.mp4") == 5
    # Titles are in whatever encoding.
    write_video(tmp_path / "titled.avi", pictures(2, (32, 64)), title="TITLE")
    (tmp_path / "titled.avi").write_bytes((tmp_path / "titled.avi").read_bytes().replace(b"TITLE", b"T\xcfTLE"))
    assert len(list(stream_frames(tmp_path / "titled.avi"))) == 2
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"broken\.mp4 is no video file that can be read"):
        Mask2FormerVideoProcessor()(tmp_path / "broken.mp4")


@pytest.mark.parametrize(("codec", "name"), [("mjpeg", "clip.avi"), ("mpeg4", "clip.mp4"), ("libx264", "clip.mp4")])
def test_damage_in_the_middle_of_a_video_file_is_named(codec, name, tmp_path):
    """Also where pictures are stored in another order than they are shown in."""
    av = pytest.importorskip("av", reason="needs PyAV")
    path = tmp_path / name
    write_video(path, [frame.resize((64, 48)) for frame in pictures(8)], codec=codec)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        times = sorted(packet.pts for packet in packets)
        place, size, number = packets[3].pos, packets[3].size, times.index(packets[3].pts)
    content = bytearray(path.read_bytes())
    content[place + 8 : place + size] = bytes(size - 8)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"clip\.\w+ goes on without what cannot be read: frame {number} \("):
        frames = list(stream_frames(path))
    shapes = [getattr(frame, "shape", None) for frame in frames]
    assert shapes == [None if index == number else (3, 48, 64) for index in range(8)]
