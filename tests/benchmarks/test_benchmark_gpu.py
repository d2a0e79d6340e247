"""The GPU benchmark: every part runs, here on the CPU; what fails, differs or takes too long is told."""

import json
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import benchmark_gpu
import benchmark_gpu_parts as parts
import benchmark_setup
from benchmark_gpu_parts import PARTS, Contest, Pace, Report, Waits
from benchmark_setup import OURS, THEIRS, Setup


TRY = ["--device", "cpu", "--tiny"]


@pytest.fixture(autouse=True)
def settings_as_before():
    yield
    torch.backends.cudnn.allow_tf32 = True
    benchmark_setup.load_model.cache_clear()


@pytest.fixture
def in_this_process(monkeypatch):
    """Instead of a process for each part, which a test of its own starts; returns the parts and their limits."""
    limits = {}

    def run(name, setup, pace, path, limit):
        limits[name] = limit
        benchmark_gpu.run_part(name, setup, pace, path)

    monkeypatch.setattr(benchmark_gpu, "run_part_in_fresh_process", run)
    return limits


def rows(markdown):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]


# --- the whole script ---


def test_every_part_runs_and_outputs_are_equal(in_this_process, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda model: model)  # minutes on a CPU; tested where the model is
    monkeypatch.chdir(tmp_path)
    assert benchmark_gpu.main([*TRY, "--output", "gpu.md", "--json", "gpu.json"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == Path("gpu.md").read_text(encoding="utf-8").strip()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
    document = json.loads(Path("gpu.json").read_text(encoding="utf-8"))
    assert list(document["parts"]) == list(PARTS) == list(in_this_process)
    contests = {name: [Contest(*line) for line in found["contests"]] for name, found in document["parts"].items()}
    assert [len(lines) for lines in contests.values()] == [0, 0, 4, 4, 2, 6, 4]
    lines = [line for of_part in contests.values() for line in of_part]
    assert len({line.title for line in lines}) == len(lines)
    for line in lines:
        assert line.missing == {}
        assert all(seconds > 0 for times in line.seconds.values() for seconds in times)
        assert set(line.seconds) in ({"grid_sample", OURS.name}, {THEIRS.name, OURS.name})
        assert f"| {line.title} |" in printed
    assert [len(found["checks"]) for found in document["parts"].values()] == [0, 6, 0, 10, 2, 0, 8]
    assert all(check["passed"] for found in document["parts"].values() for check in found["checks"])
    assert all(found["failures"] == [] for found in document["parts"].values())
    if not parts.kernels.IS_INTERPRETED:
        assert "the Triton kernels need a GPU" in printed


def test_a_part_has_a_process_of_its_own(tmp_path, repository, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(repository))
    assert benchmark_gpu.main([*TRY, "--only", "attention"]) == 0
    printed = capsys.readouterr().out
    assert len(rows(printed)) == 2 + 4
    assert "does not take the Triton kernels" in printed


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("sleep 60", "notes", "stopped: its 1 seconds are over"),
        ("echo an illegal memory access; exit 3", "failures", "stopped with status 3: an illegal memory access"),
        ("kill -11 $$", "failures", "stopped with status -11"),
    ],
    ids=["hangs", "fails", "crashes"],
)
def test_what_a_part_finished_is_kept(script, kind, message, tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho \'["notes", "first"]\' > {path}\necho \'["no\' >> {path}\n{script}\n')
    python.chmod(0o755)
    monkeypatch.setattr(benchmark_gpu.sys, "executable", str(python))
    benchmark_gpu.run_part_in_fresh_process("host", Setup("tiny", 64, 96, 1, 0, ""), Pace(), path, limit=1)
    found = Report(path).read()
    assert found["notes"][0] == "first"
    assert found[kind][-1].startswith(message)


