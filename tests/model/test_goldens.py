"""The whole path against the original's own outputs: converted weights, every stage, logits, losses and gradients."""

import json
import sys
import tempfile
from copy import deepcopy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from m2f_hf import M2FImageProcessor, Mask2FormerForUniversalSegmentation, Mask2FormerForVideoSegmentation
from m2f_hf.kernels import fast_path


GOLDENS = (
    "coco_panoptic_r50",
    "coco_panoptic_swin",
    "coco_instance_swin",
    "ade20k_semantic_swinl",
    "fpn_basepixeldecoder",
    "ytvis2019_r50",
)
# A ReLU of the recorded run sits on its kink: (encoder layer, index into its fc1 output). In double precision its input
# is 6e-7 below zero; in single precision rounding decides, and so the number of threads does: with two it comes out
# above zero, as recorded, with one below (and level_embed and sampling_offsets then differ by up to 5e-3). The gradient
# test pushes it over, after checking that it is as close to zero as that; with it all gradients agree to 1e-5.
KINKS = {"coco_panoptic_swin": (1, (1, 59, 757))}
KINK_WIDTH = 3e-6


class Golden:
    """One converted model, its recorded arrays and what our model makes of the recorded input."""

    def __init__(self, folder, converted):
        self.folder = folder
        self.is_video = folder.name.startswith("ytvis")
        model_class = Mask2FormerForVideoSegmentation if self.is_video else Mask2FormerForUniversalSegmentation
        self.model = model_class.from_pretrained(converted)
        self.intermediate = self.arrays("intermediate")
        self.outputs = self.stages = None

    def arrays(self, name):
        with np.load(self.folder / f"{name}.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    @property
    def pixel_values(self):
        """(B, 3, H, W), or the frames of one clip (1, T, 3, H, W)."""
        return self.intermediate["input"][None] if self.is_video else self.intermediate["input"]

    def training_pixel_values(self):
        """The images again, or two other clips."""
        if not self.is_video:
            return self.pixel_values
        processor = M2FImageProcessor(do_resize=False)
        clips = [
            processor([np.load(self.folder / f"train_video{clip}_frame{frame}.npy") for frame in range(3)])
            for clip in range(2)
        ]
        return torch.from_numpy(np.stack([np.stack(clip["pixel_values"]) for clip in clips]))

    def run(self):
        """Outputs, and by the original's names every intermediate stage that hooks can see."""
        if self.outputs is None:
            stages = {}
            model = self.model.model
            decoder = model.pixel_level_module.decoder
            watched = {f"pd_input_proj_{i}": m for i, m in enumerate(getattr(decoder, "input_projections", ()))}
            if hasattr(decoder, "encoder"):
                watched |= {f"pd_encoder_layer_{i}": m for i, m in enumerate(decoder.encoder.layers)}
            for i, layer in enumerate(model.transformer_module.decoder.layers):
                watched[f"decoder_layer_out_{i}"] = layer
                layer.register_forward_pre_hook(
                    lambda module, args, i=i: stages.__setitem__(f"attn_mask_{i}", args[4][:, 0])
                )
            for name, module in watched.items():
                module.register_forward_hook(lambda module, args, out, name=name: stages.__setitem__(name, out))
            with torch.no_grad():
                if self.is_video:  # hooks are to see the stages of all frames at once
                    self.model.config.frames_per_batch = 3
                outputs = self.model(self.pixel_values, output_hidden_states=True, output_auxiliary_logits=True)
            stages |= {f"backbone_res{i + 2}": value for i, value in enumerate(outputs.encoder_hidden_states)}
            stages |= {f"multi_scale_{i}": value for i, value in enumerate(outputs.pixel_decoder_hidden_states)}
            stages["mask_features"] = outputs.pixel_decoder_last_hidden_state
            for name in watched:
                if name.startswith("decoder_layer_out"):
                    stages[name] = stages[name][0].transpose(0, 1)
            if self.is_video:
                stages = {name: stage[0] if stage.dim() == 5 else stage for name, stage in stages.items()}
            self.outputs, self.stages = outputs, stages
        return self.outputs, self.stages


@pytest.fixture(scope="module", params=GOLDENS)
def golden(request, goldens, repository, tmp_path_factory):
    sys.path.insert(0, str(repository / "conversion"))
    from converter import convert

    output = tmp_path_factory.mktemp(request.param) / "converted"
    folder = goldens / request.param
    convert(folder / "model.pkl", folder / "config.yaml", output)
    return Golden(folder, output)


def test_every_intermediate_stage_is_the_originals(golden):
    _, stages = golden.run()
    names = [name for name in golden.intermediate if name in stages and not name.startswith("attn_mask")]
    assert {"backbone_res2", "backbone_res5", "mask_features", "multi_scale_2", "decoder_layer_out_4"} <= set(names)
    for name in names:
        expected = golden.intermediate[name]
        bound = 1e-4 * max(1.0, expected.abs().max().item())
        assert (stages[name] - expected).abs().max().item() <= bound, name


def test_attention_masks_are_the_originals(golden):
    _, stages = golden.run()
    layers = [name for name in stages if name.startswith("attn_mask")]
    assert layers
    for name in layers:
        expected = golden.intermediate[name]
        assert torch.equal(stages[name], expected & ~expected.all(-1, keepdim=True)), name


def test_raw_logits_are_the_originals(golden):
    outputs, _ = golden.run()
    expected = golden.arrays("outputs_raw")
    predictions = [*outputs.auxiliary_logits, outputs]
    prefixes = [*(f"aux{i}_" for i in range(len(predictions) - 1)), ""]
    assert len(expected) == 2 * len(predictions)
    for prefix, prediction in zip(prefixes, predictions, strict=True):
        for ours, theirs in (("class_queries_logits", "pred_logits"), ("masks_queries_logits", "pred_masks")):
            torch.testing.assert_close(prediction[ours], expected[prefix + theirs], atol=2e-4, rtol=0)


def test_plain_layers_give_the_same_logits(golden, monkeypatch):
    monkeypatch.setattr(fast_path, "_CHOICE", "plain")
    with torch.no_grad():
        outputs = golden.model(golden.pixel_values)
    expected = golden.arrays("outputs_raw")
    for ours, theirs in (("class_queries_logits", "pred_logits"), ("masks_queries_logits", "pred_masks")):
        torch.testing.assert_close(outputs[ours], expected[theirs], atol=2e-4, rtol=0)


def test_losses_and_gradients_of_a_training_step_are_the_originals(golden):
    recorded = golden.arrays("loss")
    facts = json.loads((golden.folder / "loss.json").read_text())
    targets = golden.arrays("targets")
    pixel_values = golden.training_pixel_values()
    size = pixel_values.shape[-2:]
    masks, labels = [], []
    for i in range(len(pixel_values)):
        mask, of_image = targets[f"masks_{i}"], targets[f"labels_{i}"]
        mask = torch.nn.functional.pad(mask, (0, size[1] - mask.shape[-1], 0, size[0] - mask.shape[-2]))
        if golden.is_video:  # labels by frame, "no object" where an instance is absent
            of_image = of_image.min(1).values
            is_seen = of_image < golden.model.config.num_labels
            mask, of_image = mask[is_seen], of_image[is_seen]
        masks.append(mask)
        labels.append(of_image)
    model = golden.model.train()
    model.config.train_num_points = 112
    if golden.is_video:
        model.config.label_frame = "last"
    criterion = type(model.criterion)(model.config, model.weight_dict)
    first = {draw["what"]: draw["first"] for draw in facts["draws"]}
    layers = model.config.decoder_layers

    def replay(purpose, layer, images, num_points, device):
        call = 0 if layer == layers - 1 else layer + 1
        if purpose == "matching":
            return torch.cat([recorded[f"rand/{first[f'matcher_call{call}'] + image:03d}"] for image in images])
        return recorded[f"rand/{first[f'loss_masks_call{call}'] + (purpose == 'random'):03d}"]

    def over_the_kink(module, args, output):
        position = KINKS[golden.folder.name][1]
        assert abs(output[position].item()) < KINK_WIDTH
        nudge = torch.zeros_like(output)
        nudge[position] = 2 * KINK_WIDTH
        return output + nudge

    hooks = []
    if golden.folder.name in KINKS:
        encoder = model.model.pixel_level_module.decoder.encoder
        hooks.append(encoder.layers[KINKS[golden.folder.name][0]].fc1.register_forward_hook(over_the_kink))
    criterion.draw_points = replay
    model.criterion = criterion
    matchings = []
    criterion.matcher.register_forward_hook(lambda module, args, matching: matchings.append(matching))
    model.zero_grad()
    output = model(pixel_values, mask_labels=masks, class_labels=labels)
    output.loss.backward()
    model.eval()
    for hook in hooks:
        hook.remove()

    (matching,) = matchings
    starts = np.cumsum([0, *map(len, labels)])
    for layer in range(layers):
        for image in range(len(pixel_values)):
            found = f"match/call{0 if layer == layers - 1 else layer + 1}/image{image}"
            rows = matching.images == image
            assert torch.equal(matching.queries[layer, rows], recorded[f"{found}/src"]), found
            assert torch.equal(matching.targets[layer, rows] - starts[image], recorded[f"{found}/tgt"]), found

    assert output.loss.item() == pytest.approx(float(recorded["total"]), rel=1e-4)
    for key, value in recorded.items():
        if key.startswith("unweighted/"):
            ours = key.removeprefix("unweighted/").replace("_ce", "_cross_entropy")
            assert output.loss_dict[ours].item() == pytest.approx(float(value), rel=1e-4), key

    from detectron2_mapping import invert_state_dict

    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    original = on_disk_gradients(model, gradients, invert_state_dict)
    listed = [key for key in recorded if key.startswith("grad/")]
    assert listed
    for key in listed:
        expected = recorded[key]
        bound = 1e-3 * max(expected.abs().max().item(), 1e-3)
        assert (original[key.removeprefix("grad/")] - expected).abs().max().item() <= bound, key
    norms = facts["grad_norms"]
    for name, norm in norms.items():
        if norm > 1e-2:  # below, a gradient is the rounding noise of sums that cancel
            assert original[name].norm().item() == pytest.approx(norm, rel=1e-3), name


def on_disk_gradients(model, gradients, invert):
    """Gradients under the original's names: put in the parameters' place, saved as on disk, mapped back."""
    stand_in = deepcopy(model)
    for name, parameter in stand_in.named_parameters():
        parameter.data = gradients.get(name, torch.zeros_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        stand_in.save_pretrained(folder)
        return invert(load_file(f"{folder}/model.safetensors"), model.config)
