"""Swin's layers as an index of windows: plain against `transformers`' own, the kernel against the plain layer."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoBackbone, SwinConfig
from transformers.models.swin.modeling_swin import SwinLayer

from m2f_hf.kernels import chunks as chunking
from m2f_hf.kernels import fast_path, window_attention
from m2f_hf.kernels.window_attention import Windows, _weights
from m2f_hf.model.padding import PaddedBatch, call_on_batch, hide_padding_in
from m2f_hf.model.swin import WindowedSwinLayer, index_windows, token_slots, use_windowed_layers


SIZES = [(4, 4), (5, 7), (8, 8), (9, 3), (1, 13)]


def make_layer(shift, window_size=4, drop_path_rate=0.0, attention="sdpa"):
    """Return a layer of `transformers` with weights that matter, and ours with the same."""
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
    if type(ours) is not WindowedSwinLayer:
        pytest.skip("this release of transformers has other layers, which stay its own")
    return theirs, ours


def run(layer, states, size, hidden_batch=None):
    return call_on_batch(hidden_batch, layer, states, size, always_partition=True)[0]


def assert_all_close(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5 * max(1, theirs.abs().max().item()), rtol=0)


@pytest.fixture
def small_chunks(monkeypatch, request):
    """Pieces of a few numbers each."""
    monkeypatch.setattr(chunking, "_NUMBERS_PER_CHUNK", request.param)
    monkeypatch.setattr(chunking, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)


# The plain layer


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_layer_equals_that_of_transformers(size, shift, training, kernels, monkeypatch):
    monkeypatch.setattr(fast_path, "_CHOICE", kernels)
    states = torch.randn(2, size[0] * size[1], 12, requires_grad=True)
    results = []
    for layer in make_layer(shift):
        with torch.set_grad_enabled(training):
            output = run(layer.train(training), states, size)
        gradients = torch.autograd.grad(output.square().sum(), [states, *layer.parameters()]) if training else ()
        results.append((output, *gradients))
    assert_all_close(results[1], results[0])


def test_eager_attention_returns_its_weights():
    states = torch.randn(1, 30, 12, requires_grad=True)
    expected, actual = (layer(states, (5, 6), always_partition=True) for layer in make_layer(2, attention="eager"))
    assert expected[1].shape == actual[1].shape == (4, 3, 16, 16)
    assert_all_close(actual, expected)


def test_a_map_that_fits_into_one_window_is_not_shifted_unless_asked():
    theirs, ours = make_layer(2)
    states = torch.randn(1, 4 * 9, 12)
    with torch.no_grad():
        small = ours(states, (4, 9))[0]
        assert_all_close([small], [theirs(states, (4, 9))[0]])
        assert not torch.allclose(small, run(ours, states, (4, 9)))


def test_stochastic_depth_drops_whole_images():
    _, layer = make_layer(0, drop_path_rate=0.5)
    states = torch.randn(16, 20, 12)
    layer.mlp.fc2.weight.data.zero_()
    layer.mlp.fc2.bias.data.zero_()
    changed = (run(layer.train(), states, (4, 5)) != states).flatten(1)
    assert torch.equal(changed.any(1), changed.all(1))
    assert changed.any() and not changed.all()


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_token_is_in_one_window(size, shift):
    height, width = size
    windows, regions = index_windows(height, width, 4, shift, torch.device("cpu"))
    order = windows.flatten()
    tokens = order[order < height * width]
    assert torch.equal(tokens.sort().values, torch.arange(height * width))
    assert torch.equal(order[token_slots(windows, height * width)], torch.arange(height * width))
    assert windows.shape == (-(-height // 4) * -(-width // 4), 16)
    assert (regions is None) == (shift == 0)


# The kernel


def graph_of(tensor):
    """Return the names of the nodes of its graph."""
    names, nodes = set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [following for following, _ in node.next_functions if following is not None]
    return names


@pytest.mark.parametrize("small_chunks", [1, 3 * 12 * 16 * 5, 1 << 20], ids=["one", "five", "all"], indirect=True)
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("case", ["plain", "hidden padding", "stochastic depth", "no bias"])
def test_kernel_equals_the_plain_layer(case, shift, small_chunks, monkeypatch):
    _, layer = make_layer(shift, drop_path_rate=0.5 if case == "stochastic depth" else 0.0)
    batch = None
    if case == "hidden padding":
        batch = PaddedBatch(torch.tensor([[288, 96], [288, 160]]), (288, 224))  # 3 and 5 of 7 columns
    if case == "no bias":
        for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
            projection.bias = None
    images = 6 if case == "stochastic depth" else 2
    states = torch.randn(images, 63, 12, requires_grad=True)
    weights = torch.randn(images, 63, 12)
    results = []
    for kernels in ("plain", "auto"):
        monkeypatch.setattr(fast_path, "_CHOICE", kernels)
        with torch.no_grad():
            inferred = run(layer.eval(), states, (9, 7), batch)
        torch.manual_seed(1)
        output = run(layer.train(), states, (9, 7), batch)
        assert ("WindowAttentionBackward" in graph_of(output)) == (kernels == "auto")
        gradients = torch.autograd.grad((output * weights).sum(), [states, *layer.parameters()])
        results.append((inferred, output, *gradients))
    assert_all_close(*results)


def test_kernel_in_half_precision_equals_the_plain_layer(monkeypatch):
    _, layer = make_layer(2)
    layer, states, outputs = layer.eval().bfloat16(), torch.randn(2, 63, 12).bfloat16(), []
    for kernels in ("plain", "auto"):
        monkeypatch.setattr(fast_path, "_CHOICE", kernels)
        with torch.no_grad():
            outputs.append(run(layer, states, (9, 7)))
    torch.testing.assert_close(*outputs, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_under_autocast_is_as_exact_as_the_plain_layer_and_keeps_queries_in_its_dtype(dtype, monkeypatch):
    _, layer = make_layer(2)
    states = torch.randn(2, 63, 12).to(dtype)
    weights = torch.randn(2, 63, 12)
    results, kept = [], []
    for kernels, is_cast in (("plain", False), ("plain", True), ("auto", True)):
        monkeypatch.setattr(fast_path, "_CHOICE", kernels)
        inputs = states.to(dtype if is_cast else torch.float32).requires_grad_()
        kept.clear()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=is_cast),
            torch.autograd.graph.saved_tensors_hooks(
                lambda one: kept.append((one.numel(), one.dtype)) or one, lambda one: one
            ),
        ):
            output = run(layer.train(), inputs, (9, 7))
        assert ("WindowAttentionBackward" in graph_of(output)) == (kernels == "auto")
        results.append((output, *torch.autograd.grad((output * weights).sum(), [inputs, *layer.parameters()])))
    assert (3 * 2 * 6 * 16 * 12, torch.bfloat16) in kept
    for exact, theirs, ours in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-6


def test_autocast_around_the_backward_pass_alone_changes_nothing():
    _, layer = make_layer(2)
    states = torch.randn(2, 63, 12, requires_grad=True)
    gradients = []
    for is_cast in (False, True):
        loss = run(layer.train(), states, (9, 7)).square().sum()
        assert "WindowAttentionBackward" in graph_of(loss)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            gradients.append(torch.autograd.grad(loss, [states, *layer.parameters()]))
    assert all(map(torch.equal, *gradients))


def test_queries_keys_and_values_are_what_attention_keeps():
    _, layer = make_layer(2)
    kept = []
    states = torch.randn(2, 63, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        run(layer, states, (9, 7))
    filled = 2 * index_windows(9, 7, 4, 2, states.device)[0].numel() * 12
    large = sorted(one.numel() for one in kept if one.is_floating_point() and one.numel() >= states.numel())
    # the input, what goes into the last norm and what comes out of it, queries with keys and values; the feed-forward
    assert [numel for numel in large if numel > 4 * states.numel()] == [3 * filled]
    assert len(large) <= 5


@pytest.mark.parametrize("shift", [0, 2])
def test_what_fills_windows_up_is_not_multiplied(shift, monkeypatch):
    """(9, 7) takes 3 x 2 windows of 4 x 4: 33 positions more than it has."""
    _, layer = make_layer(shift)
    states, counted = torch.randn(2, 63, 12, requires_grad=True), []

    def count_rows(original):
        def counting(rows, weight, *arguments):
            counted.append((tuple(weight.shape), rows.numel() // rows.shape[-1]))
            return original(rows, weight, *arguments)

        return counting

    with monkeypatch.context() as patch:
        patch.setattr(window_attention.F, "linear", count_rows(window_attention.F.linear))
        run(layer, states, (9, 7)).sum().backward()
    for shape, times in (((36, 12), 1), ((12, 36), 1), ((12, 12), 2)):  # in, back through it; out, and back
        assert sum(count for of, count in counted if of == shape) == times * states.shape[:2].numel()
    monkeypatch.setattr(window_attention, "linear", count_rows(window_attention.linear))
    counted.clear()
    with torch.no_grad():
        run(layer.eval(), states, (9, 7))
    for shape in ((36, 12), (12, 12)):
        assert sum(count for of, count in counted if of == shape) == states.shape[:2].numel()


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_an_adapter_on_a_projection_is_called(name):
    """In windows that are filled up, too; it is given three dimensions, as `transformers` gives them."""
    _, layer = make_layer(2)
    states = torch.randn(2, 63, 12, requires_grad=True)
    plain = run(layer, states, (9, 7))

    def adapter(_, inputs, output):
        assert inputs[0].dim() == 3
        return output + inputs[0] + 1

    getattr(layer.attention, name).register_forward_hook(adapter)
    with_adapter = run(layer, states, (9, 7))
    with torch.no_grad():
        torch.testing.assert_close(run(layer.eval(), states, (9, 7)), with_adapter, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(with_adapter, plain)


def test_fake_tensors_have_no_chunks():
    _, layer = make_layer(2)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        output = run(layer.eval(), torch.empty(2, 63, 12), (9, 7))
    assert isinstance(output, FakeTensor) and output.shape == (2, 63, 12)


@pytest.mark.parametrize("small_chunks", [2 * 16 * 5], ids=["two windows"], indirect=True)
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_full_windows_come_first_and_few_at_a_time(size, shift, small_chunks):
    length = size[0] * size[1]
    tokens, regions = index_windows(*size, 4, shift, torch.device("cpu"))
    windows = Windows.from_index(tokens, regions, (2, length), None)
    chunks = list(windows.chunks(5))
    assert [chunk.stop for chunk in chunks][:-1] == [chunk.start for chunk in chunks][1:]
    assert all(chunk.stop - chunk.start <= 2 for chunk in chunks) and chunks[-1].stop == 2 * len(tokens)
    located = [windows.rows_in(chunk) for chunk in chunks]
    assert torch.cat([one.tokens for one in located]).sort().values.tolist() == list(range(2 * length))
    filled_up = [one.positions is not None for one in located]
    assert filled_up == sorted(filled_up)
    num_full = int((tokens < length).all(1).sum())
    assert filled_up.count(False) == num_full  # of two images, two in a chunk


def test_pieces_are_for_inference_in_eager_mode_on_the_cpu():
    layer, states = torch.nn.Identity().eval(), torch.zeros(2)
    assert not chunking.infers_in_chunks(layer, states)
    with torch.no_grad():
        assert chunking.infers_in_chunks(layer, states)
        assert not chunking.infers_in_chunks(layer, states.to("meta"))
        assert torch.compile(chunking.infers_in_chunks, backend="eager")(layer, states) is False
        assert not chunking.infers_in_chunks(layer.train(), states)


def test_weights_across_regions_are_zero_instead_of_denormal():
    """A product with denormal numbers takes twenty times as long."""
    query, key = torch.randn(2, 2, 2, 6, 4)  # two windows, two heads
    outside = (torch.rand(2, 1, 6, 6) < 0.5) & ~torch.eye(6, dtype=torch.bool)
    weights = _weights(query, key, torch.zeros(2, 6, 6), outside)
    expected = (0.5 * query @ key.mT - 100.0 * outside).softmax(-1)
    assert ((expected > 0) & (expected < torch.finfo(torch.float32).tiny)).any()
    assert not ((weights > 0) & (weights < torch.finfo(torch.float32).tiny)).any()
    torch.testing.assert_close(weights, expected, atol=1e-30, rtol=0)


# A whole backbone


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_hidden_padding_reaches_no_image(kernels, monkeypatch):
    monkeypatch.setattr(fast_path, "_CHOICE", kernels)
    torch.manual_seed(0)
    backbone = AutoBackbone.from_config(
        SwinConfig(
            window_size=4,
            embed_dim=12,
            num_heads=[3] * 4,
            depths=[2, 1, 1, 1],
            out_indices=(1, 2, 3, 4),
            drop_path_rate=0.0,
        )
    )
    use_windowed_layers(backbone)
    hide_padding_in(backbone)
    images, batch = torch.randn(1, 3, 96, 96), PaddedBatch(torch.tensor([[64, 64]]), (96, 96))
    results = []
    for noise in (0.0, 100.0):
        images[:, :, 64:] = images[:, :, :, 64:] = noise
        for training in (False, True):
            with torch.set_grad_enabled(training):
                maps = call_on_batch(batch, backbone.train(training), images).feature_maps
            results.append(maps[0][:, :, :16, :16])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)


def test_backbone_equals_that_of_transformers_and_learns_the_same_with_checkpoints():
    torch.manual_seed(0)
    config = SwinConfig(
        window_size=3, embed_dim=12, num_heads=[1, 2, 3, 4], depths=[1, 2, 1, 1], drop_path_rate=0.0, out_indices=(1, 4)
    )
    theirs = AutoBackbone.from_config(config)
    ours = copy.deepcopy(theirs)
    use_windowed_layers(ours)
    pixel_values, results = torch.randn(1, 3, 52, 72), []  # halves that are odd
    for backbone, checkpointed in ((theirs, False), (ours, False), (ours, True)):
        if checkpointed:
            (getattr(ours, "activation_checkpointing_enable", None) or ours.gradient_checkpointing_enable)()
            assert ours.swin.encoder.layers[0].gradient_checkpointing
        backbone.train().zero_grad()
        maps = backbone(pixel_values).feature_maps
        sum(one.square().sum() for one in maps).backward()
        results.append((*maps, *(parameter.grad for parameter in backbone.parameters() if parameter.grad is not None)))
    for actual in results[1:]:
        for one, other in zip(actual, results[0], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
