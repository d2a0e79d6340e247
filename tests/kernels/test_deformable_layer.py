"""The encoder's layer that learns in pieces: against the plain layers and numerical derivatives."""

import copy

import pytest
import torch
from torch import nn

from m2f_hf import Mask2FormerConfig
from m2f_hf.kernels import deformable_layer
from m2f_hf.kernels import pieces as chunking
from m2f_hf.kernels.deformable_attention import points_in_maps
from m2f_hf.kernels.deformable_layer import DeformableLayer, EncodedPlaces
from m2f_hf.model import pixel_decoder
from m2f_hf.model.pixel_decoder import Mask2FormerPixelDecoderEncoderOnly


SHAPES = [(2, 3), (4, 5), (7, 9)]
LENGTH = sum(height * width for height, width in SHAPES)
WIDTH, HEADS, WIDE = 32, 2, 40  # heads of 16: narrower ones would read such small maps by `grid_sample`


def make_encoder(**fields):
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        feature_size=WIDTH, num_attention_heads=HEADS, encoder_feedforward_dim=WIDE, encoder_layers=2, **fields
    )
    encoder = Mask2FormerPixelDecoderEncoderOnly(config).train()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return encoder


def make_inputs(images=3, encodings=1):
    generator = torch.Generator().manual_seed(1)
    states, positions = (torch.randn(n, LENGTH, WIDTH, generator=generator) for n in (images, encodings))
    return states.requires_grad_(), positions.requires_grad_()


def learn(encoder, states, positions, padding=None):
    """The output and all gradients."""
    output = encoder(states, positions, SHAPES, padding)
    return output, *torch.autograd.grad(output.pow(3).sum(), [states, positions, *encoder.parameters()])


def plainly(encoder, *inputs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pixel_decoder, "learns_in_pieces", lambda *_: False)
        patch.setattr(pixel_decoder, "form_for", lambda _: "grid_sample")
        results = learn(encoder, *inputs)
    assert "DeformableLayer" not in names_of_functions(results[0])
    return results


def names_of_functions(output):
    seen, names, open_nodes = set(), set(), [output.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name().removesuffix("Backward"))
            open_nodes += [following for following, _ in node.next_functions]
    return names


def assert_alike(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * max(1, other.abs().max().item()))


@pytest.mark.parametrize("kept", [0, 77 * WIDE, 1 << 20], ids=["computed again", "kept in part", "kept"])
@pytest.mark.parametrize("encodings", [1, 3], ids=["one encoding", "an encoding for each image"])
# A row a piece and an image a table; pieces that end within images, and span some; everything at once.
@pytest.mark.parametrize("numbers", [1, 50 * WIDE, 2 * LENGTH * 4 * 24, 1 << 20])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_the_layers(padded, numbers, encodings, kept, by_onednn, monkeypatch):
    monkeypatch.setattr(chunking, "_NUMBERS_PER_PIECE", numbers)
    monkeypatch.setattr(chunking, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)
    monkeypatch.setattr(deformable_layer, "_NUMBERS_KEPT", kept)
    encoder, (states, positions) = make_encoder(), make_inputs(encodings=encodings)
    padding = torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.3 if padded else None
    actual = learn(encoder, states, positions, padding)
    assert "DeformableLayer" in names_of_functions(actual[0])
    assert_alike(actual, plainly(encoder, states, positions, padding, monkeypatch=monkeypatch))


@pytest.mark.parametrize("kept", [0, 77, 90, 1000])
def test_kept_states_are_used_however_the_pieces_are_cut(kept, monkeypatch):
    """Their size depends on the number of threads, which another pass may not have."""
    encoder, (states, positions) = make_encoder(), make_inputs()
    expected = plainly(encoder, states, positions, None, monkeypatch=monkeypatch)
    monkeypatch.setattr(chunking, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)
    monkeypatch.setattr(deformable_layer, "_NUMBERS_KEPT", kept * WIDE)
    linear, computed = deformable_layer.linear, []

    def counting(states, weight, bias=None, **kwargs):
        # Without a bias it is the product with the other weights, in the backward pass.
        is_first = weight.shape == encoder.layers[0].fc1.weight.shape and bias is not None
        computed.extend([len(states)] if is_first else [])
        return linear(states, weight, bias, **kwargs)

    for numbers in (60 * 96, 400 * 96):  # of pieces; the other way round, too
        monkeypatch.setattr(chunking, "_NUMBERS_PER_PIECE", numbers)
        output = encoder(states, positions, SHAPES, None)
        monkeypatch.setattr(chunking, "_NUMBERS_PER_PIECE", 460 * 96 - numbers)
        with monkeypatch.context() as patch:
            patch.setattr(deformable_layer, "linear", counting)
            inputs = [states, positions, *encoder.parameters()]
            assert_alike((output, *torch.autograd.grad(output.pow(3).sum(), inputs)), expected)
        assert sum(computed) == len(encoder.layers) * max(0, 3 * LENGTH - kept)
        computed.clear()


