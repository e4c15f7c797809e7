"""Timing: candidates take turns, round by round; percentiles of a call; the device's ceilings."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.harness.device import free_memory, synchronize
from bench.harness.rows import Results
from kru_triton.layers.decoding import capture


class Unavailable(Exception):
    """A candidate that cannot be measured here, with the reason that its row gives."""


@dataclass
class Candidate:
    """One implementation in a race.

    prepare() returns (forward, backward): forward() runs the first part and returns what backward
    needs; backward(result) runs the second part, or is None. Checks belong into prepare. What it
    raises becomes a row: `Unavailable` and lack of memory "skipped", all else "failed", or, for a
    baseline, "skipped" too.
    """

    name: str
    prepare: Callable
    baseline: bool = True
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
    rounds: int,
    *,
    flush: bool = True,
    alone: bool = False,
) -> None:
    """Time candidates in turn, round by round, and add a row for each of their directions.

    A row's name is "case direction candidate". What the candidates hold stays in memory until the
    last round; one for which it is then too short is timed once more by itself (`"alone": true`).

    Args:
        describe: (candidate, direction, times) -> (line to print, further values of the row).
        rounds: fewer, but one, where time is up.
        flush: empty a GPU's L2 cache before each call.
    """

    def row_name(candidate, direction=None):
        if direction is None and len(candidate.directions) == 1:
            direction = candidate.directions[0]
        return " ".join(word for word in (case, direction, candidate.name) if word)

    def is_done(candidate):
        names = [row_name(candidate, d) for d in candidate.directions]
        done = [results.is_done(bench, name) for name in names]
        return results.is_done(bench, row_name(candidate)) or all(done)

    ready, peaks, too_large = {}, {}, []

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
            status, reason = "skipped" if candidate.baseline else "failed", reason_of(error)
        values = {"case": case, "implementation": candidate.name, **candidate.values}
        name = row_name(candidate)
        results.add_reason(bench, name, status, reason, **values)
        if not is_out_of_memory(error):
            synchronize(device)

    clock = Clock(device, flush)
    for candidate in candidates:
        if is_done(candidate) or results.out_of_time(row_name(candidate)):
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
            ready[id(candidate)] = (candidate, functions, [])
        except Exception as error:  # whatever a baseline or a compiler raises is its row's reason
            give_up(candidate, error)
        free_memory(device)
    for turn in range(rounds):
        if turn and results.seconds_left() < 0:
            break
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
            values |= {"case": case, "implementation": candidate.name, "direction": direction}
            peak = peaks.get(id(candidate))
            values |= {"peak_bytes": peak, "alone": alone}
            line = f"{stats['ms_p50']:10.3f} ms  {line}" + (
                f"  {peak / 2**30:.2f} GiB" if peak else ""
            )
            name = row_name(candidate, direction)
            results.add(bench, name, line, **stats, **candidate.values, **values)
    ready.clear()
    functions = None  # the last candidate's memory
    for candidate in too_large:
        free_memory(device)
        race(results, bench, case, [candidate], device, describe, rounds, flush=flush, alone=True)


def ceilings(results: Results, device: torch.device) -> dict:
    """Bytes per second of a device-to-device copy (read and written) and FLOP/s of a product.

    The product is bfloat16 on a GPU, which is also what the split-float32 kernels run, and float32
    on a CPU. Measured once per run of a benchmark: the device's state is part of what is measured.
    """
    if results.ceilings:
        return results.ceilings
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
    results.ceilings = found = {
        "copy_bytes_per_s": 2 * size / 1e-3 / quantiles(copy)["ms_p50"],
        "matmul_flops": 2 * side**3 / 1e-3 / quantiles(product)["ms_p50"],
    }
    line = f"copy {found['copy_bytes_per_s'] / 1e9:.0f} GB/s, product of {side}³ "
    line += f"{found['matmul_flops'] / 1e12:.2f} TFLOP/s"
    constants = {"bandwidth": found["copy_bytes_per_s"]}
    results.add("ceilings", "ceilings", line, constants=constants, **found)
    return found
