"""Runs a command in two processes that find each other through `torch.distributed`'s environment."""

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(command: Sequence[object], port: int, cwd: Path | None = None, timeout: float = 200) -> None:
    """Run the command as ranks 0 and 1 on the CPU, one thread each; both have to succeed.

    Args:
        port: where they meet; for a launcher that is told by its own arguments, the same.
    """
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            list(map(str, command)),
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=cwd,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
