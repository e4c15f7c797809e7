"""One way in for all benchmarks.

    python -m bench --list                    what there is
    python -m bench --quick                   what --all runs, of every device, on toy sizes
    python -m bench --all                     every benchmark that this device is for
    python -m bench gpu --part d              one of them, with its own flags (--help)
    python -m bench --table                   the newest rows of this device, with ratios

Rows are appended to bench/results/ (toy runs: build/bench), to the file of the device or of the
benchmark. What has a row of the present commit is not run again, so a run that was cut off goes on
where it was; --again repeats it.
"""

import argparse
import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import harness


@dataclass(frozen=True)
class Benchmark:
    """`module` has a `main(flags) -> exit code`."""

    module: str
    what: str
    on: str = ""  # which device --all runs it on; none: it is only run by name


BENCHMARKS = {
    "gpu": Benchmark("gpu.run", "every answer of a GPU in nine minutes: `make gpu`", "cuda"),
    "cpu": Benchmark("speed.cpu", "the torch backend on a CPU", "cpu"),
    "compiled": Benchmark("static.compiled", "registers and instructions of the kernels", "cpu"),
    "precision": Benchmark("quality.precision", "error and cycles by precision of the products"),
    "schedule": Benchmark("static.schedule", "cycles of a step from the machine code's bits"),
    "data": Benchmark("speed.data", "the data path alone", "cpu"),
    "model": Benchmark("static.model", "predicted times, what bounds them, growth"),
    "plot": Benchmark("plot", "draws the figures from the rows"),
    "picture": Benchmark("picture", "draws the picture of the README from committed rows"),
    "context": Benchmark("speed.context", "time per token after 10 to 100,000 others"),
    "baselines": Benchmark("quality.baselines", "trained models at equal tokens and equal time"),
}


def run(name: str, flags: list[str]) -> int:
    return importlib.import_module(f"bench.{BENCHMARKS[name].module}").main(flags)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        if argv[0] not in BENCHMARKS:
            known = ", ".join(BENCHMARKS)
            print(f"bench: no benchmark {argv[0]!r}; there are {known}", file=sys.stderr)
            return 2
        return run(argv[0], argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, help="folder of the rows")
    options = parser.parse_args(argv)
    if options.list:
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:<11} {benchmark.what}")
        return 0
    device = harness.device_for(options, parser)
    out = ["--out", str(options.out)] if options.out else []
    if options.table:
        folder = options.out or (harness.SCRATCH if options.quick else harness.RESULTS)
        path = folder / f"{harness.slug(harness.device_name(device))}.jsonl"
        lines, failed = harness.table(path)
        print(*lines, sep="\n")
        return int(failed > 0 or not path.exists())
    if not (options.quick or options.all):
        parser.error("say --list, --quick, --all, --table or the name of a benchmark")
    codes = {}
    for name, benchmark in BENCHMARKS.items():
        if not benchmark.on or not (options.quick or benchmark.on == device.type):
            continue
        print(f"\n=== {name}", flush=True)
        flags = [*out, *(["--quick"] if options.quick else [])]
        flags += ["--device", str(device)] if name == "gpu" else []
        # a process each: what breaks a device's context, or runs out of memory, ends one alone
        command = [sys.executable, "-m", "bench", name, *flags]
        codes[name] = subprocess.run(command, cwd=harness.ROOT).returncode
    failed = [name for name, code in codes.items() if code]
    print(f"\nran {', '.join(codes)}" + (f"; FAILED: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
