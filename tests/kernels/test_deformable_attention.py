"""The operator: against the original's recording and `transformers`' function, form against form, and at its edges."""

from pathlib import Path

import numpy as np
import pytest
import torch
from attention_inputs import SHAPES, by_definition, call, load_copy, make_inputs
from operations import Operations
from transformers.models.mask2former import modeling_mask2former as stock

import m2f_hf.kernels.gather_deformable_attention as gathering
from m2f_hf.kernels import chunks as chunking
from m2f_hf.kernels.deformable_attention import grid_sample_deformable_attention, multi_scale_deformable_attention


GATHER = torch.ops.m2f_hf.gather_deformable_attention


def with_gradients(function, inputs, shapes=SHAPES):
    output = call(function, inputs, shapes)
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output, *torch.autograd.grad(output, inputs, direction)


# Oracles


@pytest.mark.parametrize("function", [multi_scale_deformable_attention, grid_sample_deformable_attention])
def test_the_recording_of_the_original(function, goldens):
    with np.load(goldens / "extra" / "modules.npz") as arrays:
        value, shapes, locations, weights, expected = (
            torch.from_numpy(arrays[f"msda_{name}"]) for name in ("value", "shapes", "loc", "weights", "out")
        )
    output = function(value, [tuple(shape) for shape in shapes.tolist()], locations, weights)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("width", [4, 16])
