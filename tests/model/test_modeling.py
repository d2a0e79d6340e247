"""The model: against `transformers`' on the same weights, part by part, in training and in inference."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from listening import WarningsOfTransformers
from operations import NoHostWaits, refuse_uploads
from safetensors.torch import load_file, save_file
from tiny import BACKBONES, FIELDS, SIZE, STAGES, images, labels, shake, tiny_config, tiny_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from transformers import Mask2FormerConfig as StockConfig
from transformers import Mask2FormerForUniversalSegmentation as StockModel

from m2f_hf import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerModel
from m2f_hf.kernels import chunks as chunking
from m2f_hf.loss.points import SeededPoints
from m2f_hf.model import modeling as modeling
from m2f_hf.model import transformer_decoder as decoding
from m2f_hf.model.layers import Mask2FormerSinePositionEmbedding
from m2f_hf.model.padding import continue_edges, hidden_padding, image_sizes_from_mask, masked_group_norm


def assert_same_tensors(ours, theirs, **tolerances):
    """Two outputs with the same fields and the same tensors in them."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        pairs = zip(tree_flatten(ours[name])[0], tree_flatten(theirs[name])[0], strict=True)
        for mine, other in pairs:
            torch.testing.assert_close(mine, other, **tolerances, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def model():
    """A small model in evaluation mode; who changes it puts it back."""
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


# transformers' model with the same weights


STOCK_CASES = {
    "swin": ("swin", {}),
    "resnet": ("resnet", {}),
    "swin, two widths": ("swin", {"feature_size": 64}),
    "resnet, enforced projection": ("resnet", {"enforce_input_projection": True}),
}


@pytest.fixture(scope="module", params=STOCK_CASES)
def stock(request, tmp_path_factory):
    """A stock model, the folder it was saved in, ours read from there, and what the loading said."""
    backbone, fields = STOCK_CASES[request.param]
    torch.manual_seed(0)
    theirs = StockModel(StockConfig(backbone_config=dict(BACKBONES[backbone]), **(FIELDS | fields)))
    if fields and not isinstance(theirs.model.transformer_module.input_projections, nn.ModuleList):
        pytest.skip("this release of transformers keeps its input projections in a plain list and does not save them")
    theirs = shake(theirs).eval()
    folder = tmp_path_factory.mktemp("stock")
    theirs.save_pretrained(folder)
    with WarningsOfTransformers() as messages:
        ours, info = Mask2FormerForUniversalSegmentation.from_pretrained(folder, output_loading_info=True)
    return SimpleNamespace(theirs=theirs, folder=folder, ours=ours.eval(), info=info, messages=messages)


def test_a_stock_checkpoint_loads_without_a_word(stock):
    assert {name: list(keys) for name, keys in stock.info.items() if keys} == {}
    assert stock.messages == []
    assert stock.ours.config.model_type == "m2f"


def test_outputs_are_those_of_transformers(stock):
    arguments = {"output_hidden_states": True, "output_auxiliary_logits": True}
    with torch.no_grad():
        ours, theirs = stock.ours(images(), **arguments), stock.theirs(images(), **arguments)
    assert len(ours.auxiliary_logits) == FIELDS["decoder_layers"] - 1
    assert theirs.class_queries_logits.std() > 0.1
    assert theirs.masks_queries_logits.std() > 0.1
    for name in (
        "class_queries_logits",
        "masks_queries_logits",
        "auxiliary_logits",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "pixel_decoder_last_hidden_state",
        "pixel_decoder_hidden_states",
        "transformer_decoder_hidden_states",
    ):
        assert_same_tensors({name: ours[name]}, {name: theirs[name]}, atol=1e-5, rtol=1e-5)


def test_the_loss_is_that_of_transformers_at_the_same_points(stock, monkeypatch):
    targets = labels()
    draws, rand = [], torch.rand

    def record(*shape, **kwargs):
        drawn = rand(*shape, **kwargs)
        if drawn.dim():  # older releases also draw single numbers, to drop layers
            draws.append(drawn)
        return drawn

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch, "rand", record)
        expected = stock.theirs(
            images(),
            mask_labels=[mask.float() for mask in targets["mask_labels"]],
            class_labels=targets["class_labels"],
        ).loss
    layers, per_layer = FIELDS["decoder_layers"], len(targets["mask_labels"]) + 2
    assert len(draws) == layers * per_layer

    def replay(purpose, layer, images, num_points, device):
        first = per_layer * ((layer + 1) % layers)  # theirs starts with the last
        if purpose == "matching":
            return torch.cat(draws[first : first + per_layer - 2])
        return draws[first + per_layer - 2 + (purpose == "random")]

    monkeypatch.setattr(stock.ours.criterion, "draw_points", replay)
    with torch.no_grad():
        loss = stock.ours(images(), **targets).loss
    torch.testing.assert_close(loss, expected.reshape(()), rtol=1e-5, atol=1e-5)


def test_ours_goes_back_to_transformers_with_the_same_keys(stock, tmp_path):
    stock.ours.save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(stock.folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "mask2former"}
    for field in ("pixel_decoder", "freeze_backbone_norm"):
        config.pop(field)
    (tmp_path / "config.json").write_text(json.dumps(config))
    back, info = StockModel.from_pretrained(tmp_path, output_loading_info=True)
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    with torch.no_grad():
        assert_same_tensors(back.eval()(images()), stock.theirs(images()), rtol=0, atol=0)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("fields", [{}, {"pixel_decoder": "fpn", "pre_norm": True}], ids=["msdeform", "fpn"])
