"""Compare with `transformers`' Mask2Former on one GPU: kernels, forward pass, training step, results; in ten minutes.

    python examples/benchmark_gpu.py --output gpu.md --json gpu.json
    python examples/benchmark_gpu.py --only kernels,host
    python examples/benchmark_gpu.py --device cpu --tiny    # runs everything without a GPU; its figures mean nothing

Weights and inputs are those of `benchmark.py`, and outputs are compared in the same run: the exit status is 1 if they
differ by more than allowed or could not be compared. Implementations take turns after a warm-up, timed by CUDA events;
medians are reported. Each part runs in a process of its own, for its share of the time that is left, and what it
finished is kept, whatever happens to it or to later ones: too little memory or a failed compilation is a line of the
result.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmark_checks import Check
from benchmark_gpu_parts import PARTS, Contest, Pace, Report
from benchmark_measure import processor_name
from benchmark_setup import OURS, SIZES, THEIRS, Setup, save_checkpoint
from benchmark_tables import check_cells, markdown_table, write_file

import m2f_hf
from m2f_hf.kernels import triton_deformable_attention as kernels


LEAST_SECONDS = 15  # in which a part can start and measure something


# --- one part after another ---


def run_part(name: str, setup: Setup, pace: Pace, path: Path) -> None:
    """In the part's own process."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Convolutions would be rounded to TF32 by default and products not: then nothing could be compared.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    report = Report(path)
    with report.attempt(name):
        PARTS[name].run(setup, report, pace)