def test_the_definition(width):
    inputs = [tensor.detach() for tensor in make_inputs(width, queries=3, points=2, dtype=torch.float64)]
    expected = call(by_definition, inputs)
    torch.testing.assert_close(call(multi_scale_deformable_attention, inputs), expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("width", [8, 32])
def test_the_function_of_transformers(width):
    inputs = make_inputs(width)
    value, locations, weights = inputs
    expected = stock.multi_scale_deformable_attention(value, SHAPES, locations, weights)
    torch.testing.assert_close(call(multi_scale_deformable_attention, inputs), expected, atol=1e-6, rtol=1e-5)


def test_a_single_point_in_a_pixel_s_middle_reads_that_pixel():
    height, width = 4, 3
    value = torch.randn(1, height * width, 1, 16)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = torch.stack([(x + 0.5) / width, (y + 0.5) / height], dim=-1).view(1, -1, 1, 1, 1, 2)
    output = multi_scale_deformable_attention(value, [(height, width)], centres, torch.ones(1, 12, 1, 1, 1))
    torch.testing.assert_close(output, value[:, :, 0], atol=1e-5, rtol=1e-5)


# Two forms


@pytest.mark.parametrize("width", [16, 24, 32, 33])
def test_both_forms_agree_in_double_precision(width):
    inputs = make_inputs(width, dtype=torch.float64)
    for ours, reference in zip(
        with_gradients(multi_scale_deformable_attention, inputs),
        with_gradients(grid_sample_deformable_attention, inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference, atol=1e-10, rtol=1e-8)


def test_both_forms_agree_in_single_precision():
    inputs = make_inputs(32, shapes=[(40, 61), (20, 31)], queries=50)
    shapes = [(40, 61), (20, 31)]
    for ours, reference in zip(
        with_gradients(multi_scale_deformable_attention, inputs, shapes),
        with_gradients(grid_sample_deformable_attention, inputs, shapes),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference, atol=2e-4, rtol=1e-4)


def test_gradients_are_those_of_finite_differences():
    inputs = make_inputs(32, batch=1, queries=2, heads=1, points=2, shapes=[(3, 2), (1, 1)], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *tensors: call(multi_scale_deformable_attention, tensors, [(3, 2), (1, 1)]), inputs
    )


@pytest.mark.parametrize("numbers", [1, 96 * 4, 96 * 4 + 1], ids=["one query", "four queries", "not a divisor"])
def test_pieces_change_nothing(numbers, monkeypatch):
    inputs = make_inputs(32)
    expected = with_gradients(multi_scale_deformable_attention, inputs)
    monkeypatch.setattr(chunking, "_NUMBERS_PER_CHUNK", numbers)
    monkeypatch.setattr(chunking, "_TIMES_LARGER_FOR_SEVERAL_THREADS", 1)
    for ours, reference in zip(with_gradients(multi_scale_deformable_attention, inputs), expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("width", "side", "has_gradients", "gathers"),
    [
        (16, 1, True, True),
        (8, 4, False, True),
        (8, 31, True, False),
        (8, 32, True, True),
    ],
    ids=["wide", "without gradients", "too small for gradients", "large enough for gradients"],
)
def test_narrow_heads_over_small_maps_take_grid_sample_in_training(width, side, has_gradients, gathers):
    inputs = make_inputs(width, shapes=[(side, side)])
    with Operations() as operations, torch.set_grad_enabled(has_gradients):
        call(multi_scale_deformable_attention, inputs, shapes=[(side, side)])
    assert (GATHER in operations.names) == gathers
    assert (torch.ops.aten.grid_sampler_2d in operations.names) != gathers


def test_other_devices_take_grid_sample():
    inputs = [tensor.detach().to("meta") for tensor in make_inputs(32)]
    with Operations() as operations:
        output = call(multi_scale_deformable_attention, inputs)
    assert output.shape == (2, 9, 64)
    assert GATHER not in operations.names


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [2, 32], ids=["grid_sample", "gather"])
def test_low_precision_values_lose_nothing_but_their_own_digits(width, dtype):
    shapes = [(50, 70), (25, 35)]
    value, locations, weights = (tensor.detach() for tensor in make_inputs(width, shapes=shapes, queries=40))
    value = value.to(dtype)
    output = multi_scale_deformable_attention(value, shapes, locations, weights)
    assert output.dtype == dtype
    exact = grid_sample_deformable_attention(value.double(), shapes, locations.double(), weights.double())
    torch.testing.assert_close(output.double(), exact, atol=1e-3, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("width", [8, 32], ids=["grid_sample", "gather"])
def test_everything_in_bfloat16(width):
    inputs = make_inputs(width, dtype=torch.bfloat16)
    output, *gradients = with_gradients(multi_scale_deformable_attention, inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected, *expected_gradients = with_gradients(grid_sample_deformable_attention, exact)
    assert {tensor.dtype for tensor in (output, *gradients)} == {torch.bfloat16}
    torch.testing.assert_close(output.double(), expected, atol=1e-2, rtol=1e-2)
    for ours, reference in zip(gradients, expected_gradients, strict=True):
        bound = 0.02 * reference.abs().max().item()
        torch.testing.assert_close(ours.double(), reference, atol=bound, rtol=0.02)


# Edges


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("width", [8, 32], ids=["grid_sample", "gather"])
def test_a_wild_location_touches_its_own_query_only(width, bad):
    inputs = make_inputs(width)
    expected = call(multi_scale_deformable_attention, inputs).detach()
    value, locations, weights = inputs
    with torch.no_grad():
        locations[0, 3, 1, 2, 0, 0] = bad
    output = multi_scale_deformable_attention(value, SHAPES, locations, weights)
    touched = torch.zeros_like(expected, dtype=torch.bool)
    touched[0, 3, width:] = True
    torch.testing.assert_close(output[~touched], expected[~touched], atol=0, rtol=0)
    output.sum().backward()  # no stray write either
    assert value.grad.shape == value.shape


def test_a_location_that_is_no_number_gives_no_number():
    # Only a hidden fault could turn it into one: it must not.
    value, locations, weights = (tensor.detach() for tensor in make_inputs(32))
    locations[0, 3, 1, 2, 0] = float("nan")
    output = multi_scale_deformable_attention(value, SHAPES, locations, weights)
    assert output[0, 3, 32:].isnan().all()
    assert output.isnan().sum() == 32


@pytest.mark.parametrize("width", [8, 32], ids=["grid_sample", "gather"])
def test_far_outside_everything_is_zero(width):
    value, locations, weights = make_inputs(width)
    with torch.no_grad():
        locations += torch.where(locations > 0.5, 5.0, -5.0)
    output, value_grad, location_grad, weight_grad = with_gradients(
        multi_scale_deformable_attention, (value, locations, weights)
    )
    for tensor in (output, value_grad, location_grad, weight_grad):
        assert not tensor.any()


def test_values_need_not_be_contiguous():
    inputs = make_inputs(32)
    expected = call(multi_scale_deformable_attention, inputs)
    strided = [tensor.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for tensor in inputs]
    assert not strided[0].is_contiguous()
    results = with_gradients(multi_scale_deformable_attention, strided)
    torch.testing.assert_close(results[0], expected, atol=0, rtol=0)
    for ours, reference in zip(results[1:], with_gradients(multi_scale_deformable_attention, inputs)[1:], strict=True):
        torch.testing.assert_close(ours, reference, atol=0, rtol=0)


@pytest.mark.parametrize("width", [8, 32], ids=["grid_sample", "gather"])
def test_wrong_level_sizes_are_refused(width):
    inputs = make_inputs(width)
    with pytest.raises(ValueError, match=r"\[\(7, 5\), \(1, 4\)\] have 39 positions together, but `value` has 43"):
        call(multi_scale_deformable_attention, inputs, SHAPES[:2])


def test_too_few_locations_for_the_levels_are_refused():
    value, locations, weights = make_inputs(32)
    with pytest.raises((ValueError, RuntimeError)):
        multi_scale_deformable_attention(value, SHAPES, locations[:, :, :, :3], weights[:, :, :, :3])


# The compiler's view


def test_the_custom_operators_keep_their_promises():
    value, locations, weights = make_inputs(32, queries=4, points=2)
    sizes = [side for shape in SHAPES for side in shape]
    torch.library.opcheck(GATHER.default, (value, sizes, locations, weights))
    grad = torch.randn(2, 4, 64)
    arguments = grad, value.detach(), sizes, locations.detach(), weights.detach()
    torch.library.opcheck(torch.ops.m2f_hf.gather_deformable_attention_backward.default, arguments)


class Attention(torch.nn.Module):
    def forward(self, value, locations, weights):
        return multi_scale_deformable_attention(value, SHAPES, locations, weights) * 2


@pytest.mark.parametrize("width", [8, 32], ids=["grid_sample", "gather"])
def test_compiled_without_a_break(width):
    inputs = make_inputs(width)
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(Attention()(*inputs).sin().sum(), inputs)
    for ours, reference in zip(torch.autograd.grad(compiled(*inputs).sin().sum(), inputs), expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(compiled(*inputs), Attention()(*inputs), atol=1e-6, rtol=1e-5)


def test_exported_it_is_plain_operators():
    inputs = tuple(tensor.detach() for tensor in make_inputs(32))
    queries = torch.export.Dim("queries", min=2, max=100)
    program = torch.export.export(Attention(), inputs, dynamic_shapes=({}, {1: queries}, {1: queries}))
    assert not any("m2f_hf" in str(node.target) for node in program.graph.nodes)
    more = tuple(tensor.detach() for tensor in make_inputs(32, queries=13, seed=1))
    torch.testing.assert_close(program.module()(*more), Attention()(*more), atol=1e-5, rtol=1e-5)


# Copies of the file, as they travel with checkpoints


def gathered(module):
    """The operator of a copy of its file, called as the public function."""
    return lambda value, shapes, *rest: module.gather_deformable_attention(
        value, [side for shape in shapes for side in shape], *rest
    )


def test_a_copy_of_other_code_leaves_the_package_its_own_operator(tmp_path):
    code = Path(gathering.__file__).read_text(encoding="utf-8")
    changed = code.replace("    return output\n\n\n@torch", "    return output * 3\n\n\n@torch")
    assert changed != code
    path = tmp_path / "copied.py"
    path.write_text(changed, encoding="utf-8")
    inputs = make_inputs(32)
    expected = with_gradients(grid_sample_deformable_attention, inputs)
    before = torch.compile(Attention(), fullgraph=True, backend="aot_eager")
    kept = before(*inputs)
    copy = load_copy(path)
    torch.testing.assert_close(call(gathered(copy), inputs), 3 * expected[0])
    for ours, reference in zip(with_gradients(multi_scale_deformable_attention, inputs), expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
    assert torch.equal(before(*inputs), kept)


def test_one_file_loaded_twice_works_under_both_modules():
    inputs = make_inputs(32)
    expected = with_gradients(grid_sample_deformable_attention, inputs)
    copies = [load_copy(gathering.__file__) for _ in range(2)]
    for module in (*copies, gathering):
        for ours, reference in zip(with_gradients(gathered(module), inputs), expected, strict=True):
            torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
        compiled = torch.compile(gathered(module), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(call(compiled, inputs), expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_scipy", [True, False])
def test_samples_in_the_order_of_rows(with_scipy, monkeypatch):
    if not with_scipy:
        monkeypatch.setattr(gathering, "csr_array", None)
    top = torch.randint(0, 9, (50, 3), dtype=torch.int32)
    top[top == 4] = 5  # a row that nobody names
    order, queries, starts = gathering.in_order_of_rows(top, 9)
    assert sorted(order.tolist()) == list(range(150))
    assert torch.equal(queries.long(), order.long() // 3)
    for row in range(9):
        of_row = order[starts[row] : starts[row + 1]].long()
        assert torch.equal(of_row.sort().values, (top.flatten() == row).nonzero()[:, 0])
    assert starts[9] == 150
