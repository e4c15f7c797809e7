"""What the benchmarks share: the device and its ceilings, timing in turn, rows and their checks.

A row is one line of JSON in `bench/results/<device>.jsonl`. Files are appended to, never rewritten,
and every row is checked when it is read (`read_rows`). A row says `status`: "ok" with times, or
"skipped" or "failed" with a `reason`. Only torch is needed.
"""

import argparse
import datetime
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kru_triton.decoding import capture

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
SCRATCH = ROOT / "build" / "bench"  # toy runs, which no figure may be drawn from
STATUSES = ("ok", "skipped", "failed")
SCRIPTS = (
    "baselines",
    "checkpoints",
    "convert",
    "data",
    "kills",
    "lm_search",
)  # files in RESULTS whose rows are of another kind
REQUIRED = {
    "bench": str,
    "name": str,
    "status": str,
    "device": str,
    "torch": str,
    "python": str,
    "commit": str,
    "date": str,
    "command": str,
}
MAX_ROUNDS, MIN_ROUNDS = 50, 5
SECONDS_PER_RACE = 6.0


# The device


def pick_device(name: str) -> torch.device:
    """The device of this name; "auto" takes the first GPU there is, else the CPU."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        name = "cuda" if len(there) > 1 else "cpu"
    if name == "cuda" and len(there) > 1:
        name = f"cuda:{torch.cuda.current_device()}"
    if name not in there:
        raise ValueError(f"device: {name!r} is not here; there are auto, {', '.join(there)}")
    if name != "cpu":
        torch.cuda.set_device(name)  # events and graphs belong to the current one
    return torch.device(name)


def cpu_name() -> str:
    """As `kru_triton.train.run_directory` has it, whose imports a GPU machine may lack."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def slug(name: str) -> str:
    """A device's name as a file name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def commit() -> str:
    """Short hash of what is measured, with -dirty where the library differs from it.

    BENCH_COMMIT in the environment overrides it. In a copy without git it is a hash of the
    library's sources, so that an interrupted run still knows its own rows.
    """

    def git(*arguments):
        return subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=ROOT, capture_output=True, text=True
        )

    if given := os.environ.get("BENCH_COMMIT"):
        return given
    if (ROOT / ".git").exists() and shutil.which("git"):
        head = git("rev-parse", "--short", "HEAD")
        if not head.returncode:
            changed = git("status", "--porcelain", "--", "kru_triton", "kernels").stdout.strip()
            return head.stdout.strip() + ("-dirty" if changed else "")
    sources = sorted([*ROOT.glob("kru_triton/*.py"), *ROOT.glob("kernels/*.py")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    return f"sources-{digest.hexdigest()[:10]}"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts(device_or_name, command: str) -> dict:
    """What every row says of where it came from."""
    on_gpu = isinstance(device_or_name, torch.device) and device_or_name.type == "cuda"
    name = device_or_name if isinstance(device_or_name, str) else device_name(device_or_name)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": (torch.version.cuda or torch.version.hip) if on_gpu else None,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Rows


def check_row(row, where: str) -> dict:
    """`row`, after checking that a reader can rely on it."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    for key, kind in REQUIRED.items():
        if not isinstance(row.get(key), kind) or not row[key]:
            raise ValueError(f"{where}: {key!r} must be a non-empty {kind.__name__}")
    if row["status"] not in STATUSES:
        raise ValueError(f"{where}: status must be one of {STATUSES}, got {row['status']!r}")
    if row["status"] != "ok" and not row.get("reason"):
        raise ValueError(f"{where}: a row that is {row['status']} must give its reason")
    times = [row[key] for key in ("ms_p20", "ms_p50", "ms_p80") if key in row]
    if times and (len(times) < 3 or not 0 < times[0] <= times[1] <= times[2] < math.inf):
        raise ValueError(f"{where}: ms_p20, ms_p50, ms_p80 must be positive and in order: {times}")
    datetime.datetime.fromisoformat(row["date"])
    return row


