"""The step to stride 4, image by image: against the same modules called one by one, and in double precision."""

import copy

import pytest
import torch
from torch import nn

from m2f_hf import Mask2FormerConfig
from m2f_hf.kernels import convolution
from m2f_hf.kernels import pieces as chunking
from m2f_hf.kernels.convolution import TiledConv2d
from m2f_hf.kernels.pyramid_step import PyramidStep, StepParameters, _add_enlarged
from m2f_hf.model.pixel_decoder import Mask2FormerPixelDecoder


CHANNELS = (24, 32, 40, 48)


def make_decoder(width=32, masks=32, dtype=torch.float32):
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        feature_size=width, mask_feature_size=masks, encoder_layers=1, encoder_feedforward_dim=8, num_attention_heads=4
    )
    decoder = Mask2FormerPixelDecoder(config, list(CHANNELS))
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    decoder.adapter_1.norm.eps, decoder.layer_1.norm.eps = 0.5, 0.1  # to be told apart
    return decoder.to(dtype)


def make_features(batch=2, height=24, width=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, channels, height >> level, width >> level) for level, channels in enumerate(CHANNELS)]
    return tuple(
        torch.randn(shape, generator=generator).to(dtype, memory_format=torch.channels_last).requires_grad_()
        for shape in shapes
    )


def run(decoder, features):
    """Mask features, and gradients of what they depend on."""
    masks = decoder(features, (None,) * 4).mask_features
    upstream = torch.randn(masks.shape, generator=torch.Generator().manual_seed(2)).to(masks.dtype)
    wanted = [features[0], features[1], *decoder.parameters()]
    return masks, *torch.autograd.grad(masks, wanted, upstream, allow_unused=True)


def goes_by_image(decoder, features, paddings=(None,) * 4):
    seen = []
    original = PyramidStep.apply
    PyramidStep.apply = lambda *arguments: seen.append(arguments) or original(*arguments)
    try:
        decoder(features, paddings)
    finally:
        del PyramidStep.apply
    return bool(seen)


@pytest.fixture(params=[0, 1 << 20], ids=["products by tiles", "products as PyTorch does them"])
def least_channels(request, monkeypatch):
    monkeypatch.setattr(convolution, "_LEAST_CHANNELS", request.param)


@pytest.mark.parametrize("numbers", [1, 1 << 20], ids=["a row at a time", "all"])
@pytest.mark.parametrize("masks", [32, 40], ids=["as many masks as channels", "more"])
def test_values_and_gradients_are_those_of_the_modules(masks, numbers, least_channels, by_onednn, monkeypatch):
    monkeypatch.setattr(chunking, "_NUMBERS_PER_PIECE", numbers)
    monkeypatch.setattr(chunking, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)
    decoder = make_decoder(masks=masks)
    assert goes_by_image(decoder, make_features())
    actual = run(decoder, make_features())
    steps_by_image = Mask2FormerPixelDecoder._steps_by_image
    monkeypatch.setattr(Mask2FormerPixelDecoder, "_steps_by_image", lambda *_: False)
    assert not goes_by_image(decoder, make_features())
    exact = copy.deepcopy(decoder).double()
    expected = run(exact, make_features(dtype=torch.float64))
    by_modules = run(decoder, make_features())
    for one, double, other in zip(actual, expected, by_modules, strict=True):
        assert (one is None) == (double is None)
        if one is not None:
            # The attention before it rounds, too: what the modules lose is allowed, and a little more.
            allowed = 2 * (other - double).abs().max() + 2e-6 * max(1, double.abs().max())
            assert (one - double).abs().max() <= allowed
    with torch.no_grad():
        monkeypatch.setattr(Mask2FormerPixelDecoder, "_steps_by_image", steps_by_image)
        assert goes_by_image(decoder, make_features())
        inference = decoder(make_features(), (None,) * 4).mask_features
    torch.testing.assert_close(inference, actual[0].detach(), rtol=0, atol=2e-6 * actual[0].abs().max().item())
    assert inference.is_contiguous(memory_format=torch.channels_last)