def test_gradients_are_derivatives():
    """In double precision, by differences: nothing of ours is on the other side."""
    torch.manual_seed(0)
    shapes, heads, width, wide = [(1, 1), (2, 1), (2, 3)], 2, 4, 6
    length = sum(height * columns for height, columns in shapes)
    samples = heads * 3 * 4
    sizes = [
        (width, width), (width,), (samples * 3, width), (samples * 3,), (width, width), (width,),
        (width,), (width,), (wide, width), (wide,), (width, wide), (width,), (width,), (width,),
    ]  # fmt: skip
    weights = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    map_sizes = torch.tensor([shape[::-1] for shape in shapes], dtype=torch.float64)
    places = EncodedPlaces(shapes, points_in_maps(torch.rand(length, 2, dtype=torch.float64), map_sizes, 4), None)
    states = torch.randn(2, length, width, dtype=torch.float64, requires_grad=True)
    positions = torch.randn(1, length, width, dtype=torch.float64, requires_grad=True)

    def layer(states, positions, *weights):
        return DeformableLayer.apply(states, positions, places, heads, (1e-5, 1e-3), *weights)

    # A step of 1e-6 rarely crosses one of the corners at which a bilinear read, or a ReLU, has no derivative.
    assert torch.autograd.gradcheck(layer, (states, positions, *weights), eps=1e-6, atol=1e-4, rtol=1e-3)


def test_what_outlives_the_forward_pass():
    kept = []

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept.append(tensor.numel())
        return tensor

    encoder, (states, positions) = make_encoder(), make_inputs()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        encoder.layers[0](
            states,
            positions,
            encoder.reference_points(SHAPES, states),
            torch.tensor([shape[::-1] for shape in SHAPES], dtype=torch.float32),
            SHAPES,
            None,
        )
    # Per position: its state, what attention gave, the sums before either norm; places and weights of the samples; the
    # wide states; a mean and a deviation for each norm.
    each = 4 * WIDTH + HEADS * 12 * (2 + 1) + WIDE + 4
    shared = LENGTH * (WIDTH + 24) + 12 * HEADS * 3 * (WIDTH + 1)  # encoding, points, weights put together
    assert sum(kept) == 3 * LENGTH * each + shared


@pytest.mark.parametrize("part", ["fc1", "self_attn", "self_attn.value_proj", "final_layer_norm"])
def test_a_layer_that_is_hooked_is_called(part):
    encoder, inputs = make_encoder(), make_inputs()
    calls = []
    encoder.layers[0].get_submodule(part).register_forward_hook(lambda *_: calls.append(part))
    encoder(*inputs, SHAPES, None)
    assert calls == [part]


def test_dropout_takes_the_plain_layers():
    encoder, inputs = make_encoder(dropout=0.5), make_inputs()
    assert "DeformableLayer" not in names_of_functions(encoder(*inputs, SHAPES, None))
    assert "DeformableLayer" in names_of_functions(encoder.eval()(*inputs, SHAPES, None))


def test_autocast_and_half_precision_take_the_plain_layers():
    encoder, (states, positions) = make_encoder(), make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert "DeformableLayer" not in names_of_functions(encoder(states, positions, SHAPES, None))
    half = copy.deepcopy(encoder).bfloat16()
    output = half(states.bfloat16(), positions.bfloat16(), SHAPES, None)
    assert "DeformableLayer" not in names_of_functions(output)


def test_autocast_around_the_backward_pass_alone_changes_nothing():
    encoder, (states, positions) = make_encoder(), make_inputs()
    inputs = [states, positions, *encoder.parameters()]
    gradients = []
    for is_cast in (False, True):
        loss = encoder(states, positions, SHAPES, None).pow(3).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            gradients.append(torch.autograd.grad(loss, inputs))
    assert all(map(torch.equal, *gradients))


def test_an_encoding_may_lie_in_memory_as_it_likes():
    encoder, (states, positions) = make_encoder(), make_inputs(encodings=3)
    turned = positions.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert_alike(learn(encoder, states, turned), learn(encoder, states, positions))


@pytest.mark.parametrize("part", ["fc1", "self_attn.value_proj", "self_attn_layer_norm", "self_attn.sampling_offsets"])
def test_partly_frozen_weights(part, monkeypatch):
    encoder, inputs = make_encoder(), make_inputs()
    encoder.layers[0].get_submodule(part).requires_grad_(False)
    gradients = []
    for plain in (False, True):
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(pixel_decoder, "learns_in_pieces", lambda *_: False)
                patch.setattr(pixel_decoder, "form_for", lambda _: "grid_sample")
            encoder.zero_grad()
            encoder(*inputs, SHAPES, None).pow(3).sum().backward()
            gradients.append([parameter.grad for parameter in encoder.parameters()])
    assert [one is None for one in gradients[0]] == [one is None for one in gradients[1]]
    assert sum(one is None for one in gradients[0]) == 2
    assert_alike(*([one for one in some if one is not None] for some in gradients))


def test_states_without_a_gradient_take_the_plain_layers():
    encoder, (states, positions) = make_encoder(), make_inputs()
    first = encoder.layers[:1]
    encoder.layers = first
    output = encoder(states.detach(), positions.detach(), SHAPES, None)
    assert "DeformableLayer" not in names_of_functions(output)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in first.parameters())


def test_frozen_weights_get_no_gradient():
    encoder, (states, positions) = make_encoder(), make_inputs()
    encoder.layers[1].requires_grad_(False)
    encoder(states, positions, SHAPES, None).sum().backward()
    assert all(parameter.grad is None for parameter in encoder.layers[1].parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in encoder.layers[0].parameters())
    assert states.grad.abs().sum() > 0