def test_what_is_saved_loads_back_without_a_word(backbone, fields, tmp_path):
    saved = tiny_model(backbone, **fields)
    with WarningsOfTransformers() as messages:
        saved.save_pretrained(tmp_path)
        loaded, info = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert messages == []
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    assert not loaded.training
    trainable = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (saved, loaded)]
    assert trainable[0] == trainable[1]
    with torch.no_grad():
        assert_same_tensors(loaded(images()), saved(images()), rtol=0, atol=0)


def test_the_base_model_reads_the_same_folder(model, folder):
    with WarningsOfTransformers() as messages:
        base = Mask2FormerModel.from_pretrained(folder).eval()
    assert messages == []
    with torch.no_grad():
        outputs, full = base(images()), model(images())
    assert torch.equal(outputs.masks_queries_logits[-1], full.masks_queries_logits)
    assert len(outputs.masks_queries_logits) == 1


# Position encoding


def test_the_position_encoding_is_the_originals(goldens):
    with np.load(goldens / "extra" / "modules.npz") as arrays:
        expected = torch.from_numpy(arrays["pe2d_C64_5x7"])
    encoding = Mask2FormerSinePositionEmbedding(32)(torch.zeros(1, 3, 5, 7))
    torch.testing.assert_close(encoding, expected, atol=1e-5, rtol=0)


def test_the_position_encoding_by_definition():
    height, width, features = 3, 4, 6
    encoding = Mask2FormerSinePositionEmbedding(features)(torch.zeros(2, 1, height, width))
    assert encoding.shape == (1, 2 * features, height, width)
    for channel in range(2 * features):
        pair = channel % features // 2
        function = np.cos if channel % 2 else np.sin
        for row in range(height):
            for column in range(width):
                share = (row + 1) / (height + 1e-6) if channel < features else (column + 1) / (width + 1e-6)
                expected = function(2 * np.pi * share / 10000 ** (2 * pair / features))
                assert encoding[0, channel, row, column].item() == pytest.approx(expected, abs=1e-5)


def test_the_position_encoding_of_a_padded_map_is_that_of_its_image():
    embedding = Mask2FormerSinePositionEmbedding(4)
    padding = torch.ones(2, 5, 6, dtype=torch.bool)
    padding[0, :3, :4] = padding[1, :5, :2] = False
    encoding = embedding(torch.zeros(2, 1, 5, 6), padding)
    torch.testing.assert_close(encoding[:1, :, :3, :4], embedding(torch.zeros(1, 1, 3, 4)))
    torch.testing.assert_close(encoding[1:, :, :, :2], embedding(torch.zeros(1, 1, 5, 2)))


# Padding


def test_image_sizes_are_read_off_the_mask():
    mask = torch.zeros(3, 5, 7, dtype=torch.int64)
    mask[0, :5, :7] = mask[1, :2, :3] = mask[2, :1, :1] = 1
    for dtype in (torch.int64, torch.bool, torch.float32):
        sizes = image_sizes_from_mask(mask.to(dtype))
        assert sizes.dtype == torch.int64
        assert sizes.tolist() == [[5, 7], [2, 3], [1, 1]]


