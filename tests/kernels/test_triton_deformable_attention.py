"""When the Triton form serves, that its kernels compile for GPUs, and, in Triton's interpreter, that they are right."""

import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from attention_inputs import load_copy

import m2f_hf.kernels.triton_deformable_attention as kernels
from m2f_hf.kernels.deformable_attention import multi_scale_deformable_attention
from m2f_hf.kernels.gather_deformable_attention import gather_attention


needs_triton = pytest.mark.skipif(not kernels.IS_AVAILABLE, reason="needs Triton, which is made for Linux only")


def serving(device):
    """The kernels that serve values on a device, which need not be there."""
    value = SimpleNamespace(device=torch.device(device), shape=(1, 43, 2, 32), requires_grad=False)
    return [kernel for kernel in multi_scale_deformable_attention.kernels if kernel.serves(value, None, None, None)]


# Right, by the interpreter


@needs_triton
def test_the_kernels_are_right_in_triton_s_interpreter(repository):
    """In a process of its own: Triton decides when it is imported."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/kernels/triton_interpreter_cases.py",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-2000:]
    assert re.search(r"^[3-9]\d passed", result.stdout, re.M), result.stdout[-2000:]


# Compiled, without a GPU to run them on. The interpreter takes Python that the compiler does not.


def compiled_for_gpu(kernel, dtype, width, capability):
    """What Triton makes of a kernel for 3 levels, 4 points and 8 heads; all but the values is float32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    warps, bytes_of_a_number = (
        (kernels._FORWARD_WARPS, dtype.itemsize)
        if kernel is kernels._forward_kernel
        else (kernels._BACKWARD_WARPS, torch.float32.itemsize)
    )
    value = torch.empty(1, 100, 8, width, dtype=dtype, device="meta")
    locations = torch.empty(1, 100, 8, 3, 4, 2, device="meta")
    _, constants = kernels.launch_options(value, locations, warps, bytes_of_a_number)
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "sizes":
            signature[name] = ("fp32",) * 6
        elif name in ("positions", "queries"):
            signature[name] = "i32"
        else:
            signature[name] = "*" + (names[dtype] if name in ("value", "output", "grad") else "fp32")
            attributes[(index,)] = [["tt.divisibility", 16]]
    positions = {(kernel.arg_names.index(name),): constant for name, constant in constants.items()}
    source = ASTSource(kernel, signature, constexprs=positions, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@needs_triton
@pytest.mark.skipif(kernels.IS_INTERPRETED, reason="what is interpreted is not compiled")
@pytest.mark.parametrize(("dtype", "width", "capability"), [(torch.float32, 32, 90), (torch.bfloat16, 24, 80)], ids=str)
@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
def test_kernels_compile_for_gpus(name, dtype, width, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compiled_for_gpu(getattr(kernels, name), dtype, width, capability)
    code = compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 1000
    assert ".f64" not in code  # a Python float that turned everything into double precision
    assert not re.search(r"\b(add|mul|fma)\S*bf16", code)  # sums are kept in float32
    corners = 3 * 4  # of the levels; points are a loop
    read = ".v4.b32" if dtype == torch.float32 or name == "_forward_kernel" else ".v2.b32"
    assert (
        len(re.findall(rf"ld\.global\S*{re.escape(read)}", code)) >= corners
    )  # a row is read in as few parts as can be


# When it serves


@pytest.mark.parametrize("works", [True, False])
def test_gpus_get_the_triton_form_where_it_works(works, monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "works_on_gpu", lambda index: asked.append(index) or works)
    assert serving("cuda:1") == [kernels.triton_attention] * works
    assert asked == [1]


def test_cpus_never_get_it_by_themselves(monkeypatch):
    monkeypatch.setattr(kernels, "works_on_gpu", lambda index: True)
    assert serving("cpu") == [gather_attention]


# Without Triton, or where it fails


def test_without_triton_the_file_loads_and_serves_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    copy = load_copy(kernels.__file__)
    assert not copy.IS_AVAILABLE
    assert not copy.works_on_gpu(0)
    assert not copy.runs_on(torch.device("cuda"))


def test_a_gpu_on_which_triton_fails_is_tried_once_and_warned_of(monkeypatch):
    copy = load_copy(kernels.__file__)
    monkeypatch.setattr(copy, "IS_AVAILABLE", True)
    tried = []

    def launch(index):
        tried.append(index)
        if index == 1:
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(copy, "_launch_trial", launch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copy.works_on_gpu(0)
    with pytest.warns(UserWarning, match=r"GPU 1 takes PyTorch's `grid_sample`.*Failed to find C compiler"):
        assert not copy.works_on_gpu(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [copy.works_on_gpu(index) for index in (0, 1, 0)] == [True, False, True]
    assert tried == [0, 1]


def test_the_compiler_does_not_trace_the_trial(monkeypatch):
    copy = load_copy(kernels.__file__)
    monkeypatch.setattr(copy, "IS_AVAILABLE", True)
    monkeypatch.setattr(copy, "_launch_trial", lambda index: torch.zeros(3).numpy().tolist())
    compiled = torch.compile(lambda x: x + 1 if copy.works_on_gpu(0) else x - 1, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(torch.zeros(2)), torch.ones(2))
