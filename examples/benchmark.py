"""Compare with `transformers`' Mask2Former: CPU time, wall time, peak memory and outputs, in one run.

    python examples/benchmark.py --size swin-t --threads 1 --output table.md --json table.json
    python examples/benchmark.py --size r50 --only 'forward,training-*' --repeats 3
    python examples/benchmark.py --size r50 --curves curves.json

Both implementations load the same random weights, written by `transformers`, and get the same inputs. They take turns,
after a warm-up, and medians are reported. Peak memory is measured in a fresh process for each implementation and
measurement. Where outputs should be equal they are compared in the same run, and the exit status is 1 if they are not.
What the matrix products alone would cost is counted and measured beside it. With `--curves`, how cost grows with the
image, the batch, targets, queries and the result: a JSON file, which a second run continues, and a picture beside it.
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from benchmark_checks import (
    Check,
    check_bf16,
    check_deformable,
    check_end_to_end,
    check_forward,
    check_pixel_mask,
    check_training,
)
from benchmark_curves import (
    CURVES,
    PointFile,
    curve_panel,
    curve_setups,
    draw_curves,
    growth_table,
    point_key,
)
from benchmark_measure import (
    PRODUCT_SHAPES,
    Memory,
    OutOfMemory,
    Rate,
    Times,
    available_memory,
    count_products,
    is_out_of_memory,
    lacks_bf16_products,
    limit_memory,
    measure_memory,
    measure_product_rate,
    measure_times,
    processor_name,
    says_out_of_memory,
)
from benchmark_runs import (
    describe_end_to_end,
    prepare_bf16,
    prepare_deformable,
    prepare_end_to_end,
    prepare_forward,
    prepare_pixel_mask,
    prepare_post_processing,
    prepare_training,
)
from benchmark_setup import IMPLEMENTATIONS, SIZES, Implementation, Setup, four_thirds, load_model, save_checkpoint
from benchmark_tables import Row, as_json, check_fields, render, write_file
from tqdm.auto import tqdm

import m2f_hf


RESULT_HEIGHTS = {"": 480, "-3000x4000": 3000}  # of post-processing; all pictures are 4:3


# --- what is measured ---


def _same(setup: Setup) -> Setup:
    return setup


def _learning(targets: int, setup: Setup) -> Setup:
    side = SIZES[setup.size].training_side
    return setup._replace(height=side, width=side, batch=2, targets=targets)


def _crowded(setup: Setup) -> Setup:
    side = SIZES[setup.size].crowded_side
    return setup._replace(height=side, width=side, batch=1, targets=300)


def _result(height: int, setup: Setup) -> Setup:
    return setup._replace(result_height=height)


class Case(NamedTuple):
    """One line of the tables.

    Args:
        title: what the reader sees, with fields of the setup.
        prepare: makes a function without arguments, which is what is measured.
        check: compares the outputs; None where they differ by design.
        at: sizes of the line's own.
        has_products: whether to tell what the matrix products alone would cost,
        dtype: in this precision.
        is_timed: False where memory is the question, and this process is kept from taking as much.
        missing: why this machine cannot measure it; empty where it can.
        describe: what else the reader should know.
    """

    title: str
    prepare: Callable[[Implementation, Setup], Callable[[], Any]]
    check: Callable[[Setup], list[Check]] | None = None
    at: Callable[[Setup], Setup] = _same
    has_products: bool = False
    dtype: torch.dtype = torch.float32
    is_timed: bool = True
    missing: Callable[[], str] = str
    describe: Callable[[Setup], str] | None = None


_TRAINING = "training step (forward, loss, backward), {0.batch} × {0.height}×{0.width}, {0.targets} targets an image"
_PHOTO = "image file → panoptic segments, {1.photo}, "

# Training comes last: it moves the statistics of batch norms.
CASES = {
    "forward": Case("forward", prepare_forward, check_forward, has_products=True),
    "forward-bf16": Case(
        "forward, m2f_hf in bf16, transformers in fp32",
        prepare_bf16,
        check_bf16,
        has_products=True,
        dtype=torch.bfloat16,
        missing=lacks_bf16_products,
    ),
    "pixel-mask": Case("forward with `pixel_mask`", prepare_pixel_mask, check_pixel_mask),
    "deformable": Case("deformable attention alone", prepare_deformable, check_deformable),
    "end-to-end": Case(
        _PHOTO + "equal network input",
        functools.partial(prepare_end_to_end, True),
        check_end_to_end,
        describe=functools.partial(describe_end_to_end, True),
    ),
    "end-to-end-own": Case(
        _PHOTO + "each library's own settings",
        functools.partial(prepare_end_to_end, False),
        describe=functools.partial(describe_end_to_end, False),
    ),
    **{
        task + suffix: Case(
            f"{task} post-processing, {height}×{four_thirds(height)}",
            functools.partial(prepare_post_processing, task),
            at=functools.partial(_result, height),
        )
        for suffix, height in RESULT_HEIGHTS.items()
        for task in ("panoptic", "instance", "semantic")
    },
    **{
        f"training-{targets}": Case(
            _TRAINING, prepare_training, check_training, functools.partial(_learning, targets), has_products=True
        )
        for targets in (10, 60)
    },
    "training-300": Case(_TRAINING, prepare_training, check_training, _crowded, is_timed=False),
}
LARGE = [*(name for name in CASES if name.endswith("-3000x4000")), "training-300"]


# --- in a process of its own ---


def ask_fresh_process(what: str, request: dict[str, Any], limit: int | None) -> Any:
    """What `serve_request` answers in a process that has done nothing else; `OutOfMemory` where it could not.

    Args:
        what: for the error message.
        request: see `serve_request`.
        limit: bytes that the process may take; None for nine tenths of what is free now, so that it cannot take the
            machine down.
    """
    available = available_memory() if limit is None else None
    limit = limit if available is None else available * 9 // 10
    command = [sys.executable, str(Path(__file__).resolve()), "--request", json.dumps(request | {"limit": limit})]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    # Killed by the kernel, whose memory came to an end before the limit, or stopped where nothing could be raised.
    if result.returncode == -signal.SIGKILL or (result.returncode < 0 and says_out_of_memory(result.stderr[-2000:])):
        return OutOfMemory(limit)
    if result.returncode != 0:
        raise RuntimeError(f"{what} failed:\n{result.stderr[-2000:]}")
    answer = json.loads(result.stdout.splitlines()[-1])
    return OutOfMemory(limit) if answer == OUT_OF_MEMORY else answer


OUT_OF_MEMORY = "out of memory"


def serve_request(text: str) -> None:
    """In the fresh process: do what is asked and print the answer.

    The request's `do` is "memory" (of one run; with `repeats`, then also times) or "check" (the outputs).
    """
    asked = json.loads(text)
    torch.set_num_threads(asked["threads"])
    if asked["limit"] is not None:
        limit_memory(asked["limit"])
    case, setup = CASES[asked["case"]], Setup(*asked["setup"])
    answer: Any
    try:
        if asked["do"] == "check":
            answer = case.check(setup) if case.check is not None else []
        else:
            run = case.prepare(IMPLEMENTATIONS[asked["implementation"]], setup)
            memory = measure_memory(run)
            times = measure_times({"": run}, asked["repeats"], warm_up=0)[""]
            answer = [memory, times]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        answer = OUT_OF_MEMORY
    print(json.dumps(answer))


def measure_in_fresh_process(
    implementation: str, case: str, setup: Setup, threads: int, limit: int | None, repeats: int = 0
) -> tuple[Memory, Times] | OutOfMemory:
    """Memory of the first run, and times of `repeats` more."""
    request = {"do": "memory", "implementation": implementation, "case": case, "setup": setup, "threads": threads}
    answer = ask_fresh_process(
        f"measuring the memory of {implementation}'s {case}", request | {"repeats": repeats}, limit
    )
    return answer if isinstance(answer, OutOfMemory) else (Memory(*answer[0]), Times(*answer[1]))


def check_in_fresh_process(case: str, setup: Setup, threads: int, limit: int | None) -> list[Check] | OutOfMemory:
    request = {"do": "check", "case": case, "setup": setup, "threads": threads}
    answer = ask_fresh_process(f"comparing the outputs of {case}", request, limit)
    return answer if isinstance(answer, OutOfMemory) else [Check(*check) for check in answer]


# --- line by line ---


def machine_facts(arguments: argparse.Namespace) -> dict[str, str]:
    config = SIZES[arguments.size].config()
    return {
        "processor": f"{processor_name()}, {os.cpu_count()} logical cores, {arguments.threads} thread(s) used; "
        f"load average {os.getloadavg()[0]:.1f} at the start",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, m2f_hf {m2f_hf.__version__}",
        "model": f"{arguments.size}: {config.backbone_config.model_type} backbone, {config.num_queries} queries, "
        f"{config.num_labels} classes, random weights (seed {arguments.seed}), float32",
        "input": f"{arguments.batch} × {arguments.height}×{arguments.width}, where a line has no size of its own",
        "repetitions": f"{arguments.repeats} after a warm-up, taking turns; medians",
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def measure_line(name: str, setup: Setup, arguments: argparse.Namespace, tell: Callable[[str], None]) -> tuple:
    """Everything of one case: its row without the floor, and its checks."""
    case, setup = CASES[name], CASES[name].at(setup)
    title = case.title.format(setup, SIZES[setup.size])
    if case.missing():
        return Row(name, title, missing=case.missing()), []
    tell(f"{title}: memory")
    notes = [case.describe(setup)] if case.describe is not None else []
    memory: dict[str, Memory | OutOfMemory] = {}
    for implementation in IMPLEMENTATIONS:
        answer = measure_in_fresh_process(implementation, name, setup, arguments.threads, arguments.memory_limit)
        memory[implementation] = answer if isinstance(answer, OutOfMemory) else answer[0]
    fitting = {key: value for key, value in IMPLEMENTATIONS.items() if isinstance(memory[key], Memory)}
    checks: list[Check] | OutOfMemory = []
    if case.check is not None and len(fitting) == len(IMPLEMENTATIONS):
        tell(f"{title}: outputs")
        if case.is_timed:
            checks = case.check(setup)
        else:
            checks = check_in_fresh_process(name, setup, arguments.threads, arguments.memory_limit)
    if isinstance(checks, OutOfMemory) or (case.check is not None and len(fitting) < len(IMPLEMENTATIONS)):
        notes.append("outputs were not compared: out of memory")
        checks = []
    if not case.is_timed:
        return Row(name, title, memory, notes=notes), checks
    runs = {key: case.prepare(implementation, setup) for key, implementation in fitting.items()}
    tell(f"{title}: time")
    times = measure_times(runs, arguments.repeats)
    products = {}
    if case.has_products:
        tell(f"{title}: products")
        products = {key: count_products(run) for key, run in runs.items()}
        notes += [f"not counted in {key}: {name}" for key, product in products.items() for name in product.unknown]
    return Row(name, title, memory, times, products, notes=notes), checks


def run(arguments: argparse.Namespace, weights: str) -> tuple[dict[str, str], list[Row], list[Check]]:
    """Measure and compare everything asked for."""
    facts = machine_facts(arguments)
    setup = Setup(arguments.size, arguments.height, arguments.width, arguments.batch, arguments.seed, weights)
    rows, checks = [], []
    rates: dict[torch.dtype, Rate] = {}
    with tqdm(total=len(arguments.cases), unit="line", disable=None) as progress:
        for name in arguments.cases:
            row, line_checks = measure_line(name, setup, arguments, progress.set_description)
            if row.products:
                dtype = CASES[name].dtype
                if dtype not in rates:
                    rates[dtype] = measure_product_rate(dtype)
                fewest = min(product.operations for product in row.products.values())
                row = row._replace(floor=fewest / rates[dtype].cpu)
            rows.append(row)
            checks += line_checks
            progress.update()
    for dtype, rate in rates.items():
        name = str(dtype).removeprefix("torch.")
        facts[f"matrix products, {name}"] = (
            f"{rate.cpu / 1e9:.3g} GFLOP in a second of CPU time, {rate.wall / 1e9:.3g} of wall time (best of "
            f"{len(PRODUCT_SHAPES)} shapes)"
        )
    return facts, rows, checks


# --- how cost grows ---


def curve_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What points must have in common to stand in one picture, the package's code among it."""
    code = hashlib.sha256()
    for file in sorted(Path(m2f_hf.__file__).parent.rglob("*.py")):
        code.update(file.read_bytes())
    facts = machine_facts(arguments)
    return {
        "size": arguments.size,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "seed": arguments.seed,
        "processor": processor_name(),
        "versions": facts["versions"],
        "code": code.hexdigest()[:12],
    }