def test_padding_beyond_an_images_own_multiple_of_32_is_hidden():
    padding = hidden_padding(torch.tensor([[33, 32], [64, 1]]), 8, (8, 12))
    expected = torch.ones(2, 8, 12, dtype=torch.bool)
    expected[0, :8, :4] = expected[1, :8, :4] = False  # 64 x 32 pixels each
    assert torch.equal(padding, expected)
    assert not hidden_padding(torch.tensor([[64, 96]]), 32, (2, 3)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_group_norm_is_group_norm_of_the_image_alone(dtype):
    norm = nn.GroupNorm(4, 12).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
    features = torch.randn(2, 12, 5, 6).to(dtype) * 3 + 2
    padding = torch.ones(2, 5, 6, dtype=torch.bool)
    padding[0, :3, :4] = padding[1, :5, :2] = False
    features = features.masked_fill(padding[:, None], 1e4)
    output = masked_group_norm(features, norm, padding)
    assert output.dtype == dtype
    assert not output.masked_fill(~padding[:, None], 0).any()
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    torch.testing.assert_close(output[:1, :, :3, :4], norm(features[:1, :, :3, :4]), **tolerance)
    torch.testing.assert_close(output[1:, :, :, :2], norm(features[1:, :, :, :2]), **tolerance)


def test_continued_edges_interpolate_as_the_map_alone():
    features = torch.randn(2, 3, 4, 5)
    padding = torch.ones(2, 4, 5, dtype=torch.bool)
    padding[0, :2, :3] = padding[1, :4, :1] = False
    continued = continue_edges(features, padding)
    double = lambda maps: nn.functional.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(double(continued)[:1, :, :4, :6], double(features[:1, :, :2, :3]))
    torch.testing.assert_close(double(continued)[1:, :, :, :2], double(features[1:, :, :, :1]))


class FixedPyramid(nn.Module):
    """Stands in for a backbone: gives the maps it was made with. A real one lets padding leak in at the borders."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, pixel_values):
        return SimpleNamespace(feature_maps=self.maps)


def pyramid(channels, size, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(1, width, size[0] // stride, size[1] // stride, generator=generator)
        for width, stride in zip(channels, (4, 8, 16, 32), strict=True)
    )


@pytest.mark.parametrize("fields", [{}, {"pixel_decoder": "fpn"}, {"feature_size": 64}], ids=str)
def test_in_a_batch_an_image_gives_what_it_gives_alone(fields):
    model = tiny_model(**fields)
    level = model.model.pixel_level_module
    sizes, batch_size = [(60, 90), (128, 33), (97, 160)], (128, 160)
    own = [tuple(-(-side // 32) * 32 for side in size) for size in sizes]
    pyramids = [pyramid(level.encoder.channels, size, seed) for seed, size in enumerate(own)]
    padded = []
    for stride, maps in zip((4, 8, 16, 32), zip(*pyramids, strict=True), strict=True):
        garbage = 1e4 * torch.randn(len(maps), maps[0].shape[1], *(side // stride for side in batch_size))
        for image, features in enumerate(maps):
            garbage[image, :, : features.shape[2], : features.shape[3]] = features[0]
        padded.append(garbage)
    mask = torch.zeros(len(sizes), *batch_size, dtype=torch.int64)
    for image, (height, width) in enumerate(sizes):
        mask[image, :height, :width] = 1

    def run(maps, size, pixel_mask=None):
        level.encoder = FixedPyramid(maps)
        with torch.no_grad():
            return model(
                torch.zeros(len(maps[0]), 3, *size),
                pixel_mask=pixel_mask,
                output_auxiliary_logits=True,
                output_hidden_states=True,
            )

    batch = run(tuple(padded), batch_size, mask)
    assert batch.image_sizes.tolist() == [list(size) for size in sizes]
    for image, (maps, size) in enumerate(zip(pyramids, own, strict=True)):
        height, width = size[0] // 4, size[1] // 4
        for pixel_mask in (None, mask[image : image + 1, : size[0], : size[1]]):
            alone = run(maps, size, pixel_mask)
            assert alone.masks_queries_logits.std() > 0.1
            predictions = zip([*batch.auxiliary_logits, batch], [*alone.auxiliary_logits, alone], strict=True)
            for together, single in predictions:
                torch.testing.assert_close(
                    together["class_queries_logits"][image], single["class_queries_logits"][0], atol=1e-4, rtol=1e-4
                )
                torch.testing.assert_close(
                    together["masks_queries_logits"][image, :, :height, :width],
                    single["masks_queries_logits"][0],
                    atol=1e-4,
                    rtol=1e-4,
                )


def test_padding_is_image_without_a_mask():
    # The original's arithmetic: a change in the padding reaches everything.
    model = tiny_model()
    pixel_values = images()
    changed = pixel_values.clone()
    changed[0, :, :, 64:] += 1
    mask = torch.ones(2, *SIZE)
    mask[0, :, 64:] = 0
    with torch.no_grad():
        plain, moved = (model(values).class_queries_logits for values in (pixel_values, changed))
        masked = model(pixel_values, pixel_mask=mask).class_queries_logits
    assert (plain[0] - moved[0]).abs().max() > 1e-4
    assert (plain[0] - masked[0]).abs().max() > 1e-4
    torch.testing.assert_close(plain[1], masked[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"pixel_decoder": "fpn"}], ids=["msdeform", "fpn"])
def test_a_mask_of_ones_changes_nothing(fields):
    model = tiny_model(**fields)
    with torch.no_grad():
        plain = model(images())
        masked = model(images(), pixel_mask=torch.ones(2, *SIZE, dtype=torch.int64))
    assert_same_tensors(masked, plain, atol=1e-5, rtol=1e-5)
    assert plain.image_sizes.dtype == masked.image_sizes.dtype == torch.int64
    assert plain.image_sizes.tolist() == [list(SIZE)] * 2


def test_an_image_without_a_pixel_spoils_no_other(model):
    mask = torch.ones(2, *SIZE)
    mask[0] = 0
    with torch.no_grad():
        outputs = model(images(), pixel_mask=mask)
        alone = model(images()[1:])
    assert outputs.class_queries_logits.isfinite().all()
    assert outputs.masks_queries_logits.isfinite().all()
    torch.testing.assert_close(outputs.class_queries_logits[1:], alone.class_queries_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(50, 71), (32, 32), (33, 1)], ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_sizes_that_are_no_multiple_of_32(backbone, size):
    with torch.no_grad():
        # with one channel to a group, GroupNorm refuses a map of one pixel
        outputs = tiny_model(backbone, feature_size=64)(images(1, size))
    assert outputs.masks_queries_logits.shape == (1, 6, -(-size[0] // 4), -(-size[1] // 4))
    assert outputs.masks_queries_logits.isfinite().all()


# Wrong input


def test_wrong_inputs_are_refused(model):
    with pytest.raises(ValueError, match=r"`pixel_values` has shape \(3, 64, 96\).*`pixel_values\[None\]`"):
        model(images()[0])
    with pytest.raises(ValueError, match=r"`pixel_mask` has shape \(2, 64, 64\), expected \(2, 64, 96\)"):
        model(images(), pixel_mask=torch.ones(2, 64, 64))
    with pytest.raises(ValueError, match="`class_labels` is missing"):
        model(images(), mask_labels=labels()["mask_labels"])
    with pytest.raises(ValueError, match="`mask_labels` is missing"):
        model(images(), class_labels=labels()["class_labels"])


def test_a_misspelt_argument_is_refused_by_name(model):
    for part in (model, model.model):
        with pytest.raises(TypeError, match="pixel_masks"):
            part(images(), pixel_masks=torch.ones(2, *SIZE))


def test_feature_maps_at_other_strides_are_refused():
    backbone = BACKBONES["resnet"] | {"out_features": ["stem", *STAGES[:3]]}
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, **FIELDS)).eval()
    with pytest.raises(ValueError, match=r"not strides \[4, 8, 16, 32\] of \(64, 96\).*`out_features`"):
        model(images())


# Attention


def test_sdpa_and_eager_attention_agree(folder):
    models = {
        name: Mask2FormerForUniversalSegmentation.from_pretrained(folder, attn_implementation=name)
        for name in ("sdpa", "eager")
    }
    assert [model.config._attn_implementation for model in models.values()] == ["sdpa", "eager"]
    mask = torch.ones(2, *SIZE)
    mask[0, :32] = 0
    calls = []
    sdpa = nn.functional.scaled_dot_product_attention
    for pixel_mask in (None, mask.flip(1)):
        outputs = {}
        for name, model in models.items():
            with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    nn.functional,
                    "scaled_dot_product_attention",
                    lambda *args, name=name: calls.append(name) or sdpa(*args),
                )
                outputs[name] = model(images(), pixel_mask=pixel_mask, output_auxiliary_logits=True)
        assert_same_tensors(outputs["sdpa"], outputs["eager"], atol=1e-5, rtol=1e-5)
    assert calls == ["sdpa"] * 2 * 2 * (FIELDS["decoder_layers"] - 1)  # self- and cross-attention, twice


def test_attention_weights_sum_to_one_and_are_zero_where_blocked(model):
    blocked = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: blocked.append(args[4]))
        for layer in model.model.transformer_module.decoder.layers
    ]
    with torch.no_grad():
        plain = model(images())
        blocked.clear()
        outputs = model(images(), output_attentions=True)
    for hook in hooks:
        hook.remove()
    layers, heads, queries = 3, 2, 6
    assert plain.attentions is plain.cross_attentions is None
    assert len(outputs.attentions) == len(outputs.cross_attentions) == layers
    positions = [(64 // stride) * (96 // stride) for stride in (32, 16, 8)]
    assert any(mask.any() for mask in blocked)
    for own, cross, mask, count in zip(outputs.attentions, outputs.cross_attentions, blocked, positions, strict=True):
        assert own.shape == (2, heads, queries, queries)
        assert cross.shape == (2, heads, queries, count)
        for weights in (own, cross):
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads, queries), atol=1e-5, rtol=0)
        assert not cross.masked_select(mask).any()
        assert not mask.all(-1).any()
    torch.testing.assert_close(outputs.class_queries_logits, plain.class_queries_logits, atol=1e-5, rtol=1e-5)


def test_blocked_is_where_the_resized_mask_is_below_one_half():
    embeddings, features = torch.randn(2, 5, 4), torch.randn(2, 4, 16, 24)
    embeddings[0, 0] = 0  # nothing below one half: nothing blocked
    size = (4, 6)
    level = nn.functional.interpolate(features, size, mode="bilinear", align_corners=False).flatten(2)
    blocked = decoding.Mask2FormerMaskPredictor.blocked_positions(embeddings, level, None)
    logits = torch.einsum("bqc,bchw->bqhw", embeddings, features)
    resized = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
    expected = resized.sigmoid().flatten(2) < 0.5
    expected[expected.all(-1)] = False
    assert torch.equal(blocked[:, 0], expected)


def test_a_query_with_an_empty_mask_looks_everywhere_but_at_padding():
    embeddings, features = torch.ones(1, 2, 1), torch.tensor([[[-1.0, -1.0, -1.0, 1.0]]])
    padding = torch.tensor([[False, False, True, True]])
    blocked = decoding.Mask2FormerMaskPredictor.blocked_positions(embeddings, features, padding)
    assert blocked.tolist() == [[[[False, False, True, True]] * 2]]
    open_everywhere = decoding.Mask2FormerMaskPredictor.blocked_positions(embeddings, -features.abs(), None)
    assert not open_everywhere.any()


# What is returned


def test_hidden_states_have_their_shapes(model):
    with torch.no_grad():
        outputs = model(images(), output_hidden_states=True)
        plain = model(images())
    strides = lambda widths, strides: [(2, width, 64 // s, 96 // s) for width, s in zip(widths, strides, strict=True)]
    assert [state.shape for state in outputs.encoder_hidden_states] == strides([8, 12, 16, 20], [4, 8, 16, 32])
    assert [state.shape for state in outputs.pixel_decoder_hidden_states] == strides([32] * 3, [32, 16, 8])
    assert [state.shape for state in outputs.transformer_decoder_hidden_states] == [(6, 2, 32)] * 4
    assert outputs.encoder_last_hidden_state.shape == (2, 20, 2, 3)
    assert outputs.pixel_decoder_last_hidden_state.shape == (2, 20, 16, 24)
    assert outputs.transformer_decoder_last_hidden_state.shape == (2, 6, 32)
    for name in ("encoder_hidden_states", "pixel_decoder_hidden_states", "transformer_decoder_hidden_states"):
        assert getattr(plain, name) is None


@pytest.mark.parametrize("with_labels", [False, True])
def test_a_tuple_holds_what_is_not_none_the_loss_first(model, monkeypatch, with_labels):
    monkeypatch.setattr(model.criterion, "draw_points", SeededPoints(0))
    arguments = labels() if with_labels else {}
    with torch.no_grad():
        outputs = model(images(), output_hidden_states=True, **arguments)
        values = model(images(), output_hidden_states=True, return_dict=False, **arguments)
    assert isinstance(values, tuple)
    assert_same_tensors(dict(enumerate(values)), dict(enumerate(outputs.to_tuple())), rtol=0, atol=0)
    assert values[0].shape == (() if with_labels else (2, 6, 4))
    assert "loss" in outputs if with_labels else "loss" not in outputs


def test_the_base_model_s_tuple(model):
    with torch.no_grad():
        outputs, values = model.model(images()), model.model(images(), return_dict=False)
    assert_same_tensors(dict(enumerate(values)), dict(enumerate(outputs.to_tuple())), rtol=0, atol=0)


def test_auxiliary_logits_are_those_of_the_layers(model, monkeypatch):
    assert model.config.output_auxiliary_logits is None
    with torch.no_grad():
        plain = model(images())
        outputs = model(images(), output_auxiliary_logits=True)
        monkeypatch.setattr(model.config, "output_auxiliary_logits", True)
        configured = model(images())
        declined = model(images(), output_auxiliary_logits=False)
    assert plain.auxiliary_logits is declined.auxiliary_logits is None
    assert_same_tensors(configured, outputs, rtol=0, atol=0)
    assert len(outputs.auxiliary_logits) == 3
    states = outputs.auxiliary_logits[0]["class_queries_logits"]
    raw = model.model.transformer_module.queries_features.weight
    norm = model.model.transformer_module.decoder.layernorm
    torch.testing.assert_close(states[1], model.class_predictor(norm(raw)).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.class_queries_logits, plain.class_queries_logits, atol=1e-6, rtol=1e-6)


class Products(TorchFunctionMode):
    """Number of positions that each product of mask embeddings and features has."""

    def __init__(self):
        super().__init__()
        self.positions = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.matmul:
            self.positions.append(args[1].shape[-1])
        return function(*args, **(kwargs or {}))


def test_at_inference_only_the_last_prediction_is_computed(model):
    read = []
    hook = model.class_predictor.register_forward_hook(lambda module, args, out: read.append(args[0].shape))
    size = SIZE[0] // 4 * (SIZE[1] // 4)
    with torch.no_grad():
        for options, predictions in (({}, 1), ({"output_auxiliary_logits": True}, 4)):
            with Products() as products:
                model(images(), **options)
            assert (read.pop(), products.positions.count(size)) == ((predictions, 2, 6, 32), predictions)
    hook.remove()
    assert read == []


# Loss


def test_the_loss_is_the_weighted_sum_of_its_terms(monkeypatch):
    model = tiny_model(class_weight=1.5, mask_weight=2.5, dice_weight=3.5)
    outputs = model(images(), **labels())
    assert len(outputs.loss_dict) == 3 * 4
    weights = {"cross": 1.5, "mask": 2.5, "dice": 3.5}
    expected = sum(weights[name.split("_")[1]] * term for name, term in outputs.loss_dict.items())
    torch.testing.assert_close(outputs.loss, expected)
    assert outputs.loss.shape == ()
    assert outputs.loss.dtype == torch.float32


def test_without_auxiliary_losses_only_the_last_prediction_counts():
    model = tiny_model(use_auxiliary_loss=False)
    outputs = model(images(), **labels(), output_auxiliary_logits=True)
    assert set(outputs.loss_dict) == {"loss_cross_entropy", "loss_mask", "loss_dice"}
    assert len(outputs.auxiliary_logits) == 3
    outputs.loss.backward()
    assert model.class_predictor.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_low_precision_weights_give_a_finite_loss(backbone, dtype):
    model = tiny_model(backbone).to(dtype)
    mask = torch.ones(2, *SIZE)
    mask[0, :, 50:] = 0
    outputs = model(images().to(dtype), pixel_mask=mask, **labels())
    assert outputs.class_queries_logits.dtype == outputs.masks_queries_logits.dtype == dtype
    assert outputs.loss.dtype == torch.float32
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_autocast_gives_nearly_the_same(model):
    with torch.no_grad():
        exact = model(images())
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(images())
    assert outputs.class_queries_logits.isfinite().all()
    # A mask decision may flip: only the raw queries' prediction is a smooth function of the weights.
    torch.testing.assert_close(
        outputs.pixel_decoder_last_hidden_state.float(), exact.pixel_decoder_last_hidden_state, atol=0.15, rtol=0.1
    )


# Training


GRADIENT_CASES = [
    *(({"backbone": b, "pixel_decoder": d}) for b in BACKBONES for d in ("msdeform", "fpn")),
    {"decoder_layers": 1, "enforce_input_projection": True},
    {"decoder_layers": 2, "enforce_input_projection": True},
    {"feature_size": 64, "pre_norm": True, "use_auxiliary_loss": False},
]


@pytest.mark.parametrize("fields", GRADIENT_CASES, ids=str)
def test_every_trainable_parameter_gets_a_gradient(fields):
    for counts in ((2, 0), (0, 0)):
        model = tiny_model(**fields).train()
        model(images(), **labels(counts)).loss.backward()
        without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        if fields.get("backbone") == "swin":
            assert len(frozen) == 2
            assert all(
                name.rpartition("encoder.")[2].endswith(("layernorm.weight", "layernorm.bias")) for name in frozen
            )
        elif fields.get("decoder_layers", 4) >= 4:
            assert frozen == set()


def test_a_decoder_of_one_prediction_reads_the_raw_queries():
    model = tiny_model(decoder_layers=1)
    with torch.no_grad():
        outputs = model(images(), output_hidden_states=True, output_attentions=True, output_auxiliary_logits=True)
    assert outputs.auxiliary_logits == []
    assert outputs.attentions == outputs.cross_attentions == ()
    queries = model.model.transformer_module.queries_features.weight
    torch.testing.assert_close(outputs.transformer_decoder_last_hidden_state[0], queries.detach())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradient_checkpointing_computes_twice_and_gives_the_same_gradients(backbone):
    model = tiny_model(backbone, dropout=0.2, attention_probs_dropout_prob=0.0).train()
    model.criterion.draw_points = SeededPoints(0)
    layers = [*model.model.pixel_level_module.decoder.encoder.layers, *model.model.transformer_module.decoder.layers]
    calls = []
    for layer in layers:
        # Newer releases of transformers keep the hooks of the layer itself outside of the checkpoint.
        layer.fc1.register_forward_pre_hook(lambda module, args: calls.append(module))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            # the second name is the older one
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        model.zero_grad()
        calls.clear()
        torch.manual_seed(1)
        loss = model(images(), **labels()).loss
        loss.backward()
        assert {calls.count(layer.fc1) for layer in layers} == {1 + checkpointing}
        results.append((loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}))
    (plain_loss, plain), (loss, gradients) = results
    torch.testing.assert_close(loss, plain_loss, atol=1e-6, rtol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-5, rtol=1e-4, msg=name)


def test_dropout_acts_in_training_alone():
    model = tiny_model(dropout=0.3)
    with torch.no_grad():
        first, second = (model(images()).class_queries_logits for _ in range(2))
        assert torch.equal(first, second)
        model.train()
        model.model.pixel_level_module.encoder.eval()  # batch statistics are not what is looked at
        torch.manual_seed(0)
        third = model(images()).class_queries_logits
        fourth = model(images()).class_queries_logits
        torch.manual_seed(0)
        fifth = model(images()).class_queries_logits
    assert not torch.equal(third, first)
    assert not torch.equal(third, fourth)
    assert torch.equal(third, fifth)


@pytest.mark.parametrize("source", ["new", "loaded"])
def test_frozen_batch_norms_keep_statistics_and_affine_parameters(source, tmp_path):
    model = Mask2FormerForUniversalSegmentation(tiny_config(freeze_backbone_norm=True))
    if source == "loaded":
        model.save_pretrained(tmp_path)
        model = Mask2FormerForUniversalSegmentation.from_pretrained(tmp_path).train()
    assert model.training  # a new model is, without a call of `train`
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [{name: tensor.clone() for name, tensor in norm.state_dict().items()} for norm in norms]
    model(images(), **labels()).loss.backward()
    assert len(norms) == 12
    for norm, state in zip(norms, before, strict=True):
        assert_same_tensors(norm.state_dict(), state, rtol=0, atol=0)
        assert norm.weight.grad is norm.bias.grad is None
    convolution = next(m for m in model.model.pixel_level_module.encoder.modules() if isinstance(m, nn.Conv2d))
    assert convolution.weight.grad.any()


def test_batch_norms_learn_unless_frozen():
    model = tiny_model().train()
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    before = norm.running_mean.clone()
    model(images(), **labels()).loss.backward()
    assert not torch.equal(norm.running_mean, before)
    assert norm.weight.grad.any()


# Initial weights


@pytest.fixture
def uninitialised_memory_is_nan():
    """Memory that was not written holds no number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def tensors_without_number(model):
    return [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("decoder", ["msdeform", "fpn"])
def test_every_weight_is_initialised(backbone, decoder, uninitialised_memory_is_nan):
    model = Mask2FormerForUniversalSegmentation(tiny_config(backbone, pixel_decoder=decoder, feature_size=64))
    assert tensors_without_number(model) == []


def test_initial_weights_are_the_originals():
    model = Mask2FormerForUniversalSegmentation(tiny_config(feature_size=64, num_queries=200, no_object_weight=0.3))
    torch.testing.assert_close(model.criterion.empty_weight, torch.tensor([1.0, 1.0, 1.0, 0.3]))
    pixel_decoder, transformer = model.model.pixel_level_module.decoder, model.model.transformer_module
    attention = pixel_decoder.encoder.layers[1].self_attn
    offsets = attention.sampling_offsets
    assert not offsets.weight.any()
    # Two heads look to the right and to the left, their points at growing distance.
    bias = offsets.bias.view(2, 3, 4, 2)
    for head, direction in enumerate((1.0, -1.0)):
        for level in range(3):
            expected = torch.tensor([[direction * distance, 0.0] for distance in (1, 2, 3, 4)])
            torch.testing.assert_close(bias[head, level].detach(), expected, atol=1e-5, rtol=0)
    assert not attention.attention_weights.weight.any()
    assert not attention.attention_weights.bias.any()
    for layer, bound in (
        (attention.value_proj, (6 / 128) ** 0.5),
        (pixel_decoder.encoder.layers[0].fc1, (6 / (64 + 24)) ** 0.5),
        (transformer.decoder.layers[0].self_attn.q_proj, (6 / 64) ** 0.5),
        (pixel_decoder.input_projections[0][0], (6 / (20 + 64)) ** 0.5),
    ):
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    assert not attention.value_proj.bias.any()
    assert not pixel_decoder.input_projections[0][0].bias.any()
    in_projection = transformer.decoder.layers[0].cross_attn.in_proj_weight
    assert 0.9 * (6 / 128) ** 0.5 < in_projection.abs().max() <= (6 / 128) ** 0.5
    bound = 32**-0.5
    for layer in (model.class_predictor, transformer.decoder.mask_predictor.mask_embedder[0][0]):
        assert 0.8 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.any()
    for embedding in (transformer.queries_features, transformer.queries_embedder):
        assert embedding.weight.std().item() == pytest.approx(1, abs=0.05)
    assert pixel_decoder.level_embed.std().item() == pytest.approx(1, abs=0.3)


def edited(folder, destination, change):
    """A copy of a saved model with its tensors changed in place."""
    shutil.copytree(folder, destination)
    tensors = load_file(destination / "model.safetensors")
    change(tensors)
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def test_only_missing_weights_are_initialised(model, folder, tmp_path, uninitialised_memory_is_nan):
    gone = (
        "transformer_module.level_embed",
        "decoder.level_embed",
        "encoder.layers.1.self_attn.sampling_offsets",
        "encoder.layers.0.fc1.weight",
        "decoder.layers.0.cross_attn.in_proj_bias",
        "input_projections.1",
        "class_predictor.bias",
        "criterion.empty_weight",
        "embedder.normalization.running_var",
    )

    def remove(tensors):
        for name in [name for name in tensors if any(part in name for part in gone)]:
            del tensors[name]

    path = edited(folder, tmp_path / "less", remove)
    loaded, info = Mask2FormerForUniversalSegmentation.from_pretrained(path, output_loading_info=True)
    assert tensors_without_number(loaded) == []
    missing = {name for name in model.state_dict() if any(part in name for part in gone)}
    assert len(missing) > len(gone)
    assert set(info["missing_keys"]) == missing
    for name, tensor in loaded.state_dict().items():
        if name not in missing:
            assert torch.equal(tensor, model.state_dict()[name]), name
    assert loaded.criterion.empty_weight.tolist() == pytest.approx([1, 1, 1, 0.1])
    offsets = loaded.model.pixel_level_module.decoder.encoder.layers[1].self_attn.sampling_offsets
    torch.testing.assert_close(offsets.bias.detach(), offsets.first_bias())
    assert not offsets.weight.any()


def test_a_checkpoint_without_swin_s_last_norm_loads_without_a_word(tmp_path):
    model = tiny_model("swin")
    model.save_pretrained(tmp_path / "full")
    removed = []

    def remove(tensors):
        removed.extend(
            name
            for name in tensors
            if "encoder." in name and name.split("encoder.")[1].removeprefix("swin.").startswith("layernorm.")
        )
        for name in removed:
            del tensors[name]

    path = edited(tmp_path / "full", tmp_path / "less", remove)
    assert len(removed) == 2
    with WarningsOfTransformers() as messages:
        loaded = Mask2FormerForUniversalSegmentation.from_pretrained(path)
    assert messages == []
    assert tensors_without_number(loaded) == []
    with torch.no_grad():
        assert_same_tensors(loaded(images()), model(images()), rtol=0, atol=0)


# The host


@pytest.mark.parametrize("fields", [{}, {"pixel_decoder": "fpn"}], ids=["msdeform", "fpn"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_without_labels_the_host_never_waits(fields, with_mask, monkeypatch):
    model = Mask2FormerForUniversalSegmentation(tiny_config(**fields)).eval().to("meta")
    refuse_uploads(monkeypatch)
    pixel_values = torch.empty(2, 3, *SIZE, device="meta")
    pixel_mask = torch.empty(2, *SIZE, dtype=torch.int64, device="meta") if with_mask else None
    with torch.no_grad(), NoHostWaits():
        outputs = model(pixel_values, pixel_mask=pixel_mask, output_auxiliary_logits=True, output_attentions=True)
    assert outputs.masks_queries_logits.shape == (2, 6, 16, 24)
    assert {tensor.device.type for tensor in tree_flatten(outputs.to_tuple())[0]} == {"meta"}


def test_with_real_numbers_nothing_is_read_either(model, monkeypatch):
    mask = torch.ones(2, *SIZE)
    mask[0, :, 40:] = 0
    # On the CPU, where nothing waits, the mask is looked at first: whether there is anything to hide.
    monkeypatch.setattr(modeling, "may_hide_padding", lambda *args: True)
    with torch.no_grad(), NoHostWaits():
        model(images(), pixel_mask=mask)


def test_on_the_cpu_a_mask_that_hides_nothing_costs_nothing(model, monkeypatch):
    mask = torch.ones(2, *SIZE, dtype=torch.int64)
    mask[0, :, SIZE[1] - 31 :] = 0  # within the image's own multiple of 32
    with torch.no_grad():
        expected = model(images())
        for module in (decoding, modeling):
            monkeypatch.setattr(module, "hidden_padding", None)
        outputs = model(images(), pixel_mask=mask)
    assert torch.equal(outputs.masks_queries_logits, expected.masks_queries_logits)
    assert outputs.image_sizes.tolist() == [[SIZE[0], SIZE[1] - 31], list(SIZE)]


def test_the_watch_on_the_host_notices_what_it_should():
    numbers = torch.arange(4.0)
    for waiting in (
        lambda: numbers.sum().item(),
        lambda: bool(numbers[1] > 0),
        lambda: numbers[numbers > 1],
        lambda: numbers.nonzero(),
        lambda: numbers.to("meta"),
    ):
        with NoHostWaits(), pytest.raises(AssertionError, match=r"waits|moves data"):
            waiting()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_compiled_without_a_break(backbone):
    torch.compiler.reset()
    model = tiny_model(backbone, encoder_layers=1, decoder_layers=2)
    mask = torch.ones(2, *SIZE)
    mask[0, :, 40:] = 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_same_tensors(compiled(images(), pixel_mask=mask), model(images(), pixel_mask=mask), atol=1e-5, rtol=1e-5)


def test_one_graph_serves_all_sizes():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny_model("resnet", encoder_layers=1, decoder_layers=2)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for batch, height, width in ((2, 128, 160), (3, 160, 96)):
        pixel_values = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            assert_same_tensors(compiled(pixel_values), model(pixel_values), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("backbone", BACKBONES)
def test_pieces_of_maps_give_what_whole_maps_give(backbone, monkeypatch):
    """As in training, where a map is one piece; with an image that ends before the batch does."""
    model = tiny_model(backbone)
    mask = torch.ones(2, *SIZE, dtype=torch.int64)
    mask[1, 32:] = 0
    for pixel_mask in (None, mask):
        whole = model(images(), pixel_mask=pixel_mask)
        for numbers in (1, 1000):
            monkeypatch.setattr(chunking, "_NUMBERS_PER_CHUNK", numbers)
            monkeypatch.setattr(chunking, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)
            with torch.no_grad():
                outputs = model(images(), pixel_mask=pixel_mask)
            for name in ("class_queries_logits", "masks_queries_logits"):
                torch.testing.assert_close(outputs[name], whole[name], atol=1e-4, rtol=1e-4)


def test_training_under_a_compiler_learns_the_same():
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        model = tiny_model(encoder_layers=1, decoder_layers=2).train()
        model.criterion.draw_points = SeededPoints(0)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        loss = run(images(), **labels()).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        results.append((loss.detach(), gradients))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-4, rtol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-4, rtol=1e-3)


class Logits(nn.Module):
    """What an exported model gives: tensors alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        outputs = self.model(pixel_values)
        return outputs.class_queries_logits, outputs.masks_queries_logits


@pytest.mark.parametrize(
    ("backbone", "decoder", "example"),
    [*((backbone, "msdeform", (128, 160)) for backbone in BACKBONES), ("resnet", "fpn", (128, 128))],
)
def test_one_exported_graph_serves_all_batches_and_sizes(backbone, decoder, example):
    model = Logits(tiny_model(backbone, encoder_layers=1, decoder_layers=2, pixel_decoder=decoder))
    batch, rows, columns = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "rows", "columns"))
    shapes = ({0: batch, 2: 32 * rows, 3: 32 * columns},)
    with torch.no_grad():
        exported = torch.export.export(model, (images(2, example),), dynamic_shapes=shapes, strict=False).module()
        for size in ((1, 96, 128), (3, 64, 224)):
            pixel_values = images(size[0], size[1:])
            for ours, expected in zip(exported(pixel_values), model(pixel_values), strict=True):
                torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_masked_group_norm_is_exact_under_autocast():
    norm = torch.nn.GroupNorm(32, 64)
    features = torch.randn(2, 64, 12, 8) + 30  # a mean far from zero: rounded to half precision it would show
    padding = torch.zeros(2, 12, 8, dtype=torch.bool)
    padding[0, 8:] = True
    expected = masked_group_norm(features, norm, padding)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(masked_group_norm(features, norm, padding), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(expected[:1, :, :8], norm(features[:1, :, :8]), atol=1e-4, rtol=0)


def test_the_attention_can_be_changed_afterwards():
    model = tiny_model()
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        fused = model(pixel_values).masks_queries_logits
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        torch.testing.assert_close(model(pixel_values).masks_queries_logits, fused, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_layout_of_pixels_in_memory_does_not_matter(backbone):
    model = tiny_model(backbone)
    for learns in (False, True):
        with torch.set_grad_enabled(learns):
            first, second = (
                model(images().contiguous(memory_format=layout))
                for layout in (torch.contiguous_format, torch.channels_last)
            )
        for name in ("class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-5)


def test_a_model_in_half_precision_takes_what_the_processor_gives():
    model = tiny_model().to(torch.bfloat16)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).masks_queries_logits.dtype == torch.bfloat16
