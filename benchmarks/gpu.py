"""Compare with `transformers`' Mask2Former on one GPU: kernels, forward pass, training step, results; in ten minutes.

    python benchmarks/gpu.py --output gpu.md --json gpu.json
    python benchmarks/gpu.py --only kernels,host
    python benchmarks/gpu.py --device cpu --tiny    # runs everything without a GPU; its figures mean nothing

Weights and inputs are those of `cpu.py`, and outputs are compared in the same run: the exit status is 1 if they differ
by more than allowed or could not be compared. Implementations take turns after a warm-up, timed by CUDA events; medians
are reported. Each part runs in a process of its own, for its share of the time that is left, and what it finished is
kept, whatever happens to it or to later ones: too little memory or a failed compilation is a line of the result.
"""

import argparse
import json
import os
import platform
import signal
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
from cases import OURS, SIZES, Setup, save_checkpoint
from gpu_parts import PARTS, Pace, Report
from measuring import processor_name
from report import read_check, read_line, render, write_file

import m2f_hf
from m2f_hf.kernels import triton_deformable_attention as kernels


LEAST_SECONDS = 15  # in which a part can start and measure something


# --- one part after another ---


def run_part(name: str, setup: Setup, pace: Pace, path: Path) -> None:
    """Run a part in this process, which should be its own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Convolutions would be rounded to TF32 by default and products not: then nothing could be compared.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    report = Report(path)
    with report.attempt(name):
        PARTS[name].run(setup, report, pace)


def run_part_in_fresh_process(name: str, setup: Setup, pace: Pace, path: Path, limit: float) -> None:
    """Run a part for at most `limit` seconds: a kernel that goes wrong spoils the GPU for its process only, and one
    that hangs can be stopped."""
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
    """Run all parts and return what they found; files are written after each."""
    start = time.monotonic()
    document: dict[str, Any] = {"facts": machine_facts(arguments), "parts": {}}
    print(render(document["facts"], [], [], OURS.name))
    weights = save_checkpoint(arguments.size, folder / "checkpoint", arguments.seed)
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
            write_file(arguments.output, render_document(document))
        if arguments.json is not None:
            write_file(arguments.json, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return document


def machine_facts(arguments: argparse.Namespace) -> dict[str, str]:
    """Return what a reader has to know of the machine and the run."""
    config = SIZES[arguments.size].config()
    found = {
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, m2f_hf {m2f_hf.__version__}, Triton "
        + (kernels.triton.__version__ if kernels.IS_AVAILABLE else "missing"),
        "model": f"{arguments.size}, {config.num_queries} queries, {config.num_labels} classes, random weights",
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    if arguments.device == "cpu":
        return {"device": f"no GPU: {processor_name()}", **found}
    gpu = torch.cuda.get_device_properties(0)
    name = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}, TF32 off; {processor_name()}"
    return {"device": name, **found}


def render_part(name: str, found: Mapping[str, Sequence[Any]]) -> str:
    """Return a part's findings as Markdown."""
    tables = render({}, list(map(read_line, found["lines"])), list(map(read_check, found["checks"])), OURS.name)
    said = [f"- **failed:** {failure}\n" for failure in found["failures"]] + [f"- {note}\n" for note in found["notes"]]
    return "\n".join(part for part in (f"## {PARTS[name].title}\n", tables, "".join(said)) if part)


def render_document(document: Mapping[str, Any]) -> str:
    parts = [render_part(name, found) for name, found in document["parts"].items()]
    return "\n".join([render(document["facts"], [], [], OURS.name), *parts])


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
        parser.error("--device cpu goes with --tiny; cpu.py measures on a CPU")
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
    parts = document["parts"].values()
    differing = [fields["what"] for found in parts for fields in found["checks"] if not fields["passed"]]
    failures = [failure for found in parts for failure in found["failures"]]
    if differing:
        print(f"error: outputs differ by more than allowed: {'; '.join(differing)}", file=sys.stderr)
    if failures:
        print(f"error: {'; '.join(failures)}", file=sys.stderr)
    return 1 if differing or failures else 0


if __name__ == "__main__":
    sys.exit(main())
