"""Compare with `transformers`' Mask2Former on a CPU: time, peak memory and outputs, in one run.

    python benchmarks/cpu.py --size swin-t --threads 1 --output table.md --json table.json
    python benchmarks/cpu.py --only 'forward,training-*' --repeats 3
    python benchmarks/cpu.py --only forward,training-10 --against ../before    # this checkout and another, in turns
    python benchmarks/cpu.py --only forward,training-10 --kernels              # each kernel off, in turns with all on

Every implementation loads the same random weights and gets the same inputs, in a process of its own. Peak memory is
that of the process's first run; then the processes take turns, and medians are reported. Outputs are compared in the
same run, and the exit status is 1 if they differ by more than allowed.
"""

import argparse
import functools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from cases import (
    IMPLEMENTATIONS,
    OURS,
    SIZES,
    THEIRS,
    Implementation,
    Setup,
    four_thirds,
    prepare_bf16,
    prepare_end_to_end,
    prepare_forward,
    prepare_post_processing,
    prepare_training,
    save_checkpoint,
)
from equality import Check, check_bf16, check_end_to_end, check_forward, check_training
from measuring import (
    Memory,
    is_out_of_memory,
    kernel_off,
    lacks_bf16_products,
    limit_memory,
    list_kernels,
    measure_memory,
    measure_product_rate,
    processor_name,
    says_out_of_memory,
    time_once,
)
from report import Line, as_json, check_fields, read_check, render, write_file
from tqdm.auto import tqdm

import m2f_hf


# --- what is measured ---


class Case(NamedTuple):
    """One line of the table.

    Args:
        title: what the reader sees, with fields of the setup.
        prepare: makes a function without arguments, which is what is measured.
        check: compares the outputs; None where they differ by design, or another line compares them.
        at: a setup -> the same with the line's own sizes.
        is_timed: False where memory is the question.
        missing: why this machine cannot measure it; empty where it can.
    """

    title: str
    prepare: Callable[[Implementation, Setup], Callable[[], Any]]
    check: Callable[[Setup], list[Check]] | None = None
    at: Callable[[Setup], Setup] = lambda setup: setup
    is_timed: bool = True
    missing: Callable[[], str] = str


def _learning(targets: int, setup: Setup) -> Setup:
    side = SIZES[setup.size].training_side
    return setup._replace(height=side, width=side, batch=2, targets=targets)


def _crowded(setup: Setup) -> Setup:
    side = SIZES[setup.size].crowded_side
    return setup._replace(height=side, width=side, batch=1, targets=300)


def _result(height: int, setup: Setup) -> Setup:
    return setup._replace(result_height=height)


_TRAINING = "training step, {0.batch} × {0.height}×{0.width}, {0.targets} targets an image"
CASES = {
    "forward": Case("forward, {0.batch} × {0.height}×{0.width}", prepare_forward, check_forward),
    "forward-bf16": Case(
        "forward, m2f_hf in bf16, transformers in fp32", prepare_bf16, check_bf16, missing=lacks_bf16_products
    ),
    "end-to-end": Case("JPEG file → panoptic segments, {0.result_height}×{1}", prepare_end_to_end, check_end_to_end),
    **{
        task + suffix: Case(
            f"{task} post-processing, {height}×{four_thirds(height)}",
            functools.partial(prepare_post_processing, task),
            at=functools.partial(_result, height),
        )
        for suffix, height in (("", 480), ("-3000x4000", 3000))
        for task in ("panoptic", "instance", "semantic")
    },
    **{
        f"training-{targets}": Case(_TRAINING, prepare_training, check_training, functools.partial(_learning, targets))
        for targets in (10, 60)
    },
    "training-10-autocast": Case(
        _TRAINING + ", under bf16 autocast",
        functools.partial(prepare_training, autocast=True),
        at=functools.partial(_learning, 10),
        missing=lacks_bf16_products,
    ),
    "training-300": Case(_TRAINING, prepare_training, check_training, _crowded, is_timed=False),
}
LARGE = [*(name for name in CASES if name.endswith("-3000x4000")), "training-300"]


# --- a process for each implementation ---


class WorkerError(Exception):
    """A process could not do what it was asked; `is_memory` where it ran out of memory."""

    def __init__(self, message: str, is_memory: bool = False) -> None:
        super().__init__(message)
        self.is_memory = is_memory


