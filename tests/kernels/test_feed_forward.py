"""The feed-forward network that learns in pieces: against PyTorch's own layers and their gradients."""

import pytest
import torch
from operations import Operations
from tiny import tiny_config
from torch import nn

from m2f_hf.kernels import chunks as chunking
from m2f_hf.kernels import feed_forward
from m2f_hf.model.pixel_decoder import Mask2FormerPixelDecoderEncoderLayer


WIDTHS = (6, 20)


def make_layers():
    torch.manual_seed(0)
    return nn.Linear(*WIDTHS), nn.Linear(*WIDTHS[::-1])


def run(layers, states, function):
    states = states.clone().requires_grad_()
    output = function(states, *layers)
    return output, *torch.autograd.grad(output.square().sum(), [states, *nn.ModuleList(layers).parameters()])


@pytest.mark.parametrize("kept", [0, 1 << 20], ids=["computed again", "kept"])
@pytest.mark.parametrize("numbers", [1, 7 * WIDTHS[1], 1 << 20])  # one row a piece, seven, all
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_gradients_are_those_of_the_layers(activation, numbers, kept, by_onednn, monkeypatch):
    monkeypatch.setattr(chunking, "_NUMBERS_PER_CHUNK", numbers)
    monkeypatch.setattr(chunking, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)
    monkeypatch.setattr(feed_forward, "_NUMBERS_KEPT", kept)
    layers, states = make_layers(), torch.randn(2, 9, WIDTHS[0])
    expected = run(layers, states, lambda rows, fc1, fc2: fc2(getattr(nn.functional, activation)(fc1(rows))))
    actual = run(layers, states, lambda *inputs: feed_forward.feed_forward(*inputs, activation))
    assert actual[0].grad_fn.name().startswith("FeedForward")
    for one, other in zip(expected, actual, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept", [0, 1 << 20], ids=["computed again", "kept"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_second_backward_pass_gives_the_same(activation, kept, monkeypatch):
    monkeypatch.setattr(feed_forward, "_NUMBERS_KEPT", kept)
    layers, states = make_layers(), torch.randn(2, 9, WIDTHS[0]).requires_grad_()
    loss = feed_forward.feed_forward(states, *layers, activation).square().sum()
    inputs = [states, *nn.ModuleList(layers).parameters()]
    for one, other in zip(
        torch.autograd.grad(loss, inputs, retain_graph=True), torch.autograd.grad(loss, inputs), strict=True
    ):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_kept_states_are_used_however_the_backward_pass_would_cut(activation, monkeypatch):
    """The size of pieces depends on the number of threads, which another pass may not have."""
    layers, states = make_layers(), torch.randn(2, 9, WIDTHS[0])
    expected = run(layers, states, lambda rows, fc1, fc2: fc2(getattr(nn.functional, activation)(fc1(rows))))
    monkeypatch.setattr(chunking, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)
    monkeypatch.setattr(chunking, "_NUMBERS_PER_CHUNK", 7 * WIDTHS[1])

    states = states.requires_grad_()
    output = feed_forward.feed_forward(states, *layers, activation)
    monkeypatch.setattr(chunking, "_NUMBERS_PER_CHUNK", 5 * WIDTHS[1])
    with Operations() as operations:
        gradients = torch.autograd.grad(output.square().sum(), [states, *nn.ModuleList(layers).parameters()])
    for one, other in zip(expected, (output, *gradients), strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    assert torch.ops.aten.addmm_ in operations.names
    assert torch.ops.aten.addmm not in operations.names  # with a bias: the first layer, again


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_autocast_around_the_backward_pass_alone_changes_nothing(activation):
    layers, states = make_layers(), torch.randn(2, 9, WIDTHS[0], requires_grad=True)
    gradients = []
    for is_cast in (False, True):
        loss = feed_forward.feed_forward(states, *layers, activation).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            gradients.append(torch.autograd.grad(loss, [states, *nn.ModuleList(layers).parameters()]))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(("kept", "widest"), [(0, WIDTHS[0]), (1 << 20, WIDTHS[1])])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_what_outlives_the_forward_pass(activation, kept, widest, monkeypatch):
    monkeypatch.setattr(feed_forward, "_NUMBERS_KEPT", kept)
    layers, kept_shapes = make_layers(), []

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept_shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        feed_forward.feed_forward(torch.randn(2, 9, WIDTHS[0], requires_grad=True), *layers, activation)
    assert sum(shape[-1] == WIDTHS[1] for shape in kept_shapes) == (widest == WIDTHS[1])
    assert max(shape[-1] for shape in kept_shapes) == widest


@pytest.mark.parametrize("kept", [0, 1 << 20], ids=["computed again", "kept"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_outputs_and_gradients_are_as_exact_as_those_of_the_layers(dtype, activation, kept, monkeypatch):
    monkeypatch.setattr(chunking, "_NUMBERS_PER_CHUNK", 7 * WIDTHS[1])
    monkeypatch.setattr(feed_forward, "_NUMBERS_KEPT", kept)
    layers, states = make_layers(), torch.randn(2, 90, WIDTHS[0]).to(dtype)
    plain = lambda rows, fc1, fc2: fc2(getattr(nn.functional, activation)(fc1(rows)))
    exact = run(layers, states.float(), plain)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(layers, states, plain)
        actual = run(layers, states, lambda *inputs: feed_forward.feed_forward(*inputs, activation))
    assert actual[0].grad_fn.name().startswith("FeedForward")
    for one, theirs, ours in zip(exact, expected, actual, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - one).norm() <= 1.5 * (theirs - one).norm()


def test_half_precision_takes_the_layers_themselves():
    layer = Mask2FormerPixelDecoderEncoderLayer(tiny_config()).to(torch.bfloat16)
    output = layer.feed_forward(torch.randn(1, 3, 32, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16 and not output.grad_fn.name().startswith("FeedForward")


def test_several_threads_have_larger_pieces():
    """Each piece ends in a barrier, where threads wait for whoever shares the machine."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        of_one = len(list(chunking.chunks(1 << 16, width=1 << 10)))
        torch.set_num_threads(2)
        of_two = len(list(chunking.chunks(1 << 16, width=1 << 10)))
    finally:
        torch.set_num_threads(threads)
    assert of_one == 64
    assert of_two == 8