def run_curves(arguments: argparse.Namespace, folder: str) -> list[Check]:
    """Measure what the file lacks, compare outputs at each curve's smallest size, draw, and print the growth."""
    path = arguments.curves
    points = arguments.points
    checkpoints: dict[int | None, str] = {}

    def with_weights(setup: Setup) -> Setup:
        if setup.queries not in checkpoints:
            for weights in checkpoints.values():  # one at a time: they are large
                shutil.rmtree(weights)
            checkpoints.clear()
            load_model.cache_clear()
            checkpoints[setup.queries] = save_checkpoint(setup.size, folder, setup.seed, setup.queries)
        return setup._replace(weights=checkpoints[setup.queries])

    wanted = [(name, setup) for name in arguments.cases for setup in curve_setups(name, arguments)]
    with tqdm(total=len(wanted), unit="point", disable=None) as progress:
        for name, setup in wanted:
            curve = CURVES[name]
            progress.set_description(f"{curve.title}: {curve.x(setup)} {curve.axis}")
            check, key = CASES[curve.case].check, point_key(curve.case, setup)
            is_smallest = setup == curve_setups(name, arguments)[0]
            if check is not None and is_smallest and not points.has("checks", key):
                checks = [check_fields(result) for result in check(with_weights(setup))]
                load_model.cache_clear()
                points.add("checks", key, checks)
            for implementation in IMPLEMENTATIONS:
                key = point_key(curve.case, setup, implementation)
                if not points.has("points", key):
                    points.add("points", key, measure_point(implementation, curve.case, with_weights(setup), arguments))
            progress.update()
    panels = [curve_panel(name, arguments, points) for name in arguments.cases]
    table = growth_table(panels)
    print(table)
    if arguments.output is not None:
        write_file(arguments.output, table)
    draw_curves(panels, path.with_suffix(".png"))
    return [
        Check(field["what"], float(field["difference"]), field["tolerance"], field["note"])
        for fields in points.document["checks"].values()
        for field in fields
    ]


