"""The benchmark of clips: fresh processes, a table, JSON."""

import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import benchmark_video


def test_memory_is_measured_in_processes_of_their_own(tmp_path, capsys):
    arguments = ["--tiny", "--lengths", "9", "--size", "64", "64", "--window", "4", "--overlap", "1"]
    benchmark_video.main([*arguments, "--output", str(tmp_path)])
    record = json.loads((tmp_path / "results.json").read_text())
    found = {(result["way"], result["frames"]): result for result in record["results"]}
    assert set(found) == {("windows", 9), ("at once", 9)}
    assert all(result["peak"] >= result["idle"] > 2**20 and result["cpu_seconds"] > 0 for result in found.values())
    table = (tmp_path / "results.md").read_text()
    assert table.startswith("| frames | 9 |\n") and table in capsys.readouterr().out


@pytest.mark.parametrize("way", ["windows", "at once"])
def test_what_fails_is_in_the_table(way, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_video.sys, "executable", "false")
    result = benchmark_video.measure_apart(way, 3, [])
    assert result["error"]
    assert "failed" in benchmark_video.table([result, {**result, "way": "at once"}, {**result, "way": "windows"}], [3])
