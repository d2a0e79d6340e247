"""The CPU benchmark: its lines and fields, outputs that differ do not pass, and what it says of failures."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cases
import cpu
import equality
import measuring
import report
from cases import OURS, THEIRS, Setup
from cpu import CASES, Worker, WorkerError
from equality import Check
from measuring import Memory
from report import Line

from m2f_hf.kernels import group_norm
from m2f_hf.kernels.fast_path import Kernel, fast_path


MEBIBYTE = 2**20
TINY = ["--size", "tiny", "--repeats", "1"]


@pytest.fixture(autouse=True)
def process_as_before(monkeypatch):
    """The script sets the number of threads of its whole process; how fast that multiplies is not measured here."""
    monkeypatch.setattr(cpu, "measure_product_rate", lambda dtype: 1e9)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    size = cases.SIZES["tiny"]
    weights = cases.save_checkpoint("tiny", tmp_path_factory.mktemp("weights"), seed=0)
    return Setup("tiny", size.height, size.width, batch=2, seed=0, weights=weights)


@pytest.fixture
def in_this_process(monkeypatch):
    """Stands in for the fresh processes, which tests of their own start."""

    class Local(cpu.Server):
        def __init__(self, what, request, checkout=None):
            super().__init__(json.loads(json.dumps(request)))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        ask = cpu.Server.answer

    monkeypatch.setattr(cpu, "Worker", Local)
    yield
    cases.load_model.cache_clear()


def rows(markdown):
    """The lines of all tables as their cells, headers left out."""
    lines = re.findall(r"^\|(.*)\|$", markdown, re.M)
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    return [row for row, after in zip(cells, [*cells[1:], []], strict=True) if "---" not in row + after[:1]]


# --- the whole script ---


def test_a_line_is_measured_in_fresh_processes(tmp_path, repository, monkeypatch, capsys):
    """Of another checkout, too: here the same once more."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--size", "tiny", "--only", "forward", "--repeats", "2", "--memory-limit", "4"]
    arguments += ["--against", str(repository), "--output", "table.md", "--json", "table.json"]
    assert cpu.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == Path("table.md").read_text(encoding="utf-8").strip()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json", "table.md"]
    assert f"torch {torch.__version__}" in printed
    document = json.loads(Path("table.json").read_text(encoding="utf-8"))
    (line,) = document["lines"]
    names = ["transformers", "m2f_hf, before", "m2f_hf"]
    assert line["name"] == "forward" and list(line["memory"]) == list(line["seconds"]) == list(line["wall"]) == names
    for name in names:
        # Python and torch alone are more than this; what came on top is part of the peak.
        assert 50 * MEBIBYTE < line["memory"][name]["idle"] <= line["memory"][name]["peak"]
        assert len(line["seconds"][name]) == 2 and min(line["seconds"][name] + line["wall"][name]) > 0
    assert [check["passed"] for check in document["checks"]] == [True] * 3
    assert [row[1] for row in rows(printed)] == [*names, *["equal"] * 3]


def test_every_case_is_in_the_table_and_outputs_are_equal(in_this_process, capsys):
    # Post-processing to 3000×4000 takes as long as at the real sizes.
    wanted = [name for name in CASES if not name.endswith("-3000x4000")]
    assert cpu.main([*TINY, "--batch", "2", "--only", ",".join(wanted)]) == 0
    printed = rows(capsys.readouterr().out)
    measured, checks = [row for row in printed if len(row) == 8], [row for row in printed if len(row) == 5]
    titles = list(dict.fromkeys(row[0] for row in measured))
    assert len(titles) == len(wanted)
    without_time = {row[0] for row in measured if row[2] == "–"}
    assert without_time == {"training step, 1 × 96×96, 300 targets an image"}
    assert {row[1] for row in checks} == {"equal"}
    kinds = {row[0].rpartition(":")[0] for row in checks}
    assert kinds - {"forward in bf16"} == {
        *("forward", "image file"),
        *(f"training, {targets} targets" for targets in (10, 60, 300)),
    }


# --- kernels turned off ---


def test_one_kernel_is_off_and_then_on_again(monkeypatch):
    first, second = (Kernel(lambda x: True, lambda x, name=name: name) for name in ("first", "second"))
    monkeypatch.setattr(group_norm, "first_kernel", first, raising=False)
    monkeypatch.setattr(group_norm, "second_kernel", second, raising=False)
    assert {"first_kernel", "second_kernel"} <= measuring.list_kernels().keys()
    layer = fast_path(first, second)(lambda x: "plain")
    for off, expected in ((None, "first"), ("first_kernel", "second"), ("second_kernel", "first"), ("all", "plain")):
        with measuring.kernel_off(off):
            assert layer(0) == expected
    assert layer(0) == "first"


