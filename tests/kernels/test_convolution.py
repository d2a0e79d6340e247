"""3x3 convolution by tiles: against PyTorch's own in double precision."""

import pytest
import torch
from tiny import shake
from torch import nn
from torch.nn import functional as F

from m2f_hf import Mask2FormerConfig, Mask2FormerModel
from m2f_hf.kernels import convolution as module
from m2f_hf.kernels import fast_path
from m2f_hf.kernels.convolution import TiledConvolution, convolve_tiles, weight_gradient, winograd_convolution
from m2f_hf.model.layers import WinogradConv2d


def make_inputs(batch=2, channels=5, outputs=7, height=6, width=10, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, channels, height, width), (outputs, channels, 3, 3), (outputs,)
    features, weight, bias = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return features.to(memory_format=torch.channels_last), weight, bias


@pytest.fixture(params=[0, 1 << 20], ids=["products by tiles", "products as PyTorch does them"])
def least_channels(request, monkeypatch):
    monkeypatch.setattr(module, "_LEAST_CHANNELS", request.param)


@pytest.mark.parametrize("tiles", [1, 7, 1 << 20], ids=["a row of tiles at a time", "the same", "all"])
@pytest.mark.parametrize(("height", "width"), [(2, 2), (2, 8), (8, 2), (6, 10), (14, 6)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_a_convolution(height, width, tiles, with_bias, least_channels, monkeypatch):
    monkeypatch.setattr(module, "_TILES_PER_CHUNK", tiles)
    inputs = make_inputs(height=height, width=width)
    results = []
    for dtype in (torch.float64, torch.float32):
        features, weight, bias = (tensor.to(dtype).requires_grad_() for tensor in inputs)
        if dtype == torch.float64:
            output = F.conv2d(features, weight, bias if with_bias else None, padding=1)
            upstream = torch.randn(output.shape, dtype=dtype)
        else:
            output = TiledConvolution.apply(features, weight, bias if with_bias else None)
            assert output.is_contiguous(memory_format=torch.channels_last)
        wanted = (features, weight, bias) if with_bias else (features, weight)
        results.append((output, *torch.autograd.grad(output, wanted, upstream.to(dtype))))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_gradients_are_those_of_the_values(least_channels):
    features, weight, bias = (tensor.requires_grad_() for tensor in make_inputs(1, 2, 3, 4, 6, torch.float64))
    assert torch.autograd.gradcheck(TiledConvolution.apply, (features, weight, bias))


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_rounding_is_no_worse_than_that_of_a_convolution(mean):
    features, weight, _ = make_inputs(1, 256, 256, 20, 24)
    features += mean
    grad = make_inputs(1, 256, 256, 20, 24)[0].flip(0, 2).contiguous(memory_format=torch.channels_last)

    def error(actual, expected):
        return ((actual.double() - expected).norm() / expected.norm()).item()

    def weight_gradient_of_pytorch(features, grad):
        return torch.nn.grad.conv2d_weight(features, weight.shape, grad, padding=1)

    exact = F.conv2d(features.double(), weight.double(), padding=1)
    assert error(convolve_tiles(features, weight), exact) < error(F.conv2d(features, weight, padding=1), exact)
    exact = weight_gradient_of_pytorch(features.double(), grad.double())
    # That of PyTorch has between 1.2e-7 and more than this, by the processor and by the layout.
    assert error(weight_gradient(features, grad), exact) < 5e-7


@pytest.mark.parametrize("frozen", ["features", "weight"])
def test_what_learns_nothing_costs_nothing(frozen, least_channels, monkeypatch):
    features, weight, bias = make_inputs()
    learning, needless = (features, "weight_gradient") if frozen == "weight" else (weight, "input_gradient")
    learning.requires_grad_()
    output = TiledConvolution.apply(features, weight, bias)
    monkeypatch.setattr(module, needless, None)
    (output * output.detach()).sum().backward()
    assert [tensor.grad is None for tensor in (features, weight, bias)] == [
        frozen == "features",
        frozen == "weight",
        True,
    ]


def test_gradients_under_autocast_are_those_without(least_channels):
    """Around the backward pass autocast must not spoil what was computed without it."""
    inputs = make_inputs(channels=32, outputs=32, height=12, width=12)
    results = []
    for is_cast in (False, True):
        features, weight, bias = (tensor.clone().requires_grad_() for tensor in inputs)
        output = TiledConvolution.apply(features, weight, bias)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_cast):
            results.append(torch.autograd.grad(output, (features, weight, bias), output.detach()))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


def test_second_derivatives_are_refused():
    features, weight, _ = (tensor.requires_grad_() for tensor in make_inputs())
    output = TiledConvolution.apply(features, weight, None)
    (first,) = torch.autograd.grad(output.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def make_layer(channels=32, **options):
    torch.manual_seed(0)
    return WinogradConv2d(channels, channels, 3, **{"padding": 1, **options})


@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("least", [32, 33], ids=["products by tiles", "products as PyTorch does them"])
def test_a_layer_takes_tiles_where_it_can(least, learns, padding, monkeypatch):
    monkeypatch.setattr(module, "_LEAST_CHANNELS", least)
    features, *_ = make_inputs(channels=32, height=12, width=12)
    layer = make_layer(padding=padding)
    with torch.set_grad_enabled(learns):
        output = layer(features)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert not learns or output.grad_fn.name().startswith("TiledConvolution")
    by_tiles = convolve_tiles(features, layer.weight.detach(), layer.bias.detach())
    assert torch.equal(output, by_tiles) == (least == 32)
    expected = F.conv2d(features.double(), layer.weight.double(), layer.bias.double(), padding=1)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"padding": 0},
        {"padding_mode": "reflect"},
        {"groups": 2},
        {"kernel_size": 1},
        {"kernel_size": 5},
    ],
    ids=str,
)
def test_other_convolutions_are_left_to_pytorch(options):
    features, *_ = make_inputs(channels=64, height=16, width=16)
    options = {"kernel_size": 3, "padding": 1, **options}
    torch.manual_seed(0)
    layer = WinogradConv2d(64, 64, **options)
    torch.manual_seed(0)
    expected = nn.Conv2d(64, 64, **options)(features)
    actual = layer(features)
    assert torch.equal(actual, expected)
    assert not actual.grad_fn.name().startswith("TiledConvolution")