def measure_point(implementation: str, case: str, setup: Setup, arguments: argparse.Namespace) -> dict[str, Any]:
    answer = measure_in_fresh_process(
        implementation, case, setup, arguments.threads, arguments.memory_limit, arguments.repeats
    )
    if isinstance(answer, OutOfMemory):
        return {"missing": str(answer)}
    memory, times = answer
    return memory._asdict() | times._asdict()


# --- command line ---


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="swin-t", help="model (default: swin-t)")
    parser.add_argument("--height", type=int, help="of the input, a multiple of 32 (default: 800; tiny: 64)")
    parser.add_argument("--width", type=int, help="of the input, a multiple of 32 (default: 1216; tiny: 96)")
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--repeats", type=int, help="timed repetitions (default: 5; of curves 2)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument("--only", help=f"comma-separated, with * and ?, of {', '.join(CASES)}")
    parser.add_argument(
        "--large", action="store_true", help=f"also {', '.join(LARGE)} (they need about 16 GB of memory)"
    )
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="what a process that measures memory may take (default: nine tenths of what is free; only on Linux)",
    )
    parser.add_argument("--output", type=Path, help="write the Markdown here, too")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument(
        "--curves",
        type=Path,
        metavar="FILE.json",
        help="measure instead how cost grows, go on where an earlier run of this file stopped, and draw FILE.png",
    )
    parser.add_argument("--request", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    size = SIZES[arguments.size]
    arguments.height = size.height if arguments.height is None else arguments.height
    arguments.width = size.width if arguments.width is None else arguments.width
    if arguments.repeats is None:
        arguments.repeats = 5 if arguments.curves is None else 2
    for name in ("height", "width"):
        if getattr(arguments, name) < 32 or getattr(arguments, name) % 32:
            parser.error(f"--{name} {getattr(arguments, name)} must be a positive multiple of 32")
    for name in ("batch", "threads", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    if arguments.memory_limit is not None and not arguments.memory_limit > 0:
        parser.error(f"--memory-limit {arguments.memory_limit} must be more than 0")
    if arguments.memory_limit is not None:
        arguments.memory_limit = int(arguments.memory_limit * 1e9)
    choices = CASES if arguments.curves is None else CURVES
    patterns = arguments.only.split(",") if arguments.only else ["*"]
    unknown = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in choices)]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} unknown; choose from {', '.join(choices)}")
    wanted = [name for name in choices if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if arguments.only is None and arguments.curves is None and not arguments.large:
        wanted = [name for name in wanted if name not in LARGE]
    arguments.cases = wanted
    for name in ("output", "json", "curves"):
        path = getattr(arguments, name)
        if path is not None and not path.parent.is_dir():
            parser.error(f"--{name}: the folder {path.parent} does not exist")
    if arguments.curves is not None:
        if arguments.curves.suffix != ".json":
            parser.error(f"--curves: {arguments.curves} must end in .json")
        if importlib.util.find_spec("matplotlib") is None:
            parser.error('--curves draws with matplotlib: pip install "m2f_hf[train]"')
        try:
            arguments.points = PointFile(arguments.curves, curve_settings(arguments))
        except ValueError as error:
            parser.error(f"--curves: {error}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.request is not None:
        serve_request(arguments.request)
        return 0
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.curves is not None:
            checks = run_curves(arguments, folder)
        else:
            result = run(arguments, save_checkpoint(arguments.size, folder, arguments.seed))
            table, checks = render(*result), result[-1]
            print(table)
            if arguments.output is not None:
                write_file(arguments.output, table)
            if arguments.json is not None:
                write_file(arguments.json, as_json(*result))
    failed = [check.what for check in checks if not check.passed]
    if failed:
        print(f"error: outputs differ by more than allowed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