def read_rows(path: Path) -> list[dict]:
    """The checked rows of one file, oldest first; [] if it is not there.

    Raises:
        ValueError: for a line that is no row, with its number.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}); was a run cut off here?") from None
        rows.append(check_row(row, where))
    return rows


def result_files(folder: Path) -> list[Path]:
    """The files of a folder that hold rows; scripts of other names write tables of their own."""
    return [p for p in sorted(folder.glob("*.jsonl")) if p.stem not in SCRIPTS]


def latest(rows: list[dict]) -> list[dict]:
    """The last row of every benchmark and name."""
    return list({(row["bench"], row["name"]): row for row in rows}.values())


class Results:
    """Prints a line per row and appends it to the device's file.

    Args:
        device: a torch device, or the name of what was measured if it is not this machine.
        options: of `parser` (out, again, quick, minutes).
        command: as a user would type it.
    """

    def __init__(self, device, options: argparse.Namespace, command: str):
        self.facts = facts(device, command)
        self.folder = Path(options.out or (SCRATCH if options.quick else RESULTS))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"{slug(self.facts['device'])}.jsonl"
        self.quick = options.quick
        self.failures = 0
        self.left = []  # what there was no time for
        seconds = 60 * options.minutes if options.minutes else math.inf
        self.deadline = time.monotonic() + seconds
        known = {p: read_rows(p) for p in {self.path, RESULTS / self.path.name}}
        self.done = set()
        if not options.again and not self.facts["commit"].endswith("-dirty"):
            # failed ones too: what breaks the device's context must not stop every later run
            self.done = {
                (row["bench"], row["name"])
                for rows in known.values()
                for row in rows
                if row["commit"] == self.facts["commit"] and row.get("quick", False) == self.quick
            }
        print(" · ".join(f"{k} {v}" for k, v in self.facts.items() if k != "command" and v))

    def title(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def is_done(self, bench: str, name: str) -> bool:
        return (bench, name) in self.done

    def out_of_time(self, what: str) -> bool:
        """Whether the budget is spent; `what` is then listed as left over."""
        if time.monotonic() < self.deadline:
            return False
        self.left.append(what)
        return True

    def add(self, bench: str, name: str, line: str, status: str = "ok", **values) -> dict:
        """Append a row; `line` is what a reader of the terminal sees."""
        self.failures += status == "failed"
        row = {"bench": bench, "name": name, "status": status, **values, **self.facts}
        if self.quick:
            row["quick"] = True
        check_row(row, f"row {name!r}")
        print(f"  {name:<44} {line}", flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self.done.add((bench, name))
        return row

    def add_reason(self, bench: str, name: str, status: str, reason: str, **values) -> None:
        reason = " ".join(reason.split())[:500]
        self.add(bench, name, f"{status}: {reason[:120]}", status=status, reason=reason, **values)

    def finish(self) -> int:
        """Print what was left and return the exit status: 1 if a row failed."""
        if self.left:
            print(f"\nout of time, left for another run of the same command: {len(self.left)} of "
                  f"them, the next one {self.left[0]}")  # fmt: skip
        print(f"\nrows appended to {self.path}")
        return int(self.failures > 0)


def parser(doc: str, **extra) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **extra
    )
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    made.add_argument("--quick", action="store_true", help="toy sizes: shows only that it runs")
    made.add_argument("--case", nargs="+", metavar="NAME", help="only these; see --list")
    made.add_argument("--list", action="store_true", help="names of the cases, and nothing else")
    made.add_argument("--out", type=Path, help="folder of the rows; default bench/results")
    made.add_argument("--minutes", type=float, help="start nothing after so long")
    made.add_argument("--again", action="store_true", help="also what has a row of this commit")
    return made


def device_for(options: argparse.Namespace, made: argparse.ArgumentParser) -> torch.device:
    """The device of --device; one that is not here ends the program."""
    try:
        return pick_device(options.device)
    except ValueError as error:
        made.error(str(error))


def chosen(names: list[str], wanted: list[str] | None, options_parser) -> list[str]:
    """Those of `names` that equal or begin with one of `wanted`; unknown ones end the program."""
    if not wanted:
        return names
    for name in wanted:
        if not any(n.startswith(name) for n in names):
            options_parser.error(f"--case: no case {name!r}; there are {', '.join(names)}")
    return [n for n in names if any(n.startswith(w) for w in wanted)]


def command_line(bench: str, argv: list[str] | None) -> str:
    return shlex.join(["python", "-m", "bench", bench, *(sys.argv[1:] if argv is None else argv)])


# Timing


class Unavailable(Exception):
    """A candidate that cannot be measured here, with the reason that its row gives."""


@dataclass
class Candidate:
    """One implementation in a race.

    prepare() returns (forward, backward): forward() runs the first part and returns what backward
    needs; backward(result) runs the second part, or is None. Checks belong into prepare. What it
    raises becomes a row: `Unavailable` and lack of memory "skipped", all else "failed", or, for a
    rival, "skipped" too.
    """

    name: str
    prepare: Callable
    rival: bool = True
    directions: tuple[str, ...] = ("forward", "backward", "both")  # of the parts and their sum
    values: dict = field(default_factory=dict)  # for its rows


def is_out_of_memory(error: BaseException) -> bool:
    """Of the allocator, or as the driver, cuDNN and cuBLAS report it."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(w in str(error) for w in words)