def test_each_kernel_has_a_line(in_this_process, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "list_kernels", lambda: {"some_kernel": None})
    turned_off = []
    off = lambda name: turned_off.append(name) or measuring.kernel_off(None)
    monkeypatch.setattr(cpu, "kernel_off", off)
    assert cpu.main([*TINY, "--only", "forward", "--kernels"]) == 0
    names = [row[1] for row in rows(capsys.readouterr().out)]
    assert names == ["without some_kernel", "without all", "m2f_hf"]
    assert turned_off == ["some_kernel", "all", None] * 3  # a warm-up, a time, memory


# --- what differs is noticed ---


def test_a_wrong_model_is_noticed(setup):
    weight = setup.model(OURS).class_predictor.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight *= 1.5
        verdicts = {check.what: check.passed for check in equality.check_forward(setup)}
        training = {check.what: check.passed for check in equality.check_training(setup)}
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert verdicts == {
        "forward: class logits": False,
        "forward: mask logits": True,
        "forward: mask logits where attention masks differ": True,
    }
    assert training == {"training, 10 targets: loss": False, "training, 10 targets: gradient": False}
    assert all(check.passed for check in equality.check_forward(setup))


def test_decisions_that_are_no_near_ties_are_noticed(setup, monkeypatch):
    predictor = setup.model(OURS).model.transformer_module.decoder.mask_predictor
    right = predictor.blocked_positions
    monkeypatch.setattr(
        predictor, "blocked_positions", lambda embeddings, features, padding: right(-embeddings, features, padding)
    )
    *logits, ties = equality.check_forward(setup)
    assert all(check.passed for check in logits)  # with the attention masks of the other
    assert not ties.passed


def test_other_pixels_are_noticed(setup, monkeypatch):
    assert all(check.passed for check in equality.check_end_to_end(setup))
    right = OURS.processor_class.resize
    monkeypatch.setattr(
        OURS.processor_class, "resize", lambda self, image, size, *_, **__: right(self, image, size, Image.NEAREST)
    )
    assert not any(check.passed for check in equality.check_end_to_end(setup))


@pytest.mark.parametrize("difference", [1e-3, -1e-3, float("nan"), float("inf")])
def test_one_wrong_value_is_enough(difference):
    theirs = torch.linspace(-1, 1, 12).view(3, 4)
    ours = theirs.clone()
    ours[1, 2] += difference
    assert equality.compare("x", theirs.clone(), theirs).passed
    assert not equality.compare("x", ours, theirs).passed
    assert not equality.compare("x", theirs, ours).passed
    assert not equality.compare("x", torch.zeros(2, 3), torch.zeros(3)).passed
    large = torch.tensor([100.0, 0.0])  # the tolerance grows with the values
    assert equality.compare("x", large + 50 * equality.OUTPUT_TOLERANCE, large).passed
    assert not equality.compare("x", large + 150 * equality.OUTPUT_TOLERANCE, large).passed


def test_gradient_difference_is_relative_and_sees_missing_ones():
    ours, theirs = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    for gradient, expected in (([3.0, 4.0], 0), ([3.0, 4.5], 0.1), (None, float("inf"))):
        ours.weight.grad = None if gradient is None else torch.tensor([gradient])
        theirs.weight.grad = torch.tensor([[3.0, 4.0]])
        assert equality.gradient_difference(ours, theirs) == pytest.approx(expected)


def test_a_difference_fails_the_run(in_this_process, monkeypatch, capsys):
    wrong = CASES["forward"]._replace(check=lambda setup: [Check("forward: logits", float("nan"), 1.0)])
    monkeypatch.setitem(CASES, "forward", wrong)
    assert cpu.main([*TINY, "--only", "forward"]) == 1
    captured = capsys.readouterr()
    assert "**DIFFERS**" in captured.out and "forward: logits" in captured.err


def test_inputs_are_like_those_of_a_trained_model(setup):
    """Attention masks neither empty nor full, and a few segments in made-up outputs and in the photo."""
    with torch.no_grad(), equality.recorded_decisions(setup.model(THEIRS).eval()) as decisions:
        setup.model(THEIRS)(setup.pixel_values())
    assert len(decisions) == setup.config().decoder_layers
    for decision in decisions:
        blocked = decision.blocked.float().mean(-1)  # (B, Q)
        assert ((blocked > 0.05) & (blocked < 0.95)).float().mean() > 0.5  # of six positions on the coarsest level
    for implementation in (THEIRS, OURS):
        small = setup._replace(result_height=96)
        for task in ("panoptic", "instance"):
            result = cases.prepare_post_processing(task, implementation, small)()[0]
            assert result["segmentation"].shape[-2:] == (96, 128) and len(result["segments_info"]) >= 2
        (result,) = cases.prepare_end_to_end(implementation, setup)()
        assert result["segmentation"].shape == (48, 64) and 1 <= len(result["segments_info"]) <= 10


# --- time and memory ---


