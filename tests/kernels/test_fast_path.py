"""The decorator that runs a kernel in place of a layer: when it does, and when the plain layer runs."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from m2f_hf.kernels import fast_path as module
from m2f_hf.kernels.fast_path import Kernel, fast_path


class Sharded(torch.Tensor):
    """Stands for a tensor with arithmetic of its own."""


CALLS = []


def make_kernel(name, compiles=False):
    def forward(layer, states):
        CALLS.append(name)
        return states @ layer.linear.weight.T + layer.linear.bias

    return Kernel(lambda layer, states: len(states) >= layer.least[name], forward, compiles)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.least = {"first": 3, "second": 2}

    @fast_path(make_kernel("first"), make_kernel("second"))
    def forward(self, states):
        """Plain text."""
        CALLS.append("plain")
        return self.linear(states)


@pytest.fixture(autouse=True)
def no_calls():
    CALLS.clear()


def ran(layer, states):
    """What was called, once the result is known to be right."""
    CALLS.clear()
    torch.testing.assert_close(layer(states), layer.linear(states))
    return CALLS


def test_the_first_kernel_that_serves_runs_else_the_plain_layer():
    layer = Layer()
    assert [ran(layer, torch.randn(rows, 4))[0] for rows in (3, 2, 1)] == ["first", "second", "plain"]
    assert Layer.forward.__doc__ == "Plain text."
    Layer.forward.__wrapped__(layer, torch.randn(3, 4))
    assert CALLS[-1] == "plain"


class Doubled(nn.Linear):
    def forward(self, states):
        return 2 * super().forward(states)


def replaced_on_instance(linear):
    linear.forward = lambda states, forward=linear.forward: 2 * forward(states)


def sharded(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Sharded))


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: setattr(linear, "__class__", Doubled),
        lambda linear: linear.register_forward_hook(lambda _, inputs, output: 2 * output),
        lambda linear: linear.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],)),
        lambda linear: linear.register_full_backward_hook(lambda *_: None),
        lambda linear: linear.compile(backend="eager"),
        replaced_on_instance,
        sharded,
    ],
    ids=["class", "hook", "hook before", "hook on gradients", "compiled", "forward", "weights"],
)
def test_a_layer_whose_part_was_changed_is_plain(change):
    layer = Layer()
    change(layer.linear)
    assert ran(layer, torch.randn(3, 4)) == ["plain"]


def test_hooks_on_the_layer_itself_run_around_the_kernel():
    layer, seen = Layer(), []
    layer.register_forward_hook(lambda *_: seen.append("hook"))
    layer(torch.randn(3, 4))
    assert CALLS == ["first"] and seen == ["hook"]
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    layer(torch.randn(3, 4))
    handle.remove()
    assert CALLS[1:] == ["plain"] and seen[1:] == [nn.Linear, Layer, "hook"]


def test_other_kinds_of_tensors_take_the_plain_layer():
    assert ran(Layer(), torch.randn(3, 4).as_subclass(Sharded)) == ["plain"]


def test_exports_and_traces_see_the_plain_layer():
    layer, states = Layer(), torch.randn(3, 4)
    program = torch.export.export(layer, (states,))
    assert CALLS == ["plain"] and "aten.linear" in str(program.graph)
    torch.jit.trace(layer, (states,), check_trace=False)
    assert CALLS == ["plain", "plain"]


def test_a_compiler_sees_the_plain_layer_unless_the_kernel_is_an_operator():
    for compiles, name in ((False, "linear"), (True, "matmul")):

        class Compiled(Layer):
            @fast_path(Kernel(lambda *_: True, lambda self, states: states @ self.linear.weight.T + 1, compiles))
            def forward(self, states):
                return self.linear(states)

        graphs = []

        def backend(graph, inputs, graphs=graphs):
            graphs.append(str(graph.graph))
            return graph.forward

        torch.compile(Compiled(), backend=backend, fullgraph=True)(torch.randn(3, 4))
        assert len(graphs) == 1 and name in graphs[0]


def test_a_plain_function_takes_kernels_too():
    @fast_path(Kernel(lambda states, factor: factor == 2, lambda states, factor: states + states))
    def scale(states, factor):
        CALLS.append("plain")
        return factor * states

    states = torch.ones(3)
    assert [scale(states, factor=factor)[0].item() for factor in (2, 3)] == [2, 3]
    assert CALLS == ["plain"]


def test_one_switch_turns_all_kernels_off(monkeypatch):
    monkeypatch.setattr(module, "_CHOICE", "plain")
    assert ran(Layer(), torch.randn(3, 4)) == ["plain"]


@pytest.mark.parametrize(
    ("value", "says"),
    [("plain", "'plain'"), ("", "'auto'"), ("fast", "M2F_HF_KERNELS='fast' must be one of auto, plain")],
)
def test_the_switch_is_read_from_the_environment(value, says):
    command = [sys.executable, "-c", "from m2f_hf.kernels import fast_path; print(repr(fast_path._CHOICE))"]
    result = subprocess.run(
        command, env={**os.environ, module._VARIABLE: value}, capture_output=True, text=True, check=False
    )
    assert says in result.stdout + result.stderr


def test_a_copy_of_a_layer_has_its_kernels():
    assert ran(copy.deepcopy(Layer()), torch.randn(3, 4)) == ["first"]