def test_other_maps_are_left_to_pytorch():
    features, *_ = make_inputs(channels=32, height=14, width=14)
    layer = make_layer()
    serves = winograd_convolution.serves
    assert serves(layer, features)
    parts = [features[:, :, :13], features[:, :, :, :13], features[:, :, :10, :10]]  # odd sides, few tiles
    others = [features.contiguous(), *(part.contiguous(memory_format=torch.channels_last) for part in parts)]
    for other in (*others, features[:0], features[0]):
        assert not serves(layer, other)
        torch.testing.assert_close(layer(other), F.conv2d(other, layer.weight, layer.bias, padding=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not serves(layer, features)
        assert layer(features).dtype == torch.bfloat16
    assert not serves(make_layer().bfloat16(), features.bfloat16())
    assert not serves(make_layer(channels=16), features[:, :16].contiguous(memory_format=torch.channels_last))
    with pytest.raises(RuntimeError, match="channels"):
        layer(features[:, :31].contiguous(memory_format=torch.channels_last))
    with pytest.raises(RuntimeError, match="type"):
        layer(features.double())


def test_a_compiler_sees_a_convolution():
    layer = make_layer()
    names = []

    def backend(graph, inputs):
        names.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for height in (14, 15, 18):  # one graph, whatever could go by tiles
        features, *_ = make_inputs(channels=32, height=height, width=20)
        torch.testing.assert_close(compiled(features), layer(features))
    assert len(names) == 1
    assert any("conv2d" in name for name in names[0])


@pytest.mark.parametrize(("kind", "count"), [("msdeform", 1), ("fpn", 3)])
def test_pixel_decoders_learn_by_tiles(kind, count, monkeypatch):
    """In double precision; the FPN's coarser maps have too few tiles, or an odd side."""
    torch.manual_seed(0)
    backbone = {"model_type": "swin", "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2}
    backbone["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(
        backbone_config=backbone, pixel_decoder=kind, feature_size=32, mask_feature_size=32, hidden_dim=32,
        num_attention_heads=2, encoder_layers=1, encoder_feedforward_dim=32, decoder_layers=2, dim_feedforward=32,
        num_queries=4,
    )  # fmt: skip
    decoder = shake(Mask2FormerModel(config)).double().pixel_level_module.decoder
    shapes = [(2, 8 * 2**stage, 24 // 2**stage, 40 // 2**stage) for stage in range(4)]
    maps = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    applied = []
    apply = TiledConvolution.apply
    monkeypatch.setattr(TiledConvolution, "apply", lambda *args: applied.append(args) or apply(*args))
    results = []
    for _ in range(2):
        features = [each.to(memory_format=torch.channels_last, copy=True).requires_grad_() for each in maps]
        outputs = decoder(tuple(features), (None,) * 4)
        flat = [outputs.mask_features, *outputs.multi_scale_features]
        parameters = list(decoder.parameters())
        loss = sum((output * output.cos()).sum() for output in flat)
        results.append((*flat, *torch.autograd.grad(loss, [*features, *parameters], allow_unused=True)))
        assert len(applied) == count
        monkeypatch.setattr(fast_path, "_CHOICE", "plain")
    for tiled, plain in zip(*results, strict=True):
        assert (tiled is None) == (plain is None)
        if plain is not None:
            torch.testing.assert_close(tiled, plain, rtol=1e-9, atol=1e-9)