def reason_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class Clock:
    """Times of the two parts of a call, in ms, with the L2 cache flushed before it on a GPU."""

    def __init__(self, device: torch.device, flush: bool = True):
        self.device = device
        self.cache = None
        if device.type == "cuda" and flush:
            self.cache = torch.empty(2**28, dtype=torch.int8, device=device)

    def __call__(self, forward, backward) -> tuple[float, float]:
        if self.device.type != "cuda":
            start = time.perf_counter()
            result = forward()
            middle = time.perf_counter()
            if backward is not None:
                backward(result)
            return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)
        if self.cache is not None:
            self.cache.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        result = forward()
        events[1].record()
        if backward is not None:
            backward(result)
        events[2].record()
        events[2].synchronize()
        return events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2])


def captured(function: Callable) -> Callable:
    """`function` as a CUDA graph: a call replays it and returns the tensors that it fills.

    The replay keeps `function`: the graph reads its inputs where they were, and holds none of them.
    """
    graph, kept = capture(function)

    def replay(_inputs=function):
        graph.replay()
        return kept

    if not all(torch.isfinite(tensor).all() for tensor in replay()):
        raise AssertionError("the replayed graph's result is not finite")
    return replay


def quantiles(ms: list[float]) -> dict:
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(ms, dtype=torch.float64).quantile(points).tolist()
    return {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "rounds": len(ms)}


