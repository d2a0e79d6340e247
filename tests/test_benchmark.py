"""The benchmark runs, its tables have their lines, and outputs that differ do not pass."""

import re

import pytest
import torch

from examples import benchmark
from examples.benchmark import CASES, LARGE, OURS, THEIRS, Check, Memory, Setup, Times


MEBIBYTE = 2**20


@pytest.fixture(autouse=True)
def threads_as_before():
    """The script sets their number for its whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    weights = str(tmp_path_factory.mktemp("weights"))
    size = benchmark.SIZES["tiny"]
    benchmark.save_random_weights(size.config(), weights, seed=0)
    return Setup("tiny", size.height, size.width, batch=2, seed=0, weights=weights)


@pytest.fixture
def memory_is_known(monkeypatch):
    """Stands in for the fresh processes, which a test of its own starts."""
    known = Memory(idle=100 * MEBIBYTE, peak=300 * MEBIBYTE)
    monkeypatch.setattr(benchmark, "measure_memory_in_fresh_process", lambda *request: known)


def tables(markdown):
    """Each table as its lines, a line as its cells."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", markdown, re.M)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]


# --- the whole script ---


def test_script_measures_compares_and_writes_a_table(tmp_path, repository, monkeypatch, capsys):
    """With the fresh processes in which memory is measured."""
    output = tmp_path / "table.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    assert benchmark.main(["--size", "tiny", "--only", "deformable", "--repeats", "2", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == output.read_text(encoding="utf-8").strip()
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    times, memory, outputs = tables(printed)
    (name, *seconds), (same_name, *mebibytes) = times[2], memory[2]
    assert name == same_name == "deformable attention alone"
    assert all(float(seconds[column]) > 0 for column in (0, 1, 3, 4))
    peaks = [float(cell.replace(",", "")) for cell in mebibytes[:4]]
    # Python and torch alone are more than this; what came on top is part of the peak.
    assert min(peaks[:2]) > 50
    assert all(0 <= above < peak for above, peak in zip(peaks[2:], peaks[:2], strict=True))
    assert [line[3] for line in outputs[2:]] == ["equal"]
    assert f"torch {torch.__version__}" in printed


def test_every_case_is_in_the_tables_and_outputs_are_equal(capsys, memory_is_known):
    assert benchmark.main(["--size", "tiny", "--repeats", "1", "--batch", "2"]) == 0
    times, memory, outputs = tables(capsys.readouterr().out)
    titles = [case.title for name, case in CASES.items() if name not in LARGE]
    assert [line[0] for line in times[2:]] == titles
    assert [line[0] for line in memory[2:]] == titles
    assert {len(line) for table in (times, memory, outputs) for line in table} == {7, 6, 5}
    checked = {line[0].partition(":")[0] for line in outputs[2:]}
    assert checked == {"forward", "forward with pixel_mask", "deformable attention", "training"}
    assert {line[3] for line in outputs[2:]} == {"equal"}


# --- what differs is noticed ---


def test_wrong_attention_fails_the_run(capsys, monkeypatch, memory_is_known):
    def slightly_wrong(*inputs):
        return OURS.deformable_attention(*inputs) * 1.001

    monkeypatch.setattr(benchmark, "OURS", OURS._replace(deformable_attention=slightly_wrong))
    assert benchmark.main(["--size", "tiny", "--only", "deformable", "--repeats", "1"]) == 1
    captured = capsys.readouterr()
    assert [line[3] for line in tables(captured.out)[2][2:]] == ["**DIFFERS**"]
    assert "deformable attention: output" in captured.err


def test_a_wrong_model_is_noticed(setup):
    weight = setup.model(OURS).class_predictor.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight *= 1.05
        verdicts = {check.what: check.passed for check in benchmark.check_forward(setup)}
        training = {check.what: check.passed for check in benchmark.check_training(setup)}
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert verdicts == {
        "forward: class logits": False,
        "forward: mask logits": True,
        "forward: mask logits where attention masks differ": True,
    }
    assert training == {"training: loss": False, "training: gradient": False}
    assert all(check.passed for check in benchmark.check_forward(setup))


def test_decisions_that_are_no_near_ties_are_noticed(setup, monkeypatch):
    predictor = setup.model(OURS).model.transformer_module.decoder.mask_predictor
    right = predictor.blocked_positions
    monkeypatch.setattr(
        predictor, "blocked_positions", lambda embeddings, features, padding: right(-embeddings, features, padding)
    )
    *logits, ties = benchmark.check_forward(setup)
    assert all(check.passed for check in logits)  # with the attention masks of the other
    assert not ties.passed


