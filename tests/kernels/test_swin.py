"""Swin's layers as an index of windows: against `transformers`' own, on maps of any size."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoBackbone, SwinConfig
from transformers.models.swin.modeling_swin import SwinLayer

from m2f_hf.kernels import feed_forward, swin, window_attention
from m2f_hf.kernels import pieces as chunking
from m2f_hf.kernels.swin import WindowedSwinLayer, feature_maps, index_windows, token_slots, use_windowed_layers
from m2f_hf.kernels.window_attention import Windows, _weights
from m2f_hf.model.padding import BackbonePaddingHider


SIZES = [(4, 4), (5, 7), (8, 8), (9, 3), (1, 13)]


def make_layer(shift, window_size=4, drop_path_rate=0.0, attention="sdpa"):
    """A layer of `transformers` with weights that matter, and ours with the same."""
    torch.manual_seed(0)
    config = SwinConfig(
        window_size=window_size,
        embed_dim=12,
        num_heads=[3, 3, 3, 3],
        depths=[1, 1, 1, 1],
        drop_path_rate=drop_path_rate,
    )
    config._attn_implementation = attention
    theirs = SwinLayer(config, 12, (8, 8), 3, drop_path_rate=drop_path_rate, shift_size=shift)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    ours = copy.deepcopy(theirs)
    use_windowed_layers(ours)
    assert type(ours) is WindowedSwinLayer
    return theirs, ours


@pytest.mark.parametrize("training", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_transformers_layer(size, shift, training):
    theirs, ours = make_layer(shift)
    states = torch.randn(2, size[0] * size[1], 12, requires_grad=True)
    results = []
    for layer in (theirs, ours):
        with torch.set_grad_enabled(training):
            output = layer.train(training)(states, size, always_partition=True)[0]
        gradients = torch.autograd.grad(output.square().sum(), [states, *layer.parameters()]) if training else ()
        results.append((output, *gradients))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5 * max(1, expected.abs().max().item()), rtol=0)


def test_attention_that_writes_its_weights_down_returns_them():
    theirs, ours = make_layer(2, attention="eager")
    states = torch.randn(1, 30, 12, requires_grad=True)
    expected, actual = (layer(states, (5, 6), always_partition=True) for layer in (theirs, ours))
    torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual[1], expected[1], atol=1e-5, rtol=1e-5)


def test_stochastic_depth_drops_whole_images():
    _, layer = make_layer(0, drop_path_rate=0.5)
    states = torch.randn(16, 20, 12)
    layer.mlp.fc2.weight.data.zero_()
    layer.mlp.fc2.bias.data.zero_()
    changed = (layer.train()(states, (4, 5), always_partition=True)[0] != states).flatten(1)
    assert torch.equal(changed.any(1), changed.all(1))
    assert changed.any() and not changed.all()


@pytest.mark.parametrize("numbers", [1, 48 * 16 * 3, 48 * 16 * 3 + 1], ids=["one", "three windows", "not a divisor"])
@pytest.mark.parametrize("case", ["plain", "hidden padding", "no bias"])
def test_pieces_change_nothing(case, numbers, monkeypatch):
    _, layer = make_layer(2)
    states, layer = torch.randn(2, 63, 12), layer.eval()
    if case == "no bias":
        for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
            projection.bias = None
    if case == "hidden padding":
        hidden = torch.rand(2, 63, generator=torch.Generator().manual_seed(0)) < 0.3
        layer.padding_hider = SimpleNamespace(hidden_tokens=lambda size: hidden)
    with torch.no_grad():
        with monkeypatch.context() as whole:
            whole.setattr(swin, "works_in_pieces", lambda *_: False)
            expected = layer(states, (9, 7), always_partition=True)[0]
        monkeypatch.setattr(chunking, "_NUMBERS_PER_PIECE", numbers)
        monkeypatch.setattr(chunking, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)
        torch.testing.assert_close(layer(states, (9, 7), always_partition=True)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("numbers", [1, 3 * 12 * 16 * 5, 1 << 20], ids=["one window", "five", "all"])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("case", ["plain", "hidden padding", "stochastic depth", "no bias"])
def test_pieces_learn_what_the_whole_learns(case, shift, numbers, monkeypatch):
    _, layer = make_layer(shift, drop_path_rate=0.5 if case == "stochastic depth" else 0.0)
    if case == "hidden padding":
        hidden = torch.arange(63) % 7 > torch.tensor([[3], [5]])
        layer.padding_hider = SimpleNamespace(hidden_tokens=lambda size: hidden)
    if case == "no bias":
        for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
            projection.bias = None
    images = 6 if case == "stochastic depth" else 2
    states = torch.randn(images, 63, 12, requires_grad=True)
    weights = torch.randn(images, 63, 12)
    results = []
    for in_pieces in (False, True):
        if in_pieces:
            monkeypatch.setattr(chunking, "_NUMBERS_PER_PIECE", numbers)
            monkeypatch.setattr(chunking, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)
        else:
            monkeypatch.setattr(swin, "learns_in_pieces", lambda *_: False)
            monkeypatch.setattr(feed_forward, "learns_in_pieces", lambda *_: False)
        torch.manual_seed(1)
        output = layer.train()(states, (9, 7), always_partition=True)[0]
        assert ("WindowAttentionBackward" in graph_of(output)) == in_pieces
        results.append((output, *torch.autograd.grad((output * weights).sum(), [states, *layer.parameters()])))
        monkeypatch.undo()
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5 * max(1, expected.abs().max().item()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_pieces_are_as_exact_as_the_whole_and_keep_queries_in_its_dtype(dtype, monkeypatch):
    _, layer = make_layer(2)
    states = torch.randn(2, 63, 12).to(dtype)
    weights = torch.randn(2, 63, 12)
    results, kept = [], []

    def pack(tensor):
        kept.append((tensor.numel(), tensor.dtype))
        return tensor

    for in_pieces, is_cast in ((False, False), (False, True), (True, True)):
        if not in_pieces:
            monkeypatch.setattr(swin, "learns_in_pieces", lambda *_: False)
            monkeypatch.setattr(feed_forward, "learns_in_pieces", lambda *_: False)
        inputs = states.to(dtype if is_cast else torch.float32).requires_grad_()
        kept.clear()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=is_cast),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            output = layer.train()(inputs, (9, 7), always_partition=True)[0]
        assert ("WindowAttentionBackward" in graph_of(output)) == in_pieces
        results.append((output, *torch.autograd.grad((output * weights).sum(), [inputs, *layer.parameters()])))
        monkeypatch.undo()
    assert (3 * 2 * 6 * 16 * 12, torch.bfloat16) in kept
    for exact, theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-6


def test_autocast_around_the_backward_pass_alone_changes_nothing():
    _, layer = make_layer(2)
    states = torch.randn(2, 63, 12, requires_grad=True)
    gradients = []
    for is_cast in (False, True):
        output = layer.train()(states, (9, 7), always_partition=True)[0]
        assert "WindowAttentionBackward" in graph_of(output)
        loss = output.square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            gradients.append(torch.autograd.grad(loss, [states, *layer.parameters()]))
    assert all(map(torch.equal, *gradients))


def graph_of(tensor):
    """Names of the nodes of its graph."""
    names, nodes = set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [following for following, _ in node.next_functions if following is not None]
    return names


def test_queries_keys_and_values_are_what_attention_keeps():
    _, layer = make_layer(2)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    states = torch.randn(2, 63, 12, requires_grad=True)
    windows, regions = index_windows(9, 7, 4, 2, states.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer._attend_in_pieces(states, windows, regions, None)
    filled = 2 * windows.numel() * 12
    large = [tensor for tensor in kept if tensor.is_floating_point() and tensor.numel() > filled // 2]
    assert sorted(tensor.numel() for tensor in large) == [states.numel(), 3 * filled]


@pytest.mark.parametrize("shift", [0, 2])
def test_what_fills_windows_up_is_not_multiplied(shift, monkeypatch):
    """(9, 7) takes 3 x 2 windows of 4 x 4: 33 positions more than it has."""
    _, layer = make_layer(shift)
    states, counted = torch.randn(2, 63, 12, requires_grad=True), []
    original = window_attention.linear

    def counting(rows, weight, *arguments, **kwargs):
        counted.append((tuple(weight.shape), rows.numel() // rows.shape[-1]))
        return original(rows, weight, *arguments, **kwargs)

    monkeypatch.setattr(window_attention, "linear", counting)
    monkeypatch.setattr(feed_forward, "linear", counting)
    layer(states, (9, 7), always_partition=True)[0].sum().backward()
    for shape, times in (((36, 12), 1), ((12, 36), 1), ((12, 12), 2)):  # in, back through it; out, and back
        assert sum(count for of, count in counted if of == shape) == times * states.shape[:2].numel()
    counted.clear()
    with torch.no_grad():
        layer.eval()(states, (9, 7), always_partition=True)
    assert sum(count for of, count in counted if of == (12, 12)) == 4 * states.shape[:2].numel()


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_an_adapter_on_a_projection_is_heard(name):
    """In windows that are filled up, too; it is given three dimensions, as `transformers` gives them."""
    _, layer = make_layer(2)
    states = torch.randn(2, 63, 12, requires_grad=True)
    plain = layer(states, (9, 7), always_partition=True)[0]

    def adapter(_, inputs, output):
        assert inputs[0].dim() == 3
        return output + inputs[0] + 1

    getattr(layer.attention, name).register_forward_hook(adapter)
    with_adapter = layer(states, (9, 7), always_partition=True)[0]
    with torch.no_grad():
        in_pieces = layer.eval()(states, (9, 7), always_partition=True)[0]
    torch.testing.assert_close(in_pieces, with_adapter, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(with_adapter, plain)


def test_fake_tensors_have_no_pieces():
    _, layer = make_layer(2)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        output = layer.eval()(torch.empty(2, 63, 12), (9, 7), always_partition=True)[0]
    assert isinstance(output, FakeTensor) and output.shape == (2, 63, 12)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_full_windows_come_first_and_few_at_a_time(size, shift, monkeypatch):
    monkeypatch.setattr(chunking, "_NUMBERS_PER_PIECE", 2 * 16 * 5)
    monkeypatch.setattr(chunking, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)
    length = size[0] * size[1]
    tokens, regions = index_windows(*size, 4, shift, torch.device("cpu"))
    windows = Windows.of(tokens, regions, (2, length), None)
    pieces = list(windows.pieces(5))
    assert [piece.stop for piece in pieces][:-1] == [piece.start for piece in pieces][1:]
    assert all(piece.stop - piece.start <= 2 for piece in pieces) and pieces[-1].stop == 2 * len(tokens)
    standing = [windows.standing_in(piece) for piece in pieces]
    assert torch.cat([one.tokens for one in standing]).sort().values.tolist() == list(range(2 * length))
    filled_up = [one.positions is not None for one in standing]
    assert filled_up == sorted(filled_up)
    num_full = int((tokens < length).all(1).sum())
    assert filled_up.count(False) == num_full  # of two images, two in a piece


def test_pieces_are_for_inference_in_eager_mode_on_the_cpu():
    layer, states = torch.nn.Identity().eval(), torch.zeros(2)
    assert not chunking.works_in_pieces(layer, states)
    with torch.no_grad():
        assert chunking.works_in_pieces(layer, states)
        assert not chunking.works_in_pieces(layer, states.to("meta"))
        assert torch.compile(chunking.works_in_pieces, backend="eager")(layer, states) is False
        assert not chunking.works_in_pieces(layer.train(), states)


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_token_stands_in_one_window(size, shift):
    height, width = size
    windows, regions = index_windows(height, width, 4, shift, torch.device("cpu"))
    order = windows.flatten()
    tokens = order[order < height * width]
    assert torch.equal(tokens.sort().values, torch.arange(height * width))
    assert torch.equal(order[token_slots(windows, height * width)], torch.arange(height * width))
    assert windows.shape == (-(-height // 4) * -(-width // 4), 16)
    assert (regions is None) == (shift == 0)


def test_hidden_padding_reaches_no_image():
    config = SwinConfig(
        window_size=4,
        embed_dim=12,
        num_heads=[3] * 4,
        depths=[2, 1, 1, 1],
        out_indices=(1, 2, 3, 4),
        drop_path_rate=0.0,
    )
    torch.manual_seed(0)
    backbone = AutoBackbone.from_config(config)
    use_windowed_layers(backbone)
    hider = BackbonePaddingHider(backbone)
    images = torch.randn(1, 3, 96, 96)
    hider.image_sizes, hider.input_size = torch.tensor([[64, 64]]), (96, 96)
    results = []
    for noise in (0.0, 100.0):
        images[:, :, 64:] = images[:, :, :, 64:] = noise
        for training in (False, True):
            with torch.set_grad_enabled(training):
                results.append(backbone.train(training)(images).feature_maps[0][:, :, :16, :16])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)


# A whole backbone


def make_backbone(out_features=("stage1", "stage2", "stage4")):
    torch.manual_seed(0)
    config = SwinConfig(
        window_size=3,
        embed_dim=12,
        num_heads=[1, 2, 3, 4],
        depths=[1, 2, 1, 1],
        drop_path_rate=0.0,
        out_features=list(out_features),
    )
    theirs = AutoBackbone.from_config(config).eval()
    ours = copy.deepcopy(theirs)
    use_windowed_layers(ours)
    return theirs, ours


def test_pixels_come_to_the_patch_embedding_with_channels_last():
    _, backbone = make_backbone()
    seen = []
    projection = backbone.swin.embeddings.patch_embeddings.projection
    projection.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    feature_maps(backbone, torch.randn(2, 3, 48, 72))
    assert [one.is_contiguous(memory_format=torch.channels_last) for one in seen] == [True, True]


@pytest.mark.parametrize("out_features", [("stage1", "stage2", "stage4"), ("stem", "stage3")], ids=str)
def test_maps_are_those_of_transformers_without_its_copies(out_features):
    theirs, ours = make_backbone(out_features)
    pixel_values = torch.randn(2, 3, 52, 72)  # halves that are odd
    with torch.no_grad():
        expected, actual = theirs(pixel_values).feature_maps, feature_maps(ours, pixel_values)
        asked_as_a_whole = ours(pixel_values).feature_maps
    assert len(actual) == len(out_features)
    for one, other, whole in zip(actual, expected, asked_as_a_whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(whole, other, atol=1e-5, rtol=1e-5)
        assert one.is_contiguous(memory_format=torch.channels_last)


def test_states_before_and_after_downsampling_are_those_of_transformers():
    theirs, ours = make_backbone()
    pixel_values = torch.randn(1, 3, 52, 72)
    for before in (True, False):
        arguments = {"output_hidden_states": True, "output_hidden_states_before_downsampling": before}
        with torch.no_grad():
            expected, actual = (
                model.swin(pixel_values, always_partition=True, **arguments).reshaped_hidden_states
                for model in (theirs, ours)
            )
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["", "swin", "swin.encoder", "swin.encoder.layers.1"])
def test_a_backbone_that_is_hooked_is_called(part):
    _, ours = make_backbone()
    calls = []
    ours.get_submodule(part).register_forward_hook(lambda *_: calls.append(part))
    feature_maps(ours, torch.randn(1, 3, 32, 32))
    assert calls == [part]


def test_a_backbone_that_is_compiled_runs_compiled():
    torch.compiler.reset()
    _, ours = make_backbone()
    graphs = []
    ours.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    feature_maps(ours, torch.randn(1, 3, 32, 32))
    assert graphs


def test_checkpointed_stages_learn_the_same():
    _, ours = make_backbone()
    pixel_values, gradients = torch.randn(1, 3, 48, 64), []
    for checkpointed in (False, True):
        if checkpointed:
            enable = getattr(ours, "activation_checkpointing_enable", None) or ours.gradient_checkpointing_enable
            enable()
            assert ours.swin.encoder.layers[0].gradient_checkpointing
        ours.train().zero_grad()
        sum(one.square().sum() for one in feature_maps(ours, pixel_values)).backward()
        gradients.append([parameter.grad for parameter in ours.parameters() if parameter.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_weights_across_regions_are_zero_instead_of_denormal():
    """A product with denormal numbers takes twenty times as long."""
    query, key = torch.randn(2, 2, 2, 6, 4)  # two windows, two heads
    outside = (torch.rand(2, 1, 6, 6) < 0.5) & ~torch.eye(6, dtype=torch.bool)
    weights = _weights(query, key, torch.zeros(2, 6, 6), outside, (-100.0, 1e-5, 0.5))
    expected = (0.5 * query @ key.mT - 100.0 * outside).softmax(-1)
    assert ((expected > 0) & (expected < torch.finfo(torch.float32).tiny)).any()
    assert not ((weights > 0) & (weights < torch.finfo(torch.float32).tiny)).any()
    torch.testing.assert_close(weights, expected, atol=1e-30, rtol=0)
