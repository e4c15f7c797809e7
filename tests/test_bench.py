"""`bench/cpu.py` runs from end to end on toy sizes and writes rows that can be read."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECTIONS = {"scan", "memory", "layer", "calls", "profile", "growth"}


def test_cpu_quick(tmp_path):
    out = tmp_path / "results" / "cpu.jsonl"
    command = [sys.executable, "bench/cpu.py", "--quick", "--threads", "1", "--out", str(out)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["section"] for row in rows} == SECTIONS
    for row in rows:
        assert {"device", "torch", "threads", "commit", "date", "command"} <= row.keys()
        assert row["threads"] == 1
        assert "--quick" in row["command"]
        assert row["name"] in result.stdout
        if "ms_p20" in row:
            assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
    assert {row["implementation"] for row in rows if row["section"] == "memory"} == {
        "loop",
        "torch",
    }
    checked = [r["max_relative_error"] for r in rows if r.get("max_relative_error") is not None]
    assert checked
    assert all(0 < error < 1e-4 for error in checked)
    calls = {
        (row["name"].split()[0], row["implementation"], row["direction"]): row["calls_per_step"]
        for row in rows
        if row["section"] == "calls"
    }
    for (shape, implementation, direction), count in calls.items():
        if implementation == "torch":  # a step is a few calls; the loop's is at least twice as many
            assert 1 < count <= 10
            assert calls[shape, "loop", direction] >= 2 * count
    for row in rows:
        if row["section"] == "profile":
            assert abs(sum(row["shares"].values()) - 1) < 0.01
