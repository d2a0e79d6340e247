"""GroupNorm of maps with channels last: against PyTorch's own in double precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from m2f_hf.kernels import chunks as chunking
from m2f_hf.kernels.group_norm import ChannelsLastGroupNorm, normalise_groups
from m2f_hf.model.pixel_decoder import ConvNorm


def make_features(shape=(2, 64, 13, 9), mean=0.0):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(shape, generator=generator) + mean
    return features.to(memory_format=torch.channels_last)


def make_norm(dtype=torch.float32):
    torch.manual_seed(0)
    norm = nn.GroupNorm(32, 64).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("numbers", [1, 64 * 50, 1 << 20], ids=["a position at a time", "fifty", "all"])
def test_values_and_gradients_are_those_of_group_norm(numbers, relu, monkeypatch):
    monkeypatch.setattr(chunking, "_NUMBERS_PER_CHUNK", numbers)
    monkeypatch.setattr(chunking, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)
    features, norm = make_features(), make_norm()
    weights = torch.randn(features.shape)
    results = []
    for dtype in (torch.float64, torch.float32):
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (features, norm.weight, norm.bias)]
        if dtype == torch.float64:
            output = F.group_norm(inputs[0], 32, *inputs[1:], norm.eps)
            output = output.relu() if relu else output
        else:
            output = ChannelsLastGroupNorm.apply(*inputs, 32, norm.eps, relu)
        results.append((output, *torch.autograd.grad((output * weights).sum(), inputs)))
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)
    for expected, actual in zip(*results, strict=True):
        scale = max(1, expected.abs().max().item())
        torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=2e-6 * scale)


def test_a_mean_far_from_zero_is_no_loss():
    """The mean square less the squared mean would lose three digits here."""
    features, norm = make_features(mean=30.0), make_norm()
    expected = F.group_norm(features.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    arguments = (features, norm.weight, norm.bias, 32, norm.eps, False)
    with torch.no_grad():
        ours = ChannelsLastGroupNorm.apply(*arguments)
        normalise_groups(*arguments, output=features)
    assert torch.equal(ours, features)
    assert (ours - expected).abs().max() < 2e-5


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_convolution_and_its_norm(memory_format, hooked, learns, relu):
    """In place at inference, with a function of its own in training; hooks see the convolution's own output."""
    torch.manual_seed(0)
    block = ConvNorm(nn.Conv2d(8, 64, 3, padding=1), relu=relu)
    features, seen = torch.randn(2, 8, 10, 6), []
    convolved = block.double()[0](features.double())
    expected = block(features.double())
    block.float()
    if hooked:
        block[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.set_grad_enabled(learns):
        actual = block(features.to(memory_format=memory_format))
    assert (actual.double() - expected).abs().max() < 1e-5
    is_ours = memory_format == torch.channels_last and not hooked
    assert actual.is_contiguous(memory_format=torch.channels_last) == is_ours
    assert not learns or actual.grad_fn.name().startswith("ChannelsLastGroupNorm") == is_ours
    assert len(seen) == hooked
    assert all((one.double() - convolved).abs().max() < 1e-5 for one in seen)


@pytest.mark.parametrize("is_cast", [False, True], ids=["bfloat16", "autocast"])
def test_half_precision_keeps_its_layout(is_cast):
    torch.manual_seed(0)
    block = ConvNorm(nn.Conv2d(8, 64, 3, padding=1), relu=True)
    features = torch.randn(2, 8, 10, 6).to(memory_format=torch.channels_last)
    expected = block(features)
    if is_cast:
        with torch.autocast("cpu", torch.bfloat16):
            actual = block(features)
    else:
        actual = block.bfloat16()(features.bfloat16())
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().max() < 0.1