def test_a_part_that_fails_leaves_the_others(in_this_process, monkeypatch, capsys):
    def fail(setup, report, pace):
        report.add("notes", "so far")
        raise RuntimeError("no such kernel\nand so on")

    monkeypatch.setitem(PARTS, "attention", PARTS["attention"]._replace(run=fail))
    assert benchmark_gpu.main([*TRY, "--only", "attention,kernels"]) == 1
    captured = capsys.readouterr()
    assert "- **failed:** attention: RuntimeError: no such kernel\n- so far\n" in captured.out
    assert "the Triton kernels need a GPU" in captured.out or parts.kernels.IS_INTERPRETED
    assert "no such kernel" in captured.err


def test_parts_are_skipped_when_the_time_is_over(in_this_process, capsys):
    assert benchmark_gpu.main([*TRY, "--budget", "1"]) == 0
    assert in_this_process == {}
    assert capsys.readouterr().out.count("- skipped: the time is over") == len(PARTS)


def test_time_that_is_not_used_goes_to_later_parts(in_this_process, monkeypatch):
    for name in PARTS:
        monkeypatch.setitem(PARTS, name, PARTS[name]._replace(run=lambda setup, report, pace: None))
    assert benchmark_gpu.main([*TRY, "--budget", "10000"]) == 0
    limits = list(in_this_process.values())
    assert limits[0] == pytest.approx(10000 * 50 / 540, rel=0.01)
    assert limits[-1] == pytest.approx(10000, rel=0.01)  # nothing was used


def test_what_fails_is_a_cell_and_the_other_is_measured():
    def make(name):
        def prepare():
            if name == "transformers":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return lambda: None

        return prepare

    line = parts.contest("x", {name: make(name) for name in ("transformers", "m2f_hf")}, "cpu", Pace(0.0, least=3))
    assert line.missing == {"transformers": "out of memory"}
    assert len(line.seconds["m2f_hf"]) == 3
    cells = benchmark_gpu.contest_cells(line, with_images=True)
    assert cells[:2] == ["x", "out of memory"]
    assert float(cells[2]) >= 0
    assert cells[3:] == ["–"] * 6
    nobody = Contest("x", {}, {}, {"transformers": "out of memory", "m2f_hf": "RuntimeError: no"})
    cells = benchmark_gpu.contest_cells(nobody, with_images=False)
    assert cells == ["x", "out of memory", "RuntimeError: no", "–", "–", "–", "–"]


def test_what_fails_later_is_left_out_too():
    calls = []

    def run():
        calls.append(None)
        if len(calls) > 4:
            raise RuntimeError("too often")

    line = parts.contest("x", {"a": lambda: run, "m2f_hf": lambda: lambda: None}, "cpu", Pace(0.0, least=5))
    assert line.missing == {"a": "RuntimeError: too often"}
    assert {name: len(times) for name, times in line.seconds.items()} == {"m2f_hf": 5}


def test_ratios_rates_and_shares():
    line = Contest(
        "x",
        {"transformers": [0.4, 0.6, 5.0], "m2f_hf": [0.2, 0.3, 0.4]},
        {"transformers": 400 * 2**20, "m2f_hf": 100 * 2**20},
        {},
        images=3,
    )
    cells = benchmark_gpu.contest_cells(line, with_images=True)
    assert cells == ["x", "600", "300", "**2.00×** (2.00–12.50)", "5", "10", "400", "100", "**0.25**"]


def test_a_difference_fails_the_run(in_this_process, monkeypatch, capsys):
    def differ(setup, report, pace):
        report.check(parts.Check("logits", math.nan, 1.0))

    monkeypatch.setitem(PARTS, "host", PARTS["host"]._replace(run=differ))
    assert benchmark_gpu.main([*TRY, "--only", "host"]) == 1
    captured = capsys.readouterr()
    assert "**DIFFERS**" in captured.out
    assert "logits" in captured.err