class Worker:
    """A process that has loaded one implementation and runs one case whenever it is asked.

    Args:
        what: for error messages.
        request: `case`, `setup`, `threads`, `limit` (bytes, or None), `implementation` (None: nothing is prepared) and
            `off` (the kernel that is off all the time, or None).
        checkout: folder from which the process imports `m2f_hf`; None for the same as here.
    """

    def __init__(self, what: str, request: Mapping[str, Any], checkout: Path | None = None) -> None:
        self.what, self.limit = what, request["limit"]
        environment = {**os.environ, "PYTHONPATH": str((checkout or Path(m2f_hf.__file__).parents[1]).resolve())}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(request)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, bufsize=1
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()

    def ask(self, do: str, off: str | None = None) -> Any:
        """Return the answer to "memory", "time", "check", "kernels" or "origin"; `off` names a kernel.

        Raises:
            WorkerError: with the end of what the process wrote.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, "off": off}) + "\n")
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            found = json.loads(answer)
            if found != OUT_OF_MEMORY:
                return found
        status = self.process.wait(60)
        self.errors.seek(0)
        errors = self.errors.read()[-2000:]
        # Killed by the kernel, whose memory came to an end before the limit, or stopped where nothing could be raised.
        if answer or status == -signal.SIGKILL or (status < 0 and says_out_of_memory(errors)):
            at = f" at {self.limit / 1e9:.3g} GB" if self.limit is not None else ""
            raise WorkerError(f"out of memory{at}", is_memory=True)
        raise WorkerError(f"{self.what} failed with status {status}:\n{errors}")


OUT_OF_MEMORY = "out of memory"


class Server:
    """The other end of a `Worker`: loads what the request names when it is first needed, and answers."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.request, self.case, self.setup = request, CASES[request["case"]], Setup(*request["setup"])
        self.run: Callable[[], Any] | None = None

    def answer(self, do: str, off: str | None = None) -> Any:
        if do == "kernels":
            return list(list_kernels())
        if do == "origin":
            return m2f_hf.__file__
        if do == "check":
            return [check_fields(check) for check in self.case.check(self.setup)] if self.case.check is not None else []
        with kernel_off(self.request["off"] or off):
            if self.run is None:
                self.run = self.case.prepare(IMPLEMENTATIONS[self.request["implementation"]], self.setup)
            return measure_memory(self.run) if do == "memory" else time_once(self.run)


