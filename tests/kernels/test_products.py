"""Products of linear layers: whichever library makes them, they are those of `F.linear`."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from m2f_hf.kernels import products
from m2f_hf.kernels.products import linear


class Sharded(torch.Tensor):
    """Stands for a tensor with arithmetic of its own."""


class Operators(TorchDispatchMode):
    """Names of what is called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def goes_by_onednn(*args, **kwargs):
    with Operators() as operators:
        linear(*args, **kwargs)
    return "_linear_pointwise" in operators.names


def make_inputs(rows=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 24), (18, 24), (18,))]


only_by_onednn = pytest.mark.parametrize("by_onednn", [True], indirect=True)


@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_values_are_those_of_a_linear_layer(by_onednn, has_bias):
    states, weight, bias = make_inputs()
    bias = bias if has_bias else None
    expected = F.linear(states.double(), weight.double(), None if bias is None else bias.double())
    assert goes_by_onednn(states, weight, bias) == by_onednn
    torch.testing.assert_close(linear(states, weight, bias).double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_leading_axes_stay(by_onednn):
    states, weight, bias = make_inputs(rows=80)
    actual = linear(states.view(2, 5, 8, 24), weight, bias)
    torch.testing.assert_close(actual, F.linear(states, weight, bias).view(2, 5, 8, 18))


@only_by_onednn
def test_where_the_operator_does_not_serve_pytorch_decides(by_onednn):
    states, weight, bias = make_inputs()
    with torch.no_grad():
        assert goes_by_onednn(states, weight, bias)
        assert not goes_by_onednn(*make_inputs(dtype=torch.float64))
        assert not goes_by_onednn(*make_inputs(dtype=torch.bfloat16))
        assert not goes_by_onednn(*make_inputs(rows=0))
        assert not goes_by_onednn(torch.randn(40, 12), torch.randn(18, 24)[:, ::2])
        assert not goes_by_onednn(states, torch.randn(24, 18).T, bias)
        assert not goes_by_onednn(states[0], weight, bias)
        assert not goes_by_onednn(*(one.to("meta") for one in (states, weight, bias)))
        assert not goes_by_onednn(states.as_subclass(Sharded), weight, bias)
        with torch.autocast("cpu", torch.bfloat16):
            assert not goes_by_onednn(states, weight, bias)
            assert linear(states, weight, bias).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            assert not goes_by_onednn(states, weight, bias)
    weight.requires_grad_()
    linear(states, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, states.sum(0).expand(18, -1))


@only_by_onednn
@torch.no_grad()
def test_few_rows_are_left_to_pytorch(by_onednn, monkeypatch):
    monkeypatch.setattr(products, "_LEAST_ROWS", 32)
    assert [goes_by_onednn(*make_inputs(rows=rows)) for rows in (31, 32)] == [False, True]


@only_by_onednn
@torch.no_grad()
def test_a_bias_of_any_layout_counts(by_onednn):
    """The operator would read past it."""
    states, weight, bias = make_inputs()
    for unusual in (torch.randn(36)[::2], bias[:1].expand(18), bias[:1], bias.double()[:1].float()[0]):
        torch.testing.assert_close(linear(states, weight, unusual), states @ weight.T + unusual)
    with pytest.raises(RuntimeError, match="size"):
        linear(states, weight, bias[:7])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(states[:, :20], weight, bias)


@torch.no_grad()
def test_what_is_not_a_number_or_infinite_stays(by_onednn):
    states, weight, bias = make_inputs()
    states[3, 5], states[4, 5], weight[:, 5] = float("nan"), float("inf"), 1.0
    output = linear(states, weight, bias)
    assert output[3].isnan().all() and output[4].isposinf().all() and output[5:].isfinite().all()


@only_by_onednn
@torch.no_grad()
def test_forward_derivatives_are_not_lost(by_onednn):
    states, weight, bias = make_inputs()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(states, torch.ones_like(states))
        tangent = torch.autograd.forward_ad.unpack_dual(linear(dual, weight, bias)).tangent
    torch.testing.assert_close(tangent, weight.sum(1).expand(40, -1))


@only_by_onednn
@torch.no_grad()
def test_a_trace_has_a_linear_layer(by_onednn):
    traced = torch.jit.trace(lambda *inputs: linear(*inputs), tuple(make_inputs()))
    assert "aten::linear" in str(traced.graph) and "mkldnn" not in str(traced.graph)


@pytest.mark.parametrize(
    ("capability", "is_by_amd", "expected"),
    [("AVX512", True, True), ("AVX512", False, False), ("AVX2", True, False), ("DEFAULT", True, False)],
)
def test_processors_on_which_it_is_faster(capability, is_by_amd, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "_is_by_amd", lambda: is_by_amd)
    assert products._mkl_leaves_instructions_unused() == expected


@pytest.mark.parametrize(
    ("text", "is_by_amd"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n", True),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", False),
        ("processor\t: 0\nCPU implementer\t: 0x41\n", False),
    ],
)
def test_the_maker_of_the_processor(text, is_by_amd, monkeypatch):
    monkeypatch.setattr(products.Path, "read_text", lambda path: text)
    assert products._is_by_amd() == is_by_amd


@pytest.mark.parametrize(("says", "is_by_amd"), [("AMD64 Family 25, AuthenticAMD", True), ("GenuineIntel", False)])
def test_the_maker_where_there_is_no_such_file(says, is_by_amd, monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(products.Path, "read_text", missing)
    monkeypatch.setattr(products.platform, "processor", lambda: says)
    assert products._is_by_amd() == is_by_amd


@only_by_onednn
@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (products, "_ARGUMENTS", ["X", "W"]),
        (torch.backends.mkldnn, "is_available", lambda: False),
        (torch.backends.mkl, "is_available", lambda: False),
    ],
)
@torch.no_grad()
def test_where_something_is_different_pytorch_decides(by_onednn, where, name, value, monkeypatch):
    assert goes_by_onednn(*make_inputs())
    monkeypatch.setattr(where, name, value)
    products._onednn_linear.cache_clear()
    assert not goes_by_onednn(*make_inputs())
