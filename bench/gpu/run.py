"""Every answer of a GPU in one call: `make gpu`, at most nine minutes, in order of worth.

    python -m bench gpu                            # all parts, on the first GPU
    python -m bench gpu --part c d --budget 200    # some, by letter or name, in so many seconds
    python -m bench gpu --box e=60                 # one part's time box set by hand
    python -m bench gpu --device cpu --quick       # a rehearsal on toy sizes, without a GPU: in
                                                   # Triton's interpreter, or with KRU_TARGET=sm_90
                                                   # compiled, on tests/machine

What each part asks: bench/README.md. A part is a process with a time box: what it has not begun by
then it leaves out, and what does not end by itself is ended; time left over goes to those behind.
Whatever fails is a row and stops nothing else. Rows are written as they come, a table last. What
has a row of the present commit is not run again: the same call goes on where one was cut off.
"""

import argparse
import contextlib
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from bench import harness
from bench.gpu.launches import stand_in, why_no_kernels

BUDGET = 540.0  # seconds
LAST = 5.0  # of them for the table


@dataclass(frozen=True)
class Part:
    name: str  # of its module, and of its rows' benchmark
    seconds: float  # of its box, in a budget of BUDGET
    kernels: bool = True  # it is of no use without them


PARTS = {
    "a": Part("compile", 40),
    "b": Part("correct", 120),
    "c": Part("micro", 60),
    "d": Part("steps", 145),
    "e": Part("models", 110, kernels=False),
    "f": Part("learn", 60, kernels=False),
}


def boxes(budget: float, letters: list[str], given: dict[str, float]) -> dict[str, float]:
    """Seconds for each of the parts of which the first is about to begin."""
    left = budget - sum(given.get(letter, 0) for letter in letters)
    shares = {letter: PARTS[letter].seconds for letter in letters if letter not in given}
    total = sum(shares.values())
    return given | {k: max(0.0, left) * share / total for k, share in shares.items()}


def run_part(command: list[str], seconds: float, environment: dict) -> tuple[str, str]:
    """Run a part's process; its status, and why it ended before it was done, if it did."""
    process = subprocess.Popen(command, cwd=harness.ROOT, env=environment, process_group=0)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return "skipped", f"ended after its box of {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # with all that it started
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code < 0:
        return "failed", f"ended by {signal.Signals(-code).name}"
    return ("ok", "") if code in (0, 1) else ("failed", f"ended with code {code}")  # 1: failed rows


def work(part: Part, device: torch.device, options: argparse.Namespace) -> int:
    """The process of a part."""
    command = f"python -m bench gpu --part {part.name}" + " --quick" * options.quick
    results = harness.Results(device, options, command, deadline=options.until)
    try:
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            if free < 0.9 * total:
                reason = f"only {free / 2**30:.1f} of {total / 2**30:.1f} GiB of memory are free"
                results.add_reason(part.name, f"{part.name} memory", "skipped", reason)
        with stand_in():
            if part.kernels and (reason := why_no_kernels(device)):
                results.add_reason(part.name, f"{part.name} kernels", "skipped", reason)
            else:
                importlib.import_module(f"bench.gpu.{part.name}").run(results, device)
    except Exception as error:  # whatever ends a part is its row
        status = "skipped" if harness.is_out_of_memory(error) else "failed"
        results.add_reason(part.name, f"{part.name} end", status, harness.reason_of(error))
    if results.left:
        reason = f"out of time: {len(results.left)} left, the next one {results.left[0]}"
        results.add_reason(part.name, f"{part.name} left", "skipped", reason)
    return results.finish()


def by_letter(words: list[str], made: argparse.ArgumentParser) -> list[str]:
    """Letters of the parts that are called so, in their order."""
    names = {part.name: letter for letter, part in PARTS.items()}
    for word in words:
        if word not in PARTS and word not in names:
            there = ", ".join(f"{letter} ({part.name})" for letter, part in PARTS.items())
            made.error(f"--part: no part {word!r}; there are {there}")
    wanted = {names.get(word, word) for word in words}
    return [letter for letter in PARTS if letter in wanted]


def main(argv: list[str] | None = None) -> int:
    made = harness.parser(__doc__, "gpu")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    made.add_argument("--part", nargs="+", default=list(PARTS), help="letters or names")
    made.add_argument("--budget", type=float, default=BUDGET, help="seconds for all parts")
    made.add_argument("--box", nargs="+", default=[], metavar="PART=SECONDS")
    made.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of a part's process
    options = made.parse_args(argv)
    device = harness.device_for(options, made)
    letters = by_letter(options.part, made)
    if options.until:
        code = work(PARTS[letters[0]], device, options)
        sys.stdout.flush()
        os._exit(code)  # compilers that are still busy are not waited for
    if not 0 < options.budget < math.inf:
        made.error(f"--budget: must be a number of seconds above 0, got {options.budget}")
    given = {}
    for pair in options.box:
        word, _, seconds = pair.partition("=")
        given[by_letter([word], made)[0]] = float(seconds)
    if device.type == "cpu" and not options.quick:
        for letter in letters:
            print(f"{letter} {PARTS[letter].name}: needs a GPU; without one --quick rehearses")
        return 1

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a part ends with what started it
    end = time.monotonic() + options.budget - LAST
    results = harness.Results(device, options, harness.command_line("gpu", argv))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("TRITON_CACHE_DIR", str(harness.ROOT / "build" / "triton"))
    if device.type == "cpu":
        environment["TRITON_INTERPRET"] = "0" if "KRU_TARGET" in environment else "1"
    else:
        environment |= {"TRITON_INTERPRET": "0", "KRU_TARGET": ""}
    for number, letter in enumerate(letters):
        part = PARTS[letter]
        rest = letters[number:]
        began = time.monotonic()
        box = boxes(end - began, rest, {k: v for k, v in given.items() if k in rest})[letter]
        print(f"\n=== {letter} {part.name}: {box:.0f} s", flush=True)
        soft = began + box - min(8.0, box / 4)
        command = [sys.executable, "-m", "bench", "gpu", "--part", letter, "--until", str(soft)]
        command += ["--device", str(device), "--out", str(results.folder)]
        command += [f"--{flag}" for flag in ("quick", "again") if getattr(options, flag)]
        status, reason = run_part(command, box, environment)
        taken = time.monotonic() - began
        name = f"part {letter} {part.name}"
        if status == "ok":
            results.add("gpu", name, f"{taken:.0f} s of {box:.0f}", seconds=taken)
        else:
            results.add_reason("gpu", name, status, reason, seconds=taken)

    lines, failures = harness.table(results.path)
    print("", *lines, sep="\n")
    try:
        (results.folder / "gpu-table.txt").write_text("\n".join(lines) + "\n")
    except OSError as error:
        print(f"gpu-table.txt NOT WRITTEN: {error}")
    return int(failures > 0 or results.failures > 0)
