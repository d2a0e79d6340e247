"""The Triton kernels computed by Triton's interpreter, without a GPU.

Not collected by itself: `test_triton_deformable_attention.py` runs it in a process of its own, since Triton decides on
being imported whether it interprets. By hand: `TRITON_INTERPRET=1 pytest tests/kernels/triton_interpreter_cases.py`.
The interpreter takes some 10 ms for each program and sample, so there are few of them.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from attention_inputs import by_definition, call, load_copy, make_inputs
from operations import Operations
from tiny import images, labels, tiny_model

import m2f_hf.kernels.triton_deformable_attention as kernels
from m2f_hf.kernels import fast_path
from m2f_hf.kernels.deformable_attention import grid_sample_deformable_attention, multi_scale_deformable_attention


SHAPES = [(3, 5), (1, 1)]
SIZES = [3, 5, 1, 1]
TRITON = torch.ops.m2f_hf.triton_deformable_attention


@pytest.fixture(autouse=True)
def triton_is_asked_for(monkeypatch):
    assert kernels.IS_INTERPRETED
    monkeypatch.setattr(kernels, "works_on", kernels.runs_on)


@pytest.fixture
def large_blocks(monkeypatch):
    """Few programs."""
    monkeypatch.setattr(kernels, "_FORWARD_WARPS", 64)
    monkeypatch.setattr(kernels, "_BACKWARD_WARPS", 64)


def small_inputs(width, **options):
    """One image, two heads, three queries, two levels, one point."""
    return make_inputs(width, **{"batch": 1, "queries": 3, "points": 1, "shapes": SHAPES, **options})


def with_gradients(function, inputs, shapes=SHAPES):
    output = call(function, inputs, shapes)
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output, *torch.autograd.grad(output, inputs, direction)


def assert_like_the_reference(inputs, shapes=SHAPES, **tolerance):
    expected = with_gradients(grid_sample_deformable_attention, inputs, shapes)
    for ours, reference in zip(with_gradients(multi_scale_deformable_attention, inputs, shapes), expected, strict=True):
        torch.testing.assert_close(ours, reference, **tolerance)


# Oracles


def test_the_recording_of_the_original(goldens, large_blocks):
    with np.load(goldens / "extra" / "modules.npz") as arrays:
        value, shapes, locations, weights, expected = (
            torch.from_numpy(arrays[f"msda_{name}"]) for name in ("value", "shapes", "loc", "weights", "out")
        )
    output = multi_scale_deformable_attention(value, [tuple(shape) for shape in shapes.tolist()], locations, weights)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


def test_the_definition():
    inputs = [tensor.detach() for tensor in small_inputs(4, batch=2, points=2, dtype=torch.float64)]
    expected = by_definition(inputs[0], SHAPES, *inputs[1:])
    torch.testing.assert_close(call(multi_scale_deformable_attention, inputs, SHAPES), expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("width", [1, 6, 33])
def test_the_reference_in_double_precision(width):
    assert_like_the_reference(small_inputs(width, batch=2, dtype=torch.float64), atol=1e-12, rtol=1e-9)


def test_the_reference_in_single_precision():
    assert_like_the_reference(small_inputs(24), atol=1e-5, rtol=1e-4)


def test_the_reference_on_larger_maps(large_blocks):
    shapes = [(40, 61), (1, 31), (20, 1)]
    assert_like_the_reference(make_inputs(32, shapes=shapes, queries=50), shapes, atol=2e-4, rtol=1e-4)


def test_gradients_are_those_of_finite_differences():
    inputs = small_inputs(2, batch=1, queries=2, heads=1, shapes=[(2, 2)], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: call(multi_scale_deformable_attention, tensors, [(2, 2)]), inputs)


def test_a_model_s_outputs_and_gradients(large_blocks, monkeypatch):
    """With all kernels as with the plain layers."""
    results = []
    for choice in ("auto", "plain"):
        monkeypatch.setattr(fast_path, "_CHOICE", choice)
        model = tiny_model(encoder_layers=1).train()
        torch.manual_seed(0)
        with Operations() as operations:
            outputs = model(images(1), **labels((2,)))
            outputs.loss.backward()
        assert (TRITON in operations.names) == (choice == "auto")
        gradients = [parameter.grad for parameter in model.model.pixel_level_module.decoder.parameters()]
        results.append([outputs.loss, outputs.masks_queries_logits, *gradients])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("is_right", [True, False])
def test_the_checks_of_the_gpu_benchmark(is_right, large_blocks, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import gpu_parts as parts

    monkeypatch.setattr(parts, "DTYPES", {"bf16": torch.bfloat16} if is_right else {"fp32": torch.float32})
    if not is_right:
        right = kernels.triton_deformable_attention
        wrong = lambda value, sizes, locations, weights: right(value * 1.01, sizes, locations, weights)
        monkeypatch.setattr(kernels, "triton_deformable_attention", wrong)
    report = parts.Report(tmp_path / "report")
    parts.check_kernels(parts.Setup("tiny", 32, 32, 1, 0, ""), report, parts.Pace())
    found = report.read()
    assert found["failures"] == found["notes"] == []
    assert len(found["checks"]) == 2 * 4
    assert {check["passed"] for check in found["checks"]} == {is_right}


# Sizes


@pytest.mark.parametrize("queries", ["one", "one block", "one more than a block"])
def test_any_number_of_queries(queries, monkeypatch):
    monkeypatch.setattr(kernels, "_FORWARD_WARPS", 1)
    inputs = small_inputs(64, queries=1)
    block = kernels.launch_options(inputs[0], inputs[1], kernels._FORWARD_WARPS, 4)[1]["BLOCK_QUERIES"]
    number = {"one": 1, "one block": block, "one more than a block": block + 1}[queries]
    assert_like_the_reference(small_inputs(64, queries=number), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("batch", "queries"), [(2, 0), (0, 3)], ids=["no queries", "no images"])
def test_nothing_to_compute(batch, queries):
    inputs = [tensor.detach().requires_grad_() for tensor in small_inputs(8, batch=2)]
    value, locations, weights = inputs
    empty = value[:batch], locations[:batch, :queries], weights[:batch, :queries]
    output = multi_scale_deformable_attention(empty[0], SHAPES, *empty[1:])
    assert output.shape == (batch, queries, 16)
    output.sum().backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in inputs)


def test_wide_indices_give_the_same(monkeypatch):
    """Those of maps with more numbers than the narrow ones count."""
    inputs = small_inputs(8)
    expected = with_gradients(multi_scale_deformable_attention, inputs)
    narrow = kernels.launch_options

    def wide(*arguments):
        programs, constants = narrow(*arguments)
        assert constants["INDEX"] == tl.int32
        return programs, {**constants, "INDEX": tl.int64}

    monkeypatch.setattr(kernels, "launch_options", wide)
    for ours, reference in zip(with_gradients(multi_scale_deformable_attention, inputs), expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=0, rtol=0)


def test_index_width_follows_the_numbers_in_an_image():
    locations = torch.empty(1, 5, 8, 1, 4, 2, device="meta")
    for positions, index in ((2**23 - 1, tl.int32), (2**23, tl.int64)):
        value = torch.empty(1, positions, 8, 32, device="meta")
        assert kernels.launch_options(value, locations, 4, 4)[1]["INDEX"] == index


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_values_lose_nothing_but_their_own_digits(dtype, large_blocks):
    shapes = [(50, 70), (25, 35)]
    inputs = make_inputs(16, batch=1, heads=1, shapes=shapes, queries=40)
    value, locations, weights = (tensor.detach() for tensor in inputs)
    value = value.to(dtype)
    output = multi_scale_deformable_attention(value, shapes, locations, weights)
    assert output.dtype == dtype
    exact = grid_sample_deformable_attention(value.double(), shapes, locations.double(), weights.double())
    torch.testing.assert_close(output.double(), exact, atol=1e-3, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_in_low_precision(dtype):
    # Another seed has locations on the edge of a map, to bfloat16's digits, where there is no one gradient.
    inputs = small_inputs(8, dtype=dtype, seed=1)
    output, *gradients = with_gradients(multi_scale_deformable_attention, inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    direction = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output).double()
    expected = call(grid_sample_deformable_attention, exact, SHAPES)
    expected_gradients = torch.autograd.grad(expected, exact, direction)
    assert {tensor.dtype for tensor in (output, *gradients)} == {dtype}
    eps = torch.finfo(dtype).eps
    for ours, reference in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        # One rounding, of the result; sums are kept in single precision.
        torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=eps)


# Memory and wild numbers


def guarded(tensor):
    """The same in the middle of numbers that are none."""
    around = torch.full((3, *tensor.shape), float("nan"), dtype=tensor.dtype)
    around[1] = tensor.detach()
    return around


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30], ids=str)
def test_wild_locations_touch_nothing_but_their_own_query(bad, monkeypatch):
    value, locations, weights = (tensor.detach() for tensor in small_inputs(6, batch=2))
    expected = with_gradients(
        multi_scale_deformable_attention, [x.clone().requires_grad_() for x in (value, locations, weights)]
    )
    locations[0, 1, 1, 0, 0, 0] = bad
    locations[1, 2, 0, :, 0, 1] = bad
    written = []

    def guarded_memory(like, **options):
        written.append(guarded(torch.zeros(like.shape)))
        return written[-1][1]

    monkeypatch.setattr(kernels.torch, "zeros_like", guarded_memory)
    monkeypatch.setattr(kernels, "empty_gradients", lambda *inputs: tuple(map(guarded_memory, inputs)))
    inputs = [guarded(tensor)[1].requires_grad_() for tensor in (value, locations, weights)]
    output, value_grad, location_grad, weight_grad = with_gradients(multi_scale_deformable_attention, inputs)
    assert len(written) == 3
    for around in written:
        assert around[0].isnan().all() and around[2].isnan().all()
    touched = torch.zeros(2, 3, 2, dtype=torch.bool)  # images, queries, heads
    touched[0, 1, 1] = touched[1, 2, 0] = True
    assert value_grad.isfinite().all()
    for ours, reference in ((output.view(2, 3, 2, 6), expected[0].view(2, 3, 2, 6)), (location_grad, expected[2])):
        torch.testing.assert_close(ours[~touched], reference[~touched], atol=0, rtol=0)
        assert bad != bad or ours.isfinite().all()
    torch.testing.assert_close(weight_grad[~touched], expected[3][~touched], atol=0, rtol=0)


def test_a_location_that_is_no_number_gives_no_number():
    # Only a hidden fault could turn it into one: it must not.
    for place in (0, 1):
        value, locations, weights = (tensor.detach() for tensor in small_inputs(8))
        locations[0, 2, 1, 0, 0, place] = float("nan")
        locations[0, 2, 1, 0, 0, 1 - place] = 7.0
        output = multi_scale_deformable_attention(value, SHAPES, locations, weights)
        assert output[0, 2, 8:].isnan().all()
        assert output.isnan().sum() == 8


def test_far_outside_everything_is_zero():
    inputs = small_inputs(8)
    with torch.no_grad():
        inputs[1] += torch.where(inputs[1] > 0.5, 5.0, -5.0)
    for tensor in with_gradients(multi_scale_deformable_attention, inputs):
        assert not tensor.any()


def test_inputs_need_not_be_contiguous():
    inputs = small_inputs(8)
    expected = with_gradients(multi_scale_deformable_attention, inputs)
    strided = [tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in inputs]
    assert not strided[0].is_contiguous()
    for ours, reference in zip(with_gradients(multi_scale_deformable_attention, strided), expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=0, rtol=0)


@pytest.mark.parametrize("change", ["levels", "weights", "batch", "heads", "sizes"])
def test_shapes_that_do_not_agree_are_refused(change):
    """Else the kernels would read memory that is not theirs."""
    value, locations, weights = (tensor.detach() for tensor in small_inputs(8))
    sizes = list(SIZES)
    if change == "levels":
        locations, weights = locations[:, :, :, :1], weights[:, :, :, :1]
    elif change == "weights":
        weights = weights[:, :2]
    elif change == "batch":
        value = value.repeat(2, 1, 1, 1)
    elif change == "heads":
        value = value[:, :, :1]
    else:
        sizes[0] += 1
    with pytest.raises(ValueError, match=r"want `sampling_locations`|but `value` has 16"):
        TRITON(value, sizes, locations, weights)
    with pytest.raises(ValueError, match=r"want `sampling_locations`|but `value` has 16"):
        torch.ops.m2f_hf.triton_deformable_attention_backward(torch.ones(1, 3, 16), value, sizes, locations, weights)


# What torch is promised


def test_the_custom_operators_keep_their_promises():
    sizes = [2, 2]
    inputs = small_inputs(2, heads=2, queries=1, shapes=[(2, 2)])
    value, locations, weights = (tensor.detach().transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs)
    assert not value.is_contiguous()
    arguments = torch.randn(1, 1, 4), value.clone(), sizes, locations.clone(), weights.clone()
    torch.library.opcheck(torch.ops.m2f_hf.triton_deformable_attention_backward.default, arguments)
    value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_()
    torch.library.opcheck(TRITON.default, (value, sizes, locations, weights))


def test_compiled_without_a_break():
    def attention(*inputs):
        return call(multi_scale_deformable_attention, inputs, SHAPES) * 2

    inputs = small_inputs(8)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(attention(*inputs).sin().sum(), inputs)
    gradients = torch.autograd.grad(compiled(*inputs).sin().sum(), inputs)
    for ours, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-5)


def test_other_sizes_do_not_compile_again_and_again():
    def attention(value, locations, weights, height: int):
        return multi_scale_deformable_attention(value, [(height, 3)], locations, weights)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    for height in (2, 3, 4, 5):
        inputs = [tensor.detach() for tensor in small_inputs(4, queries=2, points=1, shapes=[(height, 3)])]
        torch.testing.assert_close(compiled(*inputs, height), attention(*inputs, height))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_where_the_order_of_additions_must_not_matter_the_backward_pass_says_so():
    inputs = small_inputs(4, queries=1)
    output = call(multi_scale_deformable_attention, inputs, SHAPES)
    try:
        torch.use_deterministic_algorithms(True)
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            output.sum().backward(retain_graph=True)
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="does not have a deterministic implementation"):
            output.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_one_file_loaded_twice_works_under_both_modules():
    inputs = small_inputs(4, queries=1)
    expected = with_gradients(grid_sample_deformable_attention, inputs)
    copies = [load_copy(kernels.__file__) for _ in range(2)]
    for module in (*copies, kernels):
        results = with_gradients(
            lambda value, shapes, *rest, form=module.triton_deformable_attention: form(value, SIZES, *rest), inputs
        )
        for ours, reference in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
