"""The benchmark runs, its tables have their lines, and outputs that differ do not pass."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import benchmark
import benchmark_checks
import benchmark_curves
import benchmark_measure
import benchmark_runs
import benchmark_setup
import benchmark_tables
from benchmark import CASES
from benchmark_checks import Check
from benchmark_curves import CURVES, Panel, draw_curves, growth, growth_table, short_number
from benchmark_measure import Memory, OutOfMemory, Products, Times, count_products
from benchmark_setup import OURS, THEIRS, Setup
from benchmark_tables import Row


MEBIBYTE = 2**20
KNOWN = Memory(idle=100 * MEBIBYTE, peak=300 * MEBIBYTE)


@pytest.fixture(autouse=True)
def threads_as_before():
    """The script sets their number for its whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    size = benchmark_setup.SIZES["tiny"]
    weights = benchmark_setup.save_checkpoint("tiny", tmp_path_factory.mktemp("weights"), seed=0)
    return Setup("tiny", size.height, size.width, batch=2, seed=0, weights=weights)


@pytest.fixture
def memory_is_known(monkeypatch):
    """Stands in for the fresh processes, which a test of its own starts; returns what they were asked."""
    asked = []

    def known(implementation, case, setup, threads, limit, repeats=0):
        asked.append((implementation, case, setup))
        times = [0.001 * setup.height * setup.width] * repeats
        return KNOWN, Times(times, times)

    monkeypatch.setattr(benchmark, "measure_in_fresh_process", known)
    monkeypatch.setattr(benchmark, "check_in_fresh_process", lambda case, setup, *_: CASES[case].check(setup))
    return asked


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
    arguments = ["--size", "tiny", "--only", "deformable", "--repeats", "2", "--memory-limit", "4"]
    assert benchmark.main([*arguments, "--output", "table.md", "--json", "table.json"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == output.read_text(encoding="utf-8").strip()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json", "table.md"]
    times, memory, outputs = tables(printed)
    (name, *seconds), (same_name, *mebibytes) = times[2], memory[2]
    assert name == same_name == "deformable attention alone"
    assert all(float(seconds[column]) > 0 for column in (0, 1, 3, 4))
    peaks = [float(mebibytes[column].replace(",", "")) for column in (0, 1, 3, 4)]
    # Python and torch alone are more than this; what came on top is part of the peak.
    assert min(peaks[:2]) > 50
    assert all(0 <= above < peak for above, peak in zip(peaks[2:], peaks[:2], strict=True))
    assert [line[3] for line in outputs[2:]] == ["equal"]
    assert f"torch {torch.__version__}" in printed
    document = json.loads(Path("table.json").read_text(encoding="utf-8"))
    (line,) = document["lines"]
    assert f"{line['memory']['m2f_hf']['peak'] / MEBIBYTE:,.0f}" == mebibytes[1]
    assert len(line["times"]["transformers"]["cpu"]) == 2
    assert [check["passed"] for check in document["checks"]] == [True]


def test_every_case_is_in_the_tables_and_outputs_are_equal(capsys, memory_is_known):
    # What takes long at the real sizes, post-processing to 3000×4000, does here too.
    cases = [name for name in CASES if not name.endswith("-3000x4000")]
    assert benchmark.main(["--size", "tiny", "--repeats", "1", "--batch", "2", "--only", ",".join(cases)]) == 0
    printed = capsys.readouterr().out
    times, products, memory, outputs = tables(printed)
    titles = {
        name: CASES[name].title.format(CASES[name].at(Setup("tiny", 64, 96, 2, 0, "")), benchmark_setup.SIZES["tiny"])
        for name in cases
    }
    assert len(set(titles.values())) == len(cases)
    assert [line[0] for line in memory[2:]] == list(titles.values())
    assert [line[0] for line in times[2:]] == [title for name, title in titles.items() if CASES[name].is_timed]
    measured = [name for name in cases if not CASES[name].missing()]
    assert [line[0] for line in products[2:]] == [titles[name] for name in measured if CASES[name].has_products]
    assert [{len(line) for line in table} for table in (times, products, memory, outputs)] == [{7}, {6}, {7}, {5}]
    checked = {line[0].rpartition(":")[0] for line in outputs[2:]}
    assert checked - {"forward in bf16"} == {
        *("forward", "forward with pixel_mask", "deformable attention", "image file"),
        *(f"training, {targets} targets" for targets in (10, 60, 300)),
    }
    assert {line[3] for line in outputs[2:]} == {"equal"}
    assert "network input and result 64×96" in printed
    assert "network input and result 32×32" in printed
    assert "not counted" not in printed


def test_lines_have_the_sizes_of_the_issue():
    setup = Setup("swin-t", 800, 1216, 1, 0, "")

    def sizes(name):
        at = CASES[name].at(setup)
        return at.batch, at.height, at.width, at.targets

    assert sizes("training-10") == (2, 512, 512, 10)
    assert sizes("training-60") == (2, 512, 512, 60)
    assert sizes("training-300") == (1, 1024, 1024, 300)
    assert CASES["instance-3000x4000"].at(setup).result_height == 3000
    assert CASES["forward"].at(setup) == setup


# --- what differs is noticed ---


def test_wrong_attention_fails_the_run(capsys, monkeypatch, memory_is_known):
    def slightly_wrong(*inputs):
        return OURS.deformable_attention(*inputs) * 1.001

    monkeypatch.setattr(benchmark_checks, "OURS", OURS._replace(deformable_attention=slightly_wrong))
    assert benchmark.main(["--size", "tiny", "--only", "deformable", "--repeats", "1"]) == 1
    captured = capsys.readouterr()
    assert [line[3] for line in tables(captured.out)[2][2:]] == ["**DIFFERS**"]
    assert "deformable attention: output" in captured.err


def test_a_wrong_model_is_noticed(setup):
    weight = setup.model(OURS).class_predictor.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight *= 1.5
        verdicts = {check.what: check.passed for check in benchmark_checks.check_forward(setup)}
        training = {check.what: check.passed for check in benchmark_checks.check_training(setup)}
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert verdicts == {
        "forward: class logits": False,
        "forward: mask logits": True,
        "forward: mask logits where attention masks differ": True,
    }
    assert training == {"training, 10 targets: loss": False, "training, 10 targets: gradient": False}
    assert all(check.passed for check in benchmark_checks.check_forward(setup))


def test_decisions_that_are_no_near_ties_are_noticed(setup, monkeypatch):
    predictor = setup.model(OURS).model.transformer_module.decoder.mask_predictor
    right = predictor.blocked_positions
    monkeypatch.setattr(
        predictor, "blocked_positions", lambda embeddings, features, padding: right(-embeddings, features, padding)
    )
    *logits, ties = benchmark_checks.check_forward(setup)
    assert all(check.passed for check in logits)  # with the attention masks of the other
    assert not ties.passed


@pytest.mark.parametrize("difference", [1e-3, -1e-3, float("nan"), float("inf")])
def test_one_wrong_value_is_enough(difference):
    theirs = torch.linspace(-1, 1, 12).view(3, 4)
    ours = theirs.clone()
    ours[1, 2] += difference
    assert benchmark_checks.compare("x", theirs.clone(), theirs).passed
    assert not benchmark_checks.compare("x", ours, theirs).passed
    assert not benchmark_checks.compare("x", theirs, ours).passed


def test_another_shape_is_a_difference():
    assert not benchmark_checks.compare("x", torch.zeros(2, 3), torch.zeros(3)).passed


def test_tolerance_grows_with_the_values():
    theirs = torch.tensor([100.0, 0.0])
    assert benchmark_checks.compare("x", theirs + 50 * benchmark_checks.OUTPUT_TOLERANCE, theirs).passed
    assert not benchmark_checks.compare("x", theirs + 150 * benchmark_checks.OUTPUT_TOLERANCE, theirs).passed


def test_gradient_difference_is_relative_and_sees_missing_ones():
    def model(*gradient):
        linear = torch.nn.Linear(2, 1, bias=False)
        linear.weight.grad = torch.tensor([gradient]) if gradient else None
        return linear

    assert benchmark_checks.gradient_difference(model(3.0, 4.0), model(3.0, 4.0)) == 0
    assert benchmark_checks.gradient_difference(model(3.0, 4.5), model(3.0, 4.0)) == pytest.approx(0.1)
    assert benchmark_checks.gradient_difference(model(), model(3.0, 4.0)) == float("inf")


# --- inputs and measurement ---


def test_attention_masks_of_the_random_model_are_neither_empty_nor_full(setup):
    with torch.no_grad(), benchmark_checks.recorded_decisions(setup.model(THEIRS).eval()) as decisions:
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
        small = setup._replace(result_height=96)
        result = benchmark_runs.prepare_post_processing("panoptic", implementation, small)()[0]
        assert result["segmentation"].shape == (96, 128)
        assert len(result["segments_info"]) >= 2
        result = benchmark_runs.prepare_post_processing("instance", implementation, small)()[0]
        assert len(result["segments_info"]) >= 2
    assert outputs.masks_queries_logits.shape[1:] == (20, setup.height // 4, 96 // 4)


def test_implementations_take_turns_and_the_warm_up_does_not_count():
    calls = []
    times = benchmark_measure.measure_times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 4
    assert {name: (len(t.cpu), len(t.wall)) for name, t in times.items()} == {"a": (3, 3), "b": (3, 3)}


def test_memory_counts_what_a_run_allocates():
    idle, peak = benchmark_measure.measure_memory(lambda: torch.ones(64 * MEBIBYTE // 4).sum())
    assert 60 * MEBIBYTE < peak - idle < 90 * MEBIBYTE


def test_ratios_are_of_medians():
    times = {"transformers": Times([4.0, 6.0, 50.0], [6.0] * 3), "m2f_hf": Times([2.0, 3.0, 4.0], [2.0] * 3)}
    memory = {
        "transformers": Memory(100 * MEBIBYTE, 500 * MEBIBYTE),
        "m2f_hf": Memory(100 * MEBIBYTE, 200 * MEBIBYTE),
    }
    products = {"transformers": Products(9 * 10**9, []), "m2f_hf": Products(8 * 10**9, [])}
    checks = [Check("good", 0.5, 1.0, "why"), Check("bad", 2.0, 1.0)]
    row = Row("x", "X", memory, times, products, floor=1.5, notes=["and so on"])
    markdown = benchmark_tables.render({"machine": "none"}, [row], checks)
    first, second, third, fourth = tables(markdown)
    assert first[2] == ["X", "6", "3", "**2.00×** (2.00–12.50)", "6", "2", "3.00×"]
    assert second[2] == ["X", "9", "8", "1.5", "4.00×", "2.00×"]
    assert third[2] == ["X", "500", "200", "**2.50×** (0.40)", "400", "100", "**4.00×** (0.25)"]
    assert [line[3] for line in fourth[2:]] == ["equal", "**DIFFERS**"]
    assert "- X: and so on" in markdown
    line = json.loads(benchmark_tables.as_json({}, [row], checks))["lines"][0]
    assert line["memory"]["m2f_hf"] == {"idle": 100 * MEBIBYTE, "peak": 200 * MEBIBYTE}
    assert line["times"]["transformers"]["cpu"] == [4.0, 6.0, 50.0]


def test_what_was_not_measured_is_said_and_has_no_figures():
    starved = Row("x", "X", {"transformers": OutOfMemory(12 * 10**9), "m2f_hf": KNOWN}, {"m2f_hf": Times([2.0], [3.0])})
    markdown = benchmark_tables.render({}, [starved, Row("y", "Y", missing="not measured: no reason")], [])
    times, memory = tables(markdown)
    assert times[2] == ["X", "out of memory at 12 GB", "2", "–", "out of memory at 12 GB", "3", "–"]
    assert memory[2] == ["X", "out of memory at 12 GB", "300", "–", "out of memory at 12 GB", "200", "–"]
    assert times[3] == memory[3] == ["Y", "–", "not measured: no reason", "–", "–", "–", "–"]
    line = json.loads(benchmark_tables.as_json({}, [starved], [Check("bad", float("inf"), 1.0)]))
    assert line["lines"][0]["memory"]["transformers"] == "out of memory at 12 GB"
    assert line["checks"][0]["difference"] == "inf"


# --- the floor ---


def test_operations_of_products_and_their_gradients():
    """Two for each multiplication, wherever they hide: in a composite, in attention, in a convolution, backward."""
    weight = torch.randn(5, 7, requires_grad=True)
    states = torch.randn(2, 3, 7, requires_grad=True)
    linear = 2 * 2 * 3 * 7 * 5
    assert count_products(lambda: torch.nn.functional.linear(states, weight)).operations == linear
    assert count_products(lambda: (states @ weight.mT).sum().backward()).operations == 3 * linear
    assert count_products(lambda: torch.einsum("bqc,kc->kqb", states, weight)).operations == linear
    query, key = torch.randn(1, 2, 10, 8), torch.randn(1, 2, 20, 8)
    attention = count_products(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, key))
    assert attention == Products(2 * (2 * 2 * 10 * 20 * 8), [])
    image, kernel = torch.randn(1, 4, 10, 12), torch.randn(6, 4, 3, 3)
    convolution = count_products(lambda: torch.nn.functional.conv2d(image, kernel, padding=1))
    assert convolution == Products(2 * 10 * 12 * 6 * 4 * 9, [])
    assert count_products(lambda: states.exp().sum(1).sort()) == Products(0, [])


def test_a_product_that_is_not_counted_is_named():
    with torch.library._scoped_library("benchmark_test", "FRAGMENT") as library:
        library.define("hidden(Tensor x) -> Tensor")
        library.impl("hidden", lambda x: x @ x, "CompositeExplicitAutograd")
        products = count_products(lambda: torch.ops.benchmark_test.hidden(torch.eye(3)))
    assert products == Products(0, ["benchmark_test.hidden"])


def test_operations_are_those_that_pytorch_counts(setup):
    """Its counter knows attention written out, and fails for our model's modules alone."""
    model = THEIRS.model_class.from_pretrained(setup.weights, attn_implementation="eager")
    pixel_values = setup.pixel_values()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(pixel_values)
    counted = count_products(benchmark_runs.prepare_forward(THEIRS, setup))
    assert counted == Products(counter.get_total_flops(), [])


def test_both_models_multiply_about_as_much(setup):
    """What is left out (masks nobody reads) or added (resized features) is small beside the layers."""
    runs = [benchmark_runs.prepare_forward(implementation, setup) for implementation in (THEIRS, OURS)]
    theirs, ours = (count_products(run) for run in runs)
    assert theirs.unknown == ours.unknown == []
    assert 0.9 * theirs.operations < ours.operations < 1.05 * theirs.operations
    doubled = setup._replace(batch=2 * setup.batch)
    assert count_products(benchmark_runs.prepare_forward(OURS, doubled)).operations == 2 * ours.operations


def test_floor_is_that_of_the_fewer_products(monkeypatch, capsys, memory_is_known):
    monkeypatch.setattr(benchmark, "measure_product_rate", lambda dtype: benchmark_measure.Rate(cpu=2e6, wall=4e6))
    counts = iter([Products(12 * 10**6, []), Products(10**7, ["m2f_hf.secret"])])
    monkeypatch.setattr(benchmark, "count_products", lambda run: next(counts))
    assert benchmark.main(["--size", "tiny", "--only", "forward", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert tables(printed)[1][2][:4] == ["forward", "0.012", "0.01", "5"]
    assert "- forward: not counted in m2f_hf: m2f_hf.secret" in printed


def test_rate_is_positive_and_of_both_clocks(monkeypatch):
    monkeypatch.setattr(benchmark_measure, "PRODUCT_SHAPES", [(64, 64, 64), (256, 256, 256)])
    rate = benchmark_measure.measure_product_rate(torch.float32, repeats=2)
    assert 0 < rate.cpu < float("inf")
    assert 0 < rate.wall < float("inf")


# --- end to end ---


def test_released_checkpoints_have_their_own_sizes(tmp_path):
    """What each library makes of the same folder, which has the settings that are released."""
    for size in ("swin-t", "r50"):
        folder = tmp_path / benchmark_setup.SIZES[size].checkpoint
        THEIRS.processor_class(size={"height": 384, "width": 384}, ignore_index=255).save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps({"model_type": "mask2former", "num_labels": 133}))
        setup = Setup(size, 800, 1216, 1, 0, str(folder))
        photo = benchmark_setup.random_photo(480, torch.Generator())
        assert photo.size == (640, 480)

        def network_input(implementation, equal_input, setup=setup, photo=photo):
            processor = benchmark_runs.photo_processor(implementation, setup, equal_input)
            return tuple(processor(images=photo, return_tensors="pt")["pixel_values"].shape[-2:])

        assert network_input(THEIRS, equal_input=False) == (384, 384)
        assert network_input(OURS, equal_input=False) == (800, 1088)
        assert network_input(THEIRS, equal_input=True) == network_input(OURS, equal_input=True) == (800, 1088)


def test_end_to_end_finds_segments_of_the_photos_size(setup):
    with Image.open(Path(setup.weights) / benchmark_setup.PHOTO) as photo:
        assert (photo.format, photo.size) == ("JPEG", (64, 48))
    for implementation in (THEIRS, OURS):
        for equal_input in (True, False):
            (result,) = benchmark_runs.prepare_end_to_end(equal_input, implementation, setup)()
            assert result["segmentation"].shape == (48, 64)
            assert 1 <= len(result["segments_info"]) <= 10  # of the 20 queries


def test_other_pixels_are_noticed(setup, monkeypatch):
    assert all(check.passed for check in benchmark_checks.check_end_to_end(setup))
    right = OURS.processor_class.resize
    monkeypatch.setattr(
        OURS.processor_class, "resize", lambda self, image, size, *_, **__: right(self, image, size, Image.NEAREST)
    )
    assert not any(check.passed for check in benchmark_checks.check_end_to_end(setup))


# --- bf16 ---


def test_bf16_is_compared_with_float32(setup):
    """Wherever it can be computed, fast or not."""
    checks = benchmark_checks.check_bf16(setup)
    assert len(checks) == 2
    for check in checks:
        assert check.passed
        assert check.difference > 1e-4  # it is not float32
    weight = setup.model(OURS, torch.bfloat16).class_predictor.weight
    with torch.no_grad():
        weight *= 1.2
    try:
        assert [check.passed for check in benchmark_checks.check_bf16(setup)] == [False, True]
    finally:
        benchmark_setup.load_model.cache_clear()


@pytest.mark.parametrize(
    ("capabilities", "cpu_info", "has_products"),
    [
        ({"avx512_bf16": True}, "", True),
        ({"amx_bf16": True, "avx512_bf16": False}, "", True),
        ({"avx512_bf16": False}, "flags\t\t: fpu avx2 avx512f\n", False),
        ({}, "flags\t\t: fpu avx512_bf16 x\n", True),
        ({}, "Features\t: fp asimd bf16\n", True),
        ({}, "model name\t: bf16 by name alone\nflags\t\t: fpu\n", False),
    ],
)
def test_bf16_is_measured_where_the_processor_has_it(capabilities, cpu_info, has_products, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(benchmark_measure, "cpu_info", lambda: cpu_info)
    expected = "" if has_products else "not measured: this CPU has no bf16 products"
    assert benchmark_measure.lacks_bf16_products() == expected


def test_bf16_line_says_that_it_was_not_measured(monkeypatch, capsys, memory_is_known):
    reason = "not measured: this CPU has no bf16 products"
    monkeypatch.setitem(CASES, "forward-bf16", CASES["forward-bf16"]._replace(missing=lambda: reason))
    assert benchmark.main(["--size", "tiny", "--only", "forward-bf16"]) == 0
    times, memory = tables(capsys.readouterr().out)
    assert times[2][2] == memory[2][2] == reason
    assert memory_is_known == []


# --- memory ---


def test_processes_have_a_limit_and_say_so(setup, repository, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(repository))
    crowded = setup._replace(targets=60, height=2048, width=2048, batch=1)  # targets of 1 GB as float32
    answer = benchmark.measure_in_fresh_process("transformers", "training-60", crowded, threads=1, limit=10**9)
    if sys.platform == "linux":
        assert answer == OutOfMemory(10**9)
        assert str(answer) == "out of memory at 1 GB"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no signals to be killed by")
def test_a_killed_process_had_too_little_memory(setup, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.touch(0o755)
    monkeypatch.setattr(benchmark.sys, "executable", str(python))
    for end in ("kill -9 $$", "echo std::bad_alloc >&2; kill -6 $$"):
        python.write_text(f"#!/bin/sh\n{end}\n")
        assert benchmark.measure_in_fresh_process("m2f_hf", "forward", setup, 1, limit=5) == OutOfMemory(5)
    python.write_text("#!/bin/sh\nkill -11 $$\n")
    with pytest.raises(RuntimeError, match="memory of m2f_hf's forward failed"):
        benchmark.measure_in_fresh_process("m2f_hf", "forward", setup, 1, limit=5)


def test_other_errors_are_no_lack_of_memory():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60)
    assert benchmark_measure.is_out_of_memory(failed.value)
    assert benchmark_measure.is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as failed:
        torch.eye(2) @ torch.eye(3)
    assert not benchmark_measure.is_out_of_memory(failed.value)
    assert not benchmark_measure.is_out_of_memory(ValueError("cannot allocate a seat"))


def test_the_one_that_fits_is_still_measured(monkeypatch, capsys):
    """The other is neither timed nor compared: it would take this process, and the machine, down."""

    def measure(implementation, *request):
        return OutOfMemory(3 * 10**9) if implementation == "transformers" else (KNOWN, Times([], []))

    monkeypatch.setattr(benchmark, "measure_in_fresh_process", measure)
    unusable = THEIRS._replace(deformable_attention=None)
    monkeypatch.setitem(benchmark_setup.IMPLEMENTATIONS, "transformers", unusable)
    monkeypatch.setattr(benchmark_checks, "THEIRS", unusable)
    assert benchmark.main(["--size", "tiny", "--only", "deformable", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    times, memory = tables(printed)
    assert times[2][1] == memory[2][1] == "out of memory at 3 GB"
    assert float(times[2][2]) > 0
    assert "outputs were not compared: out of memory" in printed


def test_targets_come_as_each_processor_makes_them(setup):
    theirs, ours = setup.labels(THEIRS), setup.labels(OURS)
    assert theirs["mask_labels"][0].dtype == torch.float32
    assert ours["mask_labels"][0].dtype == torch.bool
    for name in ("mask_labels", "class_labels"):
        for a, b in zip(theirs[name], ours[name], strict=True):
            assert torch.equal(a, b.to(a.dtype))
    assert theirs["mask_labels"][0].shape == (setup.targets, setup.height, setup.width)
    assert 0.05 < theirs["mask_labels"][0].mean() < 0.9


# --- curves ---


def test_growth_is_the_power():
    assert growth([(x, 3 * x**1.5) for x in (1, 2, 5, 10)]) == pytest.approx(1.5)
    assert growth([(2, 7), (4, 7), (8, 7)]) == pytest.approx(0)
    assert growth([(1, 0.5), (2, 2), (4, 4)], least=1) == pytest.approx(1)
    assert growth([(1, 2), (1, 3)]) is growth([(4, 2)]) is growth([]) is None


def test_numbers_on_an_axis_are_short():
    assert [short_number(x) for x in (8, 100, 1000, 16384, 999_900, 4_915_200)] == [
        *("8", "100", "1k", "16.4k", "1M"),
        "4.92M",
    ]


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(benchmark, "draw_curves", lambda panels, output: None)


@pytest.fixture
def small_curves(monkeypatch):
    """Two that meet in a point."""
    for name in ("area", "batch"):
        monkeypatch.setitem(CURVES, name, CURVES[name]._replace(tiny_values=(32, 64) if name == "area" else (1, 2)))
    return ["--size", "tiny", "--only", "area,batch"]


def test_curves_are_measured_drawn_and_continued(small_curves, tmp_path, capsys, memory_is_known):
    path = tmp_path / "curves.json"
    assert benchmark.main([*small_curves, "--curves", str(path)]) == 0
    assert len(memory_is_known) == 2 * 3  # one of the four points is in both curves
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width >= picture.height > 100
    (table,) = tables(capsys.readouterr().out)
    assert [line[0] for line in table[2:]] == ["forward, of pixels", "forward, of images"]
    assert table[2][1:3] == ["1.00", "1.00"]  # time as `memory_is_known` made it up
    document = json.loads(path.read_text(encoding="utf-8"))
    assert len(document["points"]) == 6
    assert all(check["passed"] for checks in document["checks"].values() for check in checks)

    del document["points"][next(key for key in document["points"] if "m2f_hf" in key)]
    path.write_text(json.dumps(document))
    memory_is_known.clear()
    assert benchmark.main([*small_curves, "--curves", str(path)]) == 0
    assert [implementation for implementation, *_ in memory_is_known] == ["m2f_hf"]


def test_curves_keep_a_difference_in_mind(small_curves, tmp_path, capsys, monkeypatch, memory_is_known, no_picture):
    """A run that continues has nothing to compare any more, and must not pass for that."""
    path = tmp_path / "curves.json"
    wrong = CASES["forward"]._replace(check=lambda setup: [Check("forward: logits", float("nan"), 1.0)])
    monkeypatch.setitem(CASES, "forward", wrong)
    for _ in range(2):
        assert benchmark.main([*small_curves, "--curves", str(path)]) == 1
        assert "forward: logits" in capsys.readouterr().err


def test_points_of_other_settings_are_not_mixed(small_curves, tmp_path, capsys, memory_is_known, no_picture):
    path = tmp_path / "curves.json"
    assert benchmark.main([*small_curves, "--curves", str(path)]) == 0
    before = path.read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        benchmark.main([*small_curves, "--curves", str(path), "--threads", "2"])
    assert "was measured with threads 1 (now 2)" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("content", ["", "[]", '{"lines": []}'])
def test_another_file_is_not_written_over(content, tmp_path, capsys):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--size", "tiny", "--curves", str(path)])
    assert "was not written by --curves" in capsys.readouterr().err
    assert path.read_text() == content


def test_what_ran_out_of_memory_is_left_out_of_the_picture(tmp_path, monkeypatch, capsys, no_picture):
    def measure(implementation, case, setup, *request):
        if implementation == "transformers" and setup.result_height > 48:
            return OutOfMemory(10**9)
        return KNOWN, Times([1.0], [1.0])

    monkeypatch.setattr(benchmark, "measure_in_fresh_process", measure)
    path = tmp_path / "curves.json"
    assert benchmark.main(["--size", "tiny", "--only", "result", "--curves", str(path)]) == 0
    assert tables(capsys.readouterr().out)[0][2][1:] == ["–", "0.00", "–", "0.00"]
    points = json.loads(path.read_text())["points"]
    assert sum(point == {"missing": "out of memory at 1 GB"} for point in points.values()) == 2


def test_every_curve_has_three_sizes_and_its_models_run(tmp_path):
    arguments = benchmark.parse_arguments(["--size", "tiny"])
    checkpoints = {}
    for name, curve in CURVES.items():
        setups = benchmark_curves.curve_setups(name, arguments)
        places = [curve.x(setup) for setup in setups]
        assert len(places) >= 3
        assert places == sorted(set(places))
        queries = setups[0].queries
        if queries not in checkpoints:
            checkpoints[queries] = benchmark_setup.save_checkpoint("tiny", tmp_path / str(queries), 0, queries)
        smallest = setups[0]._replace(weights=checkpoints[queries])
        CASES[curve.case].prepare(OURS, smallest)()
    benchmark_setup.load_model.cache_clear()


def test_picture_takes_missing_and_tiny_values(tmp_path):
    empty = Panel("a", "b", {"m2f_hf": [(1, 2.0), (2, 3.0)], "transformers": []}, {"m2f_hf": [(1, 0.0), (2, 5.0)]})
    draw_curves([empty], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert "| a, of b | 0.58 | – | – | – |" in growth_table(
        [empty._replace(mebibytes={"m2f_hf": [], "transformers": []})]
    )


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "100"], "--height 100 must be a positive multiple of 32"),
        (["--width", "0"], "--width 0 must be"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--threads", "-1"], "--threads -1 must be at least 1"),
        (["--only", "forward,backward"], "backward unknown; choose from forward"),
        (["--only", "area"], "area unknown; choose from forward"),
        (["--only", "forward", "--curves", "x.json"], "forward unknown; choose from area"),
        (["--curves", "x.png"], "x.png must end in .json"),
        (["--curves", "no/such/folder/x.json"], "folder no/such/folder does not exist"),
        (["--memory-limit", "0"], "--memory-limit 0.0 must be more than 0"),
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
        benchmark.measure_in_fresh_process("m2f_hf", "forward", setup, threads=1, limit=None)
