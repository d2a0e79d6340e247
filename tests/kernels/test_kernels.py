"""Every kernel against the plain layer that it hangs on: outputs, gradients, and when it steps aside."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tiny import tiny_config
from torch import nn
from transformers import SwinConfig
from transformers.models.swin.modeling_swin import SwinLayer

import m2f_hf.kernels
from m2f_hf.kernels import chunks, fast_path, products
from m2f_hf.kernels.deformable_attention import multi_scale_deformable_attention
from m2f_hf.kernels.fast_path import Kernel
from m2f_hf.kernels.products import linear
from m2f_hf.model.layers import WinogradConv2d
from m2f_hf.model.pixel_decoder import ConvNorm, Mask2FormerPixelDecoderEncoderLayer, Places
from m2f_hf.model.swin import WindowedSwinLayer, use_windowed_layers


MODULES = [
    importlib.import_module(f"m2f_hf.kernels.{each.name}") for each in pkgutil.iter_modules(m2f_hf.kernels.__path__)
]
KERNELS = {
    name: value
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, Kernel) and value.serves.__module__ == module.__name__
}
SHAPES = [(2, 3), (4, 6), (8, 12)]


class Case(NamedTuple):
    """A call that a kernel serves.

    Args:
        function: what the kernel hangs on: a layer's method, or a function.
        args: of the call; a layer first.
        learns: whether the kernel serves while gradients are recorded.
        infers: whether it serves while none are.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    learns: bool = True
    infers: bool = True


def random(*shape: int, channels_last: bool = False) -> torch.Tensor:
    tensor = torch.randn(shape)
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


def encoder_layer() -> tuple[nn.Module, torch.Tensor, torch.Tensor, Places]:
    layer = Mask2FormerPixelDecoderEncoderLayer(tiny_config()).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    positions = sum(height * width for height, width in SHAPES)
    padding = torch.zeros(2, positions, dtype=torch.bool)
    padding[1, -5:] = True
    places = Places.of(SHAPES, padding, torch.device("cpu"), num_points=4)
    return layer, random(2, positions, 32), random(1, positions, 32), places


def windowed_swin_layer() -> tuple[nn.Module, torch.Tensor, tuple[int, int], bool]:
    config = SwinConfig(window_size=4, embed_dim=12)
    config._attn_implementation = "sdpa"
    layer = nn.ModuleList([SwinLayer(config, 12, (8, 8), 3, shift_size=2)])
    use_windowed_layers(layer)
    return layer[0].eval(), random(2, 63, 12), (9, 7), True


def attention_arguments() -> tuple[Any, ...]:
    positions = sum(height * width for height, width in SHAPES)
    weights = random(2, 7, 2, 12).softmax(-1).unflatten(-1, (3, 4))
    return random(2, positions, 2, 16), SHAPES, torch.rand(2, 7, 2, 3, 4, 2) * 1.4 - 0.2, weights


CASES: dict[str, Callable[[], Case]] = {
    "deformable_encoder_layer": lambda: Case(
        Mask2FormerPixelDecoderEncoderLayer.forward, encoder_layer(), learns=False
    ),
    "relu_feed_forward": lambda: Case(
        Mask2FormerPixelDecoderEncoderLayer.feed_forward, encoder_layer()[:2], infers=False
    ),
    "gather_attention": lambda: Case(multi_scale_deformable_attention, attention_arguments()),
    "triton_attention": lambda: Case(multi_scale_deformable_attention, attention_arguments()),
    "channels_last_group_norm": lambda: Case(
        ConvNorm.forward, (ConvNorm(nn.Conv2d(8, 64, 3, padding=1), relu=True), random(2, 8, 9, 7, channels_last=True))
    ),
    "winograd_convolution": lambda: Case(
        WinogradConv2d.forward, (WinogradConv2d(32, 40, 3, padding=1), random(2, 32, 12, 14, channels_last=True))
    ),
    "swin_layer": lambda: Case(WindowedSwinLayer.forward, windowed_swin_layer()),
    "onednn_linear": lambda: Case(linear, (random(2, 40, 24), random(18, 24), random(18)), learns=False),
}


def make_case(name: str) -> Case:
    torch.manual_seed(0)
    if name == "triton_attention" and not torch.cuda.is_available():
        pytest.skip("needs a GPU; `triton_interpreter_cases.py` computes it without")
    case = CASES[name]()
    if name == "triton_attention":
        case = case._replace(args=tuple(one.cuda() if torch.is_tensor(one) else one for one in case.args))
    return case


@pytest.fixture(params=sorted(KERNELS))
def name(request, monkeypatch):
    if request.param == "onednn_linear":
        monkeypatch.setattr(products, "_mkl_leaves_instructions_unused", lambda: True)
        products._onednn_linear.cache_clear()
        if products._onednn_linear() is None:
            pytest.skip("this PyTorch has no such operator for this machine")
    yield request.param
    products._onednn_linear.cache_clear()


def test_every_kernel_has_a_case():
    assert sorted(KERNELS) == sorted(CASES)


@pytest.mark.parametrize("numbers", [1, 500, 1 << 20], ids=["a position a chunk", "some", "all"])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_kernel_gives_what_the_plain_layer_gives(name, with_gradients, numbers, monkeypatch):
    case = make_case(name)
    assert KERNELS[name] in case.function.kernels
    monkeypatch.setattr(chunks, "_NUMBERS_PER_CHUNK", numbers)
    monkeypatch.setattr(chunks, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)
    args = [
        one.requires_grad_(with_gradients) if torch.is_tensor(one) and one.is_floating_point() else one
        for one in case.args
    ]
    wanted = [one for one in args if torch.is_tensor(one) and one.requires_grad]
    wanted += [parameter for one in args if isinstance(one, nn.Module) for parameter in one.parameters()]
    results = []
    for choice in ("auto", "plain"):
        monkeypatch.setattr(fast_path, "_CHOICE", choice)
        with torch.set_grad_enabled(with_gradients):
            served = case.learns if with_gradients else case.infers
            assert KERNELS[name].serves(*args) == served
            output = case.function(*args)
        output = output[0] if isinstance(output, tuple) else output
        gradients = []
        if with_gradients:
            direction = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
            gradients = torch.autograd.grad(output, wanted, direction, allow_unused=True)
        results.append([output, *gradients])
    assert len(results[0]) == len(results[1])
    for ours, plain in zip(*results, strict=True):
        assert (ours is None) == (plain is None)
        if plain is not None:
            assert ours.dtype == plain.dtype
            bound = 1e-5 * max(1.0, plain.abs().max().item())
            torch.testing.assert_close(ours, plain, atol=bound, rtol=1e-4)


def test_a_hook_on_any_part_is_called(name):
    """A kernel that reads the parameters of a part would pass its hook by."""
    case = make_case(name)
    layer = case.args[0]
    for part in list(layer.modules())[1:] if isinstance(layer, nn.Module) else ():
        seen = []
        handle = part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        is_called = case.function.__name__ == "forward" or part in (layer.fc1, layer.fc2)
        with torch.set_grad_enabled(not case.infers):
            case.function(*case.args)
        handle.remove()
        assert bool(seen) == is_called