def test_memory_counts_what_a_run_allocates():
    idle, peak = measuring.measure_memory(lambda: torch.ones(64 * MEBIBYTE // 4).sum())
    assert 60 * MEBIBYTE < peak - idle < 90 * MEBIBYTE


def request(case, setup, **more):
    return {"case": case, "setup": setup, "implementation": "transformers", "threads": 1, "limit": None, **more}


@pytest.mark.skipif(sys.platform != "linux", reason="memory can be limited on Linux only")
def test_processes_have_a_limit_and_report_it(setup):
    crowded = setup._replace(height=2048, width=2048, batch=1, targets=60)  # targets of 1 GB as float32
    with Worker("x", request("training-60", crowded, limit=10**9, off=None)) as worker:
        with pytest.raises(WorkerError, match="out of memory at 1 GB") as failed:
            worker.ask("memory")
        assert failed.value.is_memory


@pytest.mark.skipif(sys.platform == "win32", reason="there are no signals to be killed by")
@pytest.mark.parametrize(
    "script", ["kill -9 $$", "echo std::bad_alloc >&2; kill -6 $$", "echo no such thing >&2; exit 3"]
)
def test_a_killed_process_had_too_little_memory(script, setup, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(cpu.sys, "executable", str(python))
    with Worker("m2f_hf, forward", request("forward", setup)) as worker:
        message = "out of memory" if "kill" in script else "m2f_hf, forward failed with status 3:\nno such thing"
        with pytest.raises(WorkerError, match=message) as failed:
            worker.ask("memory")
        assert failed.value.is_memory == ("kill" in script)


def test_the_one_that_fits_is_still_measured(in_this_process, monkeypatch, capsys):
    class Starved(cpu.Worker):
        def ask(self, do, off=None):
            if do == "memory" and self.request["implementation"] == "transformers":
                raise WorkerError("out of memory at 3 GB", is_memory=True)
            return super().answer(do, off)

    monkeypatch.setattr(cpu, "Worker", Starved)
    assert cpu.main([*TINY, "--only", "forward"]) == 0
    printed = capsys.readouterr().out
    theirs, ours = rows(printed)
    assert theirs[2:] == ["out of memory at 3 GB", *["–"] * 5]
    assert float(ours[2]) > 0
    assert "outputs were not compared: out of memory" in printed


def test_bf16_is_measured_where_the_processor_has_it(monkeypatch, capsys):
    for flags, has_products in (
        ("flags\t\t: fpu avx512_bf16 x\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("", False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
        monkeypatch.setattr(measuring, "cpu_info", lambda flags=flags: "model name\t: bf16 by name alone\n" + flags)
        assert (measuring.lacks_bf16_products() == "") == has_products
    assert cpu.main([*TINY, "--only", "forward-bf16"]) == 0
    assert rows(capsys.readouterr().out)[0][1:3] == ["all", "not measured: this CPU has no bf16 products"]


# --- the report ---


def test_ratios_are_of_medians():
    seconds = {"transformers": [4.0, 6.0, 50.0], "m2f_hf": [2.0, 3.0, 4.0]}
    wall = {"transformers": [6.0] * 3, "m2f_hf": [2.0] * 3}
    memory = {"transformers": Memory(100 * MEBIBYTE, 500 * MEBIBYTE), "m2f_hf": Memory(100 * MEBIBYTE, 200 * MEBIBYTE)}
    checks = [Check("good", 0.5, 1.0, "why"), Check("bad", float("inf"), 1.0)]
    line = Line("x", "X", seconds, wall, memory, {"other": "does not run"}, ["and so on"])
    markdown = report.render({"machine": "none"}, [line], checks, "m2f_hf")
    other, theirs, ours, good, bad = rows(markdown)
    assert other == ["X", "other", "does not run", *["–"] * 5]
    assert theirs == ["X", "transformers", "6", "**2.00×** (2.00–12.50)", "6", "500", "400", "4.00×"]
    assert ours == ["X", "m2f_hf", "3", "–", "2", "200", "100", "–"]
    assert (good[1], bad[1]) == ("equal", "**DIFFERS**")
    assert "- machine: none" in markdown and "- X: and so on" in markdown
    document = json.loads(report.as_json({}, [line], checks))
    assert document["lines"][0]["seconds"]["transformers"] == [4.0, 6.0, 50.0]
    assert document["checks"][1]["difference"] == "inf"
    assert report.read_line(document["lines"][0]) == line
    assert [report.read_check(fields) for fields in document["checks"]] == checks


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "100"], "--height 100 must be a positive multiple of 32"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--only", "forward,backward"], "backward unknown; choose from forward"),
        (["--memory-limit", "0"], "--memory-limit 0.0 must be more than 0"),
        (["--output", "no/such/folder/table.md"], "folder no/such/folder does not exist"),
        (["--against", "."], ". has no folder m2f_hf: give the root of a checkout"),
        (["--against", "REPOSITORY", "--kernels"], "--kernels and --against are two runs"),
        (["--size", "huge"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cpu.parse_arguments([str(repository) if argument == "REPOSITORY" else argument for argument in arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
