"""GroupNorm of maps with channels last: against PyTorch's own in double precision."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from m2f_hf.kernels import pieces as chunking
from m2f_hf.kernels.group_norm import ChannelsLastGroupNorm, normalise_groups, normalises_channels_last
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
    monkeypatch.setattr(chunking, "_NUMBERS_PER_PIECE", numbers)
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
def test_a_convolution_and_its_norm(relu):
    """In place at inference, with a function of its own in training; hooks see the convolution's own output."""
    torch.manual_seed(0)
    block = ConvNorm(nn.Conv2d(8, 64, 3, padding=1), relu=relu)
    features = torch.randn(2, 8, 10, 6)
    expected = block.double()(features.double())
    block.float()
    seen = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        for hooked in (False, True):
            if hooked:
                hook = block[0].register_forward_hook(lambda module, args, output: seen.append(output))
            for learns in (False, True):
                with torch.set_grad_enabled(learns):
                    actual = block(features.to(memory_format=memory_format))
                assert (actual.double() - expected).abs().max() < 1e-5
                is_ours = memory_format == torch.channels_last
                assert actual.is_contiguous(memory_format=torch.channels_last) == is_ours
                if learns:
                    assert actual.grad_fn.name().startswith("ChannelsLastGroupNorm") == is_ours
            if hooked:
                hook.remove()
    convolved = block.double()[0](features.double())
    assert len(seen) == 4
    assert all((one.double() - convolved).abs().max() < 1e-5 for one in seen)


def test_what_does_not_fit_is_left_to_pytorch():
    features, norm = make_features(), make_norm()
    assert normalises_channels_last(features, norm)
    assert not normalises_channels_last(features.contiguous(), norm)
    assert not normalises_channels_last(features.bfloat16(), norm.bfloat16())
    assert not normalises_channels_last(features.double(), make_norm())