def step_arguments(dtype=torch.float64, coarse_size=(3, 4)):
    """4 channels in two groups; convolutions of PyTorch, as for tiles there must be more."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (4,), (4,), (4, 4, 3, 3), (4,), (4,), (5, 4), (5,)]
    tensors = [
        torch.randn(shape, generator=generator, dtype=dtype) for shape in ((2, 3, 6, 8), (2, 4, *coarse_size), *shapes)
    ]
    tensors[:2] = [one.to(memory_format=torch.channels_last) for one in tensors[:2]]
    features, coarse, *parameters = (one.requires_grad_() for one in tensors)
    return features, coarse, True, 2, (1e-5, 1e-4), *parameters


@pytest.mark.parametrize("coarse_size", [(3, 4), (2, 5)], ids=["half as large", "of another size"])
def test_gradients_are_those_of_the_values(coarse_size):
    assert torch.autograd.gradcheck(PyramidStep.apply, step_arguments(coarse_size=coarse_size))


@pytest.mark.parametrize("frozen", [0, 1], ids=["features", "coarse map"])
def test_inputs_that_learn_nothing(frozen, monkeypatch):
    arguments = step_arguments()
    expected = torch.autograd.grad(PyramidStep.apply(*arguments).sum(), [*arguments[:2], *arguments[5:]])
    arguments[frozen].requires_grad_(False)
    made = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda like, **kwargs: made.append(like) or empty_like(like, **kwargs))
    PyramidStep.apply(*arguments).sum().backward()
    assert [any(like is one for like in made) for one in arguments[:2]] == [frozen == 1, frozen == 0]
    assert arguments[frozen].grad is None
    for index, one in enumerate([*arguments[:2], *arguments[5:]]):
        assert index == frozen or torch.equal(one.grad, expected[index])


def test_of_each_image_one_map_is_kept():
    features, coarse, *rest = step_arguments()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        PyramidStep.apply(features, coarse, *rest)
    inputs = {one.data_ptr() for one in (features, coarse, *rest[3:])}
    maps = [one for one in kept if one.data_ptr() not in inputs and one.dim() == 4]
    assert [tuple(one.shape) for one in maps] == [(1, 4, 6, 8)] * 2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_at_inference_nothing_is_kept(context):
    decoder, kept = make_decoder(), []
    original = PyramidStep.forward
    assert all(parameter.requires_grad for parameter in decoder.parameters())

    def watched(ctx, *arguments):
        ctx.save_for_backward = lambda *tensors: kept.extend(tensors)
        return original(ctx, *arguments)

    PyramidStep.forward = staticmethod(watched)
    try:
        with context():
            decoder(make_features(), (None,) * 4)
        at_inference = len(kept)
        kept.clear()
        decoder(make_features(), (None,) * 4)
    finally:
        PyramidStep.forward = staticmethod(original)
    assert at_inference == 2 + len(StepParameters._fields) < len(kept)


def test_second_derivatives_are_refused():
    arguments = step_arguments()
    (grad,) = torch.autograd.grad(PyramidStep.apply(*arguments).square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_masks_may_be_changed_in_place():
    masks = PyramidStep.apply(*step_arguments())
    assert masks._base is None and masks.is_contiguous(memory_format=torch.channels_last)
    masks.mul_(2).sum().backward()


def test_a_batch_gives_what_its_images_give():
    features, coarse, *rest = (one.detach() if isinstance(one, torch.Tensor) else one for one in step_arguments())
    together = PyramidStep.apply(features, coarse, *rest)
    alone = [PyramidStep.apply(features[i : i + 1], coarse[i : i + 1], *rest) for i in range(2)]
    assert torch.equal(together, torch.cat(alone))


def test_inputs_stay_as_they_are():
    arguments = step_arguments()
    before = [one.clone() if isinstance(one, torch.Tensor) else one for one in arguments]
    PyramidStep.apply(*arguments).square().sum().backward()
    with torch.no_grad():
        PyramidStep.apply(*arguments)
    assert all(torch.equal(*pair) for pair in zip(arguments, before, strict=True) if isinstance(pair[0], torch.Tensor))


@pytest.mark.parametrize("rows", [1, 2, 5, 100], ids=lambda rows: f"{rows} a piece")
@pytest.mark.parametrize("size", [(10, 6), (1, 1), (2, 3), (3, 1)])
@pytest.mark.parametrize("less", [0, 1], ids=["twice as large", "less than that"])
def test_a_map_enlarged_in_pieces_is_that_enlarged_at_once(less, size, rows, monkeypatch):
    height, width = size
    coarse, fine = (
        torch.randn(1, 4, *shape, dtype=torch.float64).to(memory_format=torch.channels_last)
        for shape in (size, (2 * height - less, 2 * width - less))
    )
    expected = fine + nn.functional.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
    monkeypatch.setattr(chunking, "_NUMBERS_PER_PIECE", rows * 4 * 4 * width)
    monkeypatch.setattr(chunking, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)
    _add_enlarged(fine, coarse)
    torch.testing.assert_close(fine, expected, rtol=0, atol=1e-12)


def test_autocast_around_the_backward_pass_alone_changes_nothing():
    arguments = step_arguments(torch.float32)
    gradients = []
    for is_cast in (False, True):
        loss = PyramidStep.apply(*arguments).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            gradients.append(torch.autograd.grad(loss, [*arguments[:2], *arguments[5:]]))
    assert all(map(torch.equal, *gradients))


def test_the_gradient_of_an_unusual_layout():
    arguments = step_arguments()
    wanted = [*arguments[:2], *arguments[5:]]
    masks = PyramidStep.apply(*arguments)
    upstream = torch.randn(masks.shape, dtype=masks.dtype)
    assert not upstream.is_contiguous(memory_format=torch.channels_last)
    laid_out = upstream.to(memory_format=torch.channels_last)
    gradients = [torch.autograd.grad(masks, wanted, one, retain_graph=True) for one in (upstream, laid_out)]
    assert all(map(torch.equal, *gradients))


def hook(decoder):
    decoder.layer_1.convolution.register_forward_hook(lambda *_: None)


def freeze(decoder):
    decoder.adapter_1.norm.weight.requires_grad_(False)


def replace(decoder):
    decoder.layer_1[0] = nn.Conv2d(32, 32, 3, padding=1, bias=False)


def add_bias(decoder):
    decoder.adapter_1[0].bias = nn.Parameter(torch.zeros(32))


def dilate(decoder):
    decoder.layer_1.convolution.dilation = decoder.layer_1.convolution.padding = (2, 2)


def wrap_around(decoder):
    decoder.layer_1[0] = TiledConv2d(32, 32, 3, padding=1, padding_mode="circular", bias=False)


def regroup(decoder):
    decoder.layer_1[1] = nn.GroupNorm(8, 32)


def fix_scale(decoder):
    decoder.layer_1[1] = nn.GroupNorm(32, 32, affine=False)


def clip_early(decoder):
    decoder.adapter_1.relu = True


def clip_nothing(decoder):
    decoder.layer_1.relu = False


def widen_masks(decoder):
    decoder.mask_projection = nn.Conv2d(32, 32, 3, padding=1)


def move_bias(decoder):
    add_bias(decoder)
    decoder.mask_projection.bias = None


def append(decoder):
    decoder.layer_1.append(nn.Identity())


def hook_block(decoder):
    decoder.layer_1.register_forward_hook(lambda *_: None)


def hook_norm(decoder):
    decoder.layer_1.norm.register_forward_hook(lambda *_: None)


def hook_lateral(decoder):
    decoder.adapter_1.convolution.register_forward_hook(lambda *_: None)


def halve_a_part(decoder):
    decoder.mask_projection.forward = lambda features, forward=decoder.mask_projection.forward: forward(features) / 2


CHANGES = [
    hook, freeze, replace, add_bias, dilate, wrap_around, regroup, clip_early, clip_nothing, widen_masks, move_bias,
    hook_block, hook_norm, hook_lateral, halve_a_part,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_modules_that_are_not_plain_are_called(change):
    decoder = make_decoder()
    assert goes_by_image(decoder, make_features())
    change(decoder)
    assert not goes_by_image(decoder, make_features())


def widen_numbers(decoder):
    decoder.mask_projection.double()


@pytest.mark.parametrize("change", [fix_scale, append, widen_numbers])
def test_modules_that_cannot_be_called_are_not_passed_over(change):
    decoder = make_decoder()
    change(decoder)
    assert not decoder._steps_by_image(make_features()[0], (None,) * 4)


def test_frozen_weights_at_inference():
    decoder = make_decoder().requires_grad_(False)
    with torch.no_grad():
        assert goes_by_image(decoder, make_features())
    assert not goes_by_image(decoder, make_features())


def test_what_it_cannot_do_the_modules_do():
    decoder = make_decoder()
    padding = tuple(torch.zeros(2, 24 >> level, 16 >> level, dtype=torch.bool) for level in range(4))
    assert not goes_by_image(decoder, make_features(), padding)
    assert not goes_by_image(decoder, make_features(), (None, *padding[1:]))
    assert not goes_by_image(decoder, make_features(height=8, width=8))  # too few tiles
    assert not goes_by_image(make_decoder(dtype=torch.bfloat16), make_features(dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert not goes_by_image(decoder, make_features())