def race(
    results: Results,
    bench: str,
    case: str,
    candidates: list[Candidate],
    device: torch.device,
    describe: Callable[[Candidate, str, dict], tuple[str, dict]],
    rounds: int | None = None,
    flush: bool = True,
    alone: bool = False,
) -> None:
    """Time candidates in turn, round by round, and add a row for each of their directions.

    A row's name is "case direction candidate". What the candidates hold stays in memory until the
    last round; one for which it is then too short is timed once more by itself (`"alone": true`).

    Args:
        describe: (candidate, direction, times) -> (line to print, further values of the row).
        rounds: None takes as many as fit some seconds, at least MIN_ROUNDS.
        flush: empty a GPU's L2 cache before each call.
    """

    def row_name(candidate, direction):
        return " ".join(word for word in (case, direction, candidate.name) if word)

    def is_done(candidate):
        names = [row_name(candidate, d) for d in candidate.directions]
        return results.is_done(bench, row_name(candidate, reason_direction(candidate))) or all(
            results.is_done(bench, name) for name in names
        )

    def reason_direction(candidate):
        return candidate.directions[0] if len(candidate.directions) == 1 else ""

    ready, first, peaks, too_large = {}, {}, {}, []

    def give_up(candidate, error):
        """A row with the reason; a broken device context raises again at the synchronization."""
        ready.pop(id(candidate), None)
        if is_out_of_memory(error):
            if not alone:
                too_large.append(candidate)
                return
            status, reason = "skipped", f"out of memory at {case}"
        elif isinstance(error, Unavailable):
            status, reason = "skipped", str(error)
        else:
            status, reason = "skipped" if candidate.rival else "failed", reason_of(error)
        results.add_reason(
            bench,
            row_name(candidate, reason_direction(candidate)),
            status,
            reason,
            case=case,
            implementation=candidate.name,
            **candidate.values,
        )
        if not is_out_of_memory(error):
            synchronize(device)

    clock = Clock(device, flush)
    for candidate in candidates:
        if is_done(candidate) or results.out_of_time(row_name(candidate, "")):
            continue
        try:
            functions = candidate.prepare()
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            clock(*functions)  # compiles, and fills the allocator
            if device.type == "cuda":
                # a graph allocated its memory when it was captured: None
                peaks[id(candidate)] = torch.cuda.max_memory_allocated(device) - before or None
            first[id(candidate)] = sum(clock(*functions))
            ready[id(candidate)] = (candidate, functions, [])
        except Exception as error:  # whatever a rival or a compiler raises is its row's reason
            give_up(candidate, error)
        free_memory(device)
    if rounds is None and first:
        rounds = int(1e3 * SECONDS_PER_RACE / max(sum(first.values()), 1e-3))
        rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, rounds))
    for _ in range(rounds or 0):
        for candidate, functions, times in list(ready.values()):
            try:
                times.append(clock(*functions))
            except Exception as error:
                give_up(candidate, error)
    for candidate, functions, times in ready.values():
        parts = {
            "forward": [a for a, _ in times],
            "backward": [b for _, b in times],
            "both": [a + b for a, b in times],
        }
        for direction in candidate.directions:
            # a candidate of one part says itself what that part is
            stats = quantiles(parts["forward" if functions[1] is None else direction])
            line, values = describe(candidate, direction, stats)
            results.add(
                bench,
                row_name(candidate, direction),
                f"{stats['ms_p50']:10.3f} ms  {line}",
                case=case,
                implementation=candidate.name,
                direction=direction,
                peak_bytes=peaks.get(id(candidate)),
                alone=alone,
                **stats,
                **candidate.values,
                **values,
            )
    ready.clear()
    functions = None  # the last candidate's memory
    for candidate in too_large:
        free_memory(device)
        race(results, bench, case, [candidate], device, describe, rounds, flush, alone=True)


# Ceilings


def ceilings(results: Results, device: torch.device) -> dict:
    """Bytes per second of a device-to-device copy (read and written) and FLOP/s of a product.

    The product is bfloat16 on a GPU, which is also what the split-float32 kernels run, and float32
    on a CPU. Measured once per run of a benchmark: the device's state is part of what is measured.
    """
    gpu = device.type == "cuda"
    side, size = (8192, 2**30) if gpu else (512, 2**24)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device, flush=False)
    copy, product = [], []
    for turn in range(8):
        copied = clock(lambda: target.copy_(source), None)[0]
        multiplied = clock(lambda: a @ a, None)[0]
        if turn >= 3:
            copy.append(copied)
            product.append(multiplied)
    found = {
        "copy_bytes_per_s": 2 * size / 1e-3 / quantiles(copy)["ms_p50"],
        "matmul_flops": 2 * side**3 / 1e-3 / quantiles(product)["ms_p50"],
    }
    results.add(
        "ceilings",
        "ceilings",
        f"copy {found['copy_bytes_per_s'] / 1e9:.0f} GB/s, product of {side}³ "
        f"{found['matmul_flops'] / 1e12:.2f} TFLOP/s",
        **found,
    )
    return found