@pytest.mark.parametrize("difference", [1e-3, -1e-3, float("nan"), float("inf")])
def test_one_wrong_value_is_enough(difference):
    theirs = torch.linspace(-1, 1, 12).view(3, 4)
    ours = theirs.clone()
    ours[1, 2] += difference
    assert benchmark.compare("x", theirs.clone(), theirs).passed
    assert not benchmark.compare("x", ours, theirs).passed
    assert not benchmark.compare("x", theirs, ours).passed


def test_another_shape_is_a_difference():
    assert not benchmark.compare("x", torch.zeros(2, 3), torch.zeros(3)).passed


def test_tolerance_grows_with_the_values():
    theirs = torch.tensor([100.0, 0.0])
    assert benchmark.compare("x", theirs + 50 * benchmark.OUTPUT_TOLERANCE, theirs).passed
    assert not benchmark.compare("x", theirs + 150 * benchmark.OUTPUT_TOLERANCE, theirs).passed


def test_gradient_difference_is_relative_and_sees_missing_ones():
    def model(*gradient):
        linear = torch.nn.Linear(2, 1, bias=False)
        linear.weight.grad = torch.tensor([gradient]) if gradient else None
        return linear

    assert benchmark.gradient_difference(model(3.0, 4.0), model(3.0, 4.0)) == 0
    assert benchmark.gradient_difference(model(3.0, 4.5), model(3.0, 4.0)) == pytest.approx(0.1)
    assert benchmark.gradient_difference(model(), model(3.0, 4.0)) == float("inf")


# --- inputs and measurement ---


def test_attention_masks_of_the_random_model_are_neither_empty_nor_full(setup):
    with torch.no_grad(), benchmark.recorded_decisions(setup.model(THEIRS).eval()) as decisions:
        setup.model(THEIRS)(setup.pixel_values())
    assert len(decisions) == setup.config().decoder_layers
    for decision in decisions:
        assert decision.logits.isfinite().all()
        blocked = decision.blocked.float().mean(-1)  # (B, Q)
        assert 0.2 < blocked.mean() < 0.8
        assert ((blocked > 0.05) & (blocked < 0.95)).float().mean() > 0.5  # of six positions on the coarsest level
        assert not torch.equal(decision.blocked[:, :1].expand_as(decision.blocked), decision.blocked)


def test_post_processing_finds_segments_in_the_made_up_outputs(setup):
    outputs = setup.segmentation_outputs()
    for implementation in (THEIRS, OURS):
        result = benchmark.prepare_post_processing("panoptic", (96, 128), implementation, setup)()[0]
        assert result["segmentation"].shape == (96, 128)
        assert len(result["segments_info"]) >= 2
        result = benchmark.prepare_post_processing("instance", (96, 128), implementation, setup)()[0]
        assert len(result["segments_info"]) >= 2
    assert outputs.masks_queries_logits.shape[1:] == (20, setup.height // 4, 96 // 4)


def test_implementations_take_turns_and_the_warm_up_does_not_count():
    calls = []
    times = benchmark.measure_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 4
    assert {name: (len(t.cpu), len(t.wall)) for name, t in times.items()} == {"a": (3, 3), "b": (3, 3)}


def test_memory_counts_what_a_run_allocates():
    idle, peak = benchmark.measure_memory(lambda: torch.ones(64 * MEBIBYTE // 4).sum())
    assert 60 * MEBIBYTE < peak - idle < 90 * MEBIBYTE


def test_ratios_are_of_medians():
    times = {"transformers": Times([4.0, 6.0, 50.0], [6.0] * 3), "m2f_hf": Times([2.0, 3.0, 4.0], [2.0] * 3)}
    memory = {
        "transformers": Memory(100 * MEBIBYTE, 500 * MEBIBYTE),
        "m2f_hf": Memory(100 * MEBIBYTE, 200 * MEBIBYTE),
    }
    checks = [Check("good", 0.5, 1.0, "why"), Check("bad", 2.0, 1.0)]
    markdown = benchmark.render({"machine": "none"}, [benchmark.Row("x", times, memory)], checks)
    first, second, third = tables(markdown)
    assert first[2] == ["x", "6", "3", "**2.00×** (2.00–12.50)", "6", "2", "3.00×"]
    assert second[2] == ["x", "500", "200", "400", "100", "**4.00×**"]
    assert [line[3] for line in third[2:]] == ["equal", "**DIFFERS**"]


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "100"], "--height 100 must be a positive multiple of 32"),
        (["--width", "0"], "--width 0 must be"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--threads", "-1"], "--threads -1 must be at least 1"),
        (["--only", "forward,backward"], "backward unknown; choose from forward"),
        (["--output", "no/such/folder/table.md"], "folder no/such/folder does not exist"),
        (["--size", "huge"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse_arguments(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_failed_process_says_why(setup, monkeypatch):
    monkeypatch.setattr(benchmark.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="memory of m2f_hf's forward failed"):
        benchmark.measure_memory_in_fresh_process("m2f_hf", "forward", setup, threads=1)
