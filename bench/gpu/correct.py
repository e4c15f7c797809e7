"""b: are the kernels right on this device, and the same twice?

Tests of tests/test_kernels.py, a row each with its errors: those of tests/machine/chosen.txt, long
sequences (T = 4096, N = 1024, 512 rows, twice), and, last, as many others as there is time for.
In between compute-sanitizer and ncu run `launches.py` on small cases; ncu's cycles of a step and
reasons for stalls stand beside the simulated cycles of static/compiled_budget.json. A tool that is
not there, or refuses the device, is a row.
"""

import csv
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from bench import harness
from bench.static import model

BENCH = "correct"
TESTS = "tests/test_kernels.py"
LONG = [f"{TESTS}::test_long_sequences[modrelu-{precision}]" for precision in ("bf16", "fp32")]
QUIET = ("-q", "--no-header", "--no-summary", "-p", "no:cacheprovider")
PROFILED = ("16x16", "32x32")
STEPS = 512  # of a profiled launch
CUDA = "/usr/local/cuda/bin"


def chosen() -> list[str]:
    """Names of the tests that come first, small ones."""
    lines = (harness.ROOT / "tests" / "machine" / "chosen.txt").read_text().split()
    return [line for line in lines if line.startswith(TESTS)]


class Rows:
    """A plugin of pytest: a row for each test, none begun when time is up."""

    def __init__(self, results: harness.Results):
        self.results = results

    def pytest_collection_modifyitems(self, items) -> None:
        items[:] = [item for item in items if not self.results.is_done(BENCH, item.name)]

    def pytest_runtest_setup(self, item) -> None:
        if self.results.out_of_time(item.name):
            pytest.exit("out of time", returncode=0)

    def pytest_runtest_logreport(self, report) -> None:
        name = report.nodeid.rpartition("::")[2]
        values = {"seconds": report.duration, **dict(report.user_properties)}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else str(report.longrepr)[-400:]
            self.results.add_reason(BENCH, name, "failed", f"{report.when}: {reason}", **values)
        elif report.when == "call":
            errors = values.get("errors", {})
            line = ", ".join(f"{k} {error:.1e}" for k, error in errors.items())
            self.results.add(BENCH, name, line or "right", **values)


def run_tests(names: list[str], *plugins) -> int:
    arguments = [str(harness.ROOT / name) for name in names]
    return pytest.main([*QUIET, "--rootdir", str(harness.ROOT), *arguments], plugins=list(plugins))


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=CUDA)


def run_tool(results, name: str, command: list[str], **environment) -> tuple[int, str] | None:
    """The exit code of a tool of CUDA and what it prints; None after a row that says why not."""
    path = tool(command[0])
    if path is None:
        results.add_reason(BENCH, name, "skipped", f"{command[0]} is not installed")
        return None
    seconds = min(45.0, max(1.0, results.seconds_left()))
    try:
        done = subprocess.run(
            [path, *command[1:]],
            cwd=harness.ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        results.add_reason(BENCH, name, "skipped", harness.reason_of(error))
        return None
    return done.returncode, done.stdout + done.stderr


def sanitize(results: harness.Results, check: str, device: torch.device) -> None:
    name = f"compute-sanitizer {check}"
    if results.is_done(BENCH, name) or results.out_of_time(name):
        return
    command = ["compute-sanitizer", "--tool", check]
    command += ["--report-api-errors", "no"] if check == "memcheck" else []
    command += [sys.executable, "-m", "bench.gpu.launches", *PROFILED]
    command += ["--dtypes", "bf16", "fp32", "--device", str(device)]
    # every tensor an allocation of its own, so that its end is known
    ended = run_tool(results, name, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if ended is None:
        return
    code, said = ended
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) .*", said)
    errors = [line.strip("= ") for line in said.splitlines() if line.startswith("=========")]
    if summary and summary[-1] != "0":
        results.add_reason(BENCH, name, "failed", "; ".join(errors[1:6]))
    elif code or not summary:
        told = "; ".join(errors[-3:] or said.split("\n")[-3:])
        results.add_reason(BENCH, name, "skipped", f"ended with code {code}: {told}")
    else:
        results.add(BENCH, name, "no errors")


def profiled_rows(said: str) -> list[dict]:
    """Rows of ncu's page of raw metrics; the first of them has the units."""
    lines = said.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    return list(csv.DictReader(line for line in lines[first:] if line.startswith('"')))[1:]


def profile(results: harness.Results, device: torch.device) -> None:
    """Cycles of a step and reasons for stalls of one program, from ncu."""
    name = "ncu"
    if results.is_done(BENCH, name) or results.out_of_time(name):
        return
    command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base"]
    command += ["--kernel-name", "regex:scan_.*_kernel", "--section", "WarpStateStats"]
    command += ["--metrics", "sm__cycles_active.max,smsp__inst_executed.sum"]
    command += [sys.executable, "-m", "bench.gpu.launches", *PROFILED, "--rows", "1"]
    command += ["--steps", str(STEPS), "--device", str(device)]
    ended = run_tool(results, name, command)
    if ended is None:
        return
    said = ended[1]
    rows = profiled_rows(said)
    if not rows:
        last = " ".join([line for line in said.splitlines() if line.startswith("==")][-3:])
        results.add_reason(BENCH, name, "skipped", f"no metrics: {last or said[-200:]}")
        return
    simulated = model.budget()
    kernels = [f"{kernel}-{size}-bf16" for size in PROFILED for kernel in ("forward", "backward")]
    for kernel, row in zip(kernels, rows):
        numeric = {
            k: v.replace(",", "") for k, v in row.items() if re.fullmatch(r"[\d,.]+", v or "")
        }
        if "sm__cycles_active.max" not in numeric:
            results.add_reason(BENCH, f"ncu {kernel}", "skipped", f"no counters: {row}")
            continue
        cycles = float(numeric["sm__cycles_active.max"]) / STEPS
        stalls = {}
        for key, value in numeric.items():
            found = re.search(r"issue_stalled_(\w+)_per_issue_active", key)
            if found and not found[1].endswith("_not_issued"):
                stalls[found[1]] = float(value)
        worst = sorted((k for k in stalls if k != "selected"), key=stalls.get, reverse=True)[:4]
        expected = simulated[kernel]["step_cycles"]
        line = (
            f"{cycles:.0f} cycles a step, simulated {expected}; cycles between issues by reason: "
        )
        line += ", ".join(f"{k} {stalls[k]:.2f}" for k in worst)
        values = {"cycles": cycles, "simulated_cycles": expected, "stalls": stalls}
        values["instructions"] = float(numeric.get("smsp__inst_executed.sum", 0)) / STEPS
        results.add(BENCH, f"ncu {kernel}", line, **values)


def run(results: harness.Results, device: torch.device) -> None:
    run_tests(chosen()[:2] if results.quick else chosen() + LONG, Rows(results))
    for check in ("memcheck", "racecheck"):
        sanitize(results, check, device)
    profile(results, device)
    if not results.quick:
        run_tests([TESTS], Rows(results))
