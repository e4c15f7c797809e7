"""Tokens per second of `train/lm.py`, alone and beside endless loops of equal priority.

    python -m bench neighbours
    python -m bench neighbours --quick

One run of the script per waiting rule of OpenMP's threads: the script's own, and OpenMP's (300,000
rounds of spinning). The rate is what metrics.jsonl says, from two rows after the loops have started
or ended; a row holds the share of the script's own rate alone.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import harness

BENCH = "neighbours"
LOOPS = 2
RULES = {"lm.py": {}, "GOMP_SPINCOUNT=300000": {"GOMP_SPINCOUNT": "300000"}}


def rates(metrics: Path, seconds: float, process: subprocess.Popen) -> list[float]:
    """tok_s of the rows that are written in so many seconds, of at least two; the two rows after
    the call are left out, since they began before it or warm up."""

    def rows() -> list[dict]:
        return list(map(json.loads, metrics.read_text().splitlines())) if metrics.exists() else []

    first, began = len(rows()) + 2, time.monotonic()
    while len(rows()) < first + 2 or time.monotonic() < began + seconds:
        if process.poll() is not None:
            raise RuntimeError(f"train/lm.py ended with {process.returncode}")
        time.sleep(0.2)
    return [row["tok_s"] for row in rows()[first:]]


def measure(environment: dict, preset: str, seconds: float) -> dict[int, float]:
    """Median tokens per second by the number of loops beside the run."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--preset", preset, "--log-every", "2", "--eval-every", "0", "--wandb", "disabled"]
        command = [sys.executable, "train/lm.py", *flags, "--run-dir", folder]
        given = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
        process = subprocess.Popen(
            command, cwd=harness.ROOT, env={**given, **environment}, stdout=subprocess.DEVNULL
        )
        loops, found = [], {}
        try:
            for count in (0, LOOPS):
                loops += [
                    subprocess.Popen([sys.executable, "-c", "while True: pass"])
                    for _ in range(count)
                ]
                found[count] = statistics.median(
                    rates(Path(folder) / "metrics.jsonl", seconds, process)
                )
        finally:
            for child in (*loops, process):
                child.kill()
                child.wait()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = harness.row_flags(harness.plain_parser(__doc__, "neighbours"))
    options = parser.parse_args(argv)
    options.again = True
    command = harness.command_line("neighbours", argv)
    results = harness.Results(torch.device("cpu"), options, command)
    preset = "tiny" if options.quick else "small"
    results.title(f"neighbours: tokens per second of train/lm.py --preset {preset}")
    alone = None
    for rule, environment in RULES.items():
        for count, rate in measure(environment, preset, 1 if options.quick else 8).items():
            alone = alone or rate
            results.add(
                BENCH,
                f"neighbours {rule} {count} loops",
                f"{rate:9.0f} tokens/s   {rate / alone:5.2f}",
                rule=rule,
                loops=count,
                tokens_per_s=rate,
                share=rate / alone,
            )
    return results.finish()
