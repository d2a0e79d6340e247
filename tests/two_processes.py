"""Run a command in two processes that find each other through `torch.distributed`'s environment."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import psutil
from torch.distributed import TCPStore


ROOT = Path(__file__).resolve().parents[1]


def run_two(command: Callable[[int], Sequence[object]], cwd: Path | None = None, timeout: float = 200) -> None:
    """Run a command as ranks 0 and 1 on the CPU, one thread each.

    Args:
        command: makes it from the port where the two meet, which a launcher needs as an option.
        timeout: seconds that both have.

    Raises:
        AssertionError: one failed, or they took too long; with what both wrote, and where each of them was.
    """
    # Held here, so that no one else takes the port while the two import what they need.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "PYTHONFAULTHANDLER": "1"}
    common |= {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    arguments = list(map(str, command(store.port)))
    with tempfile.TemporaryFile("w+") as first, tempfile.TemporaryFile("w+") as second:
        logs = [first, second]
        processes = [
            subprocess.Popen(
                arguments,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=cwd,
                stderr=log,
                start_new_session=True,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            deadline = time.monotonic() + timeout
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                if any(process.poll() for process in processes):
                    break  # the other one would wait for it
                time.sleep(0.05)
            codes = [process.poll() for process in processes]
            if codes != [0, 0]:
                report_stacks(processes)
            reports = [
                f"\nrank {rank}, {'aborted to see where' if code is None else f'status {code}'}:\n{end_of(log)}"
                for rank, (code, log) in enumerate(zip(codes, logs, strict=True))
            ]
            assert codes == [0, 0], "".join(reports)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def report_stacks(processes: Sequence[subprocess.Popen]) -> None:
    """Abort what still runs, a launcher's children before the launcher: Python writes the stack of each thread."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            running = psutil.Process(process.pid)
            for one in (*reversed(running.children(recursive=True)), running):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                    one.send_signal(signal.SIGABRT)
                    one.wait(timeout=5)  # one after the other, so that they do not write across each other


def end_of(log: IO[str], length: int = 6000) -> str:
    log.seek(0)
    return log.read()[-length:]
