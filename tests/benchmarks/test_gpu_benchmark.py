"""The GPU benchmark: every part runs, here on the CPU; what fails, differs or takes too long is reported."""

import json
import math
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cases
import gpu
import gpu_parts as parts
from cases import OURS, THEIRS, Setup
from gpu_parts import PARTS, Pace, Report
from measuring import Memory
from report import read_line


TRY = ["--device", "cpu", "--tiny"]


@pytest.fixture(autouse=True)
def settings_as_before():
    yield
    torch.backends.cudnn.allow_tf32 = True
    cases.load_model.cache_clear()


@pytest.fixture
def in_this_process(monkeypatch):
    """Instead of a process for each part, which a test of its own starts; returns the parts and their limits."""
    limits = {}

    def run(name, setup, pace, path, limit):
        limits[name] = limit
        gpu.run_part(name, setup, pace, path)

    monkeypatch.setattr(gpu, "run_part_in_fresh_process", run)
    return limits


# --- the whole script ---


def test_every_part_runs_and_outputs_are_equal(in_this_process, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda model: model)  # minutes on a CPU; tested where the model is
    monkeypatch.chdir(tmp_path)
    assert gpu.main([*TRY, "--output", "gpu.md", "--json", "gpu.json"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == Path("gpu.md").read_text(encoding="utf-8").strip()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]
    found = json.loads(Path("gpu.json").read_text(encoding="utf-8"))["parts"]
    assert list(found) == list(PARTS) == list(in_this_process)
    assert [len(part["lines"]) for part in found.values()] == [0, 0, 4, 4, 2, 6, 4]
    lines = [read_line(fields) for part in found.values() for fields in part["lines"]]
    assert len({line.title for line in lines}) == len(lines)
    for line in lines:
        assert line.missing == {}
        assert all(seconds > 0 for times in line.seconds.values() for seconds in times)
        assert set(line.seconds) in ({"grid_sample", OURS.name}, {THEIRS.name, OURS.name})
        assert f"| {line.title} |" in printed
    assert [len(part["checks"]) for part in found.values()] == [0, 0, 0, 10, 2, 0, 8]
    assert all(check["passed"] for part in found.values() for check in part["checks"])
    assert all(part["failures"] == [] for part in found.values())
    assert "the Triton kernels need a GPU" in printed or parts.kernels.IS_INTERPRETED


def test_a_part_has_a_process_of_its_own(repository, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(repository))
    assert gpu.main([*TRY, "--only", "attention"]) == 0
    assert capsys.readouterr().out.count("deformable attention, forward") == 8


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
    monkeypatch.setattr(gpu.sys, "executable", str(python))
    gpu.run_part_in_fresh_process("host", Setup("tiny", 64, 96, 1, 0, ""), Pace(), path, limit=1)
    found = Report(path).read()
    assert found["notes"][0] == "first"
    assert found[kind][-1].startswith(message)


def test_a_part_that_fails_leaves_the_others(in_this_process, monkeypatch, capsys):
    def fail(setup, report, pace):
        report.check(parts.Check("logits", math.nan, 1.0))
        raise RuntimeError("no such kernel\nand so on")

    monkeypatch.setitem(PARTS, "attention", PARTS["attention"]._replace(run=fail))
    assert gpu.main([*TRY, "--only", "attention,kernels"]) == 1
    captured = capsys.readouterr()
    assert "- **failed:** attention: RuntimeError: no such kernel\n" in captured.out and "DIFFERS" in captured.out
    assert "the Triton kernels need a GPU" in captured.out or parts.kernels.IS_INTERPRETED
    assert "differ by more than allowed: logits" in captured.err and "no such kernel" in captured.err


def test_time_that_is_not_used_goes_to_later_parts(in_this_process, monkeypatch, capsys):
    for name in PARTS:
        monkeypatch.setitem(PARTS, name, PARTS[name]._replace(run=lambda setup, report, pace: None))
    assert gpu.main([*TRY, "--budget", "10000"]) == 0
    limits = list(in_this_process.values())
    assert limits[0] == pytest.approx(10000 * 50 / 540, rel=0.01)
    assert limits[-1] == pytest.approx(10000, rel=0.01)  # nothing was used
    in_this_process.clear()
    assert gpu.main([*TRY, "--budget", "1"]) == 0
    assert in_this_process == {}
    assert capsys.readouterr().out.count("- skipped: the time is over") == len(PARTS)


def test_what_fails_at_first_or_later_is_left_out():
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    calls = []

    def tired():
        calls.append(None)
        if len(calls) > 4:
            raise RuntimeError("too often")

    runs = {"transformers": too_large, "other": lambda: tired, "m2f_hf": lambda: lambda: None}
    line = parts.contest("x", runs, "cpu", Pace(0.0, least=3))
    assert line.missing == {"transformers": "out of memory", "other": "RuntimeError: too often"}
    assert {name: len(times) for name, times in line.seconds.items()} == {"m2f_hf": 3}


# --- a GPU's clock and memory, with a stand-in ---


@pytest.mark.filterwarnings("ignore")
def test_time_memory_and_waits_are_those_of_one_run(monkeypatch):
    """With a queue whose clock counts milliseconds, and an allocator."""
    clock, allocated, peak, modes = [0.0], 100, [900], []

    class Event(SimpleNamespace):
        record = lambda self: setattr(self, "time", clock[0])
        synchronize = lambda self: None
        elapsed_time = lambda self, end: end.time - self.time

    def run():
        clock[0] += 250
        peak[0] = max(peak[0], allocated + 40)
        for message in ("called a synchronizing CUDA operation", "something else") * 2:
            warnings.warn(message, stacklevel=1)

    stand_in = SimpleNamespace(
        Event=Event,
        empty_cache=lambda: None,
        memory_allocated=lambda: allocated,
        max_memory_allocated=lambda: peak[0],
        reset_peak_memory_stats=lambda: peak.__setitem__(0, allocated),
        set_sync_debug_mode=modes.append,
    )
    monkeypatch.setattr(torch, "cuda", stand_in)
    line = parts.contest("x", {"m2f_hf": lambda: run}, "cuda", Pace(0.0, least=2), loop=4)
    assert line.seconds == {"m2f_hf": [0.25, 0.25]} and line.memory == {"m2f_hf": Memory(100, 140)}
    assert clock[0] == 250 * (3 + 3 * 4)
    assert parts.count_waits(run) == 2 and modes == ["warn", "default"]


# --- inputs ---


def test_locations_are_between_positions_and_near_where_they_were():
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device cpu goes with --tiny"),
        (["--only", "forward,backward", *TRY], "backward unknown; choose from kernels"),
        (["--output", "no/such/folder/gpu.md", *TRY], "folder no/such/folder does not exist"),
        (["--size", "tiny", *TRY], "invalid choice"),
        ([], "" if torch.cuda.is_available() else "finds no GPU; `--device cpu --tiny`"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    if not message:
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stopped:
        gpu.parse_arguments(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