def run_part_in_fresh_process(name: str, setup: Setup, pace: Pace, path: Path, limit: float) -> None:
    """A kernel that goes wrong spoils the GPU for its process only, and one that hangs can be stopped."""
    request = json.dumps({"name": name, "setup": setup, "pace": pace, "path": str(path)})
    command = [sys.executable, str(Path(__file__).resolve()), "--request", request]
    log = path.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            Report(path).add("notes", f"stopped: its {limit:.0f} seconds are over")
        else:
            if status != 0:
                last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
                Report(path).add("failures", f"stopped with status {status}: {last[:200]}")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the compiler's workers, too
            process.wait()


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All parts; files are written after each."""
    start = time.monotonic()
    document: dict[str, Any] = {"facts": facts(arguments), "parts": {}}
    print(render_facts(document["facts"]))
    weights = save_checkpoint(arguments.size, folder, arguments.seed)
    size = SIZES[arguments.size]
    setup = Setup(arguments.size, size.height, size.width, 1, arguments.seed, weights, device=arguments.device)
    pace = Pace(0.0, least=1) if arguments.tiny else Pace()
    for index, name in enumerate(arguments.parts):
        left = arguments.budget - (time.monotonic() - start)
        shares = [PARTS[other].share for other in arguments.parts[index:]]
        path = folder / f"{name}.jsonl"
        if left < LEAST_SECONDS:
            Report(path).add("notes", "skipped: the time is over")
        else:
            run_part_in_fresh_process(name, setup, pace, path, max(LEAST_SECONDS, left * shares[0] / sum(shares)))
        document["parts"][name] = Report(path).read()
        print(render_part(name, document["parts"][name]), flush=True)
        if arguments.output is not None:
            write_file(arguments.output, render(document))
        if arguments.json is not None:
            write_file(arguments.json, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return document


def facts(arguments: argparse.Namespace) -> dict[str, str]:
    config = SIZES[arguments.size].config()
    found = {
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, m2f_hf {m2f_hf.__version__}, Triton "
        + (kernels.triton.__version__ if kernels.IS_AVAILABLE else "missing"),
        "model": f"{arguments.size}: {config.backbone_config.model_type} backbone, {config.num_queries} queries, "
        f"{config.num_labels} classes, random weights (seed {arguments.seed})",
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    if arguments.device == "cpu":
        return {"device": f"no GPU: {processor_name()}", **found}
    gpu = torch.cuda.get_device_properties(0)
    name = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, TF32 off; {processor_name()}"
    return {"device": name, **found}


# --- tables ---


def contest_cells(line: Contest, with_images: bool) -> list[str]:
    """Title; milliseconds of both and how many times faster; images a second; MiB of both and the share."""
    names = [*line.missing, *line.seconds]
    baseline = next(name for name in names if name != OURS.name)
    medians = {name: statistics.median(times) for name, times in line.seconds.items()}
    cells = [line.title]
    for name in (baseline, OURS.name):
        cells.append(f"{1e3 * medians[name]:.3g}" if name in medians else line.missing[name])
    if len(medians) == 2:
        ratios = [a / b for a, b in zip(line.seconds[baseline], line.seconds[OURS.name], strict=True)]
        cells.append(f"**{medians[baseline] / medians[OURS.name]:.2f}×** ({min(ratios):.2f}–{max(ratios):.2f})")
    else:
        cells.append("–")
    for name in (baseline, OURS.name) if with_images else ():
        cells.append(f"{line.images / medians[name]:.3g}" if line.images is not None and name in medians else "–")
    for name in (baseline, OURS.name):
        cells.append(f"{line.memory[name] / 2**20:,.0f}" if name in line.memory else "–")
    has_share = len(line.memory) == 2 and line.memory[baseline] > 0
    cells.append(f"**{line.memory[OURS.name] / line.memory[baseline]:.2f}**" if has_share else "–")
    return cells


def render_part(name: str, found: Mapping[str, Sequence[Any]]) -> str:
    parts = [f"## {PARTS[name].title}\n"]
    contests = [Contest(*line) for line in found["contests"]]
    if contests:
        theirs = "grid_sample" if "grid_sample" in {*contests[0].seconds, *contests[0].missing} else THEIRS.name
        names = [theirs, OURS.name]
        with_images = any(line.images is not None for line in contests)
        header = ["median milliseconds", *names, "faster (range)"]
        header += [f"images/s, {name}" for name in names] if with_images else []
        header += [*(f"MiB above idle, {name}" for name in names), "share"]
        parts.append(markdown_table(header, [contest_cells(line, with_images) for line in contests]))
    if found["checks"]:
        header = ["output", "largest difference", "allowed", "verdict", "note"]
        parts.append(markdown_table(header, [check_cells(as_check(fields)) for fields in found["checks"]]))
    lines = [
        *(f"- **failed:** {failure}\n" for failure in found["failures"]),
        *(f"- {note}\n" for note in found["notes"]),
    ]
    if lines:
        parts.append("".join(lines))
    return "\n".join(parts)


def as_check(fields: Mapping[str, Any]) -> Check:
    return Check(fields["what"], float(fields["difference"]), fields["tolerance"], fields["note"])


def render_facts(found: Mapping[str, str]) -> str:
    return "".join(f"- {name}: {value}\n" for name, value in found.items())


def render(document: Mapping[str, Any]) -> str:
    parts = [render_part(name, found) for name, found in document["parts"].items()]
    return "\n".join([render_facts(document["facts"]), *parts])


# --- command line ---


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sizes = [size for size in SIZES if size != "tiny"]
    parser.add_argument("--size", choices=sizes, default="swin-t", help="model (default: swin-t)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and a single repetition: does it all run?")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu goes with --tiny")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything (default: 540)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument("--output", type=Path, help="write the Markdown here, too")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.parts = list(PARTS) if arguments.only is None else arguments.only.split(",")
    unknown = [name for name in arguments.parts if name not in PARTS]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} unknown; choose from {', '.join(PARTS)}")
    for name in ("output", "json"):
        path = getattr(arguments, name)
        if path is not None and not path.parent.is_dir():
            parser.error(f"--{name}: the folder {path.parent} does not exist")
    if arguments.device == "cpu" and not arguments.tiny and arguments.request is None:
        parser.error("--device cpu goes with --tiny; benchmark.py measures on a CPU")
    if arguments.device == "cuda" and arguments.request is None and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU; `--device cpu --tiny` tries the script without one")
    arguments.size = "tiny" if arguments.tiny else arguments.size
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.request is not None:
        asked = json.loads(arguments.request)
        run_part(asked["name"], Setup(*asked["setup"]), Pace(*asked["pace"]), Path(asked["path"]))
        return 0
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        document = run(arguments, Path(folder))
    checks = [as_check(fields) for found in document["parts"].values() for fields in found["checks"]]
    differing = [check.what for check in checks if not check.passed]
    failures = [failure for found in document["parts"].values() for failure in found["failures"]]
    if differing:
        print(f"error: outputs differ by more than allowed: {'; '.join(differing)}", file=sys.stderr)
    if failures:
        print(f"error: {'; '.join(failures)}", file=sys.stderr)
    return 1 if differing or failures else 0


if __name__ == "__main__":
    sys.exit(main())