def serve(text: str) -> None:
    """Answer what `Worker.ask` asks for on the standard input, line by line."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    request = json.loads(text)
    torch.set_num_threads(request["threads"])
    if request["limit"] is not None:
        limit_memory(request["limit"])
    server = Server(request)
    for line in sys.stdin:
        try:
            answer = server.answer(**json.loads(line))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            answer = OUT_OF_MEMORY
        print(json.dumps(answer), file=channel, flush=True)
        if answer == OUT_OF_MEMORY:
            return


# --- line by line ---


def start_worker(name: str, setup: Setup, arguments: argparse.Namespace, who: str | None, **more: Any) -> Worker:
    """Start the process of an implementation for a case."""
    request = {
        "case": name,
        "setup": setup,
        "threads": arguments.threads,
        "limit": arguments.memory_limit,
        "off": more.pop("off", None),
    }
    what = f"{who or 'comparing the outputs'}, {name}"
    before = arguments.against if who == BEFORE else None
    return Worker(what, request | {"implementation": OURS.name if who == BEFORE else who}, before)


BEFORE = "m2f_hf, before"


def measure_line(name: str, setup: Setup, arguments: argparse.Namespace) -> tuple[Line, list[Check]]:
    """Measure one case with every implementation, and compare the outputs."""
    case = CASES[name]
    setup = case.at(setup)
    line = Line(name, case.title.format(setup, four_thirds(setup.result_height)))
    if case.missing():
        return line._replace(missing={"": case.missing()}), []
    if arguments.kernels:
        return measure_kernels(line, setup, arguments), []
    names = [THEIRS.name, *([BEFORE] if arguments.against is not None else []), OURS.name]
    memory, missing, notes = {}, {}, []
    seconds: dict[str, list[float]] = {}
    wall: dict[str, list[float]] = {}
    with ExitStack() as stack:
        workers = {}
        for who in names:
            worker = stack.enter_context(start_worker(name, setup, arguments, who))
            if who == BEFORE and not Path(worker.ask("origin")).is_relative_to(arguments.against.resolve()):
                raise WorkerError(f"{who}: m2f_hf comes from {worker.ask('origin')}")
            try:
                memory[who] = Memory(*worker.ask("memory"))
            except WorkerError as error:
                if not error.is_memory:
                    raise
                missing[who] = str(error)
                continue
            workers[who] = worker
        for _ in range(arguments.repeats if case.is_timed else 0):
            for who, worker in workers.items():
                cpu, clock = worker.ask("time")
                seconds.setdefault(who, []).append(cpu)
                wall.setdefault(who, []).append(clock)
    checks: list[Check] = []
    if case.check is not None:
        try:
            if missing:
                raise WorkerError("", is_memory=True)
            with start_worker(name, setup, arguments, None) as worker:
                checks = [read_check(fields) for fields in worker.ask("check")]
        except WorkerError as error:
            if not error.is_memory:
                raise
            notes.append("outputs were not compared: out of memory")
    return line._replace(seconds=seconds, wall=wall, memory=memory, missing=missing, notes=notes), checks


def measure_kernels(line: Line, setup: Setup, arguments: argparse.Namespace) -> Line:
    """Measure a case with each kernel off in turns with all on, memory in a fresh process for each."""
    seconds: dict[str, list[float]] = {}
    wall: dict[str, list[float]] = {}
    memory = {}
    with start_worker(line.name, setup, arguments, OURS.name) as worker:
        kernels = {**{f"without {kernel}": kernel for kernel in [*worker.ask("kernels"), "all"]}, OURS.name: None}
        for off in kernels.values():
            worker.ask("time", off=off)
        for _ in range(arguments.repeats):
            for who, off in kernels.items():
                cpu, clock = worker.ask("time", off=off)
                seconds.setdefault(who, []).append(cpu)
                wall.setdefault(who, []).append(clock)
    for who, off in kernels.items():
        with start_worker(line.name, setup, arguments, OURS.name, off=off) as worker:
            memory[who] = Memory(*worker.ask("memory"))
    return line._replace(seconds=seconds, wall=wall, memory=memory)


def machine_facts(arguments: argparse.Namespace) -> dict[str, str]:
    """Return what a reader has to know of the machine and the run."""
    config = SIZES[arguments.size].config()
    rates = [("float32", torch.float32)] + ([] if lacks_bf16_products() else [("bfloat16", torch.bfloat16)])
    speeds = ", ".join(f"{measure_product_rate(dtype) / 1e9:.3g} GFLOP in {name}" for name, dtype in rates)
    found = {
        "processor": f"{processor_name()}, {arguments.threads} thread(s) used; in a second of CPU time {speeds} "
        f"(matrix products); load average {os.getloadavg()[0]:.1f} at the start",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, m2f_hf {m2f_hf.__version__}",
        "model": f"{arguments.size}, {config.num_queries} queries, {config.num_labels} classes, random weights",
        "repetitions": f"{arguments.repeats} after a first run, taking turns; medians",
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    return found | ({BEFORE: str(arguments.against)} if arguments.against is not None else {})


def run(arguments: argparse.Namespace, weights: str) -> tuple[dict[str, str], list[Line], list[Check]]:
    """Measure and compare everything asked for."""
    facts = machine_facts(arguments)
    setup = Setup(arguments.size, arguments.height, arguments.width, arguments.batch, arguments.seed, weights)
    setup = setup._replace(result_height=SIZES[arguments.size].photo_height)
    lines, checks = [], []
    for name in (progress := tqdm(arguments.cases, unit="line", disable=None)):
        progress.set_description(name)
        line, found = measure_line(name, setup, arguments)
        lines.append(line)
        checks += found
    return facts, lines, checks


# --- command line ---


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="swin-t", help="model (default: swin-t)")
    parser.add_argument("--height", type=int, help="of the input, a multiple of 32 (default: 800; tiny: 64)")
    parser.add_argument("--width", type=int, help="of the input, a multiple of 32 (default: 1216; tiny: 96)")
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument("--only", help=f"comma-separated, with * and ?, of {', '.join(CASES)}")
    parser.add_argument("--large", action="store_true", help=f"also {', '.join(LARGE)} (about 16 GB of memory)")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout of m2f_hf to measure in turns")
    parser.add_argument("--kernels", action="store_true", help="measure m2f_hf with each kernel off instead")
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="of a process (default: none; on Linux only)",
    )
    parser.add_argument("--output", type=Path, help="write the Markdown here, too")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    size = SIZES[arguments.size]
    arguments.height = size.height if arguments.height is None else arguments.height
    arguments.width = size.width if arguments.width is None else arguments.width
    for name in ("height", "width"):
        if getattr(arguments, name) < 32 or getattr(arguments, name) % 32:
            parser.error(f"--{name} {getattr(arguments, name)} must be a positive multiple of 32")
    for name in ("batch", "threads", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    if arguments.memory_limit is not None:
        if not arguments.memory_limit > 0:
            parser.error(f"--memory-limit {arguments.memory_limit} must be more than 0")
        arguments.memory_limit = int(arguments.memory_limit * 1e9)
    if arguments.against is not None and not (arguments.against / "m2f_hf" / "__init__.py").is_file():
        parser.error(f"--against: {arguments.against} has no folder m2f_hf: give the root of a checkout")
    if arguments.against is not None and arguments.kernels:
        parser.error("--kernels and --against are two runs")
    patterns = arguments.only.split(",") if arguments.only else ["*"]
    unknown = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in CASES)]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} unknown; choose from {', '.join(CASES)}")
    wanted = [name for name in CASES if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if arguments.only is None and not arguments.large:
        wanted = [name for name in wanted if name not in LARGE]
    arguments.cases = wanted
    for name in ("output", "json"):
        path = getattr(arguments, name)
        if path is not None and not path.parent.is_dir():
            parser.error(f"--{name}: the folder {path.parent} does not exist")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.worker is not None:
        serve(arguments.worker)
        return 0
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        facts, lines, checks = run(arguments, save_checkpoint(arguments.size, folder, arguments.seed))
    table = render(facts, lines, checks, OURS.name)
    print(table)
    if arguments.output is not None:
        write_file(arguments.output, table)
    if arguments.json is not None:
        write_file(arguments.json, as_json(facts, lines, checks))
    failed = [check.what for check in checks if not check.passed]
    if failed:
        print(f"error: outputs differ by more than allowed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