def test_implementations_take_turns():
    calls = []
    runs = {name: (lambda name=name: lambda: calls.append(name)) for name in ("a", "m2f_hf")}
    line = parts.contest("x", runs, "cpu", Pace(0.0, least=2))
    assert calls == ["a", "a", "m2f_hf", "m2f_hf", *("a", "m2f_hf") * 3]  # each warms up by itself, then all
    assert {name: len(times) for name, times in line.seconds.items()} == {"a": 2, "m2f_hf": 2}


# --- the host ---


def test_waits_are_counted_where_the_model_runs():
    def event(name, start, device=DeviceType.CPU):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=start + 10), device_type=device)

    events = [
        event("measured", 1000, DeviceType.CUDA),
        event("measured", 0),
        event("aten::mm", 1),
        event("cudaLaunchKernel", 2),
        event("cudaMemcpyAsync", 3),
        event("cudaStreamSynchronize", 4),
        event("cudaDeviceSynchronize", 11),  # the profiler's own
        event("Memcpy HtoD (Pageable -> Device)", 1001, DeviceType.CUDA),
        event("Memcpy DtoH (Device -> Pageable)", 1002, DeviceType.CUDA),
    ]
    assert parts.waits_among(events) == Waits(["cudaStreamSynchronize"], ["Memcpy DtoH (Device -> Pageable)"])


def test_what_pytorch_tells_is_counted(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        for message in ("called a synchronizing CUDA operation", "something else") * 2:
            warnings.warn(message, stacklevel=1)

    assert parts.count_warned_waits(run) == 2
    assert modes == ["warn", "default"]


# --- time and memory of a GPU, with a stand-in ---


class StandIn:
    """What is used of `torch.cuda`: a queue whose clock says milliseconds, and an allocator."""

    def __init__(self):
        self.clock, self.allocated, self.peak = 0.0, 100, 900
        stand_in = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = stand_in.clock

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.time - self.time

        self.Event = Event

    def empty_cache(self):
        pass

    def memory_allocated(self):
        return self.allocated

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def max_memory_allocated(self):
        return self.peak

    def run(self):
        self.clock += 250
        self.peak = max(self.peak, self.allocated + 40)


@pytest.mark.parametrize("loop", [1, 4])
def test_time_and_memory_are_those_of_one_run(loop, monkeypatch):
    gpu = StandIn()
    monkeypatch.setattr(torch, "cuda", gpu)
    line = parts.contest("x", {"m2f_hf": lambda: gpu.run}, "cuda", Pace(0.0, least=2), loop=loop)
    assert line == Contest("x", {"m2f_hf": [0.25, 0.25]}, {"m2f_hf": 40}, {})
    assert gpu.clock == 250 * (3 + 3 * loop)


# --- inputs ---


def test_locations_lie_between_positions_and_near_where_they_were():
    value, shapes, locations, weights = parts.awkward_inputs(Setup("tiny", 64, 96, 1, 0, ""))
    moved = parts.between_positions(locations, shapes)
    sides = torch.tensor([shape[::-1] for shape in shapes])[:, None]
    places = moved.double() * sides - 0.5
    fraction = places - places.floor()
    assert 0.04 < fraction.min() < fraction.max() < 0.96
    assert ((moved - locations).abs() * sides).max() <= 0.051
    assert ((places < -1) | (places > sides)).any()
    assert value.shape[1] == sum(height * width for height, width in shapes)
    assert weights.shape == locations.shape[:-1]


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device cpu goes with --tiny"),
        (["--only", "forward,backward", *TRY], "backward unknown; choose from kernels"),
        (["--output", "no/such/folder/gpu.md", *TRY], "folder no/such/folder does not exist"),
        (["--size", "tiny", *TRY], "invalid choice"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark_gpu.parse_arguments(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_try_it(capsys):
    with pytest.raises(SystemExit):
        benchmark_gpu.parse_arguments([])
    assert "finds no GPU; `--device cpu --tiny`" in capsys.readouterr().err
